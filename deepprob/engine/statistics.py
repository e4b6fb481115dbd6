"""Changes of a noisy quantity, with standard errors, and tests that they are small or large."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

Array = npt.NDArray[np.float64]


class Change(NamedTuple):
    """An estimated change.

    Attributes:
        value: The estimate.
        se: Its standard error.
        freedom: Degrees of freedom of the standard error.

    Examples:
        A change is small only if it is known to be small:

        >>> Change(0.02, 0.01, 30).is_within(0.1), Change(0.02, 0.5, 30).is_within(0.1)
        (True, False)
        >>> Change(0.8, 0.1, 30).is_beyond(0.1), Change(0.8, 0.5, 30).is_beyond(0.1)
        (True, False)
    """

    value: float
    se: float
    freedom: float

    def half_width(self, level: float) -> float:
        """Half the width of a one-sided interval of error rate ``level``."""
        return float(stdtrit(self.freedom, 1 - level)) * self.se if self.se > 0 else 0.0

    def is_within(self, margin: float, level: float = 0.05) -> bool:
        """Whether the change is equivalent to none: both one-sided tests reject a change of ``margin``.

        References:
            Schuirmann (1987), A comparison of the two one-sided tests procedure and the power approach.
        """
        return math.isfinite(self.value) and abs(self.value) + self.half_width(level) <= margin

    def is_beyond(self, margin: float, level: float = 0.05) -> bool:
        """Whether the change is significantly larger than ``margin``, upwards or downwards."""
        return math.isfinite(self.value) and abs(self.value) - self.half_width(level) > margin


def paired_change(before: Array, after: Array) -> Change:
    """The mean of ``after - before``, whose entries share their noise in pairs; nan if an entry is not finite.

    Examples:
        >>> noise = np.random.default_rng(0).normal(size=100)
        >>> change = paired_change(noise, noise + 0.5)
        >>> round(change.value, 6), round(change.se, 6)
        (0.5, 0.0)
    """
    differences = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    if len(differences) < 2 or not np.isfinite(differences).all():
        return Change(math.nan, math.nan, 1.0)
    se = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return Change(float(differences.mean()), se, len(differences) - 1.0)


def line_rise(means: Array) -> tuple[Change, float]:
    r"""The rise of the line fitted to a series, from its first entry to its last.

    Autocorrelation :math:`\rho` of the residuals inflates the standard error by :math:`\sqrt{(1 + \rho)/(1 - \rho)}`.

    Returns:
        The rise, and the factor by which autocorrelation inflates its standard error.
    """
    n = len(means)
    time = np.arange(n) - (n - 1) / 2
    slope = float(time @ means / (time @ time))
    residual = means - means.mean() - slope * time
    power = float(residual @ residual)
    rho = float(residual[1:] @ residual[:-1]) / power if power > 0 else 0.0
    rho = float(np.clip(rho + (1 + 4 * rho) / n, 0.0, 0.95))  # corrects the bias that detrending causes
    inflation = math.sqrt((1 + rho) / (1 - rho))
    se = inflation * math.sqrt(power / (n - 2) / float(time @ time))
    return Change(slope * (n - 1), se * (n - 1), n - 2.0), inflation


def signal_to_noise(gradients: Array) -> tuple[float, float]:
    r"""Signal-to-noise ratio of one gradient, and its standard error by the jackknife; nan without noise.

    .. math:: \sqrt{\|E g\|^2 \, / \, \mathrm{tr} \, \mathrm{Var} \, g}

    Args:
        gradients: Independent estimates of a gradient, shape ``(n, D)``.

    References:
        Rainforth et al. (2018), Tighter variational bounds are not necessarily better.

    Examples:
        >>> noise = np.random.default_rng(0).normal(size=(200, 3))
        >>> ratio, se = signal_to_noise(noise + 1.0)
        >>> abs(ratio - 1.0) < 3 * se < 0.5
        True
    """
    count, squares = len(gradients), np.square(gradients).sum(1)
    total, square = gradients.sum(0), squares.sum()

    def ratio(norm: Array, square: Array, n: int) -> Array:
        noise = (square - norm / n) / (n - 1)
        signal = np.maximum(norm - square, 0.0) / (n * (n - 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(noise > 1e-9 * square / n, np.sqrt(signal / noise), np.nan)

    whole = float(ratio(np.square(total).sum(), square, count))
    without = ratio(np.square(total - gradients).sum(1), square - squares, count - 1)
    return whole, float(np.sqrt((count - 1) * np.var(without)))
