"""svi: steps, seeds, interruption, divergence, held-out data, resuming, threads."""

from __future__ import annotations

import io
import math
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from local_codes import Codes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import deepprob as dp
from deepprob.errors import StorageError
from deepprob.fitting.callbacks import Callback, Checkpoint, EarlyStopping, Fit, Log
from deepprob.fitting.divergence import DivergenceError
from deepprob.fitting.kl_schedules import KLWarmUp
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.inference.svi import LoopState, init, step
from deepprob.networks.initialisation import pretrained
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

torch.manual_seed(0)
X = torch.randn(40, 3)
Y = X @ torch.tensor([1.0, 2.0, -1.0]) + 0.1 * torch.randn(40)


def regression(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 0.5), obs=y)


def shrinking(y: Tensor) -> None:
    """A model whose scale gradient ascent drives through zero."""
    pyro.sample("z", dist.Normal(0.0, 1.0))
    scale = pyro.param("scale", torch.tensor(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, scale), obs=y)


def coded(**options: Any) -> Posterior:
    return svi(Codes(), X, **{"epochs": 8, "batch_size": 10, "held_out": X, "progress": False} | options)


def fitted(data: Any = (X, Y), model: Callable[..., Any] = regression, **options: Any) -> Posterior:
    return svi(Program.of(model, "normal", data_plate="data"), data, **{"epochs": 4, "batch_size": 10} | options)


def same(a: Posterior, b: Posterior) -> bool:
    first, second = a.instance.tensors(), b.instance.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


# -- steps --------------------------------------------------------------------------------------------------------


def by_hand(steps: int, **options: Any) -> LoopState:
    """A loop at a constant learning rate."""
    program = Program.of(regression, "normal", data_plate="data")
    state = init(program, (X, Y), **{"batch_size": 10} | options)
    for _ in range(steps):
        state, _ = step(state)
    return state


def test_init_and_step_by_hand() -> None:
    program = Program.of(regression, "normal", data_plate="data")
    state, elbos = init(program, (X, Y), batch_size=None, steps=20), []  # too few for a search for the start
    for _ in range(100):
        state, terms = step(state, learning_rate=0.05)
        elbos.append(float(terms["elbo"]))
    assert state.step == 100
    assert terms.keys() == {"elbo", "likelihood", "kl_local", "kl_global", "gradient_norm", "skipped"}
    assert not any(term.requires_grad for term in terms.values())
    assert np.mean(elbos[-10:]) > np.mean(elbos[:10]) + 1.0


@pytest.mark.parametrize("average", [None, 0.9])
@pytest.mark.parametrize("batch_size", [10, None])
def test_loop_by_hand_equals_svi(batch_size: int | None, average: float | None) -> None:
    """Both take the same rows; the guide draws no noise, which each takes in its own way."""
    optimizer = Optimizer(learning_rate=0.05, schedule="constant", average=average)
    options: dict[str, Any] = {"batch_size": batch_size, "optimizer": optimizer, "seed": 3, "guide": "map"}
    program = Program.of(regression, data_plate="data")
    state = init(program, (X, Y), **options)
    for _ in range(9):
        state, _ = step(state)
    ours, theirs = state.posterior(), svi(program, (X, Y), steps=9, compile=False, **options)
    assert same(ours, theirs)
    assert ours.seed == theirs.seed
    assert ours.config == {name: theirs.config[name] for name in ours.config}


def test_step_by_hand_takes_rows_rate_and_weight() -> None:
    def norm(*rows: Tensor, batch_size: int | None = 10, **options: Any) -> float:
        return float(step(by_hand(0, batch_size=batch_size), *rows, **options)[1]["gradient_norm"])

    rows = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert norm(rows, batch_size=None) == pytest.approx(norm(batch_size=None), rel=1e-4)  # each row with its own target
    assert norm(rows[:10]) != pytest.approx(norm(), rel=1e-2)
    assert norm(kl_weight=0.0) != pytest.approx(norm(), rel=1e-4)
    slow, fast = (step(by_hand(0, optimizer="sgd"), learning_rate=rate)[0] for rate in (0.0, 0.1))
    assert same_parameters(slow, by_hand(0))
    assert not same_parameters(fast, by_hand(0))


