"""P-values of data against replicated data, which several checks use."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from deepprob.diagnostics.check import Array, array


def two_sided_p_values(observed: ArrayLike, replicated: ArrayLike) -> Array:
    r"""Two-sided Bayesian p-values: how often replicates are as extreme as the data.

    .. math:: p = 2 \min\{P(T_{rep} \ge T), P(T_{rep} \le T)\}, \text{ at most } 1

    The data are counted as one of the replicates, so that p is never zero and its level is exact.

    Args:
        observed: Statistics of the data, shape ``(S,)``.
        replicated: Statistics of every replicate, shape ``(R, S)``.

    Examples:
        >>> two_sided_p_values([50.0, 1000.0], np.repeat(np.arange(99.0)[:, None], 2, 1)).tolist()
        [1.0, 0.02]
    """
    t, r = array(observed), array(replicated)
    above = (1 + (r >= t).sum(0)) / (len(r) + 1)
    below = (1 + (r <= t).sum(0)) / (len(r) + 1)
    return array(np.minimum(1.0, 2 * np.minimum(above, below)))


def joint_p_value(observed: ArrayLike, replicated: ArrayLike) -> float:
    """One p-value for several statistics: the rank of the largest standardized distance among the replicates.

    Distances are measured from the median, in units of the root mean square distance on the same side. The
    data are treated like a replicate, so if data and replicates are exchangeable, the level of the test is
    exact for any dependence and distribution of the statistics.

    Args:
        observed: Statistics of the data, shape ``(S,)``.
        replicated: Statistics of every replicate, shape ``(R, S)``.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> joint_p_value([0.0, 9.0], rng.normal(size=(99, 2)))
        0.01
        >>> joint_p_value([0.0, 0.0], rng.normal(size=(99, 2))) > 0.05
        True
    """
    everything = np.concatenate([array(observed)[None], array(replicated)])  # (R + 1, S)
    distance = everything - np.median(everything, 0)
    furthest = np.zeros(len(everything))
    for side in (np.clip(distance, 0, None), np.clip(-distance, 0, None)):
        scale = np.sqrt(np.square(side).sum(0) / np.maximum((side > 0).sum(0), 1))
        standard = np.divide(side, scale, out=np.zeros_like(side), where=scale > 0)
        furthest = np.maximum(furthest, standard.max(1))
    return float((furthest >= furthest[0]).mean())
