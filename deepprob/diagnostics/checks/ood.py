"""Is the posterior less certain about out-of-distribution data?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from deepprob.diagnostics.case import Case, given
from deepprob.diagnostics.check import Check, Verdict, array, number
from deepprob.diagnostics.diagnostic import Diagnostic

NAME = "out-of-distribution detection"


def check_detection(inside: ArrayLike, outside: ArrayLike, *, level: float = 0.05) -> Check:
    r"""How often an out-of-distribution row is more uncertain than an in-distribution row (area under the ROC curve).

    Args:
        inside: Uncertainty of in-distribution rows, shape ``(n,)``; on any scale, higher is less certain.
        outside: Uncertainty of out-of-distribution rows, shape ``(m,)``.
        level: The significance level of a caution or fail.

    Returns:
        The AUROC with DeLong's standard error; a caution if it is significantly below 0.8, a
        fail if significantly below 0.5.

    References:
        DeLong, DeLong, Clarke-Pearson (1988), Comparing the areas under correlated ROC curves.

    Examples:
        >>> check_detection([0.1, 0.2, 0.3], [0.4, 0.5]).value
        1.0
    """
    a, b = array(inside).ravel(), array(outside).ravel()
    ranks = stats.rankdata(np.concatenate([a, b]))
    n, m = len(a), len(b)
    # The rank among all rows less the rank within the group counts the rows of the other group below a row.
    share_below = (ranks[n:] - stats.rankdata(b)) / n  # of inside rows, for each outside row
    share_above = 1 - (ranks[:n] - stats.rankdata(a)) / m  # of outside rows, for each inside row
    auroc = float(share_below.mean())
    variance = (share_below.var(ddof=1) / m if m > 1 else 0.0) + (share_above.var(ddof=1) / n if n > 1 else 0.0)
    se = float(np.sqrt(variance))
    upper = auroc + float(stats.norm.ppf(1 - level)) * se
    verdict: Verdict = "fail" if upper < 0.5 else "caution" if upper < 0.8 else "pass"
    return Check(
        name=NAME,
        value=auroc,
        se=se,
        threshold=0.8,
        verdict=verdict,
        reading=f"The AUROC is {number(auroc, se)}: the probability that an out-of-distribution row is more uncertain "
        "than a test row (0.5 is chance).",
        next_step=""
        if verdict == "pass"
        else "Do not rely on the uncertainty far from the training data; try an ensemble or a model of the inputs.",
        details={"familiar": n, "novel": m, "level": level},
        good=">=",
    )


def _run(case: Case, level: float) -> Check:
    other = Case(case.posterior, case.ood, draws=case.draws, particles=case.particles, seed=case.seed)
    if len(case.sites) == 1 and case.supervised:
        predictions = (x.posterior.predict(*given(x.inputs), draws=x.draws, seed=x.seed) for x in (case, other))
        found = [array(p.epistemic).reshape(len(p), -1).mean(1) for p in predictions]
    else:
        found = [-array(x.posterior.elbo(*given(x.batch), seed=x.seed)).ravel() for x in (case, other)]
    inside, outside = (x.finite(values, "uncertainty") for x, values in zip((case, other), found, strict=True))
    return check_detection(inside, outside, level=level)


ood_detection = Diagnostic(
    NAME,
    "Is the posterior less certain about out-of-distribution data?",
    lambda case: case.ood is not None,
    _run,
    about="data",
)
