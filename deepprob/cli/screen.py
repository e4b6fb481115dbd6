"""Terminal output of the command: reports, tables, notes and errors."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.style import Style
from rich.text import Text

if TYPE_CHECKING:
    from deepprob.diagnostics import Check
    from deepprob.diagnostics.report import Report


WIDTH = 100
COLORS = {"unchecked": "dim", "pass": "green", "caution": "yellow", "fail": "red"}
INDENT = " " * 10


class Screen:
    """Terminal output: results go to standard output, notes and errors to standard error.

    Colors appear only in a terminal and only if ``NO_COLOR`` is not set. Long lines are not wrapped, so that paths
    can be copied and pipes get whole lines.

    Args:
        quiet: Whether only errors are printed.
        json: Whether standard output gets one JSON object, from `result`, and everything else standard error.
    """

    def __init__(self, *, quiet: bool = False, json: bool = False) -> None:
        self.quiet, self.json = quiet, json
        self.out, self.err = Console(highlight=False, stderr=json, quiet=quiet), Console(stderr=True, highlight=False)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a terminal without "±" shows "?" instead of an error

    @property
    def width(self) -> int:
        """Width of paragraphs in columns."""
        return min(self.out.width, WIDTH) if self.out.is_terminal else WIDTH

    def say(self, *parts: str | tuple[str, str | Style]) -> None:
        """Print one line of plain or styled parts to standard output."""
        self.out.print(Text.assemble(*parts), soft_wrap=True)

    def paragraph(self, text: str, *, indent: str = "", style: str = "") -> None:
        """Print a text, wrapped and indented."""
        for line in textwrap.wrap(text, self.width, initial_indent=indent, subsequent_indent=indent):
            self.say((line, style))

    def note(self, text: str) -> None:
        """Print a note to standard error."""
        if self.quiet:
            return
        self.err.print(Text.assemble(("note: ", "yellow"), " ".join(text.split())), soft_wrap=True)

    def error(self, text: str) -> None:
        """Print an error to standard error, in one line."""
        self.err.print(Text.assemble(("error: ", "bold red"), " ".join(text.split())), soft_wrap=True)

    def status(self, text: str) -> AbstractContextManager[object]:
        """Show in a terminal that something is running."""
        return nullcontext() if self.quiet else self.err.status(text)

    def result(self, value: Mapping[str, Any]) -> None:
        """Print a JSON object to standard output, if JSON is wanted."""
        if self.json:
            print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str))

    def paths(self, paths: Mapping[str, str]) -> None:
        """Print the paths of files, by what they hold."""
        width = max(map(len, paths), default=0)
        for name, path in paths.items():
            self.say((f"{name:<{width}}  ", "dim"), path)

    def frame(self, frame: Any, rows: int = 5) -> None:
        """Print the first rows of a frame of pandas."""
        shown = frame.head(rows).to_string(float_format="{:.4g}".format, max_cols=8)
        header, *lines = shown.splitlines()
        self.say((header, "dim"))
        for line in lines:
            self.say(line)
        if len(frame) > rows:
            self.say((f"... {len(frame) - rows} more rows", "dim"))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print aligned columns; a terminal cuts off long lines."""
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for i, line in enumerate([header, *rows]):
            first, *others = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            rest = "  ".join(["", *others]).rstrip()
            text = Text.assemble((first, "dim" if i == 0 else "bold"), (rest, "dim" if i == 0 else ""))
            if self.out.is_terminal:
                text.truncate(self.out.width, overflow="ellipsis")
            self.out.print(text, soft_wrap=True)

    def report(self, report: Report, *, full: bool = True) -> None:
        """Print a report, decision first; without ``full``, checks that passed have no explanation."""
        color = COLORS[report.verdict]
        self.say((f"{report.verdict.upper():<10}", f"bold {color}"), (report.title, "bold"))
        self.paragraph(report.decision, indent=INDENT, style="bold")
        for text in (report.summary, *report.score_lines):
            self.paragraph(text, indent=INDENT)
        for step, _ in report.next_steps:
            self.paragraph(f"Next: {step}", indent=INDENT, style="cyan")
        self.say()
        for check in report.checks:
            self._check(check, explained=full or check.verdict != "pass")

    def _check(self, check: Check, *, explained: bool) -> None:
        value, _, se = check.measured.partition(" ± ")
        spread = f"± {se}" if se else ""
        color = COLORS[check.verdict]
        numbers = f"{value:>10} {spread:<12}{check.unit + ' ' if check.unit and value else ''}{check.limit}"
        self.say((f"{check.verdict:<10}", color), f"{check.name + ' ':<30}{numbers}".rstrip())
        if explained:
            self.paragraph(check.reading, indent=INDENT, style="dim" if check.verdict == "pass" else "")
