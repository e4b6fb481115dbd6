"""Folders saved by an earlier version load and give the numbers of that version (see make_saved.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import deepprob as dp

SAVED = Path(__file__).parent / "saved"
EXPECTED: dict[str, Any] = json.loads((SAVED / "expected.json").read_text())


def normal_means(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        mean = pyro.sample("mean", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


@pytest.fixture(params=["vae", "network", "program"])
def name(request: pytest.FixtureRequest, dtype: torch.dtype) -> str:
    if dtype is not torch.float32:
        pytest.skip("the folders hold float32, and a seed draws other numbers in another precision")
    return str(request.param)


@pytest.fixture
def posterior(name: str) -> dp.Posterior:
    own = dp.Program.of(normal_means, "normal", data_plate="data") if name == "program" else None
    return dp.Posterior.load(SAVED / name, program=own)


@pytest.fixture
def data(name: str) -> list[Tensor]:
    return [torch.tensor(x) for x in EXPECTED[name]["data"]]


def check_close(found: Tensor, expected: Any) -> None:
    expected = torch.tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # a sum of rounded numbers may be near zero


def test_parameters_keep_their_names_and_values(name: str, posterior: dp.Posterior) -> None:
    found, expected = posterior.instance.tensors(), EXPECTED[name]["parameter_sums"]
    assert list(found) == list(expected)
    for key, value in found.items():
        check_close(value.double().sum(), expected[key])


def test_samples_equal_those_of_the_saving_version(name: str, posterior: dp.Posterior, data: list[Tensor]) -> None:
    found, expected = posterior.sample(*data, draws=4, seed=0), EXPECTED[name]["sample"]
    assert list(found) == list(expected)
    for site, value in found.items():
        check_close(value, expected[site])


def test_predictions_equal_those_of_the_saving_version(name: str, posterior: dp.Posterior, data: list[Tensor]) -> None:
    check_close(posterior.predict(*data, draws=4, seed=0).mean, EXPECTED[name]["predicted_mean"])


def test_likelihoods_equal_those_of_the_saving_version(name: str, posterior: dp.Posterior, data: list[Tensor]) -> None:
    check_close(posterior.log_likelihood(*data, draws=4, seed=0), EXPECTED[name]["log_likelihood"])


def test_loaded_posterior_keeps_settings_and_history_when_saved(
    name: str, posterior: dp.Posterior, tmp_path: Path
) -> None:
    posterior.save(tmp_path)
    first, second = (json.loads((folder / "manifest.json").read_text()) for folder in (SAVED / name, tmp_path))
    facts = first["manifest"]["history"]
    facts["compiled_graphs"] = facts.pop("specialisations")  # the later name
    assert second["manifest"] == second["manifest"] | first["manifest"]  # a later version may add keys
