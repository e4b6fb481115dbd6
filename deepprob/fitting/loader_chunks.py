"""Chunks of the batches of a loader, pass by pass, as they come."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from deepprob.data.containers import Container, joined_alike, rows_in
from deepprob.data.streams import LoaderBatches
from deepprob.fitting.chunks import SECONDS, Chunk, Chunks
from deepprob.fitting.streamed_rows import StreamedRows
from deepprob.posteriors.training_rows import TrainingRows
from deepprob.programs.instance import ProgramInstance


class _Mark:
    """A position in the batches of a loader; as long as it exists, the batches after it are kept."""


class LoaderChunks(Chunks):
    """The batches of a loader, pass by pass, as they come.

    Where worker processes run the user's code, a thread waits for them while steps run.
    """

    def __init__(self, rows: StreamedRows, source: LoaderBatches, instance: ProgramInstance, seed: int) -> None:
        super().__init__(rows, instance, seed)
        self.source, self._given = source, list(rows.ahead)
        source.group(self.most_steps // 2)
        self._in_pass = 0  # rows read in the present pass
        self._reading: Future[Sequence[tuple[Container, int]]] | None = None
        self._mark: weakref.ref[_Mark] | None = None
        self._since: list[Chunk] = []  # chunks since the mark

    def training_rows(self, instance: ProgramInstance) -> TrainingRows | None:
        return None

    @property
    def position(self) -> _Mark:
        """The present position, for `go_back`; while it is kept, so are the batches that follow."""
        mark = _Mark()
        self._mark, self._since = weakref.ref(mark), [] if self._now is None else [self._now]
        return mark

    def go_back(self, position: _Mark) -> None:
        """Continue from an earlier `position`, the last one that was asked for."""
        if self._mark is None or self._mark() is not position:
            raise RuntimeError("a loader goes back to its last position only")
        if len(self._since) <= 1 and self._now in (None, *self._since):
            return
        self._ahead.extendleft(reversed(self._since))
        self._since, self._now = [], None

    @property
    def epoch_state(self) -> Tensor:
        """The state of the random numbers of the user's code."""
        return self.stream.random.state["cpu"]

    def resume(self, epoch_state: Tensor, step: int) -> None:
        """Continue at a step, with a new pass of the loader."""
        self.stream.random.state = {**self.stream.random.state, "cpu": epoch_state}
        self._given, self._next, self._now = [], step, None
        self._ahead.clear()

    def close(self) -> None:
        super().close()
        self.source.end()

    def _enter(self, chunk: Chunk) -> None:
        if self._mark is None or self._mark() is None:
            self._since = []
        else:
            self._since.append(chunk)
        super()._enter(chunk)

    def _fetched(self, wanted: int) -> list[Chunk]:
        raw, found = self._read(wanted), list[Chunk]()
        for container, steps in raw:
            count = rows_in(container) // steps
            for _ in range(steps):
                numbers = (self._in_pass + torch.arange(count)) % max(self.num_data, count)
                found.append(Chunk(self._next, [], numbers))
                self._in_pass, self._next = self._in_pass + count, self._next + 1
        where = f"pass {self.source.passes}"
        return self._as_chunks(found, raw, where, check=self.source.passes == 1)

    def _read(self, wanted: int) -> Sequence[tuple[Container, int]]:
        """The next batches, joined where they are alike, with their number."""
        if self._given:
            given, self._given = self._given, []
            return joined_alike(given, self.most_steps)
        while True:
            if self._reading is None:
                with self.stream.random.drawing():
                    if self.source.begin():
                        self._in_pass = 0
                    raw = () if self.source.reads_beside else self._some(wanted)
                if self.source.reads_beside:
                    self._reading = self._beside(self._some, self.most_steps)
            if self._reading is not None:
                raw, self._reading = self._reading.result(), None
                if not self.source.ended:
                    self._reading = self._beside(self._some, self.most_steps)
            if raw:
                return raw

    def _some(self, most: int) -> Sequence[tuple[Container, int]]:
        """The next batches of the pass, as many as half a second brings; see `_read`."""
        raw, ends = list[Container](), time.monotonic() + SECONDS
        while len(raw) < most and (not raw or time.monotonic() < ends):
            new = self.source.read(1)
            if not new:
                break
            raw += new
        return joined_alike(raw, most)
