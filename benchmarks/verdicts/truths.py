"""Exact posteriors, and what cases share: closed forms, importance sampling, guides around known values, fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import deepprob as dp
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from verdicts.registry import Nats

ESS = 0.2  # the least effective share of the draws behind a reference


def noise(seed: int, kind: int = 0) -> torch.Generator:
    """A generator for the data of a case; ``kind`` keeps generators of cases apart."""
    return torch.Generator().manual_seed(1000 * kind + seed)


def fit(model: Any, data: Any, guide: Any = None, *, plate: str | None = None, **options: Any) -> Posterior:
    """``svi`` on one thread without a compiler; a model in Pyro becomes a program."""
    program = model if isinstance(model, dp.Program) else dp.Program.of(model, guide, data_plate=plate)
    if isinstance(model, dp.Program) and guide is not None:
        options["guide"] = guide
    return svi(program, data, compile=False, progress=False, **options)


@dataclass(frozen=True)
class Gaussian:
    """A normal posterior.

    Attributes:
        mean: ``(D,)``.
        cov: ``(D, D)``.
    """

    mean: Tensor
    cov: Tensor

    @property
    def sd(self) -> Tensor:
        return self.cov.diagonal().sqrt()

    @property
    def tril(self) -> Tensor:
        return torch.linalg.cholesky(self.cov).float()

    def __getitem__(self, part: slice | int) -> tuple[Tensor, Tensor]:
        return self.mean[part], self.sd[part]


def linear_posterior(x: Tensor, y: Tensor, sd: Any = 1.0, prior: Any = 1.0) -> Gaussian:
    """The posterior of ``w ~ N(0, prior^2)``, ``y ~ N(x w, sd^2)``; ``prior`` is an sd or a covariance matrix."""
    x, y = x.double() / sd, y.double() / sd
    prior = torch.as_tensor(prior, dtype=torch.float64)
    before = torch.linalg.inv(prior) if prior.dim() == 2 else torch.eye(x.shape[1], dtype=torch.float64) / prior**2
    cov = torch.linalg.inv(x.T @ x + before)
    return Gaussian(cov @ x.T @ y, (cov + cov.T) / 2)


def density_posterior(
    log_joint: Callable[[Tensor], Tensor], start: Tensor, draws: int = 8000, least: float = ESS
) -> Tensor:
    """Draws of a posterior with one mode: importance sampling from a Student t at the mode, resampled.

    Args:
        log_joint: From points ``(S, D)`` of unbounded coordinates to log-densities ``(S,)``.
        start: Where the search for the mode begins, ``(D,)``.
        draws: Number of importance samples.
        least: The least effective share of them.

    Raises:
        RuntimeError: If the importance weights are too uneven to be a reference.
    """
    at = start.double().clone().requires_grad_()
    search = torch.optim.LBFGS([at], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def loss() -> Tensor:
        search.zero_grad()
        value = -log_joint(at[None])[0]
        value.backward()
        return value

    search.step(loss)
    mode = at.detach()
    curvature = torch.autograd.functional.hessian(lambda z: -log_joint(z[None])[0], mode)
    tril = torch.linalg.cholesky(torch.linalg.inv(curvature) * 1.1)
    proposal = dist.MultivariateStudentT(torch.tensor(8.0, dtype=torch.float64), mode, tril)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        points = proposal.sample((draws,))
        with torch.no_grad():
            joint = torch.cat([log_joint(part) for part in points.split(500)])
        weights = torch.softmax(joint - proposal.log_prob(points), 0)
        effective = float(1 / (weights**2).sum()) / draws
        if effective < least:
            raise RuntimeError(f"a reference must have {least:.0%} effective draws; got {effective:.1%}.")
        return points[torch.multinomial(weights, draws, replacement=True)]


def moments(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sd over the first axis."""
    return draws.double().mean(0), draws.double().std(0)


def around(**sites: Callable[[], Any]) -> Callable[..., None]:
    """A guide with known normals by site; its only parameter has no effect, so that a fit leaves it as it is."""

    def guide(*args: Any, **kwargs: Any) -> None:
        idle = 0.0 * pyro.param("idle", torch.tensor(0.0))
        for name, make in sites.items():
            pyro.sample(name, moved(make(), idle))

    return guide


def moved(fn: Any, by: Tensor) -> Any:
    """A normal or log-normal distribution at another location."""
    if isinstance(fn, dist.Independent):
        return dist.Independent(moved(fn.base_dist, by), fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MultivariateNormal):
        return dist.MultivariateNormal(fn.loc + by, scale_tril=fn.scale_tril)
    return type(fn)(fn.loc + by, fn.scale)


def gaussian_guide(name: str, exact: Gaussian, width: float = 1.0, shift: float = 0.0) -> Callable[..., None]:
    """A guide of one site around its exact posterior: ``width`` times as wide, ``shift`` sds off in every number."""
    mean, tril = (exact.mean + shift * exact.sd).float(), width * exact.tril
    return around(**{name: lambda: dist.MultivariateNormal(mean, scale_tril=tril)})


def predictive_loss(posterior: Posterior, data: tuple[Any, ...], true: Tensor, baseline: Tensor) -> Nats:
    """Nats per row by which held-out rows are less likely than under the process that made them.

    Args:
        posterior: The posterior.
        data: Held-out data.
        true: Log-density of every row under the true process.
        baseline: The same under a distribution that ignores the inputs.
    """
    found = posterior.log_likelihood(*data, draws=500, seed=3)
    own = torch.logsumexp(found.double(), 0) - math.log(len(found))
    return Nats(float((true.double() - own).mean()), float((true.double() - baseline.double()).mean()))


def plain_normal(y: Tensor, at: Tensor) -> Tensor:
    """Log-densities of rows under a normal with mean and sd of the training targets."""
    return dist.Normal(y.mean(0), y.std(0)).log_prob(at)
