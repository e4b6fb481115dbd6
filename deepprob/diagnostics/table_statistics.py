"""Test statistics of a table whose columns are of different kinds: each variable on its own, and their dependence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepprob.diagnostics.check import Array, array
from deepprob.diagnostics.dependence import of_columns
from deepprob.distributions.columns import Variable

_OF_KIND = {"real": ("mean", "sd", "min", "max"), "count": ("mean", "sd", "max", "share of zeros")}


def of_table(
    data: ArrayLike, variables: Sequence[Variable], names: Sequence[str], known: NDArray[np.bool_]
) -> tuple[dict[str, Array], dict[str, float]]:
    """Statistics of tables, named after their columns.

    Of a number they are mean, sd, min and max; of a count its share of zeros in the place of the min; of zeros and
    ones, and of every category, the share of ones. The dependence of columns is measured in units of their sds.

    Args:
        data: Tables, shape ``(R, rows, D)``.
        variables: The variables of a row.
        names: The names of the columns.
        known: Which values count, shape ``(rows, D)``.

    Returns:
        The statistics, each ``(R,)``, and the unit of every one: the sd of its column in the first table, or 1.

    Examples:
        >>> smoker = Variable("smoker", "binary", (0,))
        >>> found, units = of_table([[[0.0], [1.0]], [[1.0], [1.0]]], [smoker], ["smoker"], np.ones((2, 1), bool))
        >>> found["share of smoker"].tolist(), units["share of smoker"]
        ([0.5, 1.0], 1.0)
    """
    tables = array(data)
    found: dict[str, Array] = {}
    units: dict[str, float] = {}
    for variable in variables:
        for place in variable.places:
            values = tables[:, known[:, place], place]
            if not values.shape[1]:
                continue
            for what in _OF_KIND.get(variable.kind, ("share",)):
                name = f"{what} of {names[place]}"
                found[name] = _statistic(values, what)
                units[name] = 1.0 if what.startswith("share") else float(values[0].std() or values.std())
    dependence = of_columns(_standardized(tables, known)) if tables.shape[2] > 1 and len(known) > 2 else {}
    return found | dependence, units


def _statistic(values: Array, what: str) -> Array:
    functions: dict[str, Any] = {"sd": values.std, "min": values.min, "max": values.max}
    if what == "share of zeros":
        return array((values == 0).mean(1))
    found: Array = functions.get(what, values.mean)(axis=1)
    return found


def _standardized(tables: Array, known: NDArray[np.bool_]) -> Array:
    """Columns in units of their sds over all tables; values that do not count are the mean of their table."""
    counts = np.maximum(known.sum(0), 1)
    kept = np.where(known, tables, 0.0)
    mean = kept.sum(1, keepdims=True) / counts
    centred = np.where(known, tables - mean, 0.0)
    sd = np.sqrt(np.square(centred).sum((0, 1)) / (len(tables) * counts))
    scaled: Array = np.divide(centred, sd, out=np.zeros_like(centred), where=sd > 0)
    return scaled
