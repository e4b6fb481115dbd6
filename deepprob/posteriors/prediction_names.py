"""The user's words for a prediction: names of classes, targets and rows, and observed values in these words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepprob.data import Table
from deepprob.data.column_encoding import text_of
from deepprob.data.frames import array_of, check_order, is_frame, missing_column, named
from deepprob.data.table_rows import EncodedColumn
from deepprob.errors import unknown


@dataclass(frozen=True, eq=False)
class PredictionNames:
    """The words for a prediction.

    Attributes:
        classes: The names of the classes, by number; empty if they have none.
        columns: The names of the targets, or of the features of predicted rows; empty if they have none.
        encoded: How the columns of a table became the features of predicted rows; empty for other predictions.
        index: The index of the rows, of pandas; None to count them.
    """

    classes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    encoded: tuple[EncodedColumn, ...] = ()
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


def values_of(y: Any, names: PredictionNames, shape: tuple[int, ...]) -> Tensor:
    """Observed values as a tensor: of a frame the columns of the targets, of names of classes their numbers.

    Args:
        y: The values, in any form; a tensor and an array of numbers are as they are.
        names: The words for the prediction.
        shape: The shape of the predicted rows. One number a row may lack a last axis of length 1.

    Raises:
        TypeError: If text is given where classes have no names.
        ValueError: If a class is unknown, a frame lacks a target, or rows are in another order than those predicted.

    Examples:
        >>> values_of(["b", "a"], PredictionNames(classes=("a", "b")), (2,))
        tensor([1, 0])
    """
    check_order(y, names.index, "the observed values")
    if is_frame(y):
        y = named(y)
        if lacking := [name for name in names.columns if name not in y]:
            raise missing_column("y", lacking, [*y.columns])
        y = y[[*names.columns]] if names.columns else y
        y = y.iloc[:, 0] if y.shape[1] == 1 else torch.from_numpy(array_of(y, "y"))
    if not isinstance(y, Tensor):
        in_pandas, values = type(y).__module__.partition(".")[0] == "pandas", np.asarray(y)
        if values.dtype.kind in "OUSTb" or (in_pandas and names.classes):
            values = _labels(y, values, names.classes)
        y = torch.tensor(values)
    found: Tensor = y
    return found.unsqueeze(-1) if (*found.shape, 1) == shape else found


def _labels(y: Any, values: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Labels as numbers; those that are no names of classes must be numbers."""
    places = {name: i for i, name in enumerate(classes)}
    texts = [text_of(value) for value in values.ravel()]
    if classes and {*texts} <= places.keys():
        return np.array([places[text] for text in texts]).reshape(values.shape)
    if values.dtype.kind in "iufb":
        return values
    try:
        numbers = y.to_numpy(np.float64, na_value=np.nan) if hasattr(y, "to_numpy") else values.astype(np.float64)
    except (TypeError, ValueError):
        if not classes:
            raise TypeError("y holds text, but the classes of the fit have no names. Give numbers.") from None
        raise unknown("class", next(text for text in texts if text not in places), classes) from None
    return np.asarray(numbers)
