"""Rows that are read while a fit runs: memory-mapped arrays, sparse matrices, data sets and loaders."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from deepprob.data.containers import Container, bytes_of, joined, leaves_of, length_of, rows_in
from deepprob.data.grouped_loader import GroupedLoader

_MOST_ITEMS = 2**20  # that a query reads of an iterable without a length
_MOST_BYTES = 2**28  # of the rows that a query looks at
_MOST_UNCOUNTED = 10_000  # rows of an iterable without a length


class ReadingError(RuntimeError):
    """The user's data set or loader failed while a fit read it.

    Args:
        message: Where it failed, and its own error.

    Attributes:
        posterior: The posterior at the last step before, if a fit was running.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.posterior: Any = None


class IndexedRows:
    """Rows that are read by their indices: of memory-mapped arrays, sparse matrices or a map-style data set.

    Args:
        data: A container with such arrays, beside which it may have others of the same length; or a data set.
        what: The name of the data in error messages.

    Attributes:
        num_data: Number of rows, N.
        has_code: Whether the user's code runs when rows are read, so that they may differ from pass to pass.

    Raises:
        ValueError: If there are no rows.

    Examples:
        >>> from scipy import sparse
        >>> rows = IndexedRows((sparse.eye(4, format="csr"), np.arange(4)))
        >>> [x.tolist() for x in rows.read(torch.tensor([3, 1]))]
        [[[0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]], [3, 1]]
    """

    def __init__(self, data: Any, what: str = "data") -> None:
        self.what, self.dataset = what, data if isinstance(data, Dataset) else None
        self.has_code = self.dataset is not None
        if self.dataset is not None:
            self.num_data = len(data)
        else:
            self._leaves, self._spec = leaves_of(data)
            self._leaves = [x.tocsr() if _is_sparse(x) else x for x in self._leaves]
            lengths = [n for n in map(length_of, self._leaves) if n is not None]
            self.num_data = max(lengths, key=lengths.count)
        if not self.num_data:
            raise ValueError(f"{what} is empty; expected at least one row. Pass data with rows.")

    def read(self, rows: Tensor) -> Container:
        """Some rows, in memory, in a container like the user's."""
        if self.dataset is not None:
            return collated(_items(self.dataset, rows.tolist()), self.what)
        numbers = rows.numpy()
        found = [self._taken(x, numbers) if length_of(x) == self.num_data else x for x in self._leaves]
        return tree_unflatten(found, self._spec)

    def is_random(self) -> bool:
        """Whether the same rows differ when they are read twice, as under random augmentation."""
        if not self.has_code:
            return False
        rows = torch.arange(min(4, self.num_data))
        first, again = (leaves_of(self.read(rows))[0] for _ in range(2))
        pairs = [(a, b) for a, b in zip(first, again, strict=True) if isinstance(a, Tensor) and isinstance(b, Tensor)]
        return any(a.shape != b.shape or not torch.allclose(a, b, 0.0, 0.0, equal_nan=True) for a, b in pairs)

    def _taken(self, x: Any, rows: np.ndarray) -> Any:
        if hasattr(x, "iloc"):
            return x.iloc[rows]
        if isinstance(x, Tensor):
            return x[torch.from_numpy(rows)]
        if _is_sparse(x):
            return x[rows].toarray()
        order = np.argsort(rows)  # the order on the disk
        taken = x[rows[order]]
        found = np.empty_like(taken)
        found[order] = taken
        return _as_numbers(found)


