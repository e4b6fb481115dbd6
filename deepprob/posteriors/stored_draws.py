"""Guides for posteriors that hold draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from deepprob.programs.structure import Structure


def replay(chains: Mapping[str, Tensor], found: Structure, draws: int, plates: int) -> Callable[..., None]:
    """A guide that returns stored draws, spread evenly over all chains."""

    def guide(*batch: Any) -> None:
        for name, value in chains.items():
            flat = value.flatten(0, 1)  # (C * S, *site)
            if draws <= len(flat):
                index = torch.linspace(0, len(flat) - 1, draws, device=flat.device).round().long()
            else:
                index = torch.arange(draws, device=flat.device) % len(flat)
            event_dim = found.sites[name].event_dim
            chosen = flat[index]
            batch_dims = chosen.dim() - 1 - event_dim
            plate_dims, batch_shape = found.sites[name].plate_dims, [1] * plates
            # A site's values have no dimension for plates that it is outside of.
            dims = plate_dims if len(plate_dims) == batch_dims else range(-batch_dims, 0)
            for dim, size in zip(dims, chosen.shape[1:], strict=False):
                batch_shape[dim] = size
            shape = (draws, *batch_shape, *chosen.shape[1 + batch_dims :])
            pyro.sample(name, dist.Delta(chosen.reshape(shape), event_dim=event_dim))

    return guide
