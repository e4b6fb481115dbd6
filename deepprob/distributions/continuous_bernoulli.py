"""The continuous Bernoulli distribution, computed from logits, so that it is exact for all of them."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor


class ContinuousBernoulli(dist.ContinuousBernoulli):  # type: ignore[misc]
    r"""Density :math:`C(\lambda)\,e^{\lambda x} / (1 + e^\lambda)` on [0, 1], of logits :math:`\lambda`.

    .. math:: C(\lambda) = \lambda / \tanh(\lambda / 2)

    torch computes :math:`C` from probabilities that are at least 1e-7 away from 0 and 1, so that its density does not
    integrate to one for logits beyond 16.

    References:
        Loaiza-Ganem, Cunningham (2019), The continuous Bernoulli: fixing a pervasive error in variational autoencoders.

    Examples:
        >>> x = torch.linspace(0.0, 1.0, 200_001, dtype=torch.float64)
        >>> density = ContinuousBernoulli(logits=torch.tensor(40.0, dtype=torch.float64)).log_prob(x).exp()
        >>> round(float(torch.trapezoid(density, x)), 6)
        1.0
    """

    def _cont_bern_log_norm(self) -> Tensor:
        near, far, square = self._split(1e-3)
        return torch.where(near, math.log(2) + square / 12, (far / torch.tanh(far / 2)).log())

    @property
    def mean(self) -> Tensor:
        near, far, square = self._split(0.5)
        series = self.logits * (1 / 12 - square * (1 / 720 - square / 30240))
        return 0.5 + torch.where(near, series, 0.5 / torch.tanh(far / 2) - 1 / far)

    @property
    def variance(self) -> Tensor:
        near, far, square = self._split(0.5)
        series = 1 / 12 - square * (1 / 240 - square * (1 / 6048 - square / 172800))
        return torch.where(near, series, far.square().reciprocal() - torch.sinh(far / 2).square().reciprocal() / 4)

    def icdf(self, value: Tensor) -> Tensor:
        near, far, _ = self._split(1e-4)
        size, positive = far.abs(), far > 0
        found = torch.log1p(torch.where(positive, 1 - value, value) * torch.expm1(-size)) / size
        return torch.where(near, value, torch.where(positive, 1 + found, -found).clamp(0.0, 1.0))

    def _split(self, limit: float) -> tuple[Tensor, Tensor, Tensor]:
        """Which logits are near zero; the others, with one for those; and the squares of those, with zero for others.

        A gradient then never passes through a formula outside of its range.
        """
        near = self.logits.abs() < limit
        return near, torch.where(near, 1.0, self.logits), torch.where(near, self.logits, 0.0).square()
