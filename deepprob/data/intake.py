"""as_split: data of any supported type as checked, named tensors."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from deepprob.data.frames import array_of, column_names, frame_of, is_frame
from deepprob.data.padding import packed_together, padded_sequences
from deepprob.data.precision import in_precision
from deepprob.data.sparse import dense, is_sparse
from deepprob.data.split import Split
from deepprob.data.streams import bounded, collated
from deepprob.errors import MissingValueError


def as_split(data: Any, *, what: str = "data", missing: bool = False, sequences: bool = False) -> Split:
    """Convert any table, array or data set to a :class:`Split` and check its values.

    Floats and bools are converted to torch's default dtype, whole numbers to int64. A tuple holds fields. A list of
    ``(T_i,)`` series or ``(T_i, D)`` arrays of unequal length holds sequences: they are padded with zeros to
    ``(N, T_max, D)``, and their lengths become the field ``lengths``; so does a ``PackedSequence``.

    Args:
        data: A split, tensor, array, pandas frame or series, nested list of numbers, a tuple,
            list or dict of these, a list of sequences, a torch ``Dataset`` or ``DataLoader``.
        what: Name of the data in error messages.
        missing: Whether values may be missing (NaN).
        sequences: Whether a list holds sequences even if all have one length.

    Returns:
        The fields, named by the dict's keys or the series' names, else x, y, data_2, data_3, ...

    Raises:
        TypeError: If the data or one of their columns are not numbers.
        ValueError: If the data are empty, not finite, unequal in length, or have no axis of rows.

    Examples:
        Arrays and lists give the same fields:

        >>> pair = as_split((np.eye(3)[::-1], [1, 0, 1]))
        >>> pair
        Split(3 rows: x (3,) float32, y () int64)
        >>> as_split({"notes": [[True], [False]]})["notes"].tolist()
        [[1.0], [0.0]]
    """
    fields = fields_of(data, what, missing=missing, sequences=sequences)
    tensors = {name: _checked(value, f"{name!r} of {what}", missing) for name, value in fields.items()}
    try:
        return Split(tensors)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from None


def fields_of(data: Any, what: str, *, missing: bool = False, sequences: bool = False) -> Mapping[str, Any]:
    """The fields of a container by name, in the user's types; lists of series are padded.

    Args:
        data: The container, as for `as_split`.
        what: Its name in error messages.
        missing: Whether values of series may be missing (NaN).
        sequences: Whether a list holds sequences even if all have one length.
    """
    data = padded_sequences(data, lambda series, label: _checked(series, label, missing), certain=sequences)
    if isinstance(data, Split):
        return dict(zip(data.names, data.tensors, strict=True))
    if isinstance(data, Mapping):
        return data
    if isinstance(data, DataLoader):
        return fields_of(_from_loader(data, what), what)
    if isinstance(data, Dataset):
        return fields_of(_from_dataset(data, what), what)
    if isinstance(data, tuple):
        return _named(data, getattr(data, "_fields", None))
    if isinstance(data, list) and data and all(_is_array(item) and len(item.shape) for item in data):
        return _named(data)
    return _named((data,))


def _named(values: Sequence[Any], names: Sequence[str] | None = None) -> dict[str, Any]:
    default = [*("x", "y"), *(f"data_{i}" for i in range(2, len(values)))][: len(values)]
    given = [getattr(value, "name", None) for value in values]  # a pandas series has a name
    own = [name if isinstance(name, str) and name else None for name in given]
    chosen = list(names or (mine or other for mine, other in zip(own, default, strict=True)))
    return dict(zip(chosen if len({*chosen}) == len(chosen) else default, values, strict=True))


def _is_array(value: object) -> bool:
    return hasattr(value, "__array__") and hasattr(value, "shape")


def _from_dataset(data: Dataset[Any], what: str) -> Any:
    if isinstance(data, TensorDataset):
        return data.tensors
    if isinstance(data, IterableDataset):
        return collated(bounded(data, what), what)
    return collated([data[i] for i in range(len(data))] if isinstance(data, Sized) else [*iter(data)], what)


def _from_loader(loader: DataLoader[Any], what: str) -> Any:
    """All rows of a loader, in the order of its data set unless it has a custom sampler or ``collate_fn``."""
    plain = type(loader.sampler) in (SequentialSampler, RandomSampler)
    replaced = getattr(loader.sampler, "replacement", False)
    if loader.collate_fn is default_collate and plain and not replaced:
        return _from_dataset(loader.dataset, what)
    with torch.random.fork_rng(devices=[]):  # starting a loader draws from the global generator
        given = loader if isinstance(loader.dataset, IterableDataset) else list(loader)
        given = bounded(given, what)
        if given and isinstance(given[0], PackedSequence):
            return packed_together(given)
        named = bool(given) and isinstance(given[0], Mapping)
        batches = [fields_of(tuple(b) if isinstance(b, list) else b, what) for b in given]
    if not batches:
        raise ValueError(f"{what} is empty; expected at least one batch. Pass a loader with rows.")
    packed = [name for name, x in batches[0].items() if isinstance(x, PackedSequence)]
    rest = [name for name in batches[0] if name not in packed]
    parts = {name: [_checked(batch[name], f"{name!r} of {what}") for batch in batches] for name in rest}
    if any(len({part.shape[1:] for part in field}) > 1 for field in parts.values()):
        raise ValueError(
            f"the batches of {what} differ in shape, so they are not rows of one field. "
            "Pad them to one length, or pass the data set itself."
        )
    together = {name: packed_together([batch[name] for batch in batches]) for name in packed}
    joined = {name: together[name] if name in packed else torch.cat(parts[name]) for name in batches[0]}
    return joined if named else tuple(joined.values())


def container_of(data: Any, what: str) -> Any:
    """The rows of a data set or a loader, in a tuple, a dict or a tensor as it gives them; other data as they are."""
    if isinstance(data, DataLoader):
        return _from_loader(data, what)
    return _from_dataset(data, what) if isinstance(data, Dataset) else data


def is_table(value: object) -> bool:
    """Whether a value is a tensor, an array, a frame, a series or a list of numbers."""
    if isinstance(value, list):
        return _holds_numbers(value)
    return (
        _is_array(value) or is_frame(value) or is_sparse(value) or type(value).__module__.partition(".")[0] == "pandas"
    )


def _holds_numbers(value: list[Any]) -> bool:
    try:
        return bool(value) and np.asarray(value).dtype.kind in "biuf"
    except (ValueError, TypeError):
        return False


def tensor_of(value: Any, label: str, missing: bool = False) -> Tensor:
    """A dense, finite tensor with rows; bools and whole numbers keep their type.

    Args:
        value: A tensor, an array, a frame, a series or a list of numbers.
        label: The name of the value in error messages.
        missing: Whether values may be missing (NaN).

    Raises:
        TypeError: If it does not hold numbers.
        ValueError: If it is empty, not finite or has no rows.
    """
    tensor = _tensor(value, label)
    if tensor.dtype == torch.bool and tensor.dim():
        return tensor.contiguous()
    return _checked(value if is_frame(value) else tensor, label, missing)


def _checked(value: Any, label: str, missing: bool = False) -> Tensor:
    """A dense, finite tensor with rows, in int64 or the precision of the context."""
    tensor = _tensor(value, label)
    if tensor.dim() == 0:
        raise ValueError(f"{label} is one number, not rows. Give it a leading axis of rows.")
    if tensor.numel() == 0:
        shape = tuple(tensor.shape)
        raise ValueError(f"{label} is empty: shape {shape}. Pass at least one row of numbers.")
    names = column_names(value) if is_frame(value) else ()
    tensor = in_precision(tensor, label, names).contiguous()
    if not tensor.is_floating_point():
        return tensor
    # A finite sum has finite terms; only otherwise is the element-wise test worth its memory.
    if not torch.isfinite(tensor.sum()):
        for kind, bad in (("NaN", tensor.isnan()), ("infinite", tensor.isinf())):
            if bad.any() and not (missing and kind == "NaN"):
                count, first = int(bad.sum()), int(bad.reshape(len(bad), -1).any(1).nonzero()[0])
                values = "value" if count == 1 else "values"
                error = MissingValueError if kind == "NaN" else ValueError
                raise error(
                    f"{label} has {count} {kind} {values}, the first in row {first}. Drop these rows or fill them in."
                )
    return tensor


def _tensor(value: Any, label: str) -> Tensor:
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise TypeError(f"{label} is a sparse tensor; expected a dense one. Use .to_dense().")
        if value.is_complex():
            raise TypeError(f"{label} is complex; expected real numbers. Use torch.view_as_real.")
        return value.clone() if value.is_inference() else value.detach()  # a fit saves its data for gradients
    pandas = sys.modules.get("pandas")  # a series exists only if pandas is imported
    if is_sparse(value):
        value = dense(value, label)
    if is_frame(value):
        array = array_of(frame_of(value), label)
    elif pandas is not None and isinstance(value, pandas.Series):
        array = array_of(value.to_frame(), label)[:, 0]
    elif isinstance(value, list | tuple) or _is_array(value) or isinstance(value, int | float):
        if isinstance(value, np.ma.MaskedArray) and value.mask.any():
            value = np.where(value.mask, np.nan, value.data)  # a masked value is missing
        try:
            array = np.asarray(value)
        except (ValueError, TypeError):
            raise ValueError(
                f"the items of {label} must have one shape; got a list of items of unequal shape. "
                "Pass sequences of unequal length as a list of arrays."
            ) from None
    else:
        parts = hasattr(value, "train") and hasattr(value, "test")
        hint = "Pass one of its parts, e.g. .train" if parts else "Convert it to an array"
        raise TypeError(
            f"{label} must be numbers in a tensor, an array, a pandas frame, a Dataset or a "
            f"DataLoader; got {type(value).__name__}. {hint}."
        )
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"{label} must be numbers; got dtype {array.dtype}. Encode text, dates and missing values as numbers."
        )
    # torch accepts neither negative strides nor foreign byte order nor floats of more than 64 bits.
    dtype = np.dtype(np.int64) if array.dtype.kind in "ui" else array.dtype.newbyteorder("=")
    wide = dtype.itemsize > 8
    return torch.from_numpy(array.astype(np.float64 if wide else dtype, order="C", copy=True))
