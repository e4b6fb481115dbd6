"""Where progress is a bar that changes in place: a terminal and a notebook. Both draw it with rich."""

from __future__ import annotations

import functools
import io
import sys
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deepprob.fitting.callbacks import Fit

_BAR_WIDTH = 28


class Terminal:
    """The bar disappears when the fit ends; notes and what callbacks print stand above it."""

    every = 0.2

    def __init__(self) -> None:
        # What a callback prints goes above the bar, unless it goes to a file.
        self.live = Live(console=terminal(), auto_refresh=False, transient=True, redirect_stdout=sys.stdout.isatty())

    def show(self, fit: Fit, text: str) -> None:
        self.live.start()
        self.live.update(row_of(fit, text), refresh=True)

    def note(self, text: str) -> None:
        terminal().print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self, fit: Fit, text: str) -> None:
        self.live.stop()


class Notebook:
    """One line of output, which a saved notebook keeps; it needs no widgets."""

    every = 0.5

    def __init__(self) -> None:
        self.handle: Any = None

    def show(self, fit: Fit, text: str) -> None:
        paper = Console(file=io.StringIO(), width=120, color_system=None, force_jupyter=False)
        with paper.capture() as captured:
            paper.print(row_of(fit, text))
        line = {"text/plain": captured.get().rstrip()}
        if self.handle is None:
            from IPython.display import display  # there is a kernel

            self.handle = display(line, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self.handle.update(line, raw=True)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def close(self, fit: Fit, text: str) -> None:
        if self.handle is not None:
            self.show(fit, text)


@functools.cache
def terminal() -> Console:
    """The terminal of all bars, so that a fit inside of a fit has its bar below the other."""
    return Console(stderr=True)


def row_of(fit: Fit, text: str) -> Table:
    """A bar and its text."""
    row = Table.grid(padding=(0, 2, 0, 0))
    row.add_column(max_width=_BAR_WIDTH)  # a narrow terminal shortens the bar, not the text
    row.add_column(no_wrap=True)
    row.add_row(ProgressBar(max(fit.total_steps, 1), fit.step), Text(text))
    return row
