"""Callbacks: warm-up, early stopping, checkpoints and logging, each on a scripted fit."""

from __future__ import annotations

import functools
import io
import math
import re
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scripted import Scripted
from torch import Tensor
from uncompiled import replace_compiler

from deepprob.fitting.callbacks import Callback, Checkpoint, EarlyStopping, Fit, Log
from deepprob.fitting.kl_schedules import KLWarmUp
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KLWarmUp(0), r"KLWarmUp's epochs must be positive; got 0\."),
        (lambda: KLWarmUp(math.nan), r"KLWarmUp's epochs must be positive; got nan\."),
        (lambda: KLWarmUp(2, start_weight=2.0), r"KLWarmUp's start_weight must lie in \[0, 1\]; got 2\.0\."),
        (lambda: EarlyStopping(patience=0), r"EarlyStopping's patience must be a whole number of at least 1; got 0\."),
        (lambda: Checkpoint("x", every=0), r"Checkpoint's every must be a positive number of epochs; got 0\."),
        (lambda: Log(every=0), r"Log's every must be a whole number of at least 1; got 0\."),
        (lambda: Log(every=1.5), r"Log's every must be a whole number of at least 1; got 1\.5\."),  # type: ignore[arg-type]
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


def test_warns_of_warm_up_longer_than_the_fit() -> None:
    message = (
        r"KLWarmUp\(epochs=20\) is longer than the fit \(10 epochs\): the KL never reaches its full weight\. "
        r"Shorten the warm-up, or fit for longer: raise epochs= or steps= of svi\."
    )
    with pytest.warns(UserWarning, match=message):
        KLWarmUp(20).start(Scripted(epochs=10))
    KLWarmUp(10).start(Scripted(epochs=10))


def test_early_stopping_waits_for_warm_up_and_patience() -> None:
    fit, stopping = Scripted(), EarlyStopping(patience=2, min_delta=0.1)
    fit.warm_up_steps = 12
    stopping.start(fit)
    stopped = []
    for value in (5.0, 4.0, 1.0, 2.0, 2.05, 2.09):  # falls while the KL grows; then hardly rises
        fit.end_epoch(elbo=99.0, held_out_elbo=value)
        stopping.epoch_end(fit)
        stopped.append(fit.stop)
    assert stopped == [False] * 5 + [True]


def test_early_stopping_without_held_out_data_and_with_nan() -> None:
    fit, stopping = Scripted(), EarlyStopping(patience=1)
    stopping.start(fit)
    for value, stop in ((1.0, False), (math.nan, True)):
        fit.end_epoch(elbo=value)
        stopping.epoch_end(fit)
        assert fit.stop is stop


def test_early_stopping_warns_where_an_epoch_is_one_noisy_step() -> None:
    fit, stopping = Scripted(steps_per_epoch=1), EarlyStopping(patience=1)
    for value in (1.0, 0.5):
        fit.end_epoch(elbo=value)
        if value < 1.0:
            with pytest.warns(UserWarning, match=r"EarlyStopping\(patience=1\) ended the fit after 2 steps: an epoch"):
                stopping.epoch_end(fit)
        else:
            stopping.epoch_end(fit)
    assert fit.stop


def test_early_stopping_restores_its_state_only_in_a_resumed_fit() -> None:
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
def test_checkpoints_at_the_interval_and_at_the_end(every: float, expected: list[int]) -> None:
    fit, checkpoint = Scripted(epochs=3), Checkpoint("unused", every)
    for _ in range(3):
        for _ in range(4):
            fit.step += 1
            checkpoint.step_end(fit)
        checkpoint.epoch_end(fit)
    assert fit.saved == expected


@pytest.mark.parametrize(("steps_per_epoch", "interval"), [(1, 100), (12, 108), (100, 100), (469, 469)])
def test_checkpoints_are_a_hundred_steps_apart_by_default(steps_per_epoch: int, interval: int) -> None:
    assert Checkpoint("unused").interval(steps_per_epoch) == interval


def test_checkpoint_when_the_fit_stops() -> None:
    fit, checkpoint = Scripted(), Checkpoint("unused", every=5)
    fit.step, fit.stop = 4, True
    checkpoint.epoch_end(fit)
    assert fit.saved == [4]


def test_log_prints_at_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    fit, file = Scripted(), io.StringIO()
    for _ in range(3):
        fit.end_epoch(elbo=-1.5, seconds=0.25)
        Log(every=2, file=file).epoch_end(fit)
    assert file.getvalue() == "epoch 2  elbo -1.5  seconds 0.25\n"
    Log().epoch_end(fit)
    assert capsys.readouterr().out.startswith("epoch 3  elbo")


