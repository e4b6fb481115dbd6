"""Compiled fits are reproducible, resumable and observable; fits that cannot be compiled are eager.

One program is compiled twice: with Adam, and with every option of an optimizer. Tests that do not need native code run
the same graph uncompiled.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from local_codes import Codes
from torch import Tensor, nn
from uncompiled import replace_compiler, run_uncompiled

from deepprob.engine.loop import Loop
from deepprob.engine.native.cache import NoCompiler
from deepprob.engine.random import RandomStream
from deepprob.fitting.buckets import LengthBuckets
from deepprob.fitting.callbacks import Callback, Checkpoint, EarlyStopping, Fit
from deepprob.fitting.compiling import CompileTask
from deepprob.fitting.divergence import DivergenceError
from deepprob.fitting.kl_schedules import KLWarmUp
from deepprob.fitting.objectives import ELBO
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.plan import Plan
from deepprob.fitting.state import State
from deepprob.fitting.steppers import EagerStepper, LoopStepper
from deepprob.fitting.tiers import PlannedStepper, choose_stepper
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch
from deepprob.programs.program import Program

N, B = 40, 10
G = torch.Generator().manual_seed(0)
X = torch.randn(N, 3, generator=G)
Y = X @ torch.tensor([1.0, 2.0, -1.0]) + 0.3 * torch.randn(N, generator=G)
EVERYTHING = Optimizer(learning_rate=0.05, clip_norm=1.0, average=0.9, accumulate=3)


class Regression(Program):
    """A linear regression with random weights, and a scale without a lower bound."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with self.data_plate(x):
            pyro.sample("y", dist.Normal((x * w).sum(-1), self.scale), obs=y)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        loc, raw = pyro.param("loc", torch.zeros(3)), pyro.param("raw", torch.full((3,), -1.0))
        pyro.sample("w", dist.Normal(loc, raw.exp()).to_event(1))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of compiled code that all workers of a test run share."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "compiled"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run graphs uncompiled."""
    replace_compiler(monkeypatch)


def fitted(data: Any = (X, Y), program: Program | None = None, **options: Any) -> Posterior:
    settings: dict[str, Any] = {"epochs": 6, "batch_size": B, "compile": True, "progress": False, "weights": "keep"}
    return svi(program or Regression(), data, **settings | {"optimizer": Optimizer(learning_rate=0.05)} | options)


def same(a: Posterior, b: Posterior) -> bool:
    first, second = a.instance.tensors(), b.instance.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def assert_near(a: Posterior, b: Posterior) -> None:
    for name, column in a.history.steps.items():
        assert column == pytest.approx(b.history.steps[name], rel=1e-5, abs=1e-5)
    first, second = a.instance.tensors(), b.instance.tensors()
    assert all(torch.allclose(first[n], second[n], rtol=1e-5, atol=1e-5) for n in first)


def epochs_of(posterior: Posterior) -> dict[str, list[float]]:
    return {n: v for n, v in posterior.history.epochs.items() if n != "seconds"}


def assert_same_fit(a: Posterior, b: Posterior) -> None:
    assert same(a, b)
    assert a.history.steps == b.history.steps
    assert epochs_of(a) == epochs_of(b)


# -- native code ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [Optimizer(learning_rate=0.05), pytest.param(EVERYTHING, marks=pytest.mark.slow)],
    ids=["adam", "everything"],
)
def test_native_code_equals_the_graph_run_step_by_step(optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    callbacks = [KLWarmUp(2)]
    compiled = fitted(optimizer=optimizer, callbacks=callbacks)
    assert compiled.config["compiled"]
    replace_compiler(monkeypatch)
    assert_near(compiled, fitted(optimizer=optimizer, callbacks=callbacks))
    assert not any(compiled.history.steps["skipped"])


def test_compiled_and_eager_fits_agree() -> None:
    """They take the same numbers, so that they differ by rounding alone."""
    compiled, eager = (fitted(epochs=50, compile=how) for how in (True, False))
    assert (compiled.config["compiled"], eager.config["compiled"]) == (True, False)
    assert compiled.history.epochs.keys() == eager.history.epochs.keys()
    for name, column in eager.history.steps.items():
        assert compiled.history.steps[name] == pytest.approx(column, rel=1e-4, abs=1e-4)
    a, b = compiled.instance.tensors(), eager.instance.tensors()
    assert all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-4) for name in a)


class Undecided(Regression):
    """A regression that draws more numbers in some runs than in others, as a value decides."""

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        super().guide(x, y)
        if float(x[0, 0]) > 0:
            torch.randn(7), torch.rand(3)


def test_a_program_that_draws_more_in_some_steps_is_reproducible() -> None:
    first, again = (fitted(program=Undecided(), compile=False) for _ in range(2))
    assert_same_fit(first, again)
    assert all(map(math.isfinite, first.history.steps["elbo"]))


