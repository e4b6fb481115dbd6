"""The styles in which users write programs: closures, factors, several sites, masks, subsampling, frames, weights."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

import deepprob as dp
from verdicts.registry import Fitted, good, wrong
from verdicts.truths import around, fit, linear_posterior, noise

Known = tuple[Tensor, Tensor]


def readings(count: int, seed: int, kind: int, at: float = 1.0) -> Tensor:
    return at + torch.randn(count, generator=noise(seed, kind))


def mean_posterior(y: Tensor, sd: float = 1.0, prior: float = 3.0) -> Known:
    return linear_posterior(torch.ones(len(y), 1), y, sd, prior)[0]


def near(known: Known, width: float, shift: float = 0.0) -> Callable[..., None] | str:
    """The guide by name for a good case, and one around the exact posterior for a wrong one."""
    if width == 1 and shift == 0:
        return "normal"
    mean, sd = (value.float() for value in known)
    return around(mu=lambda: dist.Normal(mean + shift * sd, width * sd))


def steps(width: float, shift: float = 0.0) -> int:
    return 2000 if width == 1 and shift == 0 else 800


@good("style", "closed form", "a program without arguments", width=(1,))
@wrong("style", "closed form", "a program without arguments, width times {width}", width=(0.2, 4))
def without_arguments(seed: int, width: float) -> Fitted:
    y = readings(30, seed, 170)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", 30) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    known = mean_posterior(y)
    posterior = fit(model, None, near(known, width), steps=steps(width), seed=seed)
    return Fitted(posterior, None, truth={"mu": known})


@good("style", "closed form", "the likelihood is a factor", width=(1,), shift=(0,))
@wrong("style", "closed form", "the likelihood is a factor; width {width}, {shift} sds off", width=(3, 1), shift=(0, 3))
def factor_as_likelihood(seed: int, width: float, shift: float) -> Fitted:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)):
            pyro.factor("fits", dist.Normal(mu, 1.0).log_prob(y))

    y = readings(60, seed, 171)
    known = mean_posterior(y)
    posterior = fit(model, y, near(known, width, shift), steps=steps(width, shift), seed=seed)
    return Fitted(posterior, y, train=(y,), truth={"mu": known})


@good("style", "closed form", "two observed sites", width=(1,), shift=(0,))
@wrong(
    "style", "closed form", "two observed sites; width {width}, {shift} sds off", width=(0.1, 1, 3), shift=(0, 60, 0)
)
def two_observed_sites(seed: int, width: float, shift: float) -> Fitted:
    def model(y: Tensor, t: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
            pyro.sample("t", dist.Normal(2 * mu, 1.0), obs=t)

    y, t = readings(50, seed, 172), readings(50, seed, 173, 2.0)
    design = torch.cat([torch.ones(50, 1), torch.full((50, 1), 2.0)])
    known = linear_posterior(design, torch.cat([y, t]), prior=3.0)[0]
    posterior = fit(model, (y, t), near(known, width, shift), steps=steps(width, shift), seed=seed)
    fresh = readings(50, seed, 174), readings(50, seed, 175, 2.0)
    return Fitted(posterior, fresh, train=(y, t), truth={"mu": known})


@good("style", "closed form", "half of the values are masked", width=(1,))
@wrong("style", "closed form", "half of the values are masked; width times {width}", width=(3,))
def masked_values(seed: int, width: float) -> Fitted:
    def model(seen: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y, seen = readings(80, seed, 176), torch.rand(80, generator=noise(seed, 177)) < 0.5
    known = mean_posterior(y[seen])
    posterior = fit(model, (seen, y), near(known, width), steps=steps(width), seed=seed)
    return Fitted(posterior, (seen, readings(80, seed, 178)), train=(seen, y), truth={"mu": known})


@good("style", "closed form", "the observations are a keyword", width=(1,))
@wrong("style", "closed form", "the observations are a keyword; width times {width}", width=(0.2,))
def keyword_only(seed: int, width: float) -> Fitted:
    def model(x: Tensor, *, y: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mu * x, 0.5), obs=y)

    def rows(kind: int) -> dict[str, Tensor]:
        g = noise(seed, kind)
        x = torch.randn(60, generator=g)
        return {"x": x, "y": 2 * x + 0.5 * torch.randn(60, generator=g)}

    train = rows(179)
    known = linear_posterior(train["x"][:, None], train["y"], 0.5, 3.0)[0]
    posterior = fit(model, train, near(known, width), steps=steps(width), seed=seed)
    return Fitted(posterior, rows(180), train=(train,), truth={"mu": known})


@good("style", "closed form", "the columns of a frame are arguments", rows=(50, 500))
def frame(seed: int, rows: int) -> Fitted:
    def model(dose: Tensor, age: Tensor, effect: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("patients", len(dose)):
            pyro.sample("effect", dist.Normal(w[..., :1] * dose + w[..., 1:] * age, 1.0), obs=effect)

    def table(kind: int) -> pd.DataFrame:
        g = noise(seed, kind)
        dose, age = torch.randn(2, rows, generator=g)
        return pd.DataFrame(
            {"dose": dose.numpy(), "age": age.numpy(), "effect": (dose - age + torch.randn(rows, generator=g)).numpy()}
        )

    train = table(181)
    design = torch.tensor(train[["dose", "age"]].to_numpy())
    exact = linear_posterior(design, torch.tensor(train["effect"].to_numpy()), prior=3.0)
    posterior = fit(model, train, "multivariate_normal", steps=2000, seed=seed)
    return Fitted(posterior, table(182), train=(train,), truth={"w": exact[:]})


@good("style", "closed form", "the program draws its own minibatches", size=(50, 150))
def own_minibatches(seed: int, size: int) -> Fitted:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("rows", len(x), subsample_size=min(size, len(x))) as rows:
            pyro.sample("y", dist.Normal((x[rows] * w).sum(-1), 1.0), obs=None if y is None else y[rows])

    def rows(kind: int) -> tuple[Tensor, Tensor]:
        g = noise(seed, kind)
        x = torch.randn(300, 2, generator=g)
        return x, x.sum(1) + torch.randn(300, generator=g)

    train = rows(183)
    optimizer = dp.Optimizer(average=0.999)
    posterior = fit(model, train, "multivariate_normal", steps=4000, seed=seed, optimizer=optimizer)
    return Fitted(posterior, rows(184), train=train, truth={"w": linear_posterior(*train, prior=3.0)[:]})


class Line(PyroModule):
    """A regression in Pyro's module style."""

    def __init__(self) -> None:
        super().__init__()
        self.line = PyroModule[torch.nn.Linear](2, 1)
        self.line.weight = PyroSample(dist.Normal(0.0, 2.0).expand([1, 2]).to_event(2))
        self.line.bias = PyroSample(dist.Normal(0.0, 2.0).expand([1]).to_event(1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean: Tensor = self.line(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        return mean


@good("style", "closed form", "a module with PyroSample", rows=(100,))
def pyro_module(seed: int, rows: int) -> Fitted:
    def draw(kind: int) -> tuple[Tensor, Tensor]:
        g = noise(seed, kind)
        x = torch.randn(rows, 2, generator=g)
        return x, x.sum(1) + torch.randn(rows, generator=g)

    train = draw(185)
    exact = linear_posterior(torch.cat([train[0], torch.ones(rows, 1)], 1), train[1], prior=2.0)
    posterior = fit(Line(), train, "multivariate_normal", plate="data", steps=2000, seed=seed)
    return Fitted(posterior, draw(186), train=train, truth={"line.weight": exact[:2], "line.bias": exact[2]})


@good("style", "closed form", "a list of guides by site", rows=(150,))
def list_of_guides(seed: int, rows: int) -> Fitted:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1) + b, 1.0), obs=y)

    def draw(kind: int) -> tuple[Tensor, Tensor]:
        g = noise(seed, kind)
        x = torch.randn(rows, 1, generator=g) + 0.5 * torch.randn(rows, 2, generator=g)
        x = x - x.mean(0)
        return x, x.sum(1) + 0.5 + torch.randn(rows, generator=g)

    guide = AutoGuideList(model)
    guide.append(AutoMultivariateNormal(poutine.block(model, expose=["w"])))
    guide.append(AutoNormal(poutine.block(model, expose=["b"])))
    train = draw(187)
    exact = linear_posterior(torch.cat([train[0], torch.ones(rows, 1)], 1), train[1], prior=2.0)
    posterior = fit(model, train, guide, steps=3000, seed=seed, optimizer=dp.Optimizer(learning_rate=0.02))
    return Fitted(posterior, draw(188), train=train, truth={"w": exact[:2], "b": exact[2]})


