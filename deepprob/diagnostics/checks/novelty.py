"""Is the posterior less sure about data of another kind?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from deepprob.diagnostics.case import Case, Diagnostic
from deepprob.diagnostics.check import Array, Check, Verdict, array, number

NAME = "novelty is noticed"


def noticed(familiar: ArrayLike, novel: ArrayLike, *, level: float = 0.05) -> Check:
    r"""How often a novel row is more uncertain than a familiar one (area under the ROC curve).

    Args:
        familiar: Uncertainty of rows like the training data, shape ``(n,)``; any scale, higher is
            less sure.
        novel: Uncertainty of rows of another kind, shape ``(m,)``.
        level: How surely a caution or fail must be meant.

    Returns:
        The AUROC with DeLong's standard error; a caution if it is surely below 0.8, a fail if
        surely below 0.5.

    References:
        DeLong, DeLong, Clarke-Pearson (1988), Comparing the areas under correlated ROC curves.

    Examples:
        >>> noticed([0.1, 0.2, 0.3], [0.4, 0.5]).value
        1.0
    """
    a, b = array(familiar).ravel(), array(novel).ravel()
    ranks = stats.rankdata(np.concatenate([a, b]))
    n, m = len(a), len(b)
    # How many of the other group each row is above, from ranks overall and ranks within its own
    # group.
    below_novel = (ranks[n:] - stats.rankdata(b)) / n
    above_familiar = 1 - (ranks[:n] - stats.rankdata(a)) / m
    auroc = float(below_novel.mean())
    variance = (below_novel.var(ddof=1) / m if m > 1 else 0.0) + (above_familiar.var(ddof=1) / n if n > 1 else 0.0)
    se = float(np.sqrt(variance))
    sure = auroc + float(stats.norm.ppf(1 - level)) * se
    verdict: Verdict = "fail" if sure < 0.5 else "caution" if sure < 0.8 else "pass"
    return Check(
        name=NAME,
        value=auroc,
        se=se,
        threshold=0.8,
        verdict=verdict,
        reading=f"A row of the other kind is the less certain one {number(auroc, se)} of the time (0.5 is chance).",
        next_step=""
        if verdict == "pass"
        else "Do not rely on the uncertainty far from the data: try an ensemble, or a model of the inputs.",
        details={"familiar": n, "novel": m, "level": level},
    )


def _uncertainty(case: Case) -> Array:
    if case.supervised:
        values = array(case.prediction.epistemic)
        return np.asarray(values.reshape(len(values), -1).mean(1))
    return -array(case.posterior.elbo(*case.batch, seed=case.seed)).ravel()


def _run(case: Case, level: float) -> Check:
    other = Case(case.posterior, case.ood, draws=case.draws, particles=case.particles, seed=case.seed)
    return noticed(_uncertainty(case), _uncertainty(other), level=level)


novelty_is_noticed = Diagnostic(
    NAME,
    "Is the posterior less sure about data of another kind?",
    lambda case: case.ood is not None,
    _run,
)
