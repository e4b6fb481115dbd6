"""Whether a fit can take its first step."""

from __future__ import annotations

import torch

from deepprob.engine.random import RandomStream
from deepprob.fitting.objectives import Objective
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch
from deepprob.programs.run import Run, first_bad_site

_DRAWS = 20


def check_first_step(instance: ProgramInstance, objective: Objective, batch: Batch) -> None:
    """Refuse a fit whose bound is not finite at the start, under any of several draws.

    Only a program whose first run was not finite is run again.

    Args:
        instance: The program before its first step.
        objective: The objective.
        batch: The rows of a step.

    Raises:
        ValueError: If there is a site that is not finite.
    """
    if instance.first_run_finite:
        return
    program, rows = instance.program, len(batch[0]) if batch else instance.num_data
    with torch.no_grad(), instance.evaluating(), RandomStream(0, instance.device).drawing():
        for _ in range(_DRAWS):
            prepared = program.prepare(*batch)
            index = torch.arange(rows, device=instance.device)
            run = Run(program, prepared, index, instance.num_data, plates=instance.structure.plates)
            if bool(torch.isfinite(objective(run)[0])):
                return
        where = first_bad_site(program, prepared, rows)
    if not where.startswith("site"):
        return
    remedy = (
        "Bound the scale away from 0"
        if "scale" in where
        else "Standardize the data, or start elsewhere, by an AutoGuide with init_loc_fn="
    )
    raise ValueError(f"elbo is not finite at the first step: {where}. {remedy}.")
