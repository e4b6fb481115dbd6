"""The rows of a fit that are read while it runs: their number, a sample of them, and how they are accepted."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from deepprob.data.containers import Container, rows_in
from deepprob.data.streams import IndexedRows, LoaderBatches, shuffled_tensors, stream_of
from deepprob.engine.moments import Moments, rows_of_a_piece
from deepprob.engine.random import RandomStream
from deepprob.errors import whole
from deepprob.programs.arguments import Arguments
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch
from deepprob.programs.program import Program
from deepprob.programs.run import Run, run_program

MOST_ROWS = 10_000  # of a sample
_FEWEST_ROWS = 1000  # that a loader is asked for before the first step
_BYTES = 2**25  # of a sample
_SALT = 0xDA7A  # added to the fit's seed, so that the user's code does not depend on the noise
_UNCOUNTED_STEPS = 100  # of an epoch of an iterable without a length
_DEFAULT_BATCH_SIZE = 128


@dataclass(frozen=True)
class StreamedRows:
    """Rows that are read while a fit runs.

    Attributes:
        source: Where they are read from.
        batch: A sample of them, accepted: the first ones, followed by random ones if they are read by index.
        numbers: The numbers of the sample's rows in the data.
        num_data: Number of rows, N; of an iterable without a length, as many as an epoch of the fit has.
        size: Rows of a step, B.
        steps_per_epoch: Steps in a pass over the data; 100 for an iterable without a length.
        random: The random numbers of the user's code.
        is_counted: Whether the number of rows is known.
        is_random: Whether rows may differ when they are read again, or come in an order that is not ours.
        ahead: Batches of a loader that the sample was made of; the first steps take them.
    """

    source: IndexedRows | LoaderBatches
    batch: Batch
    numbers: Tensor
    num_data: int
    size: int
    steps_per_epoch: int
    random: RandomStream
    is_counted: bool = True
    is_random: bool = False
    ahead: Sequence[Container] = ()

    @property
    def what(self) -> str:
        """The name of the data in error messages."""
        return self.source.what


def in_memory(program: Program, data: Any, batch_size: int | str | None) -> tuple[Any, int | str | None] | None:
    """Data that a fit keeps in memory, and the rows of a step; None for data that it reads while it runs.

    Args:
        program: The program.
        data: The user's data.
        batch_size: Rows of a step, as `svi` got them.
    """
    loader = data if isinstance(data, DataLoader) else None
    if loader is not None and (tensors := shuffled_tensors(loader)) is not None:
        own = loader.batch_size if program.data_name and batch_size == "auto" else batch_size
        return tensors, own
    size = batch_size if isinstance(batch_size, int) and not isinstance(batch_size, bool) else _DEFAULT_BATCH_SIZE
    source = stream_of(data, max(1, size))
    if source is None:
        return data, batch_size
    if isinstance(source, LoaderBatches):
        if program.data_name and batch_size is not None:
            return None
        if loader is not None and batch_size != source.num_data:
            why = "batch_size=None asks for" if batch_size is None else "the program names no data plate, so it needs"
            warnings.warn(
                f"{why} all rows in every step: the loader is read once, and its batch size is not used. For its "
                "batches, name the plate over rows, Program.of(..., data_plate='data').",
                UserWarning,
                stacklevel=5,
            )
        return data, None
    all_rows = batch_size is None or not program.data_name or size >= source.num_data
    if all_rows and not source.has_code:
        return source.read(torch.arange(source.num_data)), batch_size
    return None


def read_sample(program: Program, data: Any, size: int | str | None, seed: int) -> StreamedRows:
    """Read a sample of rows that are to be read while a fit runs.

    Args:
        program: The program.
        data: The user's data.
        size: Rows of a step, as `svi` got them.
        seed: The fit's seed.

    Raises:
        ReadingError: If the user's code fails.
        ValueError: If rows cannot be data of the program, or ``size`` is not that of the loader's batches.
    """
    random = RandomStream(seed + _SALT)
    asked = None if size is None or size == "auto" else whole("batch_size", size)
    source = stream_of(data, asked or _DEFAULT_BATCH_SIZE)
    with random.drawing():
        if isinstance(source, LoaderBatches):
            return _loaded(program, source, asked, random)
        return _indexed(program, cast(IndexedRows, source), asked, size, random)


def _indexed(
    program: Program, source: IndexedRows, asked: int | None, size: int | str | None, random: RandomStream
) -> StreamedRows:
    count = source.num_data
    rows = count if size is None or not program.data_name else min(asked or _DEFAULT_BATCH_SIZE, count)
    if asked is not None and asked < count and not program.data_name:
        raise ValueError(
            f"batch_size={asked} is smaller than the data ({count} rows), but the program names no data plate, so its "
            "KL would be weighted wrongly. Write Program.of(model, guide, data_plate='data') or batch_size=None."
        )
    first = _accepted(program, source.read(torch.arange(rows)), source.what, "")
    most = min(MOST_ROWS, _BYTES // max(1, sum(x[0].numel() * x.element_size() for x in first)))
    numbers = torch.arange(rows)
    if count > max(most, rows):
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most]
        numbers = torch.cat([numbers, chosen])
    elif count > rows:
        numbers = torch.arange(count)
    if source.has_code:  # its rows may be slow
        numbers = numbers[: max(rows, _FEWEST_ROWS)]
    batch = first if len(numbers) == rows else _accepted(program, source.read(numbers), source.what, "")
    steps = -(-count // rows)
    if not source.has_code and type(program).adapt is not Program.adapt:
        _mark_by_all_rows(program, source, batch)
    return StreamedRows(source, batch, numbers, count, rows, steps, random, is_random=source.is_random())


def _mark_by_all_rows(program: Program, source: IndexedRows, sample: Batch) -> None:
    """Let `deepprob.networks.inputs.moments` of a sample be those of all rows."""
    real = [i for i, x in enumerate(sample) if x.is_floating_point()]
    found = {i: Moments() for i in real}
    for i in real:
        for numbers in torch.arange(source.num_data).split(rows_of_a_piece(sample[i][0].numel())):
            found[i].add(_accepted(program, source.read(numbers), source.what, "before the fit", numbers)[i])
        found[i].mark(sample[i])


def _loaded(program: Program, source: LoaderBatches, asked: int | None, random: RandomStream) -> StreamedRows:
    source.begin()
    ahead, batches = list[Container](), list[Batch]()
    while not source.ended and sum(map(rows_in, ahead)) < _FEWEST_ROWS:
        new = source.read(1)
        ahead += new
        batches += [_accepted(program, container, source.what, f"batch {len(ahead)}") for container in new]
        if batches and sum(x.numel() * x.element_size() for batch in batches for x in batch) > _BYTES:
            break
    size = rows_in(ahead[0])
    own = source.loader.batch_size
    if asked is not None and asked not in (size, own):
        raise ValueError(
            f"batch_size={asked} is not that of the loader, whose batches have {own or size} rows. Leave batch_size "
            "out, or make the loader with batch_size=" + f"{asked}."
        )
    like = [x.shape[1:] for x in batches[0]]
    alike = [batch for batch in batches if [x.shape[1:] for x in batch] == like and len(batch) == len(like)]
    joined = [torch.cat(parts) for parts in zip(*alike, strict=True)]
    sample: Batch = Arguments(joined, batches[0].call) if isinstance(batches[0], Arguments) else tuple(joined)
    steps = source.steps_per_pass or _UNCOUNTED_STEPS
    count = source.num_data or steps * size
    rows = len(sample[0]) if sample else size
    numbers = torch.arange(rows) % max(count, size)
    counted = source.num_data is not None
    return StreamedRows(source, sample, numbers, max(count, size), size, steps, random, counted, True, ahead)


def _accepted(program: Program, container: Container, what: str, where: str, numbers: Tensor | None = None) -> Batch:
    """Rows before the fit, as the program accepts them."""
    with _naming_rows(numbers, where):
        batch = program.accept(container, what=what)
    if lacking := program.missing_arguments(batch):
        raise ValueError(
            f"the model takes {', '.join(program.argument_names)}; {what} lacks {', '.join(lacking)}. "
            "Pass a tuple in this order, observed values included."
        )
    return batch


def accepted_rows(
    instance: ProgramInstance, container: Container, what: str, numbers: Tensor, where: str, free: bool = False
) -> Batch:
    """Rows as they were read, with the types and shapes of the fit.

    Args:
        instance: The program.
        container: The rows.
        what: The name of the data in error messages.
        numbers: Their numbers in the data.
        where: The epoch or pass, for error messages; empty for none.
        free: Whether sequences may have another length than those of the sample, as in batches padded each to its own.

    Raises:
        ValueError: If a value is not valid; the message names its row.
    """
    program = instance.program
    with _naming_rows(numbers, where):
        batch = program.accept(container, what=what)
        specs = {spec.name: spec for spec in instance.inputs}
        if isinstance(batch, Arguments):
            pairs = zip(batch.call.names, batch, strict=True)
            known = [specs[name].conform(x, free) if name in specs else x for name, x in pairs]
            return Arguments(known, batch.call)
        return tuple(spec.conform(x, free) for spec, x in zip(instance.inputs, batch, strict=True))


@contextmanager
def _naming_rows(numbers: Tensor | None, where: str) -> Iterator[None]:
    """Let an error name a row by its number in the data, where its message names the place in a batch."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        if numbers is not None:
            text = re.sub(r"\brow (\d+)\b", lambda found: f"row {_number(numbers, int(found[1]))}", text)
        raise ValueError(f"{text} ({where})" if where else text) from error


