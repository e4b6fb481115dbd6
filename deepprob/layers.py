"""Layers that take many sets of weights at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _BroadcastLinear(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dim() == 2 and (bias is None or bias.dim() == 1):
        return torch.nn.functional.linear(input, weight, bias)
    # weight (K, 1, out, in): the 1 is the place of the rows, which the product itself brings.
    w = weight.squeeze(-3) if weight.dim() > 3 else weight  # (K, out, in)
    out = torch.matmul(input, w.transpose(-1, -2))  # (K, B, out)
    return out if bias is None else out + bias  # bias (K, 1, out)


@contextmanager
def broadcast_linear() -> Iterator[None]:
    """Within this context ``F.linear`` accepts weights that have leading dimensions of draws.

    A network whose weights are random (``PyroSample``) gets weights of shape ``(K, 1, out, in)`` under a plate of
    K draws; torch's linear layer takes matrices only.

    Examples:
        >>> x, w = torch.randn(7, 3), torch.randn(5, 1, 2, 3)
        >>> with broadcast_linear():
        ...     y = torch.nn.functional.linear(x, w)
        >>> tuple(y.shape)
        (5, 7, 2)
    """
    with _BroadcastLinear():
        yield
