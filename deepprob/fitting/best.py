"""Which state of a fit the posterior will hold."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

Tensors = dict[str, Tensor]


class Best:
    """The best state so far: with held-out data that of the best score, else the last one.

    Args:
        tensors: The state before the first step.
        scored: Whether scores on held-out data tell states apart.

    Attributes:
        tensors: The state.
        epoch: After which epoch it was taken; 0 before the first.
        value: Its score; minus infinity while scores cannot be compared.
    """

    def __init__(self, tensors: Tensors, scored: bool) -> None:
        self.tensors, self.epoch, self.value = tensors, 0, -math.inf
        self._scored = scored
        self._before: tuple[Tensors, int] | None = None

    def offer(self, value: float, epoch: int, current: Callable[[], Tensors], *, warming_up: bool) -> None:
        """Take the state after an epoch if it is the best.

        Args:
            value: The epoch's score, or its mean ELBO.
            epoch: Number of the epoch, from 1.
            current: Copies the state.
            warming_up: Whether the objective still changes, so that scores cannot be compared.
        """
        if not math.isfinite(value) or not (not self._scored or warming_up or value > self.value):
            return
        if not self._scored:
            self._before = self.tensors, self.epoch
        self.value = -math.inf if warming_up else value
        self.tensors, self.epoch = current(), epoch

    def confirm(self) -> None:
        """A finite step was taken from the last state."""
        self._before = None

    def withdraw(self) -> None:
        """Go back to the state before, if no finite step was taken from the last one."""
        if self._before is not None:
            self.tensors, self.epoch = self._before
