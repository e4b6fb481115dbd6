"""The rows of a fit: in memory, or a sample of those that are read while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from deepprob.data.precision import warning_once
from deepprob.data.streams import IndexedRows
from deepprob.fitting.chunks import Chunks
from deepprob.fitting.course import Length
from deepprob.fitting.indexed_chunks import IndexedChunks
from deepprob.fitting.intake import accepted
from deepprob.fitting.loader_chunks import LoaderChunks
from deepprob.fitting.streamed_rows import StreamedRows, check_streamed, in_memory, read_sample
from deepprob.programs.arguments import Arguments
from deepprob.programs.by_row import cut_by_row
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch
from deepprob.programs.program import Program


@dataclass(frozen=True)
class FitRows:
    """The rows of a fit.

    Attributes:
        batch: All rows of data in memory, or a sample of rows that are read while the fit runs; accepted.
        batch_size: Rows of a step, as the routine got them, or those of a loader.
        stream: The rows that are read while the fit runs; None for rows in memory.
    """

    batch: Batch
    batch_size: int | str | None
    stream: StreamedRows | None = None

    @property
    def num_data(self) -> int | None:
        """Number of all rows, if the batch is a sample of them."""
        return None if self.stream is None else self.stream.num_data


def rows_of_fit(program: Program, data: Any, batch_size: int | str | None, device: torch.device, seed: int) -> FitRows:
    """Read the rows of a fit, all of them or a sample.

    Args:
        program: The program.
        data: The user's data.
        batch_size: Rows of a step, as the routine got them.
        device: The device to run on.
        seed: The fit's seed.

    Raises:
        ReadingError: If the user's code fails.
        ValueError: If the data cannot be data of the program.
    """
    resident = in_memory(program, data, batch_size)
    if resident is not None:
        data, batch_size = resident
        return FitRows(accepted(program, data, batch_size, device), batch_size)
    with warning_once():
        stream = read_sample(program, data, batch_size, seed)
    if isinstance(stream.batch, Arguments) and any(isinstance(x, PackedSequence) for x in stream.batch.call.constants):
        raise ValueError(
            f"the program takes the PackedSequence of {stream.what} whole, and a loader gives one of some rows in each "
            "batch. Write Program.of(..., variable_length=True): the program then gets padded tensors and lengths."
        )
    cut = cut_by_row(program, stream.batch, stream.size, device)
    if len(cut) < len(stream.batch):
        raise ValueError(
            f"the program needs some of its arguments whole, and {stream.what} are read row by row. Bind those to the "
            "model, Program.of(functools.partial(model, name=value), ...), or give arrays in memory."
        )
    return FitRows(stream.batch, stream.size, stream)


def chunks_of(rows: StreamedRows | None, instance: ProgramInstance, seed: int) -> Chunks | None:
    """The chunks of a fit whose rows are read while it runs; None for rows in memory.

    Raises:
        ValueError: If the program needs what such rows do not have; see `check_streamed`.
    """
    if rows is None:
        return None
    check_streamed(rows, instance)
    if isinstance(rows.source, IndexedRows):
        return IndexedChunks(rows, rows.source, instance, seed)
    return LoaderChunks(rows, rows.source, instance, seed)


def check_length(stream: StreamedRows | None, length: Length) -> None:
    """Refuse a fit whose length is in passes over data of unknown length.

    Raises:
        ValueError: If it is.
    """
    if stream is None or stream.is_counted or (length.fixed and length.epochs is None):
        return
    raise ValueError(
        f"{stream.what} have no length, so the fit cannot count passes over them. Give its length in steps, "
        "steps=10000, or write __len__ in the data set."
    )
