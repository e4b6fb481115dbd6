"""Deterministic sites, and sites that are reparameterized."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import transforms
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal
from pyro.infer.reparam import (
    AutoReparam,
    LatentStableReparam,
    LocScaleReparam,
    ProjectedNormalReparam,
    StudentTReparam,
    TransformReparam,
)
from torch import Tensor

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise


@kind("deterministic and reparameterized sites")
def means_by_hand(sizes: Sizes) -> UserProgram:
    group = torch.arange(sizes.rows) % sizes.groups
    y = 1.0 + group + noise(sizes.rows)

    def model(group: Tensor, y: Tensor | None = None) -> Tensor:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("groups", sizes.groups):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            theta = pyro.deterministic("theta", mu + 2.0 * eta)
        with pyro.plate("rows", len(group)):
            mean = pyro.deterministic("mean", theta[group])
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        return theta

    def answer(posterior: Posterior) -> None:
        count = torch.bincount(group).float()
        prior = 25.0 + 4.0 * torch.eye(sizes.groups)
        covariance = torch.linalg.inv(torch.linalg.inv(prior) + count.diag())
        mean = covariance @ torch.zeros(sizes.groups).index_add(0, group, y)
        draws = posterior.sample(group, y, draws=2000)
        torch.testing.assert_close(draws["theta"].mean(0), mean, atol=0.05, rtol=0)
        torch.testing.assert_close(draws["theta"].std(0), covariance.diagonal().sqrt(), atol=0.0, rtol=0.2)
        assert torch.equal(draws["mean"], draws["theta"][:, group])

    return UserProgram(model, AutoMultivariateNormal, (group, y), rows=sizes.rows, answer=answer)


@kind("deterministic and reparameterized sites")
def non_centered_schools(sizes: Sizes) -> UserProgram:
    y, sigma = 5 * noise(sizes.rows), 2.0 + torch.arange(sizes.rows) % 3

    @poutine.reparam(config={"theta": LocScaleReparam(0.0)})
    def model(sigma: Tensor, y: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(sigma)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return UserProgram(model, AutoDiagonalNormal, (sigma, y), rows=sizes.rows)


@kind("deterministic and reparameterized sites")
def learned_centering(sizes: Sizes) -> UserProgram:
    group, y = torch.arange(sizes.rows) % sizes.groups, noise(sizes.rows)

    def centered(group: Tensor, y: Tensor | None = None) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", sizes.groups):
            effect = pyro.sample("effect", dist.Normal(torch.zeros(2), scale.unsqueeze(-1)).to_event(1))
        with pyro.plate("rows", len(group)):
            pyro.sample("y", dist.Normal(effect[group].sum(-1), 1.0), obs=y)

    model = poutine.reparam(centered, config={"effect": LocScaleReparam(shape_params=[])})
    return UserProgram(model, "normal", (group, y), rows=sizes.rows)


@kind("deterministic and reparameterized sites")
def transformed_rates(sizes: Sizes) -> UserProgram:
    counts = torch.arange(sizes.rows) % 6.0

    @poutine.reparam(config={"rate": TransformReparam(), "share": TransformReparam()})
    def model(counts: Tensor | None = None) -> None:
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        share = pyro.sample(
            "share", dist.TransformedDistribution(dist.Normal(0.0, 1.0), [transforms.SigmoidTransform()])
        )
        with pyro.plate("rows", sizes.rows):
            rate = pyro.sample("rate", dist.LogNormal(0.5, spread))
            pyro.sample("y", dist.Poisson(share * rate), obs=counts)

    return UserProgram(model, "normal", (counts,), rows=sizes.rows)


@kind("deterministic and reparameterized sites")
def contrasts(sizes: Sizes) -> UserProgram:
    arm, y = torch.arange(sizes.rows) % sizes.groups, noise(sizes.rows)

    def model(arm: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("arms", sizes.groups):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.deterministic("contrast", mean[1:] - mean[0])
        pyro.deterministic("best", mean.max(-1).values)
        sd = pyro.deterministic("sd", pyro.sample("log_sd", dist.Normal(0.0, 0.5)).exp())
        with pyro.plate("rows", len(arm)):
            fitted = pyro.deterministic("fitted", mean[arm])
            pyro.sample("y", dist.Normal(fitted, sd), obs=y)

    return UserProgram(model, "normal", (arm, y), rows=sizes.rows)


@kind("deterministic and reparameterized sites")
def robust_effects(sizes: Sizes) -> UserProgram:
    y = noise(sizes.rows)

    @poutine.reparam(config={"effect": StudentTReparam()})
    def model(y: Tensor | None = None) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", sizes.rows):
            effect = pyro.sample("effect", dist.StudentT(4.0, mean, 1.0))
            pyro.sample("y", dist.Normal(effect, 0.5), obs=y)

    return UserProgram(model, "normal", (y,), rows=sizes.rows)


@kind("deterministic and reparameterized sites")
def directions(sizes: Sizes) -> UserProgram:
    y = torch.nn.functional.normalize(noise(sizes.rows, 2), dim=-1)

    @poutine.reparam(config={"direction": ProjectedNormalReparam()})
    def model(y: Tensor | None = None) -> None:
        direction = pyro.sample("direction", dist.ProjectedNormal(torch.zeros(2)))
        with pyro.plate("rows", sizes.rows):
            pyro.sample("y", dist.Normal(direction, 0.5).to_event(1), obs=y)

    return UserProgram(model, "normal", (y,), rows=sizes.rows)


@kind("deterministic and reparameterized sites")
def all_sites_reparameterized(sizes: Sizes) -> UserProgram:
    x, y = noise(sizes.rows), noise(sizes.rows, seed=1)

    @AutoReparam()
    def model(x: Tensor, y: Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        spread = pyro.sample("spread", dist.LogNormal(0.0, 0.5))
        with pyro.plate("rows", len(x)):
            effect = pyro.sample("effect", dist.Normal(slope * x, spread))
            pyro.sample("y", dist.Normal(effect, 0.5), obs=y)

    return UserProgram(model, "normal", (x, y), rows=sizes.rows)


@kind("deterministic and reparameterized sites")
def heavy_tailed_levels(sizes: Sizes) -> UserProgram:
    y = noise(sizes.rows).cumsum(0)

    @poutine.reparam(config={"jumps": LatentStableReparam()})
    def model(y: Tensor | None = None) -> None:
        scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.5))
        time = pyro.plate("time", sizes.rows)
        with time:
            jumps = pyro.sample("jumps", dist.Stable(1.7, 0.0, scale))
        level = jumps.cumsum(-1)
        with time:
            pyro.sample("y", dist.Normal(level, 0.5), obs=y)

    return UserProgram(model, "normal", (y,), rows=sizes.rows)
