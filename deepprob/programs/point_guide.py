r"""A guide that is a point in unconstrained coordinates, of which the ELBO is the log joint density there.

.. math:: z = T(u \odot s), \qquad \mathrm{ELBO} = \log p(x, z) + \log |\det \partial T(v) / \partial v|_{v = u \odot s}

with the parameters :math:`u`, units :math:`s`, 1 at the start, and for every site the transform :math:`T` from the real
numbers to its support. Unlike the guide ``"map"``, whose density is that of the sites' own values, the density is that
of the coordinates :math:`v`, in which a Gaussian or a sampler works.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from operator import attrgetter
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.utils import deep_setattr, helpful_support_errors
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import biject_to

from deepprob.programs import names_apart
from deepprob.programs.relative_guides import register


class AutoPoint(names_apart.AutoDelta):
    """A point in unconstrained coordinates; sites start at their prior medians, as in a joint guide.

    Attributes:
        noise_level: The variance of a gradient's noise, see `noise`.
        released: 1 if the sites that are marked as `HELD` may move, 0 if they keep their start.
    """

    units: Any
    variances: Any
    noise_level: Tensor
    released: Tensor

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **options)
        self.names.reserved |= {"units", "variances", "noise_level", "released"}
        self.register_buffer("noise_level", torch.zeros(()))
        self.register_buffer("released", torch.zeros(()))

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        AutoGuide._setup_prototype(self, *args, **kwargs)
        self.units, self.variances = PyroModule(), PyroModule()
        for name, site in self._sites():
            with helpful_support_errors(site):
                start = biject_to(site["fn"].support).inv(site["value"].detach()).clone()
            deep_setattr(self, name, nn.Parameter(start))
            register(self.units, name, torch.ones_like(start))
            register(self.variances, name, torch.zeros_like(start))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with names_apart.Rename(self.names.site):
            if self.prototype_trace is None:
                self._setup_prototype(*args, **kwargs)
            plates: Any = self._create_plates(*args, **kwargs)  # type: ignore[no-untyped-call]
            found = {}
            for name, site in self._sites():
                transform, event_dim = biject_to(site["fn"].support), site["fn"].event_dim
                free = self._movable(name, site) * attrgetter(name)(self.units)
                value = transform(free)
                density = transform.inv.log_abs_det_jacobian(value, free)
                density = sum_rightmost(density, density.dim() - value.dim() + event_dim)
                with ExitStack() as stack:
                    for frame in site["cond_indep_stack"]:
                        if frame.vectorized:
                            stack.enter_context(plates[frame.name])
                    delta = dist.Delta(value, log_density=density, event_dim=event_dim)
                    found[self.names.site(name)] = pyro.sample(name, delta)
        return found

    def points(self) -> list[Tensor]:
        """The parameters, in the order of the coordinates."""
        return [attrgetter(name)(self) for name, _ in self._sites()]

    def units_of_points(self) -> list[Tensor]:
        """The unit of every number of the parameters."""
        return [attrgetter(name)(self.units) for name, _ in self._sites()]

    def variances_of_points(self) -> list[Tensor]:
        """The variance of a gradient that the noise of minibatches makes, for every number of the parameters."""
        return [attrgetter(name)(self.variances) for name, _ in self._sites()]

    def noise(self) -> Tensor:
        """Zero, with a gradient of normal noise, whose variance is what the minibatch leaves of `noise_level`."""
        total = torch.zeros_like(self.noise_level)
        points = [self._movable(name, site) for name, site in self._sites()]
        for point, variance in zip(points, self.variances_of_points(), strict=True):
            sd = (self.noise_level - variance).clamp_min(0.0).sqrt()
            term = (point * (sd * torch.randn_like(point))).sum()
            total = total + (term - term.detach())
        return total

    def values(self, coordinates: Tensor) -> dict[str, Tensor]:
        """The values of the sites at unconstrained coordinates.

        Args:
            coordinates: Shape ``(..., D)``, in the order of the sites in the model, as in Pyro's joint guides.

        Returns:
            Values by site, ``(..., *site)``.
        """
        parts = coordinates.split([x.numel() for x in self.points()], -1)
        return {
            self.names.site(name): biject_to(site["fn"].support)(part.reshape(*part.shape[:-1], *like.shape))
            for (name, site), part, like in zip(self._sites(), parts, self.points(), strict=True)
        }

    def _movable(self, name: str, site: Any) -> Tensor:
        """The parameter of a site, whose gradient is zero while the site is held."""
        point: Tensor = attrgetter(name)(self)
        return point.detach() + self.released * (point - point.detach()) if names_apart.HELD in site["infer"] else point

    def _sites(self) -> Iterator[tuple[str, Any]]:
        found: Any = self.prototype_trace
        yield from found.iter_stochastic_nodes()
