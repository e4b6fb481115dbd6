"""Arguments of `table` that name columns: one name or several, text or whole numbers, and values by column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

from deepprob.errors import shown


def column_list(given: Any) -> tuple[str, ...]:
    """Names of columns as text.

    Args:
        given: One name or several.

    Examples:
        >>> column_list("size"), column_list(0), column_list(["size", 1])
        (('size',), ('0',), ('size', '1'))
    """
    return tuple(map(str, given)) if isinstance(given, Iterable) and not isinstance(given, str) else (str(given),)


def target_names(given: Any) -> tuple[str, ...]:
    """The names of the targets; none for None.

    Args:
        given: One name, several, or None.

    Raises:
        TypeError: If they are values, in a series or an array.
        ValueError: If a name comes twice, as in a list of values.
    """
    import pandas as pd

    if given is None:
        return ()
    remedy = "Make the values a column, and name it: frame.assign(y=values), target='y'."
    if isinstance(given, Iterable) and hasattr(given, "shape") and not isinstance(given, pd.Index):
        raise TypeError(f"target must be the name of a column; got values in a {type(given).__name__}. {remedy}")
    names = column_list(given)
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"target must name every column once; got {twice[0]!r} several times. {remedy}")
    return names


def levels_by_column(given: Any) -> dict[str, tuple[Any, ...]]:
    """The argument ``ordinal``: levels in ascending order, by column.

    Args:
        given: The argument.

    Raises:
        TypeError: If it is no dict, or its values have no order.
    """
    example = "ordinal={'size': ['small', 'large']}"
    found = _by_column("ordinal", given, example)
    for name, levels in found.items():
        if isinstance(levels, str | Set | Mapping) or not isinstance(levels, Iterable):
            raise TypeError(
                f"ordinal must have the levels of {name!r} in a list, in ascending order; got {shown(levels)}. Write "
                f"{example}."
            )
    return {name: tuple(levels) for name, levels in found.items()}


def cycles_by_column(given: Any) -> dict[str, tuple[str, ...]]:
    """The argument ``cyclic``: cycles of dates, by column.

    Args:
        given: The argument.

    Raises:
        TypeError: If it is no dict.
    """
    return {name: column_list(cycles) for name, cycles in _by_column("cyclic", given, "cyclic={'time': 'day'}").items()}


def _by_column(argument: str, given: Any, example: str) -> dict[str, Any]:
    if not isinstance(given, Mapping | None):
        raise TypeError(f"{argument} must be a dict by column; got {shown(given)}. Write {example}.")
    return {str(name): values for name, values in (given or {}).items()}
