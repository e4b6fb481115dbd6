"""R-hat and effective sample sizes: they equal ArviZ's, name the worst number, and see chains that disagree."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import deepprob as dp
from deepprob.diagnostics.checks.chains import check_ess, check_rhat
from deepprob.inference import ensemble
from deepprob.posteriors.arviz_compat import ess, rhat

Y = torch.tensor([0.1, -0.4, 0.7, 0.2])


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def model(y: Tensor | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def report_of(chains: np.ndarray) -> dp.Report:
    values = torch.as_tensor(chains, dtype=torch.get_default_dtype())
    return dp.check(dp.draws_posterior(dp.Program.of(model, data_plate="data"), Y, {"loc": values}), Y)


def test_two_disjoint_chains_fail() -> None:
    report = report_of(0.15 + 0.5 * noise(2, 400) + np.array([[-4.0], [4.0]]))
    check = report["R-hat"]
    assert report.verdict == check.verdict == "fail"
    assert check.value > 1.5 and check.limit == "<= 1.01"
    assert check.reading.startswith("R-hat of loc is") and "2 chains of 400 draws do not agree" in check.reading
    assert report["effective sample size"].verdict == "fail"


def test_chains_that_agree_pass() -> None:
    report = report_of(0.15 + 0.5 * noise(2, 400))
    assert report["R-hat"].verdict == report["effective sample size"].verdict == "pass"
    assert report["effective sample size"].limit == ">= 50"


@pytest.mark.parametrize("kind", ["posterior", "prior", "half as wide", "of another data set"])
def test_draws_are_compared_with_the_density_that_they_should_come_from(kind: str) -> None:
    """R-hat and ESS see chains that disagree, not chains that agree on the wrong distribution."""
    mean, sd = float(Y.sum() / (4 + 1 / 25)), (4 + 1 / 25) ** -0.5
    loc, scale = {
        "posterior": (mean, sd),
        "prior": (0.0, 5.0),
        "half as wide": (mean, sd / 2),
        "of another data set": (mean + 3 * sd, sd),
    }[kind]
    report = report_of(loc + scale * noise(4, 400))
    assert report["R-hat"].verdict == report["effective sample size"].verdict == "pass"
    means, widths = (report[f"posterior {name}, global latents"] for name in ("means", "widths"))
    assert means.reading.startswith("The draws' mean of loc")
    assert widths.reading.startswith("The draws' sd of loc")
    assert means.verdict == ("fail" if kind == "of another data set" else "pass")
    assert widths.verdict == {"prior": "fail", "half as wide": "caution"}.get(kind, "pass")
    assert (report.verdict == "pass") == (kind == "posterior")
    if kind == "of another data set":
        assert means.next_step.startswith("Are these the data")


def test_the_judgement_of_draws_is_saved(tmp_path: Path) -> None:
    values = torch.as_tensor(5.0 * noise(4, 400), dtype=torch.get_default_dtype())
    posterior = dp.draws_posterior(dp.Program.of(model, data_plate="data"), Y, {"loc": values})
    posterior.save(tmp_path / "run")
    again = dp.Posterior.load(tmp_path / "run", dp.Program.of(model, data_plate="data"))
    assert dp.check(again, Y)["posterior widths, global latents"].verdict == "fail"


def test_values_are_those_of_arviz_for_the_worst_number() -> None:
    draws = noise(4, 300, 5)
    draws[1, :, 3] += 2.0
    check = check_rhat({"w": draws, "loc": noise(4, 300, seed=1)})
    assert check.verdict == "fail" and check.reading.startswith("R-hat of w[3] is")
    assert check.value == rhat(draws[:, :, 3])
    worst = check.details["sites"]["w[3]"]
    assert worst["ess_bulk"] == ess(draws[:, :, 3]) and worst["ess_tail"] == ess(draws[:, :, 3], method="tail")
    assert check_ess({"w": draws}).value == min(worst["ess_bulk"], worst["ess_tail"])


def test_one_chain_is_compared_with_itself() -> None:
    assert check_rhat({"a": noise(1, 400)}).verdict == "pass"
    drift = noise(1, 400) + np.linspace(0, 4, 400)
    check = check_rhat({"a": drift})
    assert check.verdict == "fail" and "the halves of one chain of 400 draws do not agree" in check.reading


def test_a_chain_of_another_scale_is_seen() -> None:
    draws = noise(4, 1000)
    draws[0] *= 0.3
    assert check_rhat({"a": draws}).verdict == "fail"


def test_slow_chains_have_few_effective_draws() -> None:
    check = check_ess({"a": noise(4, 500).cumsum(1)})
    assert check.verdict == "fail" and check.unit == "draws"
    assert "draws are worth" in check.reading and "Monte Carlo error" in check.reading


def test_chains_that_stay_in_place_and_numbers_that_are_not_finite_fail() -> None:
    stuck = np.repeat([[0.0], [1.0]], 100, 1)
    assert check_rhat({"a": stuck}).verdict == "fail" and math.isinf(check_rhat({"a": stuck}).value)
    assert "its chains do not move" in check_ess({"a": stuck}).reading
    wrong = noise(2, 100)
    wrong[0, 3] = np.nan
    check = check_rhat({"b": noise(2, 100), "a": wrong})
    assert check.verdict == "fail" and check.reading == "The draws of a are not all finite numbers."


def test_zeros_and_ones_are_compared() -> None:
    values = np.random.default_rng(0).permutation(np.repeat([0.0, 1.0], 400)).reshape(2, 400)
    assert check_rhat({"k": values}).verdict == check_ess({"k": values}).verdict == "pass"


def test_numbers_that_never_vary_are_left_out() -> None:
    factor = np.zeros((2, 200, 2, 2))
    factor[..., 1, 0] = noise(2, 200)
    check = check_rhat({"factor": factor})
    assert check.verdict == "pass" and check.details["numbers"] == 1 and "factor[1, 0]" in check.reading


def test_large_sites_are_judged_by_some_of_their_numbers() -> None:
    assert check_rhat({"w": noise(2, 20, 40, 50)}).details["numbers"] == 200


def test_short_and_constant_chains_are_unchecked_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"R-hat needs chains of at least 16 draws; these have 5\."):
        check_rhat({"a": noise(2, 5)})
    with pytest.raises(ValueError, match="All draws are the same: there is nothing to compare"):
        check_rhat({"a": np.zeros((2, 50))})
    assert report_of(noise(2, 5))["R-hat"].verdict == "unchecked"


def test_members_of_an_ensemble_are_no_chains() -> None:
    program = dp.Program.of(model, data_plate="data")
    posterior = ensemble(program, Y, members=3, steps=100, batch_size=None, progress=False)
    checks = {check.name: check for check in dp.check(posterior, Y, train=Y).checks}
    assert not {"R-hat", "effective sample size"} & set(checks)
    means = checks["posterior means, global latents"]
    assert means.verdict == "unchecked"
    assert means.reading.startswith("The 3 members are modes, not draws from the posterior")
