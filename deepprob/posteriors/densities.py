"""Scores of a run: log-likelihoods, importance weights and bounds, by draw and by row."""

from __future__ import annotations

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from deepprob.programs.elimination import Term
from deepprob.programs.kl import closed_form_kls
from deepprob.programs.layout import Layout
from deepprob.programs.sites import Site, is_data, is_deterministic, is_local, sample_sites
from deepprob.programs.structure import Structure
from deepprob.programs.support import check_observed


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
    check_data(model_trace)
    sites = [s for _, s in sample_sites(model_trace) if s["is_observed"] and not is_deterministic(s)]
    if all(is_local(s, layout.plate) for s in sites):
        return torch.stack([layout.log_prob(s) for s in sites]).sum(0)
    return torch.cat([layout.log_prob(s) for s in sites], dim=1)


def check_data(model_trace: Trace) -> None:
    """Refuse a run without data, or with values that its sites cannot have.

    Raises:
        ValueError: If nothing was observed, or something that cannot have been.
    """
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
    check_data(model_trace)
    log_p = [layout.total(s) for _, s in sample_sites(model_trace) if not is_deterministic(s)]
    log_q = [layout.total(s) for s in drawn_sites(guide_trace).values()]
    return torch.stack(log_p).sum(0) - (torch.stack(log_q).sum(0) if log_q else 0.0)


def _check_by_row(structure: Structure) -> None:
    if structure.local and not structure.by_row:
        raise ValueError(
            "the guide is one distribution over the latents of all rows, so that no row has a bound of its own. "
            "Use log_evidence, the bound of all rows together, or guide='normal'."
        )


def local_elbo(layout: Layout, structure: Structure, guide_trace: Trace, model_trace: Trace) -> Tensor:
    """The evidence lower bound of every row without the KL of global latents, averaged over draws: ``(B,)``."""
    _check_by_row(structure)
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


def summed_log_likelihood(layout: Layout, structure: Structure, terms: list[Term]) -> Tensor:
    """`log_likelihood` of a run with sites summed out: ``(K, B)``.

    Raises:
        ValueError: If a sum goes over all rows at once.
    """
    parts = [t for t in terms if t.part == "likelihood"]
    if all(_in_plate(t, layout.plate) for t in parts):
        return _by_row(layout, parts)
    if any(structure.sites[name].local for name in structure.observed):
        outside = ", ".join(repr(n) for n in structure.summed if not structure.sites[n].local)
        raise ValueError(
            f"site {outside} is summed out of all rows at once, so that no row has a likelihood of its own. Use "
            "log_evidence, that of all rows together, or sample it in the guide."
        )
    return _total(layout, parts).unsqueeze(1)


def summed_row_weights(layout: Layout, terms: list[Term]) -> Tensor:
    """`row_weights` of a run with sites summed out: ``(K, B)``."""
    return _by_row(layout, terms)


def summed_joint_weights(layout: Layout, terms: list[Term]) -> Tensor:
    """`joint_weights` of a run with sites summed out: ``(K,)``."""
    return _total(layout, terms)


def summed_local_elbo(layout: Layout, structure: Structure, terms: list[Term]) -> Tensor:
    """`local_elbo` of a run with sites enumerated or summed out: ``(B,)``."""
    _check_by_row(structure)
    total = summed_log_likelihood(layout, structure, terms)
    local = [t for t in terms if t.part == "kl_local"]
    return (total + _by_row(layout, local) if local else total).mean(0)


def _in_plate(term: Term, plate: str) -> bool:
    return any(frame.name == plate for frame in term.frames)


def _rows_of(layout: Layout, term: Term) -> Tensor:
    value = layout.by_row(term.value, {"cond_indep_stack": term.frames})
    return value if term.part == "likelihood" else -value


def _by_row(layout: Layout, terms: list[Term]) -> Tensor:
    return sum((_rows_of(layout, t) for t in terms[1:]), _rows_of(layout, terms[0]))


def _total(layout: Layout, terms: list[Term]) -> Tensor:
    return torch.stack([_rows_of(layout, t).sum(1) for t in terms]).sum(0)
