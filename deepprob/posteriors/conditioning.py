"""Predictions given values of some sites, and under interventions on them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoStructured
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to

from deepprob.distributions.per_draw import is_delta, unwrapped
from deepprob.engine.random import RandomStream
from deepprob.errors import unknown
from deepprob.posteriors.fitted import FittedProgram
from deepprob.programs.layout import Layout, placed
from deepprob.programs.minibatch import Batch
from deepprob.programs.names_apart import NamesApart
from deepprob.programs.run import Known, Run, run_program
from deepprob.programs.sites import Site, is_deterministic, sample_sites
from deepprob.programs.support import is_outside, outside_message

_FEW = 0.1  # effective draws, as a share of all


def predicted_trace(
    fitted: FittedProgram, batch: Batch, draws: int, site: str | None, given: Mapping[str, Any], do: Mapping[str, Any]
) -> Trace:
    r"""The model's trace under draws from the posterior, given values of some sites and under interventions.

    .. math:: p(y \mid v) = \sum_k \bar w_k \, p(y \mid \theta_k, v), \qquad \bar w_k \propto w_k

    For a site that the model observes, or sums out, :math:`w_k` is its density :math:`p(v \mid \theta_k)`. For a site
    of the guide it is the guide's, :math:`q(v \mid \theta_k)`, so that the other sites follow the guide's conditional
    distribution; a Gaussian guide over several sites is conditioned in closed form. The draws are resampled by their
    weights: row by row if all latent sites belong to rows, else together.

    An intervention changes no weight: the sites of the guide keep their draws, and the model computes and draws
    everything else from the new value, as does ``pyro.poutine.do``.

    Args:
        fitted: The posterior's program.
        batch: Its arguments.
        draws: The number of draws, K.
        site: The site to predict.
        given: Known values by site.
        do: Values by site, in the place of those that the model draws.

    Raises:
        ValueError: If a site is unknown, a value has another shape than its site, or the guide has no density.
    """
    for what, values in (("given", given), ("do", do)):
        if not isinstance(values, Mapping):
            raise TypeError(f"{what} must be a dict of values by site, such as {{'w': 1.0}}; got {values!r}.")
    if site in (*given, *do):
        raise ValueError(f"site {site!r} is known, by given or do. Predict another one.")
    run = fitted.prepared(batch, draws, predict=True)
    if given or do:
        run = replace(run, **_known(fitted, run, given, do))
    if not given:
        return fitted.predicted(run)[1]
    structure, layout = fitted.structure, fitted.layout(draws)
    guide_trace, model_trace = fitted.predicted(run)
    values = {
        name: layout.draws_first(node)
        for name, node in sample_sites(model_trace)
        if name in structure.latent + structure.summed and name not in given
    }
    if not values:
        return model_trace
    if moved := _conditioned_gaussians(fitted, values, guide_trace, layout.draws_first, run.given):
        values = values | moved
        model_trace = fitted.predicted(run, values)[1]
    by_row = structure.by_row and structure.all_local(structure.latent + structure.summed)
    weights = torch.zeros(draws, 1, device=fitted.instance.device)
    for name in given:
        node: Site = guide_trace.nodes.get(name, model_trace.nodes[name])
        if name in structure.latent and not _has_density(fitted, node, name):
            continue
        log_prob = torch.as_tensor(scale_and_mask(node["fn"].log_prob(node["value"]), 1.0, node["mask"]))
        found = layout.by_row(log_prob, node["cond_indep_stack"])
        weights = weights + (found if by_row else found.sum(1, keepdim=True))
    index = _resampled(weights, draws, given)
    values = {n: _chosen(x, index, model_trace.nodes[n], layout) for n, x in values.items()}
    return fitted.predicted(run, values)[1]


# The values ----------------------------------------------------------------------------------------------------------


def _known(fitted: FittedProgram, run: Run, given: Mapping[str, Any], do: Mapping[str, Any]) -> dict[str, Any]:
    """The values of both kinds, checked against the sites of one run."""
    structure = fitted.structure
    for what, values in (("given", given), ("do", do)):
        names = structure.latent + structure.summed + structure.observed + structure.computed
        for name in values:
            if name not in names:
                raise unknown(f"site of {what}", name, names)
    if computed := [name for name in given if name in structure.computed]:
        raise ValueError(
            f"site {computed[0]!r} of given is computed from other sites, so its value has no density. Give the sites "
            "that it is computed from, or intervene with do=."
        )
    if both := sorted(given.keys() & do.keys()):
        raise ValueError(f"site {both[0]!r} is in given and in do. Leave it in one of them.")
    sites = one_run(fitted, run)
    known: dict[str, dict[str, Known]] = {"given": {}, "do": {}}
    for what, values in (("given", given), ("do", do)):
        for name, value in values.items():
            known[what][name] = known_value(fitted, run, sites[name], f"{what}[{name!r}]", value)
    return known


def one_run(fitted: FittedProgram, run: Run, seed: int = 0) -> Mapping[str, Site]:
    """The model's sites in one run, without draws."""
    with RandomStream(seed, fitted.instance.device).drawing():
        guide = run.guide if fitted.chains is None else fitted.replayed(seed)
        nodes: Mapping[str, Site] = run_program(replace(run, draws=None, guide=guide))[1].nodes
    return nodes


