"""Sequences of unequal length as padded tensors with their lengths."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, pad_sequence, unpack_sequence

from deepprob.data.precision import read_dtype
from deepprob.errors import shown

Read = Callable[[Any, str], Tensor]  # from a series and its name for messages


def padded_sequences(
    data: Any,
    read: Read,
    *,
    certain: bool = False,
    names: Sequence[str] = ("x", "lengths"),
    lengths: str = "lengths",
    flat: Collection[str] = (),
) -> Any:
    """Data with padded tensors in the place of lists of series; other data as they are.

    A list of ``(T_i,)`` series or ``(T_i, D)`` arrays becomes ``(N, T_max, D)``, padded with zeros, and its lengths
    become a field of their own; so does a ``PackedSequence``.

    Args:
        data: The user's data.
        read: Reads one series as a tensor.
        certain: Whether a list holds sequences even if they have one length, as in a program of sequences. Then lists
            of numbers are series, too, and lists inside of a tuple or a dict are padded.
        names: Names of the fields, or of the program's arguments; the first holds sequences.
        lengths: Name of the field of lengths.
        flat: Names of the fields in which ``(T_i,)`` series become ``(N, T_max)``, such as tokens.

    Raises:
        ValueError: If arrays of one shape may be sequences or fields.

    Examples:
        >>> found = padded_sequences([np.ones(3), np.zeros(1)], lambda x, label: torch.as_tensor(x))
        >>> found["x"].shape, found["lengths"].tolist()
        (torch.Size([2, 3, 1]), [3, 1])
    """
    if isinstance(data, PackedSequence) or _is_list_of_series(data, certain):
        return _padded(data, read, names[0], lengths, flat)
    inside = dict(data) if isinstance(data, Mapping) else None
    if type(data) is tuple:
        with_lengths = len(data) == len(names)
        inside = dict(zip([name for name in names if with_lengths or name != lengths], data, strict=False))
        inside = inside if len(inside) == len(data) else None
    if not certain or inside is None:
        return data
    series = [name for name, x in inside.items() if isinstance(x, PackedSequence) or _is_list_of_series(x, certain)]
    if not series:
        return data
    fields: dict[str, Any] = {}
    for name, value in inside.items():
        fields |= _padded(value, read, name, lengths, flat) if name in series else {name: value}
    if lengths in inside:
        _check_own_lengths(inside[lengths], [len(x) for x in _series_of(inside[series[0]])], lengths, series[0])
    return fields


def packed_together(parts: Sequence[PackedSequence]) -> PackedSequence:
    """The sequences of several batches as one batch, in their order.

    Examples:
        >>> one, two = (pack_sequence([torch.ones(n)]) for n in (1, 2))
        >>> pad_packed_sequence(packed_together([one, two]), batch_first=True)[1].tolist()
        [1, 2]
    """
    return pack_sequence([x for part in parts for x in unpack_sequence(part)], enforce_sorted=False)


def checked_lengths(lengths: Tensor, x: Tensor, what: str = "lengths", of: str = "x") -> Tensor:
    """Lengths as whole numbers that fit padded sequences.

    Args:
        lengths: Number of steps of each sequence.
        x: The sequences, ``(N, T, ...)``.
        what: The user's name for the lengths.
        of: The user's name for the sequences.

    Raises:
        ValueError: If they are not one whole number per row, from 1 to T.
    """
    if tuple(lengths.shape) != (len(x),):
        raise ValueError(
            f"{what} must hold one number per row of {of}, shape ({len(x)},); got {tuple(lengths.shape)}. "
            "Give the number of steps of each sequence."
        )
    if bool((lengths != lengths.round()).any()) if lengths.is_floating_point() else False:
        row = int((lengths != lengths.round()).nonzero()[0])
        raise ValueError(
            f"{what} must be whole numbers; got {float(lengths[row]):g} in row {row}. Round or correct them."
        )
    wrong = (lengths < 1) | (lengths > x.shape[1])
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{what} must be from 1 to the {x.shape[1]} steps of {of}; got {int(lengths[row])} in row {row}. "
            f"Drop empty sequences, pad {of}, or correct the lengths."
        )
    return lengths.long()


def _series_of(data: Any) -> Sequence[Any]:
    return unpack_sequence(data) if isinstance(data, PackedSequence) else data


def _check_own_lengths(given: Any, own: Sequence[int], lengths: str, of: str) -> None:
    """Refuse given lengths that are not those of the series."""
    found = np.asarray(given).tolist()
    if found != [*own]:
        raise ValueError(
            f"{lengths} are not the lengths of the series in {of}; got {shown(found)}, expected {shown([*own])}. Leave "
            f"{lengths} out: a list of series has its own."
        )


def _padded(data: Any, read: Read, name: str, lengths: str, flat: Collection[str]) -> dict[str, Tensor]:
    if isinstance(data, PackedSequence):
        x, ends = pad_packed_sequence(data, batch_first=True)
    else:
        tensors = [read(item, f"sequence {i}") for i, item in enumerate(data)]
        if any(x.is_floating_point() for x in tensors):
            tensors = [x.to(read_dtype()) for x in tensors]
        x, ends = pad_sequence(tensors, batch_first=True), torch.tensor([len(x) for x in tensors])
    return {name: x.unsqueeze(-1) if x.dim() == 2 and name not in flat else x, lengths: ends}  # (N, T_max, D)


def _is_list_of_series(data: Any, certain: bool) -> bool:
    """Whether a list holds sequences: series, or matrices of one width, that are not all of one length."""
    if not isinstance(data, list) or not data:
        return False
    if certain and all(isinstance(item, list) for item in data):
        return _are_numbers(data)
    if not all(hasattr(item, "__array__") and getattr(item, "ndim", 0) in (1, 2) for item in data):
        return False
    shapes = {tuple(item.shape) for item in data}
    if len({shape[1:] for shape in shapes}) > 1:
        return False
    if certain:
        return True
    names = [getattr(item, "name", None) for item in data]  # columns of a frame are fields
    if len(data) == 1 or (len(shapes) == 1 and all(isinstance(n, str) for n in names) and len({*names}) == len(data)):
        return False
    if len(shapes) == 1:
        raise ValueError(
            f"a list of {len(data)} arrays of one shape {shapes.pop()} may be {len(data)} sequences "
            f"or {len(data)} fields. Stack them for sequences, or pass a tuple for fields."
        )
    return True


def _are_numbers(series: list[Any]) -> bool:
    try:
        return all(np.asarray(item).dtype.kind in "biuf" and np.asarray(item).ndim == 1 for item in series)
    except (ValueError, TypeError):
        return False
