"""A mixture whose components are rows of parameters of one family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor


class Mixture(TorchDistribution):
    r"""Distribution that chooses a component, and draws from it.

    .. math:: p(z) = \sum_{k=1}^K \pi_k \, F(z; \theta_k), \qquad \pi = \mathrm{softmax}(l)

    A draw evaluates the chosen component alone, so its cost does not grow with the number of components. Draws have no
    gradient; log-probabilities have.

    Args:
        logits: Log-weights :math:`l`, shape ``(K,)``.
        parameters: Parameters of the components, :math:`\theta`, shape ``(K, P)``.
        make: Makes the distribution :math:`F` from parameters ``(*batch, P)``; it has batch shape ``batch``.

    Examples:
        Two components with equal weights:

        >>> fn = Mixture(torch.zeros(2), torch.tensor([[-3.0], [3.0]]), lambda loc: dist.Normal(loc, 1.0).to_event(1))
        >>> fn.mean, fn.variance
        (tensor([0.]), tensor([10.]))
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = False

    def __init__(self, logits: Tensor, parameters: Tensor, make: Callable[[Tensor], Any]) -> None:
        self.logits, self.parameters, self.make = logits, parameters, make
        super().__init__(torch.Size(), self.components.event_shape, validate_args=False)

    @classmethod
    def example(cls) -> Mixture:
        """Three normals of two numbers."""
        loc, scale = (
            torch.tensor([[-2.0, 0.0], [1.0, 1.0], [0.0, -2.0]]),
            torch.tensor([[1.0, 0.5], [0.7, 1.0], [1, 1]]),
        )
        return cls(torch.tensor([0.0, 0.5, -0.5]), torch.cat([loc, scale], 1), _normal)

    @property
    def components(self) -> Any:
        """The distributions of all components, batch shape ``(K,)``."""
        return self.make(self.parameters)

    @property
    def probs(self) -> Tensor:
        """The weights of the components, ``(K,)``."""
        return self.logits.softmax(-1)

    @property
    def support(self) -> Any:
        return self.components.support

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Mixture:
        new: Mixture = self._get_checked_instance(Mixture, _instance)  # type: ignore[no-untyped-call]
        new.logits, new.parameters, new.make = self.logits, self.parameters, self.make
        TorchDistribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        by_component = self.components.log_prob(value.unsqueeze(-1 - len(self.event_shape)))  # (*batch, K)
        found: Tensor = (self.logits.log_softmax(-1) + by_component).logsumexp(-1)
        return found.expand(torch.broadcast_shapes(found.shape, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        chosen = dist.Categorical(logits=self.logits).sample(torch.Size(sample_shape) + self.batch_shape)
        drawn: Tensor = self.make(self.parameters[chosen]).sample()
        return drawn

    @property
    def mean(self) -> Tensor:
        return self._average(self.components.mean)

    @property
    def variance(self) -> Tensor:
        parts = self.components
        centre = self._average(parts.mean)
        return self._average(parts.variance + (parts.mean - centre).square())

    def _average(self, value: Tensor) -> Tensor:
        """The weighted average over components, in the shape of the batch."""
        found: Tensor = torch.tensordot(self.probs, value, dims=1)
        return found.expand(self.batch_shape + self.event_shape)


def _normal(parameters: Tensor) -> Any:
    loc, scale = parameters.chunk(2, -1)
    return dist.Normal(loc, scale, validate_args=False).to_event(1)
