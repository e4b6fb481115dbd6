"""Objectives of importance weights beside the IWAE: MIWAE, Rényi, VIMCO and reweighted wake-sleep."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from deepprob.errors import whole
from deepprob.fitting.importance_weighted import WeightedBound, log_mean
from deepprob.fitting.log_weights import LogWeights
from deepprob.programs.run import Run


@dataclass(frozen=True)
class MIWAE(WeightedBound):
    r"""The multiply importance-weighted bound: the mean of several IWAE bounds.

    .. math:: \frac1M \sum_{m=1}^M \log \frac1K \sum_{k=1}^K w_{mk}

    It has the expectation of an `IWAE` bound of K particles, and its gradient has the noise of M of them. A large K
    tightens the bound, but drowns the gradient of the guide in noise; a large M averages the noise.

    Minibatches, gradients, enumeration and warm-up are those of `IWAE`.

    Args:
        particles: Number of particles of one bound, K.
        groups: Number of bounds, M.
        layers: Precision in which linear and convolutional layers multiply, as in `ELBO`.

    References:
        Rainforth, Kosiorek, Le, Maddison, Igl, Wood, Teh (2018), Tighter Variational Bounds are Not Necessarily Better.

    Examples:
        One group is the IWAE bound; groups of one particle give the ELBO:

        >>> import torch
        >>> weights = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> iwae, elbo = MIWAE(particles=4, groups=1), MIWAE(particles=1, groups=4)
        >>> bool(iwae.reduce(weights) == log_mean(weights)), bool(elbo.reduce(weights) == weights.mean(0))
        (True, True)
    """

    name: ClassVar[str] = "miwae"
    particles: int = 8
    groups: int = 8
    layers: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "groups", whole("groups", self.groups))

    @property
    def draws(self) -> int:
        """Number of draws from the guide per step."""
        return self.particles * self.groups

    def reduce(self, weights: Tensor) -> Tensor:
        """The mean over groups of the logarithm of the mean weight."""
        return log_mean(weights.unflatten(0, (self.particles, self.groups))).mean(0)


@dataclass(frozen=True)
class Renyi(WeightedBound):
    r"""The variational Rényi bound of order alpha.

    .. math:: \frac{1}{1 - \alpha} \log \frac1K \sum_{k=1}^K w_k^{1 - \alpha}

    The limit alpha = 1 is the ELBO and alpha = 0 is the `IWAE` bound; in between, the bound is looser than the IWAE's
    and covers more of the posterior than the ELBO. It is a bound of every row, whatever the batch. With alpha below 0
    the limit for many particles is an upper bound on the log evidence.

    Minibatches, gradients, enumeration and warm-up are those of `IWAE`.

    Args:
        alpha: The order; not 1.
        particles: Number of particles, K.
        layers: Precision in which linear and convolutional layers multiply, as in `ELBO`.

    Raises:
        ValueError: If alpha is 1 or not finite.

    References:
        Li, Turner (2016), Rényi Divergence Variational Inference.

    Examples:
        The bound falls with alpha, from the IWAE bound towards the ELBO:

        >>> import torch
        >>> weights = torch.tensor([[0.0], [1.0], [2.0]])
        >>> bounds = [float(Renyi(alpha).reduce(weights)) for alpha in (0.0, 0.5, 0.999)]
        >>> bounds == sorted(bounds, reverse=True), round(bounds[0] - float(log_mean(weights)), 4), round(bounds[2], 2)
        (True, 0.0, 1.0)
    """

    name: ClassVar[str] = "renyi"
    alpha: float = 0.5
    particles: int = 10
    layers: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.alpha):
            raise ValueError(f"Renyi's alpha must be a finite number; got {self.alpha}.")
        if self.alpha == 1:
            raise ValueError("Renyi's alpha must not be 1, where the bound is the ELBO. Use objective='elbo'.")

    def reduce(self, weights: Tensor) -> Tensor:
        """The logarithm of the power mean of the weights."""
        return log_mean((1.0 - self.alpha) * weights) / (1.0 - self.alpha)


@dataclass(frozen=True)
class VIMCO(WeightedBound):
    r"""The IWAE bound with score-function gradients of all draws.

    .. math::
        \nabla_\phi \, \mathbb E L \approx \sum_k (L - L_{-k}) \, \nabla_\phi \log q(z_k \mid x)
        + \nabla_\phi L, \qquad L = \log \frac1K \sum_k w_k

    where :math:`L_{-k}` is the bound with the weight of particle k replaced by the geometric mean of the others. It
    needs no derivative of the model in the draws. `IWAE` uses this gradient for draws that have no reparameterized
    one, such as discrete ones; for the others that of the path has less noise.

    Args:
        particles: Number of particles, K, at least 2.
        layers: Precision in which linear and convolutional layers multiply, as in `ELBO`.

    References:
        Mnih, Rezende (2016), Variational Inference for Monte Carlo Objectives.

    Examples:
        >>> import torch
        >>> VIMCO(particles=2).reduce(torch.zeros(2, 3))
        tensor([0., 0., 0.])
    """

    name: ClassVar[str] = "vimco"
    least: ClassVar[int] = 2
    by_scores: ClassVar[bool] = True
    particles: int = 10
    layers: str = "float32"


@dataclass(frozen=True)
class WakeSleep(WeightedBound):
    r"""Reweighted wake-sleep: the model climbs the IWAE bound, the guide learns from weighted draws.

    .. math::
        \nabla_\theta \sum_k \tilde w_k \log p_\theta(x, z_k), \qquad
        \nabla_\phi \sum_k \tilde w_k \log q_\phi(z_k \mid x), \qquad \tilde w_k = \frac{w_k}{\sum_j w_j}

    The gradient of the guide is that of :math:`-\mathrm{KL}(p(z \mid x) \,\|\, q(z \mid x))`, estimated with
    normalized weights, and no draw is differentiated: discrete sites need no other estimator. Both gradients are biased
    for few particles. There is no sleep phase.

    Args:
        particles: Number of particles, K, at least 2.
        layers: Precision in which linear and convolutional layers multiply, as in `ELBO`.

    References:
        Bornschein, Bengio (2015), Reweighted Wake-Sleep.
        Le, Kosiorek, Siddharth, Teh, Wood (2019), Revisiting Reweighted Wake-Sleep.

    Examples:
        >>> import torch
        >>> WakeSleep(particles=2).reduce(torch.zeros(2, 3))
        tensor([0., 0., 0.])
    """

    name: ClassVar[str] = "wake_sleep"
    least: ClassVar[int] = 2
    particles: int = 10
    layers: str = "float32"

    def __call__(self, run: Run, *, kl_weight: float | Tensor = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimize and the terms; see `WeightedBound`."""
        weights = LogWeights(replace(run, leaves=True), self.particles, self.layers)
        logs = weights(kl_weight)
        shares = logs.detach().softmax(0)
        log_q = weights.log_q()
        both = (weights.norm * shares * (logs + (kl_weight + 1.0) * log_q)).sum()  # log p(x, z) + log q(z | x)
        value = (weights.norm * self.reduce(logs)).sum()
        return -(value.detach() + both - both.detach()), self.terms(weights)
