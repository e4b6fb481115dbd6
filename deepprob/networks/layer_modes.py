"""Modes of linear and convolutional layers: many sets of weights at once, and lower precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class _BroadcastLinear(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dim() == 2 and (bias is None or bias.dim() == 1):
        return functional.linear(input, weight, bias)
    # weight (K, 1, out, in): the 1 holds the place of the row axis, which the product adds.
    w = weight.squeeze(-3) if weight.dim() > 3 else weight  # (K, out, in)
    out = torch.matmul(input, w.transpose(-1, -2))  # (K, B, out)
    return out if bias is None else out + bias  # bias (K, 1, out)


@contextmanager
def broadcast_linear() -> Iterator[None]:
    """Let ``F.linear`` accept weights with leading dimensions of draws.

    A network whose weights are random (``PyroSample``) gets weights of shape ``(K, 1, out, in)`` under a plate of
    K draws; torch's linear layer accepts only matrices.

    Examples:
        >>> x, w = torch.randn(7, 3), torch.randn(5, 1, 2, 3)
        >>> with broadcast_linear():
        ...     y = torch.nn.functional.linear(x, w)
        >>> tuple(y.shape)
        (5, 7, 2)
    """
    with _BroadcastLinear():
        yield


_LAYERS = (
    functional.linear,
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)


class _LowPrecision(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _LAYERS or args[0].dtype != torch.float32:
            return func(*args, **kwargs)
        args, kwargs = tree_map(lambda x: x.bfloat16() if isinstance(x, Tensor) else x, (args, kwargs))
        return func(*args, **kwargs).float()


@contextmanager
def layers_in(precision: str) -> Iterator[None]:
    """Run linear and convolutional layers in a given precision; other operations do not change.

    In bfloat16, a layer rounds its inputs and weights, and returns its output and gradients in float32. Everything
    computed from the output, such as log-probabilities, stays in float32, and so do parameters.

    Args:
        precision: ``"float32"`` (nothing changes) or ``"bfloat16"``.

    Examples:
        >>> layer, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
        >>> with layers_in("bfloat16"):
        ...     y = layer(x)
        >>> y.dtype, bool(torch.equal(y, layer(x))), bool(torch.allclose(y, layer(x), atol=0.05))
        (torch.float32, False, True)
    """
    with nullcontext() if precision == "float32" else _LowPrecision():
        yield
