"""A normal distribution whose draws share their noise along a dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor


class CommonNormal(dist.Normal):
    r"""A normal distribution whose draws have the same noise along one batch dimension.

    .. math:: z_{kb} = \mu_{kb} + \sigma_{kb} \, \epsilon_b, \qquad \epsilon_b \sim N(0, 1)

    Each draw has the density of a normal distribution. Draws along the dimension depend on each other: it is for the
    values of a site that is summed out, of which a bound takes a weighted average. The differences between them, which
    are the gradient of the weights, have then little noise.

    Attributes:
        along: The dimension of ``batch_shape`` that shares the noise, counted from the right; 0 for none.

    Examples:
        >>> fn = CommonNormal(torch.tensor([[0.0], [5.0]]).expand(2, 3), 1.0)
        >>> fn.along = -2
        >>> z = fn.rsample()
        >>> torch.allclose(z[1] - z[0], torch.full((3,), 5.0))
        True
    """

    along = 0

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> CommonNormal:
        """The same distribution with another batch shape."""
        new: CommonNormal = super().expand(batch_shape, _instance)  # type: ignore[no-untyped-call]
        new.along = self.along
        return new

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draws with a reparameterized gradient."""
        shape = list(self._extended_shape(torch.Size(sample_shape)))
        if self.along:
            shape[self.along] = 1
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        value: Tensor = self.loc + self.scale * noise
        return value
