"""Fits without a fixed length: they end when the bound has levelled, or at the end of their budget."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from uncompiled import replace_compiler

import deepprob as dp
from deepprob.diagnostics.checks.convergence import check_levels
from deepprob.engine.statistics import Change, line_rise, paired_change
from deepprob.fitting import course as courses
from deepprob.fitting.callbacks import Callback, Checkpoint, Fit
from deepprob.fitting.course import Course, Length, budget
from deepprob.fitting.kl_schedules import KLWarmUp
from deepprob.fitting.levelling import Levelling
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.run import RunningFit
from deepprob.inference import svi
from deepprob.posteriors.margin import margin_of
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program

Y = torch.linspace(-1.0, 3.0, 20)


def model(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def from_afar(y: Tensor) -> None:
    scale = pyro.param("scale", torch.tensor(0.1), constraint=dist.constraints.positive)
    pyro.sample("loc", dist.Normal(pyro.param("m", torch.tensor(0.0)), scale))


def fitted(**options: Any) -> Posterior:
    settings: dict[str, Any] = {"batch_size": 5, "progress": False, "compile": False}
    return svi(Program.of(model, "normal", data_plate="data"), Y, **settings | options)


def same(one: Posterior, other: Posterior) -> bool:
    first, second = one.instance.tensors(), other.instance.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("batch_size", [5, None])
def test_ends_at_the_answer(batch_size: int | None) -> None:
    posterior = fitted(batch_size=batch_size)
    levels, steps = posterior.history.levels, len(posterior.history.steps["elbo"])
    assert levels["level"][-1] == 1.0
    assert not any(levels["level"][:-1])
    assert steps == levels["step"][-1] + max(200, levels["step"][-1] // 2) < budget(1)
    assert check_levels(levels, 20).verdict == "pass"
    draws = posterior.sample(draws=4000)["loc"]
    assert float(draws.mean()) == pytest.approx(20 / 21, abs=0.3 * 21**-0.5)
    assert float(draws.std()) == pytest.approx(21**-0.5, rel=0.2)


@pytest.mark.parametrize("optimizer", [Optimizer(schedule="constant"), Optimizer("rmsprop", schedule="constant")])
def test_comparisons_leave_the_steps_as_they_are(optimizer: Optimizer) -> None:
    free = fitted(optimizer=optimizer)
    steps = len(free.history.steps["elbo"])
    fixed = fitted(optimizer=optimizer, steps=steps)
    assert len(free.history.levels["step"]) >= 1
    assert free.history.steps == fixed.history.steps
    assert same(free, fixed)


def test_steps_that_are_too_small_do_not_pass_for_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """The change of each window is far below the margin, the way ahead is not."""
    monkeypatch.setattr(courses, "_LEAST", 1500)
    with pytest.warns(UserWarning, match=r"the bound had not levelled when the fit's budget of 1500 steps ended"):
        program = Program.of(model, from_afar, data_plate="data")
        posterior = svi(program, Y, optimizer=Optimizer(learning_rate=1e-6), progress=False, compile=False)
    check = check_levels(posterior.history.levels, 20)
    assert check.verdict == "caution"
    assert "it would rise by" in check.reading
    levels = posterior.history.levels
    assert max(levels["change"]) < 0.1 * levels["margin"][0]
    assert min(levels["ahead"]) > levels["margin"][0]
    assert not any(levels["level"])
    assert len(posterior.history.steps["elbo"]) == 1500


def test_a_warm_up_that_leaves_nothing_to_compare_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courses, "_LEAST", 1500)
    program = Program.of(model, from_afar, data_plate="data")
    with pytest.warns(UserWarning, match=r"the fit ended after its budget of 1500 steps, .* the first 1500 steps were"):
        svi(program, Y, progress=False, compile=False, callbacks=[KLWarmUp(1500)])


def test_a_held_out_bound_that_chose_an_early_epoch_asks_for_no_more_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A local code of each row with a weight that the held-out row does not like."""
    monkeypatch.setattr(courses, "_LEAST", 1500)

    class Codes(Program):
        def __init__(self) -> None:
            super().__init__()
            self.shift = torch.nn.Parameter(torch.tensor(0.0))

        def model(self, x: Tensor) -> None:
            with self.data_plate(x):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z + self.shift, 1.0), obs=x)

        def guide(self, x: Tensor) -> None:
            with self.data_plate(x):
                pyro.sample("z", dist.Normal(x / 2, 0.7))

    slow = Optimizer(learning_rate=1e-4, schedule="constant")
    options: dict[str, Any] = {"optimizer": slow, "progress": False, "compile": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = svi(Codes(), Y + 9.0, held_out=torch.full((50,), -9.0), **options)
    assert posterior.history.best_epoch < 500
    with pytest.warns(UserWarning, match="the bound had not levelled"):
        svi(Codes(), Y + 9.0, held_out=Y + 9.0, **options)


def test_a_bound_that_is_not_finite_ahead_does_not_hold_up_the_end() -> None:
    levelling = Levelling(margin=0.1, num_data=1)
    nothing: list[Tensor] = [torch.zeros(2)]

    def level_but_ahead(points: Any, count: int) -> Any:
        return np.array([[0.0] * count] * 3 + [[np.nan] * count] * 2)

    found = []
    for step in range(1, 1000):
        if step == levelling.next_stop(step - 1):
            found += [levelling.visit(step, nothing, nothing, level_but_ahead)]
    first, second = filter(None, found)
    level = {"change": 0.0, "se": 0.0, "ahead": 0.0, "ahead_se": 0.0, "held": 0.0, "held_se": 0.0, "margin": 0.1}
    assert first == {"step": 500, **level, "windows": 1.0, "level": 0.0}
    assert second == {"step": 950, **level, "windows": 2.0, "level": 1.0}


def test_a_point_beyond_one_where_the_bound_falls_is_left_out() -> None:
    """Far out float32 may give any number: a triangular solve of an ill-conditioned root gave a rise of 1e6 nats."""
    levelling = Levelling(margin=0.1, num_data=1)
    levelling.before, levelling.sum = [torch.zeros(2)], [torch.zeros(2)]
    levelling.begins, levelling.ends = 0, 1
    found = levelling.visit(
        1, [torch.zeros(2)], [torch.zeros(2)], lambda points, n: np.array([[0.0] * n] * 3 + [[-9.0] * n, [1e6] * n])
    )
    assert found is not None
    assert (found["ahead"], found["windows"]) == (0.0, 1.0)


def test_a_point_ahead_where_the_program_fails_is_left_out() -> None:
    """Without a fixed length the fit tries points far ahead, which no step would have reached."""

    def fragile(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        torch.linalg.cholesky((4.0 - loc.detach().square()).reshape(1, 1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("loc", dist.Normal(pyro.param("m", torch.tensor(0.0)), 0.2))

    program = Program.of(fragile, guide, data_plate="data")
    posterior = svi(program, Y, progress=False, compile=False)
    assert posterior.history.levels["level"][-1] == 1.0
    assert float(posterior.parameters()["m"]) == pytest.approx(20 / 21, abs=0.05)


def test_an_interruption_within_a_comparison_leaves_the_parameters_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = RunningFit._take_one

    def take(self: RunningFit, rows: Tensor, knobs: Any) -> Any:
        if self.step == 500 and not knobs[:, 0].any():
            raise KeyboardInterrupt
        return taken(self, rows, knobs)

    monkeypatch.setattr(RunningFit, "_take_one", take)
    with pytest.warns(UserWarning, match="interrupted after 500 of"):
        posterior = fitted(batch_size=None)
    assert posterior.training is None
    monkeypatch.undo()
    assert same(posterior, fitted(batch_size=None, steps=500, optimizer=Optimizer(schedule="constant")))


class _Killed(Exception):
    pass


class _Kill(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def interval(self, steps_per_epoch: int) -> int:
        return self.at

    def step_end(self, fit: Fit) -> None:
        if fit.step == self.at:
            raise _Killed


@pytest.mark.parametrize(("at", "compile"), [(330, False), pytest.param(900, True, marks=pytest.mark.slow)])
def test_killed_fit_resumes_bit_for_bit(
    at: int, compile: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_compiler(monkeypatch)

    def run(folder: str, *more: Callback) -> Posterior:
        return fitted(compile=compile, callbacks=[Checkpoint(tmp_path / folder, every=1.25), *more])

    whole = run("whole")
    with pytest.raises(_Killed):
        run("pieces", _Kill(at))
    resumed = run("pieces")
    assert same(whole, resumed)
    assert whole.history.levels == resumed.history.levels
    assert whole.history.steps == resumed.history.steps


@pytest.mark.parametrize("at", [900, pytest.param(1300, marks=pytest.mark.slow)])
def test_killed_fit_resumes_within_the_last_windows(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget's constant rate ends at step 1000, and windows of 125 steps follow."""
    monkeypatch.setattr(courses, "_LEAST", 1500)
    slow = Optimizer(learning_rate=1e-6)

    def run(folder: str, *more: Callback) -> Posterior:
        program, callbacks = Program.of(model, from_afar, data_plate="data"), [Checkpoint(tmp_path / folder), *more]
        return svi(program, Y, optimizer=slow, progress=False, compile=False, callbacks=callbacks)

    with pytest.warns(UserWarning, match="had not levelled"):
        whole = run("whole")
    with pytest.raises(_Killed):
        run("pieces", _Kill(at))
    with pytest.warns(UserWarning, match="had not levelled"):
        resumed = run("pieces")
    assert same(whole, resumed)
    assert whole.history.levels == resumed.history.levels
    assert whole.history.levels["step"][-3:] == [1250, 1375, 1500]


def test_levels_are_saved(tmp_path: Path) -> None:
    posterior = fitted()
    posterior.save(tmp_path / "p")
    loaded = dp.Posterior.load(tmp_path / "p", Program.of(model, "normal", data_plate="data"))
    assert loaded.history.levels == posterior.history.levels
    assert loaded.config["length"] == "level"


def test_margin_counts_latent_numbers_of_all_rows() -> None:
    def codes(y: Tensor) -> None:
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    def of_rows(rows: int) -> float:
        program = Program.of(codes, "normal", data_plate="data")
        return margin_of(ProgramInstance(program, (torch.zeros(rows),), rows))

    assert of_rows(100) == pytest.approx(0.01 * (3 + 200))
    assert of_rows(2) == 0.1


def test_schedule_begins_when_the_bound_has_levelled() -> None:
    course = Course(Optimizer(schedule="cosine"), 0.5, Length.of(None, None, steps_per_epoch=1))
    assert course.rates(0, 10).tolist() == [0.5] * 10
    course.level_at(600)
    assert course.total == 900
    rates = course.rates(590, 900)
    assert rates[:10].tolist() == [0.5] * 10
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[-1] < 0.02 * 0.5


def test_fixed_course_follows_the_schedule_throughout() -> None:
    optimizer = Optimizer(schedule="linear")
    course = Course(optimizer, 0.5, Length.of(9, None, steps_per_epoch=10))
    assert course.rates(20, 90).tolist() == optimizer.rates(20, 90, 90, 0.5).tolist()


def test_equivalence_holds_its_level() -> None:
    """A true change at the margin passes for none in at most 5 % of samples (here 4.6 % of 2 000, sd 0.5 %)."""
    rng = np.random.default_rng(0)
    passed = [paired_change(np.zeros(30), rng.normal(0.1, 0.2, 30)).is_within(0.1) for _ in range(2000)]
    assert np.mean(passed) < 0.065
    tight = [paired_change(np.zeros(30), rng.normal(0.0, 0.05, 30)).is_within(0.1) for _ in range(200)]
    assert np.mean(tight) == 1.0


def test_change_that_is_not_finite_is_never_level() -> None:
    change = paired_change(np.zeros(3), np.array([0.0, np.nan, 0.0]))
    assert not change.is_within(1e9)
    assert not change.is_beyond(0.0)
    assert not Change(np.inf, 1.0, 5).is_within(1e9)


def test_rise_of_a_line() -> None:
    change, inflation = line_rise(np.linspace(0.0, 1.9, 20))
    assert change.value == pytest.approx(1.9)
    assert change.se == pytest.approx(0.0, abs=1e-9)
    assert inflation >= 1.0
