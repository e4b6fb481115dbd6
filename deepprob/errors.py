"""Errors that say what was expected, what came, and one thing to do."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable
from typing import SupportsFloat


class StorageError(ValueError):
    """A file that cannot be trusted or read: truncated, altered, newer, or not ours."""


def shown(value: object) -> str:
    """A value as a message prints it: its ``repr``, or type and shape if that is long.

    Args:
        value: What the user wrote.

    Examples:
        >>> shown("fresh")
        "'fresh'"
        >>> import torch
        >>> shown(torch.zeros(300))
        'a Tensor of shape (300,)'
    """
    text = repr(value)
    if len(text) <= 100:
        return text
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {tuple(shape)}" if isinstance(shape, tuple) else "")


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
    near = difflib.get_close_matches(name, known, n=1) if isinstance(name, str) else []
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {shown(name)}.{hint} Choose from: {', '.join(known)}.")


def whole(name: str, value: object, least: int = 1) -> int:
    """A whole number that a user gave, checked.

    Integers of NumPy and tensors of one whole number are taken too. A bool is refused: as a number it is a slip.

    Args:
        name: What the number is called, in the user's words ("latent_dim").
        value: What the user wrote.
        least: The smallest value that makes sense.

    Returns:
        The value as an ``int``.

    Raises:
        ValueError: If it is not a whole number, or smaller.

    Examples:
        >>> whole("epochs", 3)
        3
        >>> whole("epochs", 2.5)
        Traceback (most recent call last):
            ...
        ValueError: epochs must be a whole number of at least 1; got 2.5.
    """
    try:
        number = None if _is_bool(value) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}; got {shown(value)}.")
    return number


def positive(name: str, value: object) -> float:
    """A positive, finite number that a user gave, checked.

    Args:
        name: What the number is called, in the user's words ("prior_scale").
        value: What the user wrote.

    Returns:
        The value as a ``float``.

    Raises:
        ValueError: If it is no number, not above zero, or infinite.

    Examples:
        >>> positive("noise", -0.1)
        Traceback (most recent call last):
            ...
        ValueError: noise must be a positive number; got -0.1.
    """
    scalar = isinstance(value, SupportsFloat) and getattr(value, "shape", ()) == () and not _is_bool(value)
    number = float(value) if scalar else math.nan  # type: ignore[arg-type]
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a positive number; got {shown(value)}.")
    return number


def _is_bool(value: object) -> bool:
    """Whether it is a truth value, of Python's or in an array's or a tensor's type."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