@pytest.mark.parametrize(
    "rows", [[0, 3], (0, 3), range(0, 4, 3), np.array([0, 3]), torch.tensor([0, 3], dtype=torch.int32)]
)
def test_step_by_hand_takes_any_sequence_of_rows(rows: Any) -> None:
    one, other = by_hand(0), by_hand(0)
    assert step(one, rows)[1]["elbo"] == step(other, torch.tensor([0, 3]))[1]["elbo"]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ValueError, r"^step needs rows; got none\. Give the index of one row at least"),
        (torch.empty(0, dtype=torch.int64), ValueError, r"^step needs rows; got none"),
        (
            [0, 99999],
            ValueError,
            r"rows must be indices from 0 to 39, as the data have 40 rows; got 99999\. Number",
        ),
        ([-1, 3], ValueError, r"rows must be indices from 0 to 39, .*; got -1\. Number"),
        ([0.5], TypeError, r"rows must be a sequence of whole numbers.*; got \[0\.5\]\. Write step\(state, \[0, 1\]\)"),
        ([True, False], TypeError, r"rows must be a sequence of whole numbers"),
        (3, TypeError, r"rows must be a sequence of whole numbers.*; got 3\."),
        ("first", TypeError, r"rows must be a sequence of whole numbers.*; got 'first'\."),
    ],
)
def test_step_by_hand_refuses_other_rows(rows: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        step(by_hand(0), rows)


def same_parameters(one: LoopState, other: LoopState) -> bool:
    return all(torch.equal(one.params[name], other.params[name]) for name in one.params)


def test_posterior_of_a_loop_by_hand_is_asked_and_saved(tmp_path: Path) -> None:
    posterior = by_hand(3).posterior()
    assert posterior.config["steps"] == 3
    posterior.save(tmp_path / "fit")
    assert dp.check(posterior, (X, Y), draws=30, particles=30).verdict in ("pass", "caution", "fail")
    again = Posterior.load(tmp_path / "fit", Program.of(regression, "normal", data_plate="data"))
    assert torch.equal(again.log_likelihood(X, Y), posterior.log_likelihood(X, Y))


def test_laplace_by_hand_needs_a_mode() -> None:
    state = by_hand(0, guide="laplace", batch_size=None)
    for _ in range(300):
        state, _ = step(state, learning_rate=0.05)
    drawn = state.posterior().sample(draws=50)
    assert all(float(value.std(0).min()) > 0 for value in drawn.values())


def test_minibatches_by_hand_need_a_data_plate() -> None:
    state = init(Program.of(regression, "normal"), (X, Y))
    with pytest.raises(ValueError, match=r"batch_size=10 is smaller than the data \(40 rows\), but the"):
        step(state, torch.arange(10))


def test_init_refuses_what_svi_refuses() -> None:
    with pytest.raises(TypeError, match="svi expects a Program; got function"):
        init(regression, (X, Y))  # type: ignore[arg-type]


def test_seeds() -> None:
    assert same(fitted(seed=3), fitted(seed=np.int64(3)))
    assert not same(fitted(seed=3), fitted(seed=4))


def test_random_state_and_store_are_unchanged() -> None:
    pyro.param("theirs", torch.zeros(()))
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    fitted(guide="laplace", epochs=100)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert list(pyro.get_param_store().keys()) == ["theirs"]
    pyro.clear_param_store()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("compile", [False, True])
def test_a_fit_has_gradients_in_every_mode_of_the_caller(mode: Any, compile: bool) -> None:
    expected = fitted(steps=6, epochs=None, compile=compile)
    with mode():
        found = fitted((X.clone(), Y.clone()), steps=6, epochs=None, compile=compile)
        longer = dp.extend(found, (X, Y), steps=2, compile=False)
        by_hand, _ = step(init(Program.of(regression, "normal"), (X.clone(), Y.clone())))
        assert not torch.is_grad_enabled()
    assert found.history.steps["elbo"] == expected.history.steps["elbo"]
    assert len(longer.history.steps["elbo"]) == 8 and by_hand.step == 1


def test_clipping_bounds_the_step_and_averaging_smooths_it() -> None:
    base = Optimizer("sgd", learning_rate=0.1, schedule="constant")
    start = fitted(optimizer=Optimizer("sgd", learning_rate=1e-12), epochs=1, batch_size=None).instance.tensors()

    def moved(**options: Any) -> float:
        end = fitted(optimizer=Optimizer(**{**base.__dict__, **options}), epochs=1, batch_size=None).instance.tensors()
        return math.sqrt(sum(float((end[n] - start[n]).square().sum()) for n in end))

    assert moved(clip_norm=0.01) == pytest.approx(0.001, rel=0.01)
    assert moved() > 0.01
    assert 0 < moved(average=0.99) < moved()


def test_history_has_every_step_and_epoch() -> None:
    history = fitted(epochs=3, held_out=(X, Y), callbacks=[KLWarmUp(1)]).history
    assert {len(v) for v in history.steps.values()} == {12}
    assert {len(v) for v in history.epochs.values()} == {3}
    assert history.steps_per_epoch == 4
    assert history.epochs["kl_weight"] == [0.75, 1.0, 1.0]
    assert history.epochs["learning_rate"] == sorted(history.epochs["learning_rate"], reverse=True)
    assert {"elbo", "held_out_log_likelihood", "skipped", "seconds"} <= history.epochs.keys()


def test_fresh_and_kept_weights() -> None:
    class Net(Program):
        def __init__(self) -> None:
            super().__init__()
            self.old, self.new = pretrained(nn.Linear(3, 3)), nn.Linear(3, 1)

        def model(self, x: Tensor, y: Tensor | None = None) -> None:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with self.data_plate(x):
                pyro.sample("y", dist.Normal(self.new(self.old(x)).squeeze(-1) + w, 1.0), obs=y)

    program, tiny = Net(), Optimizer(learning_rate=1e-12)
    fresh, again, kept = (
        svi(program, (X, Y), epochs=1, guide="normal", optimizer=tiny, weights=how).parameters()
        for how in ("fresh", "fresh", "keep")
    )
    assert torch.allclose(kept["new.weight"], program.new.weight)
    assert not torch.allclose(fresh["new.weight"], program.new.weight)
    assert torch.equal(fresh["new.weight"], again["new.weight"])
    assert torch.allclose(fresh["old.weight"], program.old.weight)


def test_program_without_data() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(2.0))

    posterior = svi(Program.of(model, "normal"), None, epochs=800, optimizer=Optimizer(learning_rate=0.05))
    assert float(posterior.sample(draws=4000)["z"].mean()) == pytest.approx(1.0, abs=0.05)


