"""The contract of every registered distribution.

Averages are compared in standard errors: z < 4.5 is exceeded by chance once in 150 000 comparisons. Seeds are fixed.
"""

from __future__ import annotations

import pytest
import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor

from deepprob.distributions import DISTRIBUTIONS

Z = 4.5
DRAWS = 40_000


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=sorted(DISTRIBUTIONS))
def distribution(request: pytest.FixtureRequest) -> TorchDistribution:
    made: TorchDistribution = DISTRIBUTIONS[request.param].example()  # type: ignore[attr-defined]
    return made


def assert_mean(values: Tensor, expected: float) -> None:
    """Compare means over the first axis with their expectation."""
    error = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - expected).abs() < Z * error).all()


@pytest.mark.parametrize("sample_shape", [(), (1,), (5, 2)])
def test_shapes_follow_sample_batch_and_event(distribution: TorchDistribution, sample_shape: tuple[int, ...]) -> None:
    value = distribution.sample(torch.Size(sample_shape))
    assert value.shape == sample_shape + distribution.batch_shape + distribution.event_shape
    assert distribution.log_prob(value).shape == sample_shape + distribution.batch_shape


def test_an_expanded_distribution_gives_the_same_log_probability(distribution: TorchDistribution) -> None:
    expanded = distribution.expand(torch.Size([4, *distribution.batch_shape]))
    assert expanded.batch_shape == (4, *distribution.batch_shape) and expanded.event_shape == distribution.event_shape
    value = distribution.sample(torch.Size([4]))
    torch.testing.assert_close(expanded.log_prob(value), distribution.log_prob(value))
    assert expanded.sample().shape == value.shape


def test_the_density_integrates_to_one(distribution: TorchDistribution) -> None:
    """By importance sampling: from normals that are wider, and uniformly from the discrete values that draws have."""
    draws = distribution.sample(torch.Size([DRAWS]))
    value, log_density = proposed(draws, discrete=whole_entries(draws, distribution))
    assert_mean((distribution.log_prob(value) - log_density).exp(), 1.0)


def test_draws_follow_the_density(distribution: TorchDistribution) -> None:
    r"""Stein's identity: under the density, score s and value z have E[s] = 0 and E[z s] = -1 in every real entry."""
    value = distribution.sample(torch.Size([DRAWS])).clone()
    real = ~whole_entries(value, distribution)
    entries = value[..., real].requires_grad_()
    rebuilt = value.masked_scatter(real.expand(value.shape), entries)
    (score,) = torch.autograd.grad(distribution.log_prob(rebuilt).sum(), entries)
    assert_mean(score, 0.0)
    assert_mean(entries.detach() * score, -1.0)


def test_gradients_reach_the_value_at_any_draw(distribution: TorchDistribution) -> None:
    value = distribution.sample(torch.Size([5])).clone().requires_grad_()
    (score,) = torch.autograd.grad(distribution.log_prob(value).sum(), value)
    assert score.isfinite().all()


def whole_entries(draws: Tensor, distribution: TorchDistribution) -> Tensor:
    """Which entries of an event are discrete, of the event's shape."""
    return (draws == draws.round()).reshape(-1, *distribution.event_shape).all(0)


def proposed(draws: Tensor, discrete: Tensor) -> tuple[Tensor, Tensor]:
    """New values and their log density, ``(K, *batch)``, that cover draws of shape ``(K, *batch, *event)``."""
    wide = Normal(draws.mean(0), 1.5 * draws.std(0) + discrete)
    value = wide.sample(torch.Size([len(draws)]))
    log_density = torch.where(discrete, 0.0, wide.log_prob(value)).flatten(-discrete.dim()).sum(-1)
    if not discrete.any():
        return value, log_density
    rows = value.flatten(1, -discrete.dim() - 1).flatten(2)  # (K, batch, event)
    counts = []
    for i, column in enumerate(draws.reshape(rows.shape).unbind(1)):
        seen = column[:, discrete.flatten()].unique(dim=0)
        rows[:, i, discrete.flatten()] = seen[torch.randint(len(seen), (len(draws),))]
        counts.append(float(len(seen)))
    log_density = log_density - torch.tensor(counts).log().reshape(log_density.shape[1:])
    return rows.reshape(value.shape), log_density
