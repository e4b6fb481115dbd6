"""Numbers are read in the program's precision, with a warning where a column would lose digits in it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.utils.data import DataLoader

import deepprob as dp
from deepprob.data.precision import lossy_columns
from deepprob.fitting.rows_of_fit import rows_of_fit
from deepprob.inference import svi
from deepprob.models import BayesianNeuralNetwork

T = np.linspace(0.0, 1.0, 40)
SD = float(T.std())


def around(size: float) -> np.ndarray:
    """Values of one sd whose largest absolute value is a given size."""
    return T + size - T.max()


@pytest.mark.parametrize(("size", "lossy"), [(2.0**11, False), (2.0**12 + 1, True)])
def test_the_edge_is_a_thousandth_of_the_sd(size: float, lossy: bool) -> None:
    values = around(size)
    spacing = float(np.spacing(np.float32(values.max())))
    assert (spacing > 1e-3 * SD) == lossy
    assert lossy_columns(torch.from_numpy(values), torch.float32) == ([0] if lossy else [])


def test_the_smallest_lossy_spacing() -> None:
    x = torch.linspace(0.0, 1.0, 40, dtype=torch.float64) + 2.0**12
    spacing = 2.0 ** (12 - 23)
    for factor, lossy in ((0.999, True), (1.001, False)):
        scaled = (x - x.mean()) * (factor * spacing * 1e3 / float(x.std(unbiased=False))) + 2.0**12 + 1.5
        assert bool(lossy_columns(scaled, torch.float32)) == lossy


def test_constants_gaps_and_floats_of_the_precision_itself_lose_nothing() -> None:
    x = torch.full((5, 2), 1e9, dtype=torch.float64)
    x[1, 1] = torch.nan
    assert lossy_columns(x, torch.float32) == []
    assert lossy_columns(x.float() + torch.rand(5, 2), torch.float32) == []
    assert lossy_columns(torch.rand(5, dtype=torch.float64) + 1e9, torch.float64) == []


def test_whole_numbers_lose_digits_only_where_their_neighbors_are_not_exact() -> None:
    steps = torch.arange(40)
    assert lossy_columns(torch.stack([steps + 2**24 - 40, steps + 2**26, -steps - 2**26], 1), torch.float32) == [1, 2]
    assert lossy_columns(torch.stack([steps * 10**6 + 2**26, torch.full_like(steps, 2**40)], 1), torch.float32) == []
    assert lossy_columns(steps.to(torch.uint8), torch.float32) == lossy_columns(steps + 2**26, torch.float64) == []


def line(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * slope).sum(-1), 1.0), obs=y)


def accepted(x: Any, y: Any, program: dp.Program | None = None) -> Any:
    return (program or dp.Program.of(line)).accept((x, y))


SECONDS = around(1.7e9)
UNIX = 1_700_000_000 + np.arange(40)
GOOD = np.stack([T, T], 1)
FRAME = pd.DataFrame({"noon": T, "seconds": SECONDS})


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.stack([T, SECONDS], 1), T, r"'x' of data loses digits in float32.*Subtract 1\.7e\+09 from column 1,"),
        (FRAME, T, r"'x' of data loses digits in float32.*Subtract 1\.7e\+09 from column 'seconds', or"),
        (GOOD, SECONDS, r"'y' of data loses digits in float32.*Subtract 1\.7e\+09 from 'y' of data, or"),
        (GOOD, pd.Series(SECONDS), r"'y' of data loses digits"),
        (np.stack([UNIX - UNIX[0], UNIX], 1), T, r"whole numbers that lose.*Subtract 1700000020 from column 1,"),
        (
            pd.DataFrame({"a": UNIX // 10**9, "t": UNIX}),
            T,
            r"whole numbers that lose.*Subtract \d+ from column 't', or",
        ),
        (GOOD, UNIX, r"'y' of data holds whole numbers that lose digits in float32.*Subtract 1700000020 from 'y'"),
    ],
)
def test_one_warning_says_what_to_subtract(x: Any, y: Any, message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        accepted(x, y)
    assert len(caught) == 1


def test_no_warning_below_the_edge_nor_for_tables() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accepted(GOOD, T)
        accepted(np.stack([T, around(2.0**11)], 1), T)
        made = dp.table(FRAME.assign(y=T), "y")
        dp.Program.of(line).accept(made)
    assert float(made["x"][:, 1].std(unbiased=False)) == pytest.approx(1.0, rel=1e-5)


def test_a_target_of_a_table_warns_like_any_other() -> None:
    made = dp.table(FRAME, "seconds")
    assert made["y"].dtype == torch.float64
    with pytest.warns(UserWarning, match=r"'y' of data loses digits in float32"):
        dp.Program.of(line).accept(made)


@pytest.mark.parametrize("values", [SECONDS, UNIX])
def test_rows_that_are_read_in_pieces_give_one_warning(values: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", values[:, None])
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    pairs = [(values[i : i + 1], np.float32(T[i])) for i in range(len(values))]
    for data in ((mapped, T.astype(np.float32)), DataLoader(pairs, batch_size=4)):  # type: ignore[arg-type]
        program = BayesianNeuralNetwork(nn.Linear(1, 1))
        with pytest.warns(UserWarning, match="'x' of data .*in float32.*Subtract 1[.]?7") as caught:
            rows_of_fit(program, data, 4, torch.device("cpu"), 0)
        assert len(caught) == 1


@pytest.mark.parametrize("values", [SECONDS, UNIX])
def test_a_network_in_float64_keeps_its_data(values: Any) -> None:
    program = BayesianNeuralNetwork(nn.Linear(1, 1)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, y = accepted(values[:, None], T, program)
        program.adapt(x, y)
    assert x.dtype == y.dtype == program.x_scale.dtype == torch.float64
    assert float(program.x_scale) == pytest.approx(values.std(), rel=1e-6)


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2, dtype=torch.float64), self.scale).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * slope).sum(-1), self.scale), obs=y)


def test_a_program_in_float64_keeps_its_data() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, y = accepted(np.stack([T, SECONDS], 1), T, dp.Program.of(Double()))
    assert x.dtype == y.dtype == torch.float64
    assert torch.equal(x[:, 1], torch.from_numpy(SECONDS))


def test_sparse_matrices_are_read_as_dense_ones() -> None:
    x, _ = accepted(csr_array(GOOD), T)
    np.testing.assert_allclose(x.numpy(), GOOD, rtol=1e-6)
    huge = csr_array((2**14, 2**14))
    with pytest.raises(ValueError, match=r"'x' of data is a sparse matrix of shape \(16384, 16384\), .* 2.0 GiB"):
        accepted(huge, np.zeros(2**14))


def exact(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(torch.tensor(1.7e9, dtype=torch.float64), 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def capturing(dtype: torch.dtype) -> Any:
    center = torch.tensor(1.7e9, dtype=dtype)

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(center, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return model


@pytest.mark.parametrize("model", [exact, capturing(torch.float64)])
def test_functions_that_hold_float64_keep_their_data(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = svi(dp.Program.of(model, "normal"), SECONDS, steps=3, compile=False, progress=False)
    assert posterior.program.accept(SECONDS)[0].dtype == posterior.sample(draws=2)["mean"].dtype == torch.float64


def test_functions_that_hold_float32_warn_of_lost_digits() -> None:
    with pytest.warns(UserWarning, match="'y' of data loses digits"):
        (y,) = dp.Program.of(capturing(torch.float32)).accept(SECONDS)
    assert y.dtype == torch.float32
