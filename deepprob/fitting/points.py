"""Programs that can be fitted by points: their latent sites are global, and the fit trains nothing else."""

from __future__ import annotations

from typing import Any

import torch

from deepprob.engine.random import RandomStream
from deepprob.fitting.loop_state import LoopState
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch
from deepprob.programs.parameters import used_parameters
from deepprob.programs.run import Run, run_program


def check_has_sites(instance: ProgramInstance, routine: str) -> None:
    """Refuse a program without latent sites, of which no point can be found.

    Args:
        instance: The program with a guide by name.
        routine: The routine's name.

    Raises:
        ValueError: If the program has no latent site.
    """
    if not instance.structure.latent:
        raise ValueError(
            f"{routine} needs latent sites, and the program has none. Make the weights of a network sites: "
            "deepprob.models.BayesianNeuralNetwork(net); or fit the parameters with svi."
        )


def check_global_sites(state: LoopState, routine: str) -> None:
    """Refuse a program whose posterior is not that of global latent sites alone.

    Args:
        state: The state before the first step.
        routine: The routine's name.

    Raises:
        ValueError: If the program has no latent site, or one for every row, or trains parameters that are not sites.
    """
    instance = state.instance
    check_has_sites(instance, routine)
    if local := instance.structure.local:
        raise ValueError(
            f"{routine} keeps draws of sites that all rows share, but site {local[0]!r} belongs to rows, so that other "
            "rows would have none. Fit this program with svi."
        )
    if names := _trained_beside_sites(instance, tuple(x[: state.batch_size] for x in state.data)):
        raise ValueError(
            f"{routine} needs a program whose trained numbers are all latent sites, but {names[0]!r} is a parameter, "
            "of which a posterior holds one value. Give it a prior with pyro.sample, put the network into "
            "deepprob.models.BayesianNeuralNetwork(net), or fit with svi."
        )


def _trained_beside_sites(instance: ProgramInstance, batch: Batch) -> list[str]:
    """Names of the trained parameters that a run of the model depends on."""
    guide: Any = instance.program.current_guide
    own = {id(p) for p in guide.parameters()}
    rows, query = torch.arange(len(batch[0]) if batch else 1, device=instance.device), None if batch else ""
    with instance.evaluating(), RandomStream(0, instance.device).drawing():
        run = Run(instance.program, instance.program.prepare(*batch), rows, instance.num_data, query=query)
        used = {id(p) for p in used_parameters(run_program(run)[1:])} - own
    pairs = zip(instance.constrained(trained=True), instance.parameters().values(), strict=True)  # in the same order
    return [name for name, p in pairs if id(p) in used]


def check_common_buffers(state: LoopState, routine: str) -> None:
    """Refuse a program whose steps change buffers, which every member would have for itself.

    Args:
        state: The state, once a step has been measured.
        routine: The routine's name.

    Raises:
        ValueError: If a step changes a buffer, such as the running mean of a batch norm.
    """
    varied = {id(x) for x in state.varied}
    changed = {id(x) for x in state.carry["buffers"]} - varied
    names = [name for name, x in state.instance.program.named_buffers() if id(x) in changed]
    if changed:
        what = f"buffer {names[0]!r}" if names else "a tensor of the program"
        raise ValueError(
            f"every step changes {what}, so that the draws of {routine} cannot share one program. Keep the network in "
            "evaluation mode: net.eval() before Program.of(...), or deepprob.models.BayesianNeuralNetwork(net)."
        )
