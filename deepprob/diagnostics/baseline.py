"""Predictions that ignore the inputs, from the training targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from deepprob.diagnostics.check import Array
from deepprob.posteriors.training_rows import Summary

_FEWEST = 3  # rows that predict each other


@dataclass(frozen=True, eq=False)
class NormalBaseline:
    """A t-distribution for every number of a row: what a normal sample tells about the next value.

    Attributes:
        mean: Its centre, ``(1, C)`` or, for rows that leave themselves out, ``(rows, C)``.
        scale: Its scale, of the same shape.
        freedom: Degrees of freedom.
    """

    mean: Array
    scale: Array
    freedom: int

    def __call__(self, target: Array) -> Array:
        """Negative log density of every row, in nats."""
        y = target.reshape(len(target), -1)
        density = stats.t.logpdf(y, self.freedom, self.mean, np.maximum(self.scale, 1e-12))
        return np.asarray(-density.sum(1), dtype=np.float64)


def normal_baseline(target: Array, summary: Summary | None) -> NormalBaseline:
    r"""The prediction of a row from other rows alone, :math:`t_{n-1}(\bar y, s \sqrt{1 + 1/n})`.

    Args:
        target: The targets of the rows, shape ``(rows, ...)``.
        summary: The summary of the training targets; None to predict each row from the others.

    Raises:
        ValueError: If the training targets are unknown, and there are fewer than three rows.

    Examples:
        >>> y = np.array([0.0, 1.0, 2.0, 3.0])
        >>> normal_baseline(y, None).mean[:, 0].round(3).tolist()
        [2.0, 1.667, 1.333, 1.0]
    """
    y = target.reshape(len(target), -1)
    if summary is not None and summary.count > 1 and summary.mean.shape == y.shape[1:]:
        count, mean, sd = summary.count, summary.mean[None], summary.sd[None]
    elif len(y) < _FEWEST:
        raise ValueError(
            f"a baseline needs training targets that are kept apart, or {_FEWEST} rows that predict each other; got "
            f"{len(y)}. Give more rows."
        )
    else:  # mean and sd of the other rows, from the sums of all
        count = len(y) - 1
        mean = (y.sum(0) - y) / count
        centred = y - y.mean(0)
        squares = (np.square(centred).sum(0) - np.square(centred)) - np.square(centred) / count
        sd = np.sqrt(np.maximum(squares, 0.0) / (count - 1))
    return NormalBaseline(mean, sd * np.sqrt(1 + 1 / count), count - 1)


def class_baseline(labels: NDArray[np.int64], classes: int, summary: Summary | None) -> Array:
    r"""The share of every class among other rows, :math:`(n_c + 1/2) / (n + C/2)`, shape ``(rows, classes)``.

    Args:
        labels: The labels of the rows, shape ``(rows,)``.
        classes: Number of classes.
        summary: The summary of the training labels; None to predict each row from the others.

    Examples:
        >>> class_baseline(np.array([0, 0, 0, 1]), 2, None)[[0, 3]].round(3).tolist()
        [[0.625, 0.375], [0.875, 0.125]]
    """
    if summary is not None and len(summary.classes) and summary.classes.min() >= 0 and summary.classes.max() < classes:
        counts = np.zeros((len(labels), classes))
        counts[:, summary.classes.astype(np.int64)] = summary.class_counts
    else:
        counts = np.bincount(labels, minlength=classes) - np.eye(classes)[labels]
    return np.asarray((counts + 0.5) / (counts.sum(1, keepdims=True) + classes / 2))
