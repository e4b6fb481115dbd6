"""How a run of the command ends: an exit code, and one line for an error.

Exit codes: 0, done; 1, done and the verdict is fail; 2, an error that the user can mend; 3, one that we must mend;
130, interrupted.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from deepprob.cli.screen import Screen


class Command(TyperGroup):
    """Ends every run with an exit code, and every error with one line."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *rest: Any, **extra: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in given
        given = [a for a in given if a != "--debug"]  # wherever it stands
        screen = Screen()
        try:
            sys.exit(super().main(given, prog_name, *rest, **extra | {"standalone_mode": False}) or 0)
        except KeyboardInterrupt:
            screen.error("interrupted.")
            sys.exit(130)
        except Exception as error:
            if debug:
                traceback.print_exc()
            sys.exit(_explain(error, screen))


def _explain(error: Exception, screen: Screen) -> int:
    """Say what went wrong in one line; the exit code."""
    # The errors of the command line itself have no public class in all versions of typer.
    if message := getattr(error, "format_message", None):
        if text := message():
            where = getattr(getattr(error, "ctx", None), "command_path", "deepprob")
            screen.error(f"{text}{'' if text.endswith(('.', '?')) else '.'} See: {where} --help")
        return 2 if text else 0
    if isinstance(error, typer.Abort):
        screen.error("interrupted.")
        return 130
    if isinstance(error, ValueError | TypeError | OSError) or _is_divergence(error):
        screen.error(str(error))
        return 2
    screen.error(f"{type(error).__name__}: {error} (a defect of deepprob; --debug shows where)")
    return 3


def _is_divergence(error: Exception) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    from deepprob.fitting.divergence import DivergenceError  # heavy, and seldom needed

    return isinstance(error, DivergenceError)
