"""Sequences: series of unequal length with the ids of their rows, read from a frame in long form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepprob.data.frames import frame_of, is_frame, missing_column
from deepprob.data.intake import tensor_of
from deepprob.data.split import Rows, Split
from deepprob.data.time_steps import Steps, steps_of
from deepprob.errors import counted, unknown


class Sequences(Split):
    """Padded sequences with their lengths, and the names by which a frame knows them.

    The fields are ``x``, ``(N, T_max, D)``, and ``lengths``, ``(N,)``; with ``spacing="any"`` also ``elapsed``.

    Attributes:
        ids: The id of each row, an array of length N.
        columns: Names of the D features.
        times: For each row the times of its steps.

    Examples:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"who": ["b", "a", "b"], "day": [2, 1, 1], "mood": [4.0, 7.0, 3.0]})
        >>> data = sequences(frame, id="who", time="day")
        >>> data.ids.tolist(), data["lengths"].tolist(), data["x"][1].flatten().tolist()
        (['b', 'a'], [2, 1], [7.0, 0.0])
        >>> data.to_frame(2 * data["x"]).loc["b"]
             mood
        day
        1     6.0
        2     8.0
    """

    __slots__ = ("_id", "_step", "_time", "columns", "ids", "times")

    def __init__(
        self,
        fields: dict[str, Tensor],
        *,
        ids: NDArray[Any],
        times: Sequence[NDArray[Any]],
        columns: Sequence[str],
        names: tuple[str, str],
        step: Any = None,
    ) -> None:
        super().__init__(fields)
        self.ids, self.times, self.columns = ids, list(times), list(columns)
        (self._id, self._time), self._step = names, step

    def _like(self, fields: Split, index: Any = slice(None)) -> Sequences:
        chosen = np.arange(len(self.ids))[index]
        return Sequences(
            dict(zip(fields.names, fields.tensors, strict=True)),
            ids=self.ids[chosen],
            times=[self.times[i] for i in chosen],
            columns=self.columns,
            names=(self._id, self._time),
            step=self._step,
        )

    def check_features(self, fitted: Sequence[str]) -> None:
        """Refuse sequences with other features than a fit, or in another order, in which predictions would come back.

        Args:
            fitted: The names of the fit's features.

        Raises:
            ValueError: If there are.
        """
        names = [str(name) for name in self.columns]
        if lacking := [name for name in fitted if name not in names]:
            raise missing_column("the frame of the sequences", lacking, [name for name in names if name not in fitted])
        if names != [*fitted]:
            raise ValueError(
                f"the sequences have the features {', '.join(names)}; the fit had {', '.join(fitted)}, in this order. "
                f"Read the frame with columns=[{', '.join(map(repr, fitted))}]."
            )

    def rows(self, index: Rows) -> Sequences:
        """The sequences at ``index``, with their ids; see `Split.rows`."""
        plain = index if isinstance(index, slice) else torch.atleast_1d(torch.as_tensor(index)).cpu().numpy()
        return self._like(super().rows(index), plain)

    def to(self, device: torch.device | str) -> Sequences:
        """The same sequences on another device."""
        return self._like(super().to(device))

    def to_frame(self, values: Any, *, ahead: bool = False) -> Any:
        """Values of sequences as a frame in long form, indexed by id and time.

        Args:
            values: One array for all steps, ``(N, T, D)`` or ``(N, T)``, such as a prediction's ``mean``.
            ahead: Whether they are those of the steps after the end of each row, as of a forecast.

        Raises:
            ValueError: If there is not a row of values for every sequence and a column for every feature, or forecasts
                have no times, because the steps of the rows are not equal.
        """
        import pandas as pd

        found = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
        found = found[..., None] if found.ndim == 2 else found
        if found.ndim != 3 or len(found) != len(self) or found.shape[2] != len(self.columns):
            raise ValueError(
                f"values must have shape ({len(self)}, steps, {len(self.columns)}), for "
                f"{counted(len(self), 'sequence')} of {', '.join(self.columns)}; got {found.shape}. Give a prediction "
                "of these rows."
            )
        if ahead and self._step is None:
            raise ValueError(
                "the times of a forecast are unknown, because the steps of these rows are not equal. Read them with "
                "spacing='equal'."
            )
        parts = []
        for name, times, row in zip(self.ids, self.times, found, strict=True):
            if ahead:
                times = np.asarray([times[-1] + k * self._step for k in range(1, len(row) + 1)])
            index = pd.MultiIndex.from_arrays([[name] * len(times), times], names=[self._id, self._time])
            parts.append(pd.DataFrame(row[: len(times)], index=index, columns=self.columns))
        return pd.concat(parts)


def sequences(
    frame: Any,
    *,
    id: str,
    time: str,
    columns: Sequence[str] | None = None,
    missing: str = "refuse",
    spacing: str = "equal",
) -> Sequences:
    """Read a frame in long form, one line per time step, as sequences.

    Lines are sorted by time within each id; ids keep their order. Times are numbers, dates or periods. With
    ``spacing="equal"`` all steps are equally long: hours, days, business days, months, or one number.

    Args:
        frame: A frame of pandas or polars.
        id: The column that tells which lines are one sequence.
        time: The column of times.
        columns: The columns of features; None for all others.
        missing: ``"refuse"`` for a frame without missing values and left-out times; with ``"allow"`` both become NaN,
            which a program must mask, as the deep Markov model does.
        spacing: ``"equal"``; or ``"any"`` for steps of any length, which become the field ``elapsed``, ``(N, T_max)``:
            the time since the step before, 0 at the first one, in the units of ``time``, of dates in days.

    Returns:
        The `Sequences`: fields ``x`` and ``lengths``, with ``ids``, and `Sequences.to_frame` for predictions.

    Raises:
        TypeError: If ``frame`` is not a frame, times are neither numbers nor dates, or features are not numbers.
        ValueError: If a column is unknown, an id or a time is missing, an id has a time twice, times are not equally
            spaced, or values are missing and not allowed.

    Examples:
        A day that was left out is a step without a value:

        >>> import pandas as pd
        >>> frame = pd.DataFrame({"who": "a", "day": pd.to_datetime(["2024-01-01", "2024-01-03"]), "mood": [4.0, 7.0]})
        >>> frame.loc[2] = ["b", pd.Timestamp("2024-01-01"), 5.0]
        >>> frame.loc[3] = ["b", pd.Timestamp("2024-01-02"), 6.0]
        >>> data = sequences(frame, id="who", time="day", missing="allow")
        >>> data["x"][0].flatten().tolist(), data["lengths"].tolist()
        ([4.0, nan, 7.0], [3, 2])
    """
    for name, value, known in (("missing", missing, ("refuse", "allow")), ("spacing", spacing, ("equal", "any"))):
        if value not in known:
            raise unknown(name, value, known)
    frame = frame_of(frame) if is_frame(frame) else frame
    features = _checked_columns(frame, id, time, columns)
    codes, ids = _codes(frame, id)
    steps = steps_of(frame[time], time, codes, ids, equal=spacing == "equal")
    if missing == "refuse":
        _check_complete(frame, features, steps, codes, ids, time)
    values = tensor_of(frame[features], "the frame", missing=True)
    x = _placed(values, steps, codes, len(ids))
    lengths = torch.as_tensor(steps.lengths)
    fields = {"x": x, "lengths": lengths}
    if spacing == "any":
        fields["elapsed"] = _placed(torch.as_tensor(steps.elapsed), steps, codes, len(ids)).to(
            torch.get_default_dtype()
        )
    return Sequences(fields, ids=ids, times=steps.times, columns=features, names=(id, time), step=steps.step)


def _placed(values: Tensor, steps: Steps, codes: NDArray[np.intp], rows: int) -> Tensor:
    """Values by line as ``(N, T_max, ...)``: zero beyond the end of a row, NaN at steps without a line."""
    lengths = torch.as_tensor(steps.lengths)
    gaps = bool(lengths.sum() > len(values))
    values = values.to(torch.get_default_dtype()) if gaps else values
    x = torch.zeros(rows, int(lengths.max()), *values.shape[1:], dtype=values.dtype)
    if gaps:
        x[torch.arange(x.shape[1]) < lengths.unsqueeze(-1)] = torch.nan
    x[torch.as_tensor(codes), torch.as_tensor(steps.positions)] = values
    return x


def _checked_columns(frame: Any, id: str, time: str, columns: Sequence[str] | None) -> list[str]:
    """The columns of features."""
    if not is_frame(frame):
        raise TypeError(
            f"sequences reads a pandas frame, one line per time step; got {type(frame).__name__}. Pass arrays as they "
            "are: a list of (T, D) arrays, or (x, lengths)."
        )
    known = [str(name) for name in frame.columns]
    if isinstance(columns, str):
        raise TypeError(f"columns must be a list of names; got {columns!r}. Write columns=[{columns!r}].")
    for name in (id, time, *(columns or ())):
        if name not in frame.columns:
            raise unknown("column", name, known)
    if not len(frame):
        raise ValueError("the frame is empty; expected one line per time step. Pass a frame with lines.")
    features = [name for name in frame.columns if name not in (id, time)] if columns is None else list(columns)
    if not features:
        raise ValueError(f"the frame has no columns besides {id!r} and {time!r}. Add the values of the sequences.")
    for name in (id, time):
        if (line := _first(frame[name].isna())) is not None:
            raise ValueError(f"column {name!r} has no value in line {line}. Drop the line or fill it in.")
    return features


def _codes(frame: Any, id: str) -> tuple[NDArray[np.intp], NDArray[Any]]:
    """The number of each line's sequence, and the ids, in the order of the frame."""
    import pandas as pd

    codes, ids = pd.factorize(frame[id])
    return codes, np.asarray(ids)


def _check_complete(
    frame: Any, features: Sequence[str], steps: Steps, codes: NDArray[np.intp], ids: NDArray[Any], time: str
) -> None:
    for name in features:
        if (line := _first(frame[name].isna())) is not None:
            raise ValueError(
                f"column {name!r} has no value in line {line} (id {ids[codes[line]]!r}, {time} "
                f"{frame[time].iloc[line]}). Fill it in, or write missing='allow' for a program that masks it."
            )
    for row, (times, length) in enumerate(zip(steps.times, steps.lengths, strict=True)):
        present = np.isin(np.arange(length), steps.positions[codes == row])
        if not present.all():
            raise ValueError(
                f"id {ids[row]!r} has no line for {time} {times[int((~present).argmax())]}, one of "
                f"{counted(int((~present).sum()), 'step')} left out of {length}. Add the lines, or write "
                "missing='allow' for a program that masks missing values."
            )


def _first(wrong: Any) -> int | None:
    return int(np.asarray(wrong).argmax()) if bool(wrong.any()) else None
