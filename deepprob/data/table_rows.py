"""Rows of an encoded table: the kinds of their columns, and the way back to a frame in the user's units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def unlike(word: str, taken: Sequence[str]) -> str:
    """A word, followed by ``_`` as often as it takes to be none of some others.

    Args:
        word: The word.
        taken: The others.

    Examples:
        >>> unlike("rare", ["red"]), unlike("rare", ["red", "rare"])
        ('rare', 'rare_')
    """
    while word in taken:
        word += "_"
    return word


class EncodedColumn(Protocol):
    """The record of how one column became features.

    Attributes:
        name: The column's name.
        kind: ``"numeric"``, ``"boolean"``, ``"categorical"``, ``"ordinal"`` or ``"date"``.
        center: Mean of the training rows; of dates in days since 1970.
        scale: Standard deviation of the training rows; 0 if the value itself makes no feature.
        fill: The value of a gap.
        levels: The levels, as text.
        rare: The levels that share one feature.
        gaps: Whether the last feature marks gaps.
        names: The names of the features.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def center(self) -> float: ...
    @property
    def scale(self) -> float: ...
    @property
    def fill(self) -> float: ...
    @property
    def levels(self) -> Sequence[str]: ...
    @property
    def rare(self) -> Sequence[str]: ...
    @property
    def gaps(self) -> bool: ...
    @property
    def names(self) -> Sequence[str]: ...


def shown_levels(column: EncodedColumn) -> list[str]:
    """The levels of a column in the order of its features; all rare ones share the last name.

    Args:
        column: The record of the column.
    """
    return [*column.levels, *([unlike("rare", column.levels)] if column.rare else [])]


def column_kinds(columns: Sequence[EncodedColumn]) -> list[tuple[Any, ...]]:
    """The kinds of the columns of an encoded table, for a likelihood of mixed columns.

    Numbers, dates and ordinal levels, which are standardized, are ``"real"``; booleans are ``"binary"``; a category is
    a block of ``"categories"``; and the indicator of a column's gaps is ``"missing"``, also for the sine and cosine of
    a date, so that no imputed value is taken for an observation.

    Args:
        columns: The records of the columns of the table, in order.

    Examples:
        >>> from types import SimpleNamespace
        >>> age = SimpleNamespace(name="age", kind="numeric", scale=8.0, gaps=True, names=("age", "age=missing"))
        >>> column_kinds([age])
        [('real', 'age'), ('missing', 'age')]
    """
    found: list[tuple[Any, ...]] = []
    for column in columns:
        own = [*column.names]
        gaps = own.pop() if column.gaps else None
        if column.kind == "categorical" and column.scale:
            found.append(("categories", column.name, shown_levels(column)))
            own = own[len(shown_levels(column)) :]
        elif column.kind == "boolean" and column.scale:
            found.append(("binary", own.pop(0)))
        found += [("real", name) for name in own]
        if gaps is not None:
            waves = own[1:] if column.kind == "date" else []
            marks = ("missing", column.name, waves) if waves else ("missing", column.name)
            found.append(marks if column.scale else ("binary", gaps))
    return found


def decode_rows(columns: Sequence[EncodedColumn], x: Any) -> Any:
    """Rows of an encoded table as a frame in the user's columns and units.

    The inverse of the encoding, up to what it leaves out: dates come back to the microsecond in UTC, rare levels share
    one name, an ordinal number becomes the nearest level, and of a block of categories the largest entry counts. A
    value is missing where its number is NaN or its indicator of gaps is above one half.

    Args:
        columns: The records of the columns of the table, in order.
        x: Rows, shape ``(N, D)``, such as draws or means of a model.

    Returns:
        A pandas frame.

    Raises:
        ValueError: If rows have another number of columns than the table.

    Examples:
        >>> from types import SimpleNamespace
        >>> record = dict(kind="numeric", center=40.0, scale=10.0, levels=(), gaps=True, names=("age", "age=missing"))
        >>> decode_rows([SimpleNamespace(name="age", **record)], [[-1.0, 0.0], [0.5, 1.0]])
            age
        0  30.0
        1   NaN
    """
    import pandas as pd

    values = _array(x)
    width = sum(len(column.names) for column in columns)
    if values.ndim != 2 or values.shape[1] != width:
        raise ValueError(
            f"rows of this table must have shape (N, {width}); got {tuple(values.shape)}. Give one draw of the rows: "
            "prediction.draws[0]."
        )
    found, start = {}, 0
    for column in columns:
        stop = start + len(column.names)
        found[column.name] = _decoded(column, values[:, start:stop])
        start = stop
    return pd.DataFrame(found)


def column_values(column: EncodedColumn, number: Any) -> Any:
    """Standardized numbers of a column in its own units: a date, the nearest level of an order, or a number.

    Args:
        column: The record of the column.
        number: The numbers, NaN where there is no value; shape ``(N,)``.

    Examples:
        >>> from types import SimpleNamespace
        >>> size = SimpleNamespace(kind="ordinal", center=1.0, scale=0.5, levels=("S", "M", "L"), rare=())
        >>> [*column_values(size, [0.0, -1.8])]
        ['M', 'S']
    """
    return _in_words(column, _array(number) * column.scale + column.center)


def units_of(column: EncodedColumn, sd: Any) -> Array:
    """Standard deviations of standardized numbers in the units of a column: days for dates, places for levels.

    Args:
        column: The record of the column.
        sd: The standard deviations.
    """
    return _array(sd) * column.scale


def _array(x: Any) -> Array:
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=np.float64)


def _decoded(column: EncodedColumn, x: Array) -> Any:
    """The values of one column, from its features."""
    gap = x[:, -1] > 0.5 if column.gaps else np.zeros(len(x), dtype=bool)
    if not column.scale:
        number = np.full(len(x), column.fill)
    elif column.kind == "categorical":
        block = x[:, : len(shown_levels(column))]
        number = np.nan_to_num(block, nan=-1.0).argmax(1).astype(np.float64)
        gap = gap | np.isnan(block).any(1) | (block == 0).all(1)
    else:
        number = x[:, 0] * column.scale + column.center
    return _in_words(column, np.where(gap, np.nan, number))


def _in_words(column: EncodedColumn, number: Array) -> Any:
    """Numbers of a column as its own values; NaN is a gap."""
    import pandas as pd

    gap = np.isnan(number)
    if column.kind == "date":
        since = pd.to_timedelta(pd.Series(number), unit="D")
        return (pd.Timestamp(0, tz="UTC") + since).dt.round("us")
    if column.kind == "boolean":
        return pd.Series(number > 0.5, dtype=object).where(~gap, None) if gap.any() else number > 0.5
    if column.levels:
        names = np.array(shown_levels(column), dtype=object)
        place = np.nan_to_num(number).round().clip(0, len(names) - 1).astype(int)
        return pd.Series(names[place], dtype=object).where(~gap, None)
    return number
