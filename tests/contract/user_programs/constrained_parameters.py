"""Parameters with constraints: by hand, in modules, by row, set before the fit, met later, lifted to priors."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import Tensor, nn
from torch.distributions import constraints

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise


@kind("parameters with constraints, set before or met later")
def rate_of_counts(sizes: Sizes) -> UserProgram:
    """A Gamma guide with positive parameters, which can be exact."""
    counts = torch.poisson(torch.full((sizes.rows,), 3.0), generator=torch.Generator().manual_seed(0))

    def model(counts: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(counts)):
            pyro.sample("y", dist.Poisson(rate), obs=counts)

    def guide(counts: Tensor) -> None:
        shape = pyro.param("shape", torch.tensor(100.0), constraint=constraints.greater_than(1.0))
        mean = pyro.param("mean", torch.tensor(2.0), constraint=constraints.interval(0.1, 20.0))
        pyro.sample("rate", dist.Gamma(shape, shape / mean))

    def answer(posterior: Posterior) -> None:
        a, b = 2.0 + float(counts.sum()), 1.0 + len(counts)
        found = posterior.parameters()
        assert set(found) == {"shape", "mean"}
        assert float(found["mean"]) == pytest.approx(a / b, rel=0.02)
        assert float(found["shape"]) == pytest.approx(a, rel=0.3)
        exact = (
            -torch.lgamma(counts + 1).sum() + torch.lgamma(torch.tensor(a)) - a * torch.tensor(b).log()
        )  # Gamma(2) is one
        assert float(posterior.log_evidence(counts, particles=4000)) == pytest.approx(float(exact), abs=0.03)

    return UserProgram(model, guide, (counts,), rows=sizes.rows, answer=answer)


@kind("parameters with constraints, set before or met later")
def simplex_ordered_and_cholesky(sizes: Sizes) -> UserProgram:
    """A guide whose parameters lie on a simplex, in order, and in a triangle."""
    y = torch.arange(sizes.rows) % 3

    def model(y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        shift = pyro.sample("shift", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Categorical(logits=weights.log() + shift), obs=y)

    def guide(y: Tensor) -> None:
        mean = pyro.param("mean", torch.full((3,), 1 / 3), constraint=constraints.simplex)
        count = pyro.param("count", torch.tensor(10.0), constraint=constraints.positive)
        pyro.sample("weights", dist.Dirichlet(count * mean))
        loc = pyro.param("loc", torch.tensor([-0.5, 0.0, 0.5]), constraint=dist.constraints.ordered_vector)
        tril = pyro.param("tril", 0.5 * torch.eye(3), constraint=constraints.lower_cholesky)
        pyro.sample("shift", dist.MultivariateNormal(loc, scale_tril=tril))

    return UserProgram(model, guide, (y,), rows=sizes.rows)


@kind("parameters with constraints, set before or met later")
def parameters_of_rows(sizes: Sizes) -> UserProgram:
    """Parameters inside the plate, with event dimensions of their own; the plate is named as the rows."""
    y = noise(sizes.rows, sizes.groups)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(sizes.groups), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        loc = pyro.param("mu_loc", torch.zeros(sizes.groups))
        pyro.sample("mu", dist.Normal(loc, 0.3).to_event(1))
        with pyro.plate("rows", len(y)):
            z = pyro.param("z_loc", lambda: torch.zeros(sizes.rows, sizes.groups), event_dim=1)
            sd = pyro.param(
                "z_scale", lambda: torch.ones(sizes.rows, sizes.groups), constraint=constraints.positive, event_dim=1
            )
            pyro.sample("z", dist.Normal(z, sd).to_event(1))

    return UserProgram(model, guide, (y,), rows=sizes.rows, data_plate="rows")


class Seasons(PyroModule):  # type: ignore[misc]
    """A module that declares its parameters in three ways."""

    def __init__(self, seasons: int) -> None:
        super().__init__()
        self.seasons = seasons
        self.level = PyroParam(torch.tensor(0.5))
        self.spread = PyroParam(torch.tensor(1.0), constraints.positive)
        self.raw = nn.Parameter(torch.zeros(()))

    @PyroParam(constraint=constraints.unit_interval)  # type: ignore[untyped-decorator]
    def damping(self) -> Tensor:
        return torch.tensor(0.5)

    @pyro_method  # type: ignore[untyped-decorator]
    def pattern(self) -> Tensor:
        with pyro.plate("seasons", self.seasons):
            effect: Tensor = pyro.sample("effect", dist.Normal(0.0, self.spread))
        return effect * self.damping + self.level + self.raw

    def forward(self, season: Tensor, y: Tensor | None = None) -> None:
        mean = self.pattern()[..., season]
        with pyro.plate("rows", len(season)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@kind("parameters with constraints, set before or met later")
def parameters_of_a_module(sizes: Sizes) -> UserProgram:
    season, y = torch.arange(sizes.rows) % sizes.groups, noise(sizes.rows)
    return UserProgram(Seasons(sizes.groups), "normal", (season, y), rows=sizes.rows)


@kind("parameters with constraints, set before or met later")
def empirical_bayes(sizes: Sizes) -> UserProgram:
    """The prior's scale is a parameter of the model, and its maximum-likelihood value has a closed form."""
    y = 2.0 * noise(sizes.rows)

    def model(y: Tensor) -> None:
        tau = pyro.param("tau", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    def answer(posterior: Posterior) -> None:
        variance = float((y**2).mean())
        assert float(posterior.parameters()["tau"]) == pytest.approx((variance - 1) ** 0.5, rel=0.05)
        exact = dist.Normal(0.0, variance**0.5).log_prob(y)
        torch.testing.assert_close(posterior.log_evidence(y, particles=2000), exact, atol=0.05, rtol=0)

    return UserProgram(model, "normal", (y,), rows=sizes.rows, answer=answer)


@kind("parameters with constraints, set before or met later")
def lifted_to_a_prior(sizes: Sizes) -> UserProgram:
    """``poutine.lift`` puts priors in the place of parameters."""
    x, y = noise(sizes.rows), noise(sizes.rows, seed=1)

    def regression(x: Tensor, y: Tensor | None = None) -> None:
        slope = pyro.param("slope", torch.tensor(0.0))
        width = pyro.param("width", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(slope * x, width), obs=y)

    priors = {"slope": dist.Normal(0.0, 1.0), "width": dist.Gamma(2.0, 2.0)}
    model: Callable[..., None] = poutine.lift(regression, prior=priors)
    return UserProgram(model, "normal", (x, y), rows=sizes.rows)


@kind("parameters with constraints, set before or met later")
def scale_set_before_the_fit(sizes: Sizes) -> UserProgram:
    """The store already holds a parameter, and the model reads it by its name alone."""
    y = noise(sizes.rows)
    stored = {"scale_from_before": (torch.tensor(0.7), constraints.positive)}

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, pyro.param("scale_from_before")), obs=y)

    return UserProgram(model, "normal", (y,), rows=sizes.rows, stored=stored)


@kind("parameters with constraints, set before or met later")
def parameter_met_in_the_third_run(sizes: Sizes) -> UserProgram:
    """A warm-up with a fixed scale; then a parameter takes its place."""
    y, runs = noise(sizes.rows), [0]

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        runs[0] += 1
        scale = torch.tensor(1.0)
        if runs[0] > 4:
            scale = pyro.param("late_scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.3))

    return UserProgram(model, guide, (y,), rows=sizes.rows, eager="runs")
