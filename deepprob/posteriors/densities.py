"""Densities under draws from a posterior: log-likelihoods, importance weights and bounds, by draw and by row.

If a program has sites that are summed out, a density is a sum of the bound's terms; otherwise it is computed from the
sites of one run.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from deepprob.posteriors.fitted import FittedProgram
from deepprob.posteriors.recipes import number_of
from deepprob.programs.elimination import Term
from deepprob.programs.kl import closed_form_kls
from deepprob.programs.layout import Layout
from deepprob.programs.minibatch import Batch
from deepprob.programs.run import Run
from deepprob.programs.sites import Site, drawn_sites, is_deterministic, is_local, sample_sites
from deepprob.programs.structure import Structure
from deepprob.programs.support import check_data, likelihood_sites


def log_likelihood(fitted: FittedProgram, batch: Batch, draws: int, site: str | None = None) -> Tensor:
    """Log-likelihood by draw and row: ``(K, B)``.

    Raises:
        ValueError: If nothing was observed, the site is unknown, or a site that all rows share is summed out.
    """
    layout = fitted.layout(draws)
    if site is not None:
        return _likelihood_of_site(fitted, batch, draws, site)
    if fitted.structure.summed:
        return _likelihood_of_terms(layout, fitted.structure, fitted.terms(fitted.prepared(batch, draws)))
    model_trace = fitted.run(batch, draws)[1]
    check_data(model_trace, fitted.structure)
    return _likelihood_of_sites(layout, model_trace)


def site_by_row(layout: Layout, structure: Structure, site: Site) -> Tensor:
    """An observed site's log-probability by draw and by row of its own: ``(K, B)``."""
    if is_local(site, layout.plate):
        return layout.log_prob(site)
    return replace(layout, plate=structure.sites[site["name"]].row_plate).log_prob(site)


def _likelihood_of_site(fitted: FittedProgram, batch: Batch, draws: int, site: str) -> Tensor:
    structure = fitted.structure
    if structure.summed:
        raise ValueError(
            f"{', '.join(structure.summed)} is summed out, which couples the observed sites. Ask for all of them "
            "together: leave out site=."
        )
    model_trace = fitted.run(batch, draws)[1]
    check_data(model_trace, structure)
    found = likelihood_sites(model_trace, fitted.layout(draws).plate)
    if site not in found:
        raise ValueError(f"the program observes no site {site!r}. Choose from: {', '.join(found)}.")
    return site_by_row(fitted.layout(draws), structure, found[site])


def row_weights(fitted: FittedProgram, run: Run) -> Tensor:
    """``log p(x, z) - log q(z)`` by draw and row, ``(K, B)``, of the local latents z given the global ones.

    Args:
        fitted: The fitted program.
        run: A prepared run with K draws.

    Raises:
        ValueError: If the guide's density of local sites does not split into rows.
    """
    structure, layout = fitted.structure, fitted.layout(number_of(run))
    _check_by_row(structure)
    if structure.summed:
        found = fitted.terms(run)
        total = _likelihood_of_terms(layout, structure, found)
        local = [t for t in found if t.part == "kl_local"]
        return total + row_weights_of_terms(layout, local) if local else total
    guide_trace, model_trace = fitted.traces(run)
    check_data(model_trace, structure)
    return row_weights_of_traces(layout, guide_trace, model_trace)


def row_weights_of_traces(layout: Layout, guide_trace: Trace, model_trace: Trace) -> Tensor:
    """The log-weight of every row's local latents, by draw, from the sites of a run: ``(K, B)``."""
    total = _likelihood_of_sites(layout, model_trace)
    for _, site in sample_sites(model_trace):
        if not (site["is_observed"] or is_deterministic(site)) and is_local(site, layout.plate):
            total = total + layout.log_prob(site)
    for site in drawn_sites(guide_trace).values():
        if is_local(site, layout.plate):
            total = total - layout.log_prob(site)
    return total


def joint_weights(fitted: FittedProgram, run: Run) -> Tensor:
    """``log p(x, z) - log q(z)`` of all rows together, by draw of a prepared run: ``(K,)``."""
    layout = fitted.layout(number_of(run))
    if fitted.structure.summed:
        return weight_of_terms(layout, fitted.terms(run))
    guide_trace, model_trace = fitted.traces(run)
    if fitted.structure.observed or fitted.structure.rows:  # else the guide was fitted to a prior
        check_data(model_trace, fitted.structure)
    return weight_of_traces(layout, guide_trace, model_trace)


