"""Sparse matrices of scipy, read as dense arrays."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

_MOST_BYTES = 2**30


def is_sparse(value: object) -> bool:
    """Whether a value is a sparse matrix or array of scipy."""
    sparse = sys.modules.get("scipy.sparse")  # such a value exists only if it is imported
    return sparse is not None and bool(sparse.issparse(value))


def dense(value: Any, label: str) -> np.ndarray:
    """A sparse matrix as a dense array.

    Args:
        value: The matrix.
        label: Its name in error messages.

    Raises:
        ValueError: If the array would take a GiB or more.

    Examples:
        >>> from scipy.sparse import eye_array
        >>> dense(eye_array(2), "x").tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    size = int(np.prod(value.shape)) * value.dtype.itemsize
    if size >= _MOST_BYTES:
        raise ValueError(
            f"{label} is a sparse matrix of shape {tuple(value.shape)}, which takes {size / 2**30:.1f} GiB as a dense "
            "one; the limit is 1 GiB. Keep fewer columns, or reduce them, e.g. by sklearn.decomposition.TruncatedSVD."
        )
    return np.asarray(value.toarray())