def test_seeds_reproduce_bit_for_bit() -> None:
    first, again, other = fitted(seed=3), fitted(seed=3), fitted(seed=4)
    assert_same_fit(first, again)
    assert not same(first, other)


def test_fits_in_two_threads_equal_separate_fits() -> None:
    alone = [fitted(epochs=30, seed=s) for s in (0, 1)]
    found: dict[int, Posterior] = {}

    def work(seed: int) -> None:
        found[seed] = fitted(epochs=30, seed=seed)

    before = torch.get_rng_state()
    threads = [threading.Thread(target=work, args=(s,)) for s in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for s in (0, 1):
        assert_same_fit(alone[s], found[s])
    assert torch.equal(before, torch.get_rng_state())


def killed_and_resumed(at: int, folder: Path, *steering: Callback, **options: Any) -> None:
    def run(*more: Callback, name: str = "killed") -> Posterior:
        return fitted(callbacks=[*steering, Checkpoint(folder / name, every=0.5), *more], **options)

    whole = run(name="whole")
    with pytest.raises(Killed):
        run(Kill(at))
    assert_same_fit(whole, run())


@pytest.mark.parametrize("at", [9])
def test_killed_fit_resumes_bit_for_bit(at: int, tmp_path: Path) -> None:
    killed_and_resumed(at, tmp_path, KLWarmUp(2))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("at", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_fit_with_all_options_resumes_bit_for_bit(at: int, tmp_path: Path) -> None:
    killed_and_resumed(at, tmp_path, KLWarmUp(2), EarlyStopping(9), optimizer=EVERYTHING, held_out=(X, Y))


class Killed(RuntimeError):
    pass


class Kill(Callback):
    """Watches one step only, so that the steps before it are one call."""

    def __init__(self, at: int) -> None:
        self.at = at

    def interval(self, steps_per_epoch: int) -> int:
        return self.at

    def step_end(self, fit: Fit) -> None:
        raise Killed


def test_cache_is_private(cache: Path) -> None:
    fitted(epochs=1)
    folder = cache / "deepprob" / "compiled"
    loop = stepper_of(True).loops[0]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert loop.is_cached()
    try:
        for mode in (0o777, 0o770, 0o707, 0o755):
            folder.chmod(mode)
            with warnings.catch_warnings():  # warned once per process, see test_toolchain
                warnings.simplefilter("ignore")
                assert not loop.is_cached()
    finally:
        folder.chmod(0o700)
    assert loop.is_cached()


@pytest.mark.slow
def test_cache_that_others_can_write_to_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = fitted()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "deepprob" / "compiled"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.warns(UserWarning, match="compiled code is not cached"):
        assert_same_fit(compiled, fitted())
    assert list(folder.iterdir()) == []


def test_corrupt_cache_file_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "deepprob" / "compiled"
    path.mkdir(parents=True, mode=0o700)
    names: list[Path] = []
    monkeypatch.setattr(Path, "exists", lambda self: names.append(self) or os.path.exists(self))  # type: ignore[func-returns-value]
    stepper_of(True).loops[0].is_cached()
    names[-1].write_bytes(b"half a file")
    assert fitted(epochs=1).config["compiled"]


WITHOUT = """
import json, sys, warnings
sys.path[:0] = {folders!r}
import test_steppers
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    posterior = test_steppers.fitted()
print(json.dumps([posterior.history.steps, [str(w.message) for w in caught], posterior.config["compiled"]]))
"""


def test_graph_runs_uncompiled_without_a_compiler(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("CXX", None)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(folders=[str(folder) for folder in Path(__file__).parents[:2]])],
        capture_output=True, text=True, timeout=300, check=True, env=environment,
    )  # fmt: skip
    steps, messages, _ = json.loads(done.stdout)
    assert messages == [f"not compiled: {NO_COMPILER}; the traced graph runs uncompiled."]
    for name, column in fitted().history.steps.items():
        assert steps[name] == pytest.approx(column, rel=1e-5, abs=1e-5)


NO_COMPILER = "no C++ compiler was found (on Debian: apt-get install g++)"


# -- callbacks ------------------------------------------------------------------------------------------------------


class Watch(Callback):
    """Records the steps and epochs at which it is called."""

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.steps: list[int] = []
        self.recorded: list[int] = []
        self.epochs: list[tuple[int, int, int]] = []

    def interval(self, steps_per_epoch: int) -> int:
        return self.every

    def step_end(self, fit: Fit) -> None:
        self.steps.append(fit.step)
        self.recorded.append(len(fit.history.steps["elbo"]))

    def epoch_end(self, fit: Fit) -> None:
        self.epochs.append((fit.epoch, fit.step, len(fit.history.epochs["elbo"])))


class EveryStep(Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def step_end(self, fit: Fit) -> None:
        self.steps.append(fit.step)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("every", [3, 4, 7, 100])
def test_callback_is_called_at_its_interval_and_every_epoch(every: int) -> None:
    watch = Watch(every)
    posterior = fitted(callbacks=[watch])
    assert watch.steps == watch.recorded == list(range(every, 25, every))
    assert watch.epochs == [(e, 4 * e, e) for e in range(1, 7)]
    assert_same_fit(posterior, fitted())


@pytest.mark.usefixtures("uncompiled")
def test_step_end_without_interval_is_called_after_every_step() -> None:
    watch, other = EveryStep(), Watch(5)
    posterior = fitted(callbacks=[watch, other])
    assert watch.steps == list(range(1, 25))
    assert other.steps == [5, 10, 15, 20]
    assert_same_fit(posterior, fitted())


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("epochs", [1, 256, pytest.param(258, marks=pytest.mark.slow)])
def test_several_epochs_in_one_call_have_the_same_history(epochs: int) -> None:
    """A call takes up to 1 024 steps, 256 epochs."""
    free, watched = fitted(epochs=epochs), fitted(epochs=epochs, callbacks=[Watch(10**6)])
    assert_same_fit(free, watched)
    assert free.history.best_epoch == watched.history.best_epoch == epochs
    assert {len(v) for v in free.history.epochs.values()} == {epochs}
    assert {len(v) for v in free.history.steps.values()} == {4 * epochs}
    means = np.array(free.history.steps["elbo"]).reshape(epochs, 4).mean(1)
    assert free.history.epochs["elbo"] == pytest.approx(means.tolist())
    assert all(s > 0 for s in free.history.epochs["seconds"])
    schedule = Optimizer(learning_rate=0.05)
    expected = [schedule.rate(4 * e + 3, 4 * epochs, 0.05) for e in range(epochs)]
    assert free.history.epochs["learning_rate"] == pytest.approx(expected)


@pytest.mark.usefixtures("uncompiled")
def test_every_step_has_its_warm_up_weight() -> None:
    warm, plain = fitted(callbacks=[KLWarmUp(3)]), fitted()
    assert warm.history.epochs["kl_weight"] == pytest.approx([3 / 12, 7 / 12, 11 / 12, 1.0, 1.0, 1.0])
    assert plain.history.epochs["kl_weight"] == [1.0] * 6
    assert not same(warm, plain)
    assert warm.history.steps["kl_global"][-1] > plain.history.steps["kl_global"][-1]


@pytest.mark.usefixtures("uncompiled")
def test_keeps_the_best_epoch_on_held_out_data() -> None:
    settings: dict[str, Any] = {"data": X, "program": Codes(), "epochs": 40}
    settings["optimizer"] = Optimizer(learning_rate=0.5)
    found = fitted(held_out=X[:9], callbacks=[EarlyStopping(2)], **settings)
    curve = found.history.epochs["held_out_elbo"]
    assert found.history.stopped_early
    assert len(curve) < 40
    assert found.history.best_epoch == int(np.argmax(curve)) + 1 == len(curve) - 2
    until = fitted(callbacks=[_StopAfter(found.history.best_epoch)], **settings)
    assert same(found, until)


class _StopAfter(Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def epoch_end(self, fit: Fit) -> None:
        fit.stop = fit.epoch == self.epochs


@pytest.mark.usefixtures("uncompiled")
def test_checkpoint_every_half_epoch(tmp_path: Path) -> None:
    seen: list[int] = []

    class Count(Checkpoint):
        def step_end(self, fit: Fit) -> None:
            seen.append(fit.step)
            super().step_end(fit)

    assert_same_fit(fitted(callbacks=[Count(tmp_path / "c", every=0.5)]), fitted())
    assert seen == list(range(2, 25, 2))


@pytest.mark.usefixtures("uncompiled")
def test_interrupt_keeps_finished_steps() -> None:
    class Interrupt(Watch):
        def step_end(self, fit: Fit) -> None:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match=r"the fit was interrupted after 14 of 24 steps"):
        found = fitted(callbacks=[Interrupt(14)])
    assert len(found.history.steps["elbo"]) == 14
    assert len(found.history.epochs["elbo"]) == 3
    assert found.history.interrupted


@pytest.mark.usefixtures("uncompiled")
def test_fit_inside_a_fit() -> None:
    class Inner(Callback):
        def epoch_end(self, fit: Fit) -> None:
            fitted(epochs=1, seed=9)

    assert_same_fit(fitted(epochs=2, callbacks=[Inner()]), fitted(epochs=2))


# -- steps that are not finite --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* steps were not finite and were skipped:UserWarning")
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("optimizer", [Optimizer(learning_rate=0.05), EVERYTHING], ids=["adam", "everything"])
def test_steps_with_rows_that_are_not_finite_are_skipped_and_counted(optimizer: Optimizer) -> None:
    y = Y.clone()
    y[7] = 1e30  # its square is infinite
    found = fitted((X, y), epochs=8, optimizer=optimizer)
    skipped = np.array(found.history.steps["skipped"]).reshape(8, 4)
    assert not skipped[-1, -1]
    assert skipped.sum(1).tolist() == found.history.epochs["skipped"] == [1.0] * 8
    elbo = np.array(found.history.steps["elbo"]).reshape(8, 4)
    assert (np.isfinite(elbo) == (skipped == 0)).all()
    expected = [row[keep].mean() for row, keep in zip(elbo, skipped == 0, strict=True)]
    assert found.history.epochs["elbo"] == pytest.approx(expected)
    assert all(bool(torch.isfinite(v).all()) for v in found.instance.tensors().values())
    assert_same_fit(found, fitted((X, y), epochs=8, optimizer=optimizer, callbacks=[EveryStep()]))


@pytest.mark.filterwarnings("ignore:.* steps were not finite and were skipped:UserWarning")
@pytest.mark.usefixtures("uncompiled")
def test_skipped_last_step_keeps_the_parameters() -> None:
    y = Y.clone()
    y[7] = 1e30
    found = fitted((X, y), epochs=9)
    assert found.history.steps["skipped"][-1] == 1.0
    assert float(found.parameters()["loc"].abs().max()) > 0.1  # it began at zero
    assert same(found, fitted((X, y), epochs=9, callbacks=[EveryStep()]))


def diverging(**options: Any) -> DivergenceError:
    """The error of a fit to constant data, which drives the scale through zero."""
    constant = torch.zeros(N, 3), torch.zeros(N)
    with pytest.raises(
        DivergenceError,
        match=r"elbo became nan at epoch \d+, step \d+ \(site 'y': scale reached 0\)\. The best state so far",
    ) as caught:
        fitted(constant, epochs=100, optimizer=Optimizer(learning_rate=0.1, schedule="constant"), **options)
    return caught.value


@pytest.mark.usefixtures("uncompiled")
def test_divergence_names_its_first_step() -> None:
    error = diverging()
    assert error.posterior is not None
    steps = error.posterior.history.steps
    first = steps["skipped"].index(1.0)
    assert all(steps["skipped"][first:])
    assert f"at epoch {first // 4 + 1}, step {first + 1} " in str(error)
    assert str(error).split(". The best")[0] == str(diverging(callbacks=[EveryStep()])).split(". The best")[0]


@pytest.mark.usefixtures("uncompiled")
def test_divergence_carries_the_last_good_posterior() -> None:
    together, watched = diverging(), diverging(callbacks=[EveryStep()])
    assert together.posterior is not None
    assert watched.posterior is not None
    assert float(watched.posterior.parameters()["scale"]) < 0.9
    assert together.posterior.history.best_epoch == watched.posterior.history.best_epoch
    assert same(together.posterior, watched.posterior)
    assert bool(torch.isfinite(together.posterior.log_likelihood(X, Y, draws=3)).all())


# -- eager or compiled ----------------------------------------------------------------------------------------------


def chosen(
    compile: bool | str = True, *, steps: int = 10**6, program: Program | None = None, announce: bool = False
) -> PlannedStepper:
    optimizer, data = Optimizer(learning_rate=0.05), (X, Y)
    instance = ProgramInstance(program or Regression(), data, N, full_batch=False)
    state = State.start(instance, optimizer, 0.05)
    eager = EagerStepper(lambda *_: {}, LengthBuckets(data))
    task = CompileTask(state, ELBO(), optimizer, eager.buckets, B, announce=announce)
    return choose_stepper(compile, eager, task, steps=steps, noise=RandomStream(0))


def stepper_of(compile: bool | str) -> LoopStepper:
    with pytest.MonkeyPatch.context() as patch:
        replace_compiler(patch)
        found = chosen(compile).now
    assert isinstance(found, LoopStepper)
    return found


class Larger(Regression):
    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        for _ in range(100):
            x = x + 0.001 * x.sin()
        super().model(x, y)


@pytest.mark.usefixtures("uncompiled")
def test_auto_depends_on_step_and_operation_counts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def tier(steps: int, program: Program | None = None) -> str:
        found = chosen("auto", steps=steps, program=program)
        assert found.tier == found.plan.tiers[-1][0]
        return found.tier

    border = next(steps for steps in range(100, 10**6, 100) if tier(steps) == "traced")
    assert (tier(100), tier(border - 100), tier(10**6)) == ("eager", "eager", "compiled")
    assert tier(border - 100, Larger()) == "traced"  # more operations, more to gain
    ticks = iter(range(10**9))
    monkeypatch.setattr("time.perf_counter", lambda: 1000.0 * next(ticks))
    assert (tier(border - 100), tier(border)) == ("eager", "traced")


@pytest.mark.usefixtures("uncompiled")
def test_a_fit_whose_code_is_in_the_cache_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loop, "is_cached", lambda self: True)
    steps = next(steps for steps in range(100, 10**6, 100) if chosen("auto", steps=steps).tier != "eager")
    plan = chosen("auto", steps=steps).plan
    assert (plan.tiers, plan.cached, plan.reason) == ((("compiled", 0),), True, "its native code is in the cache")


@pytest.mark.usefixtures("uncompiled")
def test_the_plan_is_in_the_config() -> None:
    compiled, eager = fitted().config, fitted(compile=False).config
    assert compiled["compiled"] and not eager["compiled"]
    assert compiled["plan"]["tiers"] == [["compiled", 0]]
    assert compiled["plan"]["reason"] == "compile=True"
    assert eager["plan"]["tiers"] == [["eager", 0]]
    assert eager["plan"]["reason"] == "tracing costs more than this fit gains"
    assert json.loads(json.dumps(compiled)) == compiled


STARTING = "deepprob.fitting.starting"
TRACED = Plan((("traced", 0),), "a test")
LATER = Plan((("eager", 0), ("traced", 7), ("compiled", 13)), "a test")


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[[Plan], None]:
    """Gives a fit a plan."""
    return lambda plan: monkeypatch.setattr(f"{STARTING}.saved_plan", lambda callbacks: plan)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("plan", [TRACED, LATER], ids=["traced", "eager, traced, compiled"])
@pytest.mark.parametrize("optimizer", [Optimizer(learning_rate=0.05), EVERYTHING, "rmsprop"], ids=str)
def test_every_plan_gives_the_eager_fit(plan: Plan, optimizer: Any, planned: Callable[[Plan], None]) -> None:
    eager = fitted(compile=False, optimizer=optimizer)
    planned(plan)
    found = fitted(optimizer=optimizer)
    assert_near(found, eager)
    assert_same_fit(found, fitted(optimizer=optimizer))
    assert found.config["plan"] == plan.to_json()
    assert found.config["compiled"] == plan.compiles == bool(found.history.compiled_graphs)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("at", [3, 9, 15])
def test_a_resumed_fit_follows_the_plan_of_its_checkpoint(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code is in the cache by then, and a fit that starts would be compiled."""

    def run(name: str, *more: Callback) -> Posterior:
        checkpoint = Checkpoint(tmp_path / name, every=0.25)
        return fitted(callbacks=[checkpoint, *more], held_out=(X, Y), compile="auto")

    def start(*arguments: Any, plan: Plan | None, **options: Any) -> PlannedStepper:
        return choose_stepper(*arguments, plan=plan or LATER, **options)

    monkeypatch.setattr(f"{STARTING}.choose_stepper", start)
    whole = run("whole")
    with pytest.raises(Killed):
        run("killed", Kill(at))
    monkeypatch.setattr(f"{STARTING}.choose_stepper", choose_stepper)
    resumed = run("killed")
    assert_same_fit(whole, resumed)
    assert resumed.config["plan"]["tiers"] == LATER.to_json()["tiers"]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("tier", ["traced", "compiled"])
def test_the_held_out_score_has_a_tier_of_its_own(tier: str, planned: Callable[[Plan], None]) -> None:
    eager = fitted(compile=False, held_out=(X, Y))
    planned(replace(TRACED, score=tier))
    found = fitted(held_out=(X, Y))
    name = "held_out_log_likelihood"
    assert found.history.epochs[name] == pytest.approx(eager.history.epochs[name], rel=1e-5)
    assert found.config["plan"]["score"] == tier
    assert found.history.compiled_graphs == (tier == "compiled")


@pytest.mark.usefixtures("uncompiled")
def test_a_tier_that_differs_does_not_take_over(
    planned: Callable[[Plan], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Loop.__call__

    def wrong(self: Loop, *arguments: Any) -> Any:
        new, record = right(self, *arguments)
        return new | {"first": [x + 0.01 for x in new["first"]]}, record

    eager = fitted(compile=False)
    monkeypatch.setattr(Loop, "__call__", wrong)
    planned(LATER)
    with pytest.warns(UserWarning, match=r"^not compiled: the compiled gradient of \S+ differs") as caught:
        found = fitted()
    assert len(caught) == 1
    assert_same_fit(found, eager)
    assert found.config["plan"]["tiers"] == [["eager", 0]]


@pytest.mark.usefixtures("uncompiled")
def test_auto_says_why_a_fit_was_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepprob.fitting.tiers.pays_to_trace", lambda times, operations: True)
    with pytest.warns(
        UserWarning, match=r"^not compiled: the computation depends on a value .*; the steps run eagerly"
    ):
        found = fitted(program=Untraced("branch"), compile="auto")
    assert found.config["plan"]["reason"].startswith("the computation depends on a value")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(program=Untraced("branch"), compile=False)


def test_short_fits_are_eager_without_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    found = svi(Regression(), (X, Y), epochs=3)
    assert not found.config["compiled"]
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("uncompiled")
def test_announces_compiling_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chosen(True, announce=True)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("compiling the step (")
    chosen(True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", ["yes", "True", None, 2])
def test_refuses_unknown_compile_options(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"compile must be True, False or 'auto'; got {value!r}\."):
        fitted(compile=value)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("value", [0, np.False_])
def test_values_equal_to_false_do_not_compile(value: Any) -> None:
    assert not fitted(epochs=1, compile=value).config["compiled"]


class Untraced(Regression):
    """A regression with one thing that a trace would freeze or cannot contain."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.runs = kind, 0
        self.generator = np.random.default_rng(0)
        self.numbers = iter(range(1000))

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        self.runs += self.kind in ("counter", "slow counter", "noise")
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        mean = (x * w).sum(-1)
        if self.kind == "branch" and w.sum() > 0:
            mean = 2 * mean
        elif self.kind == "item":
            mean = mean * w[0].item()
        elif self.kind == "counter":
            mean = mean + self.runs
        elif self.kind == "slow counter":
            mean = mean + 1e-9 * self.runs
        elif self.kind == "iterator":
            mean = mean + next(self.numbers)
        elif self.kind == "noise":
            mean = mean + torch.randn(self.runs).sum()
        elif self.kind == "numpy generator":
            mean = mean + self.generator.normal()
        elif self.kind == "list":
            mean = mean + sum(w.tolist())
        elif self.kind == "rows":
            mean = mean + float(x.numpy().sum())
        elif self.kind == "selected rows":
            mean = mean + (self.scale * x[x > 0]).mean()
        with self.data_plate(x):
            pyro.sample("y", dist.Normal(mean, self.scale), obs=y)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("branch", r"the computation depends on a value .*, at test_steppers\.py:\d+ `if self\.kind == "),
        ("item", r"the computation depends on a value .*, at test_steppers\.py:\d+ `mean = mean \* w\[0"),
        ("counter", "the program changes 'runs' in Python from run to run, which would be frozen"),
        ("slow counter", "the program changes 'runs' in Python from run to run, which would be frozen"),
        ("noise", "the program changes 'runs' in Python from run to run, which would be frozen"),
        ("numpy generator", "the program changes 'generator' in Python from run to run, which would be frozen"),
        ("iterator", r"the compiled elbo is -[\d.]+ but the eager one is -[\d.]+"),
        ("list", r"the computation depends on a value of a tensor \(.*\), at test_steppers\.py:\d+ `mean = mean"),
        ("rows", r"the computation depends on a value of a tensor \(.*\), at test_steppers\.py:\d+ `mean = mean"),
        ("selected rows", r"the shape of a result depends on values"),
    ],
)  # fmt: skip
def test_runs_eagerly_and_gives_the_reason(kind: str, message: str) -> None:
    with pytest.warns(
        UserWarning, match=rf"^not compiled: {message}.*; the steps run eagerly, and more slowly\.$"
    ) as caught:
        found = fitted(program=Untraced(kind))
    assert len(caught) == 1
    assert not found.config["compiled"]
    assert len(found.history.steps["elbo"]) == 24
    if kind in ("branch", "item", "list", "rows"):
        assert_same_fit(found, fitted(program=Untraced(kind), compile=False))


