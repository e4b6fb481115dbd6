"""A normal that is recorded only between two limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.special import log_ndtr, ndtr


class CensoredNormal(TorchDistribution):
    r"""Distribution of :math:`y = \min(\max(x, l), h)` with :math:`x \sim N(\mu, \sigma^2)`.

    .. math:: \log p(y) = \begin{cases} \log \Phi\big((l - \mu) / \sigma\big) & y = l \\
              \log \Phi\big((\mu - h) / \sigma\big) & y = h \\ \log N(y; \mu, \sigma^2) & l < y < h \end{cases}

    A value at a limit has the probability of the tail beyond it, as in a Tobit model.

    Args:
        loc: Mean of the normal, :math:`\mu`.
        scale: Standard deviation of the normal, :math:`\sigma`.
        low: The lower limit, :math:`l`; ``-inf`` for none.
        high: The upper limit, :math:`h`; ``inf`` for none.

    References:
        Tobin (1958), Estimation of Relationships for Limited Dependent Variables.

    Examples:
        The probability of the lower limit and the density above it add up to 1:

        >>> d = CensoredNormal(torch.tensor(0.3), torch.tensor(1.0), low=0.0)
        >>> y = torch.linspace(0.0, 8.0, 8001)
        >>> density = d.log_prob(y).exp()
        >>> round(float(density[0] + torch.trapezoid(density[1:], y[1:])), 3)
        1.0
    """

    arg_constraints: dict[str, Any] = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        low: float = -math.inf,
        high: float = math.inf,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.low, self.high = low, high
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def support(self) -> Any:
        """The values between the limits."""
        if math.isinf(self.low):
            return constraints.real if math.isinf(self.high) else constraints.less_than(self.high)
        return (
            constraints.greater_than_eq(self.low)
            if math.isinf(self.high)
            else constraints.interval(self.low, self.high)
        )

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> CensoredNormal:
        new: CensoredNormal = self._get_checked_instance(CensoredNormal, _instance)  # type: ignore[no-untyped-call]
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        new.low, new.high = self.low, self.high
        TorchDistribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        return new

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        drawn: Tensor = Normal(self.loc, self.scale, validate_args=False).sample(torch.Size(sample_shape))
        return drawn.clamp(self.low, self.high)

    def log_prob(self, value: Tensor) -> Tensor:
        found: Tensor = Normal(self.loc, self.scale, validate_args=False).log_prob(value)
        if math.isfinite(self.low):
            found = torch.where(value <= self.low, log_ndtr((self.low - self.loc) / self.scale), found)
        if math.isfinite(self.high):
            found = torch.where(value >= self.high, log_ndtr((self.loc - self.high) / self.scale), found)
        return found

    @property
    def mean(self) -> Tensor:
        found: Tensor = self.loc + self.scale * self._moments()[0]
        return found

    @property
    def variance(self) -> Tensor:
        first, second = self._moments()
        found: Tensor = self.scale.square() * (second - first.square()).clamp_min(0.0)
        return found

    def _moments(self) -> tuple[Tensor, Tensor]:
        """First and second moment of the standardized value."""
        first, second = torch.zeros_like(self.loc), torch.ones_like(self.loc)
        for limit, side in ((self.low, -1.0), (self.high, 1.0)):
            if math.isfinite(limit):
                at = (limit - self.loc) / self.scale
                tail, density = ndtr(-side * at), (-at.square() / 2).exp() / math.sqrt(2 * math.pi)
                first = first + at * tail - side * density
                second = second + (at.square() - 1.0) * tail - side * at * density
        return first, second
