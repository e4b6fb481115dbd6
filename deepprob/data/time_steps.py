"""The steps of time series: the grid on which the times of all lines lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-3  # of a step, by which times such as 0.1, 0.2, 0.3 may miss their grid
_DAY = 86_400e9  # nanoseconds

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Steps:
    """The place of every line of a frame in its sequence.

    Attributes:
        positions: The step of each line, from 0.
        lengths: Number of steps of each sequence.
        times: The times of the steps of each sequence.
        elapsed: The time of each line since the line before, 0 for the first one; of dates in days.
        step: The time from one step to the next, to be added to a time; None if steps are not equal.
    """

    positions: NDArray[np.int64]
    lengths: NDArray[np.int64]
    times: list[NDArray[Any]]
    elapsed: Floats
    step: Any


@dataclass(frozen=True)
class _Clock:
    """A way to number times: one number per line, and the step of length one."""

    numbers: Floats
    unit: Any


def steps_of(times: Any, name: str, codes: NDArray[np.intp], ids: NDArray[Any], *, equal: bool) -> Steps:
    """The steps of some sequences.

    Dates are numbered by their distance, by months if all fall on one day of the month, and by business days if none
    falls on a weekend. The numbering with the fewest left-out steps is taken.

    Args:
        times: A pandas series of times, one per line.
        name: Its name, for messages.
        codes: The number of each line's sequence.
        ids: The id of each sequence.
        equal: Whether all steps must be equally long.

    Raises:
        TypeError: If times are neither numbers nor dates.
        ValueError: If a sequence has a time twice, or steps are not equally long.
    """
    clocks = [*_clocks(times, name)]
    numbers = clocks[0].numbers
    order = np.lexsort([numbers, codes])
    same = codes[order][1:] == codes[order][:-1]
    gaps = np.diff(numbers[order])[same]
    if (gaps == 0).any():
        at = np.flatnonzero(same)[int((gaps == 0).argmax())]
        first, second = sorted(order[at : at + 2].tolist())
        raise ValueError(
            f"id {ids[codes[first]]!r} has two lines for {name} {times.iloc[first]}, lines {first} and {second}. Keep "
            "one of them, or take their mean by groupby."
        )
    since = np.zeros(len(numbers))
    since[order[1:][same]] = gaps / (_DAY if times.dtype.kind == "M" else 1.0)
    if not equal:
        positions = _since_start(np.ones(len(numbers)), order, same)
        return _steps(times, codes, positions, since, None)
    found: list[tuple[int, NDArray[np.int64], Any]] = []
    for clock in clocks:
        diffs = np.diff(clock.numbers[order])[same]
        shortest = diffs.min() if len(diffs) else 1.0
        if shortest <= 0:
            continue
        counts = diffs / shortest
        if (np.abs(counts - counts.round()) <= _ROUNDING).all():
            each = np.ones(len(numbers))
            each[order[1:][same]] = counts.round()
            found.append((int(counts.round().sum()), _since_start(each, order, same), _times(clock.unit, shortest)))
    if not found:
        ratio = gaps / gaps.min()
        at = int(np.abs(ratio - ratio.round()).argmax())
        line = order[1:][same][at]
        raise ValueError(
            f"{name} must have equal steps; got one of {_shown(times, gaps.min())} and, up to line {line} of id "
            f"{ids[codes[line]]!r}, one of {_shown(times, gaps[at])}. Resample the series, or write spacing='any', "
            "which gives the time between steps as a field."
        )
    _, positions, step = min(found, key=lambda each: each[0])
    return _steps(times, codes, positions, since, step)


def _steps(times: Any, codes: NDArray[np.intp], positions: NDArray[np.int64], since: Floats, step: Any) -> Steps:
    rows = int(codes.max()) + 1
    lengths = np.zeros(rows, dtype=np.int64)
    np.maximum.at(lengths, codes, positions + 1)
    by_row: list[NDArray[Any]] = []
    for row, length in enumerate(lengths.tolist()):
        lines = np.flatnonzero(codes == row)
        lines = lines[positions[lines].argsort()]
        known = times.iloc[lines].to_numpy() if times.dtype.kind in "iuf" else np.asarray(times.iloc[lines].array)
        if len(lines) < length:  # the times of left-out steps
            start = times.iloc[lines[0]]
            filled = np.asarray([start + k * step if k else start for k in range(length)])
            filled[positions[lines]] = known
            known = filled
        by_row.append(known)
    return Steps(positions, lengths, by_row, since, step)


def _since_start(each: Floats, order: NDArray[np.intp], same: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The sum of steps since the first line of a sequence, by line."""
    total = np.cumsum(each[order])
    starts = np.concatenate([[True], ~same])
    total = total - np.repeat(total[starts], np.diff([*np.flatnonzero(starts), len(total)]))
    found = np.empty(len(each), dtype=np.int64)
    found[order] = total.round()
    return found


def _clocks(times: Any, name: str) -> Iterator[_Clock]:
    import pandas as pd

    kind = getattr(times.dtype, "kind", "O")
    if isinstance(times.dtype, pd.PeriodDtype):
        yield _Clock(np.asarray(pd.PeriodIndex(times).asi8, dtype=np.float64), 1)
    elif kind in "iuf":
        yield _Clock(times.to_numpy(np.float64), 1)
    elif kind == "M":
        yield from _calendars(pd.DatetimeIndex(times))
    else:
        raise TypeError(
            f"{name} must be numbers or dates; got {times.dtype}. Convert it: pandas.to_datetime(frame[{name!r}])."
        )


def _calendars(dates: Any) -> Iterator[_Clock]:
    import pandas as pd

    yield _Clock(dates.as_unit("ns").asi8.astype(np.float64), pd.Timedelta(1, "ns"))
    local = dates.tz_localize(None)
    if len(set(local - local.normalize())) > 1:
        return
    days = local.to_numpy("M8[D]")
    if dates.tz is not None:  # days have 23 or 25 hours where clocks change
        yield _Clock(days.astype(np.float64), pd.DateOffset(days=1))
    months = (12 * local.year + local.month).to_numpy(np.float64)
    if local.is_month_end.all():
        yield _Clock(months, pd.offsets.MonthEnd())
    elif len(set(local.day)) == 1:
        yield _Clock(months, pd.DateOffset(months=1))
    if (local.day_of_week < 5).all():
        yield _Clock(np.busday_count("1970-01-01", days).astype(np.float64), pd.offsets.BDay())


def _times(unit: Any, count: float) -> Any:
    """A number of units: as a whole number for calendars, which have no fractions."""
    return round(count) * unit if type(unit).__name__ != "int" or float(count).is_integer() else count


def _shown(times: Any, step: float) -> str:
    import pandas as pd

    return str(pd.Timedelta(step, "ns")) if times.dtype.kind == "M" else f"{step:g}"
