"""Loaders, data sets, streams, memory-mapped and sparse arrays: they are read as they are, and give the right value."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

import deepprob as dp
from deepprob.inference import svi
from deepprob.models import VAE, BayesianNeuralNetwork
from deepprob.posteriors.posterior import Posterior

N = 48
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 2)).astype(np.float32)
Y = (X @ [1.0, -2.0] + 0.3 * RNG.normal(size=N)).astype(np.float32)
ROWS = TensorDataset(torch.tensor(X), torch.tensor(Y))
DOTS = TensorDataset((torch.rand(N, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5).float())
EXACT = np.linalg.solve(X.T @ X / 0.09 + np.eye(2), X.T @ Y / 0.09)


def slopes_of(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 0.3), obs=y)


def fit(data: Any, program: Any = None, steps: int | None = 6, **options: Any) -> Posterior:
    program = program or dp.Program.of(slopes_of, "normal", data_plate="data")
    return svi(program, data, **({"steps": steps, "seed": 0, "progress": False, "compile": False} | options))


def slopes(data: Any) -> Tensor:
    optimizer = dp.Optimizer(learning_rate=0.1, average=0.9)
    return fit(data, steps=150, optimizer=optimizer).sample(draws=500)["w"].mean(0)


def close(found: Any, expected: Any, tolerance: float) -> None:
    found, expected = (torch.as_tensor(x if isinstance(x, Tensor) else np.array(x)).double() for x in (found, expected))
    torch.testing.assert_close(found, expected.expand(found.shape), atol=tolerance, rtol=0.0)


class Rows(Dataset[Any]):
    """Rows that are read with code, which counts and may add noise, name the fields or fail."""

    def __init__(self, noise: float = 0.0, named: bool = False, bad: int = -1) -> None:
        self.noise, self.named, self.bad = noise, named, bad
        self.read: list[int] = []

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        if i == self.bad:
            raise OSError("a broken file")
        self.read.append(i)
        x = X[i] + self.noise * np.random.default_rng(len(self.read)).normal(size=2).astype(np.float32)
        return {"y": Y[i], "x": x} if self.named else (x, Y[i])


class Stream(IterableDataset[Any]):
    """Rows without an end."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            for i in range(N):
                yield torch.tensor(X[i]), torch.tensor(Y[i])


