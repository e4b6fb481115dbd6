"""Comparison of an eager step with a loop, whatever the step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from deepprob.engine import Loop, Noise, PerStep, Step, StepData
from deepprob.fitting.comparison import Reading, Trial, difference

NONE = Noise(torch.zeros(0), torch.zeros(0))


def mover(spoil: Callable[[Tensor], Tensor] = lambda x: x, extra: float = 0.0) -> Step:
    """A gradient step on a quadratic that also counts; ``spoil`` and ``extra`` make it wrong."""

    def step(carry: Any, data: StepData, _: Noise, knobs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        gradient = spoil(carry["x"] - data.fixed[0])
        new = {"x": carry["x"] - knobs[0] * gradient, "gradient": gradient, "count": carry["count"] + 1 + extra}
        return new, {"loss": 0.5 * gradient.square().sum()}

    return step


def trials(*starts: float) -> Iterator[Trial]:
    for start in starts:
        carry = {"x": torch.full((3,), start), "gradient": torch.zeros(3), "count": torch.tensor(0.0)}
        data = StepData([torch.tensor([1.0, 2.0, 3.0])], torch.zeros(1, dtype=torch.long), torch.tensor(0))
        yield Trial(carry, data, NONE, torch.tensor([0.1]))


def loop_of(step: Step) -> Loop:
    trial = next(trials(0.5))
    per_step = PerStep(trial.data.rows.unsqueeze(0), trial.knobs.unsqueeze(0))
    return Loop(step, trial.carry, per_step, trial.data.fixed, capacity=1)


def read(carry: Any, record: dict[str, Tensor]) -> Reading:
    return Reading([record], {"gradient": carry["gradient"]}, {"count": carry["count"]})


def test_equal_steps_do_not_differ() -> None:
    assert difference(trials(0.5), mover(), loop_of(mover()), read) == ""


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (mover(lambda g: 1.001 * g), r"the compiled loss is 4.* but the eager one is 4.37"),
        (mover(lambda g: g.flip(0)), r"the compiled gradient differs from the eager one"),
        (mover(extra=0.1), r"the compiled count differs from the eager one"),
        (mover(lambda g: g * torch.nan), r"the compiled loss is nan"),
    ],
)
def test_difference_names_the_wrong_value(wrong: Step, said: str) -> None:
    found = difference(trials(0.5), mover(), loop_of(wrong), read)
    assert re.match(said, found), found


def test_first_finite_trial_decides() -> None:
    assert difference(trials(torch.inf, 0.5), mover(), loop_of(mover()), read) == ""
    found = difference(trials(torch.inf, torch.nan), mover(), loop_of(mover()), read)
    assert found == "the eager loss is not finite, so compiled and eager steps cannot be compared"
    found = difference(
        trials(torch.nan), mover(), loop_of(mover()), lambda carry, _: Reading([], {"x": carry["x"]}, {})
    )  # fmt: skip
    assert found == "the eager x is not finite, so compiled and eager steps cannot be compared"


def test_allows_twice_the_rounding_of_the_eager_step_and_no_more() -> None:
    rounded, exact = mover(lambda g: (1 + 1e-3) * g), mover()
    for factor, same in ((1e-3, True), (2e-3, True), (8e-3, False)):
        loop = loop_of(mover(lambda g, factor=factor: (1 + factor) * g))
        assert (difference(trials(0.5), rounded, loop, read, exact=exact) == "") is same
    assert difference(trials(0.5), rounded, loop_of(exact), read) != ""


def cancelling(large: float, error: float = 0.0) -> Step:
    """A step whose gradient is a small difference of large numbers."""

    def step(carry: Any, data: StepData, _: Noise, knobs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        gradient = (large * carry["x"] + carry["x"]) - large * carry["x"] + error
        return {**carry, "gradient": gradient}, {"loss": torch.zeros(())}

    return step


def test_allows_the_rounding_of_a_difference_of_large_numbers_and_no_more() -> None:
    """At 0.7, a large number of 100 rounds by 1e-5 of the difference; one of 1e5 by more than can be judged."""
    for large, error, same in ((100.0, 0.0, True), (100.0, 1e-2, False), (1e5, 0.0, False)):
        loop = loop_of(cancelling(0.0, error))
        assert (difference(trials(0.7), cancelling(large), loop, read) == "") is same, (large, error)
