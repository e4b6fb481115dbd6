"""Errors and argument checks; a message states the expected value, the given one and a remedy."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable
from typing import SupportsFloat


class StorageError(ValueError):
    """A file cannot be read or trusted: it is truncated, altered, newer, or not a file of deepprob."""


class MissingValueError(ValueError):
    """Data have missing values (NaN) where none are allowed."""


def shown(value: object) -> str:
    """Format a value for a message: its ``repr``, or its type and shape if the ``repr`` is long.

    Args:
        value: The user's value.

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


def shown_number(value: SupportsFloat) -> str:
    """Format a number with few digits, but never a fraction as a whole number.

    Args:
        value: The number.

    Examples:
        >>> shown_number(0.5), shown_number(2.0000001)
        ('0.5', '2.0000001')
    """
    number = float(value)
    text = f"{number:g}"
    return repr(number) if math.isfinite(number) and float(text).is_integer() > number.is_integer() else text


def counted(count: int, noun: str) -> str:
    """A number and its noun, singular or plural.

    Args:
        count: The number.
        noun: The noun in the singular.

    Examples:
        >>> counted(1, "row"), counted(3, "row")
        ('1 row', '3 rows')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def unknown(kind: str, name: object, choices: Iterable[str]) -> ValueError:
    """The error for an unknown name; it suggests the nearest known name.

    Args:
        kind: The kind of the name in the message ("likelihood", "model").
        name: The user's value.
        choices: The known names.

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
    """Check that an argument is a whole number.

    NumPy integers and integer tensors with one element are accepted. A bool is refused, because it is a likely mistake.

    Args:
        name: Name of the argument ("latent_dim").
        value: The user's value.
        least: The smallest valid number.

    Returns:
        The value as an ``int``.

    Raises:
        ValueError: If the value is not a whole number, or smaller than ``least``.

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


def positive(name: str, value: object, *, zero: bool = False) -> float:
    """Check that an argument is a positive, finite number.

    Args:
        name: Name of the argument ("prior_scale").
        value: The user's value.
        zero: Whether 0 is allowed.

    Returns:
        The value as a ``float``.

    Raises:
        ValueError: If the value is not a positive, finite number, or 0 where that is allowed.

    Examples:
        >>> positive("noise", -0.1)
        Traceback (most recent call last):
            ...
        ValueError: noise must be a positive number; got -0.1.
    """
    scalar = isinstance(value, SupportsFloat) and getattr(value, "shape", ()) == () and not _is_bool(value)
    number = float(value) if scalar else math.nan  # type: ignore[arg-type]
    if not (0 < number < math.inf or (zero and number == 0)):
        raise ValueError(f"{name} must be a positive number{' or 0' if zero else ''}; got {shown(value)}.")
    return number


def _is_bool(value: object) -> bool:
    """Whether a value is a bool, or an array or tensor of bools."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
