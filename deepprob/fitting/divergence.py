"""Steps that are not finite: the error of a diverged fit, and the warning of a fit that skipped some."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepprob.posteriors.history import History

if TYPE_CHECKING:
    from deepprob.posteriors.posterior import Posterior


MOST_SKIPPED = 20  # steps in a row; after that the fit has diverged


class DivergenceError(RuntimeError):
    """Too many steps of a fit in a row had a loss or gradient that was not finite.

    Args:
        message: What became non-finite, where, and what to change.
        posterior: The last good posterior, or None if no step succeeded.
    """

    def __init__(self, message: str, posterior: Posterior | None = None) -> None:
        super().__init__(message)
        self.posterior = posterior


def runs_of_skipped(before: int, skipped: Sequence[float], most: int) -> list[int]:
    """How many steps in a row are skipped after each step, up to the first that is the last of ``most``.

    Examples:
        >>> runs_of_skipped(1, [1.0, 0.0, 1.0, 1.0, 1.0, 0.0], 3)
        [2, 0, 1, 2, 3]
    """
    runs: list[int] = []
    for bad in skipped:
        runs.append((runs[-1] if runs else before) + 1 if bad else 0)
        if runs[-1] == most:
            break
    return runs


def warn_of_skipped(history: History) -> None:
    """Warn at the end of a fit that steps were skipped, with their number."""
    flags = history.steps["skipped"]
    skipped = [step for step, bad in enumerate(flags, 1) if bad]
    if skipped:
        warnings.warn(
            f"{len(skipped)} of {len(flags)} steps were not finite and were skipped; the last was step {skipped[-1]}. "
            "All of them: posterior.history.steps['skipped'].",
            UserWarning,
            stacklevel=4,
        )