# -- data of every kind -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        {"y": Y, "x": X},
        [X, Y],
        (X.double(), Y.numpy()),
        (X.numpy()[::-1].copy()[::-1], Y),
        (X.T.contiguous().T, Y),
        (pd.DataFrame(X.numpy()), pd.Series(Y.numpy(), name="price")),
        TensorDataset(X, Y),
        DataLoader(TensorDataset(X, Y), batch_size=7, shuffle=True),
    ],
    ids=["dict", "list", "float64 and numpy", "negative strides", "transposed", "pandas", "dataset", "loader"],
)
def test_equal_data_in_other_containers_give_equal_fits(data: Any) -> None:
    assert same(fitted(data), fitted())


# -- ends of a fit ------------------------------------------------------------------------------------------------


class Interrupt(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def step_end(self, fit: Fit) -> None:
        if fit.step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [7, 8])  # within an epoch, and at its end
@pytest.mark.parametrize("options", [{}, {"held_out": (X, Y)}, {"guide": "laplace"}, {"callbacks": [KLWarmUp(20)]}])
def test_interrupt_returns_the_posterior_so_far(at: int, options: dict[str, Any]) -> None:
    callbacks = [Interrupt(at), *options.get("callbacks", [])]
    with pytest.warns(
        UserWarning, match=rf"the fit was interrupted after {at} of 120 steps; the posterior holds the best state"
    ):
        posterior = fitted(epochs=30, **options | {"callbacks": callbacks})
    assert posterior.history.interrupted
    assert len(posterior.history.steps["elbo"]) == at
    untouched = fitted(epochs=1, optimizer=Optimizer(learning_rate=1e-12)).parameters()
    if "guide" not in options:
        assert any(not torch.allclose(v, untouched[n]) for n, v in posterior.parameters().items())
    assert posterior.predict(X, draws=3).mean.shape == (40,)


