"""Chunks of rows that are read by index, in an order of ours."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from deepprob.data.containers import Container, joined_alike
from deepprob.data.streams import IndexedRows
from deepprob.fitting.chunks import SECONDS, Chunk, Chunks
from deepprob.fitting.row_order import RowOrder
from deepprob.fitting.streamed_rows import StreamedRows, accepted_rows
from deepprob.posteriors.training_rows import TrainingRows
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch

_BYTES_OF_DIGESTS = 2**20  # that one read takes for digests: larger pieces leave holes in memory


class _Place(NamedTuple):
    """A position in rows that are read by index."""

    first: int
    origin: RowOrder.Position
    epoch_state: Tensor


class IndexedChunks(Chunks):
    """Rows that are read by index, in an order of ours: memory-mapped arrays, sparse matrices and data sets.

    Arrays are read by a thread, while steps run. The code of a data set runs between the steps, with random numbers of
    its own stream, so that a fit with the same seed sees the same rows.
    """

    def __init__(self, rows: StreamedRows, source: IndexedRows, instance: ProgramInstance, seed: int) -> None:
        super().__init__(rows, instance, seed)
        self.source = source
        self._order = RowOrder(self.num_data, self.batch_size, None, seed)
        self._epoch_state = self._order.epoch_state
        self._reading: tuple[Chunk, Future[Container]] | None = None

    def chosen(self, rows: Tensor) -> Batch:
        device = self.instance.device
        return (*(x.to(device) for x in self.read(rows.cpu())), rows)

    def read(self, rows: Tensor) -> Batch:
        """Some rows, accepted."""
        with self.stream.random.drawing():
            raw = self.source.read(rows)
        return accepted_rows(self.instance, raw, self.stream.what, rows, "")

    def training_rows(self, instance: ProgramInstance) -> TrainingRows | None:
        if self.stream.is_random:
            return None
        most = max(1, _BYTES_OF_DIGESTS // max(1, sum(x[0].numel() * x.element_size() for x in self.data)))
        return TrainingRows.read(self.num_data, self.read, most, self.data, instance)

    @property
    def position(self) -> _Place:
        """The present position, for `go_back`."""
        now = self._now
        if now is None or now.origin is None:
            return _Place(self._next, self._order.position, self._epoch_state)
        return _Place(now.first, now.origin, self._epoch_state)

    def go_back(self, position: _Place) -> None:
        """Continue from an earlier `position`."""
        self._epoch_state = position.epoch_state
        if self._now is None or self._now.first != position.first:
            self._forget(position.first)
            self._order.go_back(position.origin)

    @property
    def epoch_state(self) -> Tensor:
        """See `RowOrder.epoch_state`."""
        return self._epoch_state

    def resume(self, epoch_state: Tensor, step: int) -> None:
        """See `RowOrder.resume`."""
        self._forget(step)
        self._order.resume(epoch_state, step)
        self._epoch_state = epoch_state

    def _forget(self, step: int) -> None:
        if self._reading is not None:
            self._reading[1].result()
        self._now, self._reading, self._next = None, None, step
        self._ahead.clear()

    def _follow(self, now: Chunk, end: int) -> None:
        self._epoch_state = [state for step, state in now.epochs if step < end][-1]

    def _drawn(self, count: int) -> Chunk:
        """The numbers of the rows of the next steps."""
        first, end, origin = self._next, self._next + count, self._order.position
        parts, epochs, step = list[Tensor](), list[tuple[int, Tensor]](), first
        while step < end:
            stop = min(end, (step // self.steps_per_epoch + 1) * self.steps_per_epoch)
            parts.append(self._order.rows(step, stop))
            epochs.append((step, self._order.epoch_state))
            step = stop
        self._next = end
        return Chunk(first, [], torch.cat(parts).reshape(-1), count, origin=origin, epochs=epochs)

    def _fetched(self, wanted: int) -> list[Chunk]:
        found, raw = self._between_steps(wanted) if self.source.has_code else self._beside_steps()
        first = found[0].first
        where = f"epoch {first // self.steps_per_epoch + 1}"
        chunks = self._as_chunks(found, raw, where, check=first < self.steps_per_epoch)
        return chunks

    def _between_steps(self, wanted: int) -> tuple[list[Chunk], list[tuple[Container, int]]]:
        found, raw, ends = list[Chunk](), list[Container](), time.monotonic() + SECONDS
        with self.stream.random.drawing():
            while len(found) < wanted and (not found or time.monotonic() < ends):
                found.append(self._drawn(1))
                raw.append(self.source.read(found[-1].numbers))
        return found, joined_alike(raw, self.most_steps)

    def _beside_steps(self) -> tuple[list[Chunk], list[tuple[Container, int]]]:
        chunk, future = self._reading or self._started()
        raw = future.result()
        self._reading = self._started()
        return [chunk], [(raw, 1)]

    def _started(self) -> tuple[Chunk, Future[Container]]:
        chunk = self._drawn(self.most_steps)
        return chunk, self._beside(self.source.read, chunk.numbers)
