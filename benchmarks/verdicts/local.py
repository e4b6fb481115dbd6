"""Local latents: numbers of rows under amortized guides and under joint guides."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

import deepprob as dp
from verdicts.registry import Fitted, good, wrong
from verdicts.truths import fit, linear_posterior, noise

ERROR = 0.6


def readings(count: int, seed: int, kind: int) -> Tensor:
    g = noise(seed, kind)
    return torch.randn(count, generator=g) + ERROR * torch.randn(count, generator=g)


def true_value(y: Tensor) -> None:
    """Every reading has a true value, which is standard normal."""
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, ERROR), obs=y)


def value_posterior(y: Tensor) -> tuple[Tensor, Tensor]:
    pull = 1 / (1 + ERROR**2)
    return pull * y, torch.full_like(y, pull**0.5 * ERROR)


@good("local", "closed form", "an amortized guide that is exact", rows=(4, 200, 2000))
def amortized(seed: int, rows: int) -> Fitted:
    def guide(y: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.1))
        offset = pyro.param("offset", torch.tensor(0.5))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(slope * y + offset, scale))

    y, fresh = readings(rows, seed, 70), readings(rows, seed, 71)
    optimizer = dp.Optimizer(learning_rate=0.01)
    posterior = fit(true_value, y, guide, plate="data", steps=2500, optimizer=optimizer, seed=seed)
    return Fitted(posterior, fresh, train=(y,), truth={"z": value_posterior(y)})


@good("local", "closed form", "the guide of every row is exact", rows=(300, 3000), width=(1, 1), shift=(0, 0))
@wrong("local", "closed form", "the guide of every row has width {width} and is {shift} sds off",
       rows=(300, 300, 60, 300), width=(0.1, 2, 5, 1), shift=(0, 0, 0, 1))  # fmt: skip
def amortized_widths(seed: int, rows: int, width: float, shift: float) -> Fitted:
    def guide(y: Tensor) -> None:
        idle = 0.0 * pyro.param("idle", torch.tensor(0.0))
        with pyro.plate("data", len(y)):
            mean, sd = value_posterior(y)
            pyro.sample("z", dist.Normal(mean + shift * sd + idle, width * sd))

    y, fresh = readings(rows, seed, 72), readings(rows, seed, 73)
    posterior = fit(true_value, y, guide, plate="data", steps=800, seed=seed)
    return Fitted(posterior, fresh, train=(y,), truth={"z": value_posterior(y)})


# -- joint guides over local latents --------------------------------------------------------------------------------


def shared_mean(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, ERROR), obs=y)


def wide_error(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 0.5))
        pyro.sample("y", dist.Normal(z, 2.0), obs=y)


def shared_mean_truth(y: Tensor, spread: float, error: float) -> dict[str, tuple[Tensor, Tensor]]:
    size = len(y) + 1
    prior = torch.full((size, size), 4.0, dtype=torch.float64)
    prior[1:, 1:] += spread**2 * torch.eye(size - 1, dtype=torch.float64)
    exact = linear_posterior(torch.eye(size)[1:], y, error, prior)
    return {"mu": exact[0], "z": exact[1:]}


@good("local", "closed form", "a joint guide over a mean and its {rows} rows", rows=(8, 25, 60),
      guide=("multivariate_normal", "multivariate_normal", "multivariate_normal"))  # fmt: skip
def joint_guide(seed: int, rows: int, guide: str) -> Fitted:
    y = 1 + readings(rows, seed, 74)
    posterior = fit(shared_mean, y, guide, steps=2500, seed=seed)
    return Fitted(posterior, y, train=(y,), truth=shared_mean_truth(y, 1.0, ERROR))


@wrong("local", "closed form", "mean field over a mean and {rows} rows that the data hardly inform", rows=(10, 40))
def mean_field_over_rows(seed: int, rows: int) -> Fitted:
    y = 1 + readings(rows, seed, 75)
    posterior = fit(wide_error, y, "normal", steps=2500, seed=seed)
    return Fitted(posterior, y, train=(y,), truth=shared_mean_truth(y, 0.5, 2.0))


@wrong("local", "closed form", "{steps} steps of a flow over a mean and {rows} rows are too few",
       rows=(12,), steps=(60,))  # fmt: skip
def joint_guide_stopped_early(seed: int, rows: int, steps: int) -> Fitted:
    y = 3 + readings(rows, seed, 76)
    posterior = fit(shared_mean, y, "flow", steps=steps, seed=seed)
    return Fitted(posterior, y, train=(y,), truth=shared_mean_truth(y, 1.0, ERROR))


# -- a code of several dimensions -----------------------------------------------------------------------------------


LOADINGS = torch.tensor([[1.0, 0.8], [0.9, 1.0], [1.1, 0.9], [0.2, -0.3]])


def factors(x: Tensor) -> None:
    """Factor analysis with known loadings, whose codes correlate given a row."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal((LOADINGS * z[..., None, :]).sum(-1), 0.5).to_event(1), obs=x)


def factor_rows(count: int, seed: int, kind: int) -> Tensor:
    g = noise(seed, kind)
    return torch.randn(count, 2, generator=g) @ LOADINGS.T + 0.5 * torch.randn(count, 4, generator=g)


@good("local", "closed form", "an encoder with a full covariance", full=(True,))
@wrong("local", "closed form", "an encoder of independent codes, although they correlate given a row", full=(False,))
def factor_codes(seed: int, full: bool) -> Fitted:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = nn.Linear(4, 2)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
        tilt = pyro.param("tilt", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            loc = encoder(x)
            if full:
                tril = torch.stack([scale[0], 0 * tilt, tilt, scale[1]]).reshape(2, 2)
                pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))
            else:
                pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    x, fresh = factor_rows(400, seed, 77), factor_rows(300, seed, 78)
    optimizer = dp.Optimizer(learning_rate=0.05, average=0.998)
    posterior = fit(factors, x, guide, plate="data", steps=2500, optimizer=optimizer, seed=seed, weights="keep")
    cov = torch.linalg.inv(torch.eye(2) + LOADINGS.T @ LOADINGS / 0.25)
    truth = {"z": (x @ LOADINGS @ cov / 0.25, cov.diagonal().sqrt().expand(len(x), 2))}
    return Fitted(posterior, fresh, train=(x,), truth=truth)


# -- a joint guide for rows of counts -------------------------------------------------------------------------------


@good("local", "reference draws", "independent rates of {rows} rows", rows=(15,))
def rates_of_rows(seed: int, rows: int) -> Fitted:
    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            rate = pyro.sample("rate", dist.LogNormal(1.0, 0.8))
            pyro.sample("y", dist.Poisson(rate), obs=y)

    with torch.random.fork_rng():
        torch.manual_seed(7900 + seed)
        y = dist.Poisson(dist.LogNormal(1.0, 0.8).sample((rows,))).sample()
    posterior = fit(model, y, "normal", steps=2500, seed=seed)
    grid = torch.linspace(-4.0, 5.0, 4001, dtype=torch.float64)
    joint = dist.Normal(1.0, 0.8).log_prob(grid) + dist.Poisson(grid.exp()).log_prob(y.double()[:, None])
    weights = torch.softmax(joint, 1)
    mean = (weights * grid).sum(1)
    sd = ((weights * grid**2).sum(1) - mean**2).sqrt()
    return Fitted(posterior, y, train=(y,), truth={"rate": (mean, sd)}, view=lambda d: {"rate": d["rate"].log()})
