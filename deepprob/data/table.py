"""table: fit the encoding of a frame with numbers, text, categories, dates and gaps, and encode it."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from deepprob.data.column_encoding import PARTS, Array, ColumnEncoding, Kind, as_numbers, text_of
from deepprob.data.frames import check_order, is_frame, named
from deepprob.data.table_arguments import column_list, cycles_by_column, levels_by_column, target_names
from deepprob.data.table_encoding import Table, TableEncoding, TargetEncoding, checked_weights
from deepprob.errors import shown, unknown, whole

_LARGEST = 1e150  # of a column: squares of larger numbers overflow
_FEWEST_IDS, _ID_SHARE = 10, 0.9  # text that differs in nearly every row names the rows
_KINDS: dict[str, Kind] = {
    "integer": "numeric",
    "floating": "numeric",
    "mixed-integer-float": "numeric",
    "decimal": "numeric",
    "empty": "numeric",
    "boolean": "boolean",
    "string": "categorical",
    "datetime64": "date",
    "datetime": "date",
    "date": "date",
}


def table(
    frame: Any,
    target: str | int | Sequence[str | int] | None = None,
    *,
    ordinal: Mapping[Any, Sequence[Any]] | None = None,
    cyclic: Mapping[Any, str | Sequence[str]] | None = None,
    drop: str | int | Collection[str | int] = (),
    min_count: int = 1,
    weights: Any = None,
    class_weights: str | Mapping[Any, float] | None = None,
    classes: bool | None = None,
) -> Table:
    r"""Encode a frame with numbers, text, categories, dates and gaps as tensors.

    Numbers, dates and ordinal levels are standardized by the mean and standard deviation of these rows; a category
    becomes one feature a level; a gap is filled with the median or the most frequent level, and marked by a feature of
    its own. A numeric target keeps its units; text, categories, booleans and whole numbers with two values become class
    numbers. Later frames are encoded alike: ``table.encoding.encode(frame)``. A posterior does so by itself.

    The row weights :math:`w_i` scale log-likelihoods, :math:`\sum_i w_i \log p(y_i \mid x_i)`: a row of weight 2
    counts like two equal rows.

    Args:
        frame: A frame of pandas or polars.
        target: The name of the target, or several names of numeric targets; None for a table without a target. Names
            may be whole numbers.
        ordinal: Levels in ascending order, by column; an ordered pandas category needs none.
        cyclic: Cycles of dates whose sine and cosine are features, by column: ``{"time": ["day", "year"]}`` of
            ``"day"``, ``"week"`` and ``"year"``.
        drop: The name of a column to leave out, or several.
        min_count: Fewest rows of a category's own feature; rarer categories share the feature ``rare``.
        weights: The name of a column of row weights, or an array of them, ``(N,)``.
        class_weights: ``"balanced"`` for equal sums of weights in all classes, or a weight for every class by name.
        classes: Whether a target of numbers holds classes; None if these are whole numbers with two values, such as
            0 and 1.

    Returns:
        The table: a `Split` with the fields ``x`` and, with a target, ``y``.

    Raises:
        TypeError: If it is no frame, a column holds neither numbers nor text nor dates, or an argument has values
            where names are expected.
        ValueError: If a name is unknown, a target has gaps or too few classes, a column of text names the rows, two
            features have one name, or no feature is left.

    Examples:
        Features have names, and a frame with other columns in front gives the same numbers:

        >>> import pandas as pd
        >>> frame = pd.DataFrame({"size": [1.0, None, 3.0], "kind": ["a", "b", "a"], "ok": ["yes", "no", "yes"]})
        >>> made = table(frame, target="ok")
        >>> made.feature_names
        ('size', 'size=missing', 'kind=a', 'kind=b')
        >>> made["y"].tolist(), made.encoding.classes
        ([1, 0, 1], ('no', 'yes'))
        >>> same = made.encoding.encode(frame[["ok", "kind", "size"]])
        >>> bool((same["x"] == made["x"]).all())
        True
    """
    frame = _checked_frame(frame)
    targets = target_names(target)
    weight = str(weights) if weights is not None and np.ndim(weights) == 0 else None
    orders, cycles = levels_by_column(ordinal), cycles_by_column(cyclic)
    apart = {"target": targets, "column to drop": column_list(drop), "column of weights": (weight,) if weight else ()}
    features = [name for name in frame.columns if not any(name in names for names in apart.values())]
    _check_names(frame, {**apart, "ordinal column": orders, "column with cycles": cycles})
    found = _target(frame, targets, classes) if targets else None
    columns = _columns(frame[features], orders, cycles, whole("min_count", min_count))
    balance = _class_weights(class_weights, frame, found)
    made = TableEncoding(columns, found, weight, balance).encode(frame)
    if weights is None or weight:
        return made
    check_order(weights, frame.index, "weights")
    try:
        own = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"weights must be numbers, or the name of one column; got {shown(weights)}. Write weights='column'."
        ) from None
    if own.shape != (len(made),):
        raise ValueError(
            f"weights must hold one number for each of {len(made)} rows; got shape {own.shape}. Give an array of this "
            "length, or the name of a column."
        )
    given = checked_weights(own, "weights")
    total = given if made.weights is None else given * made.weights
    return Table(dict(zip(made.names, made.tensors, strict=True)), made.encoding, made.index, total)


def kind_of(column: Any) -> Kind:
    """The kind of a column's values.

    Args:
        column: A pandas series.

    Raises:
        TypeError: If it holds neither numbers nor text nor dates.

    Examples:
        >>> import pandas as pd
        >>> kind_of(pd.Series(["a", None])), kind_of(pd.Series([True, None])), kind_of(pd.Series([1.5]))
        ('categorical', 'boolean', 'numeric')
    """
    import pandas as pd

    if isinstance(column.dtype, pd.CategoricalDtype):
        return "ordinal" if column.dtype.ordered else "categorical"
    if pd.api.types.is_timedelta64_dtype(column.dtype):
        return "numeric"
    inferred = pd.api.types.infer_dtype(column, skipna=True)
    if inferred not in _KINDS:
        raise TypeError(
            f"column {column.name!r} holds {inferred} values; expected numbers, text, True and False, or dates. "
            f"Convert it, e.g. by .astype(str), or drop it: {_as_dropped([column.name])}."
        )
    return _KINDS[inferred]


def _checked_frame(frame: Any) -> Any:
    if not is_frame(frame):
        raise TypeError(f"table expects a frame of pandas or polars; got {type(frame).__name__}. Make a pd.DataFrame.")
    frame = named(frame)
    names = [*frame.columns]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the frame has several columns {twice[0]!r}. Rename or drop all but one.")
    return frame


def _check_names(frame: Any, named: Mapping[str, Collection[str]]) -> None:
    for kind, names in named.items():
        for name in names:
            if name not in frame:
                raise unknown(kind, name, frame.columns)


def _columns(
    frame: Any, ordinal: Mapping[str, Sequence[Any]], cyclic: Mapping[str, Sequence[str]], min_count: int
) -> tuple[ColumnEncoding, ...]:
    found = [_fitted(frame[name], ordinal.get(name), tuple(cyclic.get(name, ())), min_count) for name in frame.columns]
    constant = [column.name for column in found if not column.scale]
    if constant:
        listed = ", ".join(map(repr, constant))
        warnings.warn(
            f"columns without two different values make no feature: {listed}. Leave them out: {_as_dropped(constant)}.",
            UserWarning,
            stacklevel=3,
        )
    kept = tuple(column for column in found if column.names)
    if not kept:
        raise ValueError("the frame has no column to predict from. Give a frame with one besides target and weights.")
    features = [(name, column.name) for column in kept for name in column.names]
    owners = dict(reversed(features))
    if twice := [(name, column) for name, column in features if owners[name] != column]:
        name, column = twice[0]
        raise ValueError(
            f"columns {owners[name]!r} and {column!r} both make a feature {name!r}. Rename or drop one of them."
        )
    return kept


def _fitted(column: Any, order: Sequence[Any] | None, cyclic: tuple[str, ...], min_count: int) -> ColumnEncoding:
    """The encoding of a column; its scale is 0 if it does not have two different values."""
    name = str(column.name)
    kind: Kind = "ordinal" if order is not None else kind_of(column)
    if cyclic and kind != "date":
        raise ValueError(
            f"column {name!r} has cycles {', '.join(cyclic)} but holds no dates. Convert it: pd.to_datetime."
        )
    for part in cyclic:
        if part not in PARTS:
            raise unknown("cycle", part, PARTS)
    if kind in ("categorical", "ordinal"):
        return _fitted_levels(column, kind, order, min_count)
    values, gaps = as_numbers(column, kind), bool(column.isna().any())
    known = values[~np.isnan(values)]
    if len(np.unique(known)) < 2:
        return ColumnEncoding(
            name, kind, scale=0.0, fill=float(known[0]) if len(known) else 0.0, gaps=gaps and len(known) > 0
        )
    if np.abs(known).max() > _LARGEST:
        raise ValueError(
            f"column {name!r} has values up to {np.abs(known).max():.3g}, whose standard deviation no float can hold. "
            "Divide it, or take its logarithm."
        )
    filled, fill = _imputed(values, "most_frequent" if kind == "boolean" else "mean" if kind == "date" else "median")
    center, scale = (0.0, 1.0) if kind == "boolean" else _moments(filled)
    return ColumnEncoding(name, kind, center, scale, fill, gaps=gaps, cyclic=cyclic)


def _fitted_levels(column: Any, kind: Kind, order: Sequence[Any] | None, min_count: int) -> ColumnEncoding:
    name, gaps = str(column.name), bool(column.isna().any())
    present = np.array([text_of(x) for x in column.dropna()], dtype=object)
    known, counts = np.unique(present.astype(str), return_counts=True)
    count = dict(zip(known.tolist(), counts.tolist(), strict=True))
    rare: tuple[str, ...] = ()
    if kind == "ordinal":
        levels = tuple(text_of(x) for x in (column.cat.categories if order is None else order))
        for value in count:
            if value not in levels:
                raise unknown(f"level of {name!r}", value, levels)
    else:
        if len(count) >= _FEWEST_IDS and len(count) > _ID_SHARE * len(present):
            raise ValueError(
                f"column {name!r} has {len(count)} different texts in {len(present)} rows, so it names rows and tells "
                f"nothing about new ones. Leave it out, {_as_dropped([name])}, or convert it to numbers or dates (in a "
                "file, dates such as 2024-12-31)."
            )
        levels = tuple(level for level in count if count[level] >= min_count)
        rare = tuple(level for level in count if count[level] < min_count)
    places = as_numbers(column, kind, levels + rare)
    if len(count) < 2 or (kind == "categorical" and len(levels) + bool(rare) < 2):
        return ColumnEncoding(name, kind, 0.0, 0.0, 0.0, levels, rare, gaps and len(count) > 0)
    filled, fill = _imputed(np.minimum(places, len(levels)), "most_frequent")
    center, scale = _moments(filled) if kind == "ordinal" else (0.0, 1.0)
    return ColumnEncoding(name, kind, center, scale, fill, levels, rare, gaps)


def _as_dropped(names: Sequence[Any]) -> str:
    """How to leave columns out, in Python and in the command."""
    return f"drop={[*names]!r} (in the command: --drop {shlex.quote(','.join(map(str, names)))})"


def _imputed(values: Array, strategy: str) -> tuple[Array, float]:
    """Values without gaps, and the value in the place of gaps."""
    from sklearn.impute import SimpleImputer

    imputer = SimpleImputer(strategy=strategy).fit(values[:, None])
    return imputer.transform(values[:, None])[:, 0], float(imputer.statistics_[0])


def _moments(values: Array) -> tuple[float, float]:
    """Mean and standard deviation, in float64."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(values[:, None])
    return float(scaler.mean_[0]), float(scaler.scale_[0])


