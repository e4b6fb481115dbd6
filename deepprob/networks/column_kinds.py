"""The kinds of columns of a table: the values that each allows, and its distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from deepprob.distributions.per_draw import UNCHECKED
from deepprob.networks.conditional import positive_link

FLOOR = 1e-4  # of noise, rates and inverse total counts, as of Likelihood


@dataclass(frozen=True)
class ColumnKind:
    """A kind of column.

    Attributes:
        allows: Which rows of a column have an allowed value, from ``(N, columns)`` to ``(N,)``.
        expected: These values, in words.
        remedy: What to do about others.
        make: The distribution, from outputs, location, scale and dispersion.
        units: Location and scale, from the mean and number of values, and the mean and sd of transformed values.
        transform: Values on the scale on which a network reads them.
        raw_start: Initial value of the unbounded dispersion; None for a family without one.
    """

    allows: Callable[[Tensor], Tensor]
    expected: str
    remedy: str
    make: Callable[..., Any]
    units: Callable[..., tuple[Any, Any]]
    transform: Callable[[Tensor], Tensor] = torch.Tensor.contiguous
    raw_start: float | None = None


def _normal(out: Tensor, loc: Tensor, scale: Tensor, noise: Tensor) -> Any:
    return dist.Normal(loc + scale * out, scale * noise, validate_args=UNCHECKED)


def _log_normal(out: Tensor, loc: Tensor, scale: Tensor, noise: Tensor) -> Any:
    return dist.LogNormal(loc + scale * out, scale * noise, validate_args=UNCHECKED)


def _bernoulli(out: Tensor, loc: Tensor, scale: Tensor, dispersion: None) -> Any:
    return dist.Bernoulli(logits=loc + out, validate_args=UNCHECKED)


def _categorical(out: Tensor, loc: Tensor, scale: Tensor, dispersion: None) -> Any:
    return dist.OneHotCategorical(logits=loc + out, validate_args=UNCHECKED)


def _poisson(out: Tensor, loc: Tensor, scale: Tensor, dispersion: None) -> Any:
    return dist.Poisson(scale * positive_link(out, FLOOR), validate_args=UNCHECKED)


def _negative_binomial(out: Tensor, loc: Tensor, scale: Tensor, inverse: Tensor) -> Any:
    logits = (scale * positive_link(out, FLOOR)).log() + inverse.log()
    return dist.NegativeBinomial(inverse.reciprocal(), logits=logits, validate_args=UNCHECKED)


def _as_real(mean: Tensor, count: Tensor, centre: Tensor, spread: Tensor) -> tuple[Any, Any]:
    return centre, spread


def _as_binary(mean: Tensor, count: Tensor, centre: Tensor, spread: Tensor) -> tuple[Any, Any]:
    return ((mean * count + 0.5) / (count + 1)).logit(), 1.0


def _as_shares(mean: Tensor, count: Tensor, centre: Tensor, spread: Tensor) -> tuple[Any, Any]:
    return ((mean * count + 0.5) / (count + len(mean) / 2)).log(), 1.0


def _as_count(mean: Tensor, count: Tensor, centre: Tensor, spread: Tensor) -> tuple[Any, Any]:
    return 0.0, torch.where(mean > 0, mean, 1.0) / (math.log(2) + FLOOR)  # softplus(0) is log 2


def _is_real(x: Tensor) -> Tensor:
    return x[:, 0].isfinite()


def _is_positive(x: Tensor) -> Tensor:
    return x[:, 0].isfinite() & (x[:, 0] > 0)


def _is_binary(x: Tensor) -> Tensor:
    return (x[:, 0] == 0) | (x[:, 0] == 1)


def _is_at_most_one_hot(x: Tensor) -> Tensor:
    return ((x == 0) | (x == 1)).all(1) & (x.sum(1) <= 1)


def _is_count(x: Tensor) -> Tensor:
    return x[:, 0].isfinite() & (x[:, 0] >= 0) & (x[:, 0] == x[:, 0].round())


_BINARY = ColumnKind(_is_binary, "0 or 1", "Write 1 for yes and 0 for no, or another kind.", _bernoulli, _as_binary)
_COUNTS = (_is_count, "a whole number of at least 0", "Give counts, or the kind 'real'.")
COLUMN_KINDS = {
    "real": ColumnKind(_is_real, "a finite number", "Write NaN for a missing value.", _normal, _as_real, raw_start=0.5),
    "positive": ColumnKind(
        _is_positive, "above 0", "Use the kind 'real'.", _log_normal, _as_real, torch.log, raw_start=0.5
    ),
    "binary": _BINARY,
    "categories": ColumnKind(
        _is_at_most_one_hot,
        "one-hot: one 1 and otherwise 0",
        "Write torch.nn.functional.one_hot(classes, {count}).",
        _categorical,
        _as_shares,
    ),
    "count": ColumnKind(*_COUNTS, _poisson, _as_count, torch.log1p),
    # Starts at a total count of 10, as of Likelihood.
    "overdispersed": ColumnKind(
        *_COUNTS, _negative_binomial, _as_count, torch.log1p, raw_start=math.log(math.expm1(0.1))
    ),
    "missing": _BINARY,
}