class CountingObjective(ELBO):
    """An objective that counts its calls, and depends on their number by less than a comparison could see."""

    calls = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        CountingObjective.calls += 1
        loss, terms = super().__call__(*arguments, **options)
        return loss + 1e-9 * CountingObjective.calls, terms


@pytest.mark.usefixtures("uncompiled")
def test_an_objective_with_state_in_python_runs_eagerly() -> None:
    with pytest.warns(UserWarning, match=r"^not compiled: the objective changes 'calls' in Python from run to run"):
        assert not fitted(objective=CountingObjective()).config["compiled"]


class Normalised(Regression):
    """A regression on inputs that are normalised by the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        super().model(self.norm(x), y)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("first", r"the compiled gradient of \S+ differs from the eager one"),
        ("buffers", r"the compiled buffer norm\.running_mean differs from the eager one"),
    ],
)
def test_wrong_native_code_is_not_used(key: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Loop.__call__

    def wrong(self: Loop, *arguments: Any) -> Any:
        new, record = right(self, *arguments)
        return new | {key: [x + 0.01 if x.is_floating_point() else x for x in new[key]]}, record

    assert fitted(program=Normalised()).config["compiled"]
    monkeypatch.setattr(Loop, "__call__", wrong)
    with pytest.warns(UserWarning, match=rf"^not compiled: {message}; the steps run eagerly"):
        found = fitted(program=Normalised())
    assert_same_fit(found, fitted(program=Normalised(), compile=False))


@pytest.mark.usefixtures("uncompiled")
def test_comparison_accepts_infinite_buffers() -> None:
    class Least(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("least", torch.full((4,), torch.inf))

        def model(self, x: Tensor, y: Tensor | None = None) -> None:
            if self.training:
                self.least[:3].copy_(torch.minimum(self.least[:3], x.amin(0)))  # type: ignore[index]
            super().model(x, y)

    found = fitted(program=Least())
    assert found.config["compiled"]
    assert torch.equal(found.program.least, torch.cat([X.amin(0), torch.tensor([torch.inf])]))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("layers", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore:not compiled")
def test_zero_gradients_are_not_taken_for_rounding(layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Loop.__call__

    def zero(self: Loop, *arguments: Any) -> Any:
        new, record = call(self, *arguments)
        return new | {"first": [torch.zeros_like(x) for x in new["first"]]}, record

    monkeypatch.setattr(Loop, "__call__", zero)
    monkeypatch.setattr("deepprob.fitting.objectives.multiplies_bfloat16", lambda _: True)
    for strength in (1.5, 3.0):  # at 3 rounding grows until it could hide any error
        assert not fitted(program=Chained(strength), objective=ELBO(layers=layers), epochs=1).config["compiled"]


class Chained(Regression):
    """A regression on inputs that pass through many layers, each of which rounds in its precision."""

    def __init__(self, strength: float = 1.5) -> None:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(12))
            for layer in self.layers:
                layer.weight.copy_(strength * torch.nn.init.orthogonal_(torch.empty(3, 3)))  # type: ignore[union-attr, operator]

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        for layer in self.layers:
            x = torch.sin(layer(x))
        super().model(x, y)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("factor", "used"), [(1 + 2**-9, True), (1.5, False)], ids=["rounding", "wrong"])
@pytest.mark.filterwarnings("ignore:not compiled")
def test_bfloat16_layers_may_differ_by_rounding_only(
    factor: float, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One changed rounding grows beyond any fixed tolerance; the same step in float32 measures how far."""
    call = Loop.__call__

    def off(self: Loop, carry: Any, *rest: Any) -> Any:
        near = {**carry, "packed": [factor * p for p in carry["packed"]]}
        return call(self, near, *rest)

    monkeypatch.setattr(Loop, "__call__", off)
    monkeypatch.setattr("deepprob.fitting.objectives.multiplies_bfloat16", lambda _: True)
    program = Chained()
    found = fitted(program=program, objective=ELBO(layers="bfloat16"), epochs=1)
    assert found.config["compiled"] is used
    assert not fitted(program=Chained(), epochs=1).config["compiled"]  # in float32 both factors are wrong


