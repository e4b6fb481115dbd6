"""Do predictions score better than a baseline that ignores the inputs?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats

from deepprob.diagnostics.case import Case, Diagnostic
from deepprob.diagnostics.check import Array, Check, Verdict, array, number
from deepprob.diagnostics.checks.calibration import class_probs, one_label

NAME = "predictive skill"


def crps(draws: ArrayLike, target: ArrayLike) -> Array:
    r"""Continuous ranked probability score of draws, in the target's units; lower is better.

    .. math:: \mathbb{E}|Y - y| - \tfrac12 \mathbb{E}|Y - Y'|

    Args:
        draws: Shape ``(K, *batch)``.
        target: Shape ``batch``.

    References:
        Gneiting, Raftery (2007), Strictly proper scoring rules, prediction, and estimation.

    Examples:
        >>> crps(np.full((10, 1), 2.0), [5.0]).tolist()
        [3.0]
    """
    values, y = np.sort(array(draws), 0), array(target)
    count = len(values)
    weight = (2 * np.arange(1, count + 1) - count - 1).reshape(-1, *[1] * y.ndim)
    # Pairs of a draw with itself are left out, so that the estimate is unbiased for any number of draws.
    return array(np.abs(values - y).mean(0) - (weight * values).sum(0) / (count * max(count - 1, 1)))


def brier(probs: ArrayLike, labels: ArrayLike) -> Array:
    """Brier score of each row: squared distance of the probabilities from the true class; lower is better.

    Examples:
        >>> brier([[1.0, 0.0], [0.5, 0.5]], [0, 1]).tolist()
        [0.0, 0.5]
    """
    p, y = array(probs), array(labels).astype(np.int64)
    return np.asarray(np.square(p - np.eye(p.shape[1])[y]).sum(1))


def check_skill(
    nll: ArrayLike,
    baseline: ArrayLike,
    *,
    level: float = 0.05,
    details: dict[str, Any] | None = None,
) -> Check:
    """Whether predictions score better than the marginal distribution of the targets.

    Args:
        nll: Negative log predictive density of each row, nats.
        baseline: Negative log density of each row under a prediction that ignores the inputs, nats.
        level: The false-alarm rate for predictions that are not worse than the baseline.
        details: Further scores to store in the check.

    Returns:
        The mean negative log-likelihood; a fail if it is significantly above the baseline.

    Examples:
        >>> check_skill(np.full(9, 2.0), np.full(9, 1.0)).verdict, check_skill(np.full(9, 0.5), np.full(9, 1.0)).verdict
        ('fail', 'pass')
    """
    scores, reference = array(nll), array(baseline)
    rows = len(scores)
    mean, base = float(scores.mean()), float(reference.mean())
    loss = scores - reference
    se, paired = (float(v.std(ddof=1) / np.sqrt(rows)) if rows > 1 else 0.0 for v in (scores, loss))
    worse = float(loss.mean()) - float(stats.norm.ppf(1 - level)) * paired > 0
    verdict: Verdict = "fail" if worse else "pass"
    gain = number(-float(loss.mean()), paired)
    return Check(
        name=NAME,
        value=mean,
        se=se,
        threshold=base,
        verdict=verdict,
        reading=f"The negative log-likelihood is {number(mean, se)} nats per row; a baseline without the inputs has "
        f"{number(base)} (gain {gain})" + (": the predictions are worse than the baseline." if worse else "."),
        next_step="" if not worse else "Check that inputs and targets belong together, fit longer, or simplify.",
        details={"nll": mean, "nll_se": se, "baseline": base, **(details or {})},
    )


def _mean_se(values: Array) -> dict[str, float]:
    rows = values.reshape(len(values), -1).mean(1)
    return {"mean": float(rows.mean()), "se": float(rows.std(ddof=1) / np.sqrt(len(rows)))}


def _nll(case: Case) -> Array:
    density = array(case.prediction.log_prob(torch.as_tensor(case.target)))
    if density.shape[:1] != (len(case.target),):
        raise ValueError(f"The rows of {case.site} have one distribution together, which does not split into rows.")
    return array(-density.reshape(len(case.target), -1).sum(1))


def _run(case: Case, level: float) -> Check:
    nll, rows = _nll(case), len(case.target)
    if case.prediction.kind == "real":
        y = case.target.reshape(rows, -1)
        flat = stats.norm.logpdf(y, y.mean(0), np.maximum(y.std(0), 1e-12)).sum(1)
        residual = case.target - array(case.prediction.mean).reshape(case.target.shape)
        details: dict[str, Any] = {
            "crps": _mean_se(crps(case.replicates, case.target)),
            "rmse": float(np.sqrt(np.square(residual).mean())),
        }
        return check_skill(nll, -flat, level=level, details=details)
    probs, labels = class_probs(case), case.target.reshape(rows).astype(np.int64)
    share = np.bincount(labels, minlength=probs.shape[1]) / rows
    details = {
        "brier": _mean_se(brier(probs, labels)),
        "accuracy": _mean_se((probs.argmax(1) == labels) * 1.0),
    }
    return check_skill(nll, -np.log(share[labels]), level=level, details=details)


predictive_skill = Diagnostic(
    NAME,
    "Do predictions score better than a baseline that ignores the inputs?",
    lambda case: (case.supervised and case.prediction.kind == "real") or one_label(case),
    _run,
    about="predictions",
    tests=True,
    by_site=True,
)
