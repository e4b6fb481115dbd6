"""Factors: likelihoods, penalties and priors that are written as numbers."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise


@kind("factors")
def likelihood_by_hand(sizes: Sizes) -> UserProgram:
    x = noise(sizes.rows)
    y = 1.0 - x + 0.5 * noise(sizes.rows, seed=1)

    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.factor("likelihood", -2.0 * (y - a - b * x) ** 2)

    def answer(posterior: Posterior) -> None:
        design = torch.stack([torch.ones(len(x)), x], 1)
        precision = torch.eye(2) + 4 * design.T @ design
        mean = torch.linalg.solve(precision, 4 * design.T @ y)
        draws = posterior.sample(draws=2000)
        found = torch.stack([draws["a"], draws["b"]], 1)
        torch.testing.assert_close(found.mean(0), mean, atol=0.03, rtol=0)
        torch.testing.assert_close(found.std(0), torch.linalg.inv(precision).diagonal().sqrt(), atol=0.0, rtol=0.2)

    return UserProgram(model, AutoMultivariateNormal, (x, y), rows=sizes.rows, observed=(), answer=answer)


@kind("factors")
def sum_to_zero(sizes: Sizes) -> UserProgram:
    group, y = torch.arange(sizes.rows) % sizes.groups, noise(sizes.rows)

    def model(group: Tensor, y: Tensor | None = None) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        with pyro.plate("groups", sizes.groups):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.factor("zero", -50.0 * effect.sum(-1) ** 2)
        with pyro.plate("rows", len(group)):
            pyro.sample("y", dist.Normal(mean + effect[group], 1.0), obs=y)

    return UserProgram(model, "normal", (group, y), rows=sizes.rows)


@kind("factors")
def proportional_hazards(sizes: Sizes) -> UserProgram:
    x = noise(sizes.rows, 2)
    time = dist.Exponential(torch.ones(sizes.rows)).icdf(torch.linspace(0.1, 0.9, sizes.rows))
    died = torch.arange(sizes.rows) % 3 > 0

    def model(x: Tensor, time: Tensor, died: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        order = time.argsort(descending=True)
        risk = (x @ beta)[order]
        partial = risk - torch.logcumsumexp(risk, 0)
        pyro.factor("partial", (partial * died[order]).sum())

    return UserProgram(model, "normal", (x, time, died), observed=())


@kind("factors")
def machines_that_still_run(sizes: Sizes) -> UserProgram:
    time = torch.linspace(0.2, 3.0, sizes.rows)
    failed = torch.arange(sizes.rows) % 2 == 0

    def model(time: Tensor, failed: Tensor) -> None:
        shape = pyro.sample("shape", dist.LogNormal(0.0, 0.5))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("machines", len(time)):
            density = dist.Weibull(scale, shape).log_prob(time)
            survival = -((time / scale) ** shape)
            pyro.factor("lifetime", torch.where(failed, density, survival))

    return UserProgram(model, "normal", (time, failed), rows=sizes.rows, observed=())


@kind("factors")
def neighbors_on_a_map(sizes: Sizes) -> UserProgram:
    counts = torch.arange(sizes.rows) % 5.0
    left, right = torch.arange(sizes.rows - 1), torch.arange(1, sizes.rows)

    def model(counts: Tensor | None = None) -> None:
        precision = pyro.sample("precision", dist.Gamma(2.0, 1.0))
        regions = pyro.plate("regions", sizes.rows)
        with regions:
            phi = pyro.sample("phi", dist.Normal(0.0, 3.0))
        difference = phi[..., left] - phi[..., right]
        pyro.factor("smooth", -0.5 * precision * (difference**2).sum(-1) + 0.5 * len(left) * precision.log())
        with regions:
            pyro.sample("y", dist.Poisson(phi.exp()), obs=counts)

    return UserProgram(model, "normal", (counts,), rows=sizes.rows)


@kind("factors")
def weighted_survey(sizes: Sizes) -> UserProgram:
    y, weight = (noise(sizes.rows) > 0).float(), 0.5 + torch.arange(sizes.rows) % 3

    def model(y: Tensor, weight: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("people", len(y)):
            pyro.factor("vote", weight * dist.Bernoulli(p).log_prob(y))

    return UserProgram(model, "normal", (y, weight), rows=sizes.rows, observed=())


@kind("factors")
def penalized_network(sizes: Sizes) -> UserProgram:
    x, y = noise(sizes.rows, 2), noise(sizes.rows, seed=1)
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("net", net)
        pyro.factor("decay", -0.1 * sum((p**2).sum() for p in net.parameters()))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1), sigma), obs=y)

    return UserProgram(model, "normal", (x, y), rows=sizes.rows)