def test_graph_runs_uncompiled_if_the_compiler_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: Exception) -> Callable[[Loop], None]:
        def fail(self: Loop) -> None:
            raise error

        return fail

    found = []
    for error, message in (
        (NoCompiler("nothing compiles"), "nothing compiles"),
        (RuntimeError("strange\nand long"), r"torch's compiler failed with RuntimeError: strange"),
        (AssertionError(), r"torch's compiler failed with AssertionError"),
    ):
        monkeypatch.setattr(Loop, "compile", failing(error))
        with pytest.warns(UserWarning, match=rf"^not compiled: {message}.*; the traced graph runs uncompiled\.$"):
            found.append(fitted())
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize(
    "error",
    [
        NoCompiler("no C++ compiler was found"),
        RuntimeError("strange"),
    ],
    ids=repr,
)
def test_held_out_score_is_eager_if_the_compiler_fails(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: Any, inputs: Any, lengths: Any = None) -> None:
        raise error

    replace_compiler(monkeypatch, fail)
    with pytest.warns(UserWarning, match=r"^not compiled: .*(no C\+\+ compiler|RuntimeError: strange)") as caught:
        found = fitted(held_out=(X, Y))
    assert len(caught) <= 2
    assert all(map(math.isfinite, found.history.epochs["held_out_log_likelihood"]))


