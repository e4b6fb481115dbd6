"""A logistic distribution in bins: values that were rounded to a number of levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid


class DiscretizedLogistic(TorchDistribution):
    r"""Distribution of a value in [0, 1] that was rounded to one of L levels.

    .. math:: P(x) = \sigma\Big(\frac{(k + 1) / L - \mu}{s}\Big) - \sigma\Big(\frac{k / L - \mu}{s}\Big), \qquad
              k = \min(\lfloor L x \rfloor, L - 1)

    The first and the last bin take the tails, so that the masses of the L bins add up to 1. Pixels of 256 levels may be
    ``v / 255`` or ``(v + 0.5) / 256``: both fall into bin ``v``. Draws are the centres of bins.

    Args:
        loc: Location :math:`\mu`, on the scale of the values.
        scale: Scale :math:`s` of the logistic distribution.
        levels: Number of levels, L.

    References:
        Kingma, Salimans, Jozefowicz et al. (2016), Improving Variational Inference with Inverse Autoregressive Flow.
        Salimans, Karpathy, Chen, Kingma (2017), PixelCNN++.

    Examples:
        The masses of all levels add up to 1:

        >>> d = DiscretizedLogistic(torch.tensor(0.9), torch.tensor(0.1), levels=256)
        >>> round(float(d.log_prob(torch.arange(256) / 255).exp().sum()), 5)
        1.0
    """

    arg_constraints: dict[str, Any] = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    support = constraints.unit_interval

    def __init__(self, loc: Tensor, scale: Tensor, levels: int = 256, validate_args: bool | None = None) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> DiscretizedLogistic:
        new: DiscretizedLogistic = self._get_checked_instance(DiscretizedLogistic, _instance)  # type: ignore[no-untyped-call]
        new.loc, new.scale, new.levels = self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.levels
        TorchDistribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        bin_ = self._bin(value)
        low = (bin_ / self.levels - self.loc) / self.scale
        high = ((bin_ + 1) / self.levels - self.loc) / self.scale
        # sigmoid(high) - sigmoid(low), as logarithms of three factors, of which a tail has one.
        width = torch.log(-torch.expm1(-1 / (self.levels * self.scale)))
        below, above = logsigmoid(high), logsigmoid(-low)
        inner = below + above + width
        found: Tensor = torch.where(bin_ == 0, below, torch.where(bin_ == self.levels - 1, above, inner))
        return found

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        uniform = torch.rand(torch.Size(sample_shape) + self.batch_shape, dtype=self.loc.dtype, device=self.loc.device)
        drawn = self.loc + self.scale * torch.special.logit(uniform, eps=torch.finfo(self.loc.dtype).tiny)
        return (self._bin(drawn) + 0.5) / self.levels

    @property
    def mean(self) -> Tensor:
        return (self._moments()[0] + 0.5) / self.levels

    @property
    def variance(self) -> Tensor:
        first, second = self._moments()
        return (second - first.square()).clamp_min(0.0) / self.levels**2

    def _moments(self) -> tuple[Tensor, Tensor]:
        """First and second moment of the bin's number, by its survival function: E[k] = sum of P(k >= j) over j."""
        first, second = torch.zeros_like(self.loc), torch.zeros_like(self.loc)
        for j in range(1, self.levels):
            beyond = torch.sigmoid((self.loc - j / self.levels) / self.scale)
            first, second = first + beyond, second + (2 * j - 1) * beyond
        return first, second

    def _bin(self, value: Tensor) -> Tensor:
        return (value * self.levels).floor().clamp(0, self.levels - 1)
