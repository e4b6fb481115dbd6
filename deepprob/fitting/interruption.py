"""Ctrl-C during a long run."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from deepprob.data.streams import ReadingError
from deepprob.posteriors.history import History


@contextmanager
def interruptible() -> Iterator[list[bool]]:
    """Let a run end in good order on Ctrl-C.

    Within this context the first Ctrl-C only makes the yielded list non-empty; a second one interrupts as usual. In
    other threads, and where the user has a handler for the signal, nothing changes.
    """
    seen: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = signal.getsignal(signal.SIGINT)

    def note(signum: int, frame: Any) -> None:
        seen.append(True)
        signal.signal(signal.SIGINT, before)

    if before is not signal.default_int_handler:  # the user has set a handler
        yield seen
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


class _Fit(Protocol):
    history: History

    @property
    def order(self) -> Any: ...

    def _posterior(self) -> Any: ...


@contextmanager
def reading(fit: _Fit, interrupted: list[bool]) -> Iterator[None]:
    """Let the reading of rows end with a fit.

    An error of a loader carries the posterior so far; after Ctrl-C, which ends its worker processes, there is none.

    Args:
        fit: The fit.
        interrupted: Not empty after Ctrl-C.
    """
    try:
        yield
    except ReadingError as error:
        fit.history.interrupted = True
        if not interrupted:
            error.posterior = fit._posterior() if fit.history.steps else None
            raise
    finally:
        fit.order.close()


def warn_if_interrupted(history: History, planned: int) -> None:
    """Warn that a fit of a planned number of steps was interrupted."""
    if history.interrupted:
        warnings.warn(
            f"the fit was interrupted after {len(history.steps.get('elbo', ()))} of {planned} steps; "
            "the posterior holds the best state so far.",
            UserWarning,
            stacklevel=4,
        )
