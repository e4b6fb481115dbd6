"""Stands in for the compiler where a test is not about native code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor


def as_it_is(module: Any, inputs: Sequence[Tensor], lengths: Any = None) -> Callable[[list[Tensor]], Any]:
    """What a module that is not compiled does; a loop is one of Python's."""
    if not hasattr(module, "body"):
        return lambda given: module(*given)

    def loop(given: list[Tensor]) -> Any:
        carried: Any = given[: module.carried]
        for _ in range(int(given[module.count])):
            carried = module.body(*carried, *given[module.carried :])
        return carried

    return loop


def replace_compiler(monkeypatch: pytest.MonkeyPatch, compile_module: Callable[..., Any] = as_it_is) -> None:
    """Let loops and queries be compiled by something else."""
    monkeypatch.setattr("deepprob.engine.loop.compile_module", compile_module)
    monkeypatch.setattr("deepprob.programs.tracing.compile_module", compile_module)
