"""Families of a likelihood: the support of a value, and its distribution given a network's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from deepprob.distributions.continuous_bernoulli import ContinuousBernoulli
from deepprob.distributions.discretized_logistic import DiscretizedLogistic
from deepprob.distributions.per_draw import UNCHECKED
from deepprob.networks.conditional import positive_link

FLOOR = 1e-4  # of noise, rates and inverse total counts; the default floor of Conditional
_PADDING_LOGIT = -1e4  # beyond a sequence's end: the log-probability of zero rounds to 0.0
_PADDING_SD = 1e-12  # beyond a sequence's end: draws are zero up to rounding


def positive(raw: Tensor, scale: Tensor | None = None) -> Tensor:
    """A positive dispersion, in the units of the data: noise, a scale."""
    value = positive_link(raw, FLOOR)
    return value if scale is None else value * scale


def _total_count(raw: Tensor, scale: object = None) -> Tensor:
    return positive_link(raw, FLOOR).reciprocal()


def _noise_and_df(raw: Tensor, scale: Tensor | None = None) -> Tensor:
    """The noise, in the units of the data, and degrees of freedom above one, where a mean exists: ``(..., 2)``."""
    noise, df = raw.unbind(-1)
    return torch.stack(torch.broadcast_tensors(positive(noise, scale), 1.0 + positive(df)), -1)


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
        raw_start: Initial value of the unbounded dispersion, or of each of its numbers.
        bound: Maps the unbounded dispersion, and the scale of the data, to the dispersion.
        per_value: Number of outputs for every value; they are the last axis.
        unit_interval: Whether values are in [0, 1].
        centred: Whether outputs are in the units of the data, around their mean.
        mean_at_zero: Mean of a count for an output of zero and a scale of one; None for a family of other values.
        sequences: Whether values may stand beyond a sequence's end, and the family is one of a regression's targets.
    """

    make: Callable[..., Any]
    picture: str
    allows: Callable[[Tensor], Tensor] | None = None
    expected: str = ""
    remedy: str = ""
    dispersion: str | None = None
    raw_start: float | tuple[float, ...] = 0.0
    bound: Callable[..., Tensor] = positive
    per_value: int = 1
    unit_interval: bool = False
    centred: bool = False
    mean_at_zero: float | None = None
    sequences: bool = True


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


def _student_t(out: Tensor, loc: Tensor | None, scale: Tensor | None, dispersion: Tensor, inside: object) -> Any:
    noise, df = dispersion.unbind(-1)
    mean = out if scale is None else scale * out
    return dist.StudentT(df, mean if loc is None else loc + mean, noise, validate_args=UNCHECKED)


def _continuous_bernoulli(out: Tensor, loc: object, scale: object, dispersion: object, inside: object) -> Any:
    return ContinuousBernoulli(logits=out, validate_args=UNCHECKED)


def _discretized_logistic(
    out: Tensor, loc: Tensor | None, scale: object, dispersion: Tensor, inside: object, levels: int = 256
) -> Any:
    return DiscretizedLogistic(out if loc is None else loc + out, dispersion, levels, validate_args=UNCHECKED)


def _zero_inflated_poisson(out: Tensor, loc: object, scale: Tensor | None, dispersion: object, inside: object) -> Any:
    count, gate = out.unbind(-1)
    return dist.ZeroInflatedPoisson(_mean_count(count, scale), gate_logits=gate, validate_args=UNCHECKED)


def _zero_inflated_negative_binomial(
    out: Tensor, loc: object, scale: Tensor | None, dispersion: Tensor, inside: object
) -> Any:
    count, gate = out.unbind(-1)
    logits = _mean_count(count, scale).log() - dispersion.log()
    return dist.ZeroInflatedNegativeBinomial(dispersion, logits=logits, gate_logits=gate, validate_args=UNCHECKED)


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
    "mean_at_zero": math.log(2),  # softplus(0)
}
_ZERO_INFLATED: dict[str, Any] = {**_COUNTS, "mean_at_zero": math.log(2) / 2, "per_value": 2, "sequences": False}
# Starts at a total count of 10, where counts with mean 10 have twice a Poisson's variance.
_TOTAL_COUNT: dict[str, Any] = {
    "dispersion": "total_count",
    "raw_start": math.log(math.expm1(0.1)),
    "bound": _total_count,
}
_NOISE: dict[str, Any] = {"dispersion": "noise", "centred": True}
FAMILIES = {
    "bernoulli": Family(
        _bernoulli, "binary", _is_binary, "0 or 1", "Write ({name} > threshold).float(), or choose another likelihood."
    ),
    "categorical": Family(_categorical, "classes"),
    "normal": Family(_normal, "curve", raw_start=0.5, **_NOISE),
    "poisson": Family(_poisson, **_COUNTS),
    "negative_binomial": Family(_negative_binomial, **_COUNTS, **_TOTAL_COUNT),
    "student_t": Family(
        _student_t,
        "curve",
        dispersion="noise and degrees of freedom",
        raw_start=(0.5, math.log(math.expm1(9.0))),  # 10 degrees of freedom
        bound=_noise_and_df,
        centred=True,
        sequences=False,
    ),
    "continuous_bernoulli": Family(_continuous_bernoulli, "curve", unit_interval=True, sequences=False),
    "discretized_logistic": Family(
        _discretized_logistic,
        "curve",
        raw_start=math.log(math.expm1(0.1)),
        unit_interval=True,
        sequences=False,
        **_NOISE,
    ),
    "zero_inflated_poisson": Family(_zero_inflated_poisson, **_ZERO_INFLATED),
    "zero_inflated_negative_binomial": Family(_zero_inflated_negative_binomial, **_ZERO_INFLATED, **_TOTAL_COUNT),
}
