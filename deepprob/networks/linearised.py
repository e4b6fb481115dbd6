r"""Networks that are linear in their weights: their first-order expansion around one set of weights.

.. math:: f_{\mathrm{lin}}(x; w) = f(x; \hat w) + J_{\hat w}(x) \, (w - \hat w)

References:
    Khan, Immer, Abedi, Korzepa (2019), Approximate Inference Turns Deep Networks into Gaussian Processes.
    Immer, Korzepa, Bauer (2021), Improving Predictions of Bayesian Neural Nets via Local Linearization.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from deepprob.engine.batching import transformed

Weights = dict[str, Tensor]

_PREFIX = "linear_at_"


def linearise_at(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Mark a network, so that `expansion_of` finds the weights to expand it at.

    They are buffers of the network: its state, and so a save of it, has them.

    Args:
        net: The network.
        weights: The weights by name.
    """
    for number, value in enumerate(weights.values()):
        net.register_buffer(f"{_PREFIX}{number}", value.detach().clone())


def expansion_of(net: nn.Module, names: Mapping[str, object]) -> Weights | None:
    """The weights at which a network is expanded; None for a network as it is.

    Args:
        net: The network.
        names: The names of its weights, in the order of `linearise_at`.
    """
    if f"{_PREFIX}0" not in net._buffers:
        return None
    return {name: net.get_buffer(f"{_PREFIX}{number}") for number, name in enumerate(names)}


def linearised(function: Callable[[Weights], Tensor], at: Weights) -> Callable[[Weights], Tensor]:
    """The first-order expansion of a function of weights.

    One forward derivative takes a set of weights. An operation without one, as in some recurrent layers, costs two
    backward derivatives. Attention runs without its fused kernels, which have neither.

    Args:
        function: From weights by name to outputs.
        at: The weights to expand at.

    Examples:
        >>> square = linearised(lambda w: w["a"] ** 2, {"a": torch.tensor(3.0)})
        >>> square({"a": torch.tensor(4.0)})
        tensor(15.)
    """
    _load_forward_derivatives()

    def expanded(weights: Weights) -> Tensor:
        moved = {name: weights[name] - start for name, start in at.items()}
        with sdpa_kernel(SDPBackend.MATH):
            value, change = _derivative(function, at, moved)
        found: Tensor = value + change
        return found

    return expanded


@functools.cache
def _load_forward_derivatives() -> None:
    """Let torch load its forward derivatives, which warns of a deprecated part of torch that it uses itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


def _derivative(function: Callable[[Weights], Tensor], at: Weights, moved: Weights) -> tuple[Tensor, Tensor]:
    """The value and the forward derivative, by the first way that works."""
    try:
        return _by_forward(function, at, moved)
    except (NotImplementedError, RuntimeError):
        try:
            return _by_backward(function, at, moved)
        except (NotImplementedError, RuntimeError):
            if transformed():  # the caller then takes the draws one by one
                raise
            return _by_autograd(function, at, moved)


def _by_forward(function: Callable[[Weights], Tensor], at: Weights, moved: Weights) -> tuple[Tensor, Tensor]:
    """The value and the forward derivative."""
    found: Any = torch.func.jvp(function, (at,), (moved,))
    return found[0], found[1]


def _by_backward(function: Callable[[Weights], Tensor], at: Weights, moved: Weights) -> tuple[Tensor, Tensor]:
    """The value and the forward derivative, as the derivative of a backward derivative by its direction."""
    found: Any = torch.func.vjp(function, at)
    value, pull = found
    pushed: Any = torch.func.vjp(lambda direction: pull(direction)[0], torch.zeros_like(value))
    return value, pushed[1](moved)[0]


def _by_autograd(function: Callable[[Weights], Tensor], at: Weights, moved: Weights) -> tuple[Tensor, Tensor]:
    """As `_by_backward`, without ``torch.func``, whose tensors have no storage: packed sequences read the lengths'."""
    with torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in at.values()]
        value = function(dict(zip(at, leaves, strict=True)))
    change: Tensor = _Along.apply((value, leaves), *(moved[name] for name in at))  # type: ignore[no-untyped-call]
    return value.detach(), change


class _Along(torch.autograd.Function):
    """The derivative of a value along a change of its leaves, linear in the change.

    Value and leaves come in a tuple, which autograd does not look into: the leaves are no parameters of the program.
    """

    @staticmethod
    def forward(ctx: Any, run: tuple[Tensor, list[Tensor]], *moved: Tensor) -> Tensor:
        value, leaves = ctx.run = run
        with torch.enable_grad():
            direction = torch.zeros_like(value, requires_grad=True)
            pulled = torch.autograd.grad(value, leaves, direction, create_graph=True, allow_unused=True)
            parts = [(g * x).sum() for g, x in zip(pulled, moved, strict=True) if g is not None]
            (change,) = torch.autograd.grad(torch.stack(parts).sum(), direction)
        return change

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, direction: Tensor) -> Any:
        value, leaves = ctx.run
        return None, *torch.autograd.grad(value, leaves, direction, retain_graph=True, allow_unused=True)
