"""Fits from loaders and data sets: batches as the loader makes them, rows read anew at every pass."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

import deepprob as dp
from deepprob.data.containers import joined_alike
from deepprob.data.streams import ReadingError
from deepprob.fitting.callbacks import Callback, Fit
from deepprob.inference import svi
from deepprob.inference.svi import init, step
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

N, D = 90, 3
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([1.0, -2.0, 0.5])


class Rows(Dataset[Any]):
    """A data set with code: it counts its reads, and may add noise or fail."""

    def __init__(self, rows: int = N, noise: float = 0.0, bad: int = -1, named: bool = False) -> None:
        self.rows, self.noise, self.bad, self.named = rows, noise, bad, named
        self.seen: list[int] = []

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Any:
        if index == self.bad:
            raise KeyError("a broken file")
        self.seen.append(index)
        x = X[index] + self.noise * torch.randn(D)
        return {"y": Y[index], "x": x} if self.named else (x, Y[index])


class Stream(IterableDataset[Any]):
    """Rows without an end."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            x = torch.randn(D)
            yield x, x @ torch.tensor([1.0, -2.0, 0.5])


class Counted(Stream):
    def __len__(self) -> int:
        return 1000


class Codes(nn.Module):
    """Codes of rows with an amortized guide: every latent is local."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D, 4), nn.Linear(2, D)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


def regression(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def coded() -> Program:
    torch.manual_seed(1)
    own = Codes()
    return Program.of(own.model, own.guide, data_plate="data")


def linear(guide: Any = "normal") -> Program:
    return Program.of(regression, guide, data_plate="data")


def fitted(data: Any, program: Program | None = None, **options: Any) -> Posterior:
    options = {"seed": 0, "progress": False, "compile": False} | options
    return svi(program or linear(), data, **({} if "steps" in options else {"epochs": 3}) | options)


def same(a: Posterior, b: Posterior, tolerance: float = 0.0) -> bool:
    ours, theirs = a.parameters(), b.parameters()
    return all(torch.allclose(ours[n], theirs[n], tolerance, tolerance) for n in theirs)


def steps_of(posterior: Posterior) -> int:
    return len(posterior.history.steps["elbo"])


# -- loaders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("named", [False, True])
def test_a_loader_keeps_its_batches_and_their_order(workers: int, named: bool) -> None:
    rows = Rows(named=named)
    found = fitted(DataLoader(rows, batch_size=20, num_workers=workers))
    assert found.config["batch_size"] == 20 and steps_of(found) == 3 * 5
    # The same steps by hand, with the last batch of ten rows weighed by N / 10.
    state = init(linear(), (X, Y), epochs=3, batch_size=20)
    assert same(found, fitted(DataLoader(TensorDataset(X, Y), batch_size=20)))
    if not workers:
        assert rows.seen == 3 * list(range(N))
    assert state.instance.num_data == found.instance.num_data


def test_drop_last_custom_collate_and_samplers_are_the_loaders() -> None:
    dropped = Rows()
    found = fitted(DataLoader(dropped, batch_size=20, drop_last=True))
    assert steps_of(found) == 12 and max(dropped.seen) == 79
    doubled = DataLoader(Rows(), batch_size=30, collate_fn=lambda rows: tuple(
        torch.stack(column) * 2 for column in zip(*rows, strict=True)))  # fmt: skip
    assert same(fitted(doubled), fitted(DataLoader(TensorDataset(2 * X, 2 * Y), batch_size=30)))
    part = fitted(DataLoader(Rows(), batch_size=20, sampler=SubsetRandomSampler(range(40))))
    assert part.instance.num_data == 40 and steps_of(part) == 6


def test_batches_of_unequal_size_are_weighed_by_their_own_size() -> None:
    sizes = [[*range(30)], [*range(30, 35)], [*range(35, 90)]]
    loader = DataLoader(Rows(), batch_sampler=sizes)
    state, whole = (
        init(linear("map"), data, batch_size=size, epochs=1) for data, size in ((loader, "auto"), ((X, Y), 30))
    )
    assert state.config["batch_size"] == 30
    for rows in sizes:  # the guide is a point, so that no draw differs
        by_loader, by_hand = step(state)[1], step(whole, rows)[1]
        assert float(by_loader["elbo"]) == pytest.approx(float(by_hand["elbo"]))
        assert float(by_loader["gradient_norm"]) == pytest.approx(float(by_hand["gradient_norm"]))
    assert steps_of(fitted(loader, epochs=2)) == 6


def test_shuffled_tensors_stay_in_memory() -> None:
    a = fitted(DataLoader(TensorDataset(X, Y), batch_size=20, shuffle=True))
    assert same(a, fitted((X, Y), batch_size=20)) and a.config["batch_size"] == 20


def test_augmentation_is_drawn_anew_and_reproducible() -> None:
    rows = Rows(noise=0.3)
    before = torch.get_rng_state()
    a = fitted(rows, batch_size=30)
    assert torch.equal(before, torch.get_rng_state())
    assert all(rows.seen.count(i) >= 3 for i in range(N))
    assert same(a, fitted(Rows(noise=0.3), batch_size=30))
    assert not same(a, fitted(Rows(noise=0.3), batch_size=30, seed=1))
    assert a.training_rows is None


def test_a_data_set_without_noise_gives_the_fit_of_its_tensors() -> None:
    assert same(fitted(Rows(), batch_size=20), fitted((X, Y), batch_size=20))
    assert same(fitted(Rows(named=True), batch_size=20), fitted((X, Y), batch_size=20))


def test_compiled_steps_take_the_batches_of_a_loader() -> None:
    loader = DataLoader(Rows(), batch_size=20)
    compiled = fitted(loader, compile=True)
    assert compiled.config["compiled"] and same(compiled, fitted(loader), 1e-5)


def test_a_loader_and_restarts_and_levelling() -> None:
    found = fitted(DataLoader(Rows(), batch_size=20), steps=120, restarts=2)
    assert steps_of(found) == 120 and found.history.restarts
    assert found.history.levels["step"] == [120.0]


# -- iterables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [Stream(), DataLoader(Stream(), batch_size=16)], ids=["rows", "loader"])
def test_an_endless_iterable_fits_latents_of_rows(data: Any) -> None:
    found = fitted(data, coded(), steps=40)
    assert steps_of(found) == 40
    assert found.config["batch_size"] == (128 if isinstance(data, Stream) else 16)


def test_global_latents_need_the_number_of_rows() -> None:
    with pytest.raises(ValueError, match=r"w are shared by all rows, .* no length\. Write __len__ in the data set"):
        fitted(Stream(), steps=10)
    assert fitted(DataLoader(Counted(), batch_size=50), steps=10).instance.num_data == 1000


@pytest.mark.parametrize("length", [{"epochs": 2}, {"epochs": None}])
def test_passes_over_data_without_length_are_refused(length: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"cannot count passes over them\. Give its length in steps, steps=10000"):
        fitted(Stream(), coded(), **length)


def test_a_query_of_an_endless_iterable_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepprob.data.streams.bounded.__defaults__", (50,))
    posterior = fitted(Stream(), coded(), steps=5)
    with pytest.raises(ValueError, match="data has no length and gave 50 items without an end"):
        posterior.elbo(Stream())


# -- refusals -----------------------------------------------------------------------------------------------------


def test_parameters_of_rows_need_their_numbers() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", N) as rows:
            loc = pyro.param("loc", torch.zeros(N))
            pyro.sample("z", dist.Normal(loc[rows], 1.0))

    def model(x: Tensor) -> None:
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(-1, D), 1.0).to_event(1), obs=x)

    program = Program.of(model, guide, data_plate="data")
    with pytest.raises(ValueError, match=r"for every row of the data plate, but a loader does not say which"):
        fitted(DataLoader(TensorDataset(X), batch_size=20), program)
    assert steps_of(fitted(X, program, batch_size=20)) == 15


def test_another_batch_size_than_the_loaders_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size=32 is not that of the loader, whose batches have 20 rows"):
        fitted(DataLoader(Rows(), batch_size=20), batch_size=32)


def test_a_program_without_data_plate_says_that_it_needs_all_rows() -> None:
    with pytest.warns(
        UserWarning, match=r"names no data plate, so it needs all rows in every step: the loader is read"
    ):
        found = fitted(DataLoader(Rows(), batch_size=20), Program.of(regression, "normal"))
    assert found.config["batch_size"] == N


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loaders_own_error_is_named(workers: int) -> None:
    with pytest.raises(ReadingError, match=r"reading data failed in pass 1, batch 3, with KeyError: .*a broken file"):
        fitted(DataLoader(Rows(bad=50), batch_size=20, num_workers=workers))


def test_an_error_in_a_later_pass_carries_the_posterior() -> None:
    rows = Rows(rows=1200)
    rows.__class__ = type("Failing", (Rows,), {"__getitem__": lambda self, i: _failing(self, i)})
    with pytest.raises(ReadingError, match=r"pass 2, .* OSError: the disk is gone") as found:
        fitted(DataLoader(rows, batch_size=100))
    assert found.value.posterior.predict(X, draws=3).mean.shape == (N,)


def _failing(rows: Rows, index: int) -> Any:
    rows.seen.append(index)
    if len(rows.seen) > 1500:
        raise OSError("the disk is gone")
    return X[index % N], Y[index % N]


def test_empty_loaders_are_refused() -> None:
    with pytest.raises(ReadingError, match="data is empty in pass 1; expected at least one batch"):
        fitted(DataLoader(Rows(rows=5), batch_size=20, drop_last=True))


def test_a_bad_value_in_a_batch_is_named() -> None:
    y = Y.clone()
    y[75] = math.nan
    with pytest.raises(ValueError, match=r"'y' of data has 1 NaN value, the first in row 15\. .* \(batch 4\)"):
        fitted(DataLoader(TensorDataset(X, y), batch_size=20))


def test_ctrl_c_returns_the_posterior() -> None:
    class Press(Callback):
        def step_end(self, fit: Fit) -> None:
            if fit.step == 7:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.warns(UserWarning, match="interrupted after 7"):
        found = fitted(DataLoader(Rows(), batch_size=20, num_workers=1), callbacks=[Press()])
    assert found.predict(X, draws=3).mean.shape == (N,)


# -- sequences ----------------------------------------------------------------------------------------------------


class Songs(Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        return X[: 3 + index % 5]


class Melody(nn.Module):
    """A recurrent model of sequences of unequal length: padded with lengths, or packed."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(D, 4, batch_first=True), nn.Linear(4, 4)

    def guide(self, x: Any, lengths: Any = None) -> None:
        pyro.module("rnn", self.rnn)
        pyro.module("out", self.out)
        state = self.rnn(x)[1][0][-1]
        with pyro.plate("data", len(state)):
            loc, raw = self.out(state).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


