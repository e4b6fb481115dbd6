"""Annealed importance sampling of the evidence, against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.checks.sandwich import evidence_sandwich, simulated
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import VAE
from deepprob.posteriors.annealing import sandwich
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

LOADINGS = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


def rows(count: int, seed: int) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, generator=noise) @ LOADINGS + 0.5 * torch.randn(count, 6, generator=noise)


def still() -> Tensor:
    """A parameter of almost zero, because a fit needs one."""
    found: Tensor = pyro.param("still", torch.tensor(0.0))
    return found


def unfitted(model: Callable[..., None], guide: Callable[..., None], x: Tensor) -> Posterior:
    return svi(Program.of(model, guide), x, steps=1, optimizer=Optimizer(learning_rate=1e-9), progress=False)


@pytest.fixture(scope="module")
def unfinished() -> Posterior:
    """Probabilistic PCA after a few steps, so that its guide is poor."""
    program = VAE((6,), 2, hidden_dims=(), likelihood="normal")
    return svi(program, rows(300, 1), steps=60, seed=0, progress=False)


def exact(posterior: Posterior, x: Tensor) -> Tensor:
    """The log evidence of probabilistic PCA with the fitted weights."""
    program: Any = posterior.program
    with torch.no_grad():
        at = program.decode(torch.cat([torch.zeros(1, 2), torch.eye(2)]))
        mean, noise = at.mean[0], at.variance[0]
        loadings = at.mean[1:] - mean  # (Z, 6)
    return dist.MultivariateNormal(mean, loadings.T @ loadings + noise.diag()).log_prob(x)


def test_the_estimate_is_unbiased_where_the_guide_is_poor(unfinished: Posterior) -> None:
    x = rows(100, 2)
    truth = exact(unfinished, x)
    plain = unfinished.evidence(x, particles=10)
    annealed = unfinished.evidence(x, particles=10, annealing=50)
    assert float((truth - plain.value).mean()) > 0.3, "the guide is not poor, so that the test shows nothing"
    # The weights of ten chains have a standard error; four of them fail one time in 16 000.
    ratio = (annealed.value - truth).exp()
    assert float(ratio.mean()) == pytest.approx(1.0, abs=4 * float(ratio.std()) / 10)
    assert float((truth - annealed.value).mean()) < 0.1
    assert float(annealed.ess.mean()) > 5


def test_the_sandwich_holds_the_evidence_and_closes(unfinished: Posterior) -> None:
    case = Case(unfinished, rows(100, 2))
    batch, latents = simulated(case, 100)
    truth = exact(unfinished, batch[0])
    gaps = []
    for steps in (5, 120):
        with unfinished._fitted.querying(3):
            lower, upper = sandwich(unfinished._fitted, batch, latents, chains=4, steps=steps)
        below, above = truth - lower, upper - truth
        # Both are positive in expectation, up to their noise.
        assert float(below.mean()) > -2 * float(below.std()) / 10
        assert float(above.mean()) > -2 * float(above.std()) / 10
        gaps.append(float((upper - lower).mean()))
    assert gaps[1] < 0.5 * gaps[0]
    assert gaps[1] < 0.3


def test_coordinates_of_a_positive_latent() -> None:
    """A Gamma prior and a Poisson row: the evidence is negative binomial; the guide's log-normal is too narrow."""

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("y", dist.Poisson(rate), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("rate", dist.LogNormal(((y + 1.5) / 2).log() + still(), 0.25))

    y = torch.arange(12.0)
    posterior = unfitted(model, guide, y)
    truth = dist.NegativeBinomial(2.0, probs=0.5).log_prob(y)
    found = posterior.evidence(y, particles=50, annealing=60)
    assert torch.allclose(found.value.float(), truth, atol=0.15)
    assert float((found.value - truth).mean()) == pytest.approx(0.0, abs=0.05)


def test_a_program_without_a_plate_of_draws(unfinished: Posterior) -> None:
    """Chains that cannot share a run move one by one to the same answer."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            assert z.dim() == 1, "no draws"
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x) + still(), 0.7))

    x = torch.tensor([0.0, 1.0, 2.0])
    posterior = unfitted(model, guide, x)
    found = posterior.evidence(x, particles=8, annealing=30)
    assert torch.allclose(found.value.float(), dist.Normal(0.0, math.sqrt(2)).log_prob(x), atol=0.2)


def test_what_annealing_refuses() -> None:
    def shared(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("k", dist.Bernoulli(torch.full_like(y, 0.5) + still()))

    y = torch.zeros(5)
    with pytest.raises(ValueError, match="in this program rows share latents"):
        svi(Program.of(shared, "normal"), y, steps=1, progress=False).evidence(y, annealing=5)
    with pytest.raises(ValueError, match="site 'k' is discrete"):
        unfitted(model, guide, y).evidence(y, annealing=5)


def test_the_check_finds_the_evidence_of_a_small_model(unfinished: Posterior) -> None:
    found = evidence_sandwich.answer(Case(unfinished, rows(100, 2)), 0.05)
    assert found.verdict == "pass"
    assert 0 <= found.value < 0.3
    assert found.details["lower"] <= found.details["upper"]


def test_the_check_tells_that_too_few_steps_do_not_find_it() -> None:
    """Twenty almost exact readings of a latent that the guide does not read."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(20), 10.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1e-3).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 20) + still(), 10.0).to_event(1))

    x = 10 * torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    posterior = unfitted(model, guide, x)
    found = evidence_sandwich.answer(Case(posterior, x), 0.05)
    assert found.verdict == "caution"
    assert found.value > 1
    assert "annealing" in found.next_step