class LoaderBatches:
    """The batches of a loader, pass by pass, as it makes them.

    Args:
        loader: The loader.
        what: The name of the data in error messages.

    Attributes:
        num_data: Number of rows, N: of the data set, or of the part that its sampler draws from; None if the data set
            is an iterable without a length.
        steps_per_pass: Number of batches in a pass; None if it is not known.
        reads_beside: Whether worker processes run the user's code, so that another thread can wait for them.
    """

    def __init__(self, loader: DataLoader[Any], what: str = "data") -> None:
        self.loader, self.what, self.reads_beside = loader, what, loader.num_workers > 0
        self._grouped = GroupedLoader(loader) if GroupedLoader.applies(loader) else None
        self.num_data = _rows_of_loader(loader)
        iterable = isinstance(loader.dataset, IterableDataset)
        self.steps_per_pass = None if iterable and self.num_data is None else len(loader)
        self.passes = self.batches = 0  # begun; read of the present one
        self._iterator: Iterator[Any] | None = None

    @property
    def ended(self) -> bool:
        """Whether no pass is under way."""
        return self._iterator is None

    def begin(self) -> bool:
        """Begin a pass, if none is under way. This draws from torch's generator, as ``iter(loader)`` does."""
        if self._iterator is not None:
            return False
        self.passes, self.batches = self.passes + 1, 0
        self._iterator = self._guarded(lambda: iter(self._grouped or self.loader))
        return True

    def group(self, most: int) -> None:
        """Let worker processes send up to so many batches together, where the loader allows it."""
        if self._grouped is not None:
            self._grouped.most = most

    def end(self) -> None:
        """End the pass, and its worker processes."""
        self._iterator = None

    def read(self, count: int) -> list[Container]:
        """The next batches of the pass, at most ``count``; fewer only where it ends.

        Raises:
            ReadingError: If the loader fails, or a pass has no batch.
        """
        found: list[Any] = []
        while len(found) < count and self._iterator is not None:
            iterator = self._iterator
            batch = self._guarded(lambda: next(iterator, _END))  # noqa: B023
            if batch is _END:
                self._iterator = None
                if not self.batches:
                    raise ReadingError(
                        f"{self.what} is empty in pass {self.passes}; expected at least one batch. Pass a loader with "
                        "rows, whose data set gives them anew at every pass."
                    )
                break
            self.batches += 1
            found.append(tuple(batch) if type(batch) is list else batch)
        return found

    def _guarded(self, call: Any) -> Any:
        try:
            return call()
        except Exception as error:  # of the user's code
            self._iterator = None
            text = str(error).strip().splitlines() or [""]
            name = type(error).__name__
            own = text[-1] if text[-1].startswith(name) else f"{name}: {text[-1]}"
            first, count = self.batches + 1, self._grouped.in_next_message if self._grouped else 1
            where = f"batch {first}" if count == 1 else f"batches {first} to {first + count - 1}"
            raise ReadingError(
                f"reading {self.what} failed in pass {self.passes}, {where}, with {own}. Correct the data set or its "
                "loader; the whole error is above."
            ) from error


_END = object()


def stream_of(data: Any, batch_size: int = 128, what: str = "data") -> IndexedRows | LoaderBatches | None:
    """The rows of data that are read while a fit runs; None for data that lie in memory.

    A ``TensorDataset`` lies in memory, and so does one behind a loader that only shuffles it.

    Args:
        data: A user's data.
        batch_size: Rows of a batch of an ``IterableDataset``.
        what: The name of the data in error messages.
    """
    if isinstance(data, DataLoader):
        return None if shuffled_tensors(data) is not None else LoaderBatches(data, what)
    if isinstance(data, IterableDataset):
        return LoaderBatches(DataLoader(data, batch_size=batch_size), what)
    if isinstance(data, TensorDataset):
        return None
    if isinstance(data, Dataset):
        return IndexedRows(data, what) if isinstance(data, Sized) else None
    if isinstance(data, list):
        return None
    return IndexedRows(data, what) if any(_is_mapped(x) or _is_sparse(x) for x in leaves_of(data)[0]) else None


def shuffled_tensors(loader: DataLoader[Any]) -> TensorDataset | None:
    """The tensors of a loader that gives all of their rows in random order, unchanged; None for another loader."""
    dataset, sampler = loader.dataset, loader.sampler
    if not isinstance(dataset, TensorDataset) or loader.collate_fn is not default_collate or loader.drop_last:
        return None
    if type(sampler) is not RandomSampler or sampler.replacement or loader.batch_size is None:
        return None
    return dataset if sampler.num_samples == len(dataset) else None


def collated(rows: Sequence[Any], what: str) -> Container:
    """Rows of a data set as one batch.

    Raises:
        ValueError: If there are none, or they have no common shape.
    """
    if not rows:
        raise ValueError(f"{what} is empty; expected at least one row. Pass a Dataset with rows.")
    try:
        batch = default_collate(list(rows))
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"the rows of {what} must be numbers of one shape each ({error}). "
            "Pass sequences of unequal length as a list of arrays, images as tensors."
        ) from None
    return tuple(batch) if isinstance(batch, list) else batch


