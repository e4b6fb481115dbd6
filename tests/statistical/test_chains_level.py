"""R-hat and effective sample sizes keep their level on independent draws, and on chains that mix.

Seeds are fixed; see `test_diagnostics_level`.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from deepprob.diagnostics.checks.chains import check_ess, check_rhat


def chains(seed: int, count: int, draws: int, numbers: int, rho: float = 0.0) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(seed).normal(size=(count, draws + 50, numbers))
    for t in range(1, draws + 50 if rho else 0):
        noise[:, t] = rho * noise[:, t - 1] + np.sqrt(1 - rho**2) * noise[:, t]
    return {"w": noise[:, 50:]}


@pytest.mark.parametrize("numbers", [1, 10])
@pytest.mark.parametrize(("count", "draws"), [(1, 100), (2, 100), (4, 100), (1, 400), (4, 1000), (2, 4000)])
def test_independent_draws_pass(count: int, draws: int, numbers: int) -> None:
    trials = 100 if numbers == 1 else 30
    found = [chains(seed, count, draws, numbers) for seed in range(trials)]
    alarms = sum(check_rhat(x, level=0.05).verdict != "pass" for x in found)
    assert alarms <= stats.binom.ppf(0.999, trials, 0.05)
    assert sum(check_ess(x).verdict != "pass" for x in found) <= stats.binom.ppf(0.999, trials, 0.02)


def test_chains_that_mix_pass() -> None:
    found = [chains(seed, 4, 1000, 1, rho=0.8) for seed in range(60)]
    assert sum(check_rhat(x, level=0.05).verdict != "pass" for x in found) <= stats.binom.ppf(0.999, 60, 0.05)
    assert all(check_ess(x).verdict == "pass" for x in found)


@pytest.mark.parametrize("draws", [100, 1000])
def test_disjoint_chains_never_pass(draws: int) -> None:
    for seed in range(20):
        shifted = {"w": chains(seed, 2, draws, 1)["w"] + np.array([0.0, 6.0])[:, None, None]}
        assert check_rhat(shifted, level=0.01).verdict == "fail"
