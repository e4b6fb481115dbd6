"""Predictions and predicted rows as frames of pandas, in the user's columns and units."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from deepprob.data.table_rows import EncodedColumn, column_values, decode_rows, units_of
from deepprob.distributions.columns import Columns, Variable
from deepprob.posteriors.variables import variable_of


def frame_of_prediction(prediction: Any, mass: float) -> Any:
    """A prediction as a pandas frame, one line a row.

    Args:
        prediction: The `Prediction`.
        mass: Probability inside the interval.
    """
    import pandas as pd

    index = _index(prediction)
    rows = prediction._base
    found = _by_variable(prediction, rows, mass) if isinstance(rows, Columns) else _columns(prediction, mass)
    columns = {
        # A series has an index of its own, to which a frame would align it.
        name: values.reshape(len(index)).cpu().numpy()
        if isinstance(values, Tensor)
        else getattr(values, "array", values)
        for name, values in found
    }
    return pd.DataFrame(columns, index=index)


def frame_of_rows(prediction: Any, draw: int) -> Any:
    """A draw of the rows of a table as a pandas frame in the user's columns and units.

    Args:
        prediction: The `Prediction`.
        draw: Number of the draw.

    Raises:
        ValueError: If it does not predict all columns of a table.
    """
    if not prediction.names.encoded:
        raise ValueError(
            f"to_rows needs a model of all columns of a dp.table, but {prediction.site!r} has no such columns. Use "
            "to_frame or draws."
        )
    return decode_rows(prediction.names.encoded, prediction.draws[draw]).set_index(_index(prediction))


def _index(prediction: Any) -> Any:
    import pandas as pd

    count = prediction.draws.shape[1] if prediction.draws.dim() > 1 else 1
    index = prediction.names.index
    return pd.RangeIndex(count, name="row") if index is None or index.equals(pd.RangeIndex(count)) else index


def _by_variable(prediction: Any, rows: Columns, mass: float) -> Iterator[tuple[str, Any]]:
    """Names and values of the columns of the frame for rows whose columns are of different kinds."""
    owners: dict[int, EncodedColumn] = {}
    waves: set[int] = set()
    start = 0
    for column in prediction.names.encoded:
        places = range(start, start := start + len(column.names))
        if column.scale:
            owners[places[0]] = column
        if column.kind == "date":
            waves |= {*places[1 : len(places) - column.gaps]}
    for variable in rows.variables:
        if not waves.intersection(variable.places):  # they follow from the date
            owner = owners.get(variable.places[0])
            yield from _of_variable(variable_of(prediction, variable), variable, rows, owner, mass)


def _of_variable(
    part: Any, variable: Variable, rows: Columns, owner: EncodedColumn | None, mass: float
) -> Iterator[tuple[str, Any]]:
    name = owner.name if owner else variable.name
    if variable.kind == "classes":
        titles = [rows.names[place] for place in variable.places]
        labels = np.array([title.removeprefix(f"{name}=") for title in titles], dtype=object)
        found: dict[str, Any] = {"class": labels[part.classes.cpu().numpy()]}
        yield from _spread(found, name)
        for title, probs in zip(titles, part.probs.unbind(-1), strict=True):
            yield from _spread({"prob": probs}, title)
        return
    found = _values(part, mass)
    if variable.kind == "binary":
        found["class"] = part.probs > 0.5 if owner else found["class"]
    elif owner:
        found = {key: units_of(owner, x) if key == "sd" else column_values(owner, x) for key, x in found.items()}
    yield from _spread(found, name)


def _spread(found: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    """Columns named after a variable; if a row has several values of it, after their places, too."""
    shape = next(iter(found.values())).shape[1:]
    for index in itertools.product(*map(range, shape)):
        for key, values in found.items():
            yield f"{key}[{', '.join([*map(str, index), name])}]", values[(slice(None), *index)]


def _values(prediction: Any, mass: float) -> dict[str, Any]:
    """What the frame tells about every value, by name."""
    if prediction.kind in ("classes", "binary"):
        return {"class": prediction.classes} | ({"prob": prediction.probs} if prediction.kind == "binary" else {})
    tail = 100 * (1 - mass) / 2
    low, high = prediction.interval(mass)
    return {"mean": prediction.mean, "sd": prediction.sd, f"{tail:.3g}%": low, f"{100 - tail:.3g}%": high}


def _columns(prediction: Any, mass: float) -> Iterator[tuple[str, Any]]:
    """Names and values of the columns of the frame."""
    names, kind = prediction.names, prediction.kind
    values = _values(prediction, mass)
    shape = tuple(next(iter(values.values())).shape[1:])
    places: Iterable[Any] = itertools.product(*map(range, shape))
    for index in places:
        place = f"[{', '.join(map(str, index))}]" if math.prod(shape) > 1 else ""
        if place and len(names.columns) == shape[-1]:
            place = f"[{names.columns[index[-1]]}]"
        for name, value in values.items():
            yield name + place, value[(..., *index)]
        if kind == "classes":
            for label, probs in enumerate(prediction.probs.unbind(-1)):
                yield f"prob{place}[{names.classes[label] if names.classes else label}]", probs[(..., *index)]
