"""Statistics of dependence: between the columns of rows, between neighboring rows, and of residuals on predictions."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from deepprob.diagnostics.check import Array, array

AUTOCORRELATION = "autocorrelation of residuals"
SPREAD = "correlation of squared residuals with predictions"
BEND = "correlation of residuals with squared predictions"
CORRELATION = "largest correlation error"
COMPONENT = "variance share of component"
_COMPONENTS = 3
_MOST_COLUMNS = 64  # spread evenly over rows of more


def autocorrelation(residual: ArrayLike) -> dict[str, Array]:
    """Lag-1 autocorrelation of residuals in the order of the rows.

    Args:
        residual: Standardized residuals of data sets, shape ``(R, rows, ...)``.

    Examples:
        >>> wave = np.sin(np.arange(100.0) / 5)
        >>> {name: round(float(v[0]), 1) for name, v in autocorrelation(wave[None]).items()}
        {'autocorrelation of residuals': 1.0}
    """
    r = _centred(_by_row(residual))
    return {AUTOCORRELATION: _ratio((r[:, 1:] * r[:, :-1]).sum((1, 2)), np.square(r).sum((1, 2)))}


def on_predictions(residual: ArrayLike, centre: ArrayLike) -> dict[str, Array]:
    """Correlations that show a spread that changes with the prediction, and a curve that the predictions miss.

    Args:
        residual: Standardized residuals of data sets, shape ``(R, rows, ...)``.
        centre: Predicted means, shape ``(rows, ...)``.

    Examples:
        >>> x = np.linspace(-1.0, 1.0, 101)
        >>> [round(float(v[0]), 2) for v in on_predictions(x[None] ** 2, x).values()]
        [0.0, 1.0]
    """
    r, m = _by_row(residual), _centred(_by_row(array(centre)[None]))
    return {SPREAD: _correlation(np.square(r), m), BEND: _correlation(r, np.square(m))}


def of_columns(data: ArrayLike) -> dict[str, Array]:
    """Shares of the variance along the first principal components of each data set, and errors of its correlations.

    Args:
        data: Data sets of rows of several columns, shape ``(R, rows, ...)``.

    Returns:
        The shares of the first three components of each data set, and the largest distance of one of its correlations
        from the mean of all data sets.

    Examples:
        >>> rows = np.random.default_rng(0).normal(size=(50, 200, 2))
        >>> rows[0, :, 1] = rows[0, :, 0]
        >>> [round(float(v[0]), 1) for v in of_columns(rows).values()]
        [1.0, 0.0, 1.0]
    """
    x = _by_row(data)
    x = x[:, :, np.linspace(0, x.shape[2] - 1, min(x.shape[2], _MOST_COLUMNS)).astype(int)]
    shares, mean = np.zeros((min(_COMPONENTS, x.shape[2]), len(x))), sum(map(_correlations, x)) / len(x)
    for i, rows in enumerate(x):
        powers = np.square(np.linalg.svd(rows - rows.mean(0), compute_uv=False))[: len(shares)]
        shares[: len(powers), i] = powers / max(np.square(rows - rows.mean(0)).sum(), 1e-300)
    errors = array([np.abs(_correlations(rows) - mean).max() for rows in x])
    return {**{f"{COMPONENT} {k + 1}": share for k, share in enumerate(shares)}, CORRELATION: errors}


def _by_row(values: ArrayLike) -> Array:
    x = array(values)
    return x.reshape(*x.shape[:2], -1)


def _centred(x: Array) -> Array:
    return x - x.mean(1, keepdims=True)  # type: ignore[no-any-return]


def _ratio(above: Array, below: Array) -> Array:
    """Above over below, zero where nothing varies."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 1e-12)


def _correlation(x: Array, y: Array) -> Array:
    a, b = _centred(x.reshape(len(x), -1)), _centred(y.reshape(len(y), -1))
    return _ratio((a * b).sum(1), np.sqrt(np.square(a).sum(1) * np.square(b).sum(1)))


def _correlations(rows: Array) -> Array:
    """The matrix of correlations of columns; zero with columns that do not vary."""
    x = rows - rows.mean(0)
    length = np.sqrt(np.square(x).sum(0))
    x = _ratio(x, np.broadcast_to(length, x.shape))
    return array(x.T @ x)
