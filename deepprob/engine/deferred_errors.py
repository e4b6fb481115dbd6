"""Errors of a traced run, recorded as conditions that make its answer nan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ACTIVE: list[DeferredErrors] = []  # tracing holds a lock, so one list serves all threads


class DeferredErrors(TorchDispatchMode):
    """Record error conditions as tensors while a run is traced, instead of raising.

    The conditions are those given to `defer_error`, and matrices without a Cholesky factor or an inverse.

    Examples:
        >>> with DeferredErrors() as errors:
        ...     _ = torch.linalg.cholesky(-torch.eye(2))
        >>> errors.mark_nan(torch.tensor(1.0)).item()
        nan
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see LiftedNoise

    def __enter__(self) -> DeferredErrors:
        _ACTIVE.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _ACTIVE.pop()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._linalg_check_errors.default:
            self.found.append((args[0] != 0).any())
            return None
        return func(*args, **(kwargs or {}))

    def mark_nan(self, answer: Tensor) -> Tensor:
        """Replace an answer by nan if a recorded condition holds."""
        for condition in self.found:
            answer = torch.where(condition, torch.nan, answer)
        return answer


def defer_error(condition: Tensor) -> bool:
    """Record an error condition and return False while a run is traced; otherwise return whether it holds."""
    if _ACTIVE:
        _ACTIVE[-1].found.append(condition)
        return False
    return bool(condition)
