"""Values that are nan or infinite: which rows have them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepprob.diagnostics.check import Array, array

REMEDY = (
    "Find the computation of the program that gives nan or infinity for these rows; bound it, or leave the rows out."
)
_SHOWN = 5


class NotFinite(ValueError):
    """Some rows have values that are nan or infinite.

    Args:
        what: The values, such as ``"log-likelihood of 'y'"``.
        rows: Numbers of the rows, ascending.
        of: Number of all rows.
    """

    def __init__(self, what: str, rows: NDArray[np.int64], of: int) -> None:
        self.rows = [int(row) for row in rows]
        listed = ", ".join(str(row) for row in self.rows[:_SHOWN])
        more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        plural = "s" * (len(rows) > 1)
        super().__init__(f"The {what} is not finite in row{plural} {listed}{more} (of {of}, counted from 0).")


def finite_rows(values: ArrayLike, what: str, rows: ArrayLike, axis: int = 0) -> Array:
    """Values by row, all of them finite.

    Args:
        values: Values with a dimension of rows.
        what: What they are.
        rows: The number of each row.
        axis: The dimension of rows.

    Raises:
        NotFinite: If some are not finite; it names the rows.
    """
    found, numbers = array(values), np.asarray(rows)
    good = np.isfinite(found).all(tuple(i for i in range(found.ndim) if i != axis % max(found.ndim, 1)))
    if good.all():
        return found
    raise NotFinite(what, numbers[~good] if len(numbers) == good.size else np.flatnonzero(~good), len(numbers))
