"""Programs that find their data in a closure, a global or ``self``."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise

HEIGHTS = noise(9, seed=5)
ROUNDS: Tensor = torch.arange(9) % 3


@kind("closures, globals and self")
def data_in_a_closure(sizes: Sizes) -> UserProgram:
    y = 3.0 + noise(sizes.rows)

    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    def answer(posterior: Posterior) -> None:
        precision = 0.01 + sizes.rows
        mean = posterior.sample(draws=3000)["mean"]
        assert abs(float(mean.mean()) - float(y.sum()) / precision) < 0.02
        assert abs(float(mean.std()) * precision**0.5 - 1) < 0.1
        marginal = dist.MultivariateNormal(torch.zeros(len(y)), 100.0 + torch.eye(len(y)))
        assert abs(float(posterior.log_evidence(particles=1000)) - float(marginal.log_prob(y))) < 0.05
        assert posterior.log_likelihood(draws=5).shape == (5, len(y))

    return UserProgram(model, "normal", rows=sizes.rows, answer=answer)


def growth() -> None:
    start = pyro.sample("start", dist.Normal(0.0, 1.0))
    rate = pyro.sample("rate", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("measurements", len(HEIGHTS)):
        pyro.sample("y", dist.Normal(start + rate[ROUNDS], 0.5), obs=HEIGHTS)


@kind("closures, globals and self")
def data_in_globals(sizes: Sizes) -> UserProgram:
    return UserProgram(growth, "normal", rows=len(HEIGHTS))


class Regression:
    """An ordinary object that keeps its data."""

    def __init__(self, x: Tensor, y: Tensor, prior_sd: float) -> None:
        self.x, self.y, self.prior_sd = x, y, prior_sd

    def predictor(self, weights: Tensor) -> Tensor:
        return self.x @ weights

    def model(self) -> None:
        weights = pyro.sample("weights", dist.Normal(torch.zeros(self.x.shape[1]), self.prior_sd).to_event(1))
        with pyro.plate("rows", len(self.x)):
            pyro.sample("y", dist.Normal(self.predictor(weights), 1.0), obs=self.y)

    def guide(self) -> None:
        loc = pyro.param("loc", torch.zeros(self.x.shape[1]))
        scale = pyro.param("scale", torch.ones(self.x.shape[1]), constraint=dist.constraints.positive)
        pyro.sample("weights", dist.Normal(loc, scale).to_event(1))


@kind("closures, globals and self")
def data_in_an_object(sizes: Sizes) -> UserProgram:
    regression = Regression(noise(sizes.rows, sizes.groups), noise(sizes.rows, seed=1), 2.0)
    return UserProgram(regression.model, regression.guide, rows=sizes.rows)


class Design(PyroModule):
    """A module with its data as buffers and its weights as sites."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.register_buffer("x", x)
        self.register_buffer("y", y)
        self.linear = PyroModule[nn.Linear](x.shape[1], 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, x.shape[1]]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 5.0).expand([1]).to_event(1))

    def forward(self) -> Tensor:
        mean = self.linear(self.x).squeeze(-1)
        with pyro.plate("data", len(self.x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=self.y)
        return mean


@kind("closures, globals and self")
def data_in_buffers(sizes: Sizes) -> UserProgram:
    design = Design(noise(sizes.rows, sizes.groups), noise(sizes.rows, seed=1))
    return UserProgram(design, "normal", rows=sizes.rows)


@kind("closures, globals and self")
def inputs_in_a_closure(sizes: Sizes) -> UserProgram:
    x, y = noise(sizes.rows), noise(sizes.rows, seed=1)
    basis = torch.stack([x**k for k in range(3)], -1)

    def model(y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(basis @ w, sigma), obs=y)

    return UserProgram(model, AutoMultivariateNormal, (y,), rows=sizes.rows)


def hierarchy(groups: int, prior: Callable[[], dist.Distribution], group: Tensor, y: Tensor) -> None:
    spread = pyro.sample("spread", prior())
    with pyro.plate("groups", groups):
        effect = pyro.sample("effect", dist.Normal(0.0, spread))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(effect[group], 1.0), obs=y)


@kind("closures, globals and self")
def everything_in_a_partial(sizes: Sizes) -> UserProgram:
    group = torch.arange(sizes.rows) % sizes.groups
    model = functools.partial(hierarchy, sizes.groups, lambda: dist.HalfCauchy(1.0), group, noise(sizes.rows))
    return UserProgram(model, "normal", rows=sizes.rows)


@kind("closures, globals and self")
def helpers_in_a_closure(sizes: Sizes) -> UserProgram:
    tables = {"dose": torch.arange(sizes.rows) % 5.0, "deaths": torch.arange(sizes.rows) % 4.0}
    cache: dict[str, Tensor] = {"n": torch.full((sizes.rows,), 6.0)}

    def curve(dose: Tensor) -> Tensor:
        slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5))
        middle = pyro.sample("middle", dist.Normal(2.0, 1.0))
        return slope * (dose - middle)

    def model() -> None:
        logits = curve(tables["dose"])
        with pyro.plate("rows", sizes.rows):
            pyro.sample("y", dist.Binomial(cache["n"], logits=logits), obs=tables["deaths"])

    return UserProgram(model, "normal", rows=sizes.rows)
