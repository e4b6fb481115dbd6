"""Classifiers of logistic kind and counts, labelled by reference draws."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

import deepprob as dp
from verdicts.registry import Fitted, good, wrong
from verdicts.truths import Gaussian, density_posterior, fit, gaussian_guide, moments, noise, predictive_loss

Rows = tuple[Tensor, Tensor]


def reference(x: Tensor, log_prob: Callable[[Tensor], Tensor], columns: int | None = None) -> Tensor:
    """Draws of coefficients with standard normal priors; ``log_prob`` takes linear predictors ``(S, N)``."""
    x = x.double()

    def joint(w: Tensor) -> Tensor:
        return log_prob(w @ x.T).sum(1) + dist.Normal(0.0, 1.0).log_prob(w).sum(1)

    return density_posterior(joint, torch.zeros(columns or x.shape[1]))


def as_gaussian(draws: Tensor) -> Gaussian:
    return Gaussian(draws.mean(0), torch.cov(draws.T))


# -- two classes ----------------------------------------------------------------------------------------------------


def logistic(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(x * w).sum(-1)), obs=y)


def patients(count: int, columns: int, seed: int, kind: int, slope: float = 1.0) -> Rows:
    g = noise(seed, kind)
    x = torch.randn(count, columns, generator=g)
    return x, (torch.rand(count, generator=g) < torch.sigmoid(slope * x.sum(1))).float()


def logistic_draws(x: Tensor, y: Tensor) -> Tensor:
    return reference(x, lambda out: dist.Bernoulli(logits=out).log_prob(y.double()))


@good("classifier", "reference draws", "a converged logistic regression", rows=(60, 400, 2000))
def logistic_regression(seed: int, rows: int) -> Fitted:
    train, fresh = patients(rows, 2, seed, 40), patients(rows, 2, seed, 41)
    posterior = fit(logistic, train, "multivariate_normal", plate="data", steps=2000, batch_size=None, seed=seed)
    return Fitted(posterior, fresh, train=train, truth={"w": moments(logistic_draws(*train))})


@good("classifier", "reference draws", "the normal nearest to the posterior", rows=(150, 1000), width=(1, 1))
@wrong("classifier", "reference draws", "guide of a logistic regression, width times {width}",
       rows=(150, 150, 1000, 1000), width=(0.1, 5, 0.5, 2))  # fmt: skip
def logistic_widths(seed: int, rows: int, width: float) -> Fitted:
    train, fresh = patients(rows, 3, seed, 42), patients(rows, 3, seed, 43)
    exact = as_gaussian(logistic_draws(*train))
    posterior = fit(logistic, train, gaussian_guide("w", exact, width), plate="data", steps=800, seed=seed)
    return Fitted(posterior, fresh, train=train, truth={"w": exact[:]})


def slow_guide(x: Tensor, y: Tensor | None = None) -> None:
    loc = pyro.param("loc", torch.zeros(x.shape[-1]))
    scale = pyro.param("scale", torch.ones(x.shape[-1]), constraint=constraints.positive)
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))


@wrong("classifier", "reference draws", "{steps} steps at learning rate {rate} are too few",
       rate=(1e-4, 3e-3), steps=(1500, 150))  # fmt: skip
def classifier_stopped_early(seed: int, rate: float, steps: int) -> Fitted:
    train, fresh = patients(500, 3, seed, 44), patients(300, 3, seed, 45)
    optimizer = dp.Optimizer(learning_rate=rate)
    posterior = fit(logistic, train, slow_guide, plate="data", steps=steps, optimizer=optimizer, seed=seed)
    return Fitted(posterior, fresh, train=train, truth={"w": moments(logistic_draws(*train))})


@wrong("classifier", "constructed", "a point estimate of 25 coefficients from {rows} rows is over-confident",
       rows=(30, 50))  # fmt: skip
def point_estimate(seed: int, rows: int) -> Fitted:
    def wide(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 10.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=(x * w).sum(-1)), obs=y)

    train, fresh = patients(rows, 25, seed, 46, 0.3), patients(300, 25, seed, 47, 0.3)
    posterior = fit(wide, train, "map", plate="data", steps=1500, seed=seed)
    true = dist.Bernoulli(logits=0.3 * fresh[0].sum(1)).log_prob(fresh[1])
    even = torch.full_like(true, 0.5).log()
    return Fitted(posterior, fresh, train=train, nats=lambda: predictive_loss(posterior, fresh, true, even))


# -- three classes --------------------------------------------------------------------------------------------------


def softmax(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        logits = (x[..., None, :] * w).sum(-1) if w.dim() == 2 else (x[:, None, :] * w).sum(-1)
        pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def species(count: int, seed: int, kind: int) -> Rows:
    g = noise(seed, kind)
    x = torch.randn(count, 2, generator=g)
    probs = torch.softmax(x @ torch.tensor([[1.5, 0.0, -1.5], [0.0, 1.0, -1.0]]), -1)
    return x, torch.multinomial(probs, 1, generator=g)[:, 0]


def softmax_draws(x: Tensor, y: Tensor) -> Tensor:
    x = x.double()

    def joint(z: Tensor) -> Tensor:
        logits = torch.einsum("nd,skd->snk", x, z.reshape(-1, 3, 2))
        fits = torch.log_softmax(logits, -1)[:, torch.arange(len(y)), y].sum(1)
        return fits + dist.Normal(0.0, 1.0).log_prob(z).sum(1)

    return density_posterior(joint, torch.zeros(6)).reshape(-1, 3, 2)


@good("classifier", "reference draws", "a full covariance for three classes", rows=(100, 600),
      guide=("multivariate_normal", "multivariate_normal"))  # fmt: skip
@wrong("classifier", "reference draws", "mean field, although the classes' coefficients correlate",
       rows=(600, 2000), guide=("normal", "normal"))  # fmt: skip
def three_classes(seed: int, rows: int, guide: str) -> Fitted:
    train, fresh = species(rows, seed, 48), species(rows, seed, 49)
    posterior = fit(softmax, train, guide, steps=2000, seed=seed)
    return Fitted(posterior, fresh, train=train, truth={"w": moments(softmax_draws(*train))})


# -- counts ---------------------------------------------------------------------------------------------------------


def poisson(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson((x * w).sum(-1).exp()), obs=y)


def visits(count: int, seed: int, kind: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """Inputs with an intercept, and the mean number of visits."""
    g = noise(seed, kind)
    x = torch.cat([torch.ones(count, 1), 0.7 * torch.randn(count, 1, generator=g)], 1)
    return x, (x @ torch.tensor([1.0, 0.5])).exp(), g


def visited(count: int, seed: int, kind: int) -> Rows:
    x, mean, g = visits(count, seed, kind)
    return x, torch.poisson(mean, generator=g)


def poisson_draws(x: Tensor, y: Tensor) -> Tensor:
    return reference(x, lambda out: dist.Poisson(out.exp()).log_prob(y.double()))


@good("counts", "reference draws", "a converged Poisson regression", rows=(40, 300, 2000))
def poisson_regression(seed: int, rows: int) -> Fitted:
    train, fresh = visited(rows, seed, 50), visited(rows, seed, 51)
    posterior = fit(poisson, train, "multivariate_normal", plate="data", steps=2000, batch_size=None, seed=seed)
    return Fitted(posterior, fresh, train=train, truth={"w": moments(poisson_draws(*train))})


@wrong("counts", "reference draws", "guide of a Poisson regression, width {width}, {shift} sds off",
       width=(0.5, 2, 1), shift=(0, 0, 1.5))  # fmt: skip
def poisson_widths(seed: int, width: float, shift: float) -> Fitted:
    train, fresh = visited(200, seed, 52), visited(200, seed, 53)
    exact = as_gaussian(poisson_draws(*train))
    posterior = fit(poisson, train, gaussian_guide("w", exact, width, shift), plate="data", steps=800, seed=seed)
    return Fitted(posterior, fresh, train=train, truth={"w": exact[:]})


@wrong("counts", "constructed", "Poisson counts for data that are {kind}",
       kind=("overdispersed", "strongly overdispersed", "underdispersed", "zero-inflated"))  # fmt: skip
def poisson_for_other_counts(seed: int, kind: str) -> Fitted:
    def law(mean: Tensor) -> dist.Distribution:
        if kind == "underdispersed":
            return dist.Binomial(total_count=20, probs=(mean / 20).clamp(max=0.95))
        if kind == "zero-inflated":
            return dist.ZeroInflatedPoisson(mean, gate=torch.tensor(0.35))
        total = 3.0 if kind == "overdispersed" else 1.0
        return dist.GammaPoisson(total, total / mean)

    def rows(number: int) -> tuple[Tensor, Tensor, Tensor]:
        x, mean, _ = visits(400, seed, number)
        mean = 4 * mean if kind == "underdispersed" else mean
        with torch.random.fork_rng():
            torch.manual_seed(1000 * number + seed)
            return x, law(mean).sample(), mean

    (x, y, _), (fx, fy, mean) = rows(54), rows(55)
    posterior = fit(poisson, (x, y), "multivariate_normal", plate="data", steps=2000, seed=seed)
    true, even = law(mean).log_prob(fy), dist.Poisson(y.mean()).log_prob(fy)
    return Fitted(posterior, (fx, fy), train=(x, y), nats=lambda: predictive_loss(posterior, (fx, fy), true, even))


def overdispersed(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    total = pyro.sample("total", dist.LogNormal(1.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.GammaPoisson(total, total / (x * w).sum(-1).exp()), obs=y)


@good("counts", "reference draws", "a converged negative binomial regression", rows=(150, 1000))
def negative_binomial_regression(seed: int, rows: int) -> Fitted:
    def draw(kind: int) -> Rows:
        x, mean, _ = visits(rows, seed, kind)
        with torch.random.fork_rng():
            torch.manual_seed(1000 * kind + seed)
            return x, dist.GammaPoisson(3.0, 3.0 / mean).sample()

    train, fresh = draw(56), draw(57)
    x, y = train[0].double(), train[1].double()

    def joint(z: Tensor) -> Tensor:
        w, log_total = z[:, :2], z[:, 2:]
        fits = dist.GammaPoisson(log_total.exp(), (log_total - w @ x.T).exp()).log_prob(y).sum(1)
        return fits + dist.Normal(0.0, 1.0).log_prob(w).sum(1) + dist.Normal(1.0, 1.0).log_prob(log_total[:, 0])

    z = density_posterior(joint, torch.zeros(3))
    posterior = fit(overdispersed, train, "multivariate_normal", plate="data", steps=2500, batch_size=None, seed=seed)
    return Fitted(posterior, fresh, train=train, truth={"w": moments(z[:, :2]), "total": moments(z[:, 2].exp())})