def _number(numbers: Tensor, place: int) -> int:
    """The number in the data of a row at a place of a batch."""
    return int(numbers[place]) if place < len(numbers) else place


def _conforming(instance: ProgramInstance, container: Container, what: str) -> Batch:
    program = instance.program
    batch = program.accept(container, what=what)
    specs, free = {spec.name: spec for spec in instance.inputs}, program.variable_length
    if isinstance(batch, Arguments):
        pairs = zip(batch.call.names, batch, strict=True)
        return Arguments([specs[name].conform(x, free) if name in specs else x for name, x in pairs], batch.call)
    return tuple(spec.conform(x, free) for spec, x in zip(instance.inputs, batch, strict=True))


def check_streamed(rows: StreamedRows, instance: ProgramInstance) -> None:
    """Refuse a program that needs what its rows do not have: a number, identities, or to be there at once.

    Args:
        rows: The rows.
        instance: The program before its first step.

    Raises:
        ValueError: If it is one of these.
    """
    found, what = instance.structure, rows.what
    if instance.guide_name == "laplace":
        raise ValueError(
            f"guide='laplace' needs all rows at once, and {what} are read while the fit runs. Give arrays in memory, "
            "such as numpy.array(x), or use guide='normal'."
        )
    if isinstance(rows.source, IndexedRows):
        return
    shared = [name for name in (*found.global_, *found.observed) if not found.sites[name].local]
    if not rows.is_counted and shared:
        raise ValueError(
            f"{', '.join(shared)} are shared by all rows, so a step must know how many there are, and {what} have no "
            "length. Write __len__ in the data set, the number of its rows."
        )
    if _knows_rows(rows, instance):
        raise ValueError(
            "the program keeps parameters or values for every row of the data plate, but a loader does not say which "
            "rows its batches hold. Give the data set itself in the place of its loader, or use an amortized guide."
        )


def _knows_rows(rows: StreamedRows, instance: ProgramInstance) -> bool:
    """Whether a run reads something by the numbers of its rows: it then fails at numbers that no row has."""
    if instance.device.type != "cpu":  # an index out of range would end the process
        return False
    batch = tuple(x[: rows.size] for x in rows.batch)
    numbers = torch.arange(rows.size)
    with torch.no_grad(), RandomStream(0).drawing(), instance.evaluating():
        prepared = instance.program.prepare(*batch)
        try:
            run_program(Run(instance.program, prepared, rows.num_data + numbers, rows.num_data))
        except (IndexError, RuntimeError, ValueError):
            try:  # at these numbers alone?
                run_program(Run(instance.program, prepared, numbers, rows.num_data))
            except (IndexError, RuntimeError, ValueError):
                return False  # a step tells
            return True
    return False
