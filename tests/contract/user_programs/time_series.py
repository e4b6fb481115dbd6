"""Time series written as Python loops over steps."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal
from torch import Tensor

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise

STEPS = 6


def steps(name: str, start: int = 0) -> tuple[str, ...]:
    return tuple(f"{name}_{t}" for t in range(start, STEPS))


@kind("time series by a Python loop")
def autoregression(sizes: Sizes) -> UserProgram:
    y = noise(STEPS).cumsum(0)

    def model(y: Tensor) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
        for t in range(1, len(y)):
            pyro.sample(f"y_{t}", dist.Normal(alpha + beta * y[t - 1], 0.5), obs=y[t])

    def answer(posterior: Posterior) -> None:
        design = torch.stack([torch.ones(STEPS - 1), y[:-1]], 1)
        precision = torch.eye(2) + design.T @ design / 0.25
        mean = torch.linalg.solve(precision, design.T @ y[1:] / 0.25)
        draws = posterior.sample(draws=3000)
        found = torch.stack([draws["alpha"], draws["beta"]], 1)
        torch.testing.assert_close(found.mean(0), mean, atol=0.04, rtol=0)
        torch.testing.assert_close(found.T.cov(), torch.linalg.inv(precision), atol=0.02, rtol=0)
        marginal = dist.MultivariateNormal(torch.zeros(STEPS - 1), design @ design.T + 0.25 * torch.eye(STEPS - 1))
        evidence = posterior.log_evidence(y, particles=3000)
        torch.testing.assert_close(evidence, marginal.log_prob(y[1:]), atol=0.05, rtol=0)

    return UserProgram(model, AutoMultivariateNormal, (y,), rows=STEPS - 1, observed=steps("y", 1), answer=answer)


@kind("time series by a Python loop")
def local_level(sizes: Sizes) -> UserProgram:
    y = noise(STEPS).cumsum(0)

    def model(y: Tensor | None = None) -> None:
        drift = pyro.sample("drift", dist.LogNormal(-1.0, 0.5))
        level = torch.tensor(0.0)
        for t in range(STEPS):
            level = pyro.sample(f"level_{t}", dist.Normal(level, drift))
            pyro.sample(f"y_{t}", dist.Normal(level, 0.5), obs=None if y is None else y[t])

    return UserProgram(model, AutoLowRankMultivariateNormal, (y,), rows=STEPS, observed=steps("y"))


@kind("time series by a Python loop")
def panel_of_series(sizes: Sizes) -> UserProgram:
    y = noise(sizes.rows, STEPS).cumsum(1)

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.Exponential(1.0))
        with pyro.plate("series", len(y)):
            rate = pyro.sample("rate", dist.Normal(mean, 0.5))
            before = torch.zeros(len(y))
            for t in range(STEPS):
                pyro.sample(f"y_{t}", dist.Normal(rate * before, scale), obs=y[:, t])
                before = y[:, t]

    return UserProgram(model, "normal", (y,), rows=sizes.rows, observed=steps("y"))


@kind("time series by a Python loop")
def epidemic(sizes: Sizes) -> UserProgram:
    cases = torch.tensor([2.0, 3.0, 7.0, 12.0, 14.0, 9.0])

    def model(cases: Tensor | None = None) -> None:
        beta = pyro.sample("beta", dist.LogNormal(0.0, 0.3))
        gamma = pyro.sample("gamma", dist.Beta(2.0, 4.0))
        susceptible, infected = torch.tensor(100.0), torch.tensor(3.0)
        expected = []
        for _ in range(STEPS):
            new = beta * susceptible * infected / 103.0
            susceptible, infected = susceptible - new, infected + new - gamma * infected
            expected.append(new)
        with pyro.plate("days", STEPS):
            pyro.sample("y", dist.Poisson(torch.stack(expected).clamp(min=0.1)), obs=cases)

    return UserProgram(model, "normal", (cases,), rows=STEPS)


@kind("time series by a Python loop")
def exponential_smoothing(sizes: Sizes) -> UserProgram:
    y = 0.5 * torch.arange(sizes.rows) + noise(sizes.rows)

    def model(y: Tensor) -> None:
        smoothing = pyro.sample("smoothing", dist.Uniform(torch.zeros(2), torch.ones(2)).to_event(1))
        level, trend = y[0], pyro.sample("trend", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.HalfCauchy(2.0))
        predictions = []
        for value in y:
            forecast = level + trend
            predictions.append(forecast)
            level = smoothing[0] * value + (1 - smoothing[0]) * forecast
            trend = smoothing[1] * (level - forecast + trend) + (1 - smoothing[1]) * trend
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.Normal(torch.stack(predictions), sigma), obs=y)

    return UserProgram(model, "normal", (y,), rows=sizes.rows)


@kind("time series by a Python loop")
def stochastic_volatility(sizes: Sizes) -> UserProgram:
    returns = noise(sizes.rows)

    def model(returns: Tensor | None = None) -> None:
        phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
        shocks = pyro.sample("shocks", dist.Normal(torch.zeros(sizes.rows), 1.0).to_event(1))
        h = [sigma * shocks[0]]
        for t in range(1, sizes.rows):
            h.append(phi * h[-1] + sigma * shocks[t])
        volatility = torch.exp(torch.stack(h) / 2)
        with pyro.plate("time", sizes.rows):
            pyro.sample("y", dist.StudentT(4.0, 0.0, volatility), obs=returns)

    return UserProgram(model, "normal", (returns,), rows=sizes.rows)


@kind("time series by a Python loop")
def vector_autoregression(sizes: Sizes) -> UserProgram:
    y = noise(STEPS, sizes.groups).cumsum(0)

    def model(y: Tensor) -> None:
        k = y.shape[-1]
        a = pyro.sample("a", dist.Normal(torch.zeros(k, k), 0.5).to_event(2))
        scale = pyro.sample("scale", dist.HalfNormal(torch.ones(k)).to_event(1))
        for t in range(1, STEPS):
            pyro.sample(f"y_{t}", dist.Normal(a @ y[t - 1], scale).to_event(1), obs=y[t])

    return UserProgram(model, "normal", (y,), rows=STEPS - 1, observed=steps("y", 1))
