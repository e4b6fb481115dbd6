"""The progress of a fit: a bar in a terminal or a notebook, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections import deque
from types import TracebackType
from typing import Protocol

from deepprob.errors import shown
from deepprob.fitting.callbacks import Fit


class ProgressBar:
    """The steps of a fit, the ELBO and the held-out score of its last epoch, and the time left.

    A terminal and a notebook show a bar that changes in place. Elsewhere, as in a pipe or a log file, the bar is plain
    lines: at most one every ten seconds, the first after ten seconds. A fit without progress shows nothing.

    Args:
        fit: The fit before its first step, or resumed.
        progress: ``"auto"`` or True to show progress, False for none. With True the first line comes at once.

    Raises:
        ValueError: If ``progress`` is neither a bool nor ``"auto"``.
    """

    def __init__(self, fit: Fit, progress: bool | str) -> None:
        if not isinstance(progress, bool) and progress != "auto":
            raise ValueError(f"progress must be True, False or 'auto'; got {shown(progress)}.")
        self._fit, self._display = fit, _display_here() if progress else None
        self._began = now = time.perf_counter()
        self._next = now if self._display is None or progress is True else now + self._display.every
        self._shown: deque[tuple[float, int]] = deque([(now, fit.step)], maxlen=30)  # for the time left
        self._seen, self._skipped = fit.step, sum(map(bool, fit.history.steps.get("skipped", ())))

    def advance(self, *, at_most: bool = False) -> None:
        """Show the steps that the fit has taken since the last call.

        Args:
            at_most: Whether the fit may end before ``fit.total_steps``, which may also become smaller.
        """
        if self._display is None:
            return
        self._note_skipped()
        now = time.perf_counter()
        if now >= self._next:
            self._next = now + self._display.every
            self._shown.append((now, self._fit.step))
            self._display.show(self._fit, self._text(at_most, self._time_left(at_most)))

    def note(self, text: str) -> None:
        """Print a line during the fit; nothing if the fit shows no progress."""
        if self._display is not None:
            self._display.note(text)

    def _note_skipped(self) -> None:
        """Say that a step was skipped: the first, the tenth, the hundredth, and so on."""
        steps, first = self._fit.history.steps, self._seen
        new = steps.get("skipped", [])[first:]
        self._seen += len(new)
        for step in (first + i for i, skipped in enumerate(new) if skipped):
            self._skipped += 1
            if math.log10(self._skipped).is_integer():
                elbo = steps["elbo"][step]
                problem = "the gradient was not finite" if math.isfinite(elbo) else f"elbo was {elbo:g}"
                self.note(
                    f"step {_number(step + 1)}: {problem}, the step was skipped ({_number(self._skipped)} so far)"
                )

    def _text(self, at_most: bool, end: str) -> str:
        """The state of the fit in one line."""
        fit, epochs = self._fit, self._fit.history.epochs
        parts = [f"step {_number(fit.step)} of {'at most ' * at_most}{_number(fit.total_steps)}"]
        if elbo := epochs.get("elbo"):
            name, scores = fit.history.held_out
            parts.append(
                f"elbo {elbo[-1]:.4g}" + (f", {name} {scores[-1]:.4g}" if scores and not math.isnan(scores[-1]) else "")
            )
        return "  ".join([*parts, end] if end else parts)

    def _time_left(self, at_most: bool) -> str:
        """The time left at the speed of the last steps shown; empty if they do not tell."""
        (began, first), (now, step) = self._shown[0], self._shown[-1]
        if step <= first:
            return ""
        seconds = (self._fit.total_steps - step) * (now - began) / (step - first)
        return f"{'at most ' * at_most}{_duration(seconds)} left"

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.close(self._fit, self._text(False, f"took {_duration(time.perf_counter() - self._began)}"))


class _Display(Protocol):
    """A place that shows progress; `every` is the least number of seconds between two calls of `show`."""

    every: float

    def show(self, fit: Fit, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self, fit: Fit, text: str) -> None: ...


class _Lines:
    """Plain lines on standard error; the last one tells the end of a fit that has printed others."""

    every = 10.0

    def __init__(self) -> None:
        self.printed = False

    def show(self, fit: Fit, text: str) -> None:
        self.printed = True
        self.note(text)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self, fit: Fit, text: str) -> None:
        if self.printed:
            self.note(text)


def _display_here() -> _Display:
    """The display for where standard error goes."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    in_notebook = hasattr(shell, "kernel")
    if not in_notebook and not (sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")):
        return _Lines()
    caller = random.getstate()
    from deepprob.fitting.displays import Notebook, Terminal

    random.setstate(caller)  # rich draws a number when it is imported
    return Notebook() if in_notebook else Terminal()


def _number(count: int) -> str:
    """A whole number with a space at every thousand.

    Examples:
        >>> _number(12000)
        '12 000'
    """
    return f"{count:,}".replace(",", " ")


def _duration(seconds: float) -> str:
    """A time to the eye.

    Examples:
        >>> [_duration(seconds) for seconds in (0.2, 59, 240, 7500)]
        ['1 s', '59 s', '4 min', '2 h 5 min']
    """
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = round(whole / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