@good("style", "closed form", "Laplace's approximation of a normal posterior", rows=(60,))
def laplace(seed: int, rows: int) -> Fitted:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)

    def draw(kind: int) -> tuple[Tensor, Tensor]:
        g = noise(seed, kind)
        x = torch.randn(rows, 2, generator=g)
        return x, x.sum(1) + torch.randn(rows, generator=g)

    train = draw(189)
    posterior = fit(model, train, "laplace", steps=1500, seed=seed)
    return Fitted(posterior, draw(190), train=train, truth={"w": linear_posterior(*train, prior=2.0)[:]})


# -- conjugate programs of the textbooks ----------------------------------------------------------------------------


@good("style", "closed form", "a coin, thrown {rows} times", rows=(20, 200), width=(1, 1))
@wrong("style", "closed form", "a coin, thrown {rows} times, width times {width}", rows=(50, 50), width=(0.2, 2.5))
def coin(seed: int, rows: int, width: float) -> Fitted:
    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("throws", len(y)):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    def guide(y: Tensor) -> None:
        idle = 0.0 * pyro.param("idle", torch.tensor(0.0))
        pyro.sample("p", dist.Beta(heads / width**2 + idle, tails / width**2))

    y = (torch.rand(rows, generator=noise(seed, 191)) < 0.4).float()
    heads, tails = 2 + y.sum(), 2 + (1 - y).sum()
    exact = dist.Beta(heads, tails)
    posterior = fit(model, y, "normal" if width == 1 else guide, steps=1500, seed=seed)
    fresh = (torch.rand(rows, generator=noise(seed, 192)) < 0.4).float()
    return Fitted(posterior, fresh, train=(y,), truth={"p": (exact.mean, exact.variance.sqrt())})


