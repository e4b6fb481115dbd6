"""Do predictions score better than a baseline that ignores the inputs?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats

from deepprob.diagnostics.baseline import FEWEST, class_baseline, count_baseline, normal_baseline
from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Array, Check, Verdict, array, number
from deepprob.diagnostics.checks.calibration import class_probs, one_label
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.diagnostics.observed import only_known
from deepprob.diagnostics.proper_scores import brier, crps
from deepprob.errors import counted
from deepprob.posteriors.training_rows import Summary

NAME = "predictive skill"
_GAIN = 0.01  # nats per row; a smaller gain over the base rate is of no use
_LOOK = "Check that inputs and targets belong together, or look for inputs that tell more."
_ROWS = 20  # with fewer rows the t-test of the gain is not to be trusted


def check_skill(
    nll: ArrayLike,
    baseline: ArrayLike,
    replicated: ArrayLike = (),
    *,
    level: float = 0.05,
    details: dict[str, Any] | None = None,
    how: str = "",
    idle_step: str = _LOOK,
) -> Check:
    r"""Whether predictions score better than the marginal distribution of the training targets.

    With :math:`d_i` the loss of row :math:`i` against the baseline, the predictions are worse than the baseline if
    :math:`\bar d > 0` and targets drawn from the predictions seldom give as large a mean. This test holds its level for
    any number of rows. Without such targets a paired t-test decides.

    Args:
        nll: Negative log predictive density of each row, nats.
        baseline: Negative log density of each row under a prediction that ignores the inputs, nats.
        replicated: The mean loss against the baseline of targets drawn from the predictions, shape ``(R,)``.
        level: The false-alarm rate for predictions that are not worse than the baseline.
        details: Further scores to store in the check.
        how: How the predictions were made, a sentence for the reading.
        idle_step: What to try if the predictions are no better than the baseline.

    Returns:
        The mean negative log-likelihood; a fail if it is significantly above the baseline. A caution if the gain is not
        significant although 20 rows or more would show a gain of 0.01 nats.

    Examples:
        >>> base = np.full(30, 1.0)
        >>> [check_skill(base + loss, base).verdict for loss in (1.0, 0.0, -0.5)]
        ['fail', 'caution', 'pass']
    """
    scores, reference, drawn = array(nll), array(baseline), array(replicated)
    rows, loss = len(scores), array(nll) - array(baseline)
    mean, base, gain = float(scores.mean()), float(reference.mean()), -float(loss.mean())
    se, paired = (float(v.std(ddof=1) / np.sqrt(rows)) if rows > 1 else None for v in (scores, loss))
    ranked = float((1 + (drawn >= -gain).sum()) / (len(drawn) + 1))
    p_worse = ranked if len(drawn) else _t_test(-gain, paired, rows)
    worse = gain < 0 and p_worse <= level
    most = gain if paired is None else gain + float(stats.t.isf(level, rows - 1)) * paired
    idle = not worse and rows >= _ROWS and _t_test(gain, paired, rows) > level and most < _GAIN
    verdict: Verdict = "fail" if worse else "caution" if idle else "pass"
    finding = {"fail": ": the predictions are worse.", "caution": ": the predictions are no better.", "pass": "."}
    return Check(
        name=NAME,
        value=mean,
        se=se,
        threshold=base,
        verdict=verdict,
        reading=f"The negative log-likelihood (NLL) is {number(mean, se)} nats per row; a baseline without the inputs "
        f"has {number(base)} (gain {number(gain, paired)}){finding[verdict]} {how}".rstrip(),
        next_step={
            "fail": "Check that inputs and targets belong together, or simplify.",
            "caution": idle_step,
            "pass": "",
        }[verdict],
        details={"nll": mean, "nll_se": se, "baseline": base, "gain": gain, "p": p_worse, **(details or {})},
        unit="nats per row",
    )


def _t_test(mean: float, se: float | None, rows: int) -> float:
    """The p-value of a mean above zero, one-sided."""
    if se is None:
        return 1.0
    return float(stats.t.sf(mean / se, rows - 1)) if se > 0 else float(mean <= 0)


def _mean_se(values: Array) -> dict[str, float]:
    rows = values.reshape(len(values), -1).mean(1)
    return {"mean": float(rows.mean()), "se": float(rows.std(ddof=1) / np.sqrt(len(rows)))}


def _nll(case: Case, target: Array) -> Array:
    density = only_known(array(case.prediction.log_prob(torch.as_tensor(target))), case.mask)
    return case.finite(-density.reshape(len(target), -1).sum(1), "log-likelihood")


def _run(case: Case, level: float) -> Check:
    return _run_classes(case, level) if one_label(case) else _run_numbers(case, level)


def _run_numbers(case: Case, level: float) -> Check:
    make = count_baseline if case.kind == "count" else normal_baseline
    flat = make(case.target, _summary(case), case.mask)
    rows = flat.known.any(1)

    def losses(target: Array) -> tuple[Array, Array]:
        return _nll(case, target)[rows], flat(target)[rows]

    nll, base = losses(case.complete)
    again: list[float] = []
    # Counts that leave each other out depend on each other more than new ones would: the t-test decides.
    dependent = case.kind == "count" and case.left_out is not None
    if (nll - base).mean() > 0 and not dependent:  # otherwise there is nothing to test
        again = [float(np.subtract(*losses(y)).mean()) for y in case.new_targets(level)]
    shape, target = case.target.shape, case.judged(case.target)
    residual = target - case.judged(array(case.prediction.mean).reshape(shape))
    around = target - case.judged(np.broadcast_to(flat.mean.reshape(-1, *shape[1:]), shape))
    details: dict[str, Any] = {
        "rmse": float(np.sqrt(np.square(residual).mean())),
        "mae": float(np.abs(residual).mean()),
        "r2": 1 - float(np.square(residual).sum() / max(np.square(around).sum(), 1e-300)),
        "crps": _mean_se(crps(case.judged(array(case.prediction.draws), 1), target)),
    }
    return check_skill(nll, base, again, level=level, details=details, how=case.how, idle_step=_idle_step(case))


def _run_classes(case: Case, level: float) -> Check:
    probs, labels = class_probs(case), case.judged(case.target).reshape(-1).astype(np.int64)
    shares = class_baseline(labels, probs.shape[1], _summary(case))
    scores = -np.log(np.maximum(probs, 1e-300)) + np.log(shares)  # of every class against the baseline, (rows, classes)
    each = np.arange(len(labels))
    base, nll = -np.log(shares[each, labels]), -np.log(np.maximum(probs[each, labels], 1e-300))
    again = case.judged(case.new_targets(level), 1).reshape(-1, len(labels)).astype(np.int64)
    details = {
        "accuracy": _mean_se((probs.argmax(1) == labels) * 1.0),
        "base_rate": float((shares.mean(0).argmax() == labels).mean()),
        "brier": _mean_se(brier(probs, labels)),
    }
    replicated = scores[each, again].mean(1)
    return check_skill(nll, base, replicated, level=level, details=details, how=case.how, idle_step=_idle_step(case))


def _idle_step(case: Case) -> str:
    """What to try if predictions are no better than the baseline: of a model larger than its data, a smaller one."""
    posterior = case.posterior
    if posterior.training_rows is None or not posterior.structure.global_:
        return _LOOK
    drawn = posterior.sample(draws=1, seed=case.seed)
    numbers = sum(drawn[name][0].numel() for name in posterior.structure.global_ if name in drawn)
    rows = posterior.training_rows.count
    if numbers <= rows:
        return _LOOK
    return (
        f"Try a smaller model, for a network hidden_dims=(10,) (in the command: --hidden 10): {numbers} latent numbers "
        f"for {counted(rows, 'row')} may hide what the inputs tell. Otherwise look for inputs that tell more."
    )


def _summary(case: Case) -> Summary | None:
    """The summary of the training targets; None if the rows predict each other.

    They do if the data are the training data, and if some targets are masked, as the summary may hold any value there.
    """
    return None if case.overlap.relation == "training" or case.mask is not None else case.training_summary


def _applies(case: Case) -> bool:
    if one_label(case):
        return True
    if not (case.supervised and case.kind in ("real", "count") and case.splits):
        return False
    if case.kind == "count" and (case.judged(case.target) < 0).any():  # no baseline has such counts
        return False
    return case.mask is None or bool((case.mask.sum(0) >= FEWEST).all())  # rows of each column predict each other


predictive_skill = Diagnostic(
    NAME,
    "Do predictions score better than a baseline that ignores the inputs?",
    _applies,
    _run,
    about="predictions",
    tests=True,
    by_site=True,
)
