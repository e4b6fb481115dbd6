"""Optimizer updates as pure functions of tensors, which run eagerly or inside a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from deepprob.engine.packing import global_norm

Carry = dict[str, list[Tensor]]
"""The tensors that one step hands to the next: ``packed`` parameters, the optimizer's ``first`` and ``second`` moments,
the ``average`` of the parameters, ``accumulated`` gradients, ``buffers``, and the ``count`` of applied updates."""

# A rule maps (parameter, gradient, moments, number of this update, learning rate) to the new parameter and moments.
# In every rule `first` is linear in the gradient and starts at zero: after one step it shows the gradient.
Rule = Callable[[Tensor, Tensor, Sequence[Tensor], Tensor, Tensor], tuple[Tensor, tuple[Tensor, ...]]]


def _adam(
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, decoupled: bool = False
) -> Rule:
    low, high = betas

    def rule(
        p: Tensor, g: Tensor, moments: Sequence[Tensor], number: Tensor, rate: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if weight_decay and decoupled:
            p = p * (1 - rate * weight_decay)
        elif weight_decay:
            g = g + weight_decay * p
        n = number.to(p.dtype)
        first = moments[0] + (1 - low) * (g - moments[0])
        second = moments[1] * high + (1 - high) * g * g
        scale = (second / (1 - high**n)).sqrt() + eps
        return p - rate * (first / (1 - low**n)) / scale, (first, second)

    return rule


def _adamw(betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2) -> Rule:
    return _adam(betas, eps, weight_decay, decoupled=True)


def _sgd(momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False) -> Rule:
    def rule(
        p: Tensor, g: Tensor, moments: Sequence[Tensor], number: Tensor, rate: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if weight_decay:
            g = g + weight_decay * p
        first = momentum * moments[0] + g
        return p - rate * (g + momentum * first if nesterov else first), (first,)

    return rule


_RULES: dict[str, tuple[Callable[..., Rule], frozenset[str], int]] = {
    "adam": (_adam, frozenset({"betas", "eps", "weight_decay"}), 2),
    "adamw": (_adamw, frozenset({"betas", "eps", "weight_decay"}), 2),
    "sgd": (_sgd, frozenset({"momentum", "weight_decay", "nesterov"}), 1),
}
_MOMENTS = ("first", "second")


def rule_named(name: str, options: Mapping[str, Any]) -> tuple[Rule, int] | None:
    """Look up an update rule and its number of moments; None for optimizers that only ``torch.optim`` has.

    Args:
        name: ``"adam"``, ``"adamw"`` or ``"sgd"``, as ``torch.optim`` defines them.
        options: Arguments of the class in ``torch.optim``. Options that the rule does not have give None.

    References:
        Kingma, Ba (2015), Adam: A Method for Stochastic Optimization.
        Loshchilov, Hutter (2019), Decoupled Weight Decay Regularization.

    Examples:
        Plain gradient descent:

        >>> rule, _ = rule_named("sgd", {})
        >>> p, _ = rule(torch.ones(1), torch.ones(1), [torch.zeros(1)], torch.tensor(1), torch.tensor(0.1))
        >>> p.tolist()
        [0.8999999761581421]
        >>> rule_named("adam", {"amsgrad": True}) is None
        True
    """
    if name not in _RULES:
        return None
    make, known, moments = _RULES[name]
    return (make(**options), moments) if options.keys() <= known else None


def first_carry(packed: list[Tensor], *, moments: int, averaged: bool, accumulating: bool) -> Carry:
    """The carry before the first step.

    Args:
        packed: The parameters.
        moments: Number of moments that the optimizer keeps.
        averaged: Whether to keep an average of the parameters.
        accumulating: Whether to accumulate gradients over several steps.
    """
    carry: Carry = {"packed": packed}
    for name in (*_MOMENTS[:moments], *(["accumulated"] if accumulating else [])):
        carry[name] = [torch.zeros_like(p) for p in packed]
    if averaged:
        carry["average"] = [p.clone() for p in packed]
    carry["count"] = [torch.zeros((), dtype=torch.long, device=packed[0].device)]
    return carry


def advance(
    carry: Carry,
    gradients: Sequence[Tensor],
    finite: Tensor,
    rate: Tensor,
    step: Tensor,
    rule: Rule,
    *,
    clip_norm: float | None = None,
    average: float | None = None,
    accumulate: int = 1,
) -> Carry:
    """Update packed parameters without a host sync; the given carry does not change.

    Args:
        carry: The carry of the previous step.
        gradients: Gradients of the loss, packed.
        finite: Whether loss and gradients are finite; if not, the step is skipped.
        rate: The learning rate.
        step: Number of this step, from 0.
        rule: The optimizer's update rule.
        clip_norm: Largest norm of the gradient, or None.
        average: Decay of the average of the parameters, or None.
        accumulate: Number of steps whose gradients are averaged for one update.

    Returns:
        The new carry, without ``buffers``.
    """
    gradients, applied, new = accumulate_and_clip(carry, gradients, finite, step, clip_norm, accumulate)
    number = carry["count"][0] + 1
    names = [m for m in _MOMENTS if m in carry]
    new |= {name: [] for name in ("packed", *names)}
    for i, (p, g) in enumerate(zip(carry["packed"], gradients, strict=True)):
        moments = [carry[m][i] for m in names]
        stepped, moved = rule(p, g, moments, number, rate)
        new["packed"].append(chosen(applied, stepped, p))
        for name, before, after in zip(names, moments, moved, strict=True):
            new[name].append(chosen(applied, after, before))
    return new | count_and_average(carry, new["packed"], applied, average)


def chosen(applied: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``torch.where(applied, new, old)`` for one flag; on a CPU, where a flag is read at no cost, without a copy."""
    if type(applied) is not Tensor or applied.device.type != "cpu" or get_proxy_mode() is not None:
        return torch.where(applied, new, old)
    return new if applied else old


def accumulate_and_clip(
    carry: Carry, gradients: Sequence[Tensor], finite: Tensor, step: Tensor, clip_norm: float | None, accumulate: int
) -> tuple[Sequence[Tensor], Tensor, Carry]:
    """Accumulate gradients over steps, and clip their norm.

    Returns:
        The gradients of this update, whether to apply it, and the accumulated gradients of the new carry.
    """
    new: Carry = {}
    if accumulate > 1:
        pairs = zip(carry["accumulated"], gradients, strict=True)
        gradients = [torch.where(finite, a + g / accumulate, a) for a, g in pairs]
        # If every accumulated step was skipped there is no gradient; without this test momentum would still move the
        # parameters.
        finite = ((step + 1) % accumulate == 0) & torch.stack([g.any() for g in gradients]).any()
        new["accumulated"] = [torch.where(finite, torch.zeros_like(g), g) for g in gradients]
    if clip_norm is not None:
        shrink = (clip_norm / (global_norm(gradients) + 1e-6)).clamp(max=1.0)
        gradients = [g * shrink for g in gradients]
    return gradients, finite, new


def count_and_average(carry: Carry, packed: Sequence[Tensor], applied: Tensor, average: float | None) -> Carry:
    """The new count of updates and moving average of the parameters.

    Early averages forget the start faster, as in Adam's bias correction.
    """
    number = carry["count"][0] + 1
    new: Carry = {"count": [chosen(applied, number, carry["count"][0])]}
    if average is not None:
        kept = ((1.0 + number) / (10.0 + number)).clamp(max=average)
        pairs = zip(carry["average"], packed, strict=True)
        new["average"] = [torch.where(applied, p + (a - p) * kept.to(p.dtype), a) for a, p in pairs]
    return new
