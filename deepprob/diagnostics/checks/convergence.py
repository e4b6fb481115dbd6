"""Has the ELBO levelled off?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from deepprob.diagnostics.case import Case, Diagnostic
from deepprob.diagnostics.check import Array, Check, Verdict, array, number
from deepprob.posteriors.arviz_compat import rhat
from deepprob.posteriors.history import History

BATCHES = 20  # batch means of the last half; their residuals give the standard error
WINDOWS = 4
RHAT = 1.1
# A change is worth an epoch more if it is at least this share of the spread of the ELBO over rows.
SHARE_OF_SPREAD = 0.02
NAME = "elbo converged"


def levelled_off(elbo: ArrayLike, *, scale: float = 0.01, level: float = 0.05) -> Check:
    r"""Whether the ELBO still moves by more than a given amount over the last half of the fit.

    The last half is cut into 20 batches with means :math:`m_j`. A line through them rises by
    :math:`r` from the first to the last; its standard error grows by :math:`\sqrt{(1 + \rho) / (1 -
    \rho)}` where the residuals have autocorrelation :math:`\rho`. The ELBO still moves if
    :math:`|r|` is beyond ``scale`` at the level, or if R-hat of four windows is above 1.1 and two
    of their means differ by more than ``scale`` at the level.

    Args:
        elbo: One value per step (or epoch), nats per datum; steps that are not finite are left out.
        scale: The least change that matters, nats per datum.
        level: The false-alarm rate for an ELBO whose changes do not matter.

    Returns:
        The rise over the last half; ``"fail"`` if it is beyond ten times the scale.

    References:
        Dhaka, Catalina, Andersen, Magnusson, Huggins, Vehtari (2020), Robust, accurate stochastic
        optimization for variational inference.

    Examples:
        >>> noise = np.random.default_rng(0).normal(size=1000)
        >>> levelled_off(noise).verdict, levelled_off(noise + 0.01 * np.arange(1000)).verdict
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
            reading=f"A fit of {len(values)} steps is too short to tell; {2 * BATCHES} are needed.",
            next_step="Fit for more steps.",
            details={"steps": len(values)},
        )
    tail = tail[len(tail) % BATCHES :]
    means = tail.reshape(BATCHES, -1).mean(1)
    rise, se, inflation = _trend(means)
    cutoff = float(stats.t.ppf(1 - level / 4, BATCHES - 2))  # two-sided, and half of the level is for the windows
    windows, agreement = tail.reshape(WINDOWS, -1), _rhat(tail.reshape(WINDOWS, -1))
    spread, spread_se, spread_cutoff = _spread(windows, level / 2)
    moves = abs(rise) - cutoff * se > scale
    wanders = agreement > RHAT and spread - spread_cutoff * spread_se > scale
    verdict: Verdict = "fail" if abs(rise) - cutoff * se > 10 * scale else "caution" if moves or wanders else "pass"
    change = "rose" if rise >= 0 else "fell"
    reading = (
        f"Over the last half of the fit the ELBO {change} by {number(abs(rise), se)} nats per datum; "
        f"up to {number(scale)} counts as level{', which the noise allows' if abs(rise) > scale and not moves else ''} "
        f"(R-hat of its {WINDOWS} windows: {agreement:.2f})."
    )
    return Check(
        name=NAME,
        value=rise,
        se=se,
        threshold=scale,
        verdict=verdict,
        reading=reading,
        next_step=_advice(verdict, rise, moves),
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


def _trend(means: Array) -> tuple[float, float, float]:
    """Rise of a line through the batch means, its standard error, and how much autocorrelation inflates that."""
    n = len(means)
    time = np.arange(n) - (n - 1) / 2
    slope = float(time @ means / (time @ time))
    residual = means - means.mean() - slope * time
    power = float(residual @ residual)
    rho = float(residual[1:] @ residual[:-1]) / power if power > 0 else 0.0
    rho = float(np.clip(rho + (1 + 4 * rho) / n, 0.0, 0.95))  # the bias of an autocorrelation after detrending
    inflation = float(np.sqrt((1 + rho) / (1 - rho)))
    se = inflation * float(np.sqrt(power / (n - 2) / (time @ time)))
    return slope * (n - 1), se * (n - 1), inflation


def _spread(windows: Array, level: float) -> tuple[float, float, float]:
    """Largest difference between two windows' means, its standard error, and a cutoff for the largest of all."""
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


def _advice(verdict: Verdict, rise: float, moves: bool) -> str:
    if verdict == "pass":
        return ""
    if not moves:
        return "The ELBO wanders: lower the learning rate towards the end, or average the parameters."
    if rise > 0:
        return "Fit for more epochs, or raise the learning rate."
    return "The ELBO falls: lower the learning rate, and keep the best state."


def _applies(case: Case) -> bool:
    return len(case.posterior.history.steps.get("elbo", ())) > 0


def _run(case: Case, level: float) -> Check:
    history = case.posterior.history
    return levelled_off(settled(history), scale=_scale(case), level=level)


def settled(history: History) -> Array:
    """The ELBO after warm-up and annealing, by epoch where there are enough of them: an epoch sees every row once."""
    elbo = array(history.steps["elbo"])
    per_epoch = max(int(history.steps_per_epoch), 1)
    moved = [array(x) for name, x in history.epochs.items() if name == "kl_weight" or name.startswith("annealed.")]
    warm = max((int(np.argmax(np.abs(x - x[-1]) <= 1e-9)) for x in moved if len(x)), default=0)
    elbo = elbo[warm * per_epoch :]
    epochs = len(elbo) // per_epoch
    if per_epoch > 1 and epochs >= 2 * BATCHES:
        finite = np.where(np.isfinite(elbo), elbo, np.nan)[-epochs * per_epoch :]
        return array(np.nanmean(finite.reshape(epochs, -1), 1))
    return elbo


def _scale(case: Case) -> float:
    """What matters is measured against how much rows differ: free of units, and robust to a few wild rows."""
    rows = array(case.posterior.elbo(*case.sample_batch)).ravel()
    rows = rows[np.isfinite(rows)]
    spread = float(np.subtract(*np.percentile(rows, [75, 25]))) / 1.349 if len(rows) >= 8 else 0.0
    return SHARE_OF_SPREAD * spread if spread > 0 else 0.01


elbo_converged = Diagnostic(NAME, "Has the ELBO levelled off?", _applies, _run, tests=True)
