"""Pyro's AutoGuides for sites of any names: those that keep parameters under the names of sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.infer import autoguide
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.gaussian import AutoGaussian
from pyro.infer.autoguide.gaussian import AutoGaussianDense as PyrosGaussianDense
from pyro.infer.autoguide.initialization import init_to_feasible, init_to_median
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints, transform_to

from deepprob.programs.sites import Site

HELD = "held_at_modes"
"""Marks a site with the number that it keeps where the other sites are at a mode.

Such is the scale of a network's weights: the joint mode of scale and weights is at zero.
"""


class Rename(Messenger):
    """Renames sites."""

    def __init__(self, rename: Callable[[str], str]) -> None:
        super().__init__()
        self.rename = rename

    def _pyro_sample(self, msg: Any) -> None:
        msg["name"] = self.rename(msg["name"])


class _Names:
    """Names under which an AutoGuide can keep the parameters of sites, and the sites' own names.

    An AutoGuide makes an attribute of every name and a module of every part before a dot. So it cannot hold both a
    parameter of ``w`` and one of ``w.scale``, nor one whose name begins with an attribute of the guide, as does
    ``model.weight``.
    """

    def __init__(self, reserved: Iterable[str]) -> None:
        self.reserved = frozenset(reserved)
        self.kept: dict[str, str] = {}
        self.sites: dict[str, str] = {}

    def keep(self, site: str) -> str:
        """The name for the parameters of a site."""
        if site not in self.kept:
            name, clash = site, site.partition(".")[0] in self.reserved
            if clash or any(f"{site}.".startswith(f"{n}.") or n.startswith(f"{site}.") for n in self.kept):
                name = f"{site.replace('.', '_')}_"
            while name in self.sites:
                name += "_"
            self.kept[site], self.sites[name] = name, site
        return self.kept[site]

    def site(self, name: str) -> str:
        """The inverse of `keep`, for a site or its auxiliary site."""
        plain = name.removesuffix("_unconstrained").removesuffix("_aux")
        return self.sites.get(plain, plain) + name[len(plain) :]


class NamesApart(AutoGuide):
    """An AutoGuide whose parameters have names of their own, so that those of no two sites clash."""

    def __init__(self, model: Callable[..., Any], **options: Any) -> None:
        self.names = _Names(dir(type(self)))
        super().__init__(Rename(self.names.keep)(model), **options)  # type: ignore[no-untyped-call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with Rename(self.names.site):
            found = super().forward(*args, **kwargs)
        return {self.names.site(name): value for name, value in found.items()}


def _feasible(site: Site) -> Tensor:
    """Zero in unconstrained coordinates, as in Pyro; also for an improper prior, of which there are no draws."""
    try:
        return torch.as_tensor(init_to_feasible(site))
    except NotImplementedError:
        transform = transform_to(site["fn"].support)
        return torch.as_tensor(transform(torch.zeros(transform.inverse_shape(site["fn"].shape()))))


def median(site: Site) -> Tensor:
    """Where a site starts in a joint guide: at its prior median, as in Pyro."""
    try:
        return torch.as_tensor(init_to_median(site))
    except NotImplementedError:
        return _feasible(site)


def _start(site: Site) -> Tensor:
    """Where a site starts: at its prior mean if it is real, else at zero in unconstrained coordinates.

    Pyro's zero for all sites would let noise decide which component of a mixture takes which ordered location.
    """
    fn = site["fn"]
    try:
        real, mean = fn.support == constraints.real or fn.support == constraints.real_vector, fn.mean
    except NotImplementedError:
        return _feasible(site)
    if real and bool(torch.isfinite(mean).all()):
        return torch.as_tensor(mean.detach().expand(fn.shape()).clone())
    return _feasible(site)


class AutoNormal(NamesApart, autoguide.AutoNormal):
    """Pyro's AutoNormal for sites of any names; real sites start at their prior means."""

    def __init__(self, model: Callable[..., Any], *, init_loc_fn: Callable[[Site], Tensor] = _start) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn)


def start_of_point(site: Site) -> Tensor:
    """Where a site of a point starts: at its prior median as in Pyro, or at the number that it keeps."""
    held = site["infer"].get(HELD)
    return median(site) if held is None else torch.full_like(site["fn"].mean, held)


class _Hold(Messenger):
    """Gives no gradient to the sites of a point that are marked as `HELD`."""

    def __init__(self, guide: NamesApart) -> None:
        super().__init__()
        self.guide = guide

    def _pyro_sample(self, msg: Any) -> None:
        found, name = self.guide.prototype_trace, self.guide.names.kept.get(msg["name"])
        if found is not None and name in found.nodes and HELD in found.nodes[name]["infer"]:
            fn = msg["fn"]
            msg["fn"] = Delta(fn.v.detach() + 0.0 * fn.v, event_dim=fn.event_dim)


class AutoDelta(NamesApart, autoguide.AutoDelta):
    """Pyro's AutoDelta for sites of any names; sites that are marked as `HELD` keep their start."""

    def __init__(self, model: Callable[..., Any], *, init_loc_fn: Callable[[Site], Tensor] = start_of_point) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Hold(self):
            return super().forward(*args, **kwargs)


class AutoStructured(NamesApart, autoguide.AutoStructured):
    """Pyro's AutoStructured for sites of any names."""


class AutoGaussianDense(NamesApart, PyrosGaussianDense):  # type: ignore[metaclass]
    """Pyro's AutoGaussian for sites of any names."""


# A subclass takes this place, for all users of Pyro.
AutoGaussian.backends["dense"] = PyrosGaussianDense  # type: ignore[attr-defined]
