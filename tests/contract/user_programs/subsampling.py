"""Plates that draw some of their rows by themselves in every run."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise


@kind("plates that subsample by themselves")
def mean_of_some_rows(sizes: Sizes) -> UserProgram:
    y = 1.0 + noise(sizes.rows)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y), subsample_size=max(2, len(y) // 2)) as i:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[i])

    def answer(posterior: Posterior) -> None:
        precision = 1 / 9 + len(y)
        mu = posterior.sample(draws=2000)["mu"]
        assert float(mu.mean()) == pytest.approx(float(y.sum()) / precision, abs=0.1)
        exact = dist.MultivariateNormal(torch.zeros(len(y)), torch.eye(len(y)) + 9.0).log_prob(y)
        assert float(posterior.log_evidence(y, particles=4000)) == pytest.approx(float(exact), abs=0.1)

    return UserProgram(model, "normal", (y,), rows=sizes.rows, answer=answer, learning_rate=0.01, steps=2000)


@kind("plates that subsample by themselves")
def coin_with_a_guide_by_hand(sizes: Sizes) -> UserProgram:
    """The data lie in the closure; the model takes no argument."""
    data = (noise(sizes.rows) > -0.5).float()

    def model() -> None:
        fairness = pyro.sample("fairness", dist.Beta(10.0, 10.0))
        with pyro.plate("flips", size=len(data), subsample_size=2) as indices:
            pyro.sample("y", dist.Bernoulli(fairness), obs=data.index_select(0, indices))

    def guide() -> None:
        a = pyro.param("a", torch.tensor(15.0), constraint=constraints.positive)
        b = pyro.param("b", torch.tensor(15.0), constraint=constraints.positive)
        pyro.sample("fairness", dist.Beta(a, b))

    return UserProgram(model, guide, rows=sizes.rows)


@kind("plates that subsample by themselves")
def codes_of_some_rows(sizes: Sizes) -> UserProgram:
    """Every row has a code, whose parameters the guide keeps for all rows and indexes."""
    y = noise(sizes.rows, sizes.groups)

    def model(y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(sizes.groups), 1.0).to_event(1))
        with pyro.plate("rows", len(y), subsample_size=2) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z[..., None] * weight.unsqueeze(-2), 0.5).to_event(1), obs=y[i])

    def guide(y: Tensor) -> None:
        w = pyro.param("w", torch.ones(sizes.groups))
        pyro.sample("weight", dist.Normal(w, 0.1).to_event(1))
        loc = pyro.param("loc", torch.zeros(len(y)))
        scale = pyro.param("scale", torch.ones(len(y)), constraint=constraints.positive)
        with pyro.plate("rows", len(y), subsample_size=2) as i:
            pyro.sample("z", dist.Normal(loc[i], scale[i]))

    return UserProgram(model, guide, (y,), rows=sizes.rows)


@kind("plates that subsample by themselves")
def covariates_by_pyro_subsample(sizes: Sizes) -> UserProgram:
    """``pyro.subsample`` cuts tensors to the rows that the plate drew."""
    x = noise(sizes.rows, sizes.groups)
    y = x.sum(1) + 0.3 * noise(sizes.rows, seed=1)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(sizes.groups), 1.0).to_event(1))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
        with pyro.plate("rows", len(x), subsample_size=3):
            features, target = pyro.subsample(x, event_dim=1), pyro.subsample(y, event_dim=0)
            pyro.sample("y", dist.Normal((features * w.unsqueeze(-2)).sum(-1), sigma), obs=target)

    return UserProgram(model, "normal", (x, y), rows=sizes.rows)


@kind("plates that subsample by themselves")
def both_axes_of_a_table(sizes: Sizes) -> UserProgram:
    """Crossed plates, each of which draws some of its indices."""
    table = noise(sizes.rows, sizes.groups)

    def model(table: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        rows = pyro.plate("rows", table.shape[0], subsample_size=2, dim=-2)
        columns = pyro.plate("columns", table.shape[1], subsample_size=2, dim=-1)
        with rows:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with columns:
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with rows as i, columns as j:
            pyro.sample("y", dist.Normal(mean + a + b, 0.5), obs=table[i][:, j])

    return UserProgram(model, "normal", (table,), rows=table.numel())


@kind("plates that subsample by themselves")
def encoder_of_some_rows(sizes: Sizes) -> UserProgram:
    """An amortized guide, whose encoder reads the rows that its own plate drew; both plates draw the same ones."""
    images = (noise(sizes.rows, 2 * sizes.groups) > 0).float()
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(2 * sizes.groups, 4), nn.Linear(2, 2 * sizes.groups)

    def model(images: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(images), subsample_size=2) as i:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=images[i])

    def guide(images: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("images", len(images), subsample_size=2) as i:
            loc, log_scale = encoder(images[i]).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return UserProgram(model, guide, (images,), rows=sizes.rows)


@kind("plates that subsample by themselves")
def loop_over_some_rows(sizes: Sizes) -> UserProgram:
    """A sequential plate: every run observes the sites of the rows that it drew."""
    data = (noise(sizes.rows) > 0).float()

    def model(data: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        for i in pyro.plate("loop", len(data), subsample_size=2):
            pyro.sample(f"y_{int(i)}", dist.Bernoulli(p), obs=data[int(i)])

    observed = tuple(f"y_{i}" for i in range(sizes.rows))
    return UserProgram(model, "normal", (data,), rows=sizes.rows, observed=observed, eager="value of a tensor")
