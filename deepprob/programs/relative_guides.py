r"""Gaussian guides by name, whose parameters can be relative to a Gaussian near the posterior.

Such a guide starts as Pyro's own, in the units of the user. If a fit finds a Gaussian near the posterior, with mean
:math:`m` and root :math:`L`, the guide's parameters become relative to it:

.. math:: z = m + L u, \qquad u \sim N(\mu, S S^T), \qquad \mu = 0, \; S = I \text{ at the start.}

A step of a parameter is then a step in posterior sds, whatever the units of the data. ``posterior.parameters()`` has
the values that Pyro's guide would have.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro.distributions.transforms import AffineTransform, LowerCholeskyAffine
from pyro.infer import autoguide
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import transform_to

from deepprob.programs import names_apart


class RelativeGuide(nn.Module):
    """A Gaussian guide that can be relative to a Gaussian."""

    def locations(self) -> list[Tensor]:
        """The parameters that are the mean of the latents, in unconstrained coordinates."""
        raise NotImplementedError

    def relate(self, center: Tensor, root: Tensor) -> None:
        """Become a Gaussian, or the nearest one of the guide's family, with parameters relative to it.

        Args:
            center: Its mean, in the order of `locations`, shape ``(D,)``.
            root: The lower Cholesky factor of its covariance, shape ``(D, D)``.
        """
        raise NotImplementedError

    def relate_to_units(self) -> None:
        """Become relative to the standard normal, which changes neither the guide nor its parameters."""
        params = list(self.parameters())
        before, size = [p.detach().clone() for p in params], sum(x.numel() for x in self.locations())
        self.relate(torch.zeros(size), torch.eye(size))
        with torch.no_grad():
            for p, value in zip(params, before, strict=True):
                p.copy_(value)

    def gaussian(self) -> list[Tensor]:
        """The buffers that hold the Gaussian that the parameters are relative to; empty if there is none."""
        return list(self.buffers())

    def relate_as(self, other: RelativeGuide) -> None:
        """Become relative to the Gaussian of another guide of the same kind, if it is relative to one."""
        own = {name for name, _ in self.named_buffers()}
        for name, value in other.named_buffers():
            if name not in own:
                register(self, name, value.clone())

    def absolute(self, name: str) -> Tensor:
        """The value that a parameter would have in Pyro's guide, by its path in the guide."""
        raise NotImplementedError


class _JointGuide(RelativeGuide, AutoContinuous):
    """A guide over all latents at once; sites start at their prior medians, as in Pyro."""

    center: Tensor | None
    root: Tensor | None

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **({"init_loc_fn": names_apart.median} | options))  # type: ignore[no-untyped-call]
        self.register_buffer("center", None)
        self.register_buffer("root", None)

    def locations(self) -> list[Tensor]:
        return [self.loc]

    def sample_latent(self, *args: Any, **kwargs: Any) -> Any:
        if self.center is None or self.root is None:
            return super().sample_latent()  # type: ignore[no-untyped-call]
        # The cache keeps u, which the inverse of an ill-conditioned root would not give back.
        affine: Any
        if self.root.dim() == 2:
            affine = LowerCholeskyAffine(self.center, self.root, cache_size=1)
        else:
            affine = AffineTransform(self.center, self.root, event_dim=1, cache_size=1)
        latent = dist.TransformedDistribution(self.of_parameters(), [affine])
        return pyro.sample(f"_{self._pyro_name}_latent", latent, infer={"is_auxiliary": True})

    def of_parameters(self) -> Any:
        """The distribution that the parameters would have in Pyro's guide: that of z, or of u."""
        return super().get_posterior()  # type: ignore[no-untyped-call]

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        posterior: Any = self.get_posterior()  # type: ignore[no-untyped-call]
        return posterior.mean, posterior.stddev


class AutoMultivariateNormal(_JointGuide, autoguide.AutoMultivariateNormal):
    """Pyro's AutoMultivariateNormal, relative to a Gaussian once there is one."""

    def relate(self, center: Tensor, root: Tensor) -> None:
        self.center, self.root = center.to(self.loc), root.to(self.loc)
        _set(self, "loc", torch.zeros_like(self.loc))
        _set(self, "scale", torch.ones_like(self.loc))
        _set(self, "scale_tril", torch.eye(len(self.loc)).to(self.loc))

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        found = self.of_parameters()
        if self.center is None or self.root is None:
            return found
        return dist.MultivariateNormal(self.center + self.root @ found.loc, scale_tril=self.root @ found.scale_tril)

    def absolute(self, name: str) -> Tensor:
        if self.center is None:
            return torch.as_tensor(getattr(self, name))
        loc, root = self.get_posterior().loc, self.get_posterior().scale_tril
        scale = root.diagonal()
        values: dict[str, Tensor] = {"loc": loc, "scale": scale, "scale_tril": root / scale[:, None]}
        return values[name]


