"""The check of influential rows passes exact posteriors, from two rows upwards.

Seeds are fixed; see `test_diagnostics_level`.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from deepprob.diagnostics.checks.loo import check_loo
from deepprob.posteriors.arviz_compat import psis
from deepprob.posteriors.loo import LOO


def exact_loo(rows: int, weights: int, seed: int, draws: int = 1000) -> LOO:
    """Leave-one-out of a linear regression with an unknown scale, under draws from its exact posterior."""
    rng = np.random.default_rng(seed)
    x = np.c_[np.ones(rows), rng.normal(size=(rows, weights - 1))]
    y = x @ rng.normal(size=weights) + rng.normal(size=rows)
    covariance = np.linalg.inv(x.T @ x + np.eye(weights) / 10)
    mean, shape = covariance @ x.T @ y, 2 + rows / 2
    rate = 2 + 0.5 * (y @ y - mean @ np.linalg.solve(covariance, mean))
    scale = np.sqrt(stats.invgamma(shape, scale=rate).rvs(draws, random_state=rng))[:, None]
    w = mean + scale * rng.multivariate_normal(np.zeros(weights), covariance, size=draws)
    logs = stats.norm.logpdf(y, w @ x.T, scale)
    smoothed, khat = psis(-logs.T)
    return LOO(np.logaddexp.reduce(smoothed + logs.T, 1), khat, p_loo=1.0, draws=draws, method="stored draws")


@pytest.mark.parametrize(("rows", "weights"), [(2, 1), (3, 1), (5, 1), (8, 3), (20, 5), (200, 10)])
def test_exact_posteriors_pass(rows: int, weights: int) -> None:
    verdicts = [check_loo(exact_loo(rows, weights, seed)).verdict for seed in range(40)]
    assert sum(verdict != "pass" for verdict in verdicts) <= stats.binom.ppf(0.999, 40, 0.01)


def test_more_weights_than_the_rows_can_tell_are_a_caution() -> None:
    verdicts = [check_loo(exact_loo(20, 16, seed)).verdict for seed in range(10)]
    assert verdicts.count("caution") >= 9
