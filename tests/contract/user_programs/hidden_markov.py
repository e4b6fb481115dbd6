"""Hidden Markov models written as loops, whose states are summed out."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise


@kind("hidden Markov loops")
def two_regimes(sizes: Sizes) -> UserProgram:
    y = torch.cat([noise(2) - 1.0, noise(2, seed=1) + 2.0])
    transition, locs = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([-1.0, 2.0])

    def model(y: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        state = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            state = pyro.sample(f"state_{t}", dist.Categorical(transition[state]), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{t}", dist.Normal(locs[state] + shift, 1.0), obs=y[t])

    def answer(posterior: Posterior) -> None:
        grid = torch.linspace(-5, 5, 2001)
        forward = dist.Normal(0.0, 1.0).log_prob(grid)[:, None] + torch.tensor([0.0, -torch.inf])
        for value in y:
            forward = torch.logsumexp(forward[:, :, None] + transition.log(), 1)
            forward = forward + dist.Normal(locs + grid[:, None], 1.0).log_prob(value)
        total = forward.logsumexp(1)
        evidence = total.logsumexp(0) + torch.log(grid[1] - grid[0])
        torch.testing.assert_close(posterior.log_evidence(y, particles=4000), evidence, atol=0.05, rtol=0)
        weights = total.softmax(0)
        mean = (weights * grid).sum()
        torch.testing.assert_close(posterior.sample(draws=2000)["shift"].mean(), mean, atol=0.15, rtol=0)

    observed = ("y_0", "y_1", "y_2", "y_3")
    return UserProgram(model, "normal", (y,), rows=1, observed=observed, pyro=TraceEnum_ELBO, answer=answer)


@kind("hidden Markov loops")
def chorales(sizes: Sizes) -> UserProgram:
    tunes = (noise(sizes.rows, 4, 5) > 0).float()
    lengths = 1 + torch.arange(sizes.rows) % 4

    @config_enumerate
    def model(tunes: Tensor, lengths: Tensor) -> None:
        with poutine.mask(mask=torch.tensor(True)):
            x = 0.9 * torch.eye(sizes.groups) + 0.1
            probs_x = pyro.sample("probs_x", dist.Dirichlet(x).to_event(1))
            probs_y = pyro.sample("probs_y", dist.Beta(0.5, 0.9).expand([sizes.groups, 5]).to_event(2))
        tones_plate = pyro.plate("tones", 5, dim=-1)
        with pyro.plate("sequences", len(tunes), dim=-2):
            state = 0
            for t in pyro.markov(range(4)):
                with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                    state = pyro.sample(f"x_{t}", dist.Categorical(probs_x[state]))
                    with tones_plate:
                        pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[state.squeeze(-1)]), obs=tunes[:, t])

    return UserProgram(
        model, AutoDelta, (tunes, lengths), rows=sizes.rows, observed=("y_0", "y_1", "y_2", "y_3"),
        pyro=TraceEnum_ELBO, data_plate="sequences",
    )  # fmt: skip


@kind("hidden Markov loops")
def regimes_of_many_series(sizes: Sizes) -> UserProgram:
    y = noise(sizes.rows, 5).cumsum(1)

    @config_enumerate
    def model(y: Tensor) -> None:
        with pyro.plate("states", sizes.groups):
            transition = pyro.sample("transition", dist.Dirichlet(torch.ones(sizes.groups)))
            loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("series", len(y)):
            state = pyro.sample("state_0", dist.Categorical(torch.ones(sizes.groups)))
            for t in pyro.markov(range(5)):
                if t:
                    state = pyro.sample(f"state_{t}", dist.Categorical(transition[state]))
                pyro.sample(f"y_{t}", dist.Normal(loc[state], scale), obs=y[:, t])

    observed = tuple(f"y_{t}" for t in range(5))
    return UserProgram(model, "normal", (y,), rows=sizes.rows, observed=observed, pyro=TraceEnum_ELBO)


@kind("hidden Markov loops")
def factorial_chains(sizes: Sizes) -> UserProgram:
    y = noise(sizes.rows, 3)

    @config_enumerate
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2, sizes.groups), 1.0).to_event(2))
        stay_w = pyro.sample("stay_w", dist.Beta(4.0, 1.0))
        probs_x = pyro.sample("probs_x", dist.Dirichlet(torch.ones(sizes.groups, sizes.groups)).to_event(1))
        with pyro.plate("rows", len(y)):
            w, x = torch.tensor(0), torch.tensor(0)
            for t in pyro.markov(range(y.shape[1])):
                w = pyro.sample(f"w_{t}", dist.Bernoulli(torch.where(w == 1, stay_w, 1 - stay_w))).long()
                x = pyro.sample(f"x_{t}", dist.Categorical(Vindex(probs_x)[x]))
                pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[w, x], 1.0), obs=y[:, t])

    return UserProgram(model, "normal", (y,), rows=sizes.rows, observed=("y_0", "y_1", "y_2"), pyro=TraceEnum_ELBO)


@kind("hidden Markov loops")
def capture_and_recapture(sizes: Sizes) -> UserProgram:
    seen = (noise(sizes.rows, 4) > 0).float()
    seen[:, 0] = 1.0

    def model(seen: Tensor) -> None:
        survival = pyro.sample("survival", dist.Uniform(0.0, 1.0))
        recapture = pyro.sample("recapture", dist.Uniform(0.0, 1.0))
        with pyro.plate("animals", len(seen)):
            alive, first = torch.ones(len(seen)), seen[:, 0].bool()
            for t in pyro.markov(range(4)):
                with poutine.mask(mask=first):
                    alive = pyro.sample(f"alive_{t}", dist.Bernoulli(survival * alive), infer={"enumerate": "parallel"})
                    pyro.sample(f"seen_{t}", dist.Bernoulli(recapture * alive), obs=seen[:, t])

    observed = tuple(f"seen_{t}" for t in range(4))
    return UserProgram(model, "normal", (seen,), rows=sizes.rows, observed=observed, pyro=TraceEnum_ELBO)


@kind("hidden Markov loops")
def switching_autoregression(sizes: Sizes) -> UserProgram:
    y = noise(4).cumsum(0)

    @config_enumerate
    def model(y: Tensor) -> None:
        stay = pyro.param("stay", torch.tensor(0.8), constraint=constraints.unit_interval)
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2), 0.5).to_event(1))
        regime, before = torch.tensor(0), y.new_zeros(())
        for t, value in pyro.markov(enumerate(y)):
            regime = pyro.sample(f"regime_{t}", dist.Bernoulli(torch.where(regime == 1, stay, 1 - stay))).long()
            pyro.sample(f"y_{t}", dist.Normal(slope[regime] * before, scale[regime]), obs=value)
            before = value

    observed = tuple(f"y_{t}" for t in range(4))
    return UserProgram(model, "normal", (y,), rows=1, observed=observed, pyro=TraceEnum_ELBO)
