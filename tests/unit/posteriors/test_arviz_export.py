"""The ArviZ container of a posterior: its groups, the names of its axes, and its memory."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.inference import svi
from deepprob.posteriors import arviz_compat, draw_chunks
from deepprob.posteriors.draw_chunks import DrawArray
from deepprob.posteriors.from_draws import draws_posterior
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

SCHOOLS = ["Choate", "Deerfield", "Andover", "Exeter"]
TABLE = pd.DataFrame({"sigma": [15.0, 10.0, 16.0, 11.0], "y": [28.0, 8.0, -3.0, 7.0]}, index=SCHOOLS)
GROUPS = {
    *("posterior", "posterior_predictive", "log_likelihood", "sample_stats", "prior", "prior_predictive"),
    *("observed_data", "constant_data"),
}


def schools(sigma: Tensor, y: Tensor | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    scale = pyro.sample("scale", dist.HalfNormal(5.0))
    with pyro.plate("school", len(sigma)):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        mean = pyro.deterministic("mean", loc + scale * effect)
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def fitted(program: Program, data: Any, steps: int = 3) -> Posterior:
    return svi(program, data, steps=steps, progress=False, compile=False)


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    return fitted(Program.of(schools, "normal"), TABLE)


def groups_of(container: Any) -> set[str]:
    groups = container.groups if isinstance(container.groups, tuple) else container.groups()
    return {str(group).strip("/") for group in groups} - {""}


def test_all_groups_with_dims_and_coords_by_name(posterior: Posterior) -> None:
    idata = posterior.to_arviz(TABLE, draws=6)
    assert groups_of(idata) == GROUPS
    for group in ("posterior", "prior"):
        assert idata[group]["mean"].dims == idata[group]["effect"].dims == ("chain", "draw", "school")
        assert idata[group]["loc"].dims == ("chain", "draw")
    for group in ("posterior_predictive", "prior_predictive", "log_likelihood"):
        assert idata[group]["y"].dims == ("chain", "draw", "school")
        assert set(idata[group].data_vars) == {"y"}
    assert idata["observed_data"]["y"].sel(school="Exeter") == 7.0
    assert idata["constant_data"]["sigma"].sel(school="Andover") == 16.0
    assert set(idata["constant_data"].data_vars) == {"sigma"}
    assert idata["posterior"].attrs["inference_library"] == "deepprob"


def test_groups_hold_the_same_draws(posterior: Posterior) -> None:
    idata = posterior.to_arviz(TABLE, draws=6)
    assert_consistent(idata)
    drawn = posterior.sample(TABLE, draws=6)
    np.testing.assert_array_equal(idata["posterior"]["effect"].values[0], drawn["effect"].numpy())
    weights = posterior.log_weights(TABLE, particles=6).numpy()
    stats = idata["sample_stats"]
    np.testing.assert_allclose(stats["lp"].values[0] - stats["log_q"].values[0], weights, atol=1e-4)


def assert_consistent(idata: Any) -> None:
    """The log-likelihood is that of the draws in the posterior, and predictions scatter around their means."""
    mean, y = torch.as_tensor(idata["posterior"]["mean"].values), torch.as_tensor(idata["observed_data"]["y"].values)
    sigma = torch.as_tensor(idata["constant_data"]["sigma"].values)
    expected = dist.Normal(mean, sigma).log_prob(y)
    np.testing.assert_allclose(idata["log_likelihood"]["y"].values, expected.numpy(), rtol=1e-4, atol=1e-4)
    score = (torch.as_tensor(idata["posterior_predictive"]["y"].values) - mean) / sigma
    assert abs(float(score.mean())) < 4 / score.numel() ** 0.5
    assert score.unique().numel() == score.numel()


def test_parts_of_the_draws(posterior: Posterior, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = posterior.to_arviz(TABLE, draws=200)
    monkeypatch.setattr(draw_chunks, "MOST_NUMBERS", 600)
    idata = posterior.to_arviz(TABLE, draws=200)
    assert_consistent(idata)
    loc = idata["posterior"]["loc"].values.ravel()
    assert len(np.unique(loc)) == 200 and len(np.unique(idata["prior"]["loc"])) == 200
    assert loc[0] == whole["posterior"]["loc"].values[0, 0]
    assert abs(loc.mean() - whole["posterior"]["loc"].values.mean()) < 0.5 * loc.std()


def test_large_arrays_lie_in_a_file(posterior: Posterior, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = posterior.to_arviz(TABLE, draws=50)
    monkeypatch.setattr(draw_chunks, "IN_MEMORY", 300)
    found = posterior.to_arviz(TABLE, draws=50)
    for group in GROUPS:
        for name, values in expected[group].data_vars.items():
            np.testing.assert_array_equal(found[group][name].values, values.values)
    found["posterior"]["effect"].values[:] = 0.0  # a private copy of the file
    assert float(found["posterior"]["effect"].sum()) == 0.0


def test_a_full_disk_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(draw_chunks, "IN_MEMORY", 300)
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(
        OSError, match=r"the draws need 0\.0 GiB in .*, which has too little space .*fewer draws or rows"
    ):
        DrawArray(100).add(torch.zeros(2, 50))


def test_stored_draws_keep_their_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    chains = {
        "loc": torch.randn(2, 30, generator=g),
        "scale": torch.rand(2, 30, generator=g) + 0.5,
        "effect": torch.randn(2, 30, 4, generator=g),
    }
    posterior = draws_posterior(Program.of(schools), TABLE, chains)
    monkeypatch.setattr(draw_chunks, "MOST_NUMBERS", 200)
    idata = posterior.to_arviz(TABLE, draws=5)
    np.testing.assert_array_equal(idata["posterior"]["effect"].values, chains["effect"].numpy())
    assert idata["log_likelihood"]["y"].shape == (2, 30, 4)
    assert set(idata["sample_stats"].data_vars) == {"lp"}
    assert_consistent(idata)


def test_columns_of_a_frame_and_whole_arguments() -> None:
    x = pd.DataFrame(np.arange(12.0).reshape(6, 2), columns=["age", "height"])
    group, levels = torch.arange(6) % 3, torch.tensor([1.0, 2.0, 3.0])

    def model(x: Tensor, group: Tensor, levels: Tensor, count: int, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("group", count):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ w + a[group] * levels[group], 1.0), obs=y)

    data = (x, group, levels, 3, pd.Series(np.arange(6.0)))
    idata = fitted(Program.of(model, "normal"), data).to_arviz(*data, draws=4)
    inputs = idata["constant_data"]
    assert set(inputs.data_vars) == {"x", "group", "levels", "count"}
    assert inputs["x"].dims == ("rows", "x_column") and list(inputs["x_column"].values) == ["age", "height"]
    # an argument is called like the plate, so the axis of the plate gets another name
    assert idata["posterior"]["a"].dims == ("chain", "draw", "group_dim")
    assert idata["posterior"]["w"].dims == ("chain", "draw", "w_dim_0")


def test_an_argument_that_the_program_changes_counts_as_observed() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(b * x, 1.0), obs=None if y is None else y / 10)

    data = (torch.arange(5.0), torch.arange(5.0) ** 2)
    idata = fitted(Program.of(model, "normal"), data).to_arviz(*data, draws=4)
    assert set(idata["constant_data"].data_vars) == {"x"}


def test_two_plates_name_both_axes_and_the_rows_of_the_likelihood() -> None:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 5, dim=-2), pyro.plate("time", 3, dim=-1):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    y = torch.randn(5, 3)
    idata = fitted(Program.of(model, "normal", data_plate="rows"), y).to_arviz(y, draws=4)
    assert idata["observed_data"]["y"].dims == ("rows", "time")
    assert idata["posterior_predictive"]["y"].dims == ("chain", "draw", "rows", "time")
    assert idata["log_likelihood"]["y"].dims == ("chain", "draw", "rows")


def test_a_model_that_does_not_run_alone_has_no_prior() -> None:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    y = torch.randn(5)
    posterior = fitted(Program.of(model, "normal"), y)
    with pytest.warns(UserWarning, match="to_arviz leaves out the prior: the model does not run alone"):
        idata = posterior.to_arviz(y, draws=4)
    assert groups_of(idata) == GROUPS - {"prior", "prior_predictive", "constant_data"}


def test_a_container_is_written_and_read(posterior: Posterior, tmp_path: Path) -> None:
    pytest.importorskip("h5netcdf")
    az, path = arviz_compat.arviz(), tmp_path / "draws.nc"
    posterior.to_arviz(TABLE, draws=4).to_netcdf(path)
    assert az.from_netcdf(path)["posterior"]["mean"].sel(school="Exeter").shape == (1, 4)


def test_containers_of_arviz_1_are_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    xarray = pytest.importorskip("xarray")
    parts = [xarray.DataTree.from_dict({group: xarray.Dataset({"z": 1.0})}) for group in ("posterior", "prior")]
    both = arviz_compat.combined(parts)
    assert set(both.children) == {"posterior", "prior"} and float(both["prior"]["z"]) == 1.0


_PEAK = """
import resource, pyro, pyro.distributions as dist, torch
import deepprob as dp
from deepprob.inference import svi

def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

x = torch.randn(100_000)
y = x + torch.randn(100_000)
posterior = svi(dp.Program.of(model, "normal"), (x, y), steps=5, progress=False, compile=False)
posterior.to_arviz(x, y, draws=2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = posterior.to_arviz(x, y, draws=4000)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert found["log_likelihood"]["y"].shape == (1, 4000, 100_000)
print((after - before) / 2**20)
"""


@pytest.mark.slow
def test_peak_memory_of_four_thousand_draws_of_a_hundred_thousand_rows() -> None:
    """Each of three arrays has 1.5 GiB; together they take less than half a GiB of memory."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _PEAK], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5


def test_inputs_of_new_rows_have_the_plate_of_rows() -> None:
    def line(x: Tensor, y: Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

    posterior = fitted(Program.of(line, "normal"), (torch.arange(9.0), torch.ones(9)))
    idata = posterior.to_arviz(torch.arange(4.0), torch.ones(4), draws=6)
    assert idata["constant_data"]["x"].dims == idata["observed_data"]["y"].dims == ("row",)
