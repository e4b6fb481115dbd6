"""Plates without a size: ``pyro.plate("rows")``, whose size the distributions give."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor, nn

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise


@kind("plates without a size")
def normal_mean(sizes: Sizes) -> UserProgram:
    y = 2.0 + noise(sizes.rows)

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("rows"):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    def answer(posterior: Posterior) -> None:
        precision = 1 / 9 + sizes.rows
        mean = posterior.sample(draws=3000)["mean"]
        assert abs(float(mean.mean()) - float(y.sum()) / precision) < 0.02
        assert abs(float(mean.std()) * precision**0.5 - 1) < 0.1
        marginal = dist.MultivariateNormal(torch.zeros(len(y)), 9.0 + torch.eye(len(y)))
        assert abs(float(posterior.log_evidence(y, particles=1000)) - float(marginal.log_prob(y))) < 0.05

    return UserProgram(model, "normal", (y,), rows=sizes.rows, answer=answer)


@kind("plates without a size")
def regression(sizes: Sizes) -> UserProgram:
    x = noise(sizes.rows, sizes.groups)
    y = x.sum(1) + noise(sizes.rows, seed=1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows"):
            pyro.sample("y", dist.Normal(x @ w + b, 1.0), obs=y)

    return UserProgram(model, AutoMultivariateNormal, (x, y), rows=sizes.rows)


@kind("plates without a size")
def codes_of_rows(sizes: Sizes) -> UserProgram:
    x = noise(sizes.rows, 4)
    encoder, decoder = nn.Linear(4, 4), nn.Linear(2, 4)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("rows"):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("rows"):
            loc, scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    return UserProgram(model, guide, (x,), rows=sizes.rows)


@kind("plates without a size")
def groups_of_a_size_and_rows_without(sizes: Sizes) -> UserProgram:
    group, y = torch.arange(sizes.rows) % sizes.groups, noise(sizes.rows)

    def model(group: Tensor, y: Tensor | None = None) -> None:
        scale = pyro.sample("scale", dist.Exponential(1.0))
        with pyro.plate("groups", sizes.groups):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        with pyro.plate("rows"):
            pyro.sample("y", dist.Normal(effect[group], scale), obs=y)

    return UserProgram(model, "normal", (group, y), rows=sizes.rows)


@kind("plates without a size")
def local_effects(sizes: Sizes) -> UserProgram:
    exposure, y = 1.0 + torch.arange(sizes.rows) % 2, torch.arange(sizes.rows) % 4.0

    def model(exposure: Tensor, y: Tensor | None = None) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        sd = pyro.sample("sd", dist.HalfNormal(1.0))
        with pyro.plate("observations", dim=-1):
            effect = pyro.sample("effect", dist.Normal(mean, sd).expand([len(exposure)]))
            pyro.sample("y", dist.Poisson(exposure * effect.exp()), obs=y)

    def guide(exposure: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("mean", dist.Normal(pyro.param("mean_loc", torch.tensor(0.0)), 0.5))
        pyro.sample("sd", dist.LogNormal(pyro.param("sd_loc", torch.tensor(-0.5)), 0.2))
        loc = pyro.param("loc", torch.zeros(len(exposure)))
        with pyro.plate("observations", dim=-1):
            pyro.sample("effect", dist.Normal(loc, 0.3))

    return UserProgram(model, guide, (exposure, y), rows=sizes.rows)


@kind("plates without a size")
def two_components(sizes: Sizes) -> UserProgram:
    y = noise(sizes.rows) + 3.0 * (torch.arange(sizes.rows) % 2)

    def model(y: Tensor) -> None:
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        low = pyro.sample("low", dist.Normal(0.0, 1.0))
        gap = pyro.sample("gap", dist.LogNormal(1.0, 0.5))
        with pyro.plate("rows"):
            upper = pyro.sample("upper", dist.Bernoulli(share.expand([len(y)])), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(low + gap * upper, 1.0), obs=y)

    return UserProgram(model, "normal", (y,), rows=sizes.rows, pyro=TraceEnum_ELBO)


@kind("plates without a size")
def weighted_counts(sizes: Sizes) -> UserProgram:
    y, weight = torch.arange(sizes.rows) % 5.0, torch.tensor(0.5)

    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        dispersion = pyro.sample("dispersion", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows"), pyro.poutine.scale(scale=weight):
            pyro.sample("y", dist.GammaPoisson(dispersion, dispersion / rate), obs=y)

    return UserProgram(model, "normal", (y,), rows=sizes.rows)