def holds_classes(column: Any) -> bool:
    """Whether a column is a target of classes: text, categories, booleans, or whole numbers with two values.

    Args:
        column: A pandas series.

    Examples:
        >>> import pandas as pd
        >>> [holds_classes(pd.Series(values)) for values in ([0, 1, 1], ["a", "b", "c"], [0, 1, 2], [0.0, 1.0, 1.0])]
        [True, True, False, False]
    """
    import pandas as pd

    if (kind := kind_of(column)) != "numeric":
        return kind != "date"
    known = column.dropna()
    return bool(pd.api.types.infer_dtype(known) == "integer" and known.nunique() == 2)


def _target(frame: Any, names: tuple[str, ...], classes: bool | None) -> TargetEncoding:
    kinds = {name: kind_of(frame[name]) for name in names}
    numeric = all(kind == "numeric" for kind in kinds.values())
    if classes is None:
        classes = len(names) == 1 and holds_classes(frame[names[0]])
    if numeric and not classes:
        return TargetEncoding(names)
    name = next((name for name, kind in kinds.items() if kind != "numeric"), names[0])
    if kinds[name] == "date":
        raise ValueError(
            f"the target {name!r} holds dates; expected numbers or classes. Convert it to days, for instance."
        )
    if len(names) > 1:
        raise ValueError(
            f"several targets must be numbers; {name!r} holds classes. Choose one target, and leave out the others by "
            "drop=[...]."
        )
    known = frame[name].dropna()
    if kinds[name] == "ordinal":
        levels = tuple(map(text_of, known.cat.remove_unused_categories().cat.categories))
    else:
        levels = tuple(map(text_of, sorted(known.unique()))) if numeric else tuple(sorted({text_of(x) for x in known}))
    if len(levels) < 2:
        raise ValueError(
            f"the target {name!r} must have at least 2 classes; got {', '.join(map(repr, levels)) or 'no value'}. "
            "Choose another target, or rows of another class too."
        )
    return TargetEncoding(names, levels, ordered=kinds[name] != "categorical")