def test_programs_are_compiled_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[int] = []
    most = 0

    def slow(module: Any, inputs: Sequence[Tensor], lengths: Any) -> Callable[[list[Tensor]], Any]:
        nonlocal most
        inside.append(1)
        most = max(most, len(inside))
        time.sleep(2.0)
        inside.pop()
        return run_uncompiled(module, inputs)

    replace_compiler(monkeypatch, slow)
    threads = [threading.Thread(target=fitted, kwargs={"epochs": 1, "seed": seed}) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


# -- kinds of fits --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncompiled")
def test_program_without_data() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(2.0))

    program = Program.of(model, "normal")
    found = svi(program, None, epochs=800, optimizer=Optimizer(learning_rate=0.05), compile=True, progress=False)
    assert found.config["compiled"]
    assert float(found.sample(draws=4000)["z"].mean()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("options", [{"batch_size": None}, {"batch_size": 1}, {"batch_size": 39}])
def test_batches_of_every_size(options: dict[str, Any]) -> None:
    found = fitted(epochs=3, **options)
    steps = math.ceil(N / (options["batch_size"] or N))
    assert len(found.history.steps["elbo"]) == 3 * steps
    assert all(map(math.isfinite, found.history.steps["elbo"]))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("optimizer", ["rmsprop", pytest.param(torch.optim.RAdam, marks=pytest.mark.slow)])
def test_optimizers(optimizer: Any, tmp_path: Path) -> None:
    def run(*callbacks: Callback) -> Posterior:
        checkpoint = Checkpoint(tmp_path / "c", every=0.5)
        return fitted(optimizer=optimizer, callbacks=[checkpoint, *callbacks])

    whole = fitted(optimizer=optimizer)
    assert whole.config["compiled"]
    assert whole.history.steps["elbo"][-1] > whole.history.steps["elbo"][0]
    with pytest.raises(Killed):
        run(Kill(9))
    assert_same_fit(whole, run())


@pytest.mark.filterwarnings("ignore:.* steps were not finite and were skipped:UserWarning")
@pytest.mark.usefixtures("uncompiled")
def test_batch_norm_statistics_move_except_in_skipped_steps() -> None:
    class Normed(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def model(self, x: Tensor, y: Tensor | None = None) -> None:
            super().model(self.norm(x), y)

    y = Y.clone()
    y[7] = 1e30
    found = fitted((X, y), program=Normed()).instance.tensors()
    assert float(found["program.norm.num_batches_tracked"]) == 18
    assert bool((found["program.norm.running_mean"] != 0).all())
    plain = fitted((X, Y), program=Normed()).instance.tensors()
    assert float(plain["program.norm.num_batches_tracked"]) == 24


class Averaged(Regression):
    """A regression that keeps a running mean of its inputs in a buffer."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        if self.training and y is not None:
            self.mean.mul_(0.9).add_(0.1 * (x.detach() * y.detach().unsqueeze(-1)).mean(0))
        super().model(x - 0.0 * self.mean, y)


@pytest.mark.filterwarnings("ignore:.* steps were not finite and were skipped:UserWarning")
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("compile", [False, True])
def test_skipped_step_restores_every_buffer(compile: bool) -> None:
    y = Y.clone()
    y[7] = 1e30
    found = fitted((X, y), program=Averaged(), compile=compile)
    assert sum(found.history.steps["skipped"]) > 0
    mean = found.instance.tensors()["program.mean"]
    assert bool(((mean != 0) & (mean.abs() < 10)).all())


class Narrow(Regression):
    """A regression with a small scale parameter and no constraint on it."""

    def __init__(self) -> None:
        super().__init__()
        self.width = nn.Parameter(torch.full((8,), 1e-3))

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        super().model(x, y)
        pyro.sample("narrow", dist.Normal(torch.zeros(8), self.width).to_event(1), obs=torch.full((8,), 1e-4))


@pytest.mark.filterwarnings("ignore:.* steps were not finite and were skipped:UserWarning")
@pytest.mark.usefixtures("uncompiled")
def test_comparison_moves_less_if_the_bound_is_not_finite() -> None:
    assert fitted(program=Narrow(), epochs=1).config["compiled"]


@pytest.mark.usefixtures("uncompiled")
def test_draws_inside_a_step_continue_after_a_resume(tmp_path: Path) -> None:
    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Exponential(rate), obs=y)

    def guide(y: Tensor) -> None:
        shape = pyro.param("shape", torch.tensor(2.0), constraint=dist.constraints.positive)
        pyro.sample("rate", dist.Gamma(shape, 1.0))

    def run(*callbacks: Callback) -> Posterior:
        program = Program.of(model, guide, data_plate="data")
        return fitted(Y.abs() + 0.1, program, callbacks=callbacks)

    whole = run()
    assert whole.config["compiled"]
    with pytest.raises(Killed):
        run(Checkpoint(tmp_path / "c", every=0.25), Kill(7))
    assert_same_fit(whole, run(Checkpoint(tmp_path / "c", every=0.25)))


@pytest.mark.usefixtures("uncompiled")
def test_program_store_and_random_state_are_unchanged() -> None:
    pyro.param("theirs", torch.zeros(()))
    before = torch.get_rng_state()
    program = Regression()
    fitted(program=program)
    assert float(program.scale.detach()) == 1.0
    assert torch.equal(before, torch.get_rng_state())
    assert list(pyro.get_param_store().keys()) == ["theirs"]
    pyro.clear_param_store()


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        (X[:, :2], X[:, 1:]),
        (X, X),
    ],
    ids=["overlapping", "the same"],
)
def test_compiles_with_data_that_share_memory(data: Batch) -> None:
    class Sum(Program):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(0.5))

        def model(self, x: Tensor, y: Tensor) -> None:
            with self.data_plate(x):
                total = self.slope * x.sum(-1) - y.reshape(len(y), -1).sum(-1)
                pyro.sample("total", dist.Normal(total, 1.0), obs=torch.zeros(len(x)))

        def guide(self, x: Tensor, y: Tensor) -> None:
            pass

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fitted(data, Sum()).config["compiled"]
