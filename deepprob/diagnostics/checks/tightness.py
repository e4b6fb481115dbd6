"""How far is the ELBO below the log evidence?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from deepprob.diagnostics.case import Case, Diagnostic
from deepprob.diagnostics.check import Array, Check, Verdict, array, number
from deepprob.diagnostics.checks.collapse import information

SHARE = 0.2
FLOOR = 0.1
NAME = "bound is tight"


def bounds(log_weights: ArrayLike) -> dict[int, Array]:
    r"""Importance-weighted bounds of every row for 1, 10, 100, ... particles, from one set of weights.

    .. math:: \mathcal{L}_K = \mathbb{E} \log \frac{1}{K} \sum_{k=1}^K w_k

    The expectation is over disjoint blocks of K weights, so the sequence rises in expectation and,
    as the logarithm is concave, also from one divisor of the number of weights to a multiple of it.

    Args:
        log_weights: ``log p(x, z_k) - log q(z_k | x)``, shape ``(particles, rows)``.

    Returns:
        Number of particles to bounds, shape ``(rows,)``; the last one uses all particles.

    References:
        Burda, Grosse, Salakhutdinov (2016), Importance Weighted Autoencoders.

    Examples:
        >>> sequence = bounds(np.random.default_rng(0).normal(size=(100, 5)))
        >>> bool((sequence[1] <= sequence[10]).all() and (sequence[10] <= sequence[100]).all())
        True
    """
    weights = array(log_weights)
    particles = len(weights)
    sizes = [10**i for i in range(8) if 10**i < particles] + [particles]
    result = {}
    for size in sizes:
        blocks = weights[: particles // size * size].reshape(-1, size, *weights.shape[1:])  # (M, K, rows)
        result[size] = (logsumexp(blocks, axis=1) - np.log(size)).mean(0)
    return result


def bound_gap(log_weights: ArrayLike, *, information: float = 0.0) -> Check:
    """The importance-weighted bound less the ELBO: at most the KL from the guide to the exact posterior, per row.

    Args:
        log_weights: ``log p(x, z_k) - log q(z_k | x)``, shape ``(particles, rows)``.
        information: KL of the guide from the prior, nats per row: what the guide says about a row.

    Returns:
        The gap. A fifth of ``information`` (at least 0.1 nats) is a caution, all of it (at least 1)
        a fail: the guide is then further from the posterior than from the prior.

    Examples:
        The exact posterior has equal weights, and no gap:

        >>> bound_gap(np.full((100, 5), -3.0)).value
        0.0
    """
    sequence = bounds(log_weights)
    most = max(sequence)
    gaps = sequence[most] - sequence[1]
    gap = float(gaps.mean())
    se = float(gaps.std(ddof=1) / np.sqrt(len(gaps))) if len(gaps) > 1 else None
    limit, hard = max(SHARE * information, FLOOR), max(information, 10 * FLOOR)
    sure = gap - 1.645 * (se or 0.0)
    verdict: Verdict = "fail" if sure > hard else "caution" if sure > limit else "pass"
    means = {size: float(values.mean()) for size, values in sequence.items()}
    return Check(
        name=NAME,
        value=gap,
        se=se,
        threshold=limit,
        verdict=verdict,
        reading=(
            f"{most} particles raise the bound by {number(gap, se)} nats per row, from {number(means[1])} to "
            f"{number(means[most])}: at least so far is the guide from the exact posterior."
        ),
        next_step=""
        if verdict == "pass"
        else "Quote log_evidence rather than the ELBO; try a richer guide (full covariance, flow) or a larger encoder.",
        details={
            "bounds": {str(k): v for k, v in means.items()},
            "rows": len(gaps),
            "information": information,
        },
    )


def _applies(case: Case) -> bool:
    return case.per_row and case.posterior.kind == "guide" and case.log_weights.ndim == 2


def _run(case: Case, level: float) -> Check:
    sites = information(*case.traces)
    return bound_gap(case.log_weights, information=sum(float(site.sum()) for site in sites.values()))


bound_is_tight = Diagnostic(NAME, "How far is the ELBO below the log evidence?", _applies, _run)
