"""The ELBO and its gradients against values computed by hand.

Monte Carlo averages are compared in standard errors: |z| < 4.5 fails by chance once in 150 000 comparisons, and
every seed is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.fitting.objectives import ELBO
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.programs.program import Program
from deepprob.programs.run import Run
from deepprob.programs.store import empty_store, private_store

Z = 4.5


def gradients(
    program: Program, data: tuple[Tensor, ...], leaf: Tensor, objective: ELBO, repeats: int, weight: float = 1.0
) -> Tensor:
    """Gradients of the loss with respect to one tensor, one row for every repeat."""
    rows, found = torch.arange(len(data[0])), []
    with private_store(empty_store()), RandomStream(0).drawing():
        for _ in range(repeats):
            loss, _ = objective(Run(program, data, rows, len(rows)), kl_weight=weight)
            found.append(torch.autograd.grad(loss, leaf)[0].flatten())
    return torch.stack(found)


def assert_mean(draws: Tensor, exact: Tensor) -> None:
    error = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - exact.flatten()).abs() <= Z * error + 1e-5).all()), (draws.mean(0), exact, error)


@pytest.mark.parametrize("analytic", [True, False])
@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("particles", [1, 50])
def test_score_function_gradient_of_a_bernoulli_latent(analytic: bool, weight: float, particles: int) -> None:
    logit = torch.tensor(0.4, requires_grad=True)
    y = torch.tensor([1.2])
    prior = torch.tensor(0.3)

    def model(y: Tensor) -> None:
        b = pyro.sample("b", dist.Bernoulli(prior))
        pyro.sample("y", dist.Normal(2 * b, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("b", dist.Bernoulli(logits=logit))

    q = logit.sigmoid()
    likelihood = q * dist.Normal(2.0, 1.0).log_prob(y) + (1 - q) * dist.Normal(0.0, 1.0).log_prob(y)
    kl = q * (q / prior).log() + (1 - q) * ((1 - q) / (1 - prior)).log()
    exact = torch.autograd.grad((weight * kl - likelihood).sum(), logit)[0]
    objective = ELBO(particles=particles, analytic_kl=analytic)
    assert_mean(gradients(Program.of(model, guide), (y,), logit, objective, 1200 // particles, weight), exact)


def test_score_function_gradients_of_rows_do_not_mix() -> None:
    logits = torch.tensor([0.4, -1.0, 2.0], requires_grad=True)
    y = torch.tensor([1.2, -0.5, 0.3])

    def model(y: Tensor) -> None:
        with pyro.plate("data", 3):
            b = pyro.sample("b", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(2 * b, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", 3):
            pyro.sample("b", dist.Bernoulli(logits=logits))

    q = logits.sigmoid()
    likelihood = q * dist.Normal(2.0, 1.0).log_prob(y) + (1 - q) * dist.Normal(0.0, 1.0).log_prob(y)
    kl = q * (q / 0.3).log() + (1 - q) * ((1 - q) / 0.7).log()
    exact = torch.autograd.grad((kl - likelihood).mean(), logits)[0]
    program = Program.of(model, guide, data_plate="data")
    draws = gradients(program, (y,), logits, ELBO(particles=50), 200)
    assert_mean(draws, exact)
    # If a row's weight were summed over all rows, its gradient would have the noise of all rows.
    assert bool((draws.std(0) < 0.1).all())


def test_reparameterized_site_after_a_discrete_one_has_exact_gradient() -> None:
    logit, loc = torch.tensor(0.4, requires_grad=True), torch.tensor([-1.0, 1.5], requires_grad=True)
    y = torch.tensor([0.7])

    def model(y: Tensor) -> None:
        b = pyro.sample("b", dist.Bernoulli(0.3))
        z = pyro.sample("z", dist.Normal(b, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        b = pyro.sample("b", dist.Bernoulli(logits=logit))
        pyro.sample("z", dist.Normal(torch.where(b > 0, loc[1], loc[0]), 0.5))

    q = torch.stack([1 - logit.sigmoid(), logit.sigmoid()])
    prior = torch.tensor([0.7, 0.3])
    inside = [
        dist.Normal(loc[k], 1.0).log_prob(y)
        - 0.125  # E over z of the likelihood, sd 0.5
        - torch.distributions.kl_divergence(dist.Normal(loc[k], 0.5), dist.Normal(float(k), 1.0))
        for k in (0, 1)
    ]
    bound = (q * (torch.cat(inside) + (prior / q).log())).sum()
    exact = torch.autograd.grad(-bound, (logit, loc))
    program = Program.of(model, guide)
    for leaf, want in zip((logit, loc), exact, strict=True):
        for analytic in (True, False):
            assert_mean(gradients(program, (y,), leaf, ELBO(particles=20, analytic_kl=analytic), 150), want)


def test_particles_keep_the_mean_and_reduce_the_variance() -> None:
    loc = torch.tensor([0.3, -0.2], requires_grad=True)
    y = torch.tensor([1.0, 2.0])

    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("y", dist.Normal(z.exp(), 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("w", dist.Normal(loc[0], 0.4))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(loc[1], 0.4))

    program = Program.of(model, guide, data_plate="data")
    one = gradients(program, (y,), loc, ELBO(), 900)
    many = gradients(program, (y,), loc, ELBO(particles=30), 30)
    error = (one.var(0) / len(one) + many.var(0) / len(many)).sqrt()
    assert bool(((one.mean(0) - many.mean(0)).abs() < Z * error).all())
    assert bool((many.std(0) < one.std(0) / 3).all())


@pytest.mark.parametrize("guide", ["normal", "multivariate_normal", "low_rank", "laplace", "flow"])
def test_a_change_of_variables_keeps_its_density(guide: str) -> None:
    """A log-normal latent with a log-normal observation: log s is N(1, 1/2) given y."""

    def model(y: Tensor) -> None:
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 1):
            pyro.sample("y", dist.LogNormal(s.log(), 1.0), obs=y)
            pyro.sample("x", dist.Normal(t, 1.0), obs=y)

    y = torch.tensor([math.exp(2.0)])
    posterior = svi(Program.of(model, guide), y, epochs=600, optimizer=Optimizer(learning_rate=0.05))
    draws = posterior.sample(draws=4000)
    assert float(draws["t"].mean()) == pytest.approx(float(y / 2), abs=0.15)
    if guide == "laplace":
        return  # its mode is that of s, not of log s
    assert float(draws["s"].log().mean()) == pytest.approx(1.0, abs=0.1)
    assert float(draws["s"].log().std()) == pytest.approx(math.sqrt(0.5), abs=0.1)
    evidence = dist.LogNormal(0.0, math.sqrt(2)).log_prob(y) + dist.Normal(0.0, math.sqrt(2)).log_prob(y)
    assert float(posterior.log_evidence(y, particles=500)) == pytest.approx(float(evidence), abs=0.05)


def test_kl_weight_scales_only_the_kl() -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.5, 0.5))

    def loss(weight: float) -> tuple[float, dict[str, Tensor]]:
        with RandomStream(3).drawing():
            run = Run(Program.of(model, guide), (torch.tensor([1.0]),), torch.arange(1), 1)
            value, terms = ELBO()(run, kl_weight=weight)
        return float(value), terms

    (none, terms), (half, _), (full, again) = loss(0.0), loss(0.5), loss(1.0)
    assert none == pytest.approx(-float(terms["likelihood"]))
    assert full - none == pytest.approx(float(terms["kl_global"]), rel=1e-5)
    assert half == pytest.approx((none + full) / 2)
    assert float(again["elbo"]) == pytest.approx(-full)
    assert float(terms["elbo"]) == float(again["elbo"])


def closed(q: dist.Distribution, p: dist.Distribution) -> Callable[[], tuple[Tensor, Tensor]]:
    def both() -> tuple[Tensor, Tensor]:
        def model(y: Tensor) -> None:
            pyro.sample("z", p)
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

        def guide(y: Tensor) -> None:
            pyro.sample("z", q)

        run = Run(Program.of(model, guide), (torch.zeros(1),), torch.arange(1), 1)
        _, exact = ELBO()(run)
        _, drawn = ELBO(particles=40_000, analytic_kl=False)(run)
        return exact["kl_global"], drawn["kl_global"]

    return both


@pytest.mark.parametrize(
    ("q", "p"),
    [
        (dist.Normal(0.5, 0.7), dist.Normal(0.0, 1.0)),
        (dist.Normal(torch.zeros(3), 0.5).to_event(1), dist.Normal(torch.ones(3), 1.0).to_event(1)),
        (dist.Gamma(3.0, 2.0), dist.Gamma(1.0, 1.0)),
        (dist.Normal(torch.zeros(2), 0.5).to_event(1), dist.MultivariateNormal(torch.zeros(2), torch.eye(2))),
        (dist.Categorical(torch.tensor([0.2, 0.8])), dist.Categorical(torch.tensor([0.5, 0.5]))),
        (dist.Delta(torch.tensor(1.0), log_density=torch.tensor(0.7)), dist.Normal(0.0, 1.0)),
    ],
    ids=lambda d: type(d).__name__,
)
def test_closed_form_kl_matches_monte_carlo(q: dist.Distribution, p: dist.Distribution) -> None:
    with RandomStream(0).drawing():
        exact, drawn = closed(q, p)()
    assert float(exact) == pytest.approx(float(drawn), abs=0.03)
