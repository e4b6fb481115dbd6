"""The rows that a posterior was fitted to: a digest of each, and a summary of every column."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepprob.programs.instance import ProgramInstance

Array = NDArray[np.float64]

MOST_DIGESTS = 200_000
MOST_COLUMNS = 64
_MOST_SUMMARIZED = 20_000  # rows
_NUMBERS_AT_ONCE = 2**18  # they stay in the processor's cache
_QUANTILES = np.array([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])


@dataclass(frozen=True, eq=False)
class Summary:
    """The distribution of every column of a tensor over the training rows, in float64.

    A tensor with more than 64 numbers a row has two columns instead: the mean and the sd of each row.

    Attributes:
        count: Number of rows that it was computed from.
        mean: Means, shape ``(C,)``.
        sd: Standard deviations, shape ``(C,)``.
        points: Quantiles from 5 % to 95 %, shape ``(C, Q)``.
        shares: The share of rows up to each point, which exceeds the quantile's level where values repeat, ``(C, Q)``.
        classes: The values of a single column of few whole numbers, ascending; empty for other columns.
        class_counts: How many rows have each of these values.
    """

    count: int
    mean: Array
    sd: Array
    points: Array
    shares: Array
    classes: Array
    class_counts: Array


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """What a posterior keeps of the rows of its fit, to recognize them and to compare others with them.

    Attributes:
        count: Number of rows, N.
        digests: A 64-bit digest of every row, ascending; of 200 000 rows chosen at random if there are more.
        summaries: A summary of each of the program's arguments; empty for sequences of unequal length.

    Examples:
        >>> x = torch.arange(6.0).reshape(3, 2)
        >>> kept = TrainingRows.of((x,))
        >>> kept.has(digests_of((x[1:] + torch.tensor([[0.0], [1.0]]),))).tolist()
        [True, False]
    """

    count: int
    digests: Tensor
    summaries: tuple[Summary | None, ...] = ()

    @classmethod
    def of(cls, batch: Sequence[Tensor], instance: ProgramInstance | None = None) -> TrainingRows | None:
        """The record of some rows, as a program accepted them; None without arguments.

        Args:
            batch: The rows.
            instance: The program; it tells rows that are not in the first dimension, and sequences.
        """
        if not batch:
            return None
        rows = len(batch[0])
        if instance is not None and not _in_first_dimension(instance, rows):
            return cls(1, digests_of([x.reshape(1, -1) for x in batch]))
        chosen = _chosen(rows, MOST_DIGESTS)
        digests = digests_of([x if chosen is None else x[chosen.to(x.device)] for x in batch])
        return cls(rows, digests.sort().values, _summaries(batch, instance))

    @classmethod
    def read(
        cls,
        count: int,
        read: Callable[[Tensor], Sequence[Tensor]],
        most: int,
        sample: Sequence[Tensor],
        instance: ProgramInstance | None = None,
    ) -> TrainingRows:
        """The record of rows that do not fit in memory.

        Args:
            count: Number of rows, N.
            read: Reads rows by their numbers, accepted.
            most: Most rows to read at once.
            sample: A sample of the rows, which the summaries describe.
            instance: The program.
        """
        chosen = _chosen(count, MOST_DIGESTS)
        numbers = torch.arange(count) if chosen is None else chosen
        digests = torch.empty(
            len(numbers), dtype=torch.int64
        )  # small tensors kept between large ones would split memory
        for piece, found in zip(numbers.split(most), digests.split(most), strict=True):
            found.copy_(digests_of(read(piece)))
        return cls(count, digests.sort().values, _summaries(sample, instance))

    @property
    def repeats(self) -> Tensor:
        """How often each of the different rows occurs among the kept rows."""
        counts: Tensor = torch.unique_consecutive(self.digests, return_counts=True)[1]
        return counts

    def digests_like(self, batch: Sequence[Tensor]) -> Tensor:
        """Digests of other data, of the kind of those kept: of rows, or of the data as a whole."""
        whole = self.count == 1 and bool(batch) and not self.summaries
        return digests_of([x.reshape(1, -1) for x in batch] if whole else batch)

    def has(self, digests: Tensor) -> Tensor:
        """Whether each of some digests is that of a kept row."""
        return torch.isin(digests, self.digests)

    def equals(self, digests: Tensor) -> bool:
        """Whether these are the digests of the training rows, in any order."""
        if len(digests) != self.count:
            return False
        if len(self.digests) == self.count:
            return torch.equal(digests.sort().values, self.digests)
        return bool(torch.isin(self.digests, digests).all())

    def to_tensors(self) -> dict[str, Tensor]:
        """The record as tensors to save."""
        found = {"count": torch.tensor(self.count), "digests": self.digests}
        for i, summary in enumerate(self.summaries):
            parts = {} if summary is None else asdict(summary)
            found |= {f"{i}.{name}": torch.as_tensor(value) for name, value in parts.items()}
        return found | {"arguments": torch.tensor(len(self.summaries))}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor]) -> TrainingRows | None:
        """The inverse of `to_tensors`; None where an earlier version saved no record."""
        if not tensors:
            return None

        def summary(i: int) -> Summary | None:
            parts: dict[str, Any] = {
                name.partition(".")[2]: x.numpy() for name, x in tensors.items() if name.startswith(f"{i}.")
            }
            return Summary(**{**parts, "count": int(parts["count"])}) if parts else None

        summaries = tuple(summary(i) for i in range(int(tensors["arguments"])))
        return cls(int(tensors["count"]), tensors["digests"], summaries)


def digests_of(batch: Sequence[Tensor]) -> Tensor:
    r"""A 64-bit digest of every row, over all tensors, shape ``(B,)``.

    .. math:: h_i = \sum_j m_j \, u_{ij} \bmod 2^{64}

    Here :math:`u_{ij}` are the bits of the row's numbers as float64, and :math:`m_j` odd multipliers. The digest
    depends on neither the type of the numbers nor zeros at the end of a row, so padding does not change it.

    Args:
        batch: Tensors with the same number of rows.

    Examples:
        >>> a, b = digests_of([torch.tensor([[1, 2, 0]])]), digests_of([torch.tensor([[1.0, 2.0]])])
        >>> bool(a == b)
        True
    """
    total = torch.zeros(len(batch[0]), dtype=torch.int64, device=batch[0].device)
    for place, x in enumerate(batch):
        flat = x.detach().reshape(len(x), math.prod(x.shape[1:]))
        multipliers = torch.from_numpy(_multipliers(place, flat.shape[1])).to(flat.device)
        step = max(1, _NUMBERS_AT_ONCE // max(1, flat.shape[1]))
        for start in range(0, len(flat), step):
            bits = flat[start : start + step].to(torch.float64, copy=True).add_(0.0).view(torch.int64)  # -0 becomes 0
            bits ^= bits >> 32  # the lower bits of short numbers are zero
            total[start : start + step] += bits.mul_(multipliers).sum(1)
    return total.cpu()


def columns_of(x: Tensor) -> Array:
    """The columns of a tensor that a `Summary` describes, shape ``(rows, C)``.

    Examples:
        >>> columns_of(torch.zeros(5, 3)).shape, columns_of(torch.zeros(5, 28, 28)).shape
        ((5, 3), (5, 2))
    """
    flat = x.detach().reshape(len(x), math.prod(x.shape[1:]))
    if flat.shape[1] <= MOST_COLUMNS:
        return np.asarray(flat.to(torch.float64).cpu().numpy())
    pieces = flat.split(max(1, _NUMBERS_AT_ONCE // flat.shape[1]))
    found = [torch.stack([p.mean(1), p.std(1, correction=0)], 1) for p in (x.to(torch.float64) for x in pieces)]
    return np.asarray(torch.cat(found).cpu().numpy() if found else np.empty((0, 2)))


def _summaries(batch: Sequence[Tensor], instance: ProgramInstance | None) -> tuple[Summary | None, ...]:
    skipped = [False] * len(batch) if instance is None else instance.program.sequences_in(batch)
    return tuple(None if skip else _summary(x) for x, skip in zip(batch, skipped, strict=True))


def _in_first_dimension(instance: ProgramInstance, rows: int) -> bool:
    found = instance.structure
    return bool(instance.program.data_name) or not found.row_plate or found.rows in (0, rows)


def _chosen(rows: int, most: int) -> Tensor | None:
    """Indices of some rows, chosen at random; None for all."""
    if rows <= most:
        return None
    return torch.from_numpy(np.sort(np.random.default_rng(0).permutation(rows)[:most]))


def _multipliers(place: int, count: int) -> NDArray[np.int64]:
    """Odd multipliers, which look random (splitmix64)."""
    z = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(place << 40)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31)) | np.uint64(1)).view(np.int64)


def _summary(x: Tensor) -> Summary:
    width = max(1, x[0].numel()) if len(x) else 1
    chosen = _chosen(len(x), min(_MOST_SUMMARIZED, max(1000, 5_000_000 // width)))
    values = columns_of(x if chosen is None else x[chosen.to(x.device)])
    columns = [np.sort(column[np.isfinite(column)]) for column in values.T]
    points = np.stack([_quantiles(column) for column in columns]) if columns else np.empty((0, len(_QUANTILES)))
    shares = [np.searchsorted(c, p, side="right") / max(len(c), 1) for c, p in zip(columns, points, strict=True)]
    classes, counts = np.empty(0), np.empty(0)
    if len(columns) == 1 and (columns[0] == np.round(columns[0])).all():
        found, times = np.unique(columns[0], return_counts=True)
        if len(found) <= MOST_COLUMNS:
            classes, counts = found, times.astype(np.float64)
    return Summary(
        count=len(values),
        mean=np.array([c.mean() if len(c) else np.nan for c in columns]),
        sd=np.array([c.std(ddof=1) if len(c) > 1 else np.nan for c in columns]),
        points=points,
        shares=np.stack(shares) if shares else np.empty_like(points),
        classes=classes,
        class_counts=counts,
    )


def _quantiles(ordered: Array) -> Array:
    return ordered[(_QUANTILES * (len(ordered) - 1)).round().astype(int)] if len(ordered) else np.full(11, np.nan)