def _class_weights(
    given: str | Mapping[Any, float] | None, frame: Any, target: TargetEncoding | None
) -> tuple[float, ...]:
    """The weight of every class, by number; empty for 1 each."""
    if given is None:
        return ()
    classes = target.classes if target else ()
    if not classes:
        raise ValueError(
            "class_weights needs a target of classes: text, booleans, or numbers with classes=True. Leave it out, or "
            "use weights=."
        )
    if isinstance(given, str):
        if given != "balanced":
            raise unknown("class_weights", given, ["balanced"])
        from sklearn.utils.class_weight import compute_class_weight

        texts = np.array([text_of(x) for x in frame[target.names[0]].dropna()])  # type: ignore[union-attr]
        return tuple(compute_class_weight("balanced", classes=np.array(classes), y=texts).tolist())
    if not isinstance(given, Mapping):
        raise TypeError(
            f"class_weights must be 'balanced', or a dict of weights by class; got {shown(given)}. Write "
            f"class_weights={{{classes[0]!r}: 2.0, ...}}."
        )
    by_name = {text_of(name): float(weight) for name, weight in given.items()}
    for name in by_name:
        if name not in classes:
            raise unknown("class in class_weights", name, classes)
    if lacking := [name for name in classes if name not in by_name]:
        raise ValueError(f"class_weights lacks {', '.join(map(repr, lacking))}. Give every class a weight.")
    weights = np.array([by_name[name] for name in classes])
    return tuple(checked_weights(weights, "class_weights").double().tolist())