def padded_songs(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    return pad_sequence(rows, batch_first=True), torch.tensor([len(x) for x in rows])


def songs_of(melody: Melody) -> Program:
    def model(x: Tensor, lengths: Tensor) -> None:
        inside = torch.arange(x.shape[1]) < lengths.unsqueeze(-1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            seen = dist.Normal(z[:, :1, None].expand(x.shape), 1.0).to_event(1)
            pyro.sample("x", seen.mask(inside).to_event(1), obs=x)

    return Program.of(model, melody.guide, data_plate="data")


def test_padded_batches_of_unequal_length() -> None:
    found = fitted(DataLoader(Songs(), batch_size=4, collate_fn=padded_songs), songs_of(Melody()))
    assert steps_of(found) == 18 and all(math.isfinite(x) for x in found.history.steps["elbo"])


def test_consecutive_batches_of_one_length_are_taken_as_single_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    by_length = sorted(range(24), key=lambda i: i % 5)
    loader = DataLoader(Songs(), batch_size=2, sampler=by_length, collate_fn=padded_songs)
    melody, results = Melody(), []
    start = {name: x.clone() for name, x in melody.state_dict().items()}
    for most in (None, 1):
        melody.load_state_dict(start)
        if most:
            monkeypatch.setattr("deepprob.fitting.loader_chunks.joined_alike", lambda x, _: joined_alike(x, 1))
        results.append(fitted(loader, songs_of(melody)))
    assert same(*results) and results[0].history.steps["elbo"] == results[1].history.steps["elbo"]


# -- queries ------------------------------------------------------------------------------------------------------


def test_held_out_loaders_and_checks_read_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = DataLoader(Rows(), batch_size=20)
    found = fitted((X, Y), held_out=loader)
    assert same(found, fitted((X, Y), held_out=(X, Y)))
    assert found.predict(DataLoader(Rows(), batch_size=20), draws=3).mean.shape == (N,)
    monkeypatch.setattr("deepprob.data.streams._MOST_BYTES", 20 * 4 * 4 * 2)
    with pytest.warns(UserWarning, match="held_out: looked at 40 of the loader's rows, the first ones"):
        assert same(fitted((X, Y), held_out=loader), fitted((X, Y), held_out=(X[:40], Y[:40])))
    with pytest.warns(UserWarning, match="data: looked at 40 of 90 rows, chosen at random"):
        assert dp.check(found, Rows()).verdict


def test_steps_by_hand_from_a_loader_and_a_data_set() -> None:
    state = init(linear(), DataLoader(Rows(), batch_size=20), epochs=1)
    for _ in range(6):
        state, terms = step(state)
    assert torch.isfinite(terms["elbo"])
    with pytest.raises(ValueError, match="a loader does not find rows by their numbers"):
        step(state, [0, 1])
    by_index, whole = (init(linear(), data, batch_size=20, epochs=1) for data in (Rows(), (X, Y)))
    for rows in (None, [5, 2, 80]):
        a, b = step(by_index, rows)[1], step(whole, rows)[1]
        assert torch.equal(a["elbo"], b["elbo"])
    assert state.posterior().predict(X, draws=2).mean.shape == (N,)


def test_a_loader_goes_back_to_its_last_position() -> None:
    state = init(linear(), DataLoader(Rows(), batch_size=20), epochs=1)
    chunks = state.chunks
    assert chunks is not None
    state, _ = step(state)
    early = chunks.position
    first = chunks.rows(1, 2)
    assert chunks.position is not early
    with pytest.raises(RuntimeError, match="a loader goes back to its last position only"):
        chunks.go_back(early)
    assert torch.equal(chunks.rows(1, 2), first)


def test_minibatches_of_a_data_set_need_a_data_plate() -> None:
    with pytest.raises(
        ValueError, match=r"batch_size=20 is smaller than the data \(90 rows\), but the program names no"
    ):
        fitted(Rows(), Program.of(regression, "normal"), batch_size=20)
