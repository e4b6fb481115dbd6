"""Does every row count once in the likelihood?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Check, Verdict, array
from deepprob.diagnostics.diagnostic import Diagnostic

NAME = "weight of the likelihood"
_TOLERANCE = 1e-4
_MOST = 4.0  # as a factor: a posterior with so many times the rows has half the width


def check_weight(scale: ArrayLike, site: str, kl_weight: float = 1.0) -> Check:
    """How often every row counts in the likelihood, against the prior.

    A row counts once in Bayes' rule. It counts more or less often under ``pyro.poutine.scale``, in a plate whose size
    is not the number of rows, or if the KL has another weight than one at the end of the fit.

    Args:
        scale: The scale of the site's log-probability in a run on all rows: one number, or one for each value.
        site: The observed site.
        kl_weight: The weight of the KL at the end of the fit.

    Returns:
        The mean weight of the values that count; a caution if one of them is not 1, a fail if the mean is above 4 or
        below a quarter, or none counts.

    Examples:
        >>> [check_weight(weight, "y").verdict for weight in (1.0, 2.0, 10.0, 0.0)]
        ['pass', 'caution', 'fail', 'fail']
    """
    weights = np.atleast_1d(array(scale)) / max(kl_weight, 1e-12)
    counted = weights[~(weights == 0)]  # a weight of zero is a mask
    low, high = (float(counted.min()), float(counted.max())) if len(counted) else (0.0, 0.0)
    good = bool(len(counted) and (np.abs(counted - 1) <= _TOLERANCE).all())
    mean = float(counted.mean()) if len(counted) else 0.0
    verdict: Verdict = "pass" if good else "caution" if 1 / _MOST <= mean <= _MOST else "fail"
    times = f"{mean:.3g} times" if high - low <= _TOLERANCE * high else f"from {low:.3g} to {high:.3g} times"
    effect = "narrow" if mean > 1 else "wide"
    if good:
        reading = f"Every row counts once in the likelihood of {site}."
    elif not 0 < mean < np.inf:
        reading = f"The likelihood of {site} has a weight of {mean:.3g}: the posterior does not learn from the data."
    else:
        reading = f"The rows count {times} in the likelihood of {site}: the posterior is " + (
            f"as {effect} as with {mean:.3g} times as many rows." if abs(mean - 1) > 0.01 else "that of weighted rows."
        )
    return Check(
        name=NAME,
        value=mean,
        se=None,
        threshold=None,
        verdict=verdict,
        reading=reading,
        next_step=""
        if good
        else "Remove poutine.scale, make the size of the plate the number of rows, or let a KL warm-up end at 1. If "
        "you temper on purpose, read all uncertainties as those of a tempered posterior.",
        details={"lowest": low, "highest": high, "kl_weight": kl_weight},
    )


def _run(case: Case, level: float) -> Check:
    history = case.posterior.history
    weights = history.epochs.get("kl_weight", [1.0])
    last = weights[history.best_epoch - 1] if history.best_epoch else weights[-1]
    return check_weight(case.scale, case.site, last)


likelihood_weight = Diagnostic(
    NAME,
    "Does every row count once in the likelihood?",
    lambda case: bool(case.sites),
    _run,
    about="posterior",
    by_site=True,
)
