"""Could importance weights correct the guide to the exact posterior? (Pareto k-hat)"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from deepprob.diagnostics.case import Case, Diagnostic, given
from deepprob.diagnostics.check import Check, Verdict, array, number
from deepprob.posteriors.arviz_compat import psis

# k-hat exceeds its limit in 35% (one dimension) to 70% (eight dimensions) of rows for a Gaussian guide with 0.7 times
# the standard deviations of the posterior, and in 20 to 30% of rows for one with 0.8 times.
_ROW_SHARE = 0.3
# In more dimensions k-hat is high for every inexact guide, even if its marginals are right (Yao et al. 2018).
MAX_DIMENSIONS = 100
GLOBAL_PARTICLES = 1000
_GLOBAL, _LOCAL = "Pareto k-hat, global latents", "Pareto k-hat, local latents"
_ADVICE = (
    "Try a richer guide (full covariance, flow) or fit longer. In many dimensions k-hat can be high although the "
    "marginals are right: compare the other checks."
)
_LEVEL = 0.1  # nats, of the sd of log-weights


def khat_limit(particles: int) -> float:
    r"""The largest reliable k-hat for a number of draws, :math:`\min(1 - 1 / \log_{10} S, 0.7)`.

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


def check_global_khat(log_weights: ArrayLike) -> Check:
    """Pareto k-hat of one set of importance weights, those of the global latents.

    Args:
        log_weights: ``log p(x, z_k) - log q(z_k)`` of the whole training data, shape
            ``(particles,)``.

    Returns:
        k-hat, its standard error and its limit; never worse than a caution, as k-hat may be high in many
        dimensions although the marginals are right. A pass also where the sd of the log-weights is at most 0.1 nats:
        then the divergence from the guide to the posterior is about 0.005 nats.

    References:
        Yao, Vehtari, Simpson, Gelman (2018), Yes, but did it work?: evaluating variational
        inference.

    Examples:
        >>> check_global_khat(np.random.default_rng(0).standard_cauchy(1000)).verdict
        'caution'
    """
    weights = array(log_weights)
    smoothed, k = psis(weights)
    khat, limit, spread = float(k), khat_limit(len(weights)), float(weights.std())
    level = spread <= _LEVEL  # k-hat is the shape of the tail, whatever its size: of no account where all are alike
    verdict: Verdict = "pass" if khat <= limit or level else "caution"
    size = 1 / float(np.square(np.exp(smoothed)).sum())
    reading = f"Pareto k-hat is {number(khat, khat_se(khat, len(weights)))} (reliable up to {limit:.2f}): " + (
        f"importance weights can correct the guide ({size:.0f} effective of {len(weights)} draws)."
        if khat <= limit
        else f"of no account, because the log-weights of all draws differ by {spread:.2g} nats only."
        if level
        else "the guide misses parts of the posterior, and importance weights cannot correct it."
    )
    return Check(
        name=_GLOBAL,
        value=khat,
        se=khat_se(khat, len(weights)),
        threshold=limit,
        verdict=verdict,
        reading=reading,
        next_step="" if verdict == "pass" else _ADVICE,
        details={"particles": len(weights), "effective_draws": size, "log_weights_sd": spread},
    )


def check_local_khat(log_weights: ArrayLike) -> Check:
    """The share of rows with a Pareto k-hat above its limit.

    Args:
        log_weights: ``log p(x, z_k) - log q(z_k | x)``, shape ``(particles, rows)``.

    Returns:
        The share; a caution if it is significantly above 30%.

    Examples:
        >>> check_local_khat(np.zeros((100, 7))).value
        0.0
    """
    weights = array(log_weights)
    particles, rows = weights.shape
    _, khats = psis(weights.T)
    limit = khat_limit(particles)
    share = float((khats > limit).mean())
    se = float(np.sqrt(share * (1 - share) / rows))
    verdict: Verdict = "caution" if share - 1.645 * se > _ROW_SHARE else "pass"
    return Check(
        name=_LOCAL,
        value=share,
        se=se,
        threshold=_ROW_SHARE,
        verdict=verdict,
        reading=(
            f"{share:.0%} of {rows} rows have a Pareto k-hat above {limit:.2f} (median {np.median(khats):.2f}): "
            + (
                "importance weights could correct the guide in most rows."
                if verdict == "pass"
                else "the guide misses parts of the posterior in too many rows."
            )
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


def _applies_global(case: Case) -> bool:
    if case.posterior.kind != "guide" or not case.has_latents("global"):
        return False
    if not case.knows_train:
        raise ValueError("Global latents are conditioned on the training data, which were not given: pass train=.")
    # One weight covers all rows, so the codes of all rows count as dimensions.
    drawn = case.posterior.sample(*given(case.train), draws=1, seed=case.seed)
    dimensions = sum(drawn[name][0].numel() for name in case.posterior.latent_sites)
    if dimensions > MAX_DIMENSIONS:
        raise ValueError(
            f"The guide has {dimensions} dimensions. In more than {MAX_DIMENSIONS}, k-hat is high for every inexact "
            "guide, even if its marginals are right."
        )
    return True


def _run_global(case: Case, level: float) -> Check:
    weights = case.posterior.log_weights(*given(case.train), particles=GLOBAL_PARTICLES, seed=case.seed)
    return check_global_khat(weights)


def _applies_local(case: Case) -> bool:
    if not case.per_row or case.posterior.kind != "guide":
        return False
    guide, local = case.traces[0], case.posterior.structure.local
    dimensions = sum(guide.nodes[site]["value"][0, 0].numel() for site in local)
    return dimensions <= MAX_DIMENSIONS and case.log_weights.ndim == 2


def _run_local(case: Case, level: float) -> Check:
    return check_local_khat(case.log_weights)


_QUESTION = "Could importance weights correct the guide to the exact posterior?"
global_khat = Diagnostic(_GLOBAL, _QUESTION, _applies_global, _run_global, about="posterior")
local_khat = Diagnostic(_LOCAL, _QUESTION, _applies_local, _run_local, about="posterior")
