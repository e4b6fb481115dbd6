"""The importance-weighted bound, and what it shares with other bounds of importance weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from deepprob.errors import unknown, whole
from deepprob.fitting.log_weights import LogWeights
from deepprob.fitting.particles import check_precision
from deepprob.fitting.path_gradients import check_reparameterized, path_loss
from deepprob.programs.run import Run


class WeightedBound:
    """A bound on the log evidence that is a function of the log importance weights of particles.

    Subclasses are frozen dataclasses with these fields and have a ``name``. The bound is that of the `IWAE`, unless
    they write `reduce`.
    """

    name: ClassVar[str]
    least: ClassVar[int] = 1  # particles
    by_scores: ClassVar[bool] = False  # whether every draw has the score-function gradient
    particles: int
    layers: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "particles", whole("particles", self.particles, least=self.least))
        check_precision(self.layers)

    @property
    def draws(self) -> int:
        """Number of draws from the guide per step."""
        return self.particles

    def reduce(self, weights: Tensor) -> Tensor:
        """The bound of every row, ``(R,)``, from log weights ``(K, R)``; leading axes after K are kept."""
        return log_mean(weights)

    def __call__(self, run: Run, *, kl_weight: float | Tensor = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimize and the terms of the bound, all per datum.

        Args:
            run: The program and its batch; the number of draws is that of the particles.
            kl_weight: Weight of ``log q - log p`` inside the weights in the loss (not in ``terms``).

        Returns:
            The loss, a scalar whose gradient is unbiased, and detached scalars: the bound, under the objective's name;
            ``elbo``, the mean of the log weights, with its parts ``likelihood``, ``kl_local``, ``kl_global``.

        Raises:
            ValueError: If the bound needs all rows but the batch is smaller, or the guide enumerates a site.
        """
        weights = LogWeights(replace(run, leaves=self.by_scores), self.draws, self.layers)
        bound = self.reduce(weights(kl_weight))
        loss = -(weights.norm * bound).sum()
        if (log_q := weights.score_log_q(every=self.by_scores)) is not None:
            loss = loss - self.scores(weights, bound, log_q, kl_weight)
        return loss, self.terms(weights)

    def scores(self, weights: LogWeights, bound: Tensor, log_q: Tensor, kl_weight: float | Tensor) -> Tensor:
        """A term with the value 0 and the score-function gradient of the bound."""
        found: Tensor = (weights.norm * self._signals(weights(kl_weight).detach(), bound.detach()) * log_q).sum()
        return found - found.detach()

    def terms(self, weights: LogWeights) -> dict[str, Tensor]:
        """The detached terms: the bound under the objective's name, the ELBO and its parts."""
        found = weights.averages()
        tight = (weights.norm * self.reduce(weights().detach())).sum()
        return {"elbo": found.pop("elbo"), self.name: tight, **found}

    def describe(self) -> dict[str, Any]:
        """The objective as JSON."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]

    def _signals(self, weights: Tensor, bound: Tensor) -> Tensor:
        """The contribution of each particle to the bound, ``(K, R)``."""
        count = len(weights)
        if count == 1:
            return bound.unsqueeze(0)
        same = torch.eye(count, dtype=torch.bool, device=weights.device).unsqueeze(2)  # (K, K, 1)
        mean = torch.where(same, 0.0, weights).sum(1) / (count - 1)  # (K, R), of the others' log weights
        without = self.reduce(torch.where(same, mean.unsqueeze(1), weights).transpose(0, 1))  # (K, R)
        return bound - torch.where(torch.isfinite(without), without, 0.0)


@dataclass(frozen=True)
class IWAE(WeightedBound):
    r"""The importance-weighted evidence lower bound, in nats per datum.

    .. math::
        \frac1N \log p(x_{1:N}) \ge \frac1N\, \mathbb E\, \frac NB \sum_{i \in \text{batch}}
        \log \frac1K \sum_{k=1}^K w_{ik}, \qquad
        w_{ik} = \frac{p(x_i, z_{ik})}{q(z_{ik} \mid x_i)}, \quad z_{ik} \sim q(z \mid x_i)

    with :math:`K` particles of the latents :math:`z_i` of a row. With one particle it is the ELBO; it grows with
    :math:`K` and reaches the log evidence in the limit.

    *Minibatches.* If all sites of model and guide are inside the data plate, every row has its own bound, scaled by
    ``N / B``. If a site is outside (global latents), or the guide is one distribution over all rows, there is one bound
    of all data. Its :math:`w_k` is a product over rows, and a minibatch does not estimate the logarithm of its mean,
    so a batch must hold all rows.

    *Gradients.* Reparameterized sites get the gradient of the logarithm. Other sites of the guide get the
    score-function gradient. Its baseline for a particle is the bound with the particle's weight replaced by the
    geometric mean of the others, which takes :math:`K^2` numbers per row.

    With ``gradient="dreg"``, the gradient in the guide's parameters :math:`\phi` is doubly reparameterized. Both
    gradients have the same expectation; that of the logarithm has a signal that vanishes against its noise as K grows.

    .. math::
        \nabla_\phi \, \mathbb E \log \frac1K \sum_k w_k =
        \mathbb E \sum_k \tilde w_k^2 \, \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial \phi},
        \qquad \tilde w_k = \frac{w_k}{\sum_j w_j}

    *Enumeration.* Discrete sites that the guide leaves out are summed out of the model exactly, inside the weights. A
    site that is enumerated in the guide is refused.

    *Warm-up.* ``kl_weight`` multiplies ``log q - log p`` of the latents inside the weights,
    :math:`\log w = \log p(x \mid z) - \beta (\log q(z \mid x) - \log p(z))`.

    Held-out scores, which choose the best epoch, are ELBOs for this objective too. `Posterior.log_evidence` is this
    bound for any rows.

    Args:
        particles: Draws from the guide per step, K, vectorized in a leading plate if the program broadcasts over it.
        layers: Precision in which linear and convolutional layers multiply, as in `ELBO`.
        gradient: ``"total"``, or ``"dreg"`` (``objective="dreg"``), which needs draws with a reparameterized gradient.

    References:
        Burda, Grosse, Salakhutdinov (2016), Importance Weighted Autoencoders.
        Mnih, Rezende (2016), Variational Inference for Monte Carlo Objectives.
        Tucker, Lawson, Gu, Maddison (2019), Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives.

    Examples:
        For a guide that is too wide, the bound grows with the particles, from the ELBO to the log evidence:

        >>> import pyro, pyro.distributions as dist
        >>> from deepprob.programs.program import Program
        >>> def model(y):
        ...     with pyro.plate("data", len(y)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> def guide(y):
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("z", dist.Normal(y / 2, 1.0))
        >>> _ = torch.manual_seed(0)
        >>> y = torch.zeros(4000)
        >>> run = Run(Program.of(model, guide, data_plate="data"), (y,), torch.arange(4000), 4000)
        >>> bounds = [float(IWAE(particles=k)(run)[1]["iwae"]) for k in (1, 4, 16, 64)]
        >>> evidence = float(dist.Normal(0.0, 2**0.5).log_prob(y[0]))
        >>> bounds == sorted(bounds), abs(bounds[-1] - evidence) < 0.01, evidence - bounds[0] > 0.1
        (True, True, True)
    """

    name: ClassVar[str] = "iwae"
    particles: int = 10
    layers: str = "float32"
    gradient: str = "total"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient not in ("total", "dreg"):
            raise unknown("gradient", self.gradient, ("total", "dreg"))

    def __call__(self, run: Run, *, kl_weight: float | Tensor = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimize and the terms; see `WeightedBound`."""
        if self.gradient == "total":
            return super().__call__(run, kl_weight=kl_weight)
        weights = LogWeights(replace(run, leaves=True), self.particles, self.layers)
        for guide_trace, _ in weights.pairs:
            check_reparameterized("dreg", guide_trace)
        logs = weights(kl_weight)
        shares = logs.detach().softmax(0)
        model = (weights.norm * shares * (logs + kl_weight * weights.log_q())).sum()
        draws = (weights.norm * shares.square() * logs).sum()
        value = (weights.norm * self.reduce(logs)).sum()
        return path_loss(value, model, draws, weights.drawn()), self.terms(weights)

    def describe(self) -> dict[str, Any]:
        """The objective as JSON."""
        return {**super().describe(), "name": "dreg" if self.gradient == "dreg" else self.name}


def log_mean(weights: Tensor) -> Tensor:
    """Logarithm of the mean over the first axis of numbers given by their logarithms."""
    return weights.logsumexp(0) - math.log(len(weights))
