"""Could the guide be corrected to the exact posterior by importance weights?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from deepprob.diagnostics.case import Case, Diagnostic
from deepprob.diagnostics.check import Check, Verdict, array, number
from deepprob.posteriors.arviz_compat import psis

# A Gaussian guide whose standard deviations are 0.7 of the posterior's exceeds the limit in 35 % (one dimension) to
# 70 % (eight) of rows; one with 0.8 of them in 20 to 30 %.
_SHARE = 0.3
# In more dimensions k-hat is high for every guide that is not exact, and says nothing of marginals (Yao et al. 2018).
MOST_DIMENSIONS = 100
GLOBAL_PARTICLES = 1000
_ADVICE = (
    "Try a richer guide (full covariance, flow) or fit longer; trust what other checks confirm: in many dimensions "
    "k-hat is high though marginals may be right."
)


def khat_limit(particles: int) -> float:
    r"""The largest reliable k-hat for so many draws, :math:`\min(1 - 1 / \log_{10} S, 0.7)`.

    Examples:
        >>> khat_limit(100), khat_limit(100_000)
        (0.5, 0.7)
    """
    return min(1 - 1 / float(np.log10(particles)), 0.7)


def khat_se(khat: float, particles: int) -> float:
    r"""Standard error of k-hat, :math:`(1 + k) / \sqrt{M}`, of a Pareto fit to the M largest weights.

    Examples:
        >>> round(khat_se(0.0, 10_000), 4)
        0.0577
    """
    tail = min(0.2 * particles, 3 * np.sqrt(particles))
    return float((1 + max(khat, 0.0)) / np.sqrt(tail))


def importance(log_weights: ArrayLike) -> Check:
    """Pareto k-hat of one set of weights, those of the global latents.

    Args:
        log_weights: ``log p(x, z_k) - log q(z_k)`` of the whole training data, shape
            ``(particles,)``.

    Returns:
        k-hat, its standard error and its limit; never worse than a caution, as k-hat fails first in
        high dimensions.

    References:
        Yao, Vehtari, Simpson, Gelman (2018), Yes, but did it work?: evaluating variational
        inference.

    Examples:
        >>> importance(np.random.default_rng(0).standard_cauchy(1000)).verdict
        'caution'
    """
    weights = array(log_weights)
    smoothed, k = psis(weights)
    khat, limit = float(k), khat_limit(len(weights))
    verdict: Verdict = "pass" if khat <= limit else "caution"
    size = 1 / float(np.square(np.exp(smoothed)).sum())
    reading = f"k-hat is {number(khat, khat_se(khat, len(weights)))} (up to {limit:.2f} is reliable): " + (
        f"importance weights can correct the guide ({size:.0f} effective of {len(weights)} draws)."
        if verdict == "pass"
        else "the guide misses parts of the posterior that importance weights cannot restore."
    )
    return Check(
        name="k-hat of global latents",
        value=khat,
        se=khat_se(khat, len(weights)),
        threshold=limit,
        verdict=verdict,
        reading=reading,
        next_step="" if verdict == "pass" else _ADVICE,
        details={"particles": len(weights), "effective_draws": size},
    )


def row_importance(log_weights: ArrayLike) -> Check:
    """The share of rows whose k-hat is beyond its limit.

    Args:
        log_weights: ``log p(x, z_k) - log q(z_k | x)``, shape ``(particles, rows)``.

    Returns:
        The share; a caution if it is surely above 30 %.

    Examples:
        >>> row_importance(np.zeros((100, 7))).value
        0.0
    """
    weights = array(log_weights)
    particles, rows = weights.shape
    _, khats = psis(weights.T)
    limit = khat_limit(particles)
    share = float((khats > limit).mean())
    se = float(np.sqrt(share * (1 - share) / rows))
    verdict: Verdict = "caution" if share - 1.645 * se > _SHARE else "pass"
    return Check(
        name="k-hat of local latents",
        value=share,
        se=se,
        threshold=_SHARE,
        verdict=verdict,
        reading=(
            f"{share:.0%} of {rows} rows have a k-hat above {limit:.2f} (median {np.median(khats):.2f}): "
            + ("most" if verdict == "pass" else "too many")
            + (" could be corrected by importance weights." if verdict == "pass" else " miss parts of their posterior.")
        ),
        next_step="" if verdict == "pass" else _ADVICE,
        details={
            "particles": particles,
            "rows": rows,
            "khat_limit": limit,
            "khat_quantiles": dict(
                zip(("5%", "50%", "95%"), np.quantile(khats, [0.05, 0.5, 0.95], method="nearest"), strict=True)
            ),
            "khat_se": khat_se(float(np.median(khats)), particles),
        },
    )


def _applies_globally(case: Case) -> bool:
    if case.train is None or case.posterior.kind != "guide" or not case.has_latents("global"):
        return False
    local = case.has_latents("local")  # then rows count as dimensions too: their codes are part of the one weight
    batch = case.program.accept(case.train) if local else ()
    drawn = case.posterior.sample(*batch, draws=1, seed=case.seed)
    return sum(value[0].numel() for value in drawn.values()) <= MOST_DIMENSIONS


def _run_globally(case: Case, level: float) -> Check:
    batch = case.program.accept(case.train)
    return importance(case.posterior.log_weights(*batch, particles=GLOBAL_PARTICLES, seed=case.seed))


def _applies_locally(case: Case) -> bool:
    if not case.per_row or case.posterior.kind != "guide":
        return False
    guide, local = case.traces[0], case.posterior.structure.local
    dimensions = sum(guide.nodes[site]["value"][0, 0].numel() for site in local)
    return dimensions <= MOST_DIMENSIONS and case.log_weights.ndim == 2


def _run_locally(case: Case, level: float) -> Check:
    return row_importance(case.log_weights)


_QUESTION = "Could importance weights correct the guide to the exact posterior?"
khat_of_global_latents = Diagnostic("k-hat of global latents", _QUESTION, _applies_globally, _run_globally)
khat_of_local_latents = Diagnostic("k-hat of local latents", _QUESTION, _applies_locally, _run_locally)
