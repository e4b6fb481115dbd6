"""Scores of predictive distributions, and curves of what they tell about errors."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from deepprob.diagnostics.check import Array, array

BINS = 15


def bins_of(confidence: ArrayLike, bins: int = BINS) -> Any:
    """Index of each row's confidence bin. Bins have equal numbers of rows, but for rows of equal confidence.

    These share a bin: dealt out, they would come into bins by the order of the rows, which often is that of the labels.
    """
    below = stats.rankdata(array(confidence), "min").astype(np.int64) - 1
    return np.unique(below * min(bins, len(below)) // len(below), return_inverse=True)[1]


def crps(draws: ArrayLike, target: ArrayLike) -> Array:
    r"""Continuous ranked probability score of draws, in the target's units; lower is better.

    .. math:: \mathbb{E}|Y - y| - \tfrac12 \mathbb{E}|Y - Y'|

    Args:
        draws: Shape ``(K, *batch)``.
        target: Shape ``batch``.

    References:
        Gneiting, Raftery (2007), Strictly proper scoring rules, prediction, and estimation.

    Examples:
        >>> crps(np.full((10, 1), 2.0), [5.0]).tolist()
        [3.0]
    """
    values, y = np.sort(array(draws), 0), array(target)
    count = len(values)
    weight = (2 * np.arange(1, count + 1) - count - 1).reshape(-1, *[1] * y.ndim)
    # Pairs of a draw with itself are left out, so that the estimate is unbiased for any number of draws.
    return array(np.abs(values - y).mean(0) - (weight * values).sum(0) / (count * max(count - 1, 1)))


def brier(probs: ArrayLike, labels: ArrayLike) -> Array:
    """Brier score of each row: squared distance of the probabilities from the true class; lower is better.

    Examples:
        >>> brier([[1.0, 0.0], [0.5, 0.5]], [0, 1]).tolist()
        [0.0, 0.5]
    """
    p, y = array(probs), array(labels).astype(np.int64)
    return np.asarray(np.square(p - np.eye(p.shape[1])[y]).sum(1))


class BrierParts(NamedTuple):
    """The parts of a mean Brier score: ``reliability - resolution + uncertainty``, and what lies within bins.

    Attributes:
        reliability: Distance of class frequencies from the probabilities; 0 is calibrated.
        resolution: How much class frequencies differ between predictions; higher is better.
        uncertainty: The score of the base rates, which depends on the labels alone.
        within: What the bins leave out, the rest of the score.
    """

    reliability: float
    resolution: float
    uncertainty: float
    within: float


def brier_parts(probs: ArrayLike, labels: ArrayLike, bins: int = BINS) -> BrierParts:
    r"""The decomposition of the mean Brier score, class against the others, in bins of equal numbers of rows but for
    ties.

    .. math:: \overline{BS} = \sum_c \Big[ \sum_b \tfrac{n_b}{n} (\bar p_{bc} - \bar o_{bc})^2
              - \sum_b \tfrac{n_b}{n} (\bar o_{bc} - \bar o_c)^2 + \bar o_c (1 - \bar o_c) \Big] + W

    with mean probabilities :math:`\bar p`, class frequencies :math:`\bar o`, and the part :math:`W` within bins.

    Args:
        probs: Class probabilities, shape ``(rows, classes)``.
        labels: True classes, shape ``(rows,)``.
        bins: Number of bins.

    References:
        Murphy (1973), A New Vector Partition of the Probability Score.
        Stephenson, Coelho, Jolliffe (2008), Two Extra Components in the Brier Score Decomposition.

    Examples:
        Probabilities that are the base rates are reliable and do not tell rows apart:

        >>> parts = brier_parts(np.full((4, 2), 0.5), [0, 0, 1, 1])
        >>> parts.reliability, parts.resolution, parts.uncertainty
        (0.0, 0.0, 0.5)
    """
    p, y = array(probs), array(labels).astype(np.int64)
    hits = np.eye(p.shape[1])[y]
    reliability = resolution = 0.0
    for predicted, hit in zip(p.T, hits.T, strict=True):
        index = bins_of(predicted, bins)
        for part in (index == b for b in range(index.max() + 1)):
            share = float(part.mean())
            reliability += share * float(predicted[part].mean() - hit[part].mean()) ** 2
            resolution += share * float(hit[part].mean() - hit.mean()) ** 2
    rates = hits.mean(0)
    uncertainty = float((rates * (1 - rates)).sum())
    within = float(brier(p, y).mean()) - (reliability - resolution + uncertainty)
    return BrierParts(reliability, resolution, uncertainty, within)


def risk_coverage(confidence: ArrayLike, errors: ArrayLike) -> tuple[Array, Array]:
    r"""The risk-coverage curve: the mean error of the most confident rows, for every share of rows that is kept.

    .. math:: r(k / n) = \frac1k \sum_{i=1}^k e_{(i)}, \qquad k = 1, \dots, n

    with the errors :math:`e` in descending order of confidence. Rows of equal confidence have the mean error of all of
    them, so that their order does not matter.

    Args:
        confidence: Shape ``(rows,)``; higher is more confident.
        errors: The loss of each row, such as whether its class is wrong, shape ``(rows,)``.

    Returns:
        Coverage ``k / n`` and risk, both of shape ``(rows,)``.

    References:
        Geifman, El-Yaniv (2017), Selective Classification for Deep Neural Networks.

    Examples:
        >>> [x.tolist() for x in risk_coverage([0.9, 0.8, 0.6], [0, 0, 1])]
        [[0.3333333333333333, 0.6666666666666666, 1.0], [0.0, 0.0, 0.3333333333333333]]
    """
    values, loss = array(confidence), array(errors)
    _, group, counts = np.unique(-values, return_inverse=True, return_counts=True)
    mean = (np.bincount(group, loss) / counts)[group]
    kept = np.arange(1, len(loss) + 1)
    return kept / len(loss), np.cumsum(mean[np.argsort(-values, kind="stable")]) / kept


def aurc(confidence: ArrayLike, errors: ArrayLike) -> float:
    """The area under the risk-coverage curve, the mean risk over all coverages; lower is better.

    Args:
        confidence: Shape ``(rows,)``; higher is more confident.
        errors: The loss of each row, shape ``(rows,)``.

    Examples:
        Knowing which row is wrong is better than chance:

        >>> aurc([0.9, 0.8, 0.6], [0, 0, 1]) < aurc([0.9, 0.9, 0.9], [0, 0, 1])
        True
    """
    return float(risk_coverage(confidence, errors)[1].mean())


def pit(draws: ArrayLike, target: ArrayLike, seed: int = 0) -> Array:
    r"""Probability integral transform: the rank of each target among its predictive draws, in [0, 1].

    .. math:: u = F(y^-) + v \, \big(F(y) - F(y^-)\big), \qquad v \sim U(0, 1)

    If the predictions are calibrated, :math:`u` is uniform, for counts and other values with ties as well.

    Args:
        draws: Predictive draws, shape ``(K, *batch)``.
        target: Observed values, shape ``(*replicates, *batch)``.
        seed: Seed of :math:`v`.

    References:
        Dawid (1984), Statistical Theory: the Prequential Approach. Czado, Gneiting, Held (2009), for counts.

    Examples:
        >>> pit(np.arange(10.0)[:, None], [100.0]).round(1).tolist()
        [1.0]
    """
    values, y = array(draws), array(target)
    count, batch = len(values), values.shape[1:]
    flat, again = values.reshape(count, -1), y.reshape(-1, int(np.prod(batch, dtype=int)))
    below, up_to = np.empty_like(again), np.empty_like(again)
    for i, column in enumerate(np.sort(flat, 0).T):
        below[:, i] = np.searchsorted(column, again[:, i], "left")
        up_to[:, i] = np.searchsorted(column, again[:, i], "right")
    # The target is one of K + 1 exchangeable values, so there are K + 1 ranks.
    rank = below + np.random.default_rng(seed).random(again.shape) * (up_to - below + 1)
    return array((rank / (count + 1)).reshape(y.shape))
