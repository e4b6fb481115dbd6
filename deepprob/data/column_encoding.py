"""`ColumnEncoding`: the numbers that one column of a frame becomes, as a record without code."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deepprob.data.table_rows import shown_levels, unlike
from deepprob.errors import counted

Array = NDArray[np.float64]
Kind = Literal["numeric", "boolean", "categorical", "ordinal", "date"]

PARTS = {"day": 86_400.0, "week": 7 * 86_400.0, "year": 365.2425 * 86_400.0}  # periods in seconds
_DAY = 86_400.0


@dataclass(frozen=True)
class ColumnEncoding:
    """How one column becomes features.

    A number and a date become one standardized feature, a date in days; an ordinal level becomes its standardized
    position; a boolean becomes 0 or 1; a category becomes one feature a level, 1 for the row's own.

    Attributes:
        name: The column's name.
        kind: ``"numeric"``, ``"boolean"``, ``"categorical"``, ``"ordinal"`` or ``"date"``.
        center: Mean of the training rows; of dates in days since 1970.
        scale: Standard deviation of the training rows; 0 if the value itself makes no feature.
        fill: The value of a gap: the median, or the number of the most frequent level.
        levels: The levels, as text.
        rare: The levels that share one feature, because few rows had them. Its name ends in ``rare``, or in ``rare_``
            if a level has this name.
        gaps: Whether the training rows had gaps, so that there is a feature that marks them. Its name ends in
            ``missing``, or in ``missing_`` if a level has this name.
        cyclic: The cycles whose sine and cosine are features of a date: ``"day"``, ``"week"``, ``"year"``.
    """

    name: str
    kind: Kind
    center: float = 0.0
    scale: float = 1.0
    fill: float = 0.0
    levels: tuple[str, ...] = ()
    rare: tuple[str, ...] = ()
    gaps: bool = False
    cyclic: tuple[str, ...] = field(default=())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the features, such as ``age``, ``species=Adelie`` or ``age=missing``."""
        own = [self.name] if self.scale else []
        if self.kind == "categorical" and self.scale:
            own = [f"{self.name}={level}" for level in shown_levels(self)]
        waves = [f"{wave} of {self.name} in the {part}" for part in self.cyclic for wave in ("sine", "cosine")]
        return (*own, *waves, *([unlike(f"{self.name}=missing", own)] if self.gaps else []))

    def encode(self, column: Any) -> Array:
        """The features of a column of a pandas frame, shape ``(N, F)``.

        Args:
            column: The column, a pandas series.

        Raises:
            ValueError: If the column does not hold values of the fit's kind.
        """
        found = [*self._features(column)]
        return np.stack(found, 1) if found else np.empty((len(column), 0))

    def _features(self, column: Any) -> Iterator[Array]:
        values = self.numbers(column)
        missing = np.asarray(column.isna(), dtype=bool)
        if missing.any() and not self.gaps:
            warnings.warn(
                f"column {self.name!r} has {counted(int(missing.sum()), 'gap')} and had none in the fit; filled with "
                f"{self._shown_fill}. Fill the column in, or drop the rows.",
                UserWarning,
                stacklevel=2,
            )
        filled = np.where(missing, self.fill, values)
        if self.kind == "categorical" and self.scale:
            yield from self._one_hot(filled)
        elif self.scale:
            # An unknown level of an order has no position: the mean is the least claim.
            yield np.where(np.isnan(filled), 0.0, (filled - self.center) / self.scale)
        for part in self.cyclic:
            angle = 2 * np.pi * filled * _DAY / PARTS[part]
            yield from (np.sin(angle), np.cos(angle))
        if self.gaps:
            yield missing.astype(float)

    def _one_hot(self, numbers: Array) -> Iterator[Array]:
        from sklearn.preprocessing import OneHotEncoder

        places = np.arange(len(self.levels) + bool(self.rare))
        encoder = OneHotEncoder(categories=[places], handle_unknown="ignore", sparse_output=False)
        encoder.fit(np.zeros((1, 1)))
        yield from encoder.transform(np.nan_to_num(numbers, nan=-1)[:, None]).T

    def numbers(self, column: Any) -> Array:
        """The values of a column as numbers, with NaN for gaps and unknown levels; levels are counted from 0.

        Args:
            column: The column, a pandas series.

        Raises:
            ValueError: If the column does not hold values of the fit's kind.
        """
        values = as_numbers(column, self.kind, self.levels + self.rare)
        if not self.levels:
            return values
        unknown = np.isnan(values) & np.asarray(column.notna(), dtype=bool)
        if unknown.any():
            listed = sorted({text_of(x) for x in column[unknown]})
            shown = ", ".join(map(repr, listed[:5])) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
            rare = f"the level {shown_levels(self)[-1]!r}"
            what = rare if self.rare else "the mean" if self.kind == "ordinal" else "no category"
            warnings.warn(
                f"column {self.name!r} has values that the fit has not seen: {shown}. They are encoded as {what}.",
                UserWarning,
                stacklevel=2,
            )
        values = np.where(values >= len(self.levels), len(self.levels), values)  # rare levels share a number
        return np.where(unknown, len(self.levels), values) if self.rare else values

    @property
    def _shown_fill(self) -> str:
        if self.levels:
            return repr(shown_levels(self)[int(self.fill)])
        return "the mean date" if self.kind == "date" else f"{self.fill:g}"


