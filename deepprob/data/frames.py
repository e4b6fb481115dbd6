"""Frames: tables with named columns, of pandas or of a library with the dataframe interchange protocol."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np


def is_frame(value: object) -> bool:
    """Whether a value is a frame: of pandas, of polars (which has no ``__dataframe__`` from 2.0 on), or with it."""
    libraries = [
        sys.modules[name] for name in ("pandas", "polars") if name in sys.modules
    ]  # else there is no such frame
    return any(isinstance(value, library.DataFrame) for library in libraries) or hasattr(value, "__dataframe__")


def frame_of(frame: Any) -> Any:
    """A frame as one of pandas.

    Args:
        frame: A frame of pandas, of polars, or with the dataframe interchange protocol.
    """
    import pandas as pd

    if isinstance(frame, pd.DataFrame):
        return frame
    if hasattr(frame, "get_column"):  # polars: its interchange needs pyarrow, its columns do not
        return pd.DataFrame({name: frame.get_column(name).to_numpy() for name in frame.columns})
    return pd.api.interchange.from_dataframe(frame)


def row_as_frame(value: Any, columns: Collection[str] = ()) -> Any:
    """A series that is one row of a frame, as a frame; any other value as it is.

    Args:
        value: The value.
        columns: Names of columns, of which such a series has one at least; by default any series is a row.

    Examples:
        >>> import pandas as pd
        >>> row_as_frame(pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}).iloc[1], ["a"])
           a  b
        1  2  y
    """
    pandas = sys.modules.get("pandas")
    if pandas is None or not isinstance(value, pandas.Series):
        return value
    if columns and {str(label) for label in value.index}.isdisjoint(columns):
        return value
    return value.to_frame().T.infer_objects()


def named(frame: Any) -> Any:
    """A frame of pandas that has rows, with its columns named by text.

    Args:
        frame: A frame of pandas, of polars, or with the dataframe interchange protocol.

    Raises:
        ValueError: If it has no rows, or its columns have names of several levels.

    Examples:
        >>> import pandas as pd
        >>> [*named(pd.DataFrame([[1, 2]])).columns]
        ['0', '1']
    """
    frame = frame_of(frame)
    if not len(frame):
        raise ValueError("the frame has no rows; expected at least one. Check how it was read.")
    if (levels := frame.columns.nlevels) > 1:
        raise ValueError(
            f"the columns of the frame have names of {levels} levels, such as {frame.columns[0]!r}. Join the "
            "levels: frame.columns = [' '.join(map(str, name)) for name in frame.columns]."
        )
    return frame.set_axis([str(name) for name in frame.columns], axis=1)


def check_order(values: Any, index: Any, what: str) -> None:
    """Refuse a series or frame whose rows have the labels of an index in another order: by label or by place?

    Args:
        values: The values, of any kind.
        index: The index of the rows; None if it is not known.
        what: The name of the values in the error message.

    Raises:
        ValueError: If the order differs.
    """
    pandas = sys.modules.get("pandas")
    if pandas is None or index is None or not isinstance(values, pandas.Series | pandas.DataFrame):
        return
    own = values.index
    if len(own) == len(index) and not own.equals(index) and {*own} == {*index}:
        raise ValueError(
            f"{what} have the labels of the rows in another order. Put them into the order of the rows, "
            "values.loc[frame.index], or give values.to_numpy() if they are in that order."
        )


def column_names(frame: Any) -> tuple[str, ...]:
    """The names of a frame's columns; none if they only count the columns, or if two are equal."""
    columns = [*frame_of(frame).columns]
    names = tuple(map(str, columns))
    return () if columns == [*range(len(columns))] or len({*names}) < len(names) else names


