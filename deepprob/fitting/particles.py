"""Runs of a program under the particles of a bound."""

from __future__ import annotations

from dataclasses import replace

from pyro.poutine.trace_struct import Trace

from deepprob.errors import unknown
from deepprob.networks.layer_modes import layers_in
from deepprob.programs.enumeration import run_enumerated
from deepprob.programs.run import Run, run_program
from deepprob.programs.sites import Site, is_deterministic, sample_sites

_PRECISIONS = ("float32", "bfloat16")


def check_precision(layers: str) -> None:
    """Refuse an unknown precision of layers.

    Raises:
        ValueError: If it is unknown.
    """
    if layers not in _PRECISIONS:
        raise unknown("precision of layers", layers, _PRECISIONS)


def run_particles(run: Run, particles: int, layers: str) -> list[tuple[Trace, Trace]]:
    """Run guide and model under particles, with all values of the sites that are marked for enumeration.

    Args:
        run: What to run.
        particles: Draws from the guide, in a leading plate if there are several.
        layers: Precision in which linear and convolutional layers multiply.

    Returns:
        Pairs of the guide's trace and the model's: one, or one for every combination of sequential values.
    """
    run = replace(run, draws=None if particles == 1 else particles)
    with layers_in(layers):
        return [run_program(run)] if run.program.enumerates is False else run_enumerated(run)


def check_drawn(guide_trace: Trace, model_trace: Trace) -> None:
    """Refuse a run whose model samples what the guide did not draw, though nothing is summed out.

    Raises:
        ValueError: If there is such a site.
    """
    for name, site in sample_sites(model_trace):
        if not site["is_observed"] and name not in guide_trace.nodes:
            raise ValueError(
                f"site {name!r} is not in the guide, nor was it marked for enumeration in the first run. "
                "Let every run of the program have the same sites."
            )


def is_rough(site: Site) -> bool:
    """Whether a site of a guide was drawn without a reparameterised gradient."""
    return not (site["is_observed"] or site["fn"].has_rsample or is_deterministic(site))
