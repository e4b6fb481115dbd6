"""The censored normal against closed forms of scipy, and its moments against draws."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from deepprob.distributions.censored_normal import CensoredNormal

LIMITS = [(0.0, math.inf), (-math.inf, 1.0), (-0.5, 1.5), (-math.inf, math.inf)]


@pytest.mark.parametrize(("low", "high"), LIMITS)
def test_log_prob_is_the_density_inside_and_the_tail_at_a_limit(low: float, high: float) -> None:
    loc, scale = torch.tensor([-2.0, 0.3, 40.0]), torch.tensor([0.5, 2.0, 1.0])
    y = torch.linspace(-3.0, 3.0, 13).clamp(low, high).unsqueeze(1)
    exact = scipy.stats.norm(loc.numpy(), scale.numpy())
    expected = torch.as_tensor(exact.logpdf(y.numpy()))
    expected = torch.where(y <= low, torch.as_tensor(exact.logcdf(low)), expected)
    expected = torch.where(y >= high, torch.as_tensor(exact.logsf(high)), expected)
    found = CensoredNormal(loc, scale, low, high).log_prob(y)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_gradients_are_finite_far_from_the_limits() -> None:
    loc = torch.tensor([-300.0, -30.0, 0.0, 30.0, 300.0], requires_grad=True)
    scale = torch.full((5,), 0.5, requires_grad=True)
    for y in (0.0, 0.4, 1.0):
        value = CensoredNormal(loc, scale, 0.0, 1.0).log_prob(torch.tensor(y)).sum()
        found = torch.autograd.grad(value, (loc, scale))
        assert value.isfinite() and all(g.isfinite().all() for g in found)


@pytest.mark.parametrize(("low", "high"), LIMITS)
def test_moments_are_those_of_draws(low: float, high: float) -> None:
    torch.manual_seed(0)
    d = CensoredNormal(torch.tensor([-1.0, 0.5, 3.0]), torch.tensor([1.0, 2.0, 0.7]), low, high)
    draws = d.sample(torch.Size([200_000]))
    assert draws.min() >= low and draws.max() <= high
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - d.mean).abs() < 4.5 * error + 1e-6).all()
    squares = (draws - d.mean).square()
    assert ((squares.mean(0) - d.variance).abs() < 4.5 * squares.std(0) / len(draws) ** 0.5 + 1e-6).all()


def test_shapes_follow_sample_batch_and_event() -> None:
    d = CensoredNormal(torch.zeros(3), torch.ones(()), low=0.0)
    assert d.expand([5, 3]).sample(torch.Size([2])).shape == (2, 5, 3)
    assert d.to_event(1).log_prob(d.sample()).shape == ()
    assert d.support.check(torch.tensor([-1.0, 0.0, 2.0])).tolist() == [False, True, True]