def arranged(frame: Any, fitted: Sequence[str], label: str) -> Any:
    """The columns of a frame that a fit had, in the fit's order.

    Args:
        frame: The frame; without names it is returned as it is.
        fitted: The names of the fit's columns.
        label: The name of the frame in error messages.

    Raises:
        ValueError: If a column of the fit is missing, or two columns have one name.

    Examples:
        Columns follow their names, and a further one is left out:

        >>> import pandas as pd
        >>> arranged(pd.DataFrame({"b": [1], "note": ["-"], "a": [2]}), ["a", "b"], "x")
           a  b
        0  2  1
    """
    frame = frame_of(frame)
    names = [str(name) for name in frame.columns]
    if names == [str(i) for i in range(len(names))] and {*names}.isdisjoint(fitted):
        return frame
    lacking = [name for name in fitted if name not in names]
    if lacking:
        raise missing_column(label, lacking, [name for name in names if name not in fitted])
    twice = [name for name in fitted if names.count(name) > 1]
    if twice:
        raise ValueError(f"{label} has several columns {twice[0]!r}. Rename or drop all but one.")
    return frame.iloc[:, [names.index(name) for name in fitted]]


def missing_column(label: str, lacking: Sequence[str], names: Sequence[str]) -> ValueError:
    """The error for columns of a fit that a frame lacks; it names the nearest of the frame's columns.

    Args:
        label: The name of the frame.
        lacking: The missing columns.
        names: The columns of the frame that the fit did not have.
    """
    listed = ", ".join(map(repr, lacking[:5])) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
    near = difflib.get_close_matches(lacking[0], names, n=1)
    hint = f" Rename {near[0]!r} if it is {lacking[0]!r}." if near else " Give the columns of the fit, by these names."
    one = len(lacking) == 1
    return ValueError(f"{label} lacks the column{'' if one else 's'} {listed}, which the fit had.{hint}")


class Columns:
    """The names of columns: found in frames while data are read, or known from the fit and imposed on later frames.

    Args:
        fitted: The columns of a fit's arguments, by argument; empty before the fit.

    Attributes:
        found: The columns of the arguments that were frames, by argument.
    """

    def __init__(self, fitted: Mapping[str, Sequence[str]]) -> None:
        self.fitted = fitted
        self.found: dict[str, tuple[str, ...]] = {}

    def read(self, name: str, value: Any) -> Any:
        """The value of an argument: of a frame, the fit's columns in their order; any other value as it is.

        Args:
            name: The argument's name.
            value: Its value.
        """
        if name in self.fitted:
            self.found[name] = tuple(self.fitted[name])  # what has no names of its own is in the order of the fit
            value = row_as_frame(value, self.fitted[name])
            return arranged(value, self.fitted[name], repr(name)) if is_frame(value) else value
        if is_frame(value) and (names := column_names(value)):
            self.found[name] = names
        return value


def array_of(frame: Any, label: str) -> np.ndarray:
    """The numbers of a frame, ``(N, D)``: bool if all columns are, whole if all are, else float64 with NaN for gaps.

    Args:
        frame: A frame of pandas.
        label: The name of the frame in error messages.

    Raises:
        TypeError: If a column does not hold numbers.
    """
    kinds = {name: getattr(dtype, "kind", "O") for name, dtype in frame.dtypes.items()}
    wrong = [str(name) for name, kind in kinds.items() if kind not in "biuf"]
    if wrong:
        raise TypeError(
            f"{label} has columns that are not numbers: {', '.join(wrong)}. Encode them with dp.table(frame, "
            "target=...), or drop them."
        )
    complete = bool(kinds) and not frame.isna().any(axis=None)
    dtype, fill = next(
        (
            (dtype, 0)
            for dtype, known in ((np.int64, "iu"), (np.bool_, "b"))
            if complete and {*kinds.values()} <= {*known}
        ),
        (np.float64, np.nan),
    )
    columns = [frame.iloc[:, i].to_numpy(dtype, na_value=fill) for i in range(frame.shape[1])]
    return np.stack(columns, axis=1) if columns else np.empty((len(frame), 0))
