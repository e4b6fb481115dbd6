"""Do predicted probabilities come true?"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from deepprob.diagnostics.case import Case, Diagnostic
from deepprob.diagnostics.check import Array, Check, Verdict, array, number
from deepprob.diagnostics.checks.replicates import joint_p

BINS = 15
_NAME = "probabilities come true"
_CAUTION, _FAIL = 0.02, 0.15


def bins_of(confidence: ArrayLike, bins: int = BINS) -> Any:
    """Bin of each row: bins of equal numbers of rows, so that each says something."""
    order = np.argsort(array(confidence), kind="stable")
    index = np.empty(len(order), dtype=np.int64)
    index[order] = np.arange(len(order)) * min(bins, len(order)) // len(order)
    return index


def ece(confidence: ArrayLike, correct: ArrayLike, bins: int = BINS) -> Array:
    r"""Expected calibration error, :math:`\sum_b \frac{n_b}{n} |\bar c_b - \bar a_b|`.

    Args:
        confidence: Probability of the predicted class, shape ``(rows,)``.
        correct: Whether it came true, shape ``(*replicates, rows)``.
        bins: Number of bins, of equal numbers of rows.

    Returns:
        One value per replicate, shape ``replicates``.

    References:
        Guo, Pleiss, Sun, Weinberger (2017), On calibration of modern neural networks.

    Examples:
        >>> float(ece(np.full(10, 0.9), np.arange(10) < 6, bins=1).round(3))
        0.3
    """
    confident, came_true = array(confidence), array(correct)
    index = bins_of(confident, bins)
    surplus = came_true - confident  # (*replicates, rows)
    return np.asarray(sum(np.abs(surplus[..., index == b].sum(-1)) for b in range(index.max() + 1)) / len(confident))


def calibration(probs: ArrayLike, labels: ArrayLike, replicates: ArrayLike, *, level: float = 0.05) -> Check:
    r"""Whether classes come true as often as their probabilities say.

    The expected calibration error of a finite sample is above zero even if every probability is
    right; so it is compared with that of labels drawn from the predictions (consistency
    resampling), which gives the p-value, and its mean there is taken off.

    Args:
        probs: Class probabilities, shape ``(rows, classes)``.
        labels: What came true, shape ``(rows,)``.
        replicates: Labels drawn from the predictive, shape ``(draws, rows)``.
        level: The false-alarm rate for perfect calibration.

    Returns:
        The ECE beyond what perfect calibration would show; a caution if it is real and above 0.02,
        a fail above 0.15.

    References:
        Broecker, Smith (2007), Increasing the reliability of reliability diagrams.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> p = rng.dirichlet(np.ones(3), size=500)
        >>> draw = lambda: (rng.random((500, 1)) > p.cumsum(1)).sum(1)
        >>> calibration(p, draw(), np.stack([draw() for _ in range(200)])).verdict
        'pass'
    """
    p, y = array(probs), array(labels).astype(np.int64)
    top, confidence = p.argmax(-1), p.max(-1)
    correct = top == y
    simulated = ece(confidence, top == array(replicates))
    observed = float(ece(confidence, correct))
    expected = float(simulated.mean())
    excess, se = observed - expected, _bootstrap_se(confidence, correct)
    chance = float((1 + (simulated >= observed).sum()) / (len(simulated) + 1))
    size = excess if chance <= level else 0.0
    verdict: Verdict = "fail" if size > _FAIL else "caution" if size > _CAUTION else "pass"
    over = float((confidence - correct).mean())
    tendency = "over-confident" if over > 0 else "under-confident"
    return Check(
        name=_NAME,
        value=excess,
        se=se,
        threshold=_CAUTION,
        verdict=verdict,
        reading=(
            f"ECE is {observed:.3f}, of which {expected:.3f} is expected of perfect calibration (p = {chance:.2g}): "
            + ("probabilities can be taken at their word." if verdict == "pass" else f"predictions are {tendency}.")
        ),
        next_step=""
        if verdict == "pass"
        else "Recalibrate on held-out data (temperature), "
        + (
            "try an ensemble or a richer guide."
            if over > 0
            else "fit longer, or use a prior that lets weights be larger."
        ),
        details={
            "ece": observed,
            "ece_expected": expected,
            "p": chance,
            "level": level,
            "confidence": float(confidence.mean()),
            "accuracy": float(correct.mean()),
        },
    )


def _bootstrap_se(confidence: Array, correct: Any, rounds: int = 100) -> float:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(confidence), size=(rounds, len(confidence)))
    return float(np.std([float(ece(confidence[r], correct[r])) for r in rows], ddof=1))


def coverage(
    target: ArrayLike,
    intervals: dict[float, tuple[Any, Any]],
    replicates: ArrayLike,
    *,
    level: float = 0.05,
) -> Check:
    """Whether predictive intervals hold the target as often as they say.

    Replicates of the whole data set, each from one draw of the latents, give the p-value: they know
    that rows share the latents' uncertainty, which a binomial test does not.

    Args:
        target: What came true, shape ``(rows, ...)``.
        intervals: Mass to lower and upper end, each of the target's shape.
        replicates: Targets drawn from the predictive, shape ``(draws, rows, ...)``.
        level: The false-alarm rate for perfect calibration.

    Returns:
        The largest gap between coverage and mass; a caution if it is real and above 0.05, a fail
        above 0.2.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> y, again = rng.normal(size=400), rng.normal(size=(400, 400))
        >>> calm, bold = (np.full(400, -1.645), np.full(400, 1.645)), (np.full(400, -0.8), np.full(400, 0.8))
        >>> coverage(y, {0.9: calm}, again).verdict, coverage(y, {0.9: bold}, again).verdict
        ('pass', 'pass')
        >>> coverage(y, {0.9: bold}, again / 2).verdict
        'fail'
    """
    y, drawn = array(target), array(replicates)
    held = {m: (y >= array(lo)) & (y <= array(hi)) for m, (lo, hi) in intervals.items()}
    again = {m: (drawn >= array(lo)) & (drawn <= array(hi)) for m, (lo, hi) in intervals.items()}
    observed = np.array([held[m].mean() for m in intervals])
    simulated = np.stack([again[m].reshape(len(drawn), -1).mean(1) for m in intervals], 1)
    chance = joint_p(observed, simulated)
    gaps = observed - simulated.mean(0)
    most = int(np.abs(gaps).argmax())
    gap, mass = float(gaps[most]), list(intervals)[most]
    size = abs(gap) if chance <= level else 0.0
    verdict: Verdict = "fail" if size > 0.2 else "caution" if size > 0.05 else "pass"
    rates = np.array([held[m].reshape(len(y), -1).mean(1).std() / np.sqrt(len(y)) for m in intervals])
    said = ", ".join(f"{m:.0%} hold {number(c, s)}" for m, c, s in zip(intervals, observed, rates, strict=True))
    return Check(
        name="intervals hold",
        value=gap,
        se=float(rates[most]),
        threshold=0.05,
        verdict=verdict,
        reading=f"Of the predictive intervals, those of {said} of the targets (p = {chance:.2g})."
        + ("" if verdict == "pass" else f" They are too {'narrow' if gap < 0 else 'wide'}."),
        next_step=""
        if verdict == "pass"
        else "Let the noise depend on the input, use a richer guide or an ensemble, or recalibrate on held-out data.",
        details={
            "coverage": {str(m): float(c) for m, c in zip(intervals, observed, strict=True)},
            "coverage_se": {str(m): float(s) for m, s in zip(intervals, rates, strict=True)},
            "coverage_expected": {str(m): float(c) for m, c in zip(intervals, simulated.mean(0), strict=True)},
            "worst_mass": mass,
            "p": chance,
            "level": level,
        },
    )


def class_probs(case: Case) -> Array:
    """Class probabilities of every row, shape ``(rows, classes)``; two classes if the target is binary."""
    probs = array(case.prediction.probs)
    if case.prediction.kind == "binary":
        probs = probs.reshape(len(case.target), -1)
        return probs if probs.shape[1] == 2 else np.concatenate([1 - probs, probs], 1)
    return probs


def one_label(case: Case) -> bool:
    """Whether each row has one label to predict."""
    return case.supervised and case.prediction.kind in ("classes", "binary") and case.target.size == len(case.target)


def _run_classes(case: Case, level: float) -> Check:
    rows = len(case.target)
    replicates = case.replicates.reshape(-1, rows)
    return calibration(class_probs(case), case.target.reshape(rows), replicates, level=level)


def _run_real(case: Case, level: float) -> Check:
    masses = (0.5, 0.9)
    intervals = {m: tuple(array(end) for end in case.prediction.interval(m)) for m in masses}
    return coverage(case.target, intervals, case.replicates, level=level)  # type: ignore[arg-type]


probabilities_come_true = Diagnostic(
    _NAME,
    "Do classes come true as often as their probabilities say?",
    one_label,
    _run_classes,
    tests=True,
)
intervals_hold = Diagnostic(
    "intervals hold",
    "Do predictive intervals hold the target as often as they say?",
    lambda case: case.supervised and case.prediction.kind == "real",
    _run_real,
    tests=True,
)
