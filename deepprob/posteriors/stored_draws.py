"""Guides for posteriors that hold draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from deepprob.programs.layout import placed
from deepprob.programs.structure import Structure


def choose(chains: Mapping[str, Tensor], draws: int) -> dict[str, Tensor]:
    """Choose draws, spread evenly over all chains.

    Args:
        chains: Values by site, shape ``(chains, draws, *site)``.
        draws: How many to choose, K; repeated if there are fewer.

    Returns:
        Values by site, shape ``(K, *site)``.
    """
    found = {}
    for name, value in chains.items():
        flat = value.flatten(0, 1)  # (C * S, *site)
        if draws <= len(flat):
            index = torch.linspace(0, len(flat) - 1, draws, device=flat.device).round().long()
        else:
            index = torch.arange(draws, device=flat.device) % len(flat)
        found[name] = flat[index]
    return found


def replay(values: Mapping[str, Tensor], found: Structure, draws: int | None = None) -> Callable[..., None]:
    """A guide that returns given values.

    Args:
        values: Values by site: of one draw, or of all draws, with the draws first.
        found: The program's structure.
        draws: The number of draws, or None.
    """

    def guide(*batch: Any) -> None:
        for name, value in values.items():
            site = found.sites[name]
            value = placed(value, site.event_dim, site.plate_dims, found.plates, draws)
            pyro.sample(name, dist.Delta(value, event_dim=site.event_dim), infer={"replayed": True})  # type: ignore[arg-type]

    return guide
