"""Schedules of the weight of the KL."""

from __future__ import annotations

import math
from typing import Any

from deepprob.errors import positive, whole
from deepprob.fitting.callbacks import Callback, Fit, warn_if_longer


class KLWarmUp(Callback):
    r"""Raise the weight of the KL linearly from ``start_weight`` to 1.

    Args:
        epochs: Epochs until the weight is 1.
        start_weight: The weight at the first step.

    Examples:
        >>> warm_up = KLWarmUp(epochs=2)
        >>> [warm_up.kl_weight(step, steps_per_epoch=2) for step in range(5)]
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """

    def __init__(self, epochs: float, start_weight: float = 0.0) -> None:
        if not epochs > 0:
            raise ValueError(f"KLWarmUp's epochs must be positive; got {epochs}.")
        if not 0 <= start_weight <= 1:
            raise ValueError(f"KLWarmUp's start_weight must lie in [0, 1]; got {start_weight}.")
        self.epochs, self.start_weight = epochs, start_weight

    def start(self, fit: Fit) -> None:
        warn_if_longer(self, self.epochs, fit, "the KL never reaches its full weight. Shorten the warm-up")

    def warm_up(self, fit: Fit) -> int:
        return math.ceil(self.epochs * fit.steps_per_epoch)

    @property
    def settings(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "start_weight": self.start_weight}

    def kl_weight(self, step: int, steps_per_epoch: int) -> float:
        done = min(1.0, step / (self.epochs * steps_per_epoch))
        return self.start_weight + (1.0 - self.start_weight) * done


class KLCycles(Callback):
    r"""Raise the weight of the KL from 0 to 1 several times, and hold it at 1 in between and after.

    .. math:: \beta_s = \min\Big(1, \frac{\tau}{R}\Big), \qquad
              \tau = \frac{s \bmod (S / M)}{S / M}

    at step :math:`s`, with M cycles in the S steps of ``epochs``. Every cycle starts from codes that carry more
    information than those before, which keeps a strong decoder from ignoring them.

    Args:
        epochs: Epochs of all cycles together; the weight is 1 from then on.
        cycles: Number of cycles, M.
        rise: The share of a cycle in which the weight rises, R.

    Raises:
        ValueError: If a number is out of range.

    References:
        Fu, Li, Liu, Gao, Celikyilmaz, Carin (2019), Cyclical Annealing Schedule.

    Examples:
        >>> schedule = KLCycles(epochs=2, cycles=2)
        >>> [schedule.kl_weight(step, steps_per_epoch=4) for step in range(9)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    """

    def __init__(self, epochs: float, cycles: int = 4, rise: float = 0.5) -> None:
        self.epochs, self.cycles = positive("KLCycles's epochs", epochs), whole("KLCycles's cycles", cycles)
        if not 0 < rise <= 1:
            raise ValueError(f"KLCycles's rise must lie in (0, 1]; got {rise}.")
        self.rise = rise

    def start(self, fit: Fit) -> None:
        warn_if_longer(self, self.epochs, fit, "the fit ends within a cycle. Shorten the schedule")

    def warm_up(self, fit: Fit) -> int:
        return math.ceil(self.epochs * fit.steps_per_epoch)

    @property
    def settings(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "cycles": self.cycles, "rise": self.rise}

    def kl_weight(self, step: int, steps_per_epoch: int) -> float:
        done = step / (self.epochs * steps_per_epoch) * self.cycles
        return 1.0 if done >= self.cycles else min(1.0, done % 1.0 / self.rise)
