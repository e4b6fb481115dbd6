"""Names of rows and columns that a user's data bring along, for the coordinates of an export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepprob.data.frames import is_frame


@dataclass(frozen=True)
class Labels:
    """Names of rows and columns.

    Attributes:
        rows: A name for every row; empty if the data have none.
        columns: Names of the columns of an argument that is a frame, by argument.
    """

    rows: Sequence[Any] = ()
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)


def labels_of(data: Sequence[Any], names: Sequence[str], read: Mapping[str, Sequence[str]] | None = None) -> Labels:
    """The labels of frames and series among the arguments of a query.

    Args:
        data: The arguments, as the user gave them.
        names: Names of the program's arguments, in their order.
        read: The columns of frames in the order in which they were read, by argument.

    Examples:
        The index of a frame names the rows, unless it only counts them:

        >>> import pandas as pd
        >>> table = pd.DataFrame({"age": [31, 45], "height": [1.8, 1.7]}, index=["Ann", "Bob"])
        >>> labels_of([table, pd.Series([1, 0])], ["x", "y"])
        Labels(rows=['Ann', 'Bob'], columns={'x': ['age', 'height']})
    """
    found = dict(_arguments(data, names))
    columns = {
        name: list((read or {}).get(name) or map(str, value.columns))
        for name, value in found.items()
        if is_frame(value)
    }
    indices = [value.index for value in found.values() if _is_indexed(value)]
    return Labels(next(([*index] for index in indices if not _only_counts(index)), []), columns)


def _arguments(data: Sequence[Any], names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    if len(data) == 1 and isinstance(data[0], Mapping):
        yield from data[0].items()
        return
    if len(data) == 1 and isinstance(data[0], tuple):
        data = data[0]
    yield from zip(names, data, strict=False)


def _is_indexed(value: Any) -> bool:
    return is_frame(value) or (type(value).__module__.partition(".")[0] == "pandas" and hasattr(value, "index"))


def _only_counts(index: Any) -> bool:
    return [*index] == [*range(len(index))] or len({*index}) < len(index)
