"""Averages over draws, and entropies of probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def as_real(value: Tensor) -> Tensor:
    """Whole numbers in the default dtype, in which they have moments."""
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())


def like(weights: Tensor, values: Tensor) -> Tensor:
    """Weights by draw and row, ``(K, B)``, with the dimensions of values ``(K, B, ...)``."""
    return weights.to(values.dtype).reshape(*weights.shape, *[1] * (values.dim() - 2))


def average(values: Tensor) -> Tensor:
    """The mean over draws, without a rounding error where all of them are the same."""
    first = values[0].nan_to_num(0.0, 0.0, 0.0)
    return torch.as_tensor(first + (values - first).mean(0))


def entropy(probs: Tensor) -> Tensor:
    """The entropy of a distribution over classes, whose probabilities lie along the last axis, in nats."""
    return torch.as_tensor(torch.special.entr(probs).sum(-1))


def binary_entropy(probs: Tensor) -> Tensor:
    """The entropy of zeros and ones by the probability of a one, in nats."""
    return torch.as_tensor(torch.special.entr(probs) + torch.special.entr(1 - probs))
