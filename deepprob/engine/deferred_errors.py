"""Conditions that would end a run with an error, noted for its answer while the run is traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ACTIVE: list[Failures] = []  # tracing is under one lock


class Failures(TorchDispatchMode):
    """Within this context, where a run is traced, what would be an error is noted without asking the host.

    That is: `failed` conditions, and matrices without a Cholesky factor or an inverse.

    Examples:
        >>> with Failures() as failures:
        ...     _ = torch.linalg.cholesky(-torch.eye(2))
        >>> failures.spoil(torch.tensor(1.0)).item()
        nan
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see LiftedNoise

    def __enter__(self) -> Failures:
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

    def spoil(self, answer: Tensor) -> Tensor:
        """An answer, or nan where the run failed."""
        for condition in self.found:
            answer = torch.where(condition, torch.nan, answer)
        return answer


def failed(condition: Tensor) -> bool:
    """Whether a condition holds that is an error; while a run is traced it is noted, and False."""
    if _ACTIVE:
        _ACTIVE[-1].found.append(condition)
        return False
    return bool(condition)
