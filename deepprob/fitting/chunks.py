"""Chunks: the rows of the next steps of a fit, in the place of all rows.

Every call of a stepper takes some steps. A fit whose rows are read while it runs gathers just the rows of those steps
into a chunk of fixed size, which eager, traced and compiled steps read as they read all rows of data in memory. The
last tensor of a chunk numbers its rows in the data, for the data plate.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from deepprob.data.containers import Container
from deepprob.data.streams import IndexedRows
from deepprob.engine.random import RandomStream
from deepprob.fitting.digest import digest
from deepprob.fitting.row_order import RowOrder
from deepprob.fitting.state import repeat_rows
from deepprob.fitting.streamed_rows import StreamedRows, accepted_rows
from deepprob.posteriors.training_rows import TrainingRows
from deepprob.programs.arguments import Arguments, Call
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch
from deepprob.programs.program import Program

BYTES = 2**22  # of a chunk
_MOST_STEPS = 1024
SECONDS = 0.5  # of reading by the user's code; then the steps go on with what was read


@dataclass
class Chunk:
    """The rows of some steps.

    Attributes:
        first: The first step.
        batches: The rows, in one piece or more.
        numbers: Their numbers in the data, shape ``(rows,)``.
        steps: Number of steps.
        regular: Whether it lies in the room that the loops read; otherwise an eager step takes its one batch.
        call: How the batch makes the arguments, if not as in the rest of the fit.
        origin: The order of rows before it, for rows that are read by index.
        epochs: The first step of each epoch that begins in it, with the state of the order before that epoch.
    """

    first: int
    batches: list[Batch]
    numbers: Tensor
    steps: int = 1
    regular: bool = True
    call: Call | None = None
    origin: RowOrder.Position | None = None
    epochs: list[tuple[int, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Sequence[Chunk]) -> Chunk:
        """The steps of consecutive chunks as one, whose rows are not read yet."""
        if len(parts) == 1:
            return parts[0]
        numbers, epochs = torch.cat([part.numbers for part in parts]), [x for part in parts for x in part.epochs]
        return replace(parts[0], numbers=numbers, steps=sum(part.steps for part in parts), epochs=epochs)


class Chunks:
    """The rows of a fit, read chunk by chunk; it stands in the place of `LengthBuckets` and of `RowOrder`.

    Args:
        rows: What is known of the rows.
        instance: The program.
        seed: The fit's seed.

    Attributes:
        data: A sample of the rows, on the device.
        numbers: Their numbers in the data; None for all rows of data in memory.
        data_by_bucket: The room of a chunk, with the rows' numbers last: what loops read.
        steps_per_epoch: Steps in a pass over the data.
    """

    lengths: Sequence[int] = ()
    bucket_of_row: Tensor | None = None

    def __init__(self, rows: StreamedRows, instance: ProgramInstance, seed: int) -> None:
        self.stream, self.instance, device = rows, instance, instance.device
        self.num_data, self.batch_size = rows.num_data, rows.size
        self.data: Batch = tuple(x.to(device) for x in rows.batch)
        self.numbers: Tensor | None = rows.numbers.to(device)
        width = self.batch_size * sum(x[0].numel() * x.element_size() for x in self.data)
        self.most_steps = max(2, min(_MOST_STEPS, BYTES // max(1, width)))
        chosen = repeat_rows(torch.arange(len(rows.numbers)), self.most_steps * self.batch_size).to(device)
        self._room: Batch = tuple(x.index_select(0, chosen).contiguous() for x in (*self.data, self.numbers))
        self.data_by_bucket: list[Batch] = [self._room]
        self._shown: Batch = self._room
        self._call = instance.program.call
        self._now: Chunk | None = None
        self._ahead: deque[Chunk] = deque()
        self._next = 0  # the first step whose rows were not read yet
        self._checks_values = type(instance.program).validate is Program.validate
        self._thread: ThreadPoolExecutor | None = None
        self.steps_per_epoch = rows.steps_per_epoch

    # -- in the place of LengthBuckets ---------------------------------------------------------------------------

    def data_of(self, bucket: int) -> Batch:
        """What the next step reads: the chunk, or a batch of another size or shape."""
        return self._shown

    @property
    def is_usual(self) -> bool:
        """Whether loops can take the next step: not if its batch has another size or shape."""
        return self._shown is self._room

    def chosen(self, rows: Tensor) -> Batch:
        """Some rows, by their numbers in the data, with these last.

        Raises:
            ValueError: If they come from a loader.
        """
        raise ValueError(
            "a loader does not find rows by their numbers. Leave rows out for its next batch, or give the data set in "
            "the place of its loader."
        )

    def rows_within(self, bucket: int) -> Tensor:
        """Places in the chunk."""
        return torch.arange(len(self._room[-1]))

    def consecutive(self, rows: Tensor) -> Iterator[tuple[int, int, int]]:
        """See `LengthBuckets.consecutive`; there is one bucket."""
        yield 0, 0, len(rows)

    def order(self, batch_size: int, seed: int) -> Any:
        """The order of the rows, which a fit follows: the chunks themselves."""
        return self

    @property
    def digest(self) -> str:
        """What identifies the data: the sample, or the shapes of rows that may differ when they are read again."""
        if self.stream.is_random:
            shapes = [(spec.name, spec.shape, spec.dtype) for spec in self.instance.inputs]
            return f"{self.stream.num_data} rows of {shapes}"
        return digest(self.data)

    def training_rows(self, instance: ProgramInstance) -> TrainingRows | None:
        """See `TrainingRows`; None for rows that differ when they are read again."""
        raise NotImplementedError

    # -- in the place of RowOrder --------------------------------------------------------------------------------

    def reach(self, first: int, end: int) -> int:
        """The last of some steps that one call can take; reads their rows."""
        now = self._chunk_at(first, end - first)
        return min(end, now.first + now.steps)

    def rows(self, first: int, end: int) -> Tensor:
        """Places in the chunk of the rows of each batch, shape ``(n, B)``; see `reach`."""
        now = self._chunk_at(first, end - first)
        self._follow(now, end)
        size = len(now.numbers) // now.steps
        return torch.arange((first - now.first) * size, (end - now.first) * size).view(-1, size)

    def close(self) -> None:
        """End the thread that reads; a later call begins another."""
        if self._thread is not None:
            self._thread.shutdown()
        self._thread = None

    def _beside(self, read: Callable[..., Container], *args: Any) -> Future[Any]:
        """Call a function in the thread that reads."""
        self._thread = self._thread or ThreadPoolExecutor(1, "deepprob-rows")
        return self._thread.submit(read, *args)

    # -- chunks --------------------------------------------------------------------------------------------------

    def _follow(self, now: Chunk, end: int) -> None:
        """Note that the steps of a chunk up to ``end`` are taken."""

    def _chunk_at(self, first: int, wanted: int) -> Chunk:
        """The chunk that holds a step, in the place where the step reads it."""
        now = self._now
        while now is None or first >= now.first + now.steps:
            if not self._ahead:
                self._ahead.extend(self._fetched(min(wanted, self.most_steps)))
            now = self._ahead.popleft()
            self._enter(now)
        return now

    def _enter(self, chunk: Chunk) -> None:
        """Put a chunk where the steps read it."""
        self._now, device = chunk, self.instance.device
        self.instance.program.__dict__["call"] = chunk.call or self._call
        if not chunk.regular:
            self._shown = (*(x.to(device) for x in chunk.batches[0]), chunk.numbers.to(device))
            return
        self._shown = self._room
        start = 0
        for batch in chunk.batches:
            count = len(batch[0])
            for room, x in zip(self._room, batch, strict=False):
                room[start : start + count].copy_(x)
            start += count
        self._room[-1][:start].copy_(chunk.numbers)

    def _fetched(self, wanted: int) -> list[Chunk]:
        """The next chunks, one or more."""
        raise NotImplementedError

    def _as_chunks(
        self, found: Sequence[Chunk], raw: Sequence[tuple[Container, int]], where: str, check: bool
    ) -> list[Chunk]:
        """Accept rows as they were read, each container for one chunk or more, and join those of the usual shapes."""
        joined, left = list[Chunk](), iter(found)
        for container, count in raw:
            parts = list(itertools.islice(left, count))
            chunk = Chunk.of(parts)
            self._accept(chunk, container, where)
            if check and self._checks_values and chunk.regular:
                self._check(chunk.batches[0], chunk.numbers, where)
            last = joined[-1] if joined else None
            if last and last.regular and chunk.regular and last.steps + chunk.steps <= self.most_steps:
                rows = last.batches + chunk.batches
                joined[-1] = replace(Chunk.of([last, chunk]), batches=rows)
            elif chunk.regular or len(parts) == 1:
                joined.append(chunk)
            else:
                for part, *batch in zip(parts, *(x.chunk(len(parts)) for x in chunk.batches[0]), strict=True):
                    joined.append(replace(part, batches=[tuple(batch)], regular=False, call=chunk.call))
        return joined

    def _accept(self, chunk: Chunk, container: Container, where: str) -> None:
        """Accept the rows of a chunk."""
        what, free = self.stream.what, not isinstance(self.stream.source, IndexedRows)
        batch = accepted_rows(self.instance, container, what, chunk.numbers, where, free)
        call = batch.call if isinstance(batch, Arguments) else None
        count = len(batch[0]) if batch else len(chunk.numbers)
        chunk.numbers = chunk.numbers[:count]
        if call is not None and not _same_constants(call, self._call):
            chunk.call = call.to(self.instance.device)
        shapes = [x.shape[1:] for x in batch] == [x.shape[1:] for x in self._room[:-1]]
        chunk.regular = shapes and chunk.call is None and count == chunk.steps * self.batch_size
        chunk.batches = [tuple(batch)]

    def _check(self, batch: Batch, numbers: Tensor, where: str) -> None:
        """Compare values with the supports of the sites that observe them, once for every row."""
        size = self.batch_size
        with torch.no_grad(), RandomStream(0, self.instance.device).drawing(), self.instance.evaluating():
            for start in range(0, min(len(numbers), self.steps_per_epoch * size), size):
                piece = slice(start, start + size)
                try:
                    self.instance.check_rows(tuple(x[piece] for x in batch), numbers[piece])
                except ValueError as error:
                    raise ValueError(f"{error} ({where}, rows {_span(numbers[piece])})") from error


def _same_constants(a: Call, b: Call | None) -> bool:
    if b is None or a.names != b.names or len(a.constants) != len(b.constants):
        return b is None

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y.to(x.device))
        try:
            return x is y or bool(x == y)
        except (RuntimeError, ValueError, TypeError):
            return False

    return all(same(x, y) for x, y in zip(a.constants, b.constants, strict=True))


def _span(numbers: Tensor) -> str:
    return f"{int(numbers.min())} to {int(numbers.max())}"
