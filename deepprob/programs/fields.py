"""Reading data as the fields that a program's arguments take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from deepprob.data import Split, as_split
from deepprob.data.frames import Columns
from deepprob.data.intake import fields_of
from deepprob.errors import counted
from deepprob.programs.origin import Fields, Origin

Fill = Callable[[tuple[Any, ...]], tuple[Any, ...]]  # a replacement of missing values


def read_fields(
    data: Any,
    names: Sequence[str],
    required: int,
    takes_any: bool = False,
    what: str = "data",
    missing: bool = False,
    columns: Mapping[str, Sequence[str]] | None = None,
    sequences: bool = False,
) -> Fields:
    """Read a user's data as one tensor for each of some arguments, in their order.

    Args:
        data: Anything that `as_split` reads.
        names: The names of the arguments.
        required: How many of them have no default.
        takes_any: Whether there may be more tensors than names.
        what: The name of the data in error messages.
        missing: Whether values may be missing (NaN).
        columns: The columns of the fit's arguments, by argument.
        sequences: Whether a list holds sequences even if all have one length.

    Raises:
        ValueError: If there are too many parts, or their names have another order than the arguments.
    """
    fields = dict(fields_of(data, what, missing=missing, sequences=sequences))
    frames, named = Columns(columns or {}), isinstance(data, Mapping | Split)
    for i, (field, value) in enumerate(fields.items()):
        name = field if named and field in names else names[i] if i < len(names) else f"argument {i + 1}"
        fields[field] = frames.read(name, value)
    origin = Origin(frames.found).of(data, names)
    split = as_split(fields, what=what, missing=missing)
    tensors = _in_their_order(split, names, required, what) if isinstance(data, Mapping | Split) else split.tensors
    if takes_any or len(tensors) <= len(names):
        return Fields(tensors, origin)
    if isinstance(data, Split):
        return Fields(tensors[: len(names)], origin)
    raise ValueError(
        f"the model takes {counted(len(names), 'argument')} ({', '.join(names)}); {what} has "
        f"{counted(len(tensors), 'part')} ({', '.join(split.names)}). Leave out what the model does not use."
    )


def _in_their_order(split: Split, names: Sequence[str], required: int, what: str) -> tuple[Tensor, ...]:
    """The fields in the order of the arguments; if they must be reordered, only those named after arguments."""
    fields = split.names
    known = [n for n in names if n in split]
    if all(fields.index(n) == names.index(n) for n in known):
        return split.tensors
    if known == names[: len(known)] and len(known) >= required:
        return tuple(split[n] for n in known)
    raise ValueError(
        f"the model takes {', '.join(names)} in this order; {what} has the fields {', '.join(fields)}. "
        "Name every field after its argument, or give a tuple in the model's order."
    )