def bounded(items: Iterable[Any], what: str, most: int = _MOST_ITEMS) -> list[Any]:
    """All items of an iterable; one without a length must end.

    Raises:
        ValueError: If it has no length and does not end.
    """
    if _has_length(items):
        return list(items)
    found = list(itertools.islice(items, most + 1))
    if len(found) > most:
        raise ValueError(
            f"{what} has no length and gave {most} items without an end; all of them are needed at once. Give it a "
            "__len__, or pass some of its rows."
        )
    return found


def looked_at(data: Any, what: str = "data") -> Any:
    """Data that a query looks at: all of them up to 256 MiB, beyond that some rows, with a warning that says so.

    Of files, sparse matrices and data sets the rows are chosen at random, of a loader they are the first. Of an
    iterable without a length they are the first 10 000.

    Args:
        data: A user's data; what lies in memory is returned as it is.
        what: The name of the data in messages.

    Raises:
        ReadingError: If the user's code fails.
        ValueError: If rows have no common shape.
    """
    source = stream_of(data, what=what)
    if source is None:
        return data
    with torch.random.fork_rng(devices=[]):  # starting a loader draws from the global generator
        if isinstance(source, LoaderBatches):
            return _first_of(source)
        count = source.num_data
        width = bytes_of(source.read(torch.arange(1)))
        most = max(1, _MOST_BYTES // max(1, width))
        if count <= most:
            return source.read(torch.arange(count))
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].sort().values
        _say_looked_at(what, most, f"{count} rows, chosen at random")
        return source.read(chosen)


def _first_of(source: LoaderBatches) -> Container:
    batches, count, size = list[Any](), 0, 0
    most = sys.maxsize if source.num_data is not None else _MOST_UNCOUNTED
    source.begin()
    while not source.ended and count < most and size < _MOST_BYTES:
        for batch in source.read(1):
            batches.append(batch)
            count, size = count + rows_in(batch), size + bytes_of(batch)
    if not source.ended and count != source.num_data:
        _say_looked_at(source.what, count, "the loader's rows, the first ones")
    source.end()
    shapes = {tuple(getattr(x, "shape", ())[1:] for x in leaves_of(batch)[0]) for batch in batches}
    if len(shapes) > 1:
        raise ValueError(
            f"the batches of {source.what} differ in shape, so they are not rows of one field. "
            "Pad them to one length, or pass the data set itself."
        )
    return joined(batches)


def _say_looked_at(what: str, count: int, among: str) -> None:
    warnings.warn(f"{what}: looked at {count} of {among}.", UserWarning, stacklevel=4)


def _has_length(items: Any) -> bool:
    try:
        len(items)  # a loader has one only if its data set has
    except TypeError:
        return False
    return True


def _rows_of_loader(loader: DataLoader[Any]) -> int | None:
    if isinstance(loader.sampler, SubsetRandomSampler):
        return len(loader.sampler)
    return len(loader.dataset) if isinstance(loader.dataset, Sized) else None


def _is_mapped(x: Any) -> bool:
    """Whether an array lies in a file; a copy of one does not."""
    return isinstance(x, np.memmap) and x.filename is not None and x.ndim > 0


def _is_sparse(x: Any) -> bool:
    sparse = sys.modules.get("scipy.sparse")  # a matrix exists only if scipy is imported
    return sparse is not None and bool(sparse.issparse(x))


def _as_numbers(x: np.ndarray) -> Any:
    """An array of floats as a tensor; other arrays as they are."""
    if x.dtype.kind == "f" and x.dtype.itemsize <= 8:
        return torch.from_numpy(x.astype(x.dtype.newbyteorder("="), copy=False))
    return x


def _items(dataset: Any, rows: list[int]) -> list[Any]:
    try:
        many = getattr(dataset, "__getitems__", None)
        return list(many(rows)) if callable(many) else [dataset[i] for i in rows]
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        raise ReadingError(
            f"reading rows {rows[0]}, ... of the data set failed with {type(error).__name__}: {text[-1]}. Correct its "
            "__getitem__; the whole error is above."
        ) from error
