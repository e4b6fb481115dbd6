"""A posterior as an ArviZ container."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepprob.posteriors.arviz_compat import from_dict
from deepprob.posteriors.densities import joint_weights, log_likelihood, site_by_row
from deepprob.posteriors.fitted import FittedProgram
from deepprob.programs.minibatch import Batch
from deepprob.programs.sites import drawn_sites, observed_sites
from deepprob.programs.support import likelihood_sites


def latents_to_arviz(fitted: FittedProgram, latents: Mapping[str, Tensor]) -> Any:
    """Draws of latent sites as a container with one group, ``posterior``.

    Args:
        fitted: The fitted program.
        latents: Draws by site, shape ``(K, *site)``.
    """
    return from_dict({"posterior": _by_chain(fitted, latents)})


def to_arviz(fitted: FittedProgram, batch: Batch, draws: int, seed: int) -> Any:
    """The posterior and its predictions for some rows, as a container.

    All groups hold the same draws from the guide, or all stored draws.

    Args:
        fitted: The fitted program.
        batch: The program's arguments, including the observed ones.
        draws: Number of draws, K.
        seed: Random seed of the draws.
    """
    layout, structure = fitted.layout(draws), fitted.structure
    with fitted.querying(seed):
        guide_trace, model_trace = fitted.run(batch, draws)
    seen, predictions = observed_sites(model_trace), {}
    if not structure.undrawable:
        with fitted.querying(seed):
            _, predicted = fitted.run(batch, draws, predict=True)
        predictions = {n: layout.draws_first(predicted.nodes[n]) for n in seen}
    latents = {n: layout.draws_first(guide_trace.nodes[n]) for n in structure.latent}
    latents |= {n: layout.draws_first(model_trace.nodes[n]) for n in structure.summed + structure.computed}
    with fitted.querying(seed):
        if structure.summed:  # summed-out sites couple the observed ones, so only their joint likelihood exists
            likelihoods = {"+".join(seen): log_likelihood(fitted, batch, draws)}
        else:
            parts = seen or likelihood_sites(model_trace, layout.plate)
            likelihoods = {n: site_by_row(layout, structure, s) for n, s in parts.items()}
    groups = {
        "posterior": _by_chain(fitted, latents),
        "posterior_predictive": _by_chain(fitted, predictions),
        "log_likelihood": _by_chain(fitted, likelihoods),
        "observed_data": {n: s["value"].cpu().numpy() for n, s in seen.items()},
    }
    if fitted.chains is None and structure.global_:
        with fitted.querying(seed):
            log_q = torch.stack([layout.total(s) for s in drawn_sites(guide_trace).values()]).sum(0)
            lp = joint_weights(fitted, batch, draws) + log_q
        groups["sample_stats"] = _by_chain(fitted, {"lp": lp, "log_q": log_q})
    return from_dict({name: group for name, group in groups.items() if group})


def _by_chain(fitted: FittedProgram, values: Mapping[str, Tensor]) -> dict[str, Any]:
    chains = 1 if fitted.chains is None else next(iter(fitted.chains.values())).shape[0]
    return {n: v.reshape(chains, -1, *v.shape[1:]).detach().cpu().numpy() for n, v in values.items()}
