"""Python state of programs, and changes of it."""

from __future__ import annotations

import itertools
import random
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deepprob.engine.python_state import changed, is_library, python_state

GLOBAL_CALLS = 0


class Counting:
    calls = 0

    def __call__(self) -> None:
        self.calls += 1


class CountingInClass:
    calls = 0

    def __call__(self) -> None:
        CountingInClass.calls += 1


class Scheduled(nn.Module):
    """A module that holds another object, which counts."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = Counting()

    def forward(self) -> None:
        self.schedule()


class Wrapper(nn.Sequential):
    """A library's class that holds a module of the user."""

    def forward(self) -> None:
        self[0]()


def count_globally() -> None:
    global GLOBAL_CALLS
    GLOBAL_CALLS += 1


def count_through_another() -> None:
    count_globally()


def count_on_itself() -> None:
    count_on_itself.calls = getattr(count_on_itself, "calls", 0) + 1  # type: ignore[attr-defined]


def count_in_default(log: list[int] = []) -> None:  # noqa: B006
    log.append(1)


def counting_closure() -> Callable[[], None]:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1

    return call


def draw_from(generator: Any, name: str) -> Callable[[], object]:
    return lambda: getattr(generator, name)()


COUNT = itertools.count()


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (Counting(), "calls"),
        (CountingInClass(), "calls"),
        (Scheduled(), "calls"),
        (Wrapper(Scheduled()), "calls"),
        (Counting().__call__, "calls"),
        (partial(Counting()), "calls"),
        (count_globally, "GLOBAL_CALLS"),
        (count_through_another, "GLOBAL_CALLS"),
        (count_on_itself, "calls"),
        (count_in_default, "an argument"),
        (counting_closure(), "calls"),
        (draw_from(random.Random(0), "random"), "generator"),
        (draw_from(np.random.default_rng(0), "normal"), "generator"),
        (draw_from(np.random.RandomState(0), "normal"), "generator"),
        (lambda: next(COUNT), "COUNT"),
    ],
)
def test_the_changed_value_is_named(program: Callable[[], Any], name: str) -> None:
    before = python_state(program)
    assert changed(before, python_state(program)) == ""
    program()
    assert changed(before, python_state(program)) == name


class Stateless:
    """A program whose runs change no recorded state."""

    def __init__(self) -> None:
        self.me, self.net, self.data = self, nn.Linear(2, 2), torch.zeros(3)
        self.nan, self.large = float("nan"), list(range(5000))

    def __call__(self) -> None:
        self.data += 1
        self.net(torch.zeros(2))
        self.large[0] += 1  # counts as data: only its length is recorded
        random.random()


@pytest.mark.parametrize("program", [Stateless(), types.MethodType(Stateless.__call__, Stateless())])
def test_tensors_data_and_libraries_are_ignored(program: Callable[[], None]) -> None:
    before = python_state(program)
    program()
    assert changed(before, python_state(program)) == ""


def test_libraries_are_known_by_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, user = tmp_path / "layer", tmp_path / "work"
    (layer / "package-1.0.dist-info").mkdir(parents=True)
    user.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(layer), str(user)])
    assert is_library(str(layer / "package" / "module.py"))
    assert is_library(str(torch.__file__))
    assert not is_library(str(user / "model.py"))
    assert not is_library(__file__)


def test_a_library_of_another_layer_has_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package-1.0.dist-info").mkdir()
    file = tmp_path / "layered_library.py"
    file.write_text("calls = 0\n\ndef count():\n    global calls\n    calls += 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import layered_library  # type: ignore[import-not-found]

    before = python_state(layered_library.count)
    layered_library.count()
    assert changed(before, python_state(layered_library.count)) == ""
