"""Linear regressions: closed forms, several guides, learned noise, few rows, fits that end too early."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

import deepprob as dp
from verdicts.registry import Fitted, good, wrong
from verdicts.truths import (
    around,
    density_posterior,
    fit,
    gaussian_guide,
    linear_posterior,
    moments,
    noise,
    plain_normal,
    predictive_loss,
)


def rows_of(count: int, columns: int, seed: int, kind: int, rho: float = 0.0) -> tuple[Tensor, Tensor]:
    """Inputs with correlation ``rho``, and their noisy sums."""
    g = noise(seed, kind)
    x = rho**0.5 * torch.randn(count, 1, generator=g) + (1 - rho) ** 0.5 * torch.randn(count, columns, generator=g)
    return x, x.sum(1) + torch.randn(count, generator=g)


def regression(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)


@good("regression", "closed form", "the guide is the exact posterior", rows=(2, 20, 300, 3000))
@wrong("regression", "closed form", "the guide is {width} times as wide as the posterior", width=(0.1, 0.5, 2, 5))
def closed_form_guide(seed: int, rows: int = 200, width: float = 1.0) -> Fitted:
    train, fresh = rows_of(rows, 3, seed, 1), rows_of(rows, 3, seed, 2)
    exact = linear_posterior(*train)
    posterior = fit(regression, train, gaussian_guide("w", exact, width), plate="data", steps=800, seed=seed)
    return Fitted(posterior, fresh, train=train, truth={"w": exact[:]})


@wrong("regression", "closed form", "all ten coefficients are {shift} sds off", shift=(0.75, 1, 2, 5))
def shifted_coefficients(seed: int, shift: float) -> Fitted:
    train, fresh = rows_of(500, 10, seed, 3), rows_of(200, 10, seed, 4)
    exact = linear_posterior(*train)
    guide = gaussian_guide("w", exact, shift=shift)
    posterior = fit(regression, train, guide, plate="data", steps=800, batch_size=None, seed=seed)
    return Fitted(posterior, fresh, train=train, truth={"w": exact[:]})


@good("regression", "closed form", "a default fit with independent columns", rows=(40, 300, 1000))
def default_regression(seed: int, rows: int) -> Fitted:
    train, fresh = rows_of(rows, 2, seed, 5), rows_of(rows, 2, seed, 6)
    train = (train[0] - train[0].mean(0), train[1])
    left = torch.linalg.qr(train[0])[0] * rows**0.5  # the columns have no correlation at all: mean field is exact
    train = (left, left.sum(1) + torch.randn(rows, generator=noise(seed, 7)))
    posterior = fit(regression, train, "normal", plate="data", seed=seed)
    return Fitted(posterior, fresh, train=train, truth={"w": linear_posterior(*train)[:]})


def product(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


@good(
    "regression", "closed form", "a full covariance can hold correlated coefficients",
    rho=(0.9, 0.98, 0.2), guide=("multivariate_normal", "multivariate_normal", "low_rank"),
)  # fmt: skip
@wrong(
    "regression", "closed form", "independent normals for coefficients whose inputs correlate at {rho}",
    rho=(0.9, 0.98, 0.95), guide=("normal", "normal", "normal"),
)  # fmt: skip
def correlated_columns(seed: int, rho: float, guide: str) -> Fitted:
    train, fresh = rows_of(150, 4, seed, 8, rho), rows_of(100, 4, seed, 9, rho)
    posterior = fit(product, train, guide, steps=2500, seed=seed)
    return Fitted(posterior, fresh, train=train, truth={"w": linear_posterior(*train)[:]})


@wrong("regression", "closed form", "mean field for the coefficients of a polynomial", degree=(3, 5))
def polynomial(seed: int, degree: int) -> Fitted:
    def rows(kind: int) -> tuple[Tensor, Tensor]:
        g = noise(seed, kind)
        t = 2 * torch.rand(120, generator=g)  # not centered, as a user leaves it
        x = torch.stack([t**k for k in range(degree + 1)], 1)
        return x, x[:, 1] - x[:, 2] + torch.randn(120, generator=g)

    train = rows(10)
    posterior = fit(product, train, "normal", steps=2500, seed=seed)
    return Fitted(posterior, rows(11), train=train, truth={"w": linear_posterior(*train)[:]})


# -- learned noise --------------------------------------------------------------------------------------------------


def unknown_noise(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), sigma), obs=y)


def unknown_noise_draws(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    x, y = x.double(), y.double()

    def joint(z: Tensor) -> Tensor:
        w, log_sigma = z[:, :-1], z[:, -1]
        fits = dist.Normal(w @ x.T, log_sigma.exp()[:, None]).log_prob(y).sum(1)
        return fits + dist.Normal(0.0, 1.0).log_prob(z).sum(1)

    z = density_posterior(joint, torch.zeros(x.shape[1] + 1))
    return {"w": z[:, :-1], "sigma": z[:, -1].exp()}


def small_noise(count: int, seed: int, kind: int) -> tuple[Tensor, Tensor]:
    g = noise(seed, kind)
    x = torch.randn(count, 2, generator=g)
    return x, x.sum(1) + 0.4 * torch.randn(count, generator=g)


@good("regression", "reference draws", "a converged fit of coefficients and noise", rows=(40, 300, 2000))
def learned_noise(seed: int, rows: int) -> Fitted:
    train, fresh = small_noise(rows, seed, 12), small_noise(rows, seed, 13)
    posterior = fit(unknown_noise, train, "multivariate_normal", plate="data", steps=2500, seed=seed, batch_size=None)
    truth = {name: moments(draws) for name, draws in unknown_noise_draws(*train).items()}
    return Fitted(posterior, fresh, train=train, truth=truth)


@wrong("regression", "reference draws", "the noise is {width} times as wide as its posterior", width=(0.2, 4))
def only_the_noise_is_wrong(seed: int, width: float) -> Fitted:
    train, fresh = small_noise(200, seed, 14), small_noise(200, seed, 15)
    draws = unknown_noise_draws(*train)
    (w, w_sd), (log_sigma, sd) = moments(draws["w"]), moments(draws["sigma"].log())
    guide = around(
        w=lambda: dist.Normal(w.float(), w_sd.float()).to_event(1),
        sigma=lambda: dist.LogNormal(log_sigma.float(), width * sd.float()),
    )
    posterior = fit(unknown_noise, train, guide, plate="data", steps=800, seed=seed)
    truth = {name: moments(value) for name, value in draws.items()}
    return Fitted(posterior, fresh, train=train, truth=truth)


# -- fits that end too early ----------------------------------------------------------------------------------------


def far_guide(x: Tensor, y: Tensor | None = None) -> None:
    """A guide written by hand, which starts far from the posterior."""
    loc = pyro.param("loc", torch.zeros(3))
    scale = pyro.param("scale", 0.5 * torch.ones(3), constraint=constraints.positive)
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))


@good("regression", "closed form", "a hand-written guide, fitted to the end", rate=(0.03,), steps=(3000,))
@wrong(
    "regression", "closed form", "{steps} steps at learning rate {rate} end far from the posterior",
    rate=(1e-5, 1e-4, 1e-3, 1e-2), steps=(2000, 2000, 300, 60),
)  # fmt: skip
def rates_and_lengths(seed: int, rate: float, steps: int) -> Fitted:
    train, fresh = rows_of(400, 3, seed, 16), rows_of(200, 3, seed, 17)
    optimizer = dp.Optimizer(learning_rate=rate)
    posterior = fit(regression, train, far_guide, plate="data", steps=steps, optimizer=optimizer, seed=seed,
                    batch_size=None)  # fmt: skip
    return Fitted(posterior, fresh, train=train, truth={"w": linear_posterior(*train)[:]})


@wrong("regression", "closed form", "a large learning rate without decay keeps the fit {rate} around", rate=(1.0,))
def restless_fit(seed: int, rate: float) -> Fitted:
    train, fresh = rows_of(400, 3, seed, 18), rows_of(200, 3, seed, 19)
    optimizer = dp.Optimizer(learning_rate=rate, schedule="constant")
    posterior = fit(regression, train, far_guide, plate="data", steps=600, optimizer=optimizer, seed=seed,
                    batch_size=16)  # fmt: skip
    return Fitted(posterior, fresh, train=train, truth={"w": linear_posterior(*train)[:]})


# -- few rows -------------------------------------------------------------------------------------------------------


def location(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def measurements(count: int, seed: int, kind: int) -> Tensor:
    return 1.5 + torch.randn(count, generator=noise(seed, kind))


@good("few rows", "closed form", "a fit of {rows} rows, checked on those rows", rows=(2, 3, 5, 10))
def few_rows(seed: int, rows: int) -> Fitted:
    y = measurements(rows, seed, 20)
    exact = linear_posterior(torch.ones(rows, 1), y, prior=3.0)
    return Fitted(fit(location, y, "normal", steps=1500, seed=seed), y, train=(y,), truth={"mu": exact[0]})


@wrong("few rows", "closed form", "{rows} rows, width times {width}", rows=(2, 3, 5, 10), width=(5, 0.1, 0.25, 3))
def few_rows_and_a_wrong_width(seed: int, rows: int, width: float) -> Fitted:
    y = measurements(rows, seed, 21)
    exact = linear_posterior(torch.ones(rows, 1), y, prior=3.0)
    mean, sd = (value.float() for value in exact[0])
    guide = around(mu=lambda: dist.Normal(mean, width * sd))
    return Fitted(fit(location, y, guide, steps=800, seed=seed), y, train=(y,), truth={"mu": exact[0]})


# -- wrong likelihoods ----------------------------------------------------------------------------------------------


@wrong("regression", "constructed", "the noise grows with the input, the model has one noise", growth=(1.0, 0.6))
def heteroscedastic(seed: int, growth: float) -> Fitted:
    def rows(kind: int) -> tuple[Tensor, Tensor, Tensor]:
        g = noise(seed, kind)
        x = torch.randn(400, 2, generator=g)
        sd = 0.4 * (growth * x[:, 0]).exp()
        return x, x.sum(1) + sd * torch.randn(400, generator=g), sd

    (x, y, _), (fx, fy, sd) = rows(22), rows(23)
    posterior = fit(unknown_noise, (x, y), "multivariate_normal", plate="data", steps=1500, seed=seed)
    true = dist.Normal(fx.sum(1), sd).log_prob(fy)
    return Fitted(
        posterior, (fx, fy), train=(x, y), nats=lambda: predictive_loss(posterior, (fx, fy), true, plain_normal(y, fy))
    )


@wrong("regression", "constructed", "a line for a curve of curvature {bend}", bend=(0.5, 1.0))
def line_for_a_curve(seed: int, bend: float) -> Fitted:
    def rows(kind: int) -> tuple[Tensor, Tensor]:
        g = noise(seed, kind)
        x = torch.cat([torch.randn(300, 1, generator=g), torch.ones(300, 1)], 1)
        return x, mean(x) + 0.5 * torch.randn(300, generator=g)

    def mean(x: Tensor) -> Tensor:
        return x[:, 0] + bend * x[:, 0] ** 2

    (x, y), (fx, fy) = rows(24), rows(25)
    posterior = fit(unknown_noise, (x, y), "multivariate_normal", plate="data", steps=1500, seed=seed)
    true = dist.Normal(mean(fx), 0.5).log_prob(fy)
    return Fitted(
        posterior, (fx, fy), train=(x, y), nats=lambda: predictive_loss(posterior, (fx, fy), true, plain_normal(y, fy))
    )


# -- robust regression ----------------------------------------------------------------------------------------------


def robust(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.StudentT(3.0, (x * w).sum(-1), sigma), obs=y)


def heavy(count: int, freedom: float, seed: int, kind: int) -> tuple[Tensor, Tensor]:
    g = noise(seed, kind)
    x = torch.randn(count, 2, generator=g)
    ratio = torch.randn(count, generator=g) / (torch.randn(count, int(freedom), generator=g) ** 2).mean(1).sqrt()
    return x, x.sum(1) + 0.5 * ratio


def robust_draws(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    x, y = x.double(), y.double()

    def joint(z: Tensor) -> Tensor:
        fits = dist.StudentT(3.0, z[:, :2] @ x.T, z[:, 2:].exp()).log_prob(y).sum(1)
        return fits + dist.Normal(0.0, 1.0).log_prob(z).sum(1)

    z = density_posterior(joint, torch.zeros(3))
    return {"w": z[:, :2], "sigma": z[:, 2].exp()}


@good("robust", "reference draws", "Student noise for Student data", rows=(60, 800), guide=("normal", "low_rank"))
@wrong("robust", "reference draws", "{steps} steps from a flow's start", rows=(800,), guide=("flow",), steps=(40,))
def robust_regression(seed: int, rows: int, guide: str, steps: int = 2000) -> Fitted:
    train, fresh = heavy(rows, 3, seed, 26), heavy(rows, 3, seed, 27)
    posterior = fit(robust, train, guide, plate="data", steps=steps, seed=seed, batch_size=None)
    truth = {name: moments(draws) for name, draws in robust_draws(*train).items()}
    return Fitted(posterior, fresh, train=train, truth=truth)


@wrong("robust", "constructed", "normal noise for Student data with {freedom} degrees of freedom",
       freedom=(1, 2, 2), rows=(300, 300, 80))  # fmt: skip
def normal_noise_for_heavy_tails(seed: int, freedom: float, rows: int) -> Fitted:
    train, fresh = heavy(rows, freedom, seed, 28), heavy(rows, freedom, seed, 29)
    posterior = fit(unknown_noise, train, "multivariate_normal", plate="data", steps=2000, seed=seed)
    true = dist.StudentT(freedom, fresh[0].sum(1), 0.5).log_prob(fresh[1])
    baseline = dist.Cauchy(train[1].median(), 1.0).log_prob(fresh[1])
    return Fitted(posterior, fresh, train=train, nats=lambda: predictive_loss(posterior, fresh, true, baseline))


@wrong("robust", "reference draws", "guide of a robust regression, width times {width}", width=(0.3, 3))
def robust_widths(seed: int, width: float) -> Fitted:
    train, fresh = heavy(150, 3, seed, 30), heavy(150, 3, seed, 31)
    draws = robust_draws(*train)
    (w, w_sd), (log_sigma, sd) = moments(draws["w"]), moments(draws["sigma"].log())
    guide = around(
        w=lambda: dist.Normal(w.float(), width * w_sd.float()).to_event(1),
        sigma=lambda: dist.LogNormal(log_sigma.float(), width * sd.float()),
    )
    posterior = fit(robust, train, guide, plate="data", steps=800, seed=seed)
    return Fitted(posterior, fresh, train=train, truth={name: moments(value) for name, value in draws.items()})
