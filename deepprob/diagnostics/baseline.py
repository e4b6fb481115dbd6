"""Predictions that ignore the inputs, from the training targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from deepprob.diagnostics.check import Array
from deepprob.posteriors.training_rows import Summary

FEWEST = 3  # rows that predict each other
_POISSON = 1e6  # a negative binomial distribution of this number is a Poisson


@dataclass(frozen=True, eq=False)
class Baseline:
    """A distribution for every number of a row, from the numbers of other rows.

    Attributes:
        mean: Its mean or centre, ``(1, C)`` or, for rows that leave themselves out, ``(rows, C)``.
        log_density: The log density of numbers, ``(rows, C)``.
        known: Which numbers count, ``(rows, C)``.
    """

    mean: Array
    log_density: Callable[[Array], Array]
    known: NDArray[np.bool_]

    def __call__(self, target: Array) -> Array:
        """Negative log density of every row, in nats."""
        found = self.log_density(target.reshape(len(target), -1))
        return np.asarray(-np.where(self.known, found, 0.0).sum(1), dtype=np.float64)


def normal_baseline(target: Array, summary: Summary | None, known: NDArray[np.bool_] | None = None) -> Baseline:
    r"""What a normal sample tells about the next value, :math:`t_{n-1}(\bar y, s \sqrt{1 + 1/n})`.

    Args:
        target: The targets of the rows, shape ``(rows, ...)``.
        summary: The summary of the training targets; None to predict each row from the others.
        known: Which targets count, of their shape; None for all.

    Raises:
        ValueError: If the training targets are unknown, and there are fewer than three rows.

    Examples:
        >>> y = np.array([0.0, 1.0, 2.0, 3.0])
        >>> normal_baseline(y, None).mean[:, 0].round(3).tolist()
        [2.0, 1.667, 1.333, 1.0]
    """
    count, mean, sd, counting = _moments(target, summary, known)
    scale = np.maximum(sd * np.sqrt(1 + 1 / count), 1e-12)
    return Baseline(mean, stats.t(count - 1, mean, scale).logpdf, counting)


def count_baseline(target: Array, summary: Summary | None, known: NDArray[np.bool_] | None = None) -> Baseline:
    """The negative binomial distribution with the mean and sd of other rows, or a Poisson if they vary less.

    Args:
        target: The counts of the rows, shape ``(rows, ...)``.
        summary: The summary of the training counts; None to predict each row from the others.
        known: Which counts count, of their shape; None for all.

    Raises:
        ValueError: As for `normal_baseline`.

    Examples:
        Counts with the variance of a Poisson distribution:

        >>> y = np.array([0.0, 1.0, 1.0, 2.0, 0.0, 2.0])
        >>> base = count_baseline(y, None)
        >>> bool(np.allclose(base(y), -stats.poisson(base.mean[:, 0]).logpmf(y), atol=1e-4))
        True
    """
    count, mean, sd, counting = _moments(target, summary, known)
    mean = np.maximum(mean, 0.5 / (count + 1))  # a count that was never seen is possible
    number = np.square(mean) / np.maximum(np.square(sd) - mean, np.square(mean) / _POISSON)
    return Baseline(mean, stats.nbinom(number, number / (number + mean)).logpmf, counting)


def _moments(
    target: Array, summary: Summary | None, known: NDArray[np.bool_] | None
) -> tuple[Array, Array, Array, NDArray[np.bool_]]:
    """Number, mean and sd of the values that predict each number of a row, and which of these count."""
    y = target.reshape(len(target), -1)
    seen = np.ones(y.shape, dtype=bool) if known is None else known.reshape(y.shape)
    if summary is not None and summary.count > 1 and summary.mean.shape == y.shape[1:]:
        return np.full_like(summary.mean[None], summary.count), summary.mean[None], summary.sd[None], seen
    if len(y) < FEWEST:
        raise ValueError(
            f"a baseline needs training targets that are kept apart, or {FEWEST} rows that predict each other; got "
            f"{len(y)}. Give more rows."
        )
    # Mean and sd of the other rows, from the sums of all.
    y, count = np.where(seen, y, 0.0), seen.sum(0) - seen.astype(np.float64)
    centred = np.where(seen, y - y.sum(0) / seen.sum(0), 0.0)
    squares = (np.square(centred).sum(0) - np.square(centred)) - np.square(centred) / count
    return count, (y.sum(0) - y) / count, np.sqrt(np.maximum(squares, 0.0) / (count - 1)), seen


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
