"""The starts of a fit with restarts, before its first step; see `deepprob.fitting.restarts`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.errors import whole
from deepprob.fitting.intake import instance_of
from deepprob.fitting.loop_state import LoopState
from deepprob.programs.guides import GuideSpec
from deepprob.programs.program import Program


@dataclass(frozen=True)
class Start:
    """A start of a fit before its first step.

    Attributes:
        values: The trained parameters, by name.
        noise: The position of its noise.
    """

    values: Mapping[str, Tensor]
    noise: dict[str, Tensor]


def checked_restarts(restarts: Any, held_out: Any) -> int:
    """The number of starts, checked.

    Raises:
        ValueError: If it is not a whole number of at least one, or the fit has held-out data.
    """
    count = whole("restarts", restarts)
    if count > 1 and held_out is not None:
        raise ValueError(
            f"restarts={count} keeps the start with the best bound of the data, but held_out keeps the best epoch of "
            "one fit. Leave out one of them."
        )
    return count


def other_starts(
    state: LoopState,
    count: int,
    program: Program,
    guide: GuideSpec,
    batch_size: int | str | None,
    weights: str,
) -> list[Start]:
    """The starts beside the first, each with a seed of its own.

    Args:
        state: The first start.
        count: Number of all starts.
        program: The program, as `svi` got it.
        guide: The guide, as `svi` got it.
        batch_size: Rows of a step, as `svi` got them.
        weights: The choice of weights.
    """
    starts, device = [], state.instance.device
    for k in range(1, count):
        stream = RandomStream(_seed_of(state.seed, k), device)
        with stream.drawing(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first start gave them
            instance = instance_of(program, state.data, guide, device, batch_size, weights, spread=True)
        starts.append(Start({n: p.detach() for n, p in instance.parameters().items()}, stream.state))
    first = {n: p.detach() for n, p in state.params.items()}
    if starts and all(torch.equal(p, start.values.get(n, p)) for start in starts for n, p in first.items()):
        warnings.warn(
            f"restarts={count} has nothing to vary: no weight and no parameter of the guide starts at random, so the "
            "starts differ in their noise alone. Use a guide by name, guide='normal', or draw the first value of its "
            "parameters: pyro.param('loc', lambda: torch.randn(())).",
            UserWarning,
            stacklevel=3,
        )
    return starts


def _seed_of(seed: int, start: int) -> int:
    """The seed of a start; those of two fits have nothing in common."""
    return int(np.random.SeedSequence([seed, start]).generate_state(1, np.uint64)[0] >> 1)
