"""Moments of chains against closed forms."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_regression import LinearRegression, exact, regression_data
from torch import Tensor

from deepprob.inference import sghmc
from deepprob.programs.program import Program


def rates(y: Tensor | None = None) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", 30 if y is None else len(y)):
        pyro.sample("y", dist.Exponential(rate), obs=y)


@pytest.mark.parametrize(
    ("batch_size", "options"),
    [
        (None, {}),
        (None, {"friction": 1.0, "every": 30}),  # Langevin
        (None, {"cyclical": True}),
        (50, {}),
        (20, {}),
    ],
)
def test_moments_of_linear_regression(batch_size: int | None, options: dict[str, Any]) -> None:
    """About 1000 draws count as independent: 5 % are three standard errors of an sd, and 0.15 sd four of a mean."""
    x, y = regression_data()
    posterior = sghmc(
        LinearRegression(), (x, y), batch_size=batch_size, **{"draws": 1000} | options, progress=False, seed=2
    )
    mean, covariance = exact(x, y)
    sd = covariance.diagonal().sqrt()
    assert posterior.chains is not None
    draws = posterior.chains["w"].double().flatten(0, 1)
    assert (((draws.mean(0) - mean) / sd).abs() < 0.15).all()
    assert ((draws.std(0) / sd - 1.0).abs() < 0.08).all(), draws.std(0) / sd


def test_moments_of_a_positive_site() -> None:
    """The posterior is Gamma(2 + n, 1 + sum y); its mean differs from the mode in every coordinate."""
    y = torch.full((8,), 0.5)
    posterior = sghmc(Program.of(rates, data_plate="data"), y, batch_size=None, draws=1500, progress=False)
    exact_posterior = dist.Gamma(10.0, 5.0)
    assert posterior.chains is not None
    draws = posterior.chains["rate"]
    assert abs(float(draws.mean()) - 2.0) < 0.05
    assert abs(float(draws.std() / exact_posterior.variance.sqrt()) - 1.0) < 0.08
    assert abs(float((draws < exact_posterior.mean).double().mean()) - 0.5421) < 0.04
