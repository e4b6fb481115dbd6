"""Groups, schools and funnels, labelled by closed forms and by grids over the spread of the groups."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from verdicts.registry import Fitted, good, wrong
from verdicts.truths import Gaussian, fit, linear_posterior, moments, noise, plain_normal, predictive_loss

GROUP_SD = 0.8


def groups(count: int, members: int, seed: int, kind: int, spread: float = GROUP_SD) -> tuple[Tensor, Tensor, Tensor]:
    """Group of every row, values, and fresh values of the same groups."""
    g = noise(seed, kind)
    group = torch.arange(count).repeat_interleave(members)
    effect = 0.5 + spread * torch.randn(count, generator=g)
    values = [effect[group] + torch.randn(len(group), generator=g) for _ in range(2)]
    return group, values[0], values[1]


def known_spread(group: Tensor, y: Tensor | None = None) -> None:
    """The spread of the groups is known: the posterior is normal."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("groups", int(group.max()) + 1):
        theta = pyro.sample("theta", dist.Normal(mu, GROUP_SD))
    with pyro.plate("rows", len(group)):
        pyro.sample("y", dist.Normal(theta[..., group], 1.0), obs=y)


def known_spread_posterior(group: Tensor, y: Tensor) -> Gaussian:
    """Of ``mu`` and then ``theta``."""
    count = int(group.max()) + 1
    prior = torch.full((count + 1, count + 1), 4.0, dtype=torch.float64)
    prior[1:, 1:] += GROUP_SD**2 * torch.eye(count, dtype=torch.float64)
    design = torch.cat([torch.zeros(len(group), 1), torch.nn.functional.one_hot(group, count)], 1)
    return linear_posterior(design, y, prior=prior)


@good("hierarchical", "closed form", "a full covariance for mean and groups",
      count=(4, 12, 30), members=(6, 8, 3))  # fmt: skip
def groups_of_known_spread(seed: int, count: int, members: int) -> Fitted:
    group, y, fresh = groups(count, members, seed, 60)
    posterior = fit(known_spread, (group, y), "multivariate_normal", steps=2500, seed=seed)
    exact = known_spread_posterior(group, y)
    return Fitted(posterior, (group, fresh), train=(group, y), truth={"mu": exact[0], "theta": exact[1:]})


@wrong("hierarchical", "closed form", "mean field: the mean of {count} small groups depends on the groups",
       count=(12, 30), members=(1, 1))  # fmt: skip
def mean_field_over_groups(seed: int, count: int, members: int) -> Fitted:
    group, y, fresh = groups(count, members, seed, 61)
    posterior = fit(known_spread, (group, y), "normal", steps=2500, seed=seed)
    exact = known_spread_posterior(group, y)
    return Fitted(posterior, (group, fresh), train=(group, y), truth={"mu": exact[0], "theta": exact[1:]})


@wrong("hierarchical", "constructed", "one mean for {count} groups that differ by {spread} sds",
       count=(10, 25), members=(12, 8), spread=(1.5, 1.0))  # fmt: skip
def pooled(seed: int, count: int, members: int, spread: float) -> Fitted:
    def model(group: Tensor, y: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(group)):
            pyro.sample("y", dist.Normal(mu + 0.0 * group, sigma), obs=y)

    group, y, fresh = groups(count, members, seed, 62, spread)
    posterior = fit(model, (group, y), "multivariate_normal", steps=1500, seed=seed)
    effect = torch.zeros(count).index_add(0, group, y) / members
    true = dist.Normal(effect[group], (1 + 1 / members) ** 0.5).log_prob(fresh)
    return Fitted(
        posterior, (group, fresh), train=(group, y),
        nats=lambda: predictive_loss(posterior, (group, fresh), true, plain_normal(y, fresh)),
    )  # fmt: skip


# -- a spread that is learned ---------------------------------------------------------------------------------------


def noncentered(group: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.7))
    with pyro.plate("groups", int(group.max()) + 1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(group)):
        pyro.sample("y", dist.Normal(mu + tau * z[..., group], 1.0), obs=y)