def text_of(value: Any) -> str:
    """A level as text; whole numbers have no decimals, because a gap turns a column of whole numbers into floats.

    Examples:
        >>> text_of(3.0), text_of("3.0"), text_of(np.True_)
        ('3', '3.0', 'True')
    """
    whole = isinstance(value, float | np.floating) and float(value).is_integer()
    return str(int(value)) if whole else str(value)


def as_numbers(column: Any, kind: Kind, levels: Sequence[str] = ()) -> Array:
    """The values of a column as float64: dates in days since 1970, levels by their place, NaN for gaps.

    Args:
        column: The column, a pandas series.
        kind: What it holds.
        levels: Its levels as text.

    Raises:
        ValueError: If it does not hold values of this kind.
    """
    import pandas as pd

    if kind in ("categorical", "ordinal"):
        places = {level: float(i) for i, level in enumerate(levels)}
        return np.array(
            [np.nan if gap else places.get(text_of(x), np.nan) for x, gap in zip(column, column.isna(), strict=True)]
        )
    if column.isna().all():
        return np.full(len(column), np.nan)
    try:
        if kind == "date":
            if pd.api.types.is_numeric_dtype(column.dtype):
                raise TypeError("numbers are no dates")
            days = (pd.to_datetime(column, utc=True) - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(days=1)
            return np.asarray(days, dtype=np.float64)
        if kind == "numeric" and pd.api.types.is_datetime64_any_dtype(column.dtype):
            raise TypeError("dates are no numbers")
        if kind == "boolean":
            known = column.astype(object).map(_BOOLEANS.get, na_action="ignore")
            if (wrong := column[known.isna() & column.notna()]).size:
                raise ValueError(f"{text_of(wrong.iloc[0])!r} is neither of them")
            column = known
        elif pd.api.types.is_timedelta64_dtype(column.dtype):
            column = column / pd.Timedelta(days=1)
        values = np.asarray(pd.to_numeric(column).to_numpy(np.float64, na_value=np.nan))
    except (ValueError, TypeError) as error:
        what = {"date": "dates", "boolean": "True and False"}.get(kind, "numbers")
        raise ValueError(
            f"column {column.name!r} must hold {what}; got {str(column[column.notna()].iloc[0])!r} among them "
            f"({error}). Convert it first."
        ) from None
    if np.isinf(values).any():
        raise ValueError(
            f"column {column.name!r} has {counted(int(np.isinf(values).sum()), 'infinite value')}. Replace it, or drop "
            "its rows."
        )
    return values


_BOOLEANS = {True: 1.0, False: 0.0, "True": 1.0, "False": 0.0, "true": 1.0, "false": 0.0}
