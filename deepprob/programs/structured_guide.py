"""A guide over all latents at once that is a mode first, and a normal distribution in blocks after its fit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from pyro import distributions as dist
from pyro.infer import autoguide
from torch import Tensor
from torch.distributions import biject_to

from deepprob.distributions.structured_normal import BLOCKS, Block, StructuredNormal


class AutoStructuredNormal(autoguide.AutoLaplaceApproximation):
    r"""A normal distribution over all latents in unconstrained coordinates, whose covariance has structured blocks.

    .. math:: u \sim N(m, R R^T), \qquad z = T(u)

    Until `take` gives it blocks the guide is a point, the mode that a fit looks for. Sites that are in no block stay
    points. `hold` keeps some sites where they are during a fit. The state of the guide is numbers only.

    Args:
        model: A Pyro model.
        options: As for Pyro's ``AutoLaplaceApproximation``.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **options)  # type: ignore[no-untyped-call]
        self.register_buffer("held", None)

    @property
    def sites(self) -> dict[str, slice]:
        """The places of the sites in the vector of all latents."""
        found, start = {}, 0
        for name, shape in self._unconstrained_shapes.items():
            found[name] = slice(start, start + shape.numel())
            start += shape.numel()
        return found

    @property
    def blocks(self) -> list[Block]:
        """The blocks; empty until the guide has taken some."""
        named: dict[int, dict[str, Tensor]] = {}
        kinds: dict[int, str] = {}
        for name, value in self._buffers.items():
            if name.startswith("block-") and value is not None:
                _, number, kind, part = name.split("-")
                kinds[int(number)] = kind
                named.setdefault(int(number), {})[part] = value
        return [BLOCKS[kinds[number]](**named[number]) for number in sorted(named)]

    @property
    def points(self) -> frozenset[str]:
        """The sites that are in no block, of which the guide is a point estimate."""
        free = torch.zeros(self.latent_dim, dtype=torch.bool, device=self.loc.device)
        for block in self.blocks:
            free[block.index.flatten()] = True
        return frozenset(name for name, place in self.sites.items() if not bool(free[place].any()))

    def hold(self, names: Collection[str]) -> None:
        """Keep sites at their values while a fit changes the others.

        Args:
            names: The names of the sites.
        """
        held = torch.zeros(self.latent_dim, dtype=torch.bool, device=self.loc.device)
        for name, place in self.sites.items():
            held[place] = name in names
        self.register_buffer("held", held)

    def take(self, blocks: Sequence[Block]) -> None:
        """Become a normal distribution with these blocks.

        Args:
            blocks: The blocks.
        """
        for name in [name for name in self._buffers if name.startswith("block-")]:
            del self._buffers[name]
        for number, block in enumerate(blocks):
            for name, value in block.tensors.items():
                value = value.to(self.loc.device) if name == "index" else value.to(self.loc)
                # Contiguous as after a load: products of matrices with other strides are rounded in another way.
                self.register_buffer(f"block-{number}-{block.kind}-{name}", value.contiguous())

    def values(self, latent: Tensor) -> dict[str, Tensor]:
        """The values of the sites for a vector of unconstrained coordinates.

        Args:
            latent: The vector, shape ``(D,)``.
        """
        sites: Any = self._unpack_latent(latent)  # type: ignore[no-untyped-call]
        return {site["name"]: biject_to(site["fn"].support)(free) for site, free in sites}

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        if blocks := self.blocks:
            return StructuredNormal(self.loc, blocks)
        loc = self.loc if self.held is None else torch.where(self.held, self.loc.detach(), self.loc)
        return dist.Delta(loc).to_event(1)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found: Any = self.get_posterior()
        return found.mean, found.variance.sqrt()
