"""Rows in a container of the user's: an array, a tensor, a frame, or nested tuples, lists and dicts of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from deepprob.data.padding import packed_together

Container = Any


def leaves_of(data: Container) -> tuple[list[Any], TreeSpec]:
    """The leaves of nested tuples, lists and dicts, and how they are nested."""
    return tree_flatten(data, is_leaf=lambda x: isinstance(x, PackedSequence))


def length_of(x: Any) -> int | None:
    """Number of rows of an array, a tensor or a frame; None for anything else."""
    shape = getattr(x, "shape", ())
    return int(shape[0]) if isinstance(shape, tuple) and shape else None


def rows_in(batch: Container) -> int:
    """Number of rows of a batch of a loader: the length of its first array, or of its packed sequences."""
    leaves = leaves_of(batch)[0]
    packed = [int(x.batch_sizes[0]) for x in leaves if isinstance(x, PackedSequence)]
    return next((n for n in map(length_of, leaves) if n is not None), packed[0] if packed else 0)


def bytes_of(batch: Container) -> int:
    """Bytes of all arrays."""
    return sum(int(getattr(x, "nbytes", 0)) for x in leaves_of(batch)[0] if length_of(x) is not None)


def joined(batches: Sequence[Container]) -> Container:
    """Batches of the same form as one; a value without rows is that of the first batch."""
    columns = zip(*(leaves_of(batch)[0] for batch in batches), strict=True)
    return tree_unflatten([_joined(same) for same in columns], leaves_of(batches[0])[1])


def joined_alike(batches: Sequence[Container], most: int) -> list[tuple[Container, int]]:
    """Consecutive batches of the same shapes and types as one each, with their number.

    Batches that hold anything but tensors with rows stay single.

    Args:
        batches: The batches.
        most: Most batches to join.

    Examples:
        >>> x, y = torch.zeros(2, 3), torch.ones(1, 3)
        >>> [(len(batch), count) for batch, count in joined_alike([x, x, x, y], 2)]
        [(4, 2), (2, 1), (1, 1)]
    """
    groups: list[list[Container]] = []
    last: Any = None
    for batch in batches:
        form = _form(batch)
        if groups and form is not None and form == last and len(groups[-1]) < most:
            groups[-1].append(batch)
        else:
            groups.append([batch])
        last = form
    return [(group[0] if len(group) == 1 else joined(group), len(group)) for group in groups]


def _form(batch: Container) -> Any:
    """Shapes and types of tensors of one length; None for anything else."""
    leaves, spec = leaves_of(batch)
    if not leaves or not all(isinstance(x, Tensor) and x.dim() for x in leaves):
        return None
    return None if len({len(x) for x in leaves}) > 1 else (spec, [(x.shape, x.dtype) for x in leaves])


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], PackedSequence):
        return packed_together(parts)
    return torch.cat(parts) if isinstance(parts[0], Tensor) and parts[0].dim() else parts[0]  # type: ignore[arg-type]
