"""Has the ELBO converged?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from deepprob.diagnostics.case import Case, Diagnostic, given
from deepprob.diagnostics.check import Array, Check, Verdict, array, number
from deepprob.engine.statistics import line_rise
from deepprob.posteriors.arviz_compat import rhat
from deepprob.posteriors.history import History

BATCHES = 20  # the last half is averaged in this many batches, whose residuals give the standard error
WINDOWS = 4
RHAT = 1.1
# A change of the ELBO is relevant if it is at least this share of the spread of the ELBO over rows.
SHARE_OF_SPREAD = 0.02
NAME = "ELBO convergence"


def check_convergence(elbo: ArrayLike, *, scale: float = 0.01, level: float = 0.05) -> Check:
    r"""Whether the ELBO still changes by more than a given amount over the last half of the fit.

    The last half is cut into 20 batches with means :math:`m_j`. The line fitted to them rises by :math:`r`
    from the first batch to the last; autocorrelation :math:`\rho` of the residuals inflates its standard
    error by :math:`\sqrt{(1 + \rho) / (1 - \rho)}`. The ELBO has not converged if :math:`|r|` exceeds
    ``scale`` significantly, or if R-hat of four windows is above 1.1 and two of their means differ
    significantly by more than ``scale``.

    Args:
        elbo: One value per step (or epoch), nats per datum; non-finite values are left out.
        scale: The smallest relevant change, nats per datum.
        level: The false-alarm rate for an ELBO without relevant changes.

    Returns:
        The rise over the last half; a fail if it exceeds ten times ``scale`` significantly.

    References:
        Dhaka, Catalina, Andersen, Magnusson, Huggins, Vehtari (2020), Robust, accurate stochastic
        optimization for variational inference.

    Examples:
        >>> noise = np.random.default_rng(0).normal(size=1000)
        >>> check_convergence(noise).verdict, check_convergence(noise + 0.01 * np.arange(1000)).verdict
        ('pass', 'fail')
    """
    values = array(elbo)
    values = values[np.isfinite(values)]
    tail = values[len(values) // 2 :]
    if len(tail) < BATCHES:
        return Check(
            name=NAME,
            value=float("nan"),
            se=None,
            threshold=scale,
            verdict="caution",
            reading=f"A fit of {len(values)} steps is too short for this check, which needs {2 * BATCHES}.",
            next_step="Fit for longer: raise epochs= or steps= of svi.",
            details={"steps": len(values)},
        )
    tail = tail[len(tail) % BATCHES :]
    means = tail.reshape(BATCHES, -1).mean(1)
    change, inflation = line_rise(means)
    rise, se = change.value, change.se
    one_sided = level / 4  # two sides; the windows use the other half of the level
    windows, agreement = tail.reshape(WINDOWS, -1), _rhat(tail.reshape(WINDOWS, -1))
    spread, spread_se, spread_cutoff = _spread(windows, level / 2)
    trends = change.is_beyond(scale, one_sided)
    fluctuates = agreement > RHAT and spread - spread_cutoff * spread_se > scale
    verdict: Verdict = (
        "fail" if change.is_beyond(10 * scale, one_sided) else "caution" if trends or fluctuates else "pass"
    )
    within = "more than" if trends else "within" if abs(rise) <= scale else "not significantly above"
    reading = (
        f"Over the last half of the fit the ELBO {'rose' if rise >= 0 else 'fell'} by {number(abs(rise), se)} nats per "
        f"datum, {within} the limit of {number(scale)} (R-hat of {WINDOWS} windows: {agreement:.2f})."
    )
    return Check(
        name=NAME,
        value=rise,
        se=se,
        threshold=scale,
        verdict=verdict,
        reading=reading,
        next_step=_advice(verdict, rise, trends),
        details={
            "rhat": agreement,
            "rhat_threshold": RHAT,
            "window_means": windows.mean(1).tolist(),
            "window_spread": spread,
            "se_inflation": inflation,
            "steps": len(values),
            "level": level,
        },
    )


def check_levels(levels: Mapping[str, ArrayLike], num_data: int) -> Check:
    r"""Whether the bound had levelled when a fit without a fixed length let its learning rate decay.

    The fit itself has made the test, see `deepprob.fitting.levelling`; the check reports its last comparison.

    Args:
        levels: The comparisons, ``history.levels``.
        num_data: Number of rows, N.

    Returns:
        The change of the bound between the last two windows, in nats of the whole posterior.

    Examples:
        >>> columns = {"change": [9.0, 0.03], "se": [1.0, 0.01], "ahead": [0.0, 0.0], "margin": [0.1, 0.1]}
        >>> check_levels(columns | {"step": [500, 950], "level": [0.0, 1.0]}, 20).verdict
        'pass'
    """
    last = {name: float(np.asarray(values)[-1]) for name, values in levels.items()}
    change, se, margin = last["change"], last["se"], last["margin"]
    level = last["level"] > 0
    reading = (
        f"Between the last two windows before step {last['step']:.0f}, the bound of the whole posterior ({num_data} "
        f"rows) changed by {number(change, se)} nats"
    )
    if level:
        reading += f": within the margin of {number(margin)} nats, at an error rate of 5 %."
    elif last.get("windows"):
        reading += f": within the margin of {number(margin)} nats, but for one window only. Two in a row show it."
    elif change <= margin < last["ahead"]:
        reading += f", but it may rise by {number(last['ahead'])} nats on the way that the steps were going."
    else:
        reading += f": not surely within the margin of {number(margin)} nats. The fit ended at its budget of steps."
    return Check(
        name=NAME,
        value=change,
        se=se,
        threshold=margin,
        verdict="pass" if level else "caution",
        reading=reading,
        next_step="" if level else "Train on: dp.extend(posterior, data).",
        details={name: array(values).tolist() for name, values in levels.items()},
    )


def _spread(windows: Array, level: float) -> tuple[float, float, float]:
    """Largest difference between two window means, its standard error, and the cutoff for the maximum over pairs."""
    pieces = min(25, windows.shape[1])
    fine = windows[:, windows.shape[1] % pieces :].reshape(WINDOWS, pieces, -1).mean(2)
    residual = fine - fine.mean(1, keepdims=True)
    power = float(np.square(residual).sum())
    rho = float((residual[:, 1:] * residual[:, :-1]).sum()) / power if power > 0 else 0.0
    rho = float(np.clip(rho + (1 + 3 * rho) / pieces, 0.0, 0.95))
    freedom = WINDOWS * (pieces - 1)
    se = float(np.sqrt(2 * power / freedom / pieces * (1 + rho) / (1 - rho)))
    pairs = WINDOWS * (WINDOWS - 1) / 2
    return float(np.ptp(fine.mean(1))), se, float(stats.t.ppf(1 - level / (2 * pairs), freedom))


def _rhat(windows: Array) -> float:
    if np.ptp(windows) < 1e-12 * max(1.0, float(np.abs(windows).max())):
        return 1.0
    return rhat(windows, method="split") if windows.shape[1] >= 8 else rhat(windows, method="identity")


def _advice(verdict: Verdict, rise: float, trends: bool) -> str:
    if verdict == "pass":
        return ""
    if not trends:
        return "The ELBO fluctuates: lower the learning rate towards the end, or average the parameters."
    if rise > 0:
        return "Fit for longer (raise epochs= or steps= of svi), or raise the learning rate."
    return "The ELBO falls: lower the learning rate, and keep the best state."


def _applies(case: Case) -> bool:
    return len(case.posterior.history.steps.get("elbo", ())) > 0


def _run(case: Case, level: float) -> Check:
    history = case.posterior.history
    if history.levels:
        return check_levels(history.levels, case.posterior.instance.num_data)
    return check_convergence(settled(history), scale=_scale(case), level=level)


def settled(history: History) -> Array:
    """The ELBO after warm-up and annealing; one mean per epoch if there are enough epochs, else one value per step."""
    elbo = array(history.steps["elbo"])
    per_epoch = max(int(history.steps_per_epoch), 1)
    schedules = [array(x) for name, x in history.epochs.items() if name == "kl_weight" or name.startswith("annealed.")]
    warm = max((int(np.argmax(np.abs(x - x[-1]) <= 1e-9)) for x in schedules if len(x)), default=0)
    elbo = elbo[warm * per_epoch :]
    epochs = len(elbo) // per_epoch
    if per_epoch > 1 and epochs >= 2 * BATCHES:
        finite = np.where(np.isfinite(elbo), elbo, np.nan)[-epochs * per_epoch :]
        return array(np.nanmean(finite.reshape(epochs, -1), 1))
    return elbo


def _scale(case: Case) -> float:
    """The smallest relevant change: a share of the spread over rows, robust to outliers and independent of units."""
    found = case.posterior.structure
    if not found.observed and not found.rows:
        return 0.01  # a guide fitted to a prior
    batch = given(case.sample_batch)
    try:
        rows = array(case.posterior.elbo(*batch)).ravel()
    except ValueError:  # the bound does not split into rows
        sites = found.observed
        rows = np.concatenate([array(case.posterior.log_likelihood(*batch, draws=1, site=n))[0] for n in sites])
    rows = rows[np.isfinite(rows)]
    spread = float(np.subtract(*np.percentile(rows, [75, 25]))) / 1.349 if len(rows) >= 8 else 0.0
    return SHARE_OF_SPREAD * spread if spread > 0 else 0.01


elbo_convergence = Diagnostic(NAME, "Has the ELBO converged?", _applies, _run, about="fit", tests=True)
