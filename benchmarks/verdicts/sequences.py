"""Series and sequences: autoregressions, local levels, hidden Markov models, deep Markov models."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate
from torch import Tensor

from deepprob.models import DeepMarkovModel
from deepprob.posteriors.posterior import Posterior
from verdicts.registry import Fitted, Nats, good, wrong
from verdicts.truths import density_posterior, fit, gaussian_guide, linear_posterior, moments, noise

# -- autoregressions ------------------------------------------------------------------------------------------------


def autoregression(y: Tensor) -> None:
    phi = pyro.sample("phi", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    before = torch.stack([y[1:-1], y[:-2]], -1)
    with pyro.plate("times", len(y) - 2):
        pyro.sample("y", dist.Normal((before * phi).sum(-1), 1.0), obs=y[2:])


def series(length: int, seed: int, kind: int, season: float = 0.0) -> Tensor:
    g = noise(seed, kind)
    y = [torch.zeros(()), torch.zeros(())]
    for t in range(length):
        step = torch.randn((), generator=g) + season * torch.sin(torch.tensor(2 * torch.pi * t / 12))
        y.append(0.5 * y[-1] - 0.3 * y[-2] + step)
    return torch.stack(y)


@good("sequence", "closed form", "an autoregression under a full covariance", length=(50, 400))
def autoregressive_series(seed: int, length: int) -> Fitted:
    y = series(length, seed, 120)
    posterior = fit(autoregression, y, "multivariate_normal", steps=2000, seed=seed)
    exact = linear_posterior(torch.stack([y[1:-1], y[:-2]], -1), y[2:])
    return Fitted(posterior, y, train=(y,), truth={"phi": exact[:]})


@wrong("sequence", "closed form", "guide of an autoregression, width {width}, {shift} sds off",
       width=(0.2, 3, 1), shift=(0, 0, 2))  # fmt: skip
def autoregression_widths(seed: int, width: float, shift: float) -> Fitted:
    y = series(200, seed, 121)
    exact = linear_posterior(torch.stack([y[1:-1], y[:-2]], -1), y[2:])
    posterior = fit(autoregression, y, gaussian_guide("phi", exact, width, shift), steps=800, seed=seed)
    return Fitted(posterior, y, train=(y,), truth={"phi": exact[:]})


# -- local levels ---------------------------------------------------------------------------------------------------


def local_level(y: Tensor) -> None:
    steps = pyro.sample("steps", dist.Normal(torch.zeros(len(y)), 0.4).to_event(1))
    pyro.sample("y", dist.Normal(steps.cumsum(-1), 1.0).to_event(1), obs=y)


@good("sequence", "closed form", "a local level of {length} times under a full covariance", length=(10, 30),
      guide=("multivariate_normal", "multivariate_normal"))  # fmt: skip
@wrong("sequence", "closed form", "mean field over a level whose steps depend on each other", length=(30, 60),
       guide=("normal", "normal"))  # fmt: skip
def level_of_a_series(seed: int, length: int, guide: str) -> Fitted:
    g = noise(seed, 122)
    y = 0.4 * torch.randn(length, generator=g).cumsum(0) + torch.randn(length, generator=g)
    posterior = fit(local_level, y, guide, steps=3000, seed=seed)
    exact = linear_posterior(torch.ones(length, length).tril(), y, prior=0.4)
    sums = torch.ones(length, length, dtype=torch.float64).tril()
    level = sums @ exact.mean, (sums @ exact.cov @ sums.T).diagonal().sqrt()
    return Fitted(
        posterior, y, train=(y,), truth={"steps": exact[:], "level": level},
        view=lambda draws: draws | {"level": draws["steps"].cumsum(-1)},
    )  # fmt: skip


# -- hidden Markov models -------------------------------------------------------------------------------------------


def hidden_states(y: Tensor) -> None:
    stay = pyro.sample("stay", dist.Beta(torch.full((2,), 4.0), 2.0).to_event(1))
    mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 0.5).to_event(1))
    leave = 1 - stay
    flip = torch.stack(
        [torch.stack([stay[..., 0], leave[..., 0]], -1), torch.stack([leave[..., 1], stay[..., 1]], -1)], -2
    )
    emission = dist.Normal(mu, 0.6)
    pyro.sample("y", dist.DiscreteHMM(torch.zeros(2), flip.log(), emission), obs=y)


@config_enumerate
def states_in_a_loop(y: Tensor) -> None:
    stay = pyro.sample("stay", dist.Beta(torch.full((2,), 4.0), 2.0).to_event(1))
    mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 0.5).to_event(1))
    flip = torch.stack([torch.stack([stay[0], 1 - stay[0]]), torch.stack([1 - stay[1], stay[1]])])
    state = None
    for t in pyro.markov(range(len(y))):
        probs = torch.tensor([0.5, 0.5]) if state is None else flip[state]
        state = pyro.sample(f"state_{t}", dist.Categorical(probs))
        pyro.sample(f"y_{t}", dist.Normal(mu[state], 0.6), obs=y[t])


def switching(length: int, seed: int, kind: int) -> Tensor:
    g = noise(seed, kind)
    state, out = 0, []
    for _ in range(length):
        state = 1 - state if float(torch.rand((), generator=g)) < 0.2 else state
        out.append((2 * state - 1) + 0.6 * torch.randn((), generator=g))
    return torch.stack(out)


def states_truth(y: Tensor, first_step: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """By the forward algorithm; ``first_step`` says whether the chain moves before the first value."""
    y = y.double()

    def joint(z: Tensor) -> Tensor:
        stay, mu = torch.sigmoid(z[:, :2]), z[:, 2:]
        prior = dist.Beta(torch.tensor(4.0).double(), 2.0).log_prob(stay).sum(1) + (stay * (1 - stay)).log().sum(1)
        prior = prior + dist.Normal(torch.tensor([-1.0, 1.0]).double(), 0.5).log_prob(mu).sum(1)
        move = torch.stack([stay[:, 0], 1 - stay[:, 0], 1 - stay[:, 1], stay[:, 1]], 1).reshape(-1, 2, 2).log()
        state = torch.full((len(z), 2), 0.5).double().log()
        for t in range(len(y)):
            if t or first_step:
                state = torch.logsumexp(state[:, :, None] + move, 1)
            state = state + dist.Normal(mu, 0.6).log_prob(y[t])
        return prior + torch.logsumexp(state, 1)

    z = density_posterior(joint, torch.tensor([1.0, 1.0, -1.0, 1.0]))
    return {"stay": moments(torch.sigmoid(z[:, :2])), "mu": moments(z[:, 2:])}


@good("sequence", "reference draws", "a hidden Markov model, its states summed out", length=(80, 200))
def hidden_markov_model(seed: int, length: int) -> Fitted:
    y = switching(length, seed, 123)
    posterior = fit(hidden_states, y, "multivariate_normal", steps=1500, seed=seed)
    return Fitted(posterior, y, train=(y,), truth=states_truth(y, first_step=True))


@good(
    "sequence", "reference draws", "a chain of enumerated states in a loop", length=(15,), steps=(700,), start=(None,)
)
@wrong("sequence", "reference draws", "{steps} steps from a far start", length=(15,), steps=(40,), start=("far",))
def enumerated_chain(seed: int, length: int, steps: int, start: str | None) -> Fitted:
    def guide(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([3.0, -3.0]))
        pyro.sample("mu", dist.Normal(loc, 0.3).to_event(1))
        raw = pyro.param("raw", torch.zeros(2))
        pyro.sample("stay", dist.Beta(2 + raw.exp(), 2.0).to_event(1))

    y = switching(length, seed, 124)
    posterior = fit(states_in_a_loop, y, guide if start else "multivariate_normal", steps=steps, seed=seed)
    return Fitted(posterior, y, train=(y,), truth=states_truth(y, first_step=False))


# -- deep Markov models ---------------------------------------------------------------------------------------------


LENGTH = 6
MIX = torch.tensor([[1.0, 0.2, -0.5], [0.0, 0.9, 0.7]])


def paths(count: int, seed: int, kind: int) -> Tensor:
    g = noise(seed, kind)
    z, out = torch.randn(count, 2, generator=g), []
    for _ in range(LENGTH):
        z = 0.9 * z + 0.4 * torch.randn(count, 2, generator=g)
        out.append(z @ MIX + 0.5 * torch.randn(count, 3, generator=g))
    return torch.stack(out, 1)


def path_nats(posterior: Posterior, x: Tensor) -> Nats:
    """Against the exact density of the linear chain, per sequence."""
    states = []  # covariance of z_1, ..., z_T
    var = torch.eye(2).double()
    for _ in range(LENGTH):
        var = 0.81 * var + 0.16 * torch.eye(2).double()
        states.append(var)
    mix = MIX.double()
    blocks = [[mix.T @ (0.9 ** abs(s - t) * states[min(s, t)]) @ mix for t in range(LENGTH)] for s in range(LENGTH)]
    cov = torch.cat([torch.cat(row, 1) for row in blocks]) + 0.25 * torch.eye(3 * LENGTH).double()
    flat = x.double().flatten(1)
    true = dist.MultivariateNormal(torch.zeros(len(cov)).double(), cov).log_prob(flat).mean()
    plain = dist.Normal(flat.mean(0), flat.std(0)).log_prob(flat).sum(1).mean()
    bound = posterior.elbo(x, particles=20, seed=5).double().mean()
    return Nats(float(true - bound), float(true - plain))


@good("sequence", "closed form", "a deep Markov model, trained to the end", rows=(2000,), steps=(2000,))
@wrong("sequence", "closed form", "a deep Markov model, trained for {steps} steps", rows=(400, 400), steps=(30, 120))
def deep_markov_model(seed: int, rows: int, steps: int) -> Fitted:
    x, fresh = paths(rows, seed, 125), paths(300, seed, 126)
    program = DeepMarkovModel(3, 2, 12, 12, dropout=0.0, cell="gru", likelihood="normal")
    posterior = fit(program, x, steps=steps, seed=seed)
    return Fitted(posterior, fresh, train=(x,), nats=lambda: path_nats(posterior, fresh))


@wrong("sequence", "constructed", "a series with a season, which the model does not know", season=(3.0, 2.0))
def unknown_season(seed: int, season: float) -> Fitted:
    def with_noise(y: Tensor) -> None:
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("times", len(y) - 1):
            pyro.sample("y", dist.Normal(phi * y[:-1], sigma), obs=y[1:])

    y = series(240, seed, 127, season)
    posterior = fit(with_noise, y, "multivariate_normal", steps=1500, seed=seed)

    def nats() -> Nats:
        wave = torch.sin(2 * torch.pi * torch.arange(len(y) - 2) / 12)
        true = dist.Normal(0.5 * y[1:-1] - 0.3 * y[:-2] + season * wave, 1.0).log_prob(y[2:])
        own = posterior.log_likelihood(y, draws=500).logsumexp(0) - torch.tensor(500.0).log()
        plain = dist.Normal(y.mean(), y.std()).log_prob(y[2:])
        return Nats(float(true.mean() - own.mean()), float(true.mean() - plain.mean()))

    return Fitted(posterior, y, train=(y,), nats=nats)
