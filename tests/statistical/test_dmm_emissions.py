"""Emissions and forecasts of the deep Markov model against exact answers: the Kalman filter, and quadrature.

Seeds are fixed. A comparison with Monte Carlo allows 4 standard errors, which a correct program exceeds once in 16 000.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

from deepprob.distributions import GaussianPath
from deepprob.inference import svi
from deepprob.models import DeepMarkovModel
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.run import Run, run_program

SLOPE, SCALE, LOADING, NOISE = 0.8, 0.5, 1.5, 0.4  # z_t = SLOPE z_{t-1} + SCALE e_t, x_t = LOADING z_t + NOISE u_t
LENGTHS, STEPS = torch.tensor([6, 3, 1]), 4


class Linear(nn.Module):
    """A linear-Gaussian transition."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Module()
        self.start.value = nn.Parameter(torch.zeros(1))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return SLOPE * z, torch.full_like(z, SCALE)


class Exact(DeepMarkovModel):
    """A linear-Gaussian deep Markov model, whose guide is its exact posterior: given the future, a Markov chain too."""

    registry_name = None

    def __init__(self) -> None:
        super().__init__(1, latent_dim=1, likelihood="normal")
        self.transition, self.emitter = Linear(), nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.emitter.weight, LOADING)
        nn.init.constant_(self.raw_noise, math.log(math.expm1(NOISE - 1e-4)))
        self.built = []

    def adapt(self, *batch: Any) -> None:
        """Keep the units, which are those of the exact answers."""
        self.explains_missing = bool(batch[0].isnan().any())

    def guide(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        with self.data_plate(x):
            path = GaussianPath(self._kernel, torch.zeros(1), lengths, x.shape[1], [messages(x, lengths)])
            z: Tensor = pyro.sample("z", path)
        return z

    @staticmethod
    def _kernel(z: Tensor, message: Tensor) -> tuple[Tensor, Tensor]:
        precision, shift = message.chunk(2, -1)  # of the evidence about z_t in x_t, ..., x_T
        total = 1 / SCALE**2 + precision
        return (SLOPE * z / SCALE**2 + shift) / total, total.rsqrt()


def messages(x: Tensor, lengths: Tensor) -> Tensor:
    """Precision and shift of log p(x_t, ..., x_T | z_t) as a function of z_t, ``(B, T, 2)``."""
    precision = shift = torch.zeros(len(x))
    found = []
    for t in reversed(range(x.shape[1])):
        # from z_{t+1} back to z_t: the noise of the step widens the evidence
        spread = 1 + SCALE**2 * precision
        precision, shift = SLOPE**2 * precision / spread, SLOPE * shift / spread
        real = t < lengths
        seen = torch.where(x[:, t, 0].isnan(), 0.0, 1.0)
        precision = torch.where(real, precision + seen * LOADING**2 / NOISE**2, 0.0)
        shift = torch.where(real, shift + seen * LOADING * x[:, t, 0].nan_to_num() / NOISE**2, 0.0)
        found.append(torch.stack([precision, shift], -1))
    return torch.stack(found[::-1], 1)


def kalman(x: Tensor) -> tuple[float, float, float]:
    """Log evidence of one series, and mean and variance of its last state."""
    mean, variance, evidence = 0.0, 0.0, 0.0
    for value in x.tolist():
        mean, variance = SLOPE * mean, SLOPE**2 * variance + SCALE**2
        if math.isnan(value):
            continue
        total = LOADING**2 * variance + NOISE**2
        error = value - LOADING * mean
        evidence += -0.5 * (error**2 / total + math.log(2 * math.pi * total))
        gain = LOADING * variance / total
        mean, variance = mean + gain * error, (1 - gain * LOADING) * variance
    return evidence, mean, variance


def kalman_forecast(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the next values of one series, ``(H,)`` and ``(H, H)``."""
    _, mean, variance = kalman(x)
    means, variances = [], []
    for _ in range(STEPS):
        mean, variance = SLOPE * mean, SLOPE**2 * variance + SCALE**2
        means.append(mean)
        variances.append(variance)
    lag = torch.arange(STEPS)
    first = torch.minimum(lag[:, None], lag)
    covariance = torch.tensor(variances)[first] * SLOPE ** (lag[:, None] - lag).abs()
    return LOADING * torch.tensor(means), LOADING**2 * covariance + NOISE**2 * torch.eye(STEPS)


def series(gaps: bool = False) -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 6, 1, generator=torch.Generator().manual_seed(0))
    if gaps:
        x[0, 2] = x[0, 5] = torch.nan  # the last value, too
    return x * (torch.arange(6) < LENGTHS[:, None]).unsqueeze(-1), LENGTHS


@pytest.fixture(scope="module", params=[False, True], ids=["complete", "gaps"])
def exact(request: pytest.FixtureRequest) -> tuple[Posterior, tuple[Tensor, Tensor]]:
    data = series(request.param)
    program = Exact()
    for parameter in program.parameters():
        parameter.requires_grad_(parameter is program.raw_noise)
    posterior = svi(program, data, steps=1, weights="keep", compile=False, progress=False)
    with torch.no_grad():
        posterior.program.raw_noise.copy_(program.raw_noise)  # undo the step
    return posterior, data


def test_the_bound_of_a_linear_gaussian_chain_is_its_kalman_evidence(exact: Any) -> None:
    posterior, (x, lengths) = exact
    weights = posterior.log_weights(x, lengths, particles=5)
    truth = torch.tensor([kalman(row[:n, 0])[0] for row, n in zip(x, lengths, strict=True)])
    torch.testing.assert_close(weights, truth.expand(5, 3), atol=1e-3, rtol=1e-4)


def test_forecasts_of_unequal_rows_are_kalmans(exact: Any) -> None:
    posterior, (x, lengths) = exact
    draws = 20_000
    ahead = posterior.forecast(x, lengths, steps=STEPS, draws=draws, seed=1)
    assert ahead.draws.shape == (draws, 3, STEPS, 1) and ahead.site == "x"
    for row, (one, length) in enumerate(zip(x, lengths, strict=True)):
        mean, covariance = kalman_forecast(one[:length, 0])
        drawn = ahead.draws[:, row, :, 0]
        assert ((drawn.mean(0) - mean).abs() < 4 * (covariance.diagonal() / draws).sqrt()).all()
        square = covariance.square() + covariance.diagonal()[:, None] * covariance.diagonal()
        assert ((torch.cov(drawn.T) - covariance).abs() < 4 * (square / draws).sqrt()).all()
        torch.testing.assert_close(ahead.sd[row, :, 0], covariance.diagonal().sqrt(), atol=0.02, rtol=0.02)


# -- evidence of every family ------------------------------------------------------------------------------------------

FAMILIES = {
    "bernoulli": torch.tensor([0.0, 1.0]),
    "categorical": torch.tensor([0, 1, 2]),
    "poisson": torch.arange(40.0),
    "negative_binomial": torch.arange(400.0),
    "normal": torch.linspace(-25, 25, 4001),
}


def program_of(family: str) -> DeepMarkovModel:
    torch.manual_seed(1)
    classes = {"num_classes": 3} if family == "categorical" else {}
    made = DeepMarkovModel(1, latent_dim=1, hidden_dim=6, recurrent_dim=6, dropout=0.0, likelihood=family, **classes)
    for part in (made.emitter, made.transition):
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.5)
    return made.eval()


@torch.no_grad()
def quadrature(program: DeepMarkovModel, x: Tensor, lengths: Tensor) -> Tensor:
    """log p(x) of one-dimensional states and two steps, ``(B,)``, by a sum over a grid of both."""
    grid = torch.linspace(-9, 9, 301)
    paths = torch.cartesian_prod(grid, grid).reshape(-1, 1, 2, 1)
    found = []
    for row, length in zip(x, lengths, strict=True):
        batch = (row[None], length[None])
        prior = run_program(Run(program, batch, torch.arange(1), 1))[1].nodes["z"]["fn"]
        seen = torch.where(row.isnan(), 0, row).expand(len(paths), 1, 2, 1)
        value = program.emission(paths, prior.inside, ~row.isnan()).log_prob(seen)
        log_prior = prior.log_prob(paths.clone())
        # A sequence of one step does not depend on the second state, so the sum counts it once per grid value.
        count = math.log(len(grid)) if int(length) == 1 else -math.log(float(grid[1] - grid[0]))
        found.append((log_prior + value).logsumexp((0, 1)) + math.log(float(grid[1] - grid[0])) - count)
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_of_all_values_sum_to_one(family: str) -> None:
    program, values = program_of(family), FAMILIES[family]
    x = torch.stack([values, torch.zeros_like(values)], 1).unsqueeze(-1)  # (V, 2, 1), the second is padding
    every = torch.ones(len(x), dtype=torch.long)
    if len(x) > 50:  # a path is scored once, and all values under it
        paths = torch.linspace(-9, 9, 601).reshape(-1, 1, 1, 1).repeat(1, 1, 2, 1)
        prior = run_program(Run(program, (x[:1], every[:1]), torch.arange(1), 1))[1].nodes["z"]["fn"]
        inside = prior.inside
        fn = program.emission(paths, inside)
        scores = torch.cat([fn.log_prob(v.expand(len(paths), 1, 2, 1)) for v in x], 1)  # (G, V)
        width = torch.log(torch.tensor(18 / 600))
        evidence = (prior.log_prob(paths.clone()) + scores).logsumexp(0) + width
    else:
        evidence = quadrature(program, x, every)
    if family == "normal":
        evidence = evidence + torch.log(values[1] - values[0])
    assert abs(float(evidence.logsumexp(0))) < 5e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_weights_are_unbiased_for_the_evidence(family: str) -> None:
    program = program_of(family)
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2))).unsqueeze(-1)  # (4, 2, 1)
    lengths = torch.tensor([2, 2, 1, 2])
    if family == "categorical":
        x = x.long()
    else:
        x[3, 1] = torch.nan
    x[2, 1] = 0
    posterior = posterior_of(program, (x, lengths))
    truth = quadrature(program, x, lengths)
    particles = 40_000
    weights = posterior.log_weights(x, lengths, particles=particles, seed=3)
    ratio = (weights - truth).exp()
    assert ((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / math.sqrt(particles)).all(), ratio.mean(0)


def posterior_of(program: DeepMarkovModel, data: tuple[Tensor, Tensor]) -> Posterior:
    """A posterior of the program with the weights that it has."""
    posterior = svi(program, data, steps=1, weights="keep", compile=False, progress=False)
    posterior.program.load_state_dict(program.state_dict())
    posterior.program.explains_missing = bool(data[0].isnan().any())
    return posterior