@good("style", "closed form", "the rate of {rows} counts, with its own conjugate guide", rows=(5, 60), width=(1, 1))
@wrong("style", "closed form", "the rate of {rows} counts, width times {width}", rows=(60,), width=(4,))
def rate(seed: int, rows: int, width: float) -> Fitted:
    def model(y: Tensor) -> None:
        value = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Poisson(value), obs=y)

    def guide(y: Tensor) -> None:
        idle = 0.0 * pyro.param("idle", torch.tensor(0.0))
        pyro.sample("rate", dist.Gamma(shape / width**2 + idle, speed / width**2))

    y = torch.poisson(torch.full((rows,), 3.0), generator=noise(seed, 193))
    shape, speed = 2 + y.sum(), torch.tensor(1.0 + rows)
    posterior = fit(model, y, guide, steps=800, seed=seed)
    fresh = torch.poisson(torch.full((rows,), 3.0), generator=noise(seed, 194))
    return Fitted(posterior, fresh, train=(y,), truth={"rate": (shape / speed, shape.sqrt() / speed)})


@good("style", "closed form", "shares of four classes", rows=(100,))
def shares(seed: int, rows: int) -> Fitted:
    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.full((4,), 2.0)))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Categorical(p), obs=y)

    def draw(kind: int) -> Tensor:
        return torch.multinomial(torch.tensor([0.4, 0.3, 0.2, 0.1]), rows, True, generator=noise(seed, kind))

    y = draw(195)
    exact = dist.Dirichlet(2.0 + torch.bincount(y, minlength=4).float())
    posterior = fit(model, y, "multivariate_normal", steps=2000, seed=seed)
    return Fitted(posterior, draw(196), train=(y,), truth={"p": (exact.mean, exact.variance.sqrt())})


# -- wrong weights --------------------------------------------------------------------------------------------------


@wrong("style", "closed form", "the likelihood weighs {weight} times", weight=(10, 0.1, 4, 0.25))
def scaled_likelihood(seed: int, weight: float) -> Fitted:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with poutine.scale(scale=weight), pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y, fresh = readings(100, seed, 197), readings(100, seed, 198)
    posterior = fit(model, y, "normal", steps=1500, seed=seed)
    return Fitted(posterior, fresh, train=(y,), truth={"mu": mean_posterior(y)})


@wrong("style", "closed form", "minibatches of {size} of 400 rows without the factor N / B", size=(20, 80))
def unweighted_minibatches(seed: int, size: int) -> Fitted:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        rows = torch.randint(len(y), (size,))
        with pyro.plate("rows", size):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    def guide(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("mu", dist.Normal(loc, scale))

    y, fresh = readings(400, seed, 199), readings(400, seed, 200)
    posterior = fit(model, y, guide, steps=3000, seed=seed, optimizer=dp.Optimizer(learning_rate=0.01))
    return Fitted(posterior, fresh, train=(y,), truth={"mu": mean_posterior(y)})


@wrong("style", "closed form", "the same rows are observed {times} times", times=(4,))
def counted_twice(seed: int, times: int) -> Fitted:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y, fresh = readings(60, seed, 201), readings(60, seed, 202)
    posterior = fit(model, y.repeat(times), "normal", steps=1500, seed=seed)
    return Fitted(posterior, fresh, train=(y.repeat(times),), truth={"mu": mean_posterior(y)})
