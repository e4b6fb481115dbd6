"""The parameters of a fit that its posterior will hold."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

Tensors = dict[str, Tensor]


class BestState:
    """The state with the best held-out bound; without one, the state after the last good epoch.

    A score of held-out rows without the KL of global latents would prefer a guide that is too narrow, so it does not
    count.

    Args:
        tensors: The state before the first step.
        scored: Whether the fit has a held-out bound.

    Attributes:
        tensors: The best state.
        epoch: The epoch after which it was taken; 0 for the state before the first step.
        scored: As given.
        value: Its score; minus infinity while scores cannot be compared.
    """

    def __init__(self, tensors: Tensors, scored: bool) -> None:
        self.tensors, self.epoch, self.value = tensors, 0, -math.inf
        self.scored = scored
        self._previous: tuple[Tensors, int] | None = None

    def offer(self, value: float, epoch: int, current: Callable[[], Tensors], *, warming_up: bool) -> None:
        """Keep the state after an epoch if it is the best so far.

        Args:
            value: The epoch's score, or its mean ELBO.
            epoch: Number of the epoch, from 1.
            current: Returns a copy of the state.
            warming_up: Whether the objective still changes, so that scores cannot be compared.
        """
        if not math.isfinite(value) or not (not self.scored or warming_up or value > self.value):
            return
        if not self.scored:
            self._previous = self.tensors, self.epoch
        self.value = -math.inf if warming_up else value
        self.tensors, self.epoch = current(), epoch

    def confirm(self) -> None:
        """Mark the last state as good: a finite step was taken from it."""
        self._previous = None

    def withdraw(self) -> None:
        """Return to the previous state if no finite step was taken from the last one."""
        if self._previous is not None:
            self.tensors, self.epoch = self._previous
