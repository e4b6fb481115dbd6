"""What went wrong where a program fails: the arguments that were left out, or the rows that it ran on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch

from deepprob.programs.arguments import Arguments, Call
from deepprob.programs.finiteness import first_bad_site
from deepprob.programs.run import Run

FAILURES = (RuntimeError, TypeError, IndexError, ValueError, AttributeError)

_OF_SHAPES_OR_TYPES = re.compile(r"shape|size|dimension|dtype|type|broadcast|expand|mat1|must match", re.IGNORECASE)
_NAMES_TWICE = (
    " Give each statement a name of its own. An AutoGuideList makes the plates of its parts, so that a callable in it "
    "cannot make them again: write the guide as one function, or use AutoNormal there."
)


def explained(error: Exception, run: Run) -> Exception:
    """An error in a program as one sentence about the user's arguments; a sentence of ours stays."""
    reason = (str(error) or type(error).__name__).splitlines()[0]  # Pyro appends the shapes of all sites
    if isinstance(error, ValueError) and reason.endswith("."):
        return ValueError(reason)
    reason = reason.removesuffix(".")
    if absent := left_out(run):
        were, them = ("was", "it") if len(absent) == 1 else ("were", "them")
        return ValueError(
            f"the program cannot run without {', '.join(map(repr, absent))}, which {were} left out: {reason}. Give "
            f"{them} too, by name or in the order {', '.join(run.program._signature().parameters)}."
        )
    if reason.startswith("Expected parameter") and (where := _bad_site(run)).startswith("site"):
        return ValueError(f"the program cannot run on the data: {where}. Check the values that it is computed from.")
    call = run.call or run.program.call
    names = [*(call.names if call else run.program.argument_names), *("argument",) * len(run.batch)]
    kinds = [
        f"{n} {tuple(x.shape[1:])} {str(x.dtype).removeprefix('torch.')}"
        for n, x in zip(names, run.batch, strict=False)
    ]
    remedy = _NAMES_TWICE if reason.startswith("Multiple sample sites named") else ""
    if _OF_SHAPES_OR_TYPES.search(reason):
        remedy = " Check the shapes and types of the data, or the program."
    remedy = _of_containers(run, call) or remedy
    return ValueError(f"the program cannot run on rows of {', '.join(kinds) or 'no data'}: {reason}.{remedy}")


def _parts(value: Any) -> Iterator[tuple[int, Any]]:
    return enumerate(value if isinstance(value, list) else ())


def _of_containers(run: Run, call: Call | None) -> str:
    """What to give instead of a tuple of numbers or a list of lists of unequal length, which have no rows."""
    if call is None:
        return ""
    for name, value in [*zip(run.program._signature().parameters, call.args, strict=False), *call.kwargs.items()]:
        if type(value) is tuple and value and all(isinstance(x, int | float) for x in value):
            return (
                f" {name!r} is a tuple, which the program gets as it is. Give one number per row as a list or an array."
            )
        sizes = {len(x) if isinstance(x, list) else call.lengths.get(f"{name}[{i}]") for i, x in _parts(value)}
        if len(sizes) > 1:
            return (
                f" {name!r} is a list of {len(value)} parts of unequal length, which the program gets as a list. Pad "
                "them to an array, or write Program.of(..., variable_length=True) if they are sequences."
            )
    return ""


@torch.no_grad()
def _bad_site(run: Run) -> str:
    """The first site that is not finite in a run without the checks of distributions, which name none."""
    with pyro.validation_enabled(False):
        return first_bad_site(run)


def left_out(run: Run) -> list[str]:
    """The arguments without a default that were left out to be predicted."""
    given = tuple(x for x in run.batch if x is not None)
    return run.program.missing_arguments(given if run.call is None else Arguments(given, run.call))


@contextmanager
def explaining_left_out(run: Run) -> Iterator[None]:
    """Name the arguments that were left out, where a program fails without them."""
    try:
        yield
    except FAILURES as error:
        if not left_out(run):
            raise
        raise explained(error, run) from error
