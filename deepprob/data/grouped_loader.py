"""Several batches of a loader in one message of its worker processes.

A message between processes costs half a millisecond and more, several times the time in which a worker makes a small
batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils._pytree import tree_unflatten
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from deepprob.data.containers import Container, joined_alike, leaves_of

_SECONDS = 0.05  # of waiting for a message


class GroupedLoader:
    """A loader that gives the batches of another one, whose workers send several together.

    Rows, batches and their order are those of the other loader. A worker makes consecutive batches, where those of
    the other loader take turns.

    Args:
        loader: The other loader; see `applies`.

    Attributes:
        most: Most batches in a message. As many are sent as 50 ms bring.
        in_next_message: Number of batches in the next message: those that an error concerns.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.most, self._sent = 1, deque[int]()
        self._waited, self._received = 0.0, 0
        self._loader = DataLoader(
            loader.dataset,
            batch_sampler=_Groups(loader, self),
            num_workers=loader.num_workers,
            collate_fn=_InGroups(loader.collate_fn, loader.batch_size or 1),
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    @staticmethod
    def applies(loader: DataLoader[Any]) -> bool:
        """Whether a loader has workers, rows by index, and batches of one size, in order."""
        plain = type(loader) is DataLoader and type(loader.batch_sampler) is BatchSampler
        return plain and loader.num_workers > 0 and loader.in_order and not isinstance(loader.dataset, IterableDataset)

    @property
    def in_next_message(self) -> int:
        return self._sent[0] if self._sent else 1

    @property
    def size(self) -> int:
        """Number of batches that a message should have."""
        return max(1, min(self.most, int(_SECONDS * self._received / max(self._waited, 1e-9))))

    def asked(self, batches: int) -> None:
        """Note that a worker was asked for some batches."""
        self._sent.append(batches)

    def __iter__(self) -> Iterator[Container]:
        self._sent.clear()
        return self._batches(iter(self._loader))  # the workers begin here, and torch's generator is drawn from

    def _batches(self, messages: Iterator[Any]) -> Iterator[Container]:
        while True:
            began = time.perf_counter()
            groups = next(messages, None)
            if groups is None:
                return
            self._waited += time.perf_counter() - began
            self._received += self._sent.popleft()
            for container, count in groups:
                yield from _split(container, count)


class _Groups:
    """The rows of several batches together, as a batch sampler."""

    def __init__(self, loader: DataLoader[Any], grouped: GroupedLoader) -> None:
        self._sampler, self._size, self._grouped = loader.batch_sampler, loader.batch_size, grouped

    def __iter__(self) -> Iterator[list[Any]]:
        rows, count = list[Any](), 0
        for batch in self._sampler:  # type: ignore[union-attr]
            if len(batch) == self._size:
                rows, count = rows + batch, count + 1
            else:  # the last one
                yield from self._group(rows, count)
                rows, count = batch, 1
            if count >= self._grouped.size:
                yield from self._group(rows, count)
                rows, count = [], 0
        yield from self._group(rows, count)

    def _group(self, rows: list[Any], count: int) -> Iterator[list[Any]]:
        if count:
            self._grouped.asked(count)
            yield rows


class _InGroups:
    """Collate each batch of a message by the user's function, and join those that are alike."""

    def __init__(self, collate: Callable[[list[Any]], Any], size: int) -> None:
        self._collate, self._size = collate, size

    def __call__(self, rows: list[Any]) -> list[tuple[Container, int]]:
        batches = [self._collate(rows[i : i + self._size]) for i in range(0, len(rows), self._size)]
        return joined_alike(batches, len(batches))


def _split(container: Container, count: int) -> Iterator[Container]:
    if count == 1:
        yield container
        return
    leaves, spec = leaves_of(container)
    for parts in zip(*(x.chunk(count) for x in leaves), strict=True):
        yield tree_unflatten(list(parts), spec)
