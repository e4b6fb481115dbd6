"""Does the guide have the means and the widths of the posterior?

Of global latents, given the training data; of local latents, given each of some rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Array, Check, Verdict, array, number
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.diagnostics.remedies import RICHER_ENCODER, RICHER_GUIDE, WIDTH
from deepprob.engine.accuracy import accuracy_of_rows
from deepprob.posteriors.arviz_compat import khat_limit, psis
from deepprob.posteriors.guide_accuracy import GuideAccuracy

_MEANS, _WIDTHS = "posterior means, global latents", "posterior widths, global latents"
_ROW_MEANS, _ROW_WIDTHS = "posterior means, local latents", "posterior widths, local latents"
_SHIFT_CAUTION, _SHIFT_FAIL = 0.3, 1.0  # in sds of the posterior
_WIDTH_CAUTION, _WIDTH_FAIL = 1.3, 2.0  # as a factor
_ROW_SHIFT_CAUTION = 0.4  # a root mean square over rows
_WHOSE = {"guide": "guide's", "draws": "draws'"}
_OTHER_DRAWS = "Are these the data and the program that were drawn from? Else run longer chains from other starts."
_ALONE = ", each number given the others"
_EFFECTIVE, _EASY = (
    100,
    0.3,
)  # effective draws of reliable importance weights; k-hat of importance weights that decide without gradients


@dataclass(frozen=True)
class _Finding:
    """How far one number, or the numbers of one site, are off.

    Attributes:
        name: The number, such as ``w[2]``, or the site.
        size: How far, signed.
        se: The standard error.
        surely: The part of the absolute size that the standard error leaves.
        source: What tells it.
    """

    name: str
    size: float
    se: float
    surely: float
    source: str


def check_means(accuracy: GuideAccuracy, of: str = "guide") -> Check:
    """Whether the means of a guide, or of stored draws, are those of the posterior.

    Args:
        accuracy: How far they are from the posterior.
        of: ``"guide"`` or ``"draws"``.

    Returns:
        The largest distance of a mean, in sds of the posterior; a caution if it is surely above 0.3, a fail above 1.
        For weights that are judged one by one, the root mean square over the weights of a site.
    """
    found = _findings(accuracy, 0)
    worst = max(found, key=lambda f: (f.surely, abs(f.size)))
    verdict = _verdict(worst.surely, _SHIFT_CAUTION, _SHIFT_FAIL)
    alone = _is_alone(worst, accuracy)  # many numbers have no one sign
    side = "from the posterior's (root mean square)" if alone else "too high" if worst.size > 0 else "too low"
    where = f"The {_WHOSE[of]} mean of {worst.name} is {number(abs(worst.size), worst.se)} posterior sds {side}"
    return _check(
        _MEANS,
        abs(worst.size),
        worst.se,
        _SHIFT_CAUTION,
        verdict,
        f"{where}, by the {worst.source} on the training data{_ALONE if alone else ''}.",
        "sd",
        found,
        of,
    )


def check_widths(accuracy: GuideAccuracy, of: str = "guide") -> Check:
    """Whether the standard deviations of a guide, or of stored draws, are those of the posterior.

    Args:
        accuracy: How far they are from the posterior.
        of: ``"guide"`` or ``"draws"``.

    Returns:
        The largest factor between the two; a caution if it is surely above 1.3, a fail above 2, whether they are
        too wide or too narrow.
    """
    if accuracy.points and of == "guide":
        return Check(
            name=_WIDTHS,
            value=float("inf"),
            se=None,
            threshold=_WIDTH_CAUTION,
            verdict="caution",
            reading=f"The guide is a point estimate of {', '.join(accuracy.points)}: it does not say how sure it is.",
            next_step=WIDTH,
            unit="times",
        )
    found = _findings(accuracy, 2)
    worst = max(found, key=lambda f: (f.surely, abs(f.size)))
    verdict = _verdict(worst.surely, float(np.log(_WIDTH_CAUTION)), float(np.log(_WIDTH_FAIL)))
    factor, side = float(np.exp(abs(worst.size))), "wide" if worst.size > 0 else "narrow"
    se = factor * worst.se
    how = f"by the {worst.source} on the training data{_ALONE if _is_alone(worst, accuracy) else ''}."
    reading = f"The {_WHOSE[of]} sd of {worst.name} is {number(factor, se)} times too {side}, {how}"
    return _check(_WIDTHS, factor, se, _WIDTH_CAUTION, verdict, reading, "times", found, of)


def check_row_means(values: ArrayLike, gradients: ArrayLike) -> Check:
    """Whether the guide's means of the latents of rows are those of their posteriors.

    Args:
        values: Draws of the guide for every row, in unconstrained coordinates, shape ``(K, B, D)``.
        gradients: Gradients of the log-density at the draws, of the same shape.

    Returns:
        The root mean square over rows and dimensions of the distance, in sds of the posterior; a caution if it is
        surely above 0.4, a fail above 1. The noise of K draws is subtracted.

    Examples:
        >>> draws = np.random.default_rng(0).normal(size=(200, 50, 2))
        >>> check_row_means(draws, -draws).verdict, check_row_means(draws, 2 - draws).verdict
        ('pass', 'fail')
    """
    shift, width = _of_rows(values, gradients)
    squares = (np.square(shift) - np.exp(2 * width) / len(array(values))).mean(1)  # by row
    size = float(np.sqrt(max(squares.mean(), 0.0)))
    se = float(squares.std() / np.sqrt(len(squares)) / (2 * max(size, 0.05)))
    verdict = _verdict(size - 1.645 * se, _ROW_SHIFT_CAUTION, _SHIFT_FAIL)
    return Check(
        name=_ROW_MEANS,
        value=size,
        se=se,
        threshold=_ROW_SHIFT_CAUTION,
        verdict=verdict,
        reading=f"The guide's means of the latents of {len(shift)} rows are {number(size, se)} posterior sds from the "
        "posteriors' (root mean square), by the gradients at its draws.",
        next_step="" if verdict == "pass" else RICHER_ENCODER,
        details={"rms_by_dimension": np.sqrt(np.square(shift).mean(0)).tolist(), "rows": len(shift)},
        unit="sd",
    )


def check_row_widths(values: ArrayLike, gradients: ArrayLike) -> Check:
    """Whether the guide's standard deviations of the latents of rows are those of their posteriors.

    Args:
        values: Draws of the guide for every row, in unconstrained coordinates, shape ``(K, B, D)``.
        gradients: Gradients of the log-density at the draws, of the same shape.

    Returns:
        Of the dimension that is furthest off, the factor between the two, as a geometric mean over rows; a caution if
        it is surely above 1.3, a fail above 2, whether the guide is too wide or too narrow.

    Examples:
        >>> draws = np.random.default_rng(0).normal(size=(200, 50, 2))
        >>> check_row_widths(draws, -draws).verdict, check_row_widths(draws, -9 * draws).verdict
        ('pass', 'fail')
    """
    _, width = _of_rows(values, gradients)
    means, errors = width.mean(0), width.std(0) / np.sqrt(len(width))
    surely = np.abs(means) - 1.645 * errors
    at = int(surely.argmax())
    factor = float(np.exp(abs(means[at])))
    se = factor * float(errors[at])
    verdict = _verdict(float(surely[at]), float(np.log(_WIDTH_CAUTION)), float(np.log(_WIDTH_FAIL)))
    side = "wide" if means[at] > 0 else "narrow"
    return Check(
        name=_ROW_WIDTHS,
        value=factor,
        se=se,
        threshold=_WIDTH_CAUTION,
        verdict=verdict,
        reading=f"The guide's sds of the latents of {len(width)} rows are up to {number(factor, se)} times too {side} "
        f"(dimension {at}, a geometric mean over rows), by the gradients at its draws.",
        next_step="" if verdict == "pass" else RICHER_ENCODER,
        details={"ratio_by_dimension": np.exp(means).tolist(), "rows": len(width)},
        unit="times",
    )


def _of_rows(values: ArrayLike, gradients: ArrayLike) -> tuple[Array, Array]:
    return accuracy_of_rows(array(values).swapaxes(0, 1), array(gradients).swapaxes(0, 1))


def _findings(accuracy: GuideAccuracy, row: int) -> list[_Finding]:
    """How far all numbers are off, by importance weights and by gradients.

    Importance weights hold for posteriors of any shape, and decide without the gradients where they are nearly equal.
    Where they are reliable at all, the larger of two findings counts. Where they are not, gradients decide.

    Args:
        accuracy: How far the guide is from the posterior.
        row: Of an `Accuracy`: 0 for the means, 2 for the widths.

    Raises:
        ValueError: If neither tells.
    """
    weights = accuracy.log_weights.cpu().numpy()
    khat, effective = _weight_quality(weights)
    reliable = _are_reliable(weights, khat, effective)
    alone = reliable and khat <= _EASY and effective >= len(weights) / 2
    by_weights = accuracy.by_weights if reliable else {}
    by_gradients = {n: x for n, x in accuracy.by_gradients.items() if not (alone and n in by_weights)}
    if not (by_weights or by_gradients):
        raise ValueError(
            f"The program has no gradients ({accuracy.why or 'its latent sites are discrete'}), and the importance "
            f"weights of the guide are too unequal (k-hat {khat:.2f}, {effective:.0f} effective draws)."
        )
    sources = {
        f"importance weights of {len(weights)} draws": by_weights,
        f"gradients at {len(weights)} draws": by_gradients,
    }
    if accuracy.wide_log_weights is not None:
        wide = accuracy.wide_log_weights.cpu().numpy()
        if _are_reliable(wide, *_weight_quality(wide)):
            sources["importance weights of draws that reach further than the guide"] = accuracy.by_wide_weights
    count = sum(x.shape[1] for found in sources.values() for n, x in found.items() if n in accuracy.together)
    reach = float(stats.norm.ppf(1 - 0.05 / (2 * max(count, 1))))
    return [
        finding
        for source, found in sources.items()
        for name, x in found.items()
        for finding in _of_site(name, array(x[row : row + 2]), name in accuracy.together, reach, source)
    ]


def _of_site(name: str, pair: Array, together: bool, reach: float, source: str) -> Iterator[_Finding]:
    sizes, errors = pair
    if together:
        for i, (size, se) in enumerate(zip(sizes, errors, strict=True)):
            label = name if len(sizes) == 1 else f"{name}[{i}]"
            yield _Finding(label, float(size), float(se), max(0.0, abs(float(size)) - reach * float(se)), source)
        return
    squares = np.square(sizes) - np.square(errors)
    size = float(np.sqrt(max(squares.mean(), 0.0)))
    se = float(errors.mean() / np.sqrt(len(sizes)))
    sign = 1.0 if sizes.mean() >= 0 else -1.0
    yield _Finding(name, sign * size, se, max(0.0, size - 1.645 * se), source)


def _is_alone(found: _Finding, accuracy: GuideAccuracy) -> bool:
    """Whether a finding is about the numbers of a site that are judged one by one."""
    return found.name in accuracy.by_gradients and found.name not in accuracy.together


def _weight_quality(log_weights: Array) -> tuple[float, float]:
    """Pareto k-hat of log-weights, and their number of effective draws; nan and 0 if some are not finite."""
    if not np.isfinite(log_weights).all():
        return float("nan"), 0.0
    smoothed, khat = psis(log_weights)
    return float(khat), 1 / float(np.square(np.exp(smoothed)).sum())


def _are_reliable(log_weights: Array, khat: float, effective: float) -> bool:
    return khat <= khat_limit(len(log_weights)) and effective >= _EFFECTIVE


def _verdict(surely: float, caution: float, fail: float) -> Verdict:
    return "fail" if surely > fail else "caution" if surely > caution else "pass"


def _check(
    name: str,
    value: float,
    se: float,
    limit: float,
    verdict: Verdict,
    reading: str,
    unit: str,
    found: list[_Finding],
    of: str,
) -> Check:
    worst = sorted(found, key=lambda f: -abs(f.size))[:20]
    details: dict[str, Any] = {"numbers": {f.name: {"value": f.size, "se": f.se} for f in worst}}
    next_step = "" if verdict == "pass" else RICHER_GUIDE if of == "guide" else _OTHER_DRAWS
    return Check(name, value, se, limit, verdict, reading, next_step, details, unit=unit)


def _applies(case: Case) -> bool:
    found = case.draws_accuracy or case.accuracy
    return found is not None and bool(found.by_gradients or found.by_weights or found.why)


def _applies_to_widths(case: Case) -> bool:
    return _applies(case) or bool(case.accuracy and case.accuracy.points)


def _run(check: Callable[[GuideAccuracy, str], Check]) -> Callable[[Case, float], Check]:
    def run(case: Case, level: float) -> Check:
        found = case.draws_accuracy or case.accuracy
        return check(cast(GuideAccuracy, found), case.posterior.kind)  # a check that applies has one

    return run


def _applies_to_rows(case: Case) -> bool:
    if case.posterior.kind != "guide" or not case.posterior._fitted.amortized or not case.posterior.structure.local:
        return False
    draws = case.row_draws
    if draws.why and not draws.scores:
        raise ValueError(f"The density of the latents has no gradient: {draws.why}.")
    return 0 < _dimensions(case) <= case.particles // 3


def _dimensions(case: Case) -> int:
    return sum(x.shape[-1] for x in case.row_draws.scores.values())


def _run_rows(check: Callable[[ArrayLike, ArrayLike], Check]) -> Callable[[Case, float], Check]:
    def run(case: Case, level: float) -> Check:
        draws = case.row_draws
        values, scores = (np.concatenate([array(x[n]) for n in draws.scores], -1) for x in (draws.values, draws.scores))
        return check(values, scores)

    return run


posterior_means = Diagnostic(
    _MEANS, "Are the means those of the posterior?", _applies, _run(check_means), about="posterior"
)
posterior_widths = Diagnostic(
    _WIDTHS,
    "Are the standard deviations those of the posterior?",
    _applies_to_widths,
    _run(check_widths),
    about="posterior",
)
row_means = Diagnostic(
    _ROW_MEANS,
    "Are the guide's means of the latents of rows those of their posteriors?",
    _applies_to_rows,
    _run_rows(check_row_means),
    about="posterior",
)
row_widths = Diagnostic(
    _ROW_WIDTHS,
    "Are the guide's standard deviations of the latents of rows those of their posteriors?",
    _applies_to_rows,
    _run_rows(check_row_widths),
    about="posterior",
)
