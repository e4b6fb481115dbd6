"""A progress bar for terminal and notebook."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from tqdm import tqdm

from deepprob.posteriors.history import History


def wanted(progress: bool | str) -> bool:
    """Whether to show a bar: as asked, or where somebody watches.

    Raises:
        ValueError: If it is neither a bool nor ``"auto"``.

    Examples:
        >>> wanted(False)
        False
    """
    if isinstance(progress, bool):
        return progress
    if progress != "auto":
        raise ValueError(f"progress must be True, False or 'auto'; got {progress!r}.")
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class ProgressBar:
    """Steps done of steps planned, with the last epoch's ELBO beside it.

    Args:
        total: Steps planned.
        done: Steps done already, by a fit that is resumed.
        progress: See `wanted`.
    """

    def __init__(self, total: int, done: int, progress: bool | str) -> None:
        # Plain text: it needs no widgets, and a notebook shows it as well.
        self._bar: Any = tqdm(
            total=total,
            initial=done,
            disable=not wanted(progress),
            bar_format="{percentage:3.0f} % |{bar:28}| step {n_fmt} of {total_fmt}{postfix}, {remaining} left",
            leave=False,
        )
        self._epochs = 0

    def advance(self, steps: int, history: History) -> None:
        """Some more steps."""
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
