"""Fits whose rows are read while they run: from files, sparse matrices, data sets and loaders."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import sparse
from torch import Tensor, nn

from deepprob.fitting.callbacks import Callback, Checkpoint, Fit
from deepprob.inference import svi
from deepprob.models import VAE, BayesianNeuralNetwork
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

N, D = 700, 3
X = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
Y = (X @ np.array([1.0, -2.0, 0.5], dtype=np.float32) + 0.1).astype(np.float32)


def regression(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


class Codes(nn.Module):
    """A model of codes of rows, with an amortized guide, as a tutorial writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D, 4), nn.Linear(2, D)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


def codes() -> Program:
    torch.manual_seed(1)
    own = Codes()
    return Program.of(own.model, own.guide, data_plate="data")


def fitted(data: Any, program: Program | None = None, **options: Any) -> Posterior:
    program = program or Program.of(regression, "normal", data_plate="data")
    return svi(program, data, **{"epochs": 3, "seed": 0, "progress": False, "compile": False} | options)


def same(a: Posterior, b: Posterior, tolerance: float = 0.0) -> bool:
    ours, theirs = a.parameters(), b.parameters()
    return all(torch.allclose(ours[n], theirs[n], tolerance, tolerance) for n in theirs) and (
        tolerance > 0 or a.history.steps == b.history.steps
    )


def mapped(path: Path, array: np.ndarray, name: str = "x") -> np.memmap[Any, Any]:
    np.save(path / f"{name}.npy", array)
    found: np.memmap[Any, Any] = np.load(path / f"{name}.npy", mmap_mode="r")
    return found


# -- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", ["auto", 33, 100])
@pytest.mark.parametrize("kind", ["tuple", "dict", "mixed", "float64", "sparse"])
def test_a_mapped_array_gives_the_fit_of_the_array(kind: str, batch_size: Any, tmp_path: Path) -> None:
    x, y = mapped(tmp_path, X), mapped(tmp_path, Y, "y")
    wide = mapped(tmp_path, X.astype(np.float64), "wide")
    data: dict[str, Any] = {
        "tuple": (x, y),
        "dict": {"y": y, "x": x},
        "mixed": (x, Y),
        "float64": (wide, torch.from_numpy(Y)),
        "sparse": (sparse.csr_matrix(X), Y),
    }
    found = fitted(data[kind], batch_size=batch_size)
    assert same(found, fitted((X, Y), batch_size=batch_size))
    assert found.config["batch_size"] == (128 if batch_size == "auto" else batch_size)


def test_chunks_that_are_shorter_than_an_epoch_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = mapped(tmp_path, X), mapped(tmp_path, Y, "y")
    monkeypatch.setattr("deepprob.fitting.chunks.BYTES", 4 * 4 * 10 * 3)  # three steps
    assert same(fitted(data, batch_size=10), fitted((X, Y), batch_size=10))
    assert same(
        fitted(data, batch_size=10, epochs=None, steps=120), fitted((X, Y), batch_size=10, steps=120, epochs=None)
    )


@pytest.mark.parametrize("make", [codes, lambda: VAE((D,), 2, (8,), likelihood="normal")], ids=["own", "VAE"])
def test_models_of_rows_are_the_same_from_a_file(make: Any, tmp_path: Path) -> None:
    assert same(fitted(mapped(tmp_path, X), make()), fitted(X, make()))


def test_a_bayesian_network_is_the_same_from_a_file(tmp_path: Path) -> None:
    x, y, network = 5 + 3 * X, Y[:, None], nn.Linear(D, 1)
    a, b = (
        fitted(data, BayesianNeuralNetwork(network), seed=2)
        for data in ((mapped(tmp_path, x), mapped(tmp_path, y, "y")), (x, y))
    )
    assert same(a, b)
    assert torch.equal(a.program.x_loc, b.program.x_loc) and torch.equal(a.program.y_scale, b.program.y_scale)


def test_parameters_of_rows_belong_to_the_rows_of_a_file(tmp_path: Path) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(-1, D), 1.0).to_event(1), obs=x)

    program = Program.of(model, "normal", data_plate="data")
    assert same(fitted(mapped(tmp_path, X), program), fitted(X, program))


@pytest.mark.parametrize("guide", ["normal", "multivariate_normal"])
def test_levelling_and_restarts_are_those_of_the_array(guide: str, tmp_path: Path) -> None:
    data = mapped(tmp_path, X), mapped(tmp_path, Y, "y")
    options: dict[str, Any] = {"guide": guide, "epochs": None, "steps": 300, "restarts": 2}
    assert same(fitted(data, **options), fitted((X, Y), **options))