def weight_of_terms(layout: Layout, terms: list[Term]) -> Tensor:
    """The log-weight of all rows together, by draw, from the terms of a bound: ``(K,)``."""
    return torch.stack([_rows_of(layout, term).sum(1) for term in terms]).sum(0)


def weight_of_traces(layout: Layout, guide_trace: Trace, model_trace: Trace) -> Tensor:
    """The log-weight of all rows together, by draw, from the sites of a run: ``(K,)``."""
    log_p = [layout.total(s) for _, s in sample_sites(model_trace) if not is_deterministic(s)]
    log_q = [layout.total(s) for s in drawn_sites(guide_trace).values()]
    return torch.stack(log_p).sum(0) - (torch.stack(log_q).sum(0) if log_q else 0.0)


def local_elbo(fitted: FittedProgram, batch: Batch, draws: int) -> Tensor:
    """The evidence lower bound of every row without the KL of global latents, averaged over draws: ``(B,)``.

    Sites marked for enumeration are enumerated in the model and in the guide.

    Raises:
        ValueError: If the bound does not split into rows.
    """
    structure, layout = fitted.structure, fitted.layout(draws)
    _check_by_row(structure)
    if fitted.program.enumerates:
        found = fitted.terms(fitted.prepared(batch, draws), bound=True)
        total = _likelihood_of_terms(layout, structure, found)
        local = [t for t in found if t.part == "kl_local"]
        return (total + row_weights_of_terms(layout, local) if local else total).mean(0)
    guide_trace, model_trace = fitted.run(batch, draws)
    check_data(model_trace, structure)
    closed = closed_form_kls(guide_trace, model_trace)
    total = _likelihood_of_sites(layout, model_trace)
    for name, site in drawn_sites(guide_trace).items():
        if not is_local(site, layout.plate):
            continue
        if name in closed:
            total = total - layout.by_row(closed[name], site["cond_indep_stack"])
            continue
        total = total - layout.log_prob(site)
        if name in structure.local:
            total = total + layout.log_prob(model_trace.nodes[name])
    return total.mean(0)


def _check_by_row(structure: Structure) -> None:
    if structure.local and not structure.by_row:
        raise ValueError(
            "the guide is one distribution over the latents of all rows, so the bound does not split into rows. "
            "Use log_evidence, the bound of all rows together, or guide='normal'."
        )


def _likelihood_of_sites(layout: Layout, model_trace: Trace) -> Tensor:
    sites = likelihood_sites(model_trace, layout.plate).values()
    rows = [layout.log_prob(s) for s in sites if is_local(s, layout.plate)]
    others = [layout.log_prob(s) for s in sites if not is_local(s, layout.plate)]
    if not rows:
        return torch.cat(others, dim=1)
    total = torch.stack(rows).sum(0)
    # The rows share what is observed outside of their plate.
    return total + torch.cat(others, dim=1).sum(1, keepdim=True) / total.shape[1] if others else total


def _likelihood_of_terms(layout: Layout, structure: Structure, terms: list[Term]) -> Tensor:
    parts = [t for t in terms if t.part == "likelihood"]
    if all(any(frame.name == layout.plate for frame in t.frames) for t in parts):
        return row_weights_of_terms(layout, parts)
    if structure.summed_across_rows:
        outside = ", ".join(map(repr, structure.summed_across_rows))
        raise ValueError(
            f"site {outside} is summed out of all rows at once, so the likelihood does not split into rows. Use "
            "log_evidence, the bound of all rows together, or sample the site in the guide."
        )
    return torch.stack([_rows_of(layout, t).sum(1) for t in parts]).sum(0).unsqueeze(1)


def _rows_of(layout: Layout, term: Term) -> Tensor:
    value = layout.by_row(term.value, term.frames)
    return value if term.part == "likelihood" else -value


def row_weights_of_terms(layout: Layout, terms: list[Term]) -> Tensor:
    """The log-weight of every row, by draw, from the terms of a bound: ``(K, B)``."""
    return sum((_rows_of(layout, t) for t in terms[1:]), _rows_of(layout, terms[0]))
