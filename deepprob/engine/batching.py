"""Functions of one draw, applied to all draws in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_functorch: Any = torch._C._functorch


def over_draws(function: Callable[..., Any], *arguments: Any) -> Any:
    """Apply a function to every entry along the first axis of its arguments, with ``torch.vmap``.

    Random operations draw separately for every entry. An operation that torch cannot batch runs entry by entry, without
    torch's warning: nothing a user could change would avoid it.

    Args:
        function: A function of tensors, or of lists of tensors, to tensors.
        arguments: Its arguments, each tensor with the draws first.

    Examples:
        >>> over_draws(lambda w, x: w @ x, torch.eye(3).expand(4, 3, 3), torch.ones(4, 3)).shape
        torch.Size([4, 3])
    """
    with quiet():
        return torch.vmap(function, randomness="different")(*arguments)


def transformed() -> bool:
    """Whether the caller runs inside of a transform of ``torch.func``, such as ``vmap``."""
    return _functorch.peek_interpreter_stack() is not None


class _Quiet:
    """A context without torch's warnings of operations that run entry by entry; it may be entered again inside."""

    def __init__(self) -> None:
        self._depth = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._depth += 1
        _functorch._set_vmap_fallback_warning_enabled(False)
        try:
            yield
        finally:
            self._depth -= 1
            _functorch._set_vmap_fallback_warning_enabled(self._depth == 0)


quiet = _Quiet()
