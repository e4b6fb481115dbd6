"""The command's progress bar, a callback of the fit."""

from __future__ import annotations

from collections.abc import Callable

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from deepprob.callbacks import Callback, Fit
from deepprob.terminal import Screen


class FitBar(Callback):
    """A bar with the epoch, the ELBO and the time left; shown only in a terminal, gone when the fit ends.

    Args:
        screen: Where to draw it.
        announce: Called when all was found in order and the first step is next.
    """

    def __init__(self, screen: Screen, announce: Callable[[], None]) -> None:
        self._announce = announce
        self._progress = Progress(
            TextColumn("epoch {task.completed:.0f} of {task.total:.0f}"),
            BarColumn(28, complete_style="blue", finished_style="blue"),
            TextColumn("{task.fields[elbo]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=screen.err,
            transient=True,
            disable=not screen.err.is_terminal,
            refresh_per_second=5,
        )
        self._task = self._progress.add_task("fit", total=1, elbo="", start=False)

    def __enter__(self) -> FitBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def start(self, fit: Fit) -> None:
        self._announce()
        self._progress.update(self._task, total=fit.total_steps / fit.steps_per_epoch)
        self._progress.start_task(self._task)
        self._progress.start()
        self._show(fit)

    def step_end(self, fit: Fit) -> None:
        self._progress.update(self._task, completed=fit.step / fit.steps_per_epoch)

    def epoch_end(self, fit: Fit) -> None:
        self._show(fit)

    def _show(self, fit: Fit) -> None:
        epochs = fit.history.epochs
        names = {"elbo": "elbo", "held_out_elbo": "held out"}
        text = "  ".join(f"{names[n]} {epochs[n][-1]:.4g}" for n in names if epochs.get(n))
        self._progress.update(self._task, completed=fit.step / fit.steps_per_epoch, elbo=text)
