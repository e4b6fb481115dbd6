"""Are predicted probabilities and predictive intervals calibrated?"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Array, Check, Verdict, array, number
from deepprob.diagnostics.checks.p_values import joint_p_value
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.diagnostics.proper_scores import BINS, bins_of
from deepprob.posteriors.prediction import Prediction

_CALIBRATION, _COVERAGE = "calibration of probabilities", "interval coverage"
_ECE_CAUTION, _ECE_FAIL = 0.02, 0.15
_COVERAGE_CAUTION, _COVERAGE_FAIL = 0.05, 0.2


def ece(confidence: ArrayLike, correct: ArrayLike, bins: int = BINS, order: ArrayLike | None = None) -> Array:
    r"""Expected calibration error, :math:`\sum_b \frac{n_b}{n} |\bar c_b - \bar a_b|`.

    Args:
        confidence: Probability of the predicted class, shape ``(rows,)``.
        correct: Whether that class is the true one, shape ``(*replicates, rows)``.
        bins: Number of bins, of equal numbers of rows but for ties.
        order: The numbers by which rows are put into bins, shape ``(rows,)``; None for the confidence.

    Returns:
        One value per replicate, shape ``replicates``.

    References:
        Guo, Pleiss, Sun, Weinberger (2017), On calibration of modern neural networks.

    Examples:
        >>> float(ece(np.full(10, 0.9), np.arange(10) < 6, bins=1).round(3))
        0.3
    """
    predicted, observed = array(confidence), array(correct)
    index = bins_of(predicted if order is None else order, bins)
    excess = observed - predicted  # (*replicates, rows)
    return np.asarray(sum(np.abs(excess[..., index == b].sum(-1)) for b in range(index.max() + 1)) / len(predicted))


def check_calibration(
    probs: ArrayLike,
    labels: ArrayLike,
    replicates: ArrayLike,
    *,
    level: float = 0.05,
    how: str = "",
    order: ArrayLike | None = None,
) -> Check:
    r"""Whether class frequencies match the predicted probabilities.

    The expected calibration error (ECE) of a finite sample is positive even for perfectly calibrated
    probabilities. It is therefore compared with the ECE of labels drawn from the predictions (consistency
    resampling): this gives the p-value, and the mean ECE of these labels is subtracted.

    Args:
        probs: Class probabilities, shape ``(rows, classes)``.
        labels: True classes, shape ``(rows,)``.
        replicates: Labels drawn from the predictive, shape ``(draws, rows)``.
        level: The false-alarm rate for perfect calibration.
        how: How the predictions were made, a sentence for the reading.
        order: Other class probabilities that choose each row's class and bin. Leave-one-out probabilities must not:
            to leave a row out lowers the probability of its own label, so that they sort rows by their labels.

    Returns:
        The ECE in excess of that of perfect calibration; if it is significant, a caution above 0.02 and a
        fail above 0.15.

    References:
        Broecker, Smith (2007), Increasing the reliability of reliability diagrams.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> p = rng.dirichlet(np.ones(3), size=500)
        >>> draw = lambda: (rng.random((500, 1)) > p.cumsum(1)).sum(1)
        >>> check_calibration(p, draw(), np.stack([draw() for _ in range(200)])).verdict
        'pass'
    """
    p, y = array(probs), array(labels).astype(np.int64)
    chosen = p if order is None else array(order)
    top, by = chosen.argmax(-1), chosen.max(-1)
    confidence, correct = p[np.arange(len(p)), top], top == y
    simulated = ece(confidence, top == array(replicates), order=by)
    observed = float(ece(confidence, correct, order=by))
    expected = float(simulated.mean())
    excess, se = observed - expected, _bootstrap_se(confidence, correct, by)
    p_value = float((1 + (simulated >= observed).sum()) / (len(simulated) + 1))
    size = excess if p_value <= level else 0.0
    verdict: Verdict = "fail" if size > _ECE_FAIL else "caution" if size > _ECE_CAUTION else "pass"
    over_confident = float((confidence - correct).mean()) > 0
    finding = f"the predictions are {'over' if over_confident else 'under'}-confident"
    return Check(
        name=_CALIBRATION,
        value=excess,
        se=se,
        threshold=_ECE_CAUTION,
        verdict=verdict,
        reading=(
            f"The expected calibration error (ECE) is {observed:.3f}; perfect calibration would give {expected:.3f} "
            f"(p = {p_value:.2g}): {'no relevant miscalibration' if verdict == 'pass' else finding}. {how}".rstrip()
        ),
        next_step=""
        if verdict == "pass"
        else "Recalibrate on held-out data (temperature scaling), "
        + (
            "try an ensemble or a richer guide."
            if over_confident
            else "fit longer, or use a wider prior on the weights."
        ),
        details={
            "ece": observed,
            "ece_expected": expected,
            "p": p_value,
            "level": level,
            "confidence": float(confidence.mean()),
            "accuracy": float(correct.mean()),
        },
    )


def _bootstrap_se(confidence: Array, correct: Any, order: Array, rounds: int = 100) -> float:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(confidence), size=(rounds, len(confidence)))
    return float(np.std([float(ece(confidence[r], correct[r], order=order[r])) for r in rows], ddof=1))


def check_coverage(
    target: ArrayLike,
    intervals: dict[float, tuple[Any, Any]],
    replicates: ArrayLike,
    *,
    level: float = 0.05,
    how: str = "",
) -> Check:
    """Whether predictive intervals contain the target as often as their nominal probability.

    The p-value comes from replicates of the whole data set, each from one draw of the latents. Unlike a
    binomial test, they account for latents that all rows share.

    Args:
        target: Observed values, shape ``(rows, ...)``.
        intervals: Lower and upper ends by nominal probability, each of the target's shape.
        replicates: Targets drawn from the predictive, shape ``(draws, rows, ...)``.
        level: The false-alarm rate for perfect calibration.
        how: How the predictions were made, a sentence for the reading.

    Returns:
        The largest difference between observed and expected coverage; if it is significant, a caution above
        0.05 and a fail above 0.2.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> y, again = rng.normal(size=400), rng.normal(size=(400, 400))
        >>> right, narrow = (np.full(400, -1.645), np.full(400, 1.645)), (np.full(400, -0.8), np.full(400, 0.8))
        >>> check_coverage(y, {0.9: right}, again).verdict, check_coverage(y, {0.9: narrow}, again).verdict
        ('pass', 'pass')
        >>> check_coverage(y, {0.9: narrow}, again / 2).verdict
        'fail'
    """
    y, drawn = array(target), array(replicates)
    inside = {m: (y >= array(lo)) & (y <= array(hi)) for m, (lo, hi) in intervals.items()}
    again = {m: (drawn >= array(lo)) & (drawn <= array(hi)) for m, (lo, hi) in intervals.items()}
    observed = np.array([inside[m].mean() for m in intervals])
    simulated = np.stack([again[m].reshape(len(drawn), -1).mean(1) for m in intervals], 1)
    p_value = joint_p_value(observed, simulated)
    gaps = observed - simulated.mean(0)
    widest = int(np.abs(gaps).argmax())
    gap, mass = float(gaps[widest]), list(intervals)[widest]
    size = abs(gap) if p_value <= level else 0.0
    verdict: Verdict = "fail" if size > _COVERAGE_FAIL else "caution" if size > _COVERAGE_CAUTION else "pass"
    se = np.array([inside[m].reshape(len(y), -1).mean(1).std() / np.sqrt(len(y)) for m in intervals])
    shares = [f"{number(c, s)} by the {m:.0%} intervals" for m, c, s in zip(intervals, observed, se, strict=True)]
    return Check(
        name=_COVERAGE,
        value=abs(gap),
        se=float(se[widest]),
        threshold=_COVERAGE_CAUTION,
        verdict=verdict,
        reading=f"Coverage of the targets: {', '.join(shares)} (p = {p_value:.2g})."
        + ("" if verdict == "pass" else f" The intervals are too {'narrow' if gap < 0 else 'wide'}.")
        + (how and f" {how}"),
        next_step=""
        if verdict == "pass"
        else "Let the noise depend on the input, use a richer guide or an ensemble, or recalibrate on held-out data.",
        details={
            "coverage": {str(m): float(c) for m, c in zip(intervals, observed, strict=True)},
            "coverage_se": {str(m): float(s) for m, s in zip(intervals, se, strict=True)},
            "coverage_expected": {str(m): float(c) for m, c in zip(intervals, simulated.mean(0), strict=True)},
            "worst_mass": mass,
            "p": p_value,
            "level": level,
        },
    )


def class_probs(case: Case, prediction: Prediction | None = None) -> Array:
    """Class probabilities of every row whose label counts, shape ``(rows, classes)``; a binary target has two classes.

    Args:
        case: The case.
        prediction: Another prediction than that of the case.
    """
    probs = case.finite(array((prediction or case.prediction).probs), "probability")
    if case.kind == "binary":
        probs = probs.reshape(len(case.target), -1)
        probs = probs if probs.shape[1] == 2 else np.concatenate([1 - probs, probs], 1)
    return probs if case.mask is None else probs[case.mask.reshape(-1)]


def one_label(case: Case) -> bool:
    """Whether the target is one label per row."""
    return case.supervised and case.kind in ("classes", "binary") and case.target.size == len(case.target)


def _run_classes(case: Case, level: float) -> Check:
    probs, labels = class_probs(case), case.judged(case.target).reshape(-1)
    replicates = case.judged(case.new_targets(level), 1).reshape(-1, len(labels))
    order = class_probs(case, case.in_sample)
    return check_calibration(probs, labels, replicates, level=level, how=case.how, order=order)


def _run_numbers(case: Case, level: float) -> Check:
    target, replicates = case.judged(case.target), case.judged(case.new_targets(level), 1)
    ends = {mass: interval_of(case, mass) for mass in (0.5, 0.9)}
    return check_coverage(target, ends, replicates, level=level, how=case.how)


def interval_of(case: Case, mass: float) -> tuple[Array, Array]:
    """Both ends of the predictive intervals of the values that count."""
    low, high = (case.judged(array(end).reshape(case.target.shape)) for end in case.prediction.interval(mass))
    return low, high


probability_calibration = Diagnostic(
    _CALIBRATION,
    "Do class frequencies match the predicted probabilities?",
    one_label,
    _run_classes,
    about="predictions",
    tests=True,
    by_site=True,
)
interval_coverage = Diagnostic(
    _COVERAGE,
    "Do predictive intervals contain the target as often as their nominal probability?",
    lambda case: case.supervised and case.kind in ("real", "count"),
    _run_numbers,
    about="predictions",
    tests=True,
    by_site=True,
)
