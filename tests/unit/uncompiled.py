"""A stand-in for the compiler, for tests that are not about native code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor


def run_uncompiled(module: Any, inputs: Sequence[Tensor], lengths: Any = None) -> Callable[[list[Tensor]], Any]:
    """A function that runs a module without compiling it; a `Repeated` module becomes a loop in Python."""
    if not hasattr(module, "body"):
        return lambda given: module(*given)

    def loop(given: list[Tensor]) -> Any:
        carried: Any = given[: module.carried]
        for _ in range(int(given[module.count])):
            carried = module.body(*carried, *given[module.carried :])
        return carried

    return loop


def replace_compiler(monkeypatch: pytest.MonkeyPatch, compile_module: Callable[..., Any] = run_uncompiled) -> None:
    """Replace the compiler of loops and queries by another function."""
    monkeypatch.setattr("deepprob.engine.loop.compile_module", compile_module)
    monkeypatch.setattr("deepprob.programs.tracing.compile_module", compile_module)
