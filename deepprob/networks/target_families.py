"""Families of targets that a regression alone can have, and the numbers that all of its rows share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import OrderedTransform
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.nn.functional import logsigmoid

from deepprob.distributions.censored_normal import CensoredNormal
from deepprob.distributions.per_draw import UNCHECKED

_LOG_SCALE = 9.0  # bound on the log-scale of one row; its variance and precision stay finite in float32


class _ExpAbove(Transform):
    """The map from real numbers to those above a bound."""

    domain = constraints.real
    bijective = True
    sign = +1

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound
        self.codomain = constraints.greater_than(bound)

    def _call(self, x: Tensor) -> Tensor:
        return self.bound + x.exp()

    def _inverse(self, y: Tensor) -> Tensor:
        return (y - self.bound).log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x


# One object for each map, because torch knows the KL of equal transforms only.
_ORDERED, _ABOVE_ONE = OrderedTransform(), _ExpAbove(1.0)


@dataclass(frozen=True)
class Shared:
    r"""A number that all rows share, learned beside the network: noise, degrees of freedom, cutpoints.

    A positive number has a log-normal prior, as has the part of a number that is above one. Cutpoints
    :math:`c_1 < c_2 < \dots` have the prior of :math:`c_1 \sim N` and :math:`\log(c_{k+1} - c_k) \sim N`.

    Attributes:
        name: Its name, that of its site in a Bayesian network.
        median: Median of the log-normal prior, where a fit starts.
        spread: Standard deviation of the prior, of the logarithm or the unconstrained cutpoints.
        scaled: Whether it is in standard deviations of y.
        ordered: Whether these are cutpoints.
        above_one: Whether it is above one.
    """

    name: str
    median: float = 1.0
    spread: float = 1.5
    scaled: bool = False
    ordered: bool = False
    above_one: bool = False

    def start(self, columns: int, num_classes: int | None) -> Tensor:
        """Location of the prior of unconstrained numbers: one for every column of y, or for every cutpoint.

        Cutpoints start where all classes are equally likely if the network's output is 0.
        """
        if not self.ordered or num_classes is None:
            return torch.full((columns,), math.log(self.median))
        found: Tensor = _ORDERED.inv(torch.arange(1, num_classes).div(num_classes).logit())
        return found

    def distribution(self, loc: Tensor, spread: Tensor | float) -> Any:
        """The distribution whose unconstrained numbers are normal."""
        normal = dist.Normal(loc, spread).to_event(1)
        if self.ordered:
            return dist.TransformedDistribution(normal, [_ORDERED])
        if self.above_one:
            return dist.TransformedDistribution(normal, [_ABOVE_ONE])
        return dist.LogNormal(loc, spread).to_event(1)


NOISE = Shared("noise", median=0.1, scaled=True)
TOTAL_COUNT = Shared("total_count", median=10.0)
DISPERSION = Shared("dispersion")
DEGREES_OF_FREEDOM = Shared("degrees_of_freedom", median=10.0, spread=1.0, above_one=True)  # the mean exists
Numbers = Mapping[str, Tensor]


@dataclass(frozen=True)
class TargetFamily:
    """A family of targets.

    Attributes:
        make: The distribution, from outputs ``(..., outputs)``, location, scale, shared numbers and limits.
        shared: The shared numbers.
        per_column: Number of outputs for every column of y.
    """

    make: Callable[..., Any]
    shared: tuple[Shared, ...] = ()
    per_column: int = 1


def _student_t(out: Tensor, loc: Tensor, scale: Tensor, numbers: Numbers, limits: object) -> Any:
    df, noise = numbers["degrees_of_freedom"], numbers["noise"]
    return dist.StudentT(df, loc + scale * out, noise, validate_args=UNCHECKED)


def _heteroscedastic(out: Tensor, loc: Tensor, scale: Tensor, numbers: Numbers, limits: object) -> Any:
    mean, log_scale = out.chunk(2, -1)
    noise = scale * log_scale.clamp(-_LOG_SCALE, _LOG_SCALE).exp()
    return dist.Normal(loc + scale * mean, noise, validate_args=UNCHECKED)


def _censored(out: Tensor, loc: Tensor, scale: Tensor, numbers: Numbers, limits: tuple[float, float]) -> Any:
    return CensoredNormal(loc + scale * out, numbers["noise"], *limits, validate_args=UNCHECKED)


def _ordinal(out: Tensor, loc: object, scale: object, numbers: Numbers, limits: object) -> Any:
    r"""Classes with :math:`P(y \le k) = \sigma(c_k - o)`, from logarithms, so that no class has probability 0."""
    at = numbers["cutpoints"] - out  # (..., classes - 1)
    ends = at.new_full((*at.shape[:-1], 1), math.inf)
    above, below = torch.cat([at, ends], -1), torch.cat([-ends, at], -1)
    middle = torch.log(-torch.expm1(at[..., :-1] - at[..., 1:]))  # of sigmoid(b) - sigmoid(a), beside two factors
    between = torch.cat([torch.zeros_like(ends), middle, torch.zeros_like(ends)], -1)
    return dist.Categorical(logits=logsigmoid(above) + logsigmoid(-below) + between)


TARGET_FAMILIES = {
    "student_t": TargetFamily(_student_t, (NOISE, DEGREES_OF_FREEDOM)),
    "heteroscedastic_normal": TargetFamily(_heteroscedastic, per_column=2),
    "censored_normal": TargetFamily(_censored, (NOISE,)),
    "ordinal": TargetFamily(_ordinal, (Shared("cutpoints", ordered=True),)),
}
