"""Draws of latent sites from a fitted program."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deepprob.posteriors.fitted import FittedProgram


def latent_draws(fitted: FittedProgram, data: tuple[Any, ...], draws: int, seed: int) -> dict[str, Tensor]:
    """Draws of the latent sites, and with data of those that are summed out or computed; see `Posterior.sample`.

    Args:
        fitted: The posterior's program.
        data: The user's data; empty for the global sites alone.
        draws: Number of draws, K.
        seed: Random seed of the draws.

    Raises:
        ValueError: If no data are given but every latent site is local, or the guide depends on the data.
    """
    structure, layout = fitted.structure, fitted.layout(draws)
    complete = bool(data) or not fitted.instance.inputs
    extra = structure.summed + structure.computed if complete else ()
    if complete:
        batch, names = fitted.accept(fitted.inputs_of(data)), structure.latent
    else:
        batch, names = fitted.example(), structure.latent if fitted.keeps_rows else structure.global_
        if not names:
            hidden = ", ".join(structure.local + structure.summed)
            raise ValueError(f"every latent site ({hidden}) is local. Give the rows: posterior.sample(*data).")
    with fitted.querying(seed):
        if extra:
            guide_trace, model_trace = fitted.run(batch, draws)
        else:
            guide_trace = fitted.run_guide(batch, draws)
        found = {name: layout.draws_first(guide_trace.nodes[name]) for name in names}
        found |= {name: layout.draws_first(model_trace.nodes[name]) for name in extra}
    if not data and any(bool(v.isnan().any()) for v in found.values() if v.is_floating_point()):
        raise ValueError("the guide depends on the data, and none were given. Call posterior.sample(*data).")
    return found
