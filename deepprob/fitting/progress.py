"""A progress bar for terminals and notebooks."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from tqdm import tqdm

from deepprob.errors import shown
from deepprob.posteriors.history import History


def shows_progress(progress: bool | str) -> bool:
    """Whether to show a progress bar; ``"auto"`` shows it in a terminal or a notebook.

    Raises:
        ValueError: If ``progress`` is neither a bool nor ``"auto"``.

    Examples:
        >>> shows_progress(False)
        False
    """
    if isinstance(progress, bool):
        return progress
    if progress != "auto":
        raise ValueError(f"progress must be True, False or 'auto'; got {shown(progress)}.")
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class ProgressBar:
    """The number of steps done, and the ELBO of the last epoch.

    Args:
        total: Planned steps.
        done: Steps that a resumed fit has already taken.
        progress: See `shows_progress`.
    """

    def __init__(self, total: int, done: int, progress: bool | str) -> None:
        # Plain text needs no widgets, and notebooks show it too.
        self._bar: Any = tqdm(
            total=total,
            initial=done,
            disable=not shows_progress(progress),
            bar_format="{percentage:3.0f} % |{bar:28}| step {n_fmt} of {total_fmt}{postfix}, {remaining} left",
            leave=False,
        )
        self._epochs = 0

    def advance(self, steps: int, history: History) -> None:
        """Add steps to the bar, and show the last epoch's ELBO."""
        self._bar.update(steps)
        elbos = history.epochs.get("elbo", [])
        if len(elbos) != self._epochs and not self._bar.disable:
            self._epochs = len(elbos)
            text = f"elbo {elbos[-1]:.4g}"
            if held_out := history.epochs.get("held_out_elbo"):
                text += f", held out {held_out[-1]:.4g}"
            self._bar.set_postfix_str(text, refresh=False)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
