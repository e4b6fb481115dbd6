"""What the linear and convolutional layers of a run see: their inputs, and the gradients of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from deepprob.engine.batching import quiet

_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer: an output is the product of the weight matrix and an input, at every position.

    A convolution has a position for every entry of its output's last axes. A layer that runs on a series has one for
    every step.

    Attributes:
        weight: The name of the weight.
        bias: The name of the bias; None if the call has none, or one that has no name.
        inputs: The inputs, ``(B, L, I)`` for L positions; with a bias, a last input of 1.
        output: The layer's output, to differentiate by.
        channels_first: Whether the output has its channels before its positions, as that of a convolution.
    """

    weight: str
    bias: str | None
    inputs: Tensor
    output: Tensor
    channels_first: bool

    def by_position(self, gradients: Tensor) -> Tensor:
        """Gradients of the output, ``(K, *output)``, as ``(K, B, L, O)``."""
        if self.channels_first:
            return gradients.flatten(3).mT
        return gradients.reshape(len(gradients), *self.inputs.shape[:2], gradients.shape[-1])


class LayerCalls(TorchFunctionMode):
    """Records the calls of linear and convolutional layers whose weights are given tensors.

    A call by a tensor that was computed from a weight, as under a weight norm, is not recorded, nor is another use of a
    weight, such as that of an embedding, nor a call of which no gradient is taken: compare `weight_gradients` with the
    gradients of the whole run.

    Args:
        weights: The tensors by name.

    Attributes:
        calls: The calls, in the order of the run.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weights, self.names = dict(weights), {id(x): name for name, x in weights.items()}
        self.calls: list[LayerCall] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func not in (functional.linear, functional.conv1d, functional.conv2d):
            return out
        given = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
        name, bias = self.names.get(id(given["weight"])), given.get("bias")
        if name is None or not out.requires_grad:
            return out
        inputs = _rows(given["input"]) if func is functional.linear else _patches(func, given)
        if inputs is None:
            return out
        known = None if bias is None else self.names.get(id(bias))
        inputs = inputs if known is None else torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)
        self.calls.append(LayerCall(name, known, inputs.detach(), out, func is not functional.linear))
        return out.clone()  # a later layer may change it in place

    def of(self, weight: str) -> list[LayerCall]:
        """The calls of one weight."""
        return [call for call in self.calls if call.weight == weight]

    def on_rows(self, rows: int) -> set[str]:
        """The weights and biases whose calls all have some number of rows, and not some of them or none."""
        pairs = [(name, call) for call in self.calls for name in (call.weight, call.bias) if name is not None]
        return {name for name, _ in pairs} - {name for name, call in pairs if len(call.inputs) != rows}

    def gradients(self, results: Sequence[Tensor], directions: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of results by the outputs of all calls.

        Args:
            results: Tensors that the run made.
            directions: What to multiply each with, ``(K, *result)``.

        Returns:
            For every call ``(K, B, L, O)``.
        """
        outputs = [call.output for call in self.calls]
        found = in_directions(results, directions, outputs)
        return [call.by_position(g) for call, g in zip(self.calls, found, strict=True)]

    def weight_gradients(
        self, gradients: Sequence[Tensor], *, by_row: bool, only: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Gradients by weight, from those of `gradients`: ``(K, *weight)``, by row ``(K, B, *weight)``.

        Args:
            gradients: Gradients of the calls.
            by_row: Whether the rows are kept apart, or summed.
            only: The weights and biases to take; None for all.
        """
        found: dict[str, Tensor] = {}
        equation = "kblo,bli->kboi" if by_row else "kblo,bli->koi"
        for call, gradient in zip(self.calls, gradients, strict=True):
            if only is not None and not {call.weight, call.bias} & set(only):
                continue
            whole = torch.einsum(equation, gradient, call.inputs)
            parts = (
                {call.weight: whole} if call.bias is None else {call.weight: whole[..., :-1], call.bias: whole[..., -1]}
            )
            for name, part in parts.items():
                if only is not None and name not in only:
                    continue
                part = part.reshape(*part.shape[: 2 if by_row else 1], *self.weights[name].shape)
                found[name] = found[name] + part if name in found else part
        return found


def in_directions(results: Sequence[Tensor], directions: Sequence[Tensor], by: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of results, multiplied with directions, by some tensors; zeros for a tensor that has no part in them.

    Args:
        results: The results.
        directions: For each result ``(K, *result)``.
        by: The tensors.

    Returns:
        For each tensor ``(K, *tensor)``.
    """
    if not by:
        return []
    count = len(directions[0])
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    try:
        with quiet():
            found = torch.autograd.grad(results, by, directions, is_grads_batched=True, **options)
    except RuntimeError:  # an operation whose gradient torch cannot batch
        each = [torch.autograd.grad(results, by, [d[k] for d in directions], **options) for k in range(count)]
        found = tuple(torch.stack(parts) if parts[0] is not None else None for parts in zip(*each, strict=True))  # type: ignore[misc]
    return [x.new_zeros(count, *x.shape) if g is None else g for g, x in zip(found, by, strict=True)]


def rows_apart(directions: Sequence[Tensor]) -> list[Tensor]:
    """Directions in which one row at a time is not zero, ``(K, B, ...) -> (K B, B, ...)``; the row varies fastest."""
    rows = max(x.shape[1] if x.dim() > 1 else 1 for x in directions)
    found = []
    for x in directions:
        flat = x if x.dim() > 1 else x.unsqueeze(1)
        mask = torch.eye(rows, flat.shape[1], device=x.device, dtype=x.dtype)
        whole = flat.unsqueeze(1) * mask.reshape(1, rows, flat.shape[1], *(1,) * (flat.dim() - 2))
        found.append(whole.reshape(-1, *x.shape[1:]))
    return found


def _rows(x: Tensor) -> Tensor | None:
    """The inputs of a linear layer, ``(B, L, I)``."""
    return x.unsqueeze(1).flatten(1, -2) if x.dim() > 1 else None


def _patches(func: Callable[..., Any], given: Mapping[str, Any]) -> Tensor | None:
    """The inputs of a convolution at every position, ``(B, L, I)``; None for one that has no such form."""
    x, weight = given["input"], given["weight"]
    spatial = weight.dim() - 2
    padding = given.get("padding", 0)
    if given.get("groups", 1) != 1 or isinstance(padding, str) or x.dim() != weight.dim():
        return None
    sizes = {}
    for name, value, other in (
        ("stride", given.get("stride", 1), 1),
        ("padding", padding, 0),
        ("dilation", given.get("dilation", 1), 1),
    ):
        value = (value,) * spatial if isinstance(value, int) else tuple(value) * (spatial if len(value) == 1 else 1)
        sizes[name] = value if func is functional.conv2d else (other, *value)
    kernel = tuple(weight.shape[2:])
    if func is functional.conv1d:
        x, kernel = x.unsqueeze(2), (1, *kernel)
    with torch.no_grad():
        return functional.unfold(x, kernel, **sizes).mT
