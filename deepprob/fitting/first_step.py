"""What happens before the first step of a fit: its checks, and the search for a start."""

from __future__ import annotations

import torch
from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.fitting.divergence import description_at_start
from deepprob.fitting.objectives import Objective, check_objective
from deepprob.fitting.particles import try_particles
from deepprob.fitting.start import start_near_posterior
from deepprob.programs.finiteness import first_bad_site, run_on_all
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch
from deepprob.programs.run import Run

_DRAWS = 20
_MOST_ROWS = 10_000  # at which a fit on minibatches looks to find its start


def prepare_start(
    instance: ProgramInstance,
    objective: Objective,
    batch: Batch,
    size: int,
    weights: str,
    steps: int,
    numbers: Tensor | None = None,
) -> None:
    """Check that a first step can be taken, and let a guide by name start near the posterior.

    Args:
        instance: The program before its first step.
        objective: The objective.
        batch: All rows, on the device, or a sample of them.
        size: Rows of a step.
        weights: The choice of weights; ``"keep"`` keeps the guide's start, too.
        steps: Planned steps.
        numbers: The numbers of a sample's rows in the data; None for all rows.

    Raises:
        ValueError: If the bound is not finite at the start, or the objective cannot be used.
    """
    first = tuple(x[:size] for x in batch)
    check_first_step(instance, objective, first)
    check_objective(objective, instance, first)
    if getattr(objective, "particles", 1) > 1:
        try_particles(instance, first)
    search_start(instance, batch, size, weights, steps, numbers)


def search_start(
    instance: ProgramInstance, batch: Batch, size: int, weights: str, steps: int, numbers: Tensor | None = None
) -> None:
    """Let a guide by name start near the posterior, if the search pays; the arguments are those of `prepare_start`."""
    if weights == "keep" or (size < instance.num_data and instance.structure.local):
        return
    rows = torch.arange(instance.num_data)
    if numbers is not None:
        batch, rows = tuple(x[-_MOST_ROWS:] for x in batch), numbers[-_MOST_ROWS:]
    elif size < instance.num_data > _MOST_ROWS:
        rows = torch.randperm(instance.num_data, generator=torch.Generator().manual_seed(0))[:_MOST_ROWS]
        batch = tuple(x[rows.to(x.device)] for x in batch)
    start_near_posterior(instance, batch, rows.to(instance.device), steps)


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
        where = first_bad_site(run_on_all(program, prepared, rows))
    if not where.startswith("site"):
        return
    raise ValueError(description_at_start("elbo is not finite", where))
