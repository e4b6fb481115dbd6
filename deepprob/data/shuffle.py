"""Shuffle: the rows of every step of an epoch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deepprob.errors import whole


class Shuffle:
    r"""Endless minibatches of one size, as row indices.

    An epoch is one permutation of the rows, cut into :math:`\lceil N / B \rceil` batches. The last batch is filled up
    from the permutation's start, so all batches have the same size. A full batch keeps the rows in order and draws no
    random numbers.

    With ``groups``, such as short and long sequences, the rows of an epoch are sorted by group, in random order within
    a group, and cut into batches, whose order is random. Only batches at the border of two groups mix their rows.

    Args:
        num_data: Number of rows, N.
        batch_size: Rows per batch, B; None, N or more is the full batch.
        generator: The source of the permutations, on the device of the indices.
        groups: Group number of each row, shape ``(N,)``, on the same device; None for one group.

    Raises:
        ValueError: If a size is not a whole number of at least 1.

    Examples:
        Every row is seen in every epoch:

        >>> shuffle = Shuffle(5, 2, torch.Generator().manual_seed(0))
        >>> rows = shuffle.epoch()
        >>> rows.shape, sorted(set(rows.flatten().tolist()))
        (torch.Size([3, 2]), [0, 1, 2, 3, 4])
    """

    def __init__(
        self, num_data: int, batch_size: int | None, generator: torch.Generator, groups: Tensor | None = None
    ) -> None:
        self.num_data = whole("num_data", num_data)
        self.batch_size = self.num_data if batch_size is None else min(whole("batch_size", batch_size), self.num_data)
        self.steps_per_epoch = -(-self.num_data // self.batch_size)
        self.generator, self.groups = generator, groups

    def epoch(self) -> Tensor:
        """The rows of the next epoch, shape ``(steps_per_epoch, batch_size)``."""
        device = self.generator.device
        if self.batch_size == self.num_data:
            return torch.arange(self.num_data, device=device).unsqueeze(0)  # (1, N)
        order = torch.empty(self.steps_per_epoch * self.batch_size, dtype=torch.long, device=device)
        torch.randperm(self.num_data, generator=self.generator, device=device, out=order[: self.num_data])
        order[self.num_data :] = order[: len(order) - self.num_data]
        if self.groups is None:
            return order.view(self.steps_per_epoch, self.batch_size)
        # Sorting comes after the choice of the repeated rows, so that every row is equally likely to be repeated.
        batches = order[self.groups[order].argsort(stable=True)].view(self.steps_per_epoch, self.batch_size)
        return batches[torch.randperm(self.steps_per_epoch, generator=self.generator, device=device)]

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield from self.epoch()