def known_value(fitted: FittedProgram, run: Run, site: Site, title: str, value: Any, *, by_row: bool = False) -> Known:
    """A user's value of a site.

    Args:
        fitted: The posterior's program.
        run: The run in which the site has this value.
        site: The site in `one_run`.
        title: The user's name for the value, for error messages.
        value: The value.
        by_row: Whether every row must have its own value.

    Raises:
        TypeError: If the value is not numbers.
        ValueError: If it has another shape than its site, or lies outside of the site's support.
    """
    name, structure, found = site["name"], fitted.structure, _as_known(title, site, value, by_row)
    if name in structure.unchecked or name in structure.computed:
        return found
    outside = is_outside(site, placed(found.value, found.event_dim, found.plate_dims, run.plates))
    # A support that moves with other sites has another text in another run: each draw is then its own judge.
    if outside and str(site["fn"].support) == str(one_run(fitted, run, 1)[name]["fn"].support):
        raise ValueError(outside_message(title, site, found.value))
    return found


def _as_known(title: str, site: Site, value: Any, by_row: bool) -> Known:
    fn, like = site["fn"], torch.as_tensor(site["value"])
    plates = tuple(sorted(frame.dim for frame in site["cond_indep_stack"] if frame.vectorized))
    batch, event = tuple(fn.batch_shape), tuple(fn.event_shape)
    kept = tuple(n for d, n in zip(range(-len(batch), 0), batch, strict=True) if d in plates or n != 1)
    if is_deterministic(site):
        kept, event = tuple(like.shape), ()
    try:
        found = torch.as_tensor(value, device=like.device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{title} must be numbers; got {value!r}. Give a number, an array or a tensor.") from None
    shapes = dict.fromkeys([(*kept, *event)] if by_row else [(*kept, *event), event])
    if tuple(found.shape) not in shapes:
        raise ValueError(
            f"{title} must have shape {' or '.join(map(str, shapes))}, as its site has; got {tuple(found.shape)}. "
            f"Give {'every row its value' if by_row else 'one value, for every draw the same'}."
        )
    if not like.is_floating_point() and found.is_floating_point() and bool((found != found.round()).any()):
        raise ValueError(f"{title} must be whole numbers, as its site has; got fractions. Round them.")
    return Known(found.to(like.dtype).expand((*kept, *event)), len(event), plates)


# The weights ---------------------------------------------------------------------------------------------------------


def _has_density(fitted: FittedProgram, site: Site, name: str) -> bool:
    """Whether a latent site's value tells anything about the others, by the guide's density at that site.

    Raises:
        ValueError: If the guide does not tell.
    """
    if fitted.chains is not None:
        raise ValueError(
            f"latent site {name!r} cannot be given: the posterior holds draws, whose density is unknown. "
            "Intervene with do=, or give observed sites."
        )
    if not is_delta(site["fn"]):
        return True
    parts = [part for part in fitted.program.modules() if isinstance(part, AutoStructured | AutoContinuous)]
    for part in parts:
        kept = part.conditionals if isinstance(part, AutoStructured) else part._unconstrained_shapes
        own = part.names.site if isinstance(part, NamesApart) else str
        if name in map(own, kept) and not _gaussian(part):
            raise ValueError(
                f"latent site {name!r} cannot be given: guide {type(part).__name__} has no conditional density of the "
                "other sites. Give all of its sites, intervene with do=, or fit with guide='normal'."
            )
    return False  # a point estimate, or independent of the other sites


def _gaussian(guide: Any) -> Any:
    """The Gaussian distribution of an AutoGuide over several sites; None if it has another."""
    found = guide.get_posterior() if isinstance(guide, AutoContinuous) else None
    return found if type(unwrapped(found)).__name__ in _GAUSSIAN else None


_GAUSSIAN = ("MultivariateNormal", "LowRankMultivariateNormal", "Normal")


def _conditioned_gaussians(
    fitted: FittedProgram, values: dict[str, Tensor], guide_trace: Trace, draws_first: Any, given: Mapping[str, Known]
) -> dict[str, Tensor]:
    r"""Draws of the other sites of joint Gaussian guides, given some: ``z_r + C_rg C_gg^{-1} (v - z_g)``."""
    found: dict[str, Tensor] = {}
    guides: list[Any] = [part for part in fitted.program.modules() if isinstance(part, AutoContinuous)]
    for guide in guides:
        if not given.keys() & guide._unconstrained_shapes.keys():
            continue
        posterior = _gaussian(guide)
        if posterior is None or type(unwrapped(posterior)).__name__ == "Normal":
            continue
        sites = dict(guide.prototype_trace.iter_stochastic_nodes())
        names = list(guide._unconstrained_shapes)
        latent = guide_trace.nodes[f"_{type(guide).__name__}_latent"]
        before = draws_first(latent).flatten(1)  # (K, D)
        sizes = [guide._unconstrained_shapes[name].numel() for name in names]
        parts = dict(zip(names, before.split(sizes, 1), strict=True))
        known = torch.cat([torch.full((size,), name in given) for name, size in zip(names, sizes, strict=True)])
        target = torch.cat(
            [
                biject_to(sites[name]["fn"].support).inv(given[name].value).reshape(1, -1).expand(len(before), -1)
                if name in given
                else parts[name]
                for name in names
            ],
            1,
        )
        covariance = posterior.covariance_matrix
        gain = torch.linalg.solve(covariance[known][:, known], covariance[known][:, ~known])  # (G, R)
        after = target.clone()
        after[:, ~known] = before[:, ~known] + (target - before)[:, known] @ gain
        for name, part in zip(names, after.split(sizes, 1), strict=True):
            if name in values:
                free = part.reshape(len(before), *guide._unconstrained_shapes[name])
                found[name] = biject_to(sites[name]["fn"].support)(free).reshape(values[name].shape)
    return found


def _resampled(weights: Tensor, draws: int, given: Mapping[str, Any]) -> Tensor:
    """Indices of draws, systematically resampled by their log weights: ``(K, B)`` or ``(K, 1)``."""
    names = ", ".join(map(repr, given))
    top = weights.max(0).values
    if not bool(torch.isfinite(top).all()):
        raise ValueError(f"the values of {names} have no finite density under any draw. Check the values of given.")
    shares = (weights - top).exp().double()
    shares = shares / shares.sum(0)  # (K, B)
    effective = float(1 / shares.square().sum(0).max())
    if effective < max(2.0, _FEW * draws):
        warnings.warn(
            f"the given values of {names} leave about {effective:.1f} effective draws of {draws}, because they are "
            "unlikely under the posterior. Ask for more draws, or fit with these values as data.",
            UserWarning,
            stacklevel=4,
        )
    points = (torch.arange(draws, device=weights.device) + torch.rand((), device=weights.device)) / draws
    ends = shares.cumsum(0).T.contiguous()  # (B, K)
    index = torch.searchsorted(ends, points.double().expand(ends.shape).contiguous())
    return index.clamp_max(draws - 1).T


def _chosen(value: Tensor, index: Tensor, site: Site, layout: Layout) -> Tensor:
    """The chosen draws of a site; each row has its own if the index has rows."""
    if index.shape[1] == 1:
        return value[index[:, 0]]
    axis = 1 + layout.row_axis(site)
    shape = [1] * value.dim()
    shape[0], shape[axis] = index.shape
    return value.take_along_dim(index.reshape(shape), 0)
