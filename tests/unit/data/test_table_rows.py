"""The kinds of the columns of an encoded table, and the way back to a frame."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import deepprob.data
from deepprob.data import Table, column_kinds, decode_rows
from deepprob.models import VAE


@dataclass(frozen=True)
class Record:
    name: str
    kind: str
    names: tuple[str, ...]
    center: float = 0.0
    scale: float = 1.0
    fill: float = 0.0
    levels: tuple[str, ...] = ()
    rare: tuple[str, ...] = ()
    gaps: bool = False


COLUMNS = [
    Record("age", "numeric", ("age", "age=missing"), 40.0, 10.0, gaps=True),
    Record("smoker", "boolean", ("smoker", "smoker=missing"), gaps=True),
    Record("island", "categorical", ("island=a", "island=b", "island=rare"), levels=("a", "b"), rare=("c", "d")),
    Record("size", "ordinal", ("size",), 1.0, 0.5, levels=("S", "M", "L")),
    Record("day", "date", ("day", "sine of day in the year", "cosine of day in the year"), 18_000.0, 10.0),
    Record("known", "numeric", ("known=missing",), scale=0.0, fill=3.0, gaps=True),
]
NAMES = [name for column in COLUMNS for name in column.names]


def rows() -> np.ndarray[Any, Any]:
    first = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, -2.0, 0.0, 0.0, 1.0, 0.0]
    second = [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.7, 0.05, 0.0, 1.0, 1.0]
    third = [0.5, 0.2, 0.4, 0.1, 0.0, 0.0, 0.0, 9.0, np.nan, 0.0, 1.0, 0.0]
    return np.array([first, second, third])


def test_kinds_follow_the_encoding() -> None:
    assert column_kinds(COLUMNS) == [
        ("real", "age"),
        ("missing", "age"),
        ("binary", "smoker"),
        ("missing", "smoker"),
        ("categories", "island", ["a", "b", "rare"]),
        ("real", "size"),
        ("real", "day"),
        ("real", "sine of day in the year"),
        ("real", "cosine of day in the year"),
        ("binary", "known=missing"),
    ]


def test_a_vae_takes_the_kinds_and_names_of_a_table() -> None:
    data = Table({"x": torch.zeros(1, len(NAMES))}, SimpleNamespace(columns=COLUMNS))  # type: ignore[arg-type]
    program = VAE.from_data(data, latent_dim=3)
    assert program.table is not None and list(program.table.names) == NAMES and program.latent_dim == 3


def test_rows_come_back_in_the_columns_and_units_of_the_user() -> None:
    frame = decode_rows(COLUMNS, torch.as_tensor(rows()))
    assert list(frame) == [column.name for column in COLUMNS]
    np.testing.assert_allclose(frame["age"], [50.0, np.nan, 45.0])
    assert frame["smoker"].tolist() == [True, None, False]
    assert frame["island"].tolist() == ["a", "rare", None]
    assert frame["size"].tolist() == ["S", "L", "L"]
    assert frame["day"].tolist()[:2] == [
        pd.Timestamp("2019-04-14", tz="UTC"),
        pd.Timestamp("2019-04-14 12:00", tz="UTC"),
    ]
    assert pd.isna(frame["day"][2])
    np.testing.assert_allclose(frame["known"], [3.0, np.nan, 3.0])


def test_rows_of_another_table_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows of this table must have shape \(N, 12\); got \(3, 2\)\. Give one draw"):
        decode_rows(COLUMNS, np.zeros((3, 2)))


def test_a_frame_comes_back_from_its_table() -> None:
    frame = pd.DataFrame(
        {
            "age": [30.0, np.nan, 50.0, 41.0] * 5,
            "smoker": [True, False, False, True] * 5,
            "island": ["a", "b", None, "a"] * 5,
            "seen": pd.to_datetime(["2020-01-01", "2021-05-06", "2021-05-07", "1999-01-01"] * 5),
        }
    )
    table = deepprob.data.table(frame)
    program = VAE.from_data(table, latent_dim=2)
    (x,) = program.accept(table)
    assert x.isnan().any(0).tolist() == [name in ("age", "island=a", "island=b") for name in table.feature_names]
    back = decode_rows(table.encoding.columns, table["x"])
    np.testing.assert_allclose(back["age"], frame["age"], rtol=1e-5)
    assert back["smoker"].tolist() == frame["smoker"].tolist()
    assert back["island"].tolist() == ["a", "b", None, "a"] * 5
    days = (back["seen"].dt.tz_localize(None) - frame["seen"]).abs()
    assert (days < pd.Timedelta(minutes=30)).all()  # dates are standardized in the program's precision


def test_sine_and_cosine_of_a_missing_date_are_missing() -> None:
    frame = pd.DataFrame({"seen": pd.date_range("2020-01-01", periods=20, freq="7h"), "size": np.arange(20.0)})
    frame.loc[::5, "seen"] = pd.NaT
    table = deepprob.data.table(frame, cyclic={"seen": ["day"]})
    program = VAE.from_data(table, latent_dim=2)
    (x,) = program.accept(table)
    gaps = torch.tensor(frame["seen"].isna().to_numpy())
    assert table.feature_names[:4] == ("seen", "sine of seen in the day", "cosine of seen in the day", "seen=missing")
    assert (x[:, :3].isnan() == gaps[:, None]).all() and not x[:, 3:].isnan().any()
    again = VAE(**program.config)  # type: ignore[arg-type]
    assert again.table is not None and again.table.kinds == program.table.kinds  # type: ignore[union-attr]