def test_a_fit_from_a_file_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepprob.fitting.chunks.BYTES", 4 * 4 * 50 * 9)  # chunks end within epochs
    data = mapped(tmp_path, X), mapped(tmp_path, Y, "y")
    whole = fitted(data, batch_size=50, epochs=6)

    class Stop(Callback):
        def step_end(self, fit: Fit) -> None:
            if fit.step == 37:
                raise KeyboardInterrupt

    checkpoint = Checkpoint(tmp_path / "run", every=0.2)
    with pytest.warns(UserWarning, match="interrupted after 37"):
        fitted(data, batch_size=50, epochs=6, callbacks=[checkpoint, Stop()])
    again = Checkpoint(tmp_path / "run", every=0.2)
    assert same(fitted(data, batch_size=50, epochs=6, callbacks=[again]), whole)


def test_compiled_steps_read_chunks(tmp_path: Path) -> None:
    data = mapped(tmp_path, X), mapped(tmp_path, Y, "y")
    compiled = fitted(data, compile=True, batch_size=100)
    assert compiled.config["compiled"]
    assert same(compiled, fitted(data, batch_size=100), 1e-5)


@pytest.mark.parametrize(
    ("row", "value", "message"),
    [
        (650, math.nan, r"'x' of data has 1 NaN value, the first in row 650\."),
        (3, math.inf, r"1 infinite value, the first in row 3\."),
    ],
)
def test_a_bad_value_is_named_by_its_row(row: int, value: float, message: str, tmp_path: Path) -> None:
    x = X.copy()
    x[row, 1] = value
    with pytest.raises(ValueError, match=message):
        fitted((mapped(tmp_path, x), mapped(tmp_path, Y, "y")), batch_size=10)


def test_values_outside_of_the_support_are_found_while_the_fit_runs(tmp_path: Path) -> None:
    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    y = np.ones(N, dtype=np.float32)
    y[690] = -1
    with pytest.raises(ValueError, match=r"y must be whole numbers .* \(epoch 1, rows \d+ to \d+\)"):
        fitted(mapped(tmp_path, y), Program.of(model, "normal", data_plate="data"), batch_size=10)


def test_a_file_of_one_batch_is_read_at_once(tmp_path: Path) -> None:
    data = mapped(tmp_path, X), mapped(tmp_path, Y, "y")
    assert same(fitted(data, batch_size=None), fitted((X, Y), batch_size=None))


def test_laplace_needs_all_rows(tmp_path: Path) -> None:
    data = mapped(tmp_path, X), mapped(tmp_path, Y, "y")
    with pytest.raises(ValueError, match="guide='laplace' needs all rows at once, and data are read"):
        fitted(data, guide="laplace")


def test_an_argument_beside_the_rows_is_passed_whole(tmp_path: Path) -> None:
    def model(x: Tensor, y: Tensor, sd: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(D), sd).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    program, sd = Program.of(model, "normal", data_plate="data"), np.ones(D, dtype=np.float32)
    assert same(fitted((mapped(tmp_path, X), Y, sd), program), fitted((X, Y, sd), program))


LARGE = """
import sys, threading, numpy as np, torch
import pyro, pyro.distributions as dist
from deepprob.inference import svi
from deepprob.programs.program import Program

def held():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def model(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(64), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w.expand(len(x), 64), 1.0).to_event(1), obs=x)

def fit(x):
    svi(Program.of(model, "normal", data_plate="data"), x, steps=60, compile=False, progress=False)

fit(np.ones((500, 64), dtype=np.float32))
before, most, ended = held(), [0.0], threading.Event()
def watch():
    while not ended.wait(0.002):
        most[0] = max(most[0], held())
thread = threading.Thread(target=watch)
thread.start()
fit(np.memmap(sys.argv[1], np.float32, "w+", shape=(1_600_000, 64)))
ended.set()
thread.join()
print(most[0] - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_larger_than_the_memory_is_never_copied(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path / "large")], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100  # MB; the file has 410


def test_an_argument_that_is_needed_whole_is_refused(tmp_path: Path) -> None:
    def model(x: Tensor, table: Tensor) -> None:
        with pyro.plate("data", N):
            pyro.sample(
                "x", dist.Normal(table[3] + pyro.param("a", torch.zeros(())), 1.0).expand([D]).to_event(1), obs=x
            )

    with pytest.raises(ValueError, match="needs some of its arguments whole, and data are read row by row"):
        fitted((mapped(tmp_path, X), Y), Program.of(model, lambda x, table: None, data_plate="data"), batch_size=10)
