"""The axes of draws, rows and events in the values of a run's sites."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from deepprob.programs.sites import Site, is_deterministic


def placed(value: Tensor, event_dim: int, plate_dims: Sequence[int], plates: int, draws: int | None = None) -> Tensor:
    """A site's value with an axis for each of its plates: the inverse of `Layout.draws_first`.

    Args:
        value: The value, which has no axes for plates that the site is outside of: of one draw, or of all draws.
        event_dim: Number of event dimensions.
        plate_dims: Dimensions of the plates around the site, from left to right.
        plates: Depth of the program's own plates.
        draws: The number of draws, which are the first dimension; None for one draw without that dimension.

    Examples:
        >>> placed(torch.zeros(5, 3, 2), 1, (-2,), 2, draws=5).shape  # 3 rows in a plate of dimension -2
        torch.Size([5, 3, 1, 2])
    """
    lead = () if draws is None else (draws,)
    batch_dims = value.dim() - len(lead) - event_dim
    # A site's values have no dimension for plates that it is outside of.
    dims = plate_dims if len(plate_dims) == batch_dims else range(-batch_dims, 0)
    batch_shape = [1] * (plates if lead else max([0, *(-dim for dim in dims)]))
    for dim, size in zip(dims, value.shape[len(lead) :], strict=False):
        batch_shape[dim] = size
    return value.reshape((*lead, *batch_shape, *value.shape[len(lead) + batch_dims :]))


@dataclass(frozen=True)
class Layout:
    """The axes of a run under a leading plate of draws: ``(K, *plates, *event)``.

    Attributes:
        plate: Name of the row plate.
        plates: Depth of the program's own plates.
        draws: Number of draws, K.
    """

    plate: str
    plates: int
    draws: int

    def draws_first(self, site: Site) -> Tensor:
        """A site's value with draws first, and without the axes of plates it is not in: ``(K, *site)``."""
        value, dims = self._spread(site)
        sizes = [value.shape[self.plates + 1 + dim] for dim in dims]
        return torch.as_tensor(value.reshape((self.draws, *sizes, *value.shape[self.plates + 1 :])))

    def plates_of(self, site: Site) -> tuple[str, ...]:
        """Names of the plates of the axes that `draws_first` gives a value, after the draws; ``""`` for no plate."""
        names = {f.dim: str(f.name) for f in site["cond_indep_stack"] if f.vectorized}
        return tuple(names.get(dim, "") for dim in self._spread(site)[1])

    def _spread(self, site: Site) -> tuple[Tensor, list[int]]:
        """A site's value with axes for the draws and all plates, and the dimensions of the plates that it has."""
        value, event_dim = site["value"].detach(), site["fn"].event_dim
        if is_deterministic(site) and event_dim == value.dim():  # pyro.deterministic takes all dimensions for events
            event_dim = max(0, event_dim - self.plates - 1)
        batch = tuple(value.shape[: value.dim() - event_dim])
        event = tuple(value.shape[value.dim() - event_dim :])
        batch = (1,) * (self.plates + 1 - len(batch)) + batch
        value = value.reshape(batch + event).expand((self.draws, *batch[1:], *event))
        frames = () if is_deterministic(site) else site["cond_indep_stack"]  # a computed value has the axes it has
        used = {f.dim for f in frames if f.vectorized}
        sizes = zip(range(-self.plates, 0), batch[1:], strict=True)
        return value, [dim for dim, size in sizes if dim in used or size != 1]

    def unused(self, site: Site) -> tuple[int, ...]:
        """Dimensions of size 1 of plates that a site is not in, counted from the right of its batch shape."""
        shape = site["fn"].batch_shape
        used = {f.dim for f in site["cond_indep_stack"] if f.vectorized}
        return tuple(d for d in range(-self.plates, 0) if d not in used and -d <= len(shape) and shape[d] == 1)

    def row_axis(self, site: Site) -> int:
        """The axis of rows in a value of one draw, for a site inside the row plate."""
        dims = sorted(frame.dim for frame in site["cond_indep_stack"] if frame.vectorized and frame.dim >= -self.plates)
        (row,) = (frame.dim for frame in site["cond_indep_stack"] if frame.name == self.plate and frame.vectorized)
        return dims.index(row)

    def by_row(self, value: Tensor, frames: Iterable[Any]) -> Tensor:
        """Sum a value over all but draws and rows: ``(K, B)``.

        Outside of the row plate, every independent term counts as a row.

        Args:
            value: A tensor of a site's batch shape.
            frames: The plates around the site.
        """
        full = value.expand(np.broadcast_shapes(value.shape, (self.draws,) + (1,) * self.plates))
        for frame in frames:
            if frame.name == self.plate and frame.vectorized:
                others = [d for d in range(-self.plates, 0) if d != frame.dim]
                return full.sum(others) if others else full
        return full.reshape(self.draws, -1)

    def log_prob(self, site: Site) -> Tensor:
        """A site's log-probability, masked and scaled: ``(K, B)``."""
        log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])
        return self.by_row(torch.as_tensor(log_prob), site["cond_indep_stack"])

    def total(self, site: Site) -> Tensor:
        """A site's log-probability over all rows: ``(K,)``."""
        return self.log_prob(site).sum(1)
