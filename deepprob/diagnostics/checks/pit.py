"""Is the probability integral transform of the target uniform?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Array, Check, Verdict, array, number
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.diagnostics.proper_scores import pit

NAME = "probability integral transform"
_CAUTION, _FAIL = 0.05, 0.2  # of the distance beyond that of calibrated predictions


def check_pit(transformed: ArrayLike, replicated: ArrayLike, *, level: float = 0.05, how: str = "") -> Check:
    r"""Whether ranks of the target among its predictive draws are uniform.

    .. math:: D = \max_t |\hat F(t) - t|

    for the distribution function of the ranks :math:`u` of all values together. A slope of the histogram of :math:`u`
    is a bias, a hump are predictions that are too wide, a hollow are predictions that are too narrow. The p-value comes
    from targets that are drawn from the predictions, all rows from one draw of the latents.

    Args:
        transformed: The ranks of the target in [0, 1], see `deepprob.diagnostics.proper_scores.pit`.
        replicated: Those of targets drawn from the predictive, shape ``(draws, *transformed)``.
        level: The false-alarm rate for calibrated predictions.
        how: How the predictions were made, a sentence for the reading.

    Returns:
        The distance beyond the mean distance of calibrated predictions; if it is significant, a caution above 0.05 and
        a fail above 0.2.

    References:
        Dawid (1984), Statistical Theory: the Prequential Approach.
        Gneiting, Balabdaoui, Raftery (2007), Probabilistic Forecasts, Calibration and Sharpness.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> u, again = rng.random(400), rng.random((200, 400))
        >>> check_pit(u, again).verdict, check_pit(u**3, again).verdict, check_pit(0.4 + 0.2 * u, again).verdict
        ('pass', 'fail', 'fail')
    """
    u, drawn = array(transformed).reshape(-1), array(replicated)
    drawn = drawn.reshape(len(drawn), -1)
    observed, simulated = float(_distance(u[None])[0]), _distance(drawn)
    p_value = float((1 + (simulated >= observed).sum()) / (len(simulated) + 1))
    excess = observed - float(simulated.mean())
    size = excess if p_value <= level else 0.0
    verdict: Verdict = "fail" if size > _FAIL else "caution" if size > _CAUTION else "pass"
    return Check(
        name=NAME,
        value=excess,
        se=float(simulated.std()),
        threshold=_CAUTION,
        verdict=verdict,
        reading=f"The ranks of the targets among their predictive draws are {number(observed)} from uniform; "
        f"calibrated predictions would be {number(float(simulated.mean()))} (p = {p_value:.2g})"
        + ("." if verdict == "pass" else f": {_shape(u)}.")
        + (how and f" {how}"),
        next_step=""
        if verdict == "pass"
        else "Let mean and noise depend on the inputs, take another family, or recalibrate on held-out data.",
        details={"distance": observed, "p": p_value, "level": level, "mean": float(u.mean()), "sd": float(u.std())},
    )


def _distance(u: Array) -> Array:
    """The Kolmogorov-Smirnov distance of each row from the uniform distribution."""
    ordered, count = np.sort(u, 1), u.shape[1]
    steps = np.arange(count + 1) / count
    return array(np.maximum((steps[1:] - ordered).max(1), (ordered - steps[:-1]).max(1)))


def _shape(u: Array) -> str:
    """What the ranks say about the predictions."""
    bias, width = float(u.mean()) - 0.5, float(u.std()) / 12**-0.5
    if abs(bias) > 2 * abs(width - 1) / 12**0.5:
        return f"the predictions are too {'low' if bias > 0 else 'high'}"
    return f"the predictions are too {'narrow' if width > 1 else 'wide'}"


def _run(case: Case, level: float) -> Check:
    draws = case.judged(array(case.prediction.draws), 1)
    target, again = case.judged(case.target), case.judged(case.new_targets(level), 1)
    return check_pit(pit(draws, target, case.seed), pit(draws, again, case.seed + 1), level=level, how=case.how)


pit_uniformity = Diagnostic(
    NAME,
    "Are the ranks of the targets among their predictive draws uniform?",
    lambda case: case.supervised and case.kind in ("real", "count"),
    _run,
    about="predictions",
    tests=True,
    by_site=True,
)
