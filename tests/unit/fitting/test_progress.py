"""The progress of a fit, shown in a terminal, in a notebook and as lines."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from rich.console import Console
from scripted import Scripted
from torch import Tensor

import deepprob as dp
from deepprob.fitting import displays, progress
from deepprob.fitting.progress import ProgressBar
from deepprob.inference import svi


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def take(fit: Scripted, bar: ProgressBar, clock: Clock, seconds: float, epochs: int = 1, **options: Any) -> None:
    """End some epochs of four steps, and show them."""
    for _ in range(epochs):
        fit.end_epoch(elbo=-1.234, **options)
    clock.now += seconds
    bar.advance()


def test_lines_come_every_ten_seconds_and_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    fit = Scripted(epochs=1000)
    with ProgressBar(fit, "auto") as bar:
        for _ in range(10):
            take(fit, bar, clock, 2.0, epochs=50)
        fit.end_epoch(elbo=-0.5)
    assert capsys.readouterr().err.splitlines() == [
        "step 1 000 of 4 000  elbo -1.234  30 s left",
        "step 2 000 of 4 000  elbo -1.234  20 s left",
        "step 2 004 of 4 000  elbo -0.5  took 20 s",
    ]


def test_short_fit_is_silent_unless_progress_is_true(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for choice, lines in (("auto", 0), (True, 2), (False, 0)):
        fit = Scripted(epochs=10)
        with ProgressBar(fit, choice) as bar:
            for _ in range(4):
                take(fit, bar, clock, 2.0)
        captured = capsys.readouterr()
        assert (len(captured.err.splitlines()), captured.out) == (lines, "")


def test_line_shows_the_held_out_score_and_follows_the_total(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    fit = Scripted(epochs=100)
    with ProgressBar(fit, "auto") as bar:
        fit.end_epoch(elbo=-2.0, held_out_elbo=-3.5)
        clock.now += 10.0
        bar.advance(at_most=True)
        fit.total_steps = 8
        clock.now += 10.0
        bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 4 of at most 400  elbo -2, held-out ELBO -3.5  at most 16 min left"
    assert lines[1] == "step 4 of 8  elbo -2, held-out ELBO -3.5  20 s left"


def test_time_left_is_unknown_before_the_first_step(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(Scripted(), True) as bar:
        bar.advance()
    assert capsys.readouterr().err.splitlines()[0] == "step 0 of 40"


@pytest.mark.parametrize("choice", ["auto", True, False])
def test_notes_are_printed_where_progress_shows(choice: bool | str, capsys: pytest.CaptureFixture[str]) -> None:
    ProgressBar(Scripted(), choice).note("a note")
    assert capsys.readouterr().err == ("a note\n" if choice else "")


def test_skipped_steps_are_noted_at_each_tenfold(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    fit = Scripted(epochs=1000)
    steps = fit.history.steps
    steps |= {"elbo": [math.nan] * 3, "skipped": [1.0] * 3}  # before the fit was resumed
    fit.step = 3
    bar = ProgressBar(fit, "auto")
    for _ in range(2):
        steps["elbo"] += [-1.0, math.nan, -2.0, math.inf]
        steps["skipped"] += [0.0, 1.0, 1.0, 1.0]
        bar.advance()
    steps["elbo"] += [-math.inf] * 2000
    steps["skipped"] += [1.0] * 2000
    bar.advance()
    assert capsys.readouterr().err.splitlines() == [
        "step 12: elbo was -inf, the step was skipped (10 so far)",
        "step 102: elbo was -inf, the step was skipped (100 so far)",
        "step 1 002: elbo was -inf, the step was skipped (1 000 so far)",
    ]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal receives."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=90, color_system=None, legacy_windows=False)
    monkeypatch.setattr(displays, "terminal", lambda: console)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    return file


def test_terminal_shows_a_bar_that_goes_and_notes_that_stay(terminal: io.StringIO, clock: Clock) -> None:
    fit = Scripted(epochs=20)
    with ProgressBar(fit, "auto") as bar:
        take(fit, bar, clock, 1.0, epochs=10)
        bar.note("a [note]")
        take(fit, bar, clock, 1.0)
    text = terminal.getvalue()
    assert f"{'━' * 14}{' ' * 16}step 40 of 80  elbo -1.234  1 s left" in text
    assert "step 44 of 80  elbo -1.234  2 s left" in text
    assert "a [note]\n" in text
    assert text.index("a [note]") < text.index("step 44")
    assert text.endswith("\x1b[1A\x1b[2K")  # the line of the bar is empty again
    assert "\x1b[?25h" in text  # and the cursor is back


def test_narrow_terminal_shortens_the_bar_first(terminal: io.StringIO, clock: Clock) -> None:
    displays.terminal().width = 52
    fit = Scripted(epochs=20)
    with ProgressBar(fit, "auto") as bar:
        take(fit, bar, clock, 1.0, epochs=10)
    assert re.search(r"━{7} {9}step 40 of 80  elbo -1\.234  1 s left", terminal.getvalue())


def test_notebook_keeps_one_line(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    IPython = pytest.importorskip("IPython", reason="IPython is not installed")
    shown: list[str] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            shown[-1] = data["text/plain"]

    def first(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        shown.append(data["text/plain"])
        return Handle()

    monkeypatch.setattr("IPython.display.display", first)
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=None))
    fit = Scripted(epochs=20)
    with ProgressBar(fit, "auto") as bar:
        take(fit, bar, clock, 0.25)
        assert shown == []
        for _ in range(5):
            take(fit, bar, clock, 1.0)
        bar.note("a note")
    assert shown == ["━" * 8 + " " * 20 + "  step 24 of 80  elbo -1.234  took 6 s"]
    assert capsys.readouterr().err == "a note\n"


def test_terminal_without_control_codes_gets_lines(
    terminal: io.StringIO, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with ProgressBar(Scripted(), True) as bar:
        bar.advance()
    assert terminal.getvalue() == ""
    assert capsys.readouterr().err.startswith("step 0 of 40")


def test_bar_leaves_the_random_state_of_the_caller() -> None:
    code = """
import os, random, sys
from deepprob.fitting import progress
sys.stderr.isatty, os.environ["TERM"] = lambda: True, "xterm"
before = random.getstate()
assert "rich.style" not in sys.modules
progress._display_here()
assert "rich.style" in sys.modules
assert random.getstate() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def with_one_bad_row(**options: Any) -> dp.Posterior:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 8):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    y = torch.ones(8)
    y[3] = 1e30  # its square is infinite
    program = dp.Program.of(model, "normal", data_plate="data")
    return svi(program, y, epochs=12, batch_size=2, compile=False, **options)


@pytest.mark.parametrize("choice", ["auto", False])
def test_fit_that_skipped_steps_says_so(choice: bool | str, capsys: pytest.CaptureFixture[str]) -> None:
    message = r"^12 of 48 steps were not finite and were skipped; the last was step \d+\. All of them: posterior"
    with pytest.warns(UserWarning, match=message) as caught:
        posterior = with_one_bad_row(progress=choice)
    assert [warning.filename for warning in caught] == [__file__]
    first, tenth = (posterior.history.steps["skipped"].index(1.0) + 1, r"\d+")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (2 if choice else 0)
    for line, step, count in zip(lines, (first, tenth), (1, 10), strict=bool(choice)):
        assert re.fullmatch(rf"step {step}: elbo was -inf, the step was skipped \({count} so far\)", line)
