"""The contract of every registered distribution over real numbers.

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
    """By importance sampling from normals that are wider than the distribution."""
    draws = distribution.sample(torch.Size([DRAWS]))
    wide = Normal(draws.mean(0), 1.5 * draws.std(0)).to_event(len(distribution.event_shape))
    value = wide.sample(torch.Size([DRAWS]))
    assert_mean((distribution.log_prob(value) - wide.log_prob(value)).exp(), 1.0)


def test_draws_follow_the_density(distribution: TorchDistribution) -> None:
    r"""Stein's identity: under the density, score s and value z have E[s] = 0 and E[z s] = -1 in every coordinate."""
    value = distribution.sample(torch.Size([DRAWS])).clone().requires_grad_()
    (score,) = torch.autograd.grad(distribution.log_prob(value).sum(), value)
    assert_mean(score, 0.0)
    assert_mean(value.detach() * score, -1.0)
