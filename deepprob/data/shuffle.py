"""Shuffle: which rows each step of an epoch sees."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deepprob.errors import whole


class Shuffle:
    r"""Endless minibatches of one size, as row numbers.

    An epoch is one permutation of the rows cut into :math:`\lceil N / B \rceil` batches; the
    last one wraps around to the permutation's start, so that every batch has the same size. A
    full batch keeps the rows in order and draws nothing.

    Rows may come in groups that should not be mixed (short and long sequences): then the rows of an epoch are sorted by
    group, at random within each, before they are cut into batches, and the batches come in random order. Only a batch
    on a border holds rows of several groups.

    Args:
        num_data: The number of rows N.
        batch_size: The rows B in a batch; None, N or more is the full batch.
        generator: Where the permutations come from, and the device they live on.
        groups: Number of each row's group, shape ``(N,)``, on the same device; None for one group.

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
        order = torch.randperm(self.num_data, generator=self.generator, device=device)
        missing = self.steps_per_epoch * self.batch_size - self.num_data
        order = torch.cat([order, order[:missing]])
        if self.groups is None:
            return order.view(self.steps_per_epoch, self.batch_size)
        # Sorted after the rows that come twice are chosen: every row is equally likely to be one of them.
        batches = order[self.groups[order].argsort(stable=True)].view(self.steps_per_epoch, self.batch_size)
        return batches[torch.randperm(self.steps_per_epoch, generator=self.generator, device=device)]

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield from self.epoch()
