r"""Draws of a guide, with what tells how far it is from the posterior.

A draw has unconstrained coordinates :math:`u`: the values that the guide draws, mapped from their supports to the
reals. Its log-weight is :math:`\log p(u, x) - \log q(u \mid x)`, and its score is the gradient
:math:`\nabla_u \log p(u, x)`, the posterior's, whatever the guide. See `deepprob.engine.accuracy` for its use.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import Transform, biject_to

from deepprob.distributions.per_draw import is_delta
from deepprob.posteriors.densities import (
    row_weights_of_terms,
    row_weights_of_traces,
    weight_of_terms,
    weight_of_traces,
)
from deepprob.posteriors.draws import Fixed, Job
from deepprob.posteriors.fitted import FittedProgram
from deepprob.programs.elimination import Part, Term, terms
from deepprob.programs.enumeration import run_enumerated
from deepprob.programs.layout import Layout
from deepprob.programs.minibatch import Batch
from deepprob.programs.run import Run, run_guide, run_program
from deepprob.programs.sites import Site, drawn_sites
from deepprob.programs.structure import Structure, is_discrete

_CHUNK = 2**22  # numbers of one tensor of the data or the latents, times draws
_NO_GRADIENT = (RuntimeError, NotImplementedError, ValueError, AttributeError, TypeError, IndexError, KeyError)


@dataclass(frozen=True, eq=False)
class GuideDraws:
    """Draws of a guide, K in number.

    Attributes:
        log_weights: ``log p(z, x) - log q(z | x)`` in nats, shape ``(K,)`` for all rows together, ``(K, B)`` where
            every row has latents of its own.
        values: Coordinates by site: ``(K, n)``, or ``(K, B, n)``. A vector that several sites of the model share, as in
            ``AutoMultivariateNormal``, is split into them.
        scores: Gradients of the log-density of coordinates and data, of the same shapes; empty if the program has
            none.
        why: The reason why there are no scores.
    """

    log_weights: Tensor
    values: Mapping[str, Tensor]
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    why: str = ""


def guide_draws(fitted: FittedProgram, batch: Batch, draws: int, seed: int) -> GuideDraws:
    """Draw from a guide.

    Args:
        fitted: The program of a posterior that holds a guide.
        batch: The accepted data: those of the fit, unless all latents are local.
        draws: Number of draws, K.
        seed: Random seed of the draws.
    """
    try:
        return _drawn(fitted, batch, draws, seed, scored=True)
    except _NO_GRADIENT as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        return replace(_drawn(fitted, batch, draws, seed, scored=False), why=reason)


def _drawn(fitted: FittedProgram, batch: Batch, draws: int, seed: int, *, scored: bool) -> GuideDraws:
    found = fitted.structure
    job = scored_job(fitted) if scored else _job("weighed draws", found, fitted.amortized, scored)
    size = max(1, _CHUNK // max((x.numel() for x in batch), default=1))
    parts: dict[str, list[Tensor]] = {}
    with fitted.querying(seed):
        for start in range(0, draws, size):
            run = fitted.prepared(batch, min(size, draws - start), weighted=not fitted.amortized)
            for term in fitted.under_draws(job, run):
                parts.setdefault(str(term.part), []).append(term.value.reshape(run.draws or 1, *term.value.shape[1:]))
    joined = {name: torch.cat(pieces) for name, pieces in parts.items()}
    weights = joined.pop(_WEIGHTS)
    values, scores = ({n[1:]: x for n, x in joined.items() if n[0] == kind} for kind in (_VALUE, _SCORE))
    weights = weights.reshape(draws, -1) if fitted.amortized else weights.reshape(draws)
    return GuideDraws(weights, _split(fitted, values), _split(fitted, scores))


def scored_job(fitted: FittedProgram) -> Job:
    """The job that weighs draws of a guide, with gradients."""
    return _job("scored draws", fitted.structure, fitted.amortized, True)


def _job(name: str, structure: Structure, by_row: bool, scored: bool) -> Job:
    return Job(name, partial(_weigh, structure, by_row, scored), drawn=lambda run: [run_guide(run)])


def replayed_density(fitted: FittedProgram, batch: Batch, values: Mapping[str, Tensor]) -> Tensor:
    """The log-density of latent values and data, ``(K,)``.

    Args:
        fitted: The program.
        batch: The accepted data.
        values: Values of all latent sites, ``(K, *site)`` each.
    """
    draws = len(next(iter(values.values())))
    job = Job("density", partial(_weigh, fitted.structure, False, False))
    with fitted.querying(0):
        found = fitted.under_draws(job, fitted.prepared(batch, draws, weighted=True), values)
    (density,) = (term.value for term in found if str(term.part) == _WEIGHTS)
    return torch.as_tensor(density).reshape(draws)


_WEIGHTS, _VALUE, _SCORE = "log-weights", "v", "s"


def _weigh(structure: Structure, by_row: bool, scored: bool, run: Run) -> list[Term]:
    """The log-weights of a run's draws, their coordinates and scores, as terms named by what they are."""
    layout = Layout(structure.row_plate, run.plates, run.draws or 1)
    with torch.no_grad():
        drawn = {n: s for n, s in drawn_sites(run_guide(run)).items() if has_coordinates(s)}
        stored = any(_is_stored(s) for s in drawn.values())  # only the model knows the supports of stored draws
        supports = drawn if not stored else drawn_sites(run_program(run)[1])
    with torch.set_grad_enabled(scored):
        maps = {n: biject_to(supports[n]["fn"].support) for n in drawn}
        points = {n: maps[n].inv(s["value"]).detach().clone().requires_grad_(scored) for n, s in drawn.items()}
        with Fixed({n: maps[n](u) for n, u in points.items()} if scored else {n: s["value"] for n, s in drawn.items()}):
            weights, guide_trace = log_weights_of(structure, layout, by_row, run)
        density = weights.sum() + sum(_log_q(layout, s, maps.get(n)) for n, s in drawn_sites(guide_trace).items())
        gradients = torch.autograd.grad(density, list(points.values())) if scored and points else ()
    found = {_WEIGHTS: weights.detach() if run.draws else weights.detach()[0]}
    for kind, columns in ((_VALUE, points.values()), (_SCORE, gradients)):
        for (name, site), column in zip(drawn.items(), columns, strict=False):
            flat = _flat(layout, {**site, "value": column.detach()}, by_row)
            found[kind + name] = flat if run.draws else flat[0]
    return [Term(cast(Part, name), value, ()) for name, value in found.items()]


