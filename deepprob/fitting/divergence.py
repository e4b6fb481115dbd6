"""The error that a diverged fit raises."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepprob.posteriors.posterior import Posterior


class DivergenceError(RuntimeError):
    """Too many steps of a fit in a row had a loss or gradient that was not finite.

    Args:
        message: What became non-finite, where, and what to change.
        posterior: The last good posterior, or None if no step succeeded.
    """

    def __init__(self, message: str, posterior: Posterior | None = None) -> None:
        super().__init__(message)
        self.posterior = posterior