class Pictures(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield DOTS[0][0]


def pairs(rows: list[Any]) -> dict[str, Tensor]:
    return {"y": torch.tensor([y for _, y in rows]), "x": torch.stack([torch.as_tensor(x) for x, _ in rows])}


def vae() -> VAE:
    return VAE((4, 4), 2, hidden_dims=(8,))


# -- loaders ----------------------------------------------------------------------------------------------------------

LOADERS: dict[str, Any] = {
    "rows in order": lambda: DataLoader(ROWS, batch_size=12),
    "shuffled": lambda: DataLoader(ROWS, batch_size=12, shuffle=True),
    "a last batch of another size": lambda: DataLoader(ROWS, batch_size=20, shuffle=True),
    "the last batch dropped": lambda: DataLoader(ROWS, batch_size=16, drop_last=True, shuffle=True),
    "a batch sampler": lambda: DataLoader(ROWS, batch_sampler=BatchSampler(RandomSampler(ROWS), 12, False)),
    "a collate function": lambda: DataLoader(Rows(), batch_size=12, shuffle=True, collate_fn=pairs),
    "rows as dicts": lambda: DataLoader(Rows(named=True), batch_size=12, shuffle=True),
    "a part of a data set": lambda: DataLoader(random_split(Rows(), [N, 0])[0], batch_size=12, shuffle=True),
}


@pytest.mark.parametrize("form", LOADERS)
def test_a_loader_gives_the_posterior_of_its_rows(form: str) -> None:
    close(slopes(LOADERS[form]()), EXACT, 0.15)


@pytest.mark.parametrize("form", ["data set with code", "tensor data set", "batches of all rows"])
def test_a_data_set_gives_the_posterior_of_its_rows(form: str) -> None:
    data = {
        "data set with code": Rows(),
        "tensor data set": ROWS,
        "batches of all rows": DataLoader(ROWS, batch_size=N),
    }
    close(slopes(data[form]), EXACT, 0.15)


@pytest.mark.parametrize("size", [1, 16, 20])
def test_the_batch_size_is_that_of_the_loader(size: int) -> None:
    posterior = fit(DataLoader(DOTS, batch_size=size), vae(), steps=None, epochs=2)
    assert posterior.config["batch_size"] == size
    assert len(posterior.history.steps["elbo"]) == 2 * -(-N // size)


def test_augmentation_is_drawn_anew_in_every_epoch() -> None:
    rows = Rows(noise=0.1)
    fit(DataLoader(rows, batch_size=12, shuffle=True), steps=None, epochs=5)
    assert len(rows.read) >= 5 * N


def test_a_sampler_chooses_the_rows() -> None:
    chosen, rows = [1, 2, 3, 5, 8, 13, 21, 34], Rows()
    posterior = fit(DataLoader(rows, batch_size=4, sampler=SubsetRandomSampler(chosen)), steps=None, epochs=4)
    assert {*rows.read} == {*chosen}
    assert posterior.config["batch_size"] == 4


def test_a_weighted_sampler_draws_rows_again() -> None:
    weights = [1.0 if i < 8 else 0.0 for i in range(N)]
    rows = Rows()
    fit(DataLoader(rows, batch_size=8, sampler=WeightedRandomSampler(weights, N)), steps=None, epochs=2)
    assert max(rows.read) < 8


def test_the_error_of_a_data_set_is_named() -> None:
    with pytest.raises(RuntimeError, match="a broken file"):
        fit(DataLoader(Rows(bad=30), batch_size=8))


# -- streams ----------------------------------------------------------------------------------------------------------


def test_an_endless_stream_is_read_for_as_many_steps_as_asked() -> None:
    posterior = fit(DataLoader(Pictures(), batch_size=8), vae(), steps=5)
    assert len(posterior.history.steps["elbo"]) == 5
    assert posterior.predict(torch.zeros(3, 4, 4), draws=2).mean.shape == (3, 4, 4)


def test_an_endless_stream_has_no_epochs() -> None:
    with pytest.raises(ValueError, match="steps="):
        fit(DataLoader(Pictures(), batch_size=8), vae(), steps=None, epochs=3)


def test_a_prior_over_all_rows_needs_their_number() -> None:
    with pytest.raises(ValueError, match="__len__"):
        fit(DataLoader(Stream(), batch_size=8))


# -- files and sparse matrices ----------------------------------------------------------------------------------------


def mapped(values: np.ndarray, path: Path) -> np.ndarray:
    made = np.memmap(path, values.dtype, "w+", shape=values.shape)
    made[:] = values
    made.flush()
    return np.memmap(path, values.dtype, "r", shape=values.shape)


@pytest.mark.parametrize("batch_size", [None, 16])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "f2"])
def test_a_memory_mapped_array_is_the_same_data(batch_size: int | None, dtype: str, tmp_path: Path) -> None:
    values = X.astype("f2").astype(dtype)
    files = (mapped(values, tmp_path / "x"), mapped(Y, tmp_path / "y"))
    found, expected = (fit(data, batch_size=batch_size).sample(draws=3)["w"] for data in (files, (values, Y)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_file_of_numpy_is_the_same_data(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    opened = np.load(tmp_path / "x.npy", mmap_mode="r")
    found, expected = (fit(data, batch_size=16).sample(draws=3)["w"] for data in ((opened, Y), (X, Y)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_array, sparse.coo_array], ids=lambda f: f.__name__)
def test_a_sparse_matrix_is_the_same_data(form: Any) -> None:
    x = X * (np.abs(X) > 0.5)
    found, expected = (fit(data, batch_size=16) for data in ((form(x), Y), (x, Y)))
    torch.testing.assert_close(found.sample(draws=3)["w"], expected.sample(draws=3)["w"], rtol=1e-5, atol=1e-6)
    assert torch.equal(found.predict(form(x), draws=4).mean, found.predict(x, draws=4).mean)


# -- the other doors --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted() -> Posterior:
    return fit((X, Y))


@pytest.mark.parametrize("form", ["loader", "data set", "tensor data set"])
def test_the_queries_take_loaders(fitted: Posterior, form: str) -> None:
    data = {"loader": DataLoader(Rows(), batch_size=20), "data set": Rows(), "tensor data set": ROWS}[form]
    assert torch.equal(fitted.log_likelihood(data, draws=3), fitted.log_likelihood((X, Y), draws=3))
    found, expected = (dp.check(fitted, given, draws=20) for given in (data, (X, Y)))
    np.testing.assert_equal([c.value for c in found.checks], [c.value for c in expected.checks])  # NaN: not measured


def test_a_loader_may_hold_rows_out() -> None:
    posterior = fit((X, Y), held_out=DataLoader(ROWS, batch_size=20), epochs=2, steps=None)
    assert len(posterior.history.held_out[1]) == 2


def test_deepprobs_models_take_loaders() -> None:
    network = BayesianNeuralNetwork(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)))
    rows = TensorDataset(torch.tensor(X), torch.tensor(Y)[:, None])
    posterior = fit(DataLoader(rows, batch_size=16, shuffle=True), network)
    assert posterior.predict(X, draws=3).mean.shape == (N, 1)
