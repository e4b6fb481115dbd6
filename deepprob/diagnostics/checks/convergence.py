"""Has the ELBO converged?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Array, Check, Verdict, array, number
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.engine.statistics import Change, line_rise
from deepprob.posteriors.arviz_compat import rhat
from deepprob.posteriors.history import History
from deepprob.posteriors.margin import margin_of

BATCHES = 20  # the last half is averaged in this many batches, whose residuals give the standard error
WINDOWS = 4
NAME = "ELBO convergence"
_FREEDOM = 30.0  # of the standard errors of a comparison, about
_MORE = "Train on: dp.extend(posterior, data)."
_NOISE = 0.1  # signal-to-noise ratio of one gradient, up to which a hundred steps are needed to see it
_AVERAGE = (
    "The gradient of a step is mostly noise: train on with more particles, "
    "dp.extend(posterior, data, objective=dp.ELBO(particles=10)), or fit with larger batches."
)
_LOWER = "Lower the learning rate towards the end (Optimizer(schedule='cosine')), or average the parameters."


def check_convergence(elbo: ArrayLike, *, margin: float = 0.01, level: float = 0.05) -> Check:
    r"""Whether the ELBO is known to have changed by less than a margin over the last half of a fit.

    The check of a fit that has made no comparison of its own, see `check_levels`: one that was interrupted, ended
    by a callback, or shorter than 100 steps. The last half is cut into 20 batches. The line fitted to their means
    rises by :math:`r` from the first to the last; autocorrelation :math:`\rho` of the residuals inflates its standard
    error by :math:`\sqrt{(1 + \rho) / (1 - \rho)}`. The ELBO is level if :math:`|r|` is below the margin at an error
    rate of ``level``; noise that hides a change does not show that there is none.

    Args:
        elbo: One value per step (or epoch), nats of the whole posterior; non-finite values are left out.
        margin: The smallest relevant change, in the same unit.
        level: The error rate for an ELBO that changes by the margin.

    Returns:
        The rise over the last half; a fail if it is surely above ten times the margin.

    References:
        Schuirmann (1987), A comparison of the two one-sided tests procedure and the power approach.
        Dhaka, Catalina, Andersen, Magnusson, Huggins, Vehtari (2020), Robust, accurate stochastic
        optimization for variational inference.

    Examples:
        >>> noise = np.random.default_rng(0).normal(size=1000)
        >>> [check_convergence(x, margin=1.0).verdict for x in (noise, 9 * noise, noise + 0.1 * np.arange(1000))]
        ['pass', 'caution', 'fail']
    """
    values = array(elbo)
    values = values[np.isfinite(values)]
    tail = values[len(values) // 2 :]
    if len(tail) < BATCHES:
        return Check(
            name=NAME,
            value=float("nan"),
            se=None,
            threshold=margin,
            verdict="caution",
            reading=f"{len(values)} steps do not tell whether the ELBO has converged, because windows of them are too "
            f"short to compare; {2 * BATCHES} may.",
            next_step=_MORE,
            details={"steps": len(values)},
            unit="nats",
        )
    tail = tail[len(tail) % BATCHES :]
    change, inflation = line_rise(tail.reshape(BATCHES, -1).mean(1))
    rhat = iterate_rhat(tail)
    verdict: Verdict = (
        "pass" if change.is_within(margin, level) else "fail" if change.is_beyond(10 * margin, level) else "caution"
    )
    surely = verdict == "fail" or change.is_beyond(margin, level)
    reading = (
        f"Over the last half of the fit the ELBO {'rose' if change.value >= 0 else 'fell'} by "
        f"{number(abs(change.value), change.se)} nats (margin {number(margin)}; R-hat of {WINDOWS} windows {rhat:.2f})"
        + ": "
        + ("level." if verdict == "pass" else "not level." if surely else "too noisy to tell whether it is level.")
    )
    return Check(
        name=NAME,
        value=abs(change.value),
        se=change.se,
        threshold=margin,
        verdict=verdict,
        reading=reading,
        next_step="" if verdict == "pass" else _MORE if change.value >= 0 or not surely else _LOWER,
        details={"rhat": rhat, "rise": change.value, "se_inflation": inflation, "steps": len(values), "level": level},
        unit="nats",
    )


def check_levels(levels: Mapping[str, ArrayLike], num_data: int, rhat: float = 1.0, steps: int = 0) -> Check:
    r"""Whether the bound had levelled at the end of a fit, or when a fit without a fixed length let its rate decay.

    The fit itself has made the test, by fresh evaluations of the bound; see `deepprob.fitting.levelling`. The check
    reports its last comparison.

    Args:
        levels: The comparisons, ``history.levels``.
        num_data: Number of rows, N.
        rhat: R-hat of the ELBO over windows of the last half of the fit.
        steps: Number of steps of the fit. Only a comparison at its end tells of the state that the posterior holds.

    Returns:
        The change of the bound between two windows, in nats of the whole posterior, or the rise ahead if it
        is larger. A fail if one is surely above ten times the margin.

    Examples:
        >>> columns = {"change": [9.0, 0.03], "se": [1.0, 0.01], "ahead": [0.0, 0.0], "margin": [0.1, 0.1]}
        >>> columns |= {"ahead_se": [0.0, 0.0], "step": [500, 950], "windows": [0, 2], "level": [0.0, 1.0]}
        >>> check_levels(columns, 20).verdict
        'pass'
    """
    last = {name: float(np.asarray(values)[-1]) for name, values in levels.items()}
    margin, level = last["margin"], last["level"] > 0
    change = Change(abs(last["change"]), last["se"], _FREEDOM)
    ahead = Change(last["ahead"], last.get("ahead_se", 0.0), _FREEDOM)
    behind = Change(-last.get("held", 0.0), last.get("held_se", 0.0), _FREEDOM)
    noisy = behind.value > 0 and behind.is_beyond(margin) and last["step"] >= steps
    shown = ahead if ahead.value > change.value and not level else change
    fails = change.is_beyond(10 * margin) or ahead.is_beyond(10 * margin)
    verdict: Verdict = "pass" if level and not noisy else "fail" if fails else "caution"
    reading = (
        f"Between two windows of steps up to step {last['step']:.0f}, the bound of the whole posterior "
        f"({num_data} rows) changed by {number(last['change'], last['se'])} nats (margin {number(margin)})"
    )
    if level:
        reading += ": level, at an error rate of 5 %."
    elif last.get("windows"):
        reading += ": level, but for one window only. Two in a row show it."
    elif ahead.is_beyond(margin):
        reading += f", and it would rise by {number(ahead.value, ahead.se)} nats on the way that the steps were going."
    elif change.is_beyond(margin):
        reading += ": not level."
    else:
        reading += ". This is too noisy to tell whether it is level."
    if noisy:
        shown = behind
        reading += (
            f" The state that the posterior holds lies {number(behind.value, behind.se)} nats below the average of the "
            "last window: its steps are too large."
        )
    return Check(
        name=NAME,
        value=shown.value,
        se=shown.se,
        threshold=margin,
        verdict=verdict,
        reading=reading,
        next_step="" if verdict == "pass" else _LOWER if level else _MORE,
        details={"rhat": rhat, **{name: array(values).tolist() for name, values in levels.items()}},
        unit="nats",
    )


def iterate_rhat(values: Array) -> float:
    """R-hat of a series over its four quarters; near 1 if it wanders no more between them than inside of them."""
    windows = values[len(values) % WINDOWS :].reshape(WINDOWS, -1)
    if not windows.size or np.ptp(windows) < 1e-12 * max(1.0, float(np.abs(windows).max())):
        return 1.0
    return rhat(windows, method="split") if windows.shape[1] >= 8 else rhat(windows, method="identity")


def _applies(case: Case) -> bool:
    return len(case.posterior.history.steps.get("elbo", ())) > 0


def with_signal(check: Check, gradients: Mapping[str, Sequence[float]]) -> Check:
    """A check of convergence, with the signal-to-noise ratio of one step's gradient at the end of the fit.

    The ratio has no limit of its own: it is small where the fit has converged. Where it has not, a small one says that
    the steps are noise rather than progress.

    Args:
        check: The check.
        gradients: The ratio and its standard error by trained parameter, ``history.gradients``.

    Examples:
        >>> check = check_convergence(np.random.default_rng(0).normal(size=1000), margin=0.1)
        >>> with_signal(check, {"scale": [0.02, 0.03]}).next_step.split(":")[0]
        'The gradient of a step is mostly noise'
    """
    if not gradients:
        return check
    name, (ratio, se) = max(gradients.items(), key=lambda item: item[1][0])
    reading = f"{check.reading} The signal-to-noise ratio of one gradient is at most {number(ratio, se)} ({name})."
    noisy = check.verdict != "pass" and ratio < _NOISE and check.next_step == _MORE
    details = {**check.details, "signal_to_noise": {n: [*x] for n, x in gradients.items()}}
    return replace(check, reading=reading, details=details, next_step=_AVERAGE if noisy else check.next_step)


def _run(case: Case, level: float) -> Check:
    history, instance = case.posterior.history, case.posterior.instance
    elbo = settled(history)
    if history.levels:
        rhat, steps = iterate_rhat(elbo[len(elbo) // 2 :]), len(history.steps["elbo"])
        found = check_levels(history.levels, instance.num_data, rhat, steps)
    else:
        found = check_convergence(elbo * instance.num_data, margin=margin_of(instance))
    return with_signal(found, history.gradients)


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


elbo_convergence = Diagnostic(NAME, "Has the ELBO converged?", _applies, _run, about="fit")
