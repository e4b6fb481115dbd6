"""The families of a VAE's likelihood: masses add up to one, densities integrate to one, and both equal scipy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from deepprob.distributions.continuous_bernoulli import ContinuousBernoulli
from deepprob.distributions.discretized_logistic import DiscretizedLogistic
from deepprob.networks.likelihood import Likelihood

LOGITS = torch.tensor([-80.0, -17.0, -0.6, -0.4, -1e-3, 0.0, 1e-5, 0.3, 2.0, 30.0, 80.0], dtype=torch.float64)


def of(family: str, out: list[float], dispersion: Any = None, **options: Any) -> Any:
    """The distribution of one value."""
    raw = torch.tensor(out, dtype=torch.float64)
    given = None if dispersion is None else torch.as_tensor(dispersion, dtype=torch.float64)
    return Likelihood(family, (1,), **options).distribution(raw, dispersion=given).base_dist


@pytest.mark.parametrize("count, gate", [(-3.0, -2.0), (2.0, 1.5), (8.0, -30.0)])
def test_zero_inflated_counts_equal_the_mixture_of_scipy(count: float, gate: float) -> None:
    k, mean, share = np.arange(2000), np.log1p(np.exp(count)) + 1e-4, 1 / (1 + np.exp(-gate))
    total = 3.0
    plain = {
        "zero_inflated_poisson": scipy.stats.poisson(mean),
        "zero_inflated_negative_binomial": scipy.stats.nbinom(total, total / (total + mean)),
    }
    for family, counts in plain.items():
        fn = of(family, [count, gate], total if "negative" in family else None)
        mass = fn.log_prob(torch.as_tensor(k, dtype=torch.float64)).exp().numpy()
        np.testing.assert_allclose(mass, (1 - share) * counts.pmf(k) + share * (k == 0), rtol=1e-6, atol=1e-12)
        assert mass.sum() == pytest.approx(1.0, abs=1e-9)
        assert float(fn.mean) == pytest.approx((1 - share) * mean)


def test_student_t_equals_scipys() -> None:
    x = torch.linspace(-5, 5, 11, dtype=torch.float64)
    found = of("student_t", [0.3], [0.7, 2.5]).log_prob(x).numpy()
    np.testing.assert_allclose(found, scipy.stats.t(2.5, 0.3, 0.7).logpdf(x.numpy()), rtol=1e-6)
    one = Likelihood("student_t", (1,))
    noise, df = one.bounded(one.raw_dispersion(()), torch.tensor(2.0)).tolist()
    assert noise == pytest.approx(2 * float(torch.nn.functional.softplus(torch.tensor(0.5))), rel=1e-3)
    assert df == pytest.approx(10.0, rel=1e-3) and one.bounded(torch.full((3, 2), -1e4))[:, 1].min() > 1


def test_the_continuous_bernoulli_is_exact_for_all_logits() -> None:
    """Against a Gauss-Legendre rule on pieces; a steep density needs them near the end where it is large."""
    points, weights = np.polynomial.legendre.leggauss(60)
    edges = np.concatenate([[0.0], np.geomspace(1e-6, 0.5, 12), 1 - np.geomspace(1e-6, 0.5, 12)[::-1][1:], [1.0]])
    low, high = edges[:-1, None], edges[1:, None]
    x = torch.as_tensor((low + (high - low) * (points + 1) / 2).ravel())[:, None]
    w = torch.as_tensor(((high - low) / 2 * weights).ravel())[:, None]
    fn = ContinuousBernoulli(logits=LOGITS)
    density = fn.log_prob(x).exp() * w
    torch.testing.assert_close(density.sum(0), torch.ones_like(LOGITS), rtol=0, atol=1e-9)
    mean = (density * x).sum(0)
    torch.testing.assert_close(fn.mean, mean, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(fn.variance, (density * (x - mean).square()).sum(0), rtol=1e-5, atol=1e-9)
    u = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)[:, None]
    cdf = torch.expm1(LOGITS * fn.icdf(u)) / torch.expm1(LOGITS)
    moderate = LOGITS.abs().clamp(max=30).eq(LOGITS.abs()) & (LOGITS != 0)
    torch.testing.assert_close(cdf[:, moderate], u.expand_as(cdf)[:, moderate], rtol=1e-5, atol=1e-5)


def test_a_continuous_bernoulli_has_finite_gradients() -> None:
    logits = torch.tensor([-100.0, -1e-6, 0.0, 1e-6, 1e-3, 0.5, 100.0], requires_grad=True)
    fn = ContinuousBernoulli(logits=logits)
    total = fn.log_prob(torch.full((7,), 0.3)).sum() + fn.mean.sum() + fn.variance.sum()
    (gradient,) = torch.autograd.grad(total, logits)
    assert gradient.isfinite().all()
    assert bool((((draws := fn.sample(torch.Size([1000]))) >= 0) & (draws <= 1)).all())


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("loc", [-0.5, 0.0, 0.31, 1.2])
@pytest.mark.parametrize("scale", [1e-4, 0.02, 3.0])
def test_the_masses_of_all_bins_add_up_to_one(levels: int, loc: float, scale: float) -> None:
    fn = DiscretizedLogistic(*torch.tensor([loc, scale], dtype=torch.float64), levels)
    bins = torch.arange(levels, dtype=torch.float64)
    mass = fn.log_prob((bins + 0.5) / levels).exp()
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-9)
    edges = np.concatenate([[-np.inf], np.arange(1, levels) / levels, [np.inf]])
    expected = np.diff(scipy.stats.logistic(loc, scale).cdf(edges))
    np.testing.assert_allclose(mass.numpy(), expected, rtol=1e-6, atol=1e-12)
    centres = (bins + 0.5) / levels
    assert float(fn.mean) == pytest.approx(float((mass * centres).sum()), abs=1e-9)
    assert float(fn.variance) == pytest.approx(float((mass * (centres - fn.mean).square()).sum()), abs=1e-9)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_both_conventions_of_pixels_fall_into_the_same_bins(levels: int) -> None:
    fn = DiscretizedLogistic(torch.tensor(0.4), torch.tensor(0.2), levels)
    v = torch.arange(levels, dtype=torch.float32)
    assert torch.equal(fn.log_prob(v / (levels - 1)), fn.log_prob((v + 0.5) / levels))
    assert len(fn.log_prob(v / (levels - 1)).unique()) > levels // 2


def test_draws_of_a_discretized_logistic_follow_its_masses() -> None:
    """A chi-squared test at 1e-5."""
    torch.manual_seed(0)
    fn = DiscretizedLogistic(torch.tensor(0.1), torch.tensor(0.3), 8)
    draws = fn.sample(torch.Size([20_000]))
    centres = (torch.arange(8) + 0.5) / 8
    counts = (draws[:, None] == centres).sum(0)
    assert int(counts.sum()) == 20_000
    expected = fn.log_prob(centres).exp().double()
    assert scipy.stats.chisquare(counts.numpy(), (20_000 * expected / expected.sum()).numpy()).pvalue > 1e-5


def test_levels_and_sequences_in_words() -> None:
    assert Likelihood("discretized_logistic", (2,)).levels == 256
    with pytest.raises(ValueError, match="the number of levels must be a whole number of at least 2; got 1"):
        Likelihood("discretized_logistic", (2,), levels=1)
    with pytest.raises(
        ValueError, match="levels is only for likelihood='discretized_logistic'; got likelihood='normal'"
    ):
        Likelihood("normal", (2,), levels=9)
    for family in ("student_t", "zero_inflated_poisson"):
        with pytest.raises(
            ValueError, match=f"likelihood='{family}' is for rows of a fixed size. For sequences, choose"
        ):
            Likelihood(family, (None, 2))
    message = r"x must be in \[0, 1\] for likelihood='continuous_bernoulli'; got values from 0 to 255\. Divide by 255"
    with pytest.raises(ValueError, match=message):
        Likelihood("continuous_bernoulli", (2,)).validate("x", Tensor([[0.0, 255.0]]))
