"""Running a program under the particles of a bound."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from pyro.poutine.trace_struct import Trace

from deepprob.errors import unknown
from deepprob.networks.layer_modes import layers_in
from deepprob.posteriors.draws import DrawRunner
from deepprob.posteriors.fitted import BOUND
from deepprob.programs.enumeration import run_enumerated
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch
from deepprob.programs.run import Run, run_program
from deepprob.programs.sites import Site, is_deterministic, sample_sites

_PRECISIONS = ("float32", "bfloat16")


def check_precision(layers: str) -> None:
    """Check the precision of layers.

    Raises:
        ValueError: If the precision is unknown.
    """
    if layers not in _PRECISIONS:
        raise unknown("precision of layers", layers, _PRECISIONS)


def try_particles(instance: ProgramInstance, batch: Batch) -> None:
    """Find out whether a program broadcasts over a leading plate of particles; otherwise they run one by one.

    Args:
        instance: The program before its first step.
        batch: The rows of a step.
    """
    rows = torch.arange(len(batch[0]) if batch else instance.num_data, device=instance.device)
    with torch.no_grad(), instance.evaluating():
        prepared = instance.program.prepare(*batch)
        run = Run(instance.program, prepared, rows, instance.num_data, plates=instance.structure.plates)
        instance.stacks = DrawRunner(instance).stacks(BOUND, run)
    if not instance.stacks:
        warnings.warn(
            "the particles run one by one, which is slower: the program does not broadcast over a leading axis of "
            "particles, as x @ w, w.sum(), table[i] and recurrent networks do not. Write (x * w).sum(-1) for x @ w.",
            UserWarning,
            stacklevel=5,
        )


def run_particles(run: Run, particles: int, layers: str) -> list[tuple[Trace, Trace]]:
    """Run guide and model under particles; sites marked for enumeration take all of their values.

    Args:
        run: The program, which broadcasts over particles if there are several, and its batch.
        particles: Number of draws from the guide, in a leading plate if there are several.
        layers: Precision in which linear and convolutional layers multiply.

    Returns:
        Pairs of guide trace and model trace: one pair, or one for every combination of sequentially enumerated values.
    """
    run = replace(run, draws=None if particles == 1 else particles)
    with layers_in(layers):
        return [run_program(run)] if run.program.enumerates is False else run_enumerated(run)


def check_drawn(guide_trace: Trace, model_trace: Trace) -> None:
    """Check that the guide drew every latent site, in a run without summed-out sites.

    Raises:
        ValueError: If a latent site is not in the guide.
    """
    for name, site in sample_sites(model_trace):
        if not site["is_observed"] and name not in guide_trace.nodes:
            raise ValueError(
                f"site {name!r} is neither in the guide nor marked for enumeration in the first run. "
                "Make every run of the program have the same sites."
            )


def is_rough(site: Site) -> bool:
    """Whether a site of a guide was drawn without a reparameterized gradient."""
    return not (site["is_observed"] or site["fn"].has_rsample or is_deterministic(site))
