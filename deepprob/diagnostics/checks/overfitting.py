"""Are training rows explained better than held-out rows?"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Check, Verdict, array, number
from deepprob.diagnostics.diagnostic import Diagnostic

NAME = "overfitting"
_CAUTION, _FAIL = 0.5, 2.0  # sds over rows
_STEPS = 50  # at least so many of the last steps give the score of training rows


def check_overfitting(
    train: float, held_out: ArrayLike, training_rows: int, *, rightly: float = 0.0, level: float = 0.05
) -> Check:
    r"""Whether training rows have a higher log-likelihood than held-out rows.

    The scores of both kinds of rows are bounds on the log evidence where latents belong to rows. A posterior over
    weights is conditioned on the training rows, so some difference is right: for a linear model with normal noise
    :math:`\tfrac12 \log(1 + h)`, where new rows have leverage :math:`h`. The variance of the log-likelihood over draws,
    :math:`v = h + \tfrac32 h^2`, bounds it: :math:`\tfrac12 \log(1 + v)` is subtracted.

    Args:
        train: The mean score of the training rows, nats.
        held_out: The scores of held-out rows, nats.
        training_rows: Number of training rows.
        rightly: How much higher the mean may rightly be for training rows, nats.
        level: The false-alarm rate for two means that are the same.

    Returns:
        The rest of the difference; if it is significant, a caution above half an sd over rows, a fail above two.

    Examples:
        >>> scores = np.random.default_rng(0).normal(size=200)
        >>> [check_overfitting(mean, scores, 500).verdict for mean in (0.0, 1.0, 4.0)]
        ['pass', 'caution', 'fail']
    """
    scores = array(held_out)
    rows, sd = len(scores), float(scores.std(ddof=1))
    mean = float(scores.mean())
    gap, se = train - mean - rightly, sd * math.sqrt(1 / len(scores) + 1 / training_rows)
    significant = gap > float(stats.t.isf(level, rows - 1)) * se
    size = gap / max(sd, 1e-12) if significant else 0.0
    verdict: Verdict = "fail" if size > _FAIL else "caution" if size > _CAUTION else "pass"
    return Check(
        name=NAME,
        value=gap,
        se=se,
        threshold=_CAUTION * sd,
        verdict=verdict,
        reading=f"The mean log-likelihood is {number(train)} nats per row of the fit, and {number(mean)} per given "
        f"row; beyond the uncertainty of the posterior the difference is {number(gap, se)}"
        + ("." if verdict == "pass" else ": the fit is too close to its own rows."),
        next_step=""
        if verdict == "pass"
        else "Use more rows, a smaller network, dropout or a stronger prior; or stop by held-out rows (held_out=).",
        details={"train": train, "held_out": mean, "rightly": rightly, "sd_over_rows": sd, "level": level},
        unit="nats per row",
    )


def _train_score(case: Case) -> float | None:
    """The mean score of training rows at the state of the posterior; None if the history does not hold it."""
    steps, history = case.posterior.history.steps, case.posterior.history
    if not {"likelihood", "kl_local", "skipped"} <= steps.keys():
        return None
    last = history.best_epoch * history.steps_per_epoch or len(steps["elbo"])
    first = max(0, last - max(history.steps_per_epoch, min(_STEPS, last // 4)))
    parts = {name: np.array(steps[name][first:last]) for name in ("likelihood", "kl_local", "skipped")}
    scores = (parts["likelihood"] - parts["kl_local"])[parts["skipped"] == 0]
    return float(scores.mean()) if len(scores) else None


def _applies(case: Case) -> bool:
    held_out = case.overlap.relation in ("mixed", "held-out") and _train_score(case) is not None
    return held_out and case.scores is not None and len(case.scores[0]) > 1


def _run(case: Case, level: float) -> Check:
    scores, rightly = case.scores or (np.empty(0), 0.0)
    finite = case.finite(scores, "log-likelihood")
    rows = case.posterior.instance.num_data
    return check_overfitting(_train_score(case) or 0.0, finite, rows, rightly=rightly, level=level)


overfitting = Diagnostic(
    NAME, "Are training rows explained better than held-out rows?", _applies, _run, about="predictions", tests=True
)
