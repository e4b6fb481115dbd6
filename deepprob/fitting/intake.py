"""The arguments of a gradient routine: its data, the program's copy, the number of steps and rows of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepprob.data.streams import looked_at
from deepprob.errors import counted, shown, whole
from deepprob.fitting.callbacks import Anneal, Callback
from deepprob.programs.arguments import Arguments
from deepprob.programs.by_row import cut_by_row
from deepprob.programs.guides import GuideSpec, check_start
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch, num_rows
from deepprob.programs.parameters import buffer_named
from deepprob.programs.program import Program

_DEFAULT_BATCH_SIZE = 128


def check_program(program: Any, weights: Any, routine: str = "svi") -> None:
    """Raise if the program or the choice of its weights is not valid."""
    if not isinstance(program, Program):
        raise TypeError(
            f"{routine} expects a Program; got {type(program).__name__}. Wrap a Pyro model: Program.of(model, guide)."
        )
    if weights not in ("auto", "fresh", "keep"):
        raise ValueError(f"weights must be 'auto', 'fresh' or 'keep'; got {shown(weights)}.")


def accepted(program: Program, data: Any, batch_size: int | str | None, device: torch.device) -> Batch:
    """The arguments with rows."""
    batch = _checked_arguments(program, program.accept(data), "data")
    return cut_by_row(program, batch, rows_of_a_step(batch_size, num_rows(batch), program), device)


def instance_of(
    program: Program,
    batch: Batch,
    guide: GuideSpec,
    device: torch.device,
    batch_size: int | str | None,
    weights: str,
    *,
    num_data: int | None = None,
    spread: bool = False,
) -> ProgramInstance:
    """The routine's own copy of the program, checked against the data.

    Args:
        program: The program.
        batch: All rows, or a sample of them.
        guide: The guide, as the routine got it.
        device: The device to run on.
        batch_size: Rows of a step, as the routine got them.
        weights: The choice of weights.
        num_data: Number of rows of the whole data, of which the batch is a sample; None for all rows.
        spread: Whether a named guide starts at random.
    """
    is_sample, num_data = num_data is not None, num_data or num_rows(batch)
    full = not batch or rows_of_a_step(batch_size, num_data, program) == num_data
    instance = ProgramInstance(
        program, batch, num_data, guide=guide, device=device, full_batch=full, weights=weights, spread=spread
    )
    check_start(instance.program, instance.structure, weights)
    size = rows_of_a_step(batch_size, instance.num_data, program)
    if isinstance(batch_size, int) and not (batch or instance.structure.rows):
        raise ValueError(
            f"batch_size={batch_size} needs rows, but no plate of the program holds the rows of its data at once. Put "
            "the observed sites into one, with pyro.plate('data', N) as rows: ... obs=data[rows], and name it: "
            "Program.of(..., data_plate='data'), or use batch_size=None."
        )
    if not is_sample and size < instance.num_data and (not batch or type(program).validate is Program.validate):
        instance.check_data(batch, size)
    return instance


def rows_of_a_step(batch_size: int | str | None, num_data: int, program: Program) -> int:
    """The number of rows per step."""
    if batch_size is None:
        return num_data
    if batch_size == "auto":
        return min(_DEFAULT_BATCH_SIZE, num_data) if program.data_name else num_data
    size = whole("batch_size", batch_size)
    if size < num_data and not program.data_name:
        raise ValueError(
            f"batch_size={size} is smaller than the data ({num_data} rows), but the program names no data plate, so "
            "its KL would be weighted wrongly. Write Program.of(model, guide, data_plate='data') or batch_size=None."
        )
    return min(size, num_data)


def checked_rows(rows: Any, num_data: int, device: torch.device) -> Tensor:
    """The indices of rows that a user gave, on the device. Those that are on a GPU are not compared with the data.

    Raises:
        TypeError: If they are not a sequence of whole numbers.
        ValueError: If there are none, or there is no such row.
    """
    try:
        found = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(())
    if found.dim() == 1 and not len(found):
        raise ValueError("step needs rows; got none. Give the index of one row at least, or leave out rows.")
    if found.dim() != 1 or found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        raise TypeError(
            f"rows must be a sequence of whole numbers, as indices; got {shown(rows)}. Write step(state, [0, 1])."
        )
    low, high = map(int, found.aminmax()) if found.device.type == "cpu" else (0, 0)
    if low < 0 or high >= num_data:
        raise ValueError(
            f"rows must be indices from 0 to {num_data - 1}, as the data have {counted(num_data, 'row')}; got "
            f"{low if low < 0 else high}. Number the rows from 0."
        )
    return found.to(device, torch.int64)


def checked_held_out(instance: ProgramInstance, data: Any) -> Batch:
    """Held-out data on the device, checked against the shapes of the data."""
    program, data = instance.program, looked_at(data, "held_out")
    held_out = _checked_arguments(program, program.accept(data, what="held_out"), "held_out")
    if isinstance(held_out, Arguments) and {*held_out.call.names} == {spec.name for spec in instance.inputs}:
        by_name = dict(zip(held_out.call.names, held_out, strict=True))
        held_out = tuple(by_name[spec.name] for spec in instance.inputs)
    if len(held_out) != len(instance.inputs):
        names = ", ".join(spec.name for spec in instance.inputs)
        raise ValueError(
            f"held_out must have the {len(instance.inputs)} parts of data ({names}); "
            f"got {len(held_out)}. Include the observed values, which the score needs."
        )
    pairs = zip(instance.inputs, held_out, strict=True)
    free = program.is_sequence
    return tuple(spec.conform(x, free(spec.name, spec.shape)).to(instance.device) for spec, x in pairs)


def annealed_buffers(instance: ProgramInstance, callbacks: Sequence[Callback]) -> list[Tensor]:
    """The buffer that each `Anneal` callback moves."""
    names = [c.buffer for c in callbacks if isinstance(c, Anneal)]
    buffers = [buffer_named(instance.program, name) for name in names]
    if len({id(x) for x in buffers}) < len(buffers):
        raise ValueError(f"several callbacks anneal the same buffer ({', '.join(names)}). Keep one of them.")
    return buffers


def _checked_arguments(program: Program, batch: Batch, what: str) -> Batch:
    """The arguments, if none that the model requires is missing."""
    if lacking := program.missing_arguments(batch):
        raise ValueError(
            f"the model takes {', '.join(program.argument_names)}; {what} lacks {', '.join(lacking)}. "
            "Pass a tuple in this order, observed values included."
        )
    return batch
