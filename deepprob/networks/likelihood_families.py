"""Families of a likelihood: the support of a value, and its distribution given a network's outputs."""

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

FLOOR = 1e-4  # of noise, rates and inverse total counts; the default floor of Conditional
_PADDING_LOGIT = -1e4  # beyond a sequence's end: the log-probability of zero rounds to 0.0
_PADDING_SD = 1e-12  # beyond a sequence's end: draws are zero up to rounding


@dataclass(frozen=True)
class Family:
    """A family of a likelihood.

    Attributes:
        make: The distribution, from outputs, location, scale, dispersion and the mask of the values inside a sequence.
        picture: The kind of picture that shows observations.
        allows: Which values are in the support; None for all.
        expected: These values, in words.
        remedy: What to do about others.
        dispersion: Name of the dispersion; None for a family without one.
        raw_start: Initial value of the unbounded dispersion.
    """

    make: Callable[..., Any]
    picture: str
    allows: Callable[[Tensor], Tensor] | None = None
    expected: str = ""
    remedy: str = ""
    dispersion: str | None = None
    raw_start: float = 0.0


def _bernoulli(out: Tensor, loc: Tensor | None, scale: object, dispersion: object, inside: Tensor | None) -> Any:
    logits = out if loc is None else loc + out
    logits = logits if inside is None else torch.where(inside, logits, _PADDING_LOGIT)
    return dist.Bernoulli(logits=logits, validate_args=UNCHECKED)


def _categorical(out: Tensor, loc: Tensor | None, scale: object, dispersion: object, inside: Tensor | None) -> Any:
    logits = out if loc is None else loc + out
    if inside is not None:  # beyond the end, class 0 is certain
        certain = _PADDING_LOGIT * (torch.arange(logits.shape[-1], device=logits.device) > 0)
        logits = torch.where(inside.unsqueeze(-1), logits, certain.to(logits.dtype))
    return dist.Categorical(logits=logits)


def _normal(out: Tensor, loc: Tensor | None, scale: Tensor | None, dispersion: Tensor, inside: Tensor | None) -> Any:
    mean = out if scale is None else scale * out
    mean = mean if loc is None else loc + mean
    if inside is None:
        return dist.Normal(mean, dispersion)
    mean = torch.where(inside, mean, 0.0)
    noise = torch.where(inside, dispersion, _PADDING_SD)
    return dist.Normal(mean, noise, validate_args=UNCHECKED).mask(inside)


def _poisson(out: Tensor, loc: object, scale: Tensor | None, dispersion: object, inside: Tensor | None) -> Any:
    rate = _mean_count(out, scale)
    rate = rate if inside is None else torch.where(inside, rate, 0.0)
    return dist.Poisson(rate, validate_args=UNCHECKED)


def _negative_binomial(
    out: Tensor, loc: object, scale: Tensor | None, dispersion: Tensor, inside: Tensor | None
) -> Any:
    logits = _mean_count(out, scale).log() - dispersion.log()
    logits = logits if inside is None else torch.where(inside, logits, _PADDING_LOGIT)
    return dist.NegativeBinomial(dispersion, logits=logits, validate_args=UNCHECKED)


def _mean_count(out: Tensor, scale: Tensor | None) -> Tensor:
    mean = positive_link(out, FLOOR)
    return mean if scale is None else scale * mean


def _is_binary(x: Tensor) -> Tensor:
    return (x == 0) | (x == 1)


def _is_count(x: Tensor) -> Tensor:
    return (x >= 0) & (x == x.round())


_COUNTS: dict[str, Any] = {
    "picture": "counts",
    "allows": _is_count,
    "expected": "whole numbers of at least 0",
    "remedy": "Give counts, or choose likelihood='normal'.",
}
FAMILIES = {
    "bernoulli": Family(
        _bernoulli, "binary", _is_binary, "0 or 1", "Write ({name} > threshold).float(), or choose another likelihood."
    ),
    "categorical": Family(_categorical, "classes"),
    "normal": Family(_normal, "curve", dispersion="noise", raw_start=0.5),
    "poisson": Family(_poisson, **_COUNTS),
    # Starts at a total count of 10, where counts with mean 10 have twice a Poisson's variance.
    "negative_binomial": Family(
        _negative_binomial, dispersion="total_count", raw_start=math.log(math.expm1(0.1)), **_COUNTS
    ),
}
