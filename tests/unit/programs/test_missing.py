"""Missing values (NaN): refused by default, and allowed where the model masks them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import deepprob as dp
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior

COMPLETE = 2 + torch.randn(12, generator=torch.Generator().manual_seed(0))
Y = torch.where(torch.arange(12) % 3 == 1, torch.nan, COMPLETE)


def in_a_mask(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)), poutine.mask(mask=~y.isnan()):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def masked_distribution(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0).mask(~y.isnan()), obs=y)


def observation_mask(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=~y.isnan())


def unmasked(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def fit(model: Any, y: Any, **options: Any) -> Posterior:
    program = dp.Program.of(model, "normal", missing="allow", data_plate="rows")
    options = {"steps": 3, "progress": False, "compile": False, "optimizer": Optimizer(learning_rate=0.03)} | options
    return svi(program, y, **options)


@pytest.mark.parametrize(
    ("model", "batch_size"), [(in_a_mask, None), (masked_distribution, None), (observation_mask, None), (in_a_mask, 6)]
)
def test_posterior_is_that_of_the_present_values(model: Any, batch_size: int | None) -> None:
    seen = COMPLETE[~Y.isnan()]
    precision = len(seen) + 1 / 9
    mu = fit(model, Y, steps=600, batch_size=batch_size).sample(Y, draws=4000)["mu"]
    assert float(mu.mean()) == pytest.approx(float(seen.sum()) / precision, abs=0.06)
    # With obs_mask the missing values are latent, and a mean-field guide has the precision given them.
    assert float(mu.std()) == pytest.approx((precision + 4 * (model is observation_mask)) ** -0.5, rel=0.15)


@pytest.mark.parametrize("model", [in_a_mask, masked_distribution])
def test_missing_values_have_no_likelihood(model: Any) -> None:
    posterior = fit(model, Y)
    found = posterior.log_likelihood(Y, draws=5)
    assert bool((found[:, Y.isnan()] == 0).all())
    assert bool((found[:, ~Y.isnan()] != 0).all())
    assert bool(torch.isfinite(posterior.log_evidence(Y)))
    assert posterior.to_arviz(Y, draws=5) is not None
    assert bool(torch.isfinite(posterior.predict(Y, draws=5).draws).all())


def test_masked_arrays_are_missing() -> None:
    y = np.ma.MaskedArray(COMPLETE.numpy(), mask=Y.isnan().numpy())
    assert float(fit(in_a_mask, y).sample()["mu"].mean()) == float(fit(in_a_mask, Y).sample()["mu"].mean())


def test_missing_values_in_part_of_an_event() -> None:
    y = torch.randn(6, 2)
    y[1] = torch.nan

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("rows", len(y)), poutine.mask(mask=~y.isnan().any(-1)):
            pyro.sample("y", dist.MultivariateNormal(mu, torch.eye(2)), obs=y)

    assert bool(torch.isfinite(fit(model, y).log_likelihood(y)).all())


def test_values_outside_the_support_do_not_take_their_place() -> None:
    y = torch.tensor([2.0, torch.nan, 3.0])

    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(y)), poutine.mask(mask=~y.isnan()):
            pyro.sample("y", dist.LogNormal(0.0, rate), obs=y)

    posterior = fit(model, y, steps=50)
    assert not any(posterior.history.steps["skipped"])


def test_refused_by_default() -> None:
    with pytest.raises(ValueError, match="'y' of data has 4 NaN values, the first in row 1"):
        svi(dp.Program.of(in_a_mask, "normal"), Y, progress=False)


def test_infinite_values_are_refused() -> None:
    with pytest.raises(ValueError, match="1 infinite value"):
        fit(in_a_mask, Y.index_fill(0, torch.tensor([0]), torch.inf))


def test_unmasked_missing_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"site 'y' observes 4 missing values \(NaN\) that it does not mask"):
        fit(unmasked, Y)


def test_unknown_ways_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown missing 'ignore'"):
        dp.Program.of(in_a_mask, "normal", missing="ignore")
