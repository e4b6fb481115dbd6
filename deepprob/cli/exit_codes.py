"""Exit codes and error messages of the command.

Exit codes: 0, success; 1, success with the verdict fail; 2, an error that the user can fix; 3, a bug in deepprob; 130,
interrupted.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from deepprob.cli.screen import Screen


class Subcommand(TyperCommand):
    """A command whose help shows no type for flags."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types_of_flags(super().get_params(ctx))


class Command(TyperGroup):
    """The command group; it turns every error into one line and an exit code."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types_of_flags(super().get_params(ctx))

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *rest: Any, **extra: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in given
        given = [a for a in given if a != "--debug"]  # accepted at any position
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


def _without_types_of_flags(params: list[Any]) -> list[Any]:
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""  # typer would show <bool>, as if a value could follow
    return params


def _explain(error: Exception, screen: Screen) -> int:
    """Print an error in one line and return the exit code."""
    # Not every version of typer has a public class for errors of the command line itself.
    if message := getattr(error, "format_message", None):
        if text := message():
            where = getattr(getattr(error, "ctx", None), "command_path", "deepprob")
            screen.error(f"{text}{'' if text.endswith(('.', '?')) else '.'} See: {where} --help")
        return 2 if text else 0
    if isinstance(error, typer.Abort):
        screen.error("interrupted.")
        return 130
    if isinstance(error, ValueError | TypeError | OSError | ImportError) or _is_divergence(error):
        screen.error(str(error))
        return 2
    screen.error(f"{type(error).__name__}: {error} (a bug in deepprob; --debug shows the traceback)")
    return 3


def _is_divergence(error: Exception) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    from deepprob.fitting.divergence import DivergenceError  # heavy and rarely needed

    return isinstance(error, DivergenceError)
