"""The check of influential rows: it names them, passes exact posteriors, and says when the guide is to blame."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import deepprob as dp
from deepprob.diagnostics.checks.loo import check_loo
from deepprob.inference import svi
from deepprob.posteriors.loo import LOO

NOISE = torch.Generator().manual_seed(0)
X = torch.randn(40, generator=NOISE)
Y = 2 * X + 0.5 * torch.randn(40, generator=NOISE)


def line(x: Tensor, y: Tensor | None = None) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(b * x, 0.5), obs=y)


def found(khat: list[float], **values: float | None) -> LOO:
    rest = {"p_loo": 1.0, "draws": 1000, "method": "guide corrected", "guide_khat": 0.1} | values
    return LOO(-np.ones(len(khat)), np.array(khat), **rest)  # type: ignore[arg-type]


def test_training_rows_of_a_good_fit_pass() -> None:
    posterior = svi(dp.Program.of(line, "normal"), (X, Y), steps=600, progress=False, compile=False)
    check = dp.check(posterior, (X, Y))["influential rows"]
    assert check.verdict == "pass" and check.value == 0.0
    assert "elpd" in check.reading and check.details["method"] == "guide as it is"
    assert check.details["p_loo"] == pytest.approx(1.0, abs=0.6)


def test_an_influential_row_is_named() -> None:
    x, y = torch.cat([0.05 * X, torch.tensor([6.0])]), torch.cat([Y, torch.tensor([-20.0])])
    posterior = svi(dp.Program.of(line, "normal"), (x, y), steps=600, progress=False, compile=False)
    check = dp.check(posterior, (x, y))["influential rows"]
    assert check.details["influential"] == [40] and "(40)" in check.reading


def test_held_out_rows_and_points_are_not_asked() -> None:
    program = dp.Program.of(line, "normal", data_plate="rows")
    posterior = svi(program, (X[:30], Y[:30]), steps=50, progress=False, compile=False)
    assert "influential rows" not in [check.name for check in dp.check(posterior, (X[30:], Y[30:])).checks]
    point = svi(dp.Program.of(line, "map"), (X, Y), steps=50, progress=False, compile=False)
    assert "influential rows" not in [check.name for check in dp.check(point, (X, Y)).checks]


def test_many_influential_rows_are_a_caution() -> None:
    assert check_loo(found([0.9] * 10 + [0.1] * 10)).verdict == "pass"
    check = check_loo(found([0.9] * 16 + [0.1] * 4))
    assert check.verdict == "caution" and "too many parameters" in check.next_step
    assert check_loo(found([0.9, 0.9])).verdict == "pass"  # two rows tell too little


def test_rows_are_judged_without_the_weights_of_the_guide() -> None:
    """A log-normal guide is near the posterior of a scale, but has lighter tails."""

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        scale = pyro.sample("scale", dist.HalfNormal(3.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, scale), obs=y)

    posterior = svi(dp.Program.of(model, "normal"), Y, steps=800, seed=0, progress=False, compile=False)
    check = dp.check(posterior, Y)["influential rows"]
    assert check.verdict == "pass" and check.value < 0.1


def test_rows_without_a_finite_density_fail() -> None:
    wrong = found([0.1, 0.2, np.inf])
    wrong.pointwise[2] = np.nan
    check = check_loo(wrong)
    assert check.verdict == "fail" and check.reading.startswith("1 of 3 rows have no finite log-likelihood")
    assert check.reading.endswith(": 2.")
