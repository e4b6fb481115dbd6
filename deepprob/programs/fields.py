"""Reading data as the fields that a program's arguments take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from deepprob.data import Split, as_split
from deepprob.errors import counted

Fill = Callable[[tuple[Any, ...]], tuple[Any, ...]]  # a replacement of missing values


def read_fields(
    data: Any,
    names: Sequence[str],
    required: int,
    takes_any: bool = False,
    what: str = "data",
    missing: bool = False,
) -> tuple[Tensor, ...]:
    """Read a user's data as one tensor for each of some arguments, in their order.

    Args:
        data: Anything that `as_split` reads.
        names: The names of the arguments.
        required: How many of them have no default.
        takes_any: Whether there may be more tensors than names.
        what: The name of the data in error messages.
        missing: Whether values may be missing (NaN).

    Raises:
        ValueError: If there are too many parts, or their names have another order than the arguments.
    """
    split = as_split(data, what=what, missing=missing)
    tensors = _in_their_order(split, names, required, what) if isinstance(data, Mapping | Split) else split.tensors
    if takes_any or len(tensors) <= len(names):
        return tensors
    if isinstance(data, Split):
        return tensors[: len(names)]
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
