"""Logs of a fit: a CSV file and TensorBoard."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import deepprob as dp
from deepprob.inference import svi

Y = torch.linspace(-1.0, 3.0, 8)


def model(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def fitted(*callbacks: Any, epochs: int = 6, **options: Any) -> dp.Posterior:
    program = dp.Program.of(model, "normal", data_plate="data")
    settings = {"batch_size": 4, "held_out": Y, "progress": False, "compile": False}
    return svi(program, Y, epochs=epochs, callbacks=callbacks, **settings | options)


def rows_of(path: Path) -> list[dict[str, float]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


class Stop(dp.Callback):
    """Break off a fit after an epoch, as a crash would."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def epoch_end(self, fit: Any) -> None:
        if fit.epoch == self.epoch:
            raise RuntimeError("power cut")


@pytest.mark.parametrize("make", [dp.CSVLogger, dp.TensorBoard])
@pytest.mark.parametrize("every", [0, 1.5])
def test_interval_must_be_whole(make: Any, every: Any) -> None:
    name = make.__name__
    with pytest.raises(ValueError, match=rf"{name}'s every must be a whole number of at least 1; got {every}\."):
        make("unused", every=every)


@pytest.mark.parametrize("every", [1, 2])
def test_csv_has_the_history_of_epochs(tmp_path: Path, every: int) -> None:
    path = tmp_path / "made" / "log.csv"
    history = fitted(dp.CSVLogger(path, every=every)).history
    rows = rows_of(path)
    assert [row.pop("epoch") for row in rows] == list(range(every, 7, every))
    expected = [dict(zip(history.epochs, values, strict=True)) for values in zip(*history.epochs.values(), strict=True)]
    assert rows == expected[every - 1 :: every]
    assert path.read_text().splitlines()[0].startswith("epoch,elbo,held_out_log_likelihood,kl_weight,")


def test_csv_of_a_fit_that_starts_over_is_new(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    for epochs in (5, 3):
        fitted(dp.CSVLogger(path), epochs=epochs)
    assert [row["epoch"] for row in rows_of(path)] == [1, 2, 3]


def without_seconds(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return [",".join(v for name, v in row.items() if name != "seconds") for row in csv.DictReader(file)]


def test_csv_of_a_resumed_fit_has_every_row_once(tmp_path: Path) -> None:
    """The fit goes on from epoch 4, after a crash at epoch 5 whose row is in the file."""
    fitted(dp.CSVLogger(tmp_path / "whole.csv"))
    path, checkpoint = tmp_path / "log.csv", dp.Checkpoint(tmp_path / "c", every=2)
    with pytest.raises(RuntimeError, match="power cut"):
        fitted(checkpoint, dp.CSVLogger(path), Stop(5))
    assert [row["epoch"] for row in rows_of(path)] == [1, 2, 3, 4, 5]
    fitted(checkpoint, dp.CSVLogger(path))
    assert without_seconds(path) == without_seconds(tmp_path / "whole.csv")


def test_csv_that_cannot_be_written_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "log.csv"
    with pytest.raises(
        IsADirectoryError, match=rf"must be one .*; got '{tmp_path}' \(is a directory\)\. Name a file\.$"
    ):
        fitted(dp.CSVLogger(tmp_path), Stop(1))
    with pytest.raises(OSError, match=rf"the CSV file must be one that can be written; got '{below}' \(.*\)\. Name"):
        fitted(dp.CSVLogger(below), Stop(1))


KILLED = """
import os, signal, sys
import torch, pyro, pyro.distributions as dist
import deepprob as dp
from deepprob.inference import svi

def model(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

def kill(fit):
    if fit.epoch == 4:
        os.kill(os.getpid(), signal.SIGKILL)

log = dp.CSVLogger(sys.argv[1])
svi(dp.Program.of(model, "normal"), torch.ones(9), epochs=9, compile=False, callbacks=[log, kill])
"""


def test_csv_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [row["epoch"] for row in rows_of(path)] == [1, 2, 3, 4]


class Writer:
    """A stand-in for torch's SummaryWriter."""

    def __init__(self, log_dir: str, purge_step: int) -> None:
        self.log_dir, self.purge_step, self.closed = log_dir, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []
        made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


made: list[Writer] = []


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    made.clear()
    return made


@pytest.mark.parametrize("every", [1, 2])
def test_tensorboard_gets_the_history_of_epochs(writers: list[Writer], tmp_path: Path, every: int) -> None:
    epochs = fitted(dp.TensorBoard(tmp_path / "board", every=every)).history.epochs
    (writer,) = writers
    assert (writer.log_dir, writer.purge_step, writer.closed) == (str(tmp_path / "board"), 1, True)
    expected = [(name, epochs[name][n - 1], n) for n in range(every, 7, every) for name in epochs]
    assert writer.scalars == expected


def test_tensorboard_of_a_resumed_fit_hides_later_epochs(writers: list[Writer], tmp_path: Path) -> None:
    checkpoint = dp.Checkpoint(tmp_path / "c", every=2)
    with pytest.raises(RuntimeError, match="power cut"):
        fitted(checkpoint, dp.TensorBoard(tmp_path / "board"), Stop(5))
    fitted(checkpoint, dp.TensorBoard(tmp_path / "board"))
    assert [writer.purge_step for writer in writers] == [1, 5]
    assert [step for name, _, step in writers[1].scalars if name == "elbo"] == [5, 6]


def test_tensorboard_names_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = r"^TensorBoard needs the package tensorboard, .* Install the extra deepprob\[tensorboard\], or only the"
    with pytest.raises(ImportError, match=message):
        dp.TensorBoard("unused")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_writes_files_that_it_reads(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    epochs = fitted(dp.TensorBoard(tmp_path)).history.epochs
    events = EventAccumulator(str(tmp_path)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("elbo")]
    assert found == [(n, pytest.approx(value)) for n, value in enumerate(epochs["elbo"], 1)]
