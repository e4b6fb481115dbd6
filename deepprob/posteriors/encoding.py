"""The noun `Encoding`: the latent sites of rows given their data, by mean and standard deviation."""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from deepprob.distributions.per_draw import PerDraw, unwrapped
from deepprob.posteriors.fitted import FittedProgram
from deepprob.posteriors.prediction import Prediction
from deepprob.programs.layout import Layout
from deepprob.programs.minibatch import Batch
from deepprob.programs.sites import Site
from deepprob.programs.structure import Structure

_REPEATS = 20  # of data that a program draws anew


@dataclass(frozen=True)
class Encoding:
    """Mean and standard deviation of the local latent sites given the data.

    Attributes:
        mean: Posterior means, ``(B, *site)``; of several sites, a dict by site. Those of a categorical site are the
            probabilities of its classes.
        sd: Posterior standard deviations, likewise.
        estimated: Names of the sites whose numbers are estimated from draws. The numbers of other sites are those of
            the guide's distribution, and have no sampling error.
        classes: Names of the categorical sites.
    """

    mean: Tensor | dict[str, Tensor]
    sd: Tensor | dict[str, Tensor]
    estimated: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        means = self.mean if isinstance(self.mean, dict) else {"mean and sd": self.mean}
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in means.items())
        return f"Encoding({shapes}; {'estimated from draws' if self.estimated else 'in closed form'})"


def encode(fitted: FittedProgram, batch: Batch, draws: int) -> Encoding:
    """Mean and sd of every local latent site, from the guide's distributions where these have moments.

    Args:
        fitted: The posterior's program.
        batch: Its arguments.
        draws: Number of draws, K, for the sites whose distribution depends on other sites or has no moments.
    """
    found = [_moments(fitted, chunk, draws) for chunk in fitted.chunks(batch, draws)]
    mean = {name: torch.cat([part[name].mean for part in found], first.axis) for name, first in found[0].items()}
    sd = {name: torch.cat([part[name].sd for part in found], first.axis) for name, first in found[0].items()}
    estimated = tuple(name for name in mean if not all(part[name].exact for part in found))
    classes = tuple(name for name, first in found[0].items() if first.kind == "classes")
    if len(mean) > 1:
        return Encoding(mean, sd, estimated, classes)
    (name,) = mean
    return Encoding(mean[name], sd[name], estimated, classes)


@dataclass(frozen=True)
class _Moments:
    mean: Tensor
    sd: Tensor
    exact: bool
    axis: int  # of the rows
    kind: str


def _moments(fitted: FittedProgram, batch: Batch, draws: int) -> dict[str, _Moments]:
    repeats = _REPEATS if _is_drawn_anew(fitted, batch) else 1
    runs = [_sites(fitted, batch, max(2, draws // repeats)) for _ in range(repeats)]
    found = {}
    for name, (first, axis) in runs[0].items():
        means = torch.stack([run[name][0].mean for run in runs])
        variance = torch.stack([run[name][0].sd.square() for run in runs]).mean(0) + means.var(0, unbiased=False)
        closed = repeats == 1 and name in fitted.structure.local and first.same_for_all_draws
        found[name] = _Moments(means.mean(0), variance.sqrt(), closed, axis, first.kind)
    return found


def _is_drawn_anew(fitted: FittedProgram, batch: Batch) -> bool:
    """Whether the program draws a part of its data anew at every use, such as binary pixels from grey ones."""
    pairs = zip(batch, fitted.program.prepare(*batch), strict=False)
    return any(x is not y and not torch.equal(x, y) for x, y in pairs)


def _sites(fitted: FittedProgram, batch: Batch, draws: int) -> dict[str, tuple[Prediction, int]]:
    """The distribution of every local site, and the axis of its rows."""
    structure, layout = fitted.structure, fitted.layout(draws)
    guide_trace, found = None, {}
    if structure.summed:
        guide_trace, model_trace = fitted.run(batch, draws)
        for name in local_summed(structure):
            site = model_trace.nodes[name]
            found[name] = of_draws(layout.draws_first(site), site, name), layout.row_axis(site)
    guide_trace = guide_trace or fitted.run_guide(batch, draws)
    for name in structure.local:
        found[name] = _of_guide(layout, guide_trace.nodes, name), layout.row_axis(guide_trace.nodes[name])
    return found


def local_summed(structure: Structure) -> tuple[str, ...]:
    """The summed-out sites inside the row plate."""
    return tuple(name for name in structure.summed if structure.sites[name].local)


def _of_guide(layout: Layout, sites: dict[str, Site], name: str) -> Prediction:
    """The guide's distribution of a site; an ``AutoGuide`` draws a real site under another name."""
    site, value = sites[name], layout.draws_first(sites[name])
    helper = sites.get(f"{name}_unconstrained")
    if helper is not None and torch.equal(layout.draws_first(helper), value):
        site = helper
    return Prediction(site["fn"], value, name, unused=layout.unused(site))


def of_draws(value: Tensor, like: Site, name: str) -> Prediction:
    """The distribution of some draws, of the kind of a site's own distribution.

    Args:
        value: The draws, ``(K, *site)``.
        like: The site.
        name: Its name.
    """
    fn = like["fn"]
    base = unwrapped(fn.first if isinstance(fn, PerDraw) else fn)
    family = type(base).__name__
    if family == "Categorical":
        made = dist.Categorical(one_hot(value.long(), base.probs.shape[-1]).to(base.probs.dtype))
    elif family == "OneHotCategorical":
        made = dist.OneHotCategorical(value)
    else:
        made = dist.Bernoulli(value) if family == "Bernoulli" else dist.Delta(value)
    return Prediction(made.to_event(fn.event_dim - base.event_dim), value, name)