def test_ctrl_c_in_a_separate_process() -> None:
    program = """
import os, signal, warnings, torch, pyro, pyro.distributions as dist
from deepprob.programs.program import Program
from deepprob.inference import svi
from deepprob.fitting.callbacks import Callback
class Press(Callback):
    def step_end(self, fit):
        if fit.step == 50:
            os.kill(os.getpid(), signal.SIGINT)
def model(y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)
posterior = svi(Program.of(model, "normal"), torch.ones(9), epochs=100000, callbacks=[Press()])
print(posterior.history.interrupted, len(posterior.history.steps["elbo"]), posterior.sample(draws=3)["w"].shape)
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "True 50 torch.Size([3])\nTrue\n"
    assert "the fit was interrupted after 50 of 100000 steps" in done.stderr


def test_custom_signal_handler_is_kept() -> None:
    def theirs(signum: int, frame: Any) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGINT, theirs)
    try:
        fitted()
        assert signal.getsignal(signal.SIGINT) is theirs
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("options", [{"batch_size": None}, {"batch_size": 2}, {"held_out": torch.zeros(3)}])
def test_divergence_names_the_site_and_carries_the_last_good_posterior(options: dict[str, Any]) -> None:
    with pytest.raises(
        DivergenceError,
        match=r"elbo became nan at epoch \d+, step \d+ \(site 'y': scale reached 0\)\. The best state so far \(epoch "
        r"\d+\) is kept\. Lower the learning rate, now 0\.1 \(optimizer=dp\.Optimizer\(learning_rate=0\.03\); in the "
        r"command: --learning-rate 0\.03\), clip the gradient \(clip_norm=10 of dp\.Optimizer\), or bound the scale\.",
    ) as caught:
        fitted(
            torch.zeros(8),
            shrinking,
            epochs=100,
            optimizer=Optimizer("sgd", learning_rate=0.1, schedule="constant"),
            **{"batch_size": 2} | options,
        )
    posterior = caught.value.posterior
    assert posterior is not None
    assert bool(torch.isfinite(posterior.log_likelihood(torch.zeros(8), draws=3)).all())
    assert posterior.history.steps["skipped"][-20:] == [1.0] * 20


@pytest.mark.filterwarnings("ignore:.* steps were not finite and were skipped:UserWarning")
def test_step_that_is_not_finite_is_skipped_and_counted() -> None:
    def sometimes(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 8) as rows:
            hole = torch.where((rows == 3).any(), math.nan, 0.0)
            pyro.sample("y", dist.Normal(z + hole * z, 1.0, validate_args=False), obs=y)

    def model(y: Tensor) -> None:
        if torch.is_grad_enabled() and training["now"]:
            return sometimes(y)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 8):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        return None

    training = {"now": False}

    class Begin(Callback):
        def start(self, fit: Fit) -> None:
            training["now"] = True

    posterior = fitted(torch.ones(8), model, batch_size=2, epochs=5, callbacks=[Begin()])
    assert posterior.history.epochs["skipped"] == [1.0] * 5
    assert sum(posterior.history.steps["skipped"]) == 5.0
    assert all(math.isfinite(v) for v in posterior.history.epochs["elbo"])
    assert all(bool(torch.isfinite(v).all()) for v in posterior.instance.tensors().values())


@pytest.mark.filterwarnings("ignore:.* steps were not finite and were skipped:UserWarning")
def test_skipped_step_restores_batch_norm_statistics() -> None:
    class Normed(Program):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def model(self, x: Tensor) -> None:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with self.data_plate(x):
                hole = math.nan if self.training and bool((x == X[5]).all(1).any()) else 0.0
                pyro.sample("x", dist.Normal(w + self.norm(x + hole), 1.0, validate_args=False).to_event(1), obs=x)

    posterior = svi(Normed(), X, guide="normal", epochs=2, batch_size=10)
    assert sum(posterior.history.steps["skipped"]) == 2
    statistics = posterior.instance.tensors()
    assert bool(torch.isfinite(statistics["program.norm.running_mean"]).all())
    assert float(statistics["program.norm.num_batches_tracked"]) == 6


# -- held-out data ------------------------------------------------------------------------------------------------


class Spoil(Callback):
    """Shift the parameters after every epoch from ``after`` on."""

    def __init__(self, after: int) -> None:
        self.after = after

    def epoch_end(self, fit: Any) -> None:
        if fit.epoch >= self.after:
            for value in fit.state.params.values():
                value.data += 10.0


def test_keeps_the_best_epoch() -> None:
    posterior = coded(callbacks=[Spoil(5)])
    curve = posterior.history.epochs["held_out_elbo"]
    assert posterior.history.best_epoch == int(np.argmax(curve)) + 1 == 5
    plain = coded(callbacks=[Spoil(9), _StopAfter(5)])
    assert same(posterior, plain)


def test_global_latents_hold_the_last_epoch_whatever_the_held_out_score() -> None:
    """The score lacks the KL of the weights: it would choose an epoch at which they are too narrow."""
    posterior = fitted(epochs=8, held_out=(X, Y), callbacks=[Spoil(5)])
    curve = posterior.history.epochs["held_out_log_likelihood"]
    assert int(np.argmax(curve)) + 1 == 5
    assert posterior.history.best_epoch == 8
    assert same(posterior, fitted(epochs=8, callbacks=[Spoil(5)]))


class _StopAfter(Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def epoch_end(self, fit: Fit) -> None:
        fit.stop = fit.epoch == self.epochs


def test_the_score_of_a_program_with_a_scale_is_traced() -> None:
    """Draws of a program with constrained latents are run one by one; with one draw nothing is compared."""

    def scaled(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1), scale), obs=y)

    posterior = fitted(model=scaled, epochs=1000, held_out=(X, Y), compile=False, progress=False)
    assert posterior.config["plan"]["score"] == "traced"


def test_early_stopping_ends_the_fit_after_the_warm_up() -> None:
    posterior = coded(epochs=30, callbacks=[KLWarmUp(6), EarlyStopping(2), Spoil(1)])
    assert posterior.history.stopped_early
    assert len(posterior.history.epochs["elbo"]) == 8
    assert posterior.history.best_epoch == 6


def test_stop_during_warm_up_keeps_the_last_state() -> None:
    posterior = fitted(epochs=10, callbacks=[KLWarmUp(10), _StopAfter(3)])
    assert posterior.history.best_epoch == 3
    assert not same(posterior, fitted(epochs=10, callbacks=[KLWarmUp(10), _StopAfter(1)]))


# -- fits that end within an epoch ----------------------------------------------------------------------------------


class Epochs(Callback):
    """The steps at which epochs ended."""

    def __init__(self) -> None:
        self.ends: list[int] = []

    def epoch_end(self, fit: Fit) -> None:
        assert len(fit.history.epochs["elbo"]) == fit.epoch
        self.ends.append(fit.step)


class StopAtStep(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def step_end(self, fit: Fit) -> None:
        fit.stop = fit.step == self.step


@pytest.mark.parametrize(("steps", "ends"), [(3, [3]), (7, [4, 7]), (8, [4, 8])])
@pytest.mark.parametrize("held_out", [None, (X, Y)])
def test_end_of_a_fit_ends_its_last_epoch(steps: int, ends: list[int], held_out: Any, tmp_path: Path) -> None:
    seen, log = Epochs(), io.StringIO()
    steering: list[Callback] = [EarlyStopping(5), Checkpoint(tmp_path)]
    callbacks = [seen, Log(file=log), *steering]
    posterior = fitted(epochs=None, steps=steps, held_out=held_out, callbacks=callbacks)
    history = posterior.history
    assert seen.ends == ends
    assert len(log.getvalue().splitlines()) == len(ends)
    elbo, last = history.steps["elbo"], (len(ends) - 1) * 4
    assert history.epochs["elbo"][-1] == np.mean(elbo[last:steps])
    assert history.epochs["learning_rate"][-1] < history.epochs["learning_rate"][0] or len(ends) == 1
    assert not history.stopped_early
    if held_out is not None:
        assert len(history.epochs["held_out_log_likelihood"]) == len(ends)
    assert same(posterior, fitted(epochs=None, steps=steps, held_out=held_out, callbacks=steering))


def test_posterior_holds_the_steps_of_a_last_short_epoch() -> None:
    """The step size is constant, so that the fits of 4 and 7 steps share their first epoch."""
    options: dict[str, Any] = {"epochs": None, "held_out": (X, Y), "optimizer": Optimizer(schedule="constant")}
    short, long = fitted(steps=4, **options), fitted(steps=7, **options)
    scores = long.history.epochs["held_out_log_likelihood"]
    assert short.history.epochs["held_out_log_likelihood"] == scores[:1]
    assert long.history.best_epoch == 2
    assert scores[1] > scores[0]
    assert not same(short, long)


def test_stop_within_an_epoch_ends_it() -> None:
    seen = Epochs()
    posterior = fitted(epochs=4, held_out=(X, Y), callbacks=[seen, StopAtStep(6)])
    assert seen.ends == [4, 6]
    assert len(posterior.history.epochs["held_out_log_likelihood"]) == 2
    assert len(posterior.history.steps["elbo"]) == 6


@pytest.mark.parametrize("at", [2, 4, 6, 7])
def test_killed_fit_with_a_short_last_epoch_resumes_bit_for_bit(at: int, tmp_path: Path) -> None:
    def run(*more: Callback, folder: str = "run") -> Posterior:
        callbacks = [Checkpoint(tmp_path / folder, every=0.25), *more]
        return fitted(epochs=None, steps=7, held_out=(X, Y), callbacks=callbacks)

    whole = run(folder="whole")
    with pytest.raises(Killed):
        run(Kill(at))
    resumed = run()
    assert same(whole, resumed)
    assert resumed.history.epochs["held_out_log_likelihood"] == whole.history.epochs["held_out_log_likelihood"]


# -- resuming -----------------------------------------------------------------------------------------------------


class Killed(RuntimeError):
    pass


class Kill(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def step_end(self, fit: Fit) -> None:
        if fit.step == self.at:
            raise Killed


@pytest.mark.parametrize("at", [1, 6, 9, 12, 17])
@pytest.mark.parametrize("options", [{}, {"held_out": (X, Y), "optimizer": Optimizer("sgd", average=0.9)}])
def test_killed_fit_resumes_bit_for_bit(at: int, options: dict[str, Any], tmp_path: Path) -> None:
    def run(*more: Callback, folder: str = "run") -> Posterior:
        checkpoint = Checkpoint(tmp_path / folder, every=0.5)
        return fitted(epochs=5, callbacks=[KLWarmUp(2), EarlyStopping(9), checkpoint, *more], **options)

    whole = run(Kill(-1), folder="whole")
    with pytest.raises(Killed):
        run(Kill(at))
    resumed = run(Kill(-1))
    assert same(whole, resumed)
    assert resumed.history.steps == whole.history.steps
    without_clock = [{n: v for n, v in p.history.epochs.items() if n != "seconds"} for p in (whole, resumed)]
    assert without_clock[0] == without_clock[1]


def test_resuming_a_finished_fit_changes_nothing(tmp_path: Path) -> None:
    first = fitted(callbacks=[Checkpoint(tmp_path / "c")])
    assert same(first, fitted(callbacks=[Checkpoint(tmp_path / "c")]))


def test_refuses_checkpoint_of_another_fit(tmp_path: Path) -> None:
    fitted(callbacks=[Checkpoint(tmp_path / "c")])
    with pytest.raises(
        ValueError, match=r"belongs to another fit: seed \(was 0, now 1\)\. Give the same arguments, another"
    ):
        fitted(seed=1, callbacks=[Checkpoint(tmp_path / "c")])
    assert same(fitted(seed=1, callbacks=[Checkpoint(tmp_path / "c", resume=False)]), fitted(seed=1))


def test_checkpoint_refuses_other_data_and_other_callbacks(tmp_path: Path) -> None:
    fitted(callbacks=[Checkpoint(tmp_path / "c")])
    with pytest.raises(ValueError, match=r"belongs to another fit: held_out \(was None, now \w+\)"):
        fitted(held_out=(X, Y), callbacks=[Checkpoint(tmp_path / "c")])
    with pytest.raises(ValueError, match=r"callbacks \(was \[\], now \['KLWarmUp\(epochs=1, start_weight=0.0\)'\]\)"):
        fitted(callbacks=[KLWarmUp(1), Checkpoint(tmp_path / "c")])
    fitted(callbacks=[Log(every=1, file=io.StringIO()), Checkpoint(tmp_path / "c")])


def test_short_fit_without_an_applied_step_diverges() -> None:
    def model(y: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((loc * 1e30) * 1e30 + loc.sqrt(), 1.0), obs=y)

    with pytest.raises(
        DivergenceError, match=r"^the gradient is not finite at the first step: site 'y': .* to loc is not\."
    ):
        svi(Program.of(model, lambda y: None), torch.ones(4), epochs=5)


def test_refuses_a_posterior_as_checkpoint(tmp_path: Path) -> None:
    fitted().save(tmp_path / "p")
    with pytest.raises(StorageError, match=r"posterior"):
        fitted(callbacks=[Checkpoint(tmp_path / "p")])


# -- threads ------------------------------------------------------------------------------------------------------


def test_fits_in_two_threads_equal_separate_fits() -> None:
    alone = [fitted(epochs=10, seed=s) for s in (0, 1)]
    found: dict[int, Posterior] = {}

    def work(seed: int) -> None:
        found[seed] = fitted(epochs=10, seed=seed)

    before = torch.get_rng_state()
    threads = [threading.Thread(target=work, args=(s,)) for s in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(alone[s], found[s]) for s in (0, 1))
    assert torch.equal(before, torch.get_rng_state())


def test_fit_inside_a_fit() -> None:
    class Inner(Callback):
        def epoch_end(self, fit: Fit) -> None:
            fitted(epochs=1, seed=9)

    assert same(fitted(callbacks=[Inner()]), fitted())


def test_logging_shows_every_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    fitted(epochs=2, callbacks=[Log()], progress=True)
    captured = capsys.readouterr()
    assert [line.split()[:2] for line in captured.out.splitlines()] == [["epoch", "1"], ["epoch", "2"]]
    assert "of 8" in captured.err


def test_short_fit_does_not_import_the_compiler() -> None:
    """Importing torch's compiler takes half a second, most of the time to the first step."""
    code = """
import sys, torch, pyro, pyro.distributions as dist
from deepprob.inference import svi
from deepprob.programs.program import Program

def model(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

svi(Program.of(model, "normal"), (torch.ones(10),), epochs=1, progress=False).sample()
print([name for name in ("sympy", "torch._dynamo", "torch._inductor") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
