"""Scores of a run: log-likelihoods, importance weights and bounds, by draw and by row."""

from __future__ import annotations

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from deepprob.objectives import closed_form_kls
from deepprob.observed import check_observed
from deepprob.shapes import Layout
from deepprob.traces import Site, Structure, is_data, is_deterministic, is_local, sample_sites


def observed_sites(model_trace: Trace) -> dict[str, Site]:
    """The sites that were given data."""
    return {n: s for n, s in sample_sites(model_trace) if is_data(s)}


def drawn_sites(guide_trace: Trace) -> dict[str, Site]:
    """The sites that the guide drew, auxiliary ones included."""
    return {n: s for n, s in sample_sites(guide_trace) if not is_deterministic(s)}


def log_likelihood(layout: Layout, model_trace: Trace) -> Tensor:
    """Log-likelihood by draw and row: ``(K, B)``.

    Raises:
        ValueError: If nothing was observed.
    """
    _check_data(model_trace)
    sites = [s for _, s in sample_sites(model_trace) if s["is_observed"] and not is_deterministic(s)]
    if all(is_local(s, layout.plate) for s in sites):
        return torch.stack([layout.log_prob(s) for s in sites]).sum(0)
    return torch.cat([layout.log_prob(s) for s in sites], dim=1)


def _check_data(model_trace: Trace) -> None:
    if not observed_sites(model_trace):
        raise ValueError("nothing is observed: give the observed arguments too, all that the fit was given.")
    check_observed(model_trace)


def row_weights(layout: Layout, structure: Structure, guide_trace: Trace, model_trace: Trace) -> Tensor:
    """``log p(x, z) - log q(z)`` by draw and row, where every latent belongs to a row: ``(K, B)``."""
    total = log_likelihood(layout, model_trace)
    for name in structure.local:
        total = total + layout.log_prob(model_trace.nodes[name])
    for site in drawn_sites(guide_trace).values():
        total = total - layout.log_prob(site)
    return total


def joint_weights(layout: Layout, guide_trace: Trace, model_trace: Trace) -> Tensor:
    """``log p(x, z) - log q(z)`` by draw, of the data as a whole: ``(K,)``."""
    _check_data(model_trace)
    log_p = [layout.total(s) for _, s in sample_sites(model_trace) if not is_deterministic(s)]
    log_q = [layout.total(s) for s in drawn_sites(guide_trace).values()]
    return torch.stack(log_p).sum(0) - (torch.stack(log_q).sum(0) if log_q else 0.0)


def local_elbo(layout: Layout, structure: Structure, guide_trace: Trace, model_trace: Trace) -> Tensor:
    """The evidence lower bound of every row without the KL of global latents, averaged over draws: ``(B,)``."""
    if structure.local and not structure.by_row:
        raise ValueError(
            "the guide is one distribution over the latents of all rows, so that no row has a bound of its own. "
            "Use log_evidence, the bound of all rows together, or guide='normal'."
        )
    closed = closed_form_kls(guide_trace, model_trace)
    total = log_likelihood(layout, model_trace)
    for name, site in drawn_sites(guide_trace).items():
        if not is_local(site, layout.plate):
            continue
        if name in closed:
            total = total - layout.by_row(closed[name], site)
            continue
        total = total - layout.log_prob(site)
        if name in structure.local:
            total = total + layout.log_prob(model_trace.nodes[name])
    return total.mean(0)
