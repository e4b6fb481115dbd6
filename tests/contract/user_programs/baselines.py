"""Sites without a reparameterised draw: the score-function estimator, with the baselines that Pyro knows."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceGraph_ELBO
from torch import Tensor, nn
from torch.distributions import constraints

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise


class NotReparameterized(dist.Beta):  # type: ignore[misc]
    """A Beta whose draws have no gradient."""

    has_rsample = False


@kind("score-function sites with baselines")
def switch_with_decaying_average(sizes: Sizes) -> UserProgram:
    """A switch turns an effect on or off for all rows; its baseline is a running average."""
    y = 0.22 + noise(sizes.rows)

    def model(y: Tensor) -> None:
        on = pyro.sample("on", dist.Bernoulli(0.5))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(0.5 * on, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.5), constraint=constraints.unit_interval)
        baseline = {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}
        pyro.sample("on", dist.Bernoulli(p), infer={"baseline": baseline})

    def answer(posterior: Posterior) -> None:
        odds = dist.Normal(0.5, 1.0).log_prob(y).sum() - dist.Normal(0.0, 1.0).log_prob(y).sum()
        assert float(posterior.parameters()["p"]) == pytest.approx(float(odds.sigmoid()), abs=0.02)
        evidence = (
            torch.logaddexp(dist.Normal(0.5, 1.0).log_prob(y).sum(), dist.Normal(0.0, 1.0).log_prob(y).sum())
            - torch.tensor(2.0).log()
        )
        assert float(posterior.log_evidence(y, particles=4000)) == pytest.approx(float(evidence), abs=0.01)

    settings = {"learning_rate": 0.1, "steps": 3000}  # after 1000 steps p is still on its way
    return UserProgram(model, guide, (y,), rows=sizes.rows, pyro=TraceGraph_ELBO, answer=answer, **settings)


@kind("score-function sites with baselines")
def fairness_without_gradient(sizes: Sizes) -> UserProgram:
    """A Beta that cannot be reparameterised, with a decaying average of the default rate."""
    flips = (noise(sizes.rows) > -0.5).float()

    def model(flips: Tensor, *, strict: bool = False) -> None:
        p = pyro.sample("p", dist.Beta(10.0, 10.0))
        with pyro.plate("flips", len(flips)):
            pyro.sample("y", dist.Bernoulli(p), obs=flips)

    def guide(flips: Tensor, *, strict: bool = False) -> None:
        a = pyro.param("a", torch.tensor(15.0), constraint=constraints.positive)
        b = pyro.param("b", torch.tensor(15.0), constraint=constraints.positive)
        options = {"baseline": {"use_decaying_avg_baseline": True}}
        pyro.sample("p", NotReparameterized(a, b), infer=options)

    return UserProgram(model, guide, (flips,), rows=sizes.rows, pyro=TraceGraph_ELBO)


@kind("score-function sites with baselines")
def classes_with_a_baseline_network(sizes: Sizes) -> UserProgram:
    """One class a row, drawn by an encoder; a network predicts the cost from the row."""
    x = noise(sizes.rows, 2)
    torch.manual_seed(0)
    encoder = nn.Linear(2, sizes.groups)
    critic = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))

    def model(x: Tensor) -> None:
        centers = pyro.param("centers", lambda: noise(sizes.groups, 2, seed=3))
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(sizes.groups)))
            pyro.sample("y", dist.Normal(centers[k], 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        pyro.module("critic", critic)
        with pyro.plate("rows", len(x)):
            options = {"baseline": {"nn_baseline": critic, "nn_baseline_input": x}}
            pyro.sample("k", dist.Categorical(logits=encoder(x)), infer=options)

    return UserProgram(model, guide, (x,), rows=sizes.rows, pyro=TraceGraph_ELBO)


@kind("score-function sites with baselines")
def binary_codes_with_both_baselines(sizes: Sizes) -> UserProgram:
    """A sigmoid belief network: binary codes of images, a network and a running average."""
    images = (noise(sizes.rows, 2 * sizes.groups) > 0).float()
    torch.manual_seed(0)
    encoder, decoder, critic = (
        nn.Linear(2 * sizes.groups, 2),
        nn.Linear(2, 2 * sizes.groups),
        nn.Linear(2 * sizes.groups, 1),
    )

    def model(images: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(images)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            pyro.sample("y", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=images)

    def guide(images: Tensor) -> None:
        pyro.module("encoder", encoder)
        pyro.module("critic", critic)
        baseline = {
            "nn_baseline": lambda x: critic(x).squeeze(-1),
            "nn_baseline_input": images,
            "use_decaying_avg_baseline": True,
            "baseline_beta": 0.8,
        }
        with pyro.plate("images", len(images)):
            pyro.sample("z", dist.Bernoulli(logits=encoder(images)).to_event(1), infer={"baseline": baseline})

    return UserProgram(model, guide, (images,), rows=sizes.rows, pyro=TraceGraph_ELBO)


@kind("score-function sites with baselines")
def counts_with_a_given_value(sizes: Sizes) -> UserProgram:
    """A number of hidden events for every row; the baseline is a value that the guide computes."""
    y = torch.arange(sizes.rows) % 4 + noise(sizes.rows)

    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        with pyro.plate("rows", len(y)):
            n = pyro.sample("n", dist.Poisson(1.5))
            pyro.sample("y", dist.Normal(n, scale), obs=y)

    def guide(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("scale", dist.LogNormal(loc, 0.1))
        rate = pyro.param("rate", lambda: torch.ones(len(y)), constraint=constraints.positive)
        level = pyro.param("level", lambda: torch.zeros(len(y)))
        with pyro.plate("rows", len(y)):
            pyro.sample("n", dist.Poisson(rate), infer={"baseline": {"baseline_value": level.detach() - 1.0}})

    return UserProgram(model, guide, (y,), rows=sizes.rows, pyro=TraceGraph_ELBO)


@kind("score-function sites with baselines")
def changepoint_without_a_baseline(sizes: Sizes) -> UserProgram:
    """The day of a change, one draw for the whole series, beside two reparameterised rates."""
    y = torch.cat([torch.ones(sizes.rows // 2), torch.full((sizes.rows - sizes.rows // 2,), 4.0)])

    def model(y: Tensor) -> None:
        before = pyro.sample("before", dist.LogNormal(0.0, 1.0))
        after = pyro.sample("after", dist.LogNormal(0.0, 1.0))
        day = pyro.sample("day", dist.Categorical(torch.ones(len(y))))
        rate = torch.where(torch.arange(len(y)) < day, before, after)
        with pyro.plate("days", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    def guide(y: Tensor) -> None:
        for name in ("before", "after"):
            loc = pyro.param(f"{name}_loc", torch.tensor(0.0))
            scale = pyro.param(f"{name}_scale", torch.tensor(0.5), constraint=constraints.positive)
            pyro.sample(name, dist.LogNormal(loc, scale))
        pyro.sample("day", dist.Categorical(logits=pyro.param("day_logits", lambda: torch.zeros(len(y)))))

    return UserProgram(model, guide, (y,), rows=sizes.rows)
