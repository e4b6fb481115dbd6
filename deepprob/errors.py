"""Errors that say what was expected, what came, and one thing to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class StorageError(ValueError):
    """A file that cannot be trusted or read: truncated, altered, newer, or not ours."""


def unknown(kind: str, name: object, choices: Iterable[str]) -> ValueError:
    """The error for a name that is not among the known ones, with the nearest one suggested.

    Args:
        kind: What is being named, in the user's words ("likelihood", "model").
        name: What the user wrote.
        choices: The names that exist.

    Returns:
        A ``ValueError`` to raise.

    Examples:
        >>> print(unknown("likelihood", "bernouli", ["normal", "bernoulli"]))
        unknown likelihood 'bernouli'. Did you mean 'bernoulli'? Choose from: bernoulli, normal.
    """
    known = sorted(choices)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {name!r}.{hint} Choose from: {', '.join(known)}.")


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number that is large enough.

    Args:
        name: What the user calls it.
        value: What the user wrote.
        least: The smallest that is allowed.

    Raises:
        ValueError: If it is no whole number (True and False are none), or too small.

    Examples:
        >>> whole("draws", 3)
        3
        >>> whole("draws", 0)
        Traceback (most recent call last):
        ...
        ValueError: draws must be a whole number of at least 1; got 0.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or (number := int(value)) < least:
        raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}.")
    return number
