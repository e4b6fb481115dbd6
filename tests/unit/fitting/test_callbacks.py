"""Callbacks: warm-up, early stopping, checkpoints, logging, each on a scripted fit."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest

from deepprob.fitting.callbacks import Callback, Checkpoint, EarlyStopping, KLWarmUp, Log
from deepprob.posteriors.history import History


class Scripted:
    """A fit that never ran."""

    def __init__(self, epochs: int = 10, steps_per_epoch: int = 4) -> None:
        self.epoch, self.step, self.stop = 0, 0, False
        self.steps_per_epoch, self.total_steps = steps_per_epoch, epochs * steps_per_epoch
        self.history = History(steps_per_epoch=steps_per_epoch)
        self.warm_up_steps = 0
        self.saved: list[int] = []

    def save_checkpoint(self, path: Path) -> None:
        self.saved.append(self.step)

    def end_epoch(self, **values: float) -> None:
        self.epoch += 1
        self.step += self.steps_per_epoch
        self.history.add_epochs({name: [value] for name, value in values.items()})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KLWarmUp(0), r"KLWarmUp's epochs must be positive; got 0\."),
        (lambda: KLWarmUp(math.nan), r"KLWarmUp's epochs must be positive; got nan\."),
        (lambda: KLWarmUp(2, start_weight=2.0), r"KLWarmUp's start_weight must lie in \[0, 1\]; got 2\.0\."),
        (lambda: EarlyStopping(patience=0), r"EarlyStopping's patience must be at least 1 epoch; got 0\."),
        (lambda: Checkpoint("x", every=0), r"Checkpoint's every must be a positive number of epochs; got 0\."),
        (lambda: Log(every=0), r"Log's every must be at least 1 epoch; got 0\."),
    ],
)
def test_settings_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_warm_up_is_linear_and_ends_at_one() -> None:
    warm_up = KLWarmUp(epochs=2, start_weight=0.2)
    assert [warm_up.kl_weight(s, 2) for s in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert warm_up.warm_up(Scripted(steps_per_epoch=3)) == 6
    assert Callback().kl_weight(0, 1) == 1.0
    assert Callback().warm_up(Scripted()) == 0


def test_warm_up_longer_than_the_fit_warns() -> None:
    with pytest.warns(UserWarning, match=r"KLWarmUp\(epochs=20\) is longer than the fit \(10 epochs\): the KL never"):
        KLWarmUp(20).start(Scripted(epochs=10))
    KLWarmUp(10).start(Scripted(epochs=10))


def test_early_stopping_waits_for_the_warm_up_and_then_for_its_patience() -> None:
    fit, stopping = Scripted(), EarlyStopping(patience=2, min_delta=0.1)
    fit.warm_up_steps = 12
    stopping.start(fit)
    stopped = []
    for value in (5.0, 4.0, 1.0, 2.0, 2.05, 2.09):  # falls while the KL grows; then hardly rises
        fit.end_epoch(elbo=99.0, held_out_elbo=value)
        stopping.epoch_end(fit)
        stopped.append(fit.stop)
    assert stopped == [False] * 5 + [True]


def test_early_stopping_reads_the_training_elbo_where_there_is_no_other_and_counts_nan() -> None:
    fit, stopping = Scripted(), EarlyStopping(patience=1)
    stopping.start(fit)
    for value, stop in ((1.0, False), (math.nan, True)):
        fit.end_epoch(elbo=value)
        stopping.epoch_end(fit)
        assert fit.stop is stop


def test_early_stopping_state_is_what_a_resumed_fit_needs_and_a_new_fit_forgets() -> None:
    stopping = EarlyStopping()
    stopping.best, stopping.waited = -3.0, 4
    twin = EarlyStopping()
    twin.restore(stopping.state())
    assert (twin.best, twin.waited) == (-3.0, 4)
    resumed = Scripted()
    resumed.step = 8
    twin.start(resumed)
    assert twin.waited == 4
    twin.start(Scripted())
    assert (twin.best, twin.waited) == (-math.inf, 0)
    Callback().restore(Callback().state())


@pytest.mark.parametrize(("every", "expected"), [(1, [4, 8, 12]), (0.5, [2, 4, 6, 8, 10, 12]), (2, [8, 12])])
def test_checkpoints_come_at_their_steps_and_at_the_end(every: float, expected: list[int]) -> None:
    fit, checkpoint = Scripted(epochs=3), Checkpoint("unused", every)
    for _ in range(3):
        for _ in range(4):
            fit.step += 1
            checkpoint.step_end(fit)
        checkpoint.epoch_end(fit)
    assert fit.saved == expected


def test_a_stop_is_saved() -> None:
    fit, checkpoint = Scripted(), Checkpoint("unused", every=5)
    fit.step, fit.stop = 4, True
    checkpoint.epoch_end(fit)
    assert fit.saved == [4]


def test_log_prints_one_line_every_so_often(capsys: pytest.CaptureFixture[str]) -> None:
    fit, file = Scripted(), io.StringIO()
    for _ in range(3):
        fit.end_epoch(elbo=-1.5, seconds=0.25)
        Log(every=2, file=file).epoch_end(fit)
    assert file.getvalue() == "epoch 2  elbo -1.5  seconds 0.25\n"
    Log().epoch_end(fit)
    assert capsys.readouterr().out.startswith("epoch 3  elbo")