def log_weights_of(structure: Structure, layout: Layout, by_row: bool, run: Run) -> tuple[Tensor, Trace]:
    """The log-weights of a run, and the guide's trace."""
    if structure.summed:
        pairs = run_enumerated(run, enumerate_guide=False)
        found = [term for g, m in pairs for term in terms(g, m, layout.plate, {})]
        return (row_weights_of_terms if by_row else weight_of_terms)(layout, found), pairs[0][0]
    guide_trace, model_trace = run_program(run)
    return (row_weights_of_traces if by_row else weight_of_traces)(layout, guide_trace, model_trace), guide_trace


def _log_q(layout: Layout, site: Site, to_support: Transform | None) -> Tensor | float:
    """What to add to the log-weight for the density of the model's side, in the coordinates of a site of the guide."""
    if is_delta(site["fn"]) and not _is_stored(site):
        return 0.0  # it maps coordinates to the model's values, and its density is that map's
    log_q = 0.0 if _is_stored(site) else layout.log_prob(site).sum()
    if to_support is None:
        return log_q  # of a discrete site
    value = site["value"]
    return log_q + torch.as_tensor(to_support.log_abs_det_jacobian(to_support.inv(value), value)).sum()


def has_coordinates(site: Site) -> bool:
    """Whether a site of a guide is drawn from a density, neither discrete nor computed from another site."""
    if is_discrete(site):
        return False
    return _is_stored(site) or not is_delta(site["fn"])


def _is_stored(site: Site) -> bool:
    """Whether a site of a guide returns the draws that a posterior holds."""
    return bool(site["infer"].get("replayed"))


def _flat(layout: Layout, site: Site, by_row: bool) -> Tensor:
    """A site's value, ``(K, n)``; or ``(K, B, n)``."""
    value = layout.draws_first(site)
    if by_row:
        return value.movedim(1 + layout.row_axis(site), 1).flatten(2) if value.dim() > 2 else value.unsqueeze(-1)
    return value.reshape(len(value), -1)


def _split(fitted: FittedProgram, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Columns by site of the model, from those by site of the guide."""
    guide, found = fitted.program.current_guide, {}
    packed = {f"_{m._pyro_name}_latent": m for m in _modules(guide) if isinstance(m, AutoContinuous)}
    for name, column in columns.items():
        if name not in packed:
            found[name.removesuffix("_unconstrained")] = column
            continue
        shapes = packed[name]._unconstrained_shapes
        parts = column.split([shape.numel() for shape in shapes.values()], dim=-1)
        fixed: Collection[str] = getattr(packed[name], "points", ())
        found.update((n, x) for n, x in zip(shapes, parts, strict=True) if n not in fixed)
    return found


def _modules(guide: object) -> list[nn.Module]:
    return list(guide.modules()) if isinstance(guide, nn.Module) else []