class Averaged(Callback):
    """The mean of the parameters over every third step, as in stochastic weight averaging."""

    def __init__(self) -> None:
        self.count, self.mean = 0, {}  # type: ignore[var-annotated]

    def interval(self, steps_per_epoch: int) -> int:
        return 3

    def step_end(self, fit: Fit) -> None:
        self.count += 1
        for name, value in fit.parameters().items():
            before = self.mean.get(name, torch.zeros_like(value))
            self.mean[name] = before + (value - before) / self.count


@pytest.mark.parametrize("compile", [False, True])
def test_callback_averages_the_parameters_of_a_fit(compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient descent on a quadratic: after k steps the mode is 2 (1 - 0.8^k)."""
    replace_compiler(monkeypatch)

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1e4))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("loc", dist.Delta(pyro.param("mode", torch.tensor(0.0))))

    averaged, optimizer = Averaged(), Optimizer("sgd", learning_rate=0.2, schedule="constant")
    posterior = svi(
        Program.of(model, guide), torch.full((5,), 2.0), steps=12, optimizer=optimizer, compile=compile,
        callbacks=[averaged], progress=False,
    )  # fmt: skip
    assert posterior.config["compiled"] is compile
    path = [2 * (1 - 0.8**step) for step in (3, 6, 9, 12)]
    assert averaged.count == 4
    assert averaged.mean.keys() == posterior.parameters().keys() == {"mode"}
    assert float(averaged.mean["mode"]) == pytest.approx(sum(path) / 4, rel=1e-4)
    assert float(posterior.parameters()["mode"]) == pytest.approx(path[-1], rel=1e-4)


def test_parameters_are_copies() -> None:
    class Spoiler(Callback):
        def step_end(self, fit: Fit) -> None:
            for value in fit.parameters().values():
                value.fill_(torch.nan)

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    fits = [
        svi(Program.of(model, "normal"), torch.ones(4), steps=5, callbacks=callbacks, progress=False)
        for callbacks in ([], [Spoiler()])
    ]
    one, other = (fit.instance.tensors() for fit in fits)
    assert all(torch.equal(one[name], other[name]) for name in one)


def loc_model(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def fit_of_ten_epochs(*callbacks: Any) -> Posterior:
    program = Program.of(loc_model, "normal", data_plate="data")
    return svi(program, torch.ones(4), epochs=10, batch_size=2, callbacks=callbacks, progress=False, compile=False)


def test_function_is_called_with_the_fit_after_every_epoch() -> None:
    seen: list[tuple[int, int, float]] = []
    posterior = fit_of_ten_epochs(lambda fit: seen.append((fit.epoch, fit.step, fit.history.epochs["elbo"][-1])))
    elbos = posterior.history.epochs["elbo"]
    assert seen == [(epoch, 2 * epoch, elbos[epoch - 1]) for epoch in range(1, 11)]
    assert not posterior.history.stopped_early


@pytest.mark.parametrize(
    ("answer", "epochs"),
    [
        (True, 3),
        (np.True_, 3),
        (np.array([True]), 3),
        (torch.tensor(True), 3),
        (torch.tensor([True]), 3),
        (torch.tensor(False), 10),
        (False, 10),
        (None, 10),
    ],
)
def test_function_that_returns_true_ends_the_fit(answer: Any, epochs: int) -> None:
    class Watch:
        def after(self, fit: Fit) -> Any:
            return answer if fit.epoch >= 3 else None

        __call__ = after

    for callback in (Watch(), Watch().after, functools.partial(Watch.after, Watch())):
        posterior = fit_of_ten_epochs(callback)
        assert len(posterior.history.epochs["elbo"]) == epochs
        assert posterior.history.stopped_early is (epochs == 3)


@pytest.mark.parametrize("answer", [1, 1.5, "no", torch.tensor(1.0), torch.tensor([True, True]), np.zeros(2)])
def test_function_must_return_a_bool_or_none(answer: Any) -> None:
    calls: list[int] = []

    def close_enough(fit: Fit) -> Any:
        calls.append(fit.epoch)
        return answer

    message = rf"the callback close_enough must return a bool.* or None; got {re.escape(repr(answer))}\. Remove its"
    with pytest.raises(TypeError, match=message):
        fit_of_ten_epochs(close_enough)
    assert calls == [1]


def test_a_function_leaves_the_numbers_of_a_fit() -> None:
    seen: list[Any] = []
    one, other = fit_of_ten_epochs(lambda fit: seen.append(fit.parameters())), fit_of_ten_epochs()
    assert one.history.steps == other.history.steps
