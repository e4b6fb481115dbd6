"""Mixtures, posteriors with several modes, heavy tails."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import config_enumerate
from torch import Tensor

from verdicts.registry import Fitted, Truth, good, wrong
from verdicts.truths import density_posterior, fit, moments, noise, plain_normal, predictive_loss


def clusters(count: int, at: tuple[float, ...], seed: int, kind: int) -> Tensor:
    g = noise(seed, kind)
    return torch.tensor(at)[torch.randint(len(at), (count,), generator=g)] + torch.randn(count, generator=g)


def mixture(prior: tuple[float, float], spread: float) -> Callable[..., None]:
    @config_enumerate
    def model(y: Tensor) -> None:
        share = pyro.sample("share", dist.Dirichlet(torch.full((2,), 5.0)))
        with pyro.plate("parts", 2):
            loc = pyro.sample("loc", dist.Normal(torch.tensor(prior), spread))
        with pyro.plate("rows", len(y)):
            part = pyro.sample("part", dist.Categorical(share))
            pyro.sample("y", dist.Normal(loc[part], 1.0), obs=y)

    return model


def mixture_draws(y: Tensor, prior: tuple[float, float], spread: float) -> tuple[Tensor, Tensor]:
    """Means and first share of the mode near ``(-2, 2)``."""
    y = y.double()

    def joint(z: Tensor) -> Tensor:
        loc, logit = z[:, :2], z[:, 2]
        shares = torch.stack([torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)], 1)
        each = dist.Normal(loc[:, None], 1.0).log_prob(y[:, None]) + shares[:, None]
        before = dist.Normal(torch.tensor(prior).double(), spread).log_prob(loc).sum(1) + 5 * shares.sum(1)
        return torch.logsumexp(each, 2).sum(1) + before

    z = density_posterior(joint, torch.tensor([-2.0, 2.0, 0.0]))
    return z[:, :2], torch.sigmoid(z[:, 2])


@good("mixture", "reference draws", "two parts that the prior tells apart", rows=(80, 400))
def two_parts(seed: int, rows: int) -> Fitted:
    prior, y = (-2.0, 2.0), clusters(rows, (-2.0, 2.0), seed, 130)
    posterior = fit(mixture(prior, 1.0), y, "multivariate_normal", steps=2000, seed=seed)
    loc, share = mixture_draws(y, prior, 1.0)
    truth = {"loc": moments(loc), "share": moments(torch.stack([share, 1 - share], 1))}
    fresh = clusters(rows, (-2.0, 2.0), seed, 131)
    return Fitted(posterior, fresh, train=(y,), truth=truth)


@wrong("mixture", "reference draws", "the parts can change places: the guide holds one of two equal modes",
       rows=(60, 200), gap=(2.0, 1.5))  # fmt: skip
def label_switching(seed: int, rows: int, gap: float) -> Fitted:
    prior, y = (0.0, 0.0), clusters(rows, (-gap, gap), seed, 132)
    posterior = fit(mixture(prior, 3.0), y, "normal", steps=1500, seed=seed)
    loc, _ = mixture_draws(y, prior, 3.0)
    both = torch.cat([loc, loc.flip(1)])
    return Fitted(posterior, clusters(rows, (-gap, gap), seed, 133), train=(y,), truth={"loc": moments(both)})


@wrong("mixture", "constructed", "two parts for rows of three", rows=(300,))
def too_few_parts(seed: int, rows: int) -> Fitted:
    at = (-5.0, 0.0, 5.0)
    y, fresh = clusters(rows, at, seed, 134), clusters(rows, at, seed, 135)
    posterior = fit(mixture((-2.0, 2.0), 3.0), y, "normal", steps=1500, seed=seed)
    true = dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), dist.Normal(torch.tensor(at), 1.0)).log_prob(fresh)
    return Fitted(
        posterior, fresh, train=(y,), nats=lambda: predictive_loss(posterior, (fresh,), true, plain_normal(y, fresh))
    )


# -- one number, labelled by a grid ---------------------------------------------------------------------------------


def grid_truth(name: str, log_joint: Callable[[Tensor], Tensor], low: float, high: float) -> Truth:
    at = torch.linspace(low, high, 40_001, dtype=torch.float64)
    weights = torch.softmax(log_joint(at), 0)
    mean = (weights * at).sum()
    return {name: (mean, ((weights * (at - mean) ** 2).sum()).sqrt())}


@wrong("mixture", "closed form", "the data show the square: the guide holds one of two signs", rows=(5, 40),
       guide=("normal", "flow"))  # fmt: skip
def lost_sign(seed: int, rows: int, guide: str) -> Fitted:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z**2, 1.0), obs=y)

    y = 4 + torch.randn(rows, generator=noise(seed, 136))
    posterior = fit(model, y, guide, steps=1500, seed=seed)

    def joint(z: Tensor) -> Tensor:
        return dist.Normal(0.0, 2.0).log_prob(z) + dist.Normal(z[:, None] ** 2, 1.0).log_prob(y.double()).sum(1)

    return Fitted(posterior, y, train=(y,), truth=grid_truth("z", joint, -6.0, 6.0))


def cauchy_location(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Cauchy(mu, 0.5), obs=y)


@wrong("mixture", "closed form", "the guide starts at the smaller of two heaps and stays", rows=(10, 20))
def wrong_mode(seed: int, rows: int) -> Fitted:
    def guide(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(-6.0))
        scale = pyro.param("scale", torch.tensor(0.3), constraint=constraints.positive)
        pyro.sample("mu", dist.Normal(loc, scale))

    few = rows * 3 // 10
    y = 0.5 * torch.randn(rows, generator=noise(seed, 137)) + torch.cat(
        [torch.full((few,), -6.0), torch.full((rows - few,), 6.0)]
    )
    posterior = fit(cauchy_location, y, guide, steps=1500, seed=seed)

    def joint(mu: Tensor) -> Tensor:
        return dist.Normal(0.0, 10.0).log_prob(mu) + dist.Cauchy(mu[:, None], 0.5).log_prob(y.double()).sum(1)

    return Fitted(posterior, y, train=(y,), truth=grid_truth("mu", joint, -40.0, 40.0))


@wrong("tails", "closed form", "a normal guide for a posterior with {freedom} degrees of freedom", freedom=(2.2, 2.5))
def heavy_tail(seed: int, freedom: float) -> Fitted:
    """Readings that say almost nothing about a location with a Student prior."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.StudentT(freedom, 0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 300.0), obs=y)

    y = torch.randn(2, generator=noise(seed, 138))
    posterior = fit(model, y, "normal", steps=2000, seed=seed)
    prior = dist.StudentT(torch.tensor(freedom).double(), 0.0, 1.0)

    def joint(mu: Tensor) -> Tensor:
        return prior.log_prob(mu) + dist.Normal(mu[:, None], 300.0).log_prob(y.double()).sum(1)

    return Fitted(posterior, y, train=(y,), truth=grid_truth("mu", joint, -2000.0, 2000.0))


@good("tails", "closed form", "the scale of {rows} rows, log-normal in the posterior", rows=(12, 40))
def scale_of_rows(seed: int, rows: int) -> Fitted:
    def model(y: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.HalfCauchy(2.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(0.0, sigma), obs=y)

    y = torch.randn(rows, generator=noise(seed, 139))
    posterior = fit(model, y, "normal", steps=2000, seed=seed)

    def joint(log_sigma: Tensor) -> Tensor:
        sigma = log_sigma.exp()
        return log_sigma - torch.log1p((sigma / 2) ** 2) + dist.Normal(0.0, sigma[:, None]).log_prob(y.double()).sum(1)

    truth = grid_truth("log_sigma", joint, -6.0, 6.0)
    return Fitted(posterior, y, train=(y,), truth=truth, view=lambda draws: {"log_sigma": draws["sigma"].log()})