class AutoLowRankMultivariateNormal(_JointGuide, autoguide.AutoLowRankMultivariateNormal):
    """Pyro's AutoLowRankMultivariateNormal, relative to independent normals once there are any."""

    def relate(self, center: Tensor, root: Tensor) -> None:
        sds = _conditional_sds(root)
        values, vectors = torch.linalg.eigh((root / sds[:, None]) @ (root / sds[:, None]).T)
        # The covariance is about 1 + F F^T, relative to the sds.
        factor = vectors * (values - 1.0).clamp_min(0.0).sqrt()
        self.center, self.root = center.to(self.loc), sds.to(self.loc)
        _set(self, "loc", torch.zeros_like(self.loc))
        _set(self, "scale", torch.ones_like(self.loc))
        _set(self, "cov_factor", factor[:, -self.cov_factor.shape[1] :].to(self.loc))

    def become(self, mean: Tensor, sds: Tensor, factor: Tensor) -> None:
        """Become the Gaussian whose covariance is the squares of ``sds`` on the diagonal, plus ``factor @ factor.T``.

        Args:
            mean: Its mean, shape ``(D,)``.
            sds: Positive numbers, shape ``(D,)``.
            factor: Shape ``(D, rank)``, with the guide's rank.
        """
        for name, value in {"loc": mean, "scale": sds, "cov_factor": factor / sds[:, None]}.items():
            _set(self, name, value.to(self.loc))

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        if self.center is None:
            return self.of_parameters()
        loc, scale, factor = map(self.absolute, ("loc", "scale", "cov_factor"))
        return dist.LowRankMultivariateNormal(loc, scale[:, None] * factor, scale**2)

    def absolute(self, name: str) -> Tensor:
        value: Tensor = getattr(self, name)
        if self.center is None or self.root is None or name == "cov_factor":
            return value
        return self.center + self.root * value if name == "loc" else self.root * value


class AutoNormal(RelativeGuide, names_apart.AutoNormal):
    """Pyro's AutoNormal, relative to independent normals once there are any."""

    def locations(self) -> list[Tensor]:
        return list(self.locs.parameters())

    def relate(self, center: Tensor, root: Tensor) -> None:
        sds = _conditional_sds(root)
        self.centers, self.roots = PyroModule(), PyroModule()
        named = {name.removesuffix("_unconstrained"): x for name, x in self.locs.named_parameters()}
        sizes = [x.numel() for x in named.values()]
        for (name, loc), m, sd in zip(named.items(), center.split(sizes), sds.split(sizes), strict=True):
            register(self.centers, name, m.reshape(loc.shape).to(loc))
            register(self.roots, name, sd.reshape(loc.shape).to(loc))
            _set(self, f"locs.{name}", torch.zeros_like(loc))
            _set(self, f"scales.{name}", torch.ones_like(loc))

    def _get_loc_and_scale(self, name: str) -> tuple[Tensor, Tensor]:
        loc, scale = super()._get_loc_and_scale(name)  # type: ignore[no-untyped-call]
        if not hasattr(self, "centers"):
            return loc, scale
        center, root = attrgetter(name)(self.centers), attrgetter(name)(self.roots)
        return center + root * loc, root * scale

    def absolute(self, name: str) -> Tensor:
        kind, _, site = name.partition(".")
        return self._get_loc_and_scale(site)[("locs", "scales").index(kind)]


def _conditional_sds(root: Tensor) -> Tensor:
    """The sds of the independent normals that are nearest to a Gaussian."""
    return torch.cholesky_inverse(root).diagonal().rsqrt()


def _set(guide: nn.Module, path: str, value: Tensor) -> None:
    """Set a parameter in place, so that Pyro's store has the new value, too."""
    owner, _, name = path.rpartition(".")
    module: Any = guide.get_submodule(owner)
    with torch.no_grad():
        if name in module._pyro_params:
            constraint, _ = module._pyro_params[name]
            module._parameters[f"{name}_unconstrained"].copy_(transform_to(constraint).inv(value))
        else:
            module._parameters[name].copy_(value)


def register(module: nn.Module, path: str, value: Tensor) -> None:
    """Register a buffer by its path in a module."""
    name, _, rest = path.partition(".")
    if not rest:
        module.register_buffer(name, value)
        return
    if not hasattr(module, name):
        setattr(module, name, PyroModule())
    register(module.get_submodule(name), rest, value)
