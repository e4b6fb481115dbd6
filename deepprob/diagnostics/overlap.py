"""How given data relate to the rows that a posterior was fitted to: training data, held-out data, or a mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from deepprob.posteriors.training_rows import TrainingRows

Relation = Literal["training", "part", "mixed", "held-out", "unknown"]

LEVEL = 0.001  # of the test for shared rows; its false alarms are negligible in a report
_WORDS = {
    "training": "the training data",
    "part": "a part of the training data",
    "mixed": "held-out data that share rows with the training data",
    "held-out": "held-out data",
    "unknown": "data of unknown origin: the posterior does not know its training rows",
}


@dataclass(frozen=True, eq=False)
class Overlap:
    """The rows that given data share with the training data.

    Attributes:
        relation: ``"training"`` for all training rows, ``"part"`` for some of them, ``"mixed"`` for other data that
            share more rows with them than training rows share with each other, ``"held-out"``, or ``"unknown"``.
        shared: Whether each given row is a training row, shape ``(rows,)``; twins of held-out rows do not count.
        matches: How many given rows are like a training row, twins included.
        kept: Number of training rows that the data were compared with.
        twins: How many of these have a twin among them.
        p: The probability of at least as many shared rows if the data are new rows of the same population.
        p_fewer: About the probability of at most as many.
    """

    relation: Relation
    shared: NDArray[np.bool_]
    matches: int = 0
    kept: int = 0
    twins: int = 0
    p: float = 1.0
    p_fewer: float = 1.0

    @property
    def words(self) -> str:
        """The relation, in words."""
        return _WORDS[self.relation]


def overlap_of(record: TrainingRows | None, batch: Sequence[Tensor] | None, rows: int) -> Overlap:
    """Compare given data with the training rows.

    If the data are new rows of the population of the training rows, a new row has a twin among these as often as
    each of them has. Fisher's exact test compares both shares, one-sided, with as many training rows as their share is
    worth: twins come in pairs, so fewer than there are (Esty).

    Args:
        record: What the posterior keeps of its training rows; None if it is not known.
        batch: The data, as the program accepted them; None for a program that holds its data.
        rows: Their number of rows.

    References:
        Esty (1983), A normal limit law for a nonparametric estimator of the coverage of a random sample.

    Examples:
        >>> import torch
        >>> x = torch.arange(40.0).reshape(20, 2)
        >>> kept = TrainingRows.of((x,))
        >>> [overlap_of(kept, (data,), 20).relation for data in (x.flip(0), x[:9], torch.cat([x, x + 0.5]), x + 0.5)]
        ['training', 'part', 'mixed', 'held-out']
    """
    if batch is None:
        return Overlap("training", np.ones(rows, dtype=bool))
    none = np.zeros(rows, dtype=bool)
    if record is None or not batch or (record.summaries and len(record.summaries) != len(batch)):
        return Overlap("unknown", none)
    digests = record.digests_like(batch)
    repeats, kept = record.repeats, len(record.digests)
    single, pairs = int((repeats == 1).sum()), int((repeats == 2).sum())
    twins = kept - single
    if record.equals(digests):
        return Overlap("training", np.ones(rows, dtype=bool), rows, kept, twins, 0.0)
    found = record.has(digests).numpy()
    count = int(found.sum())
    worth = 1 / (1 + 2 * pairs * kept / (single * twins)) if single * twins else float(not twins)
    others, alike = round(worth * kept), round(worth * twins)
    p = float(stats.hypergeom.sf(count - 1, len(found) + others, count + alike, len(found)))
    fewer = _few(count, len(found), single, pairs, kept)
    if p > LEVEL:
        return Overlap("held-out", none, count, kept, twins, p, fewer)
    return Overlap("part" if found.all() else "mixed", found, count, kept, twins, p)


def _few(count: int, rows: int, single: int, pairs: int, kept: int) -> float:
    """The probability that so few new rows have a twin, if the training rows are distinct measurements.

    The share that would have one is that of training rows with a twin (Good and Turing); three standard errors less
    are assumed.

    Args:
        count: How many new rows have a twin among the training rows.
        rows: Number of new rows.
        single: Number of training rows without a twin.
        pairs: Number of training rows with one twin.
        kept: Number of training rows.

    References:
        Esty (1983), A normal limit law for a nonparametric estimator of the coverage of a random sample.
    """
    share = 1 - single / kept
    error = math.sqrt(single * share + pairs) / kept
    return float(stats.binom.cdf(count, rows, max(share - 3 * error, 0.0)))
