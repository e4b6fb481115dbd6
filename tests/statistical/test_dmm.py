"""The deep Markov model against exact answers: Gaussian algebra for its path, quadrature for its evidence.

Seeds are fixed. A comparison with Monte Carlo allows 4 standard errors, which a correct program exceeds once in 16 000.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from deepprob.distributions import GaussianPath
from deepprob.fitting.objectives import ELBO
from deepprob.inference import svi
from deepprob.models import DeepMarkovModel
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program
from deepprob.programs.run import Run, run_program

STEPS, SLOPE, START, SCALE = 5, 0.8, 1.5, 0.6


def chain(slope: Tensor | float, shift: Tensor | float, scale: float, lengths: Tensor) -> GaussianPath:
    return GaussianPath(lambda z: (slope * z + shift, torch.full_like(z, scale)), torch.tensor([START]), lengths, STEPS)


def joint(slope: Tensor | float, shift: Tensor | float, scale: float, steps: int) -> MultivariateNormal:
    """z_t = slope z_{t-1} + shift + scale e_t, as one Gaussian over all steps."""
    slope = torch.as_tensor(slope)
    lag = torch.diag(torch.ones(steps - 1), -1) * slope
    spread = torch.linalg.inv(torch.eye(steps) - lag)  # from noise and shifts to states
    drive = torch.cat([(slope * START + shift).reshape(1), torch.as_tensor(shift).expand(steps - 1)])
    return MultivariateNormal(spread @ drive, scale**2 * spread @ spread.T)


@pytest.mark.parametrize("length", [1, 3, 5])
def test_linear_path_matches_its_joint_gaussian(length: int) -> None:
    torch.manual_seed(0)
    path = chain(SLOPE, 0.3, SCALE, torch.tensor(length))
    exact = joint(SLOPE, 0.3, SCALE, length)
    z = path.rsample((20_000,))  # (K, T, 1)
    assert torch.allclose(path.log_prob(z.clone()), exact.log_prob(z[:, :length, 0]), atol=1e-4)
    error = (z[:, :length, 0].mean(0) - exact.mean) / (exact.variance / len(z)).sqrt()
    assert (error.abs() < 4).all()


def test_kl_estimate_and_its_gradient_are_unbiased() -> None:
    torch.manual_seed(0)
    slope, shift = torch.tensor(0.4, requires_grad=True), torch.tensor(-0.2, requires_grad=True)
    exact = kl_divergence(joint(slope, shift, 0.5, STEPS), joint(SLOPE, 0.3, SCALE, STEPS))
    truth = torch.stack([exact, *torch.autograd.grad(exact, (slope, shift))]).detach()
    wide = (slope.expand(4000, 1, 1), shift.expand(4000, 1, 1))  # one copy per draw: one gradient per draw
    slopes, shifts = (w.clone().detach().requires_grad_() for w in wide)

    def kernel(z: Tensor) -> tuple[Tensor, Tensor]:
        s, m = (slopes, shifts) if z.dim() == 3 else (slopes[:, 0], shifts[:, 0])
        return s * z + m, torch.full_like(z, 0.5)

    lengths = torch.full((4000,), STEPS)
    q, p = GaussianPath(kernel, torch.tensor([START]), lengths, STEPS), chain(SLOPE, 0.3, SCALE, lengths)
    z = q.rsample()
    kl = kl_divergence(q, p)  # (K,)
    gradients = torch.autograd.grad(kl.sum(), (slopes, shifts), retain_graph=True)
    found = torch.stack([kl, *(g.flatten() for g in gradients)]).detach()  # (3, K)
    assert ((found.mean(1) - truth).abs() < 4 * found.std(1) / math.sqrt(4000)).all()
    sampled = (q.log_prob(z) - p.log_prob(z)).detach()
    assert kl.std() < 0.7 * sampled.std()


# -- evidence ----------------------------------------------------------------------------------------------------------


def small_data() -> tuple[Tensor, Tensor]:
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4))).reshape(16, 2, 2)
    lengths = torch.tensor([2] * 12 + [1] * 4)
    return every * (torch.arange(2) < lengths[:, None])[..., None], lengths


def quadrature(program: Program, x: Tensor, lengths: Tensor) -> Tensor:
    """log p(x) of one-dimensional states and two steps, by a sum over a grid of both."""
    grid = torch.linspace(-12, 12, 601)
    paths = torch.cartesian_prod(grid, grid).reshape(-1, 1, 2, 1).expand(-1, len(x), 2, 1)  # (G, B, T, Z)
    totals = []
    for row in range(len(x)):
        batch = (x[row : row + 1], lengths[row : row + 1])
        _, trace = run_program(Run(program, batch, torch.arange(1), 1))
        prior, width = trace.nodes["z"]["fn"], torch.log(grid[1] - grid[0])
        z = paths[:, row : row + 1]
        logits = program.base_logits + program.emitter(z)
        notes = -torch.nn.functional.binary_cross_entropy_with_logits(
            logits, batch[0].expand_as(logits), reduction="none"
        )
        notes = torch.where(prior.inside, notes, 0.0).sum((-2, -1))[:, 0]  # (G,)
        real = prior.log_prob(z)[:, 0]
        # A sequence of one step does not depend on the second state, so the sum counts it once per grid value.
        free = math.log(len(grid)) if int(lengths[row]) == 1 else -float(width)
        totals.append((real + notes).logsumexp(0) + width - free)
    return torch.stack(totals)


@pytest.fixture(scope="module")
def fitted() -> Posterior:
    program = DeepMarkovModel(2, latent_dim=1, hidden_dim=8, recurrent_dim=8, dropout=0.0)
    x, lengths = small_data()
    same = (x[:, :1] == x[:, 1:]).all(-1).flatten() | (lengths == 1)  # states that stay make equal notes likely
    again = torch.where(same, 9, 1)
    data = (x.repeat_interleave(again, 0), lengths.repeat_interleave(again))
    return svi(program, data, epochs=150, batch_size=None, seed=2)


@torch.no_grad()
def test_importance_weights_reach_the_evidence_by_quadrature(fitted: Posterior) -> None:
    x, lengths = small_data()
    exact = quadrature(fitted.program, x, lengths)
    weights = fitted.log_weights(x, lengths, particles=20_000, seed=1)
    found = weights.logsumexp(0) - math.log(20_000)
    ratio = (weights - found).exp()
    assert ((found - exact).abs() < 4 * ratio.std(0) / math.sqrt(20_000) + 1e-4).all()
    elbo = fitted.elbo(x, lengths, particles=2000)
    assert (elbo < exact + 0.02).all() and (exact - elbo).mean() < 0.3


@torch.no_grad()
def test_probabilities_of_all_sequences_sum_to_one(fitted: Posterior) -> None:
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4))).reshape(16, 2, 2)
    total = quadrature(fitted.program, x, torch.full((16,), 2)).logsumexp(0)
    assert abs(float(total)) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("analytic", [True, False])
def test_the_elbo_is_unbiased_at_every_batch_size(fitted: Posterior, analytic: bool) -> None:
    torch.manual_seed(0)
    data, program = small_data(), fitted.program
    objective = ELBO(particles=200, analytic_kl=analytic)
    means, errors = [], []
    for size in (1, 4, 16):
        rows = torch.arange(16).reshape(-1, size)
        draws = torch.stack(
            [
                torch.stack([objective(Run(program, tuple(f[r] for f in data), r, 16))[1]["elbo"] for r in rows]).mean()
                for _ in range(10)
            ]
        )
        means.append(draws.mean())
        errors.append(draws.var() / len(draws))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        # ten draws each: the 4-sigma point of Student's t is about 6 of its own standard errors
        assert (means[i] - means[j]).abs() < 6 * (errors[i] + errors[j]).sqrt()