def centered(group: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.7))
    with pyro.plate("groups", int(group.max()) + 1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
    with pyro.plate("rows", len(group)):
        pyro.sample("y", dist.Normal(theta[..., group], 1.0), obs=y)


def spread_draws(group: Tensor, y: Tensor, draws: int = 8000) -> dict[str, Tensor]:
    """Exact draws: a grid over ``tau``, then ``mu`` and the effects given ``tau`` in closed form."""
    count = int(group.max()) + 1
    ones = torch.ones(len(y))
    members = torch.zeros(count).index_add(0, group, ones).double()
    mean = torch.zeros(count).index_add(0, group, y).double() / members
    log_tau = torch.linspace(-4.0, 3.0, 2001, dtype=torch.float64)
    spread = log_tau.exp()[:, None] ** 2 + 1 / members  # variance of a group's mean given mu
    precision = (1 / spread).sum(1) + 0.25
    center = (mean / spread).sum(1) / precision
    evidence = -0.5 * (spread.log() + mean**2 / spread).sum(1) + 0.5 * center**2 * precision - 0.5 * precision.log()
    weights = torch.softmax(evidence + dist.Normal(0.0, 0.7).log_prob(log_tau), 0)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        at = torch.multinomial(weights, draws, replacement=True)
        tau = log_tau[at].exp()
        mu = center[at] + torch.randn(draws).double() / precision[at].sqrt()
        pull = members / (members + 1 / tau[:, None] ** 2)
        sd = (members + 1 / tau[:, None] ** 2) ** -0.5
        theta = mu[:, None] + pull * (mean - mu[:, None]) + sd * torch.randn(draws, count).double()
    return {"mu": mu, "tau": tau, "theta": theta, "z": (theta - mu[:, None]) / tau[:, None]}


@good("hierarchical", "reference draws", "the data determine the spread of {count} groups",
      count=(25, 40), members=(10, 20))  # fmt: skip
def spread_of_groups(seed: int, count: int, members: int) -> Fitted:
    group, y, fresh = groups(count, members, seed, 63)
    posterior = fit(centered, (group, y), "multivariate_normal", steps=3000, seed=seed)
    found = spread_draws(group, y)
    truth = {name: moments(found[name]) for name in ("mu", "tau", "theta")}
    return Fitted(posterior, (group, fresh), train=(group, y), truth=truth)


def crossed(pupil: Tensor, question: Tensor, y: Tensor | None = None) -> None:
    """Two crossed groupings of known spreads."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("pupils", int(pupil.max()) + 1):
        skill = pyro.sample("skill", dist.Normal(0.0, 1.0))
    with pyro.plate("questions", int(question.max()) + 1):
        ease = pyro.sample("ease", dist.Normal(0.0, 0.7))
    with pyro.plate("answers", len(pupil)):
        pyro.sample("y", dist.Normal(mu + skill[..., pupil] + ease[..., question], 1.0), obs=y)


@good("hierarchical", "closed form", "{pupils} pupils answer {questions} questions", pupils=(5, 12), questions=(4, 6))
def crossed_groups(seed: int, pupils: int, questions: int) -> Fitted:
    g = noise(seed, 64)
    pupil = torch.arange(pupils).repeat_interleave(questions)
    question = torch.arange(questions).repeat(pupils)
    skill, ease = torch.randn(pupils, generator=g), 0.7 * torch.randn(questions, generator=g)
    y, fresh = (skill[pupil] + ease[question] + torch.randn(len(pupil), generator=g) for _ in range(2))
    posterior = fit(crossed, (pupil, question, y), "multivariate_normal", steps=2500, seed=seed)
    design = [torch.ones(len(y), 1), *(torch.nn.functional.one_hot(at) for at in (pupil, question))]
    prior = torch.cat([torch.tensor([4.0]), torch.ones(pupils), torch.full((questions,), 0.49)]).diag()
    exact = linear_posterior(torch.cat(design, 1), y, prior=prior)
    truth = {"mu": exact[0], "skill": exact[1 : pupils + 1], "ease": exact[pupils + 1 :]}
    return Fitted(posterior, (pupil, question, fresh), train=(pupil, question, y), truth=truth)


@wrong("hierarchical", "reference draws", "a {guide} guide cannot hold the funnel of {count} small groups",
       count=(8, 15, 8), guide=("normal", "normal", "multivariate_normal"))  # fmt: skip
def funnel_of_groups(seed: int, count: int, guide: str) -> Fitted:
    group, y, fresh = groups(count, 1, seed, 65, 0.3)
    posterior = fit(centered, (group, y), guide, steps=2500, seed=seed)
    found = spread_draws(group, y)
    truth = {name: moments(found[name]) for name in ("mu", "tau", "theta")}
    return Fitted(posterior, (group, fresh), train=(group, y), truth=truth)


@wrong("hierarchical", "closed form", "Neal's funnel with {size} branches: a normal guide sees its mouth only",
       size=(3, 9), guide=("multivariate_normal", "normal"))  # fmt: skip
def neals_funnel(seed: int, size: int, guide: str) -> Fitted:
    def model() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(size), (v / 2).exp()[..., None]).to_event(1))

    posterior = fit(model, None, guide, steps=2000, seed=seed)
    zero, three = torch.zeros(()), torch.tensor(3.0)
    x_sd = torch.full((size,), math.exp(9 / 4))
    return Fitted(posterior, None, truth={"v": (zero, three), "x": (torch.zeros(size), x_sd)})


# -- eight schools --------------------------------------------------------------------------------------------------


EFFECT = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
ERROR = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])


@wrong("hierarchical", "reference draws", "eight schools, centered: the spread's posterior reaches zero",
       guide=("normal", "multivariate_normal"))  # fmt: skip
def eight_schools_centered(seed: int, guide: str) -> Fitted:
    def model(sigma: Tensor, y: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(sigma)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    posterior = fit(model, (ERROR, EFFECT), guide, steps=2500, seed=seed)
    # Stan's reference draws of posteriordb (eight_schools_noncentered, posteriordb 28f8d3d).
    mu = torch.tensor(4.411), torch.tensor(3.309)
    tau = torch.tensor(3.602), torch.tensor(3.198)
    return Fitted(posterior, (ERROR, EFFECT), train=(ERROR, EFFECT), truth={"mu": mu, "tau": tau})
