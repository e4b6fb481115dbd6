"""How heavy is the tail of the guide's importance weights? (Pareto k-hat)"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import ArrayLike

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Check, Verdict, array, number
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.diagnostics.remedies import RICHER_ENCODER, RICHER_GUIDE
from deepprob.posteriors.arviz_compat import khat_limit, psis
from deepprob.posteriors.guide_accuracy import GuideAccuracy

# k-hat exceeds its limit in 35% (one dimension) to 70% (eight dimensions) of rows for a Gaussian guide with 0.7 times
# the standard deviations of the posterior, and in 20 to 30% of rows for one with 0.8 times.
_ROW_SHARE = 0.3
# In more dimensions k-hat is high for every inexact guide, even if its marginals are right (Yao et al. 2018).
MAX_DIMENSIONS = 100
_GLOBAL, _LOCAL = "Pareto k-hat, global latents", "Pareto k-hat, local latents"
_ROUNDS = 40  # of the bootstrap
_LEVEL = 0.5  # nats, of the sd of log-weights
_CAUSES = "the posterior reaches further than the guide, or the guide is so wide that few draws are near the posterior"


def khat_se(log_weights: ArrayLike) -> float:
    """Standard error of k-hat, by a bootstrap over the draws.

    Examples:
        >>> 0.05 < khat_se(np.random.default_rng(0).normal(size=1000)) < 0.3
        True
    """
    weights, generator = array(log_weights), np.random.default_rng(0)
    again = psis(weights[generator.integers(0, len(weights), (_ROUNDS, len(weights)))])[1]
    again = again[np.isfinite(again)]  # of equal weights beyond the tail's start, k-hat is infinite
    return float(again.std(ddof=1)) if len(again) > 1 else 0.0


def check_global_khat(log_weights: ArrayLike) -> Check:
    """Pareto k-hat of one set of importance weights, those of the global latents.

    The weights see only what the guide draws. A high k-hat says that the posterior reaches further than the guide, in
    some direction, or that the guide is so wide that few of its draws are near the posterior. A low one does not say
    that the guide is right: it may be too wide, or miss a mode.

    Args:
        log_weights: ``log p(x, z_k) - log q(z_k)`` of the whole training data, shape ``(particles,)``.

    Returns:
        k-hat, its standard error and its limit: a caution if it is above the limit, a fail if it is surely above
        one, where not even the mean of the weights is finite. A pass where the sd of the log-weights is at most 0.5
        nats: then the divergence from the guide to the posterior is about 0.1 nats, however heavy the tail.

    References:
        Yao, Vehtari, Simpson, Gelman (2018), Yes, but did it work?: evaluating variational
        inference.

    Examples:
        >>> check_global_khat(np.random.default_rng(0).standard_cauchy(1000)).verdict
        'fail'
    """
    weights = array(log_weights)
    smoothed, k = psis(weights)
    khat, limit, spread = float(k), khat_limit(len(weights)), float(weights.std())
    se = khat_se(weights)
    level = spread <= _LEVEL  # k-hat is the shape of the tail, whatever its size: of no account where all are alike
    surely = khat - 1.645 * se
    verdict: Verdict = "pass" if level or khat <= limit else "fail" if surely > 1 else "caution"
    size = 1 / float(np.square(np.exp(smoothed)).sum())
    reading = f"Pareto k-hat is {number(khat, se)}; importance weights are reliable up to {limit:.2f}. "
    reading += (
        f"The log-weights of all draws differ by {spread:.2g} nats only."
        if level
        else f"The weights are worth {size:.0f} equal draws of {len(weights)}."
        if verdict == "pass"
        else f"A few draws have most of the weight: {_CAUSES}."
    )
    return Check(
        name=_GLOBAL,
        value=khat,
        se=se,
        threshold=None if level else limit,
        verdict=verdict,
        reading=reading,
        next_step="" if verdict == "pass" else RICHER_GUIDE,
        details={"particles": len(weights), "effective_draws": size, "log_weights_sd": spread},
    )


def check_local_khat(log_weights: ArrayLike) -> Check:
    """The share of rows with a Pareto k-hat above its limit.

    Args:
        log_weights: ``log p(x, z_k) - log q(z_k | x)``, shape ``(particles, rows)``.

    Returns:
        The share; a caution if it is significantly above 30%. Rows whose log-weights have an sd of at most 0.5 nats do
        not count, see `check_global_khat`.

    Examples:
        >>> check_local_khat(np.zeros((100, 7))).value
        0.0
    """
    weights = array(log_weights)
    particles, rows = weights.shape
    _, khats = psis(weights.T)
    limit = khat_limit(particles)
    share = float(((khats > limit) & (weights.std(0) > _LEVEL)).mean())
    se = float(np.sqrt(share * (1 - share) / rows))
    verdict: Verdict = "caution" if share - 1.645 * se > _ROW_SHARE else "pass"
    return Check(
        name=_LOCAL,
        value=share,
        se=se,
        threshold=_ROW_SHARE,
        unit="of rows",
        verdict=verdict,
        reading=(
            f"{share:.0%} of {rows} rows have unequal weights and a Pareto k-hat above {limit:.2f} (median of all "
            f"{np.median(khats):.2f}): "
            + (
                "in most rows the guide reaches as far as the posterior."
                if verdict == "pass"
                else f"in too many rows a few draws have most of the weight: {_CAUSES}."
            )
        ),
        next_step="" if verdict == "pass" else RICHER_ENCODER,
        details={
            "particles": particles,
            "rows": rows,
            "khat_limit": limit,
            "khat_quantiles": dict(
                zip(("5%", "50%", "95%"), np.quantile(khats, [0.05, 0.5, 0.95], method="nearest"), strict=True)
            ),
        },
    )


def _applies_global(case: Case) -> bool:
    """Only where the numbers are few: in many dimensions k-hat is high for every guide that is not exact."""
    found = case.accuracy
    if found is None or found.points:
        return False
    numbers = sum(x.shape[1] for x in found.by_gradients.values())
    return numbers <= MAX_DIMENSIONS and found.by_gradients.keys() <= set(found.together)


def _run_global(case: Case, level: float) -> Check:
    return check_global_khat(cast(GuideAccuracy, case.accuracy).log_weights)  # a check that applies has one


def _applies_local(case: Case) -> bool:
    if not case.per_row or case.posterior.kind != "guide":
        return False
    guide, local = case.traces[0], case.posterior.structure.local
    dimensions = sum(guide.nodes[site]["value"][0, 0].numel() for site in local)
    return dimensions <= MAX_DIMENSIONS and case.log_weights.ndim == 2


def _run_local(case: Case, level: float) -> Check:
    return check_local_khat(case.log_weights)


_QUESTION = "Do enough of the draws of the guide lie where the posterior is?"
global_khat = Diagnostic(_GLOBAL, _QUESTION, _applies_global, _run_global, about="posterior")
local_khat = Diagnostic(_LOCAL, _QUESTION, _applies_local, _run_local, about="posterior")
