"""Which rows the batches of a fit hold, in an order that a resumed fit continues."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepprob.data import Shuffle

_SALT = 0x5EED  # the order of the rows has a seed of its own, so that it does not depend on the noise


class RowOrder:
    """The rows of every step's batch.

    Args:
        num_data: Number of rows, N.
        batch_size: Rows of a batch, B.
        groups: Which length bucket each row belongs to, shape ``(N,)``; None if there is one for all.
        seed: The fit's seed.
    """

    class Position(NamedTuple):
        """Where the order is: the generator's state, its state before the current epoch, the epoch's rows."""

        generator: Tensor
        epoch: Tensor
        rows: Tensor | None

    def __init__(self, num_data: int, batch_size: int, groups: Tensor | None, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed + _SALT)
        self._shuffle = Shuffle(num_data, batch_size, self._generator, groups)
        self._epoch = self._generator.get_state()
        self._rows: Tensor | None = None  # of the current epoch
        self.steps_per_epoch = self._shuffle.steps_per_epoch

    def rows(self, first: int, end: int) -> Tensor:
        """The rows of the batches from one step to before another, shape ``(n, B)``; ``(1, N)`` if all see all rows.

        Steps are asked for one after the other.
        """
        if self._shuffle.batch_size == self._shuffle.num_data:
            return torch.arange(self._shuffle.num_data).expand(end - first, -1)  # (n, N), without a copy
        parts, step = [], first
        while step < end:
            start = step % self.steps_per_epoch
            if start == 0:
                self._epoch = self._generator.get_state()
            if start == 0 or self._rows is None:
                self._rows = self._shuffle.epoch()
            parts.append(self._rows[start : start + end - step])
            step += len(parts[-1])
        return torch.cat(parts)

    @property
    def position(self) -> Position:
        """The position, to go back to."""
        return self.Position(self._generator.get_state(), self._epoch, self._rows)

    def go_back(self, position: Position) -> None:
        """Continue from an earlier position."""
        generator, self._epoch, self._rows = position
        self._generator.set_state(generator)

    @property
    def epoch_state(self) -> Tensor:
        """State of the generator before the current epoch: all that a checkpoint needs."""
        return self._epoch

    def resume(self, epoch_state: Tensor, step: int) -> None:
        """Continue at a step of the epoch that began with a state of the generator."""
        self._epoch, self._rows = epoch_state, None
        self._generator.set_state(epoch_state)
        if step and step % self.steps_per_epoch == 0:
            self._shuffle.epoch()  # that epoch is over: the next one draws the next permutation
