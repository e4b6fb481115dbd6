"""Routines by the names that the command accepts, and what they take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deepprob.errors import unknown


def routines() -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """All routines: a header and rows."""
    from deepprob.inference import ROUTINES

    rows = [(name, (inspect.getdoc(routine) or "").partition("\n")[0]) for name, routine in ROUTINES.items()]
    return ("routine", "description"), rows


def objectives() -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """All objectives of ``--set objective=NAME``: a header and rows."""
    from deepprob.fitting.objectives import OBJECTIVES

    paths = {"stl": ", with gradients along the paths of the draws", "dreg": ", with doubly reparameterized gradients"}
    first = {name: (inspect.getdoc(type(made)) or "").partition("\n")[0] for name, made in OBJECTIVES.items()}
    rows = [(name, text.removesuffix(".") + paths.get(name, "") + ".") for name, text in first.items()]
    return ("objective", "description"), rows


def routine_named(name: str) -> Callable[..., Any]:
    """The routine with a given name.

    Raises:
        ValueError: If the name is unknown.
    """
    from deepprob.inference import ROUTINES

    if name not in ROUTINES:
        raise unknown("routine", name, ROUTINES)
    return ROUTINES[name]


def accepted_by(routine: Callable[..., Any], given: Mapping[str, Any], optional: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords for a routine.

    Args:
        routine: The routine.
        given: What the user gave, by name; None for what the user left out.
        optional: What the command adds where the routine takes it.

    Raises:
        ValueError: If the routine does not take what the user gave.
    """
    known = keywords_of(routine)
    for name, value in given.items():
        if value is not None and name not in known:
            option = "learning-rate" if name == "optimizer" else name.replace("_", "-")
            raise ValueError(f"routine {routine.__name__!r} takes no --{option}. It takes: {', '.join(sorted(known))}.")
    added = {name: value for name, value in optional.items() if name in known}
    return added | {name: value for name, value in given.items() if value is not None}


def keywords_of(routine: Callable[..., Any]) -> list[str]:
    """The names of a routine's arguments beside program and data."""
    return [*inspect.signature(routine).parameters][2:]
