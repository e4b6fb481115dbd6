"""How far is the ELBO below the log evidence?"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Array, Check, Verdict, array, number
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.diagnostics.remedies import RICHER_ENCODER, RICHER_GUIDE
from deepprob.posteriors.guide_accuracy import GuideAccuracy

_NATS_PER_NUMBER, _HARD_NATS_PER_NUMBER = 0.1, 0.5
_GLOBAL_NATS, _LEAST_NATS = 0.03, 0.1
NAME, _GLOBAL_NAME = "tightness of the bound", "tightness of the bound, global latents"
_ROUNDS = 200  # of the bootstrap


def bounds(log_weights: ArrayLike) -> dict[int, Array]:
    r"""Importance-weighted bounds of every row for 1, 10, 100, ... particles, computed from one set of weights.

    .. math:: \mathcal{L}_K = \mathbb{E} \log \frac{1}{K} \sum_{k=1}^K w_k

    The expectation is a mean over disjoint blocks of K weights. The bounds rise with K in expectation; between
    divisors of the number of weights, one a multiple of the other, they always rise, as the logarithm is concave.

    Args:
        log_weights: ``log p(x, z_k) - log q(z_k | x)``, shape ``(particles, rows)``.

    Returns:
        Bounds of shape ``(rows,)`` by number of particles; the last one uses all particles.

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


def check_tightness(log_weights: ArrayLike, *, numbers: int = 1) -> Check:
    """The gap between importance-weighted bound and ELBO: a lower bound of the KL from guide to exact posterior.

    Args:
        log_weights: ``log p(x, z_k) - log q(z_k | x)``, shape ``(particles, rows)``.
        numbers: How many latent numbers a row has.

    Returns:
        The gap in nats per row. It is a caution above 0.1 nats for every latent number, which a normal guide has whose
        means are 0.45 posterior sds off, and a fail above 0.5, of means one sd off.

    Examples:
        The exact posterior has equal weights and no gap:

        >>> check_tightness(np.full((100, 5), -3.0)).value
        0.0
    """
    sequence = bounds(log_weights)
    most = max(sequence)
    gaps = sequence[most] - sequence[1]
    gap = float(gaps.mean())
    se = float(gaps.std(ddof=1) / np.sqrt(len(gaps))) if len(gaps) > 1 else None
    limit, hard = _NATS_PER_NUMBER * numbers, _HARD_NATS_PER_NUMBER * numbers
    lower = gap - 1.645 * (se or 0.0)
    verdict: Verdict = "fail" if lower > hard else "caution" if lower > limit else "pass"
    means = {size: float(values.mean()) for size, values in sequence.items()}
    return Check(
        name=NAME,
        value=gap,
        se=se,
        threshold=limit,
        verdict=verdict,
        reading=(
            f"{most} particles raise the bound by {number(gap, se)} nats per row, from {number(means[1])} to "
            f"{number(means[most])}: the guide is at least this far from the exact posterior."
        ),
        next_step="" if verdict == "pass" else RICHER_ENCODER,
        details={
            "bounds": {str(k): v for k, v in means.items()},
            "rows": len(gaps),
            "numbers": numbers,
        },
        unit="nats per row",
    )


def check_global_tightness(log_weights: ArrayLike, *, numbers: int) -> Check:
    """The gap between importance-weighted bound and ELBO of all rows together, where all rows share latents.

    Args:
        log_weights: ``log p(x, z_k) - log q(z_k)`` of the training data, shape ``(particles,)``.
        numbers: How many numbers a draw has.

    Returns:
        The gap in nats, at most the KL from guide to posterior. It is a caution surely above 0.03 nats for every
        number, at least 0.1 nats, and a fail above ten times that.

    Examples:
        >>> check_global_tightness(np.full(100, -3.0), numbers=2).verdict
        'pass'
    """
    weights, generator = array(log_weights), np.random.default_rng(0)
    again = weights[generator.integers(0, len(weights), (_ROUNDS, len(weights)))]
    gap, others = (logsumexp(x, axis=-1) - np.log(len(weights)) - x.mean(-1) for x in (weights, again))
    se, limit = float(others.std(ddof=1)), max(_GLOBAL_NATS * numbers, _LEAST_NATS)
    surely = float(gap) - 1.645 * se
    verdict: Verdict = "fail" if surely > 10 * limit else "caution" if surely > limit else "pass"
    return Check(
        name=_GLOBAL_NAME,
        value=float(gap),
        se=se,
        threshold=limit,
        verdict=verdict,
        reading=f"The KL divergence from the guide to the posterior of {numbers} numbers is at least "
        f"{number(float(gap), se)} nats, by {len(weights)} draws on the training data.",
        next_step="" if verdict == "pass" else RICHER_GUIDE,
        details={"numbers": numbers, "particles": len(weights)},
        unit="nats",
    )


def check_divergence(gap: float, se: float, *, numbers: int) -> Check:
    """The divergence from guide to posterior of many numbers that all rows share, by gradients at the guide's draws.

    Args:
        gap: The divergence, nats for every number.
        se: The standard error.
        numbers: How many numbers a draw has.

    Returns:
        The divergence; a caution if it is surely above 0.03 nats for every number. Never a fail: the second order
        overrates a guide that is much too wide in a few directions.

    Examples:
        >>> check_divergence(0.01, 0.003, numbers=400).verdict, check_divergence(0.4, 0.01, numbers=400).verdict
        ('pass', 'caution')
    """
    verdict: Verdict = "caution" if gap - 1.645 * se > _GLOBAL_NATS else "pass"
    return Check(
        name=_GLOBAL_NAME,
        value=gap,
        se=se,
        threshold=_GLOBAL_NATS,
        verdict=verdict,
        reading=f"To second order, the KL divergence from the guide to the posterior is {number(gap, se)} nats for "
        f"each of {numbers} numbers, by the gradients at draws of the guide on the training data, which tell widths "
        "and correlations.",
        next_step="" if verdict == "pass" else RICHER_GUIDE,
        details={"numbers": numbers},
        unit="nats per number",
    )


def _applies_globally(case: Case) -> bool:
    found = case.accuracy
    if found is None:
        return False
    return found.divergence is not None or (bool(found.by_weights) and {*found.by_weights} == {*found.by_gradients})


def _run_globally(case: Case, level: float) -> Check:
    found = cast(GuideAccuracy, case.accuracy)  # a check that applies has one
    if found.divergence is not None:
        return check_divergence(*found.divergence, numbers=found.numbers)
    return check_global_tightness(found.log_weights, numbers=found.numbers)


def _applies(case: Case) -> bool:
    return case.per_row and case.posterior.kind == "guide" and case.log_weights.ndim == 2


def _run(case: Case, level: float) -> Check:
    found = case.posterior.structure
    return check_tightness(case.log_weights, numbers=sum(found.sites[name].numbers for name in found.local))


bound_tightness = Diagnostic(NAME, "How far is the ELBO below the log evidence?", _applies, _run, about="posterior")
global_tightness = Diagnostic(
    _GLOBAL_NAME,
    "How far is the guide from the posterior of all numbers together?",
    _applies_globally,
    _run_globally,
    about="posterior",
)
