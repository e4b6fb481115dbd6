"""Frames in long form as sequences: order, gaps, calendars, ids, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import deepprob as dp
from deepprob.data import Sequences, as_split, sequences

NAN = float("nan")


def frame(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame(columns)


def test_lines_are_sorted_by_time_within_ids_that_keep_their_order() -> None:
    long = frame(who=list("babab"), t=[3, 2, 1, 1, 2], up=[3.0, 20.0, 1.0, 10.0, 2.0], down=[0.5] * 5)
    data = dp.data.sequences(long, id="who", time="t")
    assert isinstance(data, Sequences) and data.ids.tolist() == ["b", "a"] and data.columns == ["up", "down"]
    assert data["x"][..., 0].tolist() == [[1.0, 2.0, 3.0], [10.0, 20.0, 0.0]]
    assert data["lengths"].tolist() == [3, 2] and [list(t) for t in data.times] == [[1, 2, 3], [1, 2]]
    assert as_split(data).names == ("x", "lengths")
    assert sequences(long, id="who", time="t", columns=["up"])["x"].shape == (2, 3, 1)


def test_parts_keep_their_ids_and_predictions_find_them() -> None:
    rng = np.random.default_rng(0)
    long = frame(who=np.repeat([f"p{i}" for i in range(10)], 4), t=np.tile(np.arange(4), 10), x=rng.normal(size=40))
    data = sequences(long, id="who", time="t")
    first, second = data.split(0.7, seed=1)
    assert {*first.ids} | {*second.ids} == {*long.who} and len(first) == 7
    one = data.rows([7, 2])
    assert one.ids.tolist() == ["p7", "p2"] and data.rows(-1).ids.tolist() == ["p9"] and len(data.to("cpu").ids) == 10
    back = one.to_frame(one["x"])
    assert back.loc[("p2", 3), "x"] == pytest.approx(long.x[2 * 4 + 3])
    ahead = one.to_frame(torch.ones(2, 3, 1), ahead=True)
    assert ahead.loc["p2"].index.tolist() == [4, 5, 6] and ahead.index.names == ["who", "t"]


@pytest.mark.parametrize(
    ("dates", "expected"),
    [
        (pd.date_range("2024-01-31", periods=5, freq="ME"), "2024-06-30"),
        (pd.date_range("2024-01-15", periods=5, freq="MS") + pd.Timedelta("14D"), "2024-07-15"),
        (pd.bdate_range("2024-03-06", periods=5), "2024-03-13"),  # Wednesday to Tuesday
        (pd.date_range("2024-01-01", periods=5, freq="6h"), "2024-01-02 06:00"),
        (pd.date_range("2024-01-01", periods=5, freq="W"), "2024-02-11"),
        (pd.date_range("2023-01-01", periods=5, freq="YS"), "2028-01-01"),
        (pd.date_range("2024-03-29", periods=5, tz="Europe/Rome"), "2024-04-03"),  # the clocks change
    ],
    ids=["month ends", "months", "business days", "hours", "weeks", "years", "days with summer time"],
)
def test_calendars_have_equal_steps(dates: pd.DatetimeIndex, expected: str) -> None:
    data = sequences(frame(id="a", day=dates, x=np.arange(5.0)), id="id", time="day")
    assert data["lengths"].tolist() == [5]
    (ahead,) = data.to_frame(np.ones((1, 1, 1)), ahead=True).loc["a"].index
    assert ahead.tz_localize(None) == pd.Timestamp(expected)


def test_periods_and_fractions_have_equal_steps() -> None:
    quarters = pd.period_range("2024Q1", periods=3, freq="Q")
    data = sequences(frame(id="a", q=quarters, x=[1, 2, 3]), id="id", time="q")
    assert data.to_frame(np.ones((1, 1)), ahead=True).loc["a"].index[0] == pd.Period("2024Q4")
    assert data["x"].dtype == torch.int64  # counts and classes stay whole
    tenths = sequences(frame(id=list("aab"), t=[0.1, 0.1 + 0.2, 7.7], x=[1.0, 2.0, 3.0]), id="id", time="t")
    assert tenths["lengths"].tolist() == [2, 1]


def test_gaps_become_nan_if_they_are_allowed() -> None:
    long = frame(id=list("aaab"), t=[1, 2, 4, 1], x=[1.0, NAN, 4.0, 5.0])
    data = sequences(long, id="id", time="t", missing="allow")
    assert data["x"][0, :, 0].isnan().tolist() == [False, True, True, False] and data["lengths"].tolist() == [4, 1]
    assert data["x"][1, 1:].tolist() == [[0.0]] * 3 and list(data.times[0]) == [1, 2, 3, 4]


def test_unequal_steps_become_a_field() -> None:
    long = frame(
        id=list("aab"), day=pd.to_datetime(["2024-01-01 00", "2024-01-03 12", "2024-01-01 00"]), x=[1.0, 2.0, 3.0]
    )
    data = sequences(long, id="id", time="day", spacing="any")
    assert data.names == ("x", "lengths", "elapsed") and data["elapsed"].tolist() == [[0.0, 2.5], [0.0, 0.0]]
    with pytest.raises(ValueError, match=r"times of a forecast are unknown, because the steps .* spacing='equal'"):
        data.to_frame(np.ones((2, 1, 1)), ahead=True)


GOOD = frame(id=["a", "a", "b"], t=[1, 2, 1], x=[1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("long", "options", "error", "message"),
    [
        (
            GOOD.assign(x=[1.0, NAN, 3.0]),
            {},
            ValueError,
            r"column 'x' has no value in line 1 \(id 'a', t 2\)\. Fill it in",
        ),
        (GOOD.assign(t=[1, 1, 1]), {}, ValueError, r"id 'a' has two lines for t 1, lines 0 and 1\. Keep one"),
        (GOOD.assign(t=[1.0, NAN, 1.0]), {}, ValueError, r"column 't' has no value in line 1\. Drop"),
        (GOOD.assign(id=["a", None, "b"]), {}, ValueError, r"column 'id' has no value in line 1"),
        (GOOD.assign(t=list("xyz")), {}, TypeError, r"t must be numbers or dates; got .*to_datetime"),
        (GOOD.assign(x=list("xyz")), {}, TypeError, r"columns that are not numbers: x\. Encode"),
        (GOOD, {"time": "day"}, ValueError, r"unknown column 'day'\. .*Choose from: id, t, x"),
        (GOOD, {"columns": "x"}, TypeError, r"columns must be a list of names; got 'x'\. Write columns=\['x'\]"),
        (GOOD[["id", "t"]], {}, ValueError, r"no columns besides 'id' and 't'"),
        (GOOD.iloc[:0], {}, ValueError, r"the frame is empty"),
        (GOOD, {"missing": "keep"}, ValueError, r"unknown missing 'keep'"),
        (GOOD, {"spacing": "odd"}, ValueError, r"unknown spacing 'odd'"),
        (GOOD.to_numpy(), {}, TypeError, r"sequences reads a pandas frame.* got ndarray\. Pass arrays as they are"),
        (
            frame(id="a", t=[1, 2, 5], x=[1.0, 2.0, 3.0]),
            {},
            ValueError,
            r"id 'a' has no line for t 3, one of 2 steps left out of 5\. Add the lines, or write missing='allow'",
        ),
        (
            frame(id="a", t=[0.0, 1.0, 2.5], x=[1.0, 2.0, 3.0]),
            {},
            ValueError,
            r"t must have equal steps; got one of 1 and, up to line 2 of id 'a', one of 1\.5\. Resample",
        ),
    ],
)
def test_refusals_name_the_line(long: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sequences(long, **({"id": "id", "time": "t"} | options))


def test_values_of_another_shape_are_refused() -> None:
    data = sequences(GOOD, id="id", time="t")
    with pytest.raises(
        ValueError, match=r"values must have shape \(2, steps, 1\), for 2 sequences of x; got \(3, 2, 1\)"
    ):
        data.to_frame(np.ones((3, 2, 1)))
