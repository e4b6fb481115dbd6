"""Tables as users have them: five real ones with mixed columns, and three made from code, each with its answer."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest


@dataclass(frozen=True)
class OwnTable:
    """A table, what to predict from it, and how a linear model of scikit-learn reads the same columns.

    Attributes:
        read: The frame as a user has it right after reading the file.
        target: The column to predict.
        classes: Whether the target is a class.
        drop: Columns that name rows, or hold free text.
        steps: Steps of the fit.
        margin: How much less accuracy, or how much more of the RMSE in shares, is accepted.
    """

    read: Callable[[], pd.DataFrame]
    target: str
    classes: bool
    drop: tuple[str, ...] = ()
    steps: int = 300
    margin: float = 0.05

    def frame(self) -> pd.DataFrame:
        """The rows that have a target, without the columns to drop."""
        frame = self.read()
        return frame.dropna(subset=[self.target]).drop(columns=[*self.drop]).reset_index(drop=True)

    def parts(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Three quarters of the rows to fit, the others to test; both keep the index of the file."""
        frame = self.frame()
        chosen = np.random.default_rng(0).permutation(len(frame)) < 0.75 * len(frame)
        return frame[chosen], frame[~chosen]

    def score(self, found: pd.Series, test: pd.DataFrame) -> float:
        """Accuracy of predicted classes, or the RMSE of predicted means."""
        target = test[self.target]
        if self.classes:
            return float((found.astype(str) == target.astype(str)).mean())
        return float(((found - target) ** 2).mean() ** 0.5)


def for_scikit_learn(frame: pd.DataFrame) -> pd.DataFrame:
    """Days for dates and durations, float64 for numbers, text for all else, "gap" for its gaps."""

    def plain(column: pd.Series) -> pd.Series:
        if isinstance(column.dtype, pd.DatetimeTZDtype):
            column = column.dt.tz_convert("UTC").dt.tz_localize(None)
        if column.dtype.kind in "mM":
            zero = pd.Timestamp(0) if column.dtype.kind == "M" else pd.Timedelta(0)
            return (column - zero) / pd.Timedelta(days=1)
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            return pd.Series(column.to_numpy(np.float64, na_value=np.nan), index=column.index)
        return column.astype(object).where(column.notna(), "gap").astype(str)

    return frame.apply(plain)


def packaged(package: str, file: str) -> Path:
    """A file of an installed package, which is not imported; the test is skipped if it is absent."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs the package {package}")
    return Path(spec.submodule_search_locations[0]) / file


def penguins() -> pd.DataFrame:
    return pd.read_csv(packaged("palmerpenguins", "data/penguins.csv"))


def penguins_raw() -> pd.DataFrame:
    return pd.read_csv(packaged("palmerpenguins", "data/penguins-raw.csv"), parse_dates=["Date Egg"])


def cars() -> pd.DataFrame:
    frame = pd.DataFrame(json.loads(packaged("vega_datasets", "_data/cars.json").read_text(encoding="utf-8")))
    return frame.assign(Year=pd.to_datetime(frame["Year"]))


def riots() -> pd.DataFrame:
    return pd.read_csv(packaged("vega_datasets", "_data/la-riots.csv"), parse_dates=["death_date"])


def weather() -> pd.DataFrame:
    return pd.read_csv(packaged("vega_datasets", "_data/seattle-weather.csv"), parse_dates=["date"])


def clinic() -> pd.DataFrame:
    """Patients with gaps in numbers, texts and booleans; nullable types; an ordered category; a boolean target."""
    r, n = np.random.default_rng(1), 240
    age, smoker, size = r.normal(50, 12, n), r.random(n) < 0.3, r.integers(0, 3, n)
    ill = r.random(n) < 1 / (1 + np.exp(-(0.12 * (age - 50) + 2.5 * smoker + size - 1.5)))
    frame = pd.DataFrame(
        {
            "age": pd.Series(age.round()).astype("Int64"),
            "smoker": pd.Series(smoker).astype("boolean"),
            "dose": pd.Categorical(np.array(["low", "mid", "high"])[size], ["low", "mid", "high"], ordered=True),
            "ward": pd.Series(np.array(["north", "south", "east"])[r.integers(0, 3, n)]).astype("string"),
            "ill": ill,
        }
    )
    for i, name in enumerate(("age", "smoker", "ward")):
        frame.loc[r.random(n) < 0.05 * (i + 1), name] = pd.NA
    return frame


def sales() -> pd.DataFrame:
    """A price on dates with zones, with a trend over time, long durations, and categories that few rows have."""
    r, n = np.random.default_rng(2), 240
    day = np.sort(r.integers(0, 700, n))
    kind = np.array(["book", "toy", "lamp", "kayak", "harp"])[r.choice(5, n, p=[0.45, 0.35, 0.17, 0.02, 0.01])]
    base = pd.Series(kind).map({"book": 10.0, "toy": 20.0, "lamp": 35.0, "kayak": 50.0, "harp": 60.0}).to_numpy()
    wait = r.integers(1, 20, n)
    return pd.DataFrame(
        {
            "sold": pd.Timestamp("2021-01-01", tz="Europe/Berlin") + pd.to_timedelta(day, unit="D"),
            "kind": pd.Categorical(kind),
            "wait": pd.to_timedelta(wait, unit="D"),
            "note": "none",
            "price": base + 0.02 * day - 0.5 * wait + r.normal(0, 2.0, n),
        }
    )


def machines() -> pd.DataFrame:
    """States of machines, one of them rare; numbers of very different size; an object column; gaps in half of one."""
    r, n = np.random.default_rng(3), 240
    state = np.array(["running", "idle", "broken"])[r.choice(3, n, p=[0.6, 0.36, 0.04])]
    heat = pd.Series(state).map({"running": 80.0, "idle": 60.0, "broken": 110.0}).to_numpy() + r.normal(0, 6, n)
    load = 1e8 + np.where(state == "running", 3.0, 0.0) + r.normal(0, 1.0, n)
    return pd.DataFrame(
        {
            "heat": heat,
            "load": load,
            "volt": np.where(r.random(n) < 0.5, np.nan, r.normal(0.002, 1e-4, n)),
            "site": np.array(["a", "b", None], dtype=object)[r.integers(0, 3, n)],
            "state": state,
        }
    )


TABLES = {
    "penguins": OwnTable(penguins, "species", True),
    "penguins-raw": OwnTable(
        penguins_raw, "Body Mass (g)", False, drop=("Individual ID", "Comments", "Stage", "Region"), margin=0.15
    ),
    "cars": OwnTable(cars, "Miles_per_Gallon", False, drop=("Name",), margin=0.15),
    "la-riots": OwnTable(riots, "type", True, drop=("first_name", "last_name", "address", "neighborhood"), margin=0.15),
    "seattle-weather": OwnTable(weather, "weather", True),
    "clinic": OwnTable(clinic, "ill", True),
    "sales": OwnTable(sales, "price", False, drop=("note",), margin=0.3),
    "machines": OwnTable(machines, "state", True),
}
