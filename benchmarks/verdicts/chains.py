"""Posteriors of draws: chains that agree, and chains that do not."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import deepprob as dp
from verdicts.glm import logistic, logistic_draws, patients
from verdicts.hierarchies import groups, noncentered, spread_draws
from verdicts.mixtures import clusters, mixture, mixture_draws
from verdicts.registry import Fitted, good, wrong
from verdicts.regressions import regression, rows_of
from verdicts.truths import linear_posterior, moments, noise


def autocorrelated(chains: int, draws: int, columns: int, rho: float, g: torch.Generator) -> Tensor:
    """Standard normal chains of an autoregression, which begin in equilibrium: ``(chains, draws, columns)``."""
    steps = torch.randn(chains, draws, columns, generator=g)
    for t in range(1, draws):
        steps[:, t] = rho * steps[:, t - 1] + (1 - rho**2) ** 0.5 * steps[:, t]
    return steps


@good("draws", "closed form", "{chains} chains of {draws} draws, correlated at {rho}", chains=(4, 4, 2, 8),
      draws=(1000, 500, 2000, 300), rho=(0.0, 0.5, 0.8, 0.2))  # fmt: skip
@wrong("draws", "closed form", "{chains} chains that hardly move, correlated at {rho}", chains=(2, 2),
       draws=(400, 200), rho=(0.999, 0.995))  # fmt: skip
def chains_of_a_regression(seed: int, chains: int, draws: int, rho: float) -> Fitted:
    train, fresh = rows_of(200, 3, seed, 150), rows_of(200, 3, seed, 151)
    exact = linear_posterior(*train)
    standard = autocorrelated(chains, draws, 3, rho, noise(seed, 152))
    values = (exact.mean.float() + standard @ exact.tril.T).contiguous()
    program = dp.Program.of(regression, data_plate="data")
    posterior = dp.draws_posterior(program, train, {"w": values}, seed=seed)
    return Fitted(posterior, fresh, train=train, truth={"w": exact[:]})


@wrong(
    "draws",
    "closed form",
    "{kind}",
    kind=("disjoint chains", "one chain is stuck", "chains that drift", "draws of the prior"),
)
def faulty_chains(seed: int, kind: str) -> Fitted:
    train, fresh = rows_of(200, 3, seed, 153), rows_of(200, 3, seed, 154)
    exact = linear_posterior(*train)
    standard = torch.randn(4, 500, 3, generator=noise(seed, 155))
    if kind == "disjoint chains":
        standard = 0.3 * standard + torch.tensor([-6.0, -2.0, 2.0, 6.0])[:, None, None]
    elif kind == "one chain is stuck":
        standard[0] = 3.0 + 0.01 * standard[0]
    elif kind == "chains that drift":
        standard = standard + torch.linspace(-6.0, 2.0, 500)[None, :, None]
    values = standard if kind == "draws of the prior" else (exact.mean.float() + standard @ exact.tril.T).contiguous()
    posterior = dp.draws_posterior(dp.Program.of(regression, data_plate="data"), train, {"w": values}, seed=seed)
    return Fitted(posterior, fresh, train=train, truth={"w": exact[:]})


@good("draws", "reference draws", "exact draws of a {kind}", kind=("logistic regression", "hierarchy"))
def independent_draws(seed: int, kind: str) -> Fitted:
    if kind == "logistic regression":
        train, fresh = patients(300, 3, seed, 156), patients(300, 3, seed, 157)
        found = {"w": logistic_draws(*train)}
        program = dp.Program.of(logistic, data_plate="data")
    else:
        group, y, again = groups(12, 6, seed, 158)
        train, fresh = (group, y), (group, again)
        drawn = spread_draws(group, y)
        found = {name: drawn[name] for name in ("mu", "tau", "z")}
        program = dp.Program.of(noncentered)
    chains = {name: x.float().reshape(4, -1, *x.shape[1:])[:, :1000].contiguous() for name, x in found.items()}
    posterior = dp.draws_posterior(program, train, chains, seed=seed)
    return Fitted(posterior, fresh, train=train, truth={name: moments(x) for name, x in found.items()})


@wrong("draws", "constructed", "each chain holds one order of the parts of a mixture", swapped=(1, 2))
def chains_that_switched_labels(seed: int, swapped: int) -> Fitted:
    y, fresh = clusters(100, (-2.0, 2.0), seed, 159), clusters(100, (-2.0, 2.0), seed, 160)
    loc, share = mixture_draws(y, (0.0, 0.0), 3.0)
    locs, shares = loc.float().reshape(4, -1, 2)[:, :500].clone(), share.float().reshape(4, -1)[:, :500].clone()
    locs[:swapped], shares[:swapped] = locs[:swapped].flip(2), 1 - shares[:swapped]
    chains = {"loc": locs, "share": torch.stack([shares, 1 - shares], -1)}
    posterior = dp.draws_posterior(dp.Program.of(mixture((0.0, 0.0), 3.0)), y, chains, seed=seed)
    return Fitted(posterior, fresh, train=(y,))


@wrong("draws", "closed form", "{chains} chain(s) of {draws} draws cannot show a posterior", chains=(2,), draws=(6,))
def few_draws(seed: int, chains: int, draws: int) -> Fitted:
    def location(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    g = noise(seed, 161)
    y = 1 + torch.randn(50, generator=g)
    exact = linear_posterior(torch.ones(50, 1), y, prior=3.0)
    walk = autocorrelated(chains, draws, 1, 0.9, g)[..., 0] + 0.8
    values = exact.mean[0].float() + exact.sd[0].float() * walk
    posterior = dp.draws_posterior(dp.Program.of(location, data_plate="data"), y, {"mu": values}, seed=seed)
    fresh = 1 + torch.randn(50, generator=g)
    return Fitted(posterior, fresh, train=(y,), truth={"mu": exact[0]})
