"""Numbers that a program keeps in Python."""

from __future__ import annotations

import itertools
import random
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deepprob.engine.python_state import changed, python_state

GLOBAL_CALLS = 0


class Counting:
    calls = 0

    def __call__(self) -> None:
        self.calls += 1


class CountingForAll:
    calls = 0

    def __call__(self) -> None:
        CountingForAll.calls += 1


class Scheduled(nn.Module):
    """A module that holds another object, which counts."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = Counting()

    def forward(self) -> None:
        self.schedule()


class Around(nn.Sequential):
    """A library's class around one of the user's."""

    def forward(self) -> None:
        self[0]()


def of_the_module() -> None:
    global GLOBAL_CALLS
    GLOBAL_CALLS += 1


def through_another() -> None:
    of_the_module()


def of_itself() -> None:
    of_itself.calls = getattr(of_itself, "calls", 0) + 1  # type: ignore[attr-defined]


def with_default(log: list[int] = []) -> None:  # noqa: B006
    log.append(1)


def enclosed() -> Callable[[], None]:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1

    return call


def drawing_from(generator: Any, name: str) -> Callable[[], object]:
    return lambda: getattr(generator, name)()


COUNT = itertools.count()


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (Counting(), "calls"),
        (CountingForAll(), "calls"),
        (Scheduled(), "calls"),
        (Around(Scheduled()), "calls"),
        (Counting().__call__, "calls"),
        (partial(Counting()), "calls"),
        (of_the_module, "GLOBAL_CALLS"),
        (through_another, "GLOBAL_CALLS"),
        (of_itself, "calls"),
        (with_default, "an argument"),
        (enclosed(), "calls"),
        (drawing_from(random.Random(0), "random"), "generator"),
        (drawing_from(np.random.default_rng(0), "normal"), "generator"),
        (drawing_from(np.random.RandomState(0), "normal"), "generator"),
        (lambda: next(COUNT), "COUNT"),
    ],
)
def test_what_a_run_changes_is_named(program: Callable[[], Any], name: str) -> None:
    before = python_state(program)
    assert changed(before, python_state(program)) == ""
    program()
    assert changed(before, python_state(program)) == name


class Kept:
    """Nothing that a run does is kept in numbers."""

    def __init__(self) -> None:
        self.me, self.net, self.data = self, nn.Linear(2, 2), torch.zeros(3)
        self.nan, self.large = float("nan"), list(range(5000))

    def __call__(self) -> None:
        self.data += 1
        self.net(torch.zeros(2))
        self.large[0] += 1  # data, of which only the length is looked at
        random.random()


@pytest.mark.parametrize("program", [Kept(), types.MethodType(Kept.__call__, Kept())])
def test_tensors_data_and_libraries_are_passed_over(program: Callable[[], None]) -> None:
    before = python_state(program)
    program()
    assert changed(before, python_state(program)) == ""
