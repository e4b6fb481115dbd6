"""The order of the rows in a fit, which a resumed fit continues."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deepprob.data import Shuffle

_SALT = 0x5EED  # added to the fit's seed, so that the order of the rows does not depend on the noise


class _Order(Protocol):
    def reach(self, first: int, end: int) -> int: ...

    def rows(self, first: int, end: int) -> Tensor: ...


def in_calls(order: _Order, first: int, end: int, most: int) -> Iterator[Tensor]:
    """The rows of the steps from ``first`` to before ``end``, call by call.

    Args:
        order: The order of the rows.
        first: The first step.
        end: The step after the last one.
        most: Most steps in a call.
    """
    while first < end:
        stop = order.reach(first, min(first + most, end))
        yield order.rows(first, stop)
        first = stop


class RowOrder:
    """The rows of every step's batch.

    Args:
        num_data: Number of rows, N.
        batch_size: Rows of a batch, B.
        bucket_of_row: The length bucket of each row, shape ``(N,)``; None if there is only one.
        seed: The fit's seed.
    """

    class Position(NamedTuple):
        """The generator's state, its state before the current epoch, and the rows of that epoch."""

        generator: Tensor
        epoch: Tensor
        rows: Tensor | None

    def __init__(self, num_data: int, batch_size: int, bucket_of_row: Tensor | None, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed + _SALT)
        self._shuffle = Shuffle(num_data, batch_size, self._generator, bucket_of_row)
        self._epoch = self._generator.get_state()
        self._rows: Tensor | None = None  # of the current epoch
        self.steps_per_epoch = self._shuffle.steps_per_epoch

    def reach(self, first: int, end: int) -> int:
        """The last of some steps that one call can take: of rows in memory, the last one."""
        return end

    def close(self) -> None:
        """End the reading of rows; those in memory are read already."""

    def rows(self, first: int, end: int) -> Tensor:
        """The rows of each batch from step ``first`` to before step ``end``, shape ``(n, B)``.

        Calls must follow each other: ``first`` is the ``end`` of the previous call.
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
        """The present position, for `go_back`."""
        return self.Position(self._generator.get_state(), self._epoch, self._rows)

    def go_back(self, position: Position) -> None:
        """Continue from an earlier `position`."""
        generator, self._epoch, self._rows = position
        self._generator.set_state(generator)

    @property
    def epoch_state(self) -> Tensor:
        """The generator's state before the current epoch, which is enough to resume from a checkpoint."""
        return self._epoch

    def resume(self, epoch_state: Tensor, step: int) -> None:
        """Continue before a step of the epoch that began with ``epoch_state``."""
        self._epoch, self._rows = epoch_state, None
        self._generator.set_state(epoch_state)
        if step and step % self.steps_per_epoch == 0:
            self._shuffle.epoch()  # that epoch is complete; the next one draws the next permutation
