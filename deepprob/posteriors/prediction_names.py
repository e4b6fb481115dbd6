"""The user's words for a prediction: names of classes, targets and rows, and the frame that shows them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deepprob.data import Table
from deepprob.data.frames import is_frame


@dataclass(frozen=True, eq=False)
class PredictionNames:
    """The words for a prediction.

    Attributes:
        classes: The names of the classes, by number; empty if they have none.
        columns: The names of the targets; empty if they have none.
        index: The index of the rows, of pandas; None to count them.
    """

    classes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    index: Any = None


def index_of(data: Sequence[Any], rows: int) -> Any:
    """The index of the first frame, series or table among the arguments of a query; None if there is none.

    Args:
        data: The arguments, as the user gave them.
        rows: The number of rows that it must name.
    """
    parts = data[0] if len(data) == 1 and isinstance(data[0], tuple | list) else data
    parts = [*data[0].values()] if len(data) == 1 and isinstance(data[0], dict) else parts
    for value in parts:
        named = isinstance(value, Table) or is_frame(value) or type(value).__module__.partition(".")[0] == "pandas"
        index = getattr(value, "index", None)
        if named and index is not None and not callable(index) and len(index) == rows:
            return index
    return None


def frame_of_prediction(prediction: Any, mass: float) -> Any:
    """A prediction as a pandas frame, one line a row.

    Args:
        prediction: The `Prediction`.
        mass: Probability inside the interval.
    """
    import pandas as pd

    count = prediction.draws.shape[1] if prediction.draws.dim() > 1 else 1
    index = prediction.names.index
    if index is None or index.equals(pd.RangeIndex(count)):
        index = pd.RangeIndex(count, name="row")
    columns = {
        name: values.reshape(count).cpu().numpy() if isinstance(values, Tensor) else values
        for name, values in _columns(prediction, mass)
    }
    return pd.DataFrame(columns, index=index)


def _columns(prediction: Any, mass: float) -> Iterator[tuple[str, Any]]:
    """Names and values of the columns of the frame."""
    names, kind = prediction.names, prediction.kind
    if kind in ("classes", "binary"):
        values = {"class": prediction.classes}
        values |= {"prob": prediction.probs} if kind == "binary" else {}
    else:
        tail = 100 * (1 - mass) / 2
        low, high = prediction.interval(mass)
        values = {"mean": prediction.mean, "sd": prediction.sd, f"{tail:.3g}%": low, f"{100 - tail:.3g}%": high}
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
