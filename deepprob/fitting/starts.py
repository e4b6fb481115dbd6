"""The starts of a fit with restarts, before its first step; see `deepprob.fitting.restarts`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.errors import whole
from deepprob.fitting.first_step import search_start
from deepprob.fitting.intake import instance_of
from deepprob.fitting.loop_state import LoopState
from deepprob.networks.initialisation import can_draw_weights
from deepprob.programs.arguments import rejoined
from deepprob.programs.guides import GuideSpec
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch
from deepprob.programs.program import Program
from deepprob.programs.relative_guides import RelativeGuide


@dataclass(frozen=True)
class Start:
    """A start of a fit before its first step.

    Attributes:
        values: The trained parameters, by name.
        varied: Its own values of the state's `varied` buffers.
        noise: The position of its noise.
    """

    values: Mapping[str, Tensor]
    varied: list[Tensor]
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
    asked: str = "restarts",
) -> list[Start]:
    """The starts beside the first, each with a seed of its own.

    Args:
        state: The first start; its `varied` buffers become those that the starts differ in.
        count: Number of all starts.
        program: The program, as `svi` got it.
        guide: The guide, as `svi` got it.
        batch_size: Rows of a step, as `svi` got them.
        weights: The choice of weights.
        asked: The argument by which the user asked for them.
    """
    batch = batch_of(state)
    found, device = list[tuple[ProgramInstance, RandomStream]](), state.instance.device
    for k in range(1, count):
        stream = RandomStream(seed_of(state.seed, k), device)
        with stream.drawing(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first start gave them
            known = {"num_data": None if state.chunks is None else state.instance.num_data}
            instance = instance_of(program, batch, guide, device, batch_size, weights, spread=True, **known)
            numbers = None if state.chunks is None else state.chunks.numbers
            search_start(instance, state.data, state.batch_size, weights, state.length.expected, numbers)
        found.append((instance, stream))
    guides = [instance.program.current_guide for instance in (state.instance, *(x for x, _ in found))]
    relative = [guide for guide in guides if isinstance(guide, RelativeGuide)]
    varied = _varied(relative) if found else []
    state.varied = varied[0] if varied else []
    starts = [
        Start({n: p.detach() for n, p in instance.parameters().items()}, varied[k] if varied else [], stream.state)
        for k, (instance, stream) in enumerate(found, 1)
    ]
    if starts and not any(_differs(state, start) for start in starts):
        reason = "no weight and no parameter of the guide starts at random"
        remedy = (
            "Use a guide by name, guide='normal', or draw the first value of its parameters: "
            "pyro.param('loc', lambda: torch.randn(()))"
        )
        if weights != "fresh" and can_draw_weights(state.instance.program):
            reason, remedy = f"weights={weights!r} keeps the weights of your networks", "Write weights='fresh'"
        warnings.warn(
            f"{asked}={count} has nothing to vary: {reason}, so the starts differ in their noise alone. {remedy}.",
            UserWarning,
            stacklevel=3,
        )
    return starts


def batch_of(state: LoopState) -> Batch:
    """The data of a fit as they were when it accepted them, to build the program's instance again."""
    fitted = state.instance.program
    return rejoined(state.data, fitted.call, replace(fitted.origin, weights=fitted.bound_rows.weights))


def _varied(guides: list[RelativeGuide]) -> list[list[Tensor]]:
    """The Gaussian of every guide; if only some have found one, the others are relative to the standard normal."""
    if any(guide.gaussian() for guide in guides):
        for guide in guides:
            if not guide.gaussian():
                guide.relate_to_units()
    return [guide.gaussian() for guide in guides]


def _differs(state: LoopState, start: Start) -> bool:
    """Whether a start differs from the first in more than its noise."""
    pairs = [(p, start.values.get(n, p)) for n, p in state.params.items()]
    return not all(torch.equal(a, b) for a, b in [*pairs, *zip(state.varied, start.varied, strict=True)])


def seed_of(seed: int, start: int) -> int:
    """The seed of a start; those of two fits have nothing in common."""
    return int(np.random.SeedSequence([seed, start]).generate_state(1, np.uint64)[0] >> 1)
