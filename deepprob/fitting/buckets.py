"""Length buckets: sequences of similar length share batches, which end with their longest sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from deepprob.engine.scan.recur import UNROLLED
from deepprob.fitting.digest import digest
from deepprob.fitting.row_order import RowOrder
from deepprob.posteriors.training_rows import TrainingRows
from deepprob.programs.inputs import is_sequence
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch, num_rows
from deepprob.programs.program import Program

_MOST_BUCKETS = 4
_LEAST_SHARE_SAVED = 0.03  # of the time steps, by one more bucket
_SHORT = 16  # time steps; cutting sequences this short saves nothing
_CANDIDATES = 256


class LengthBuckets:
    r"""All rows of a fit, with sequences cut to the length of each bucket.

    A batch of short sequences need not be computed to the end of the longest sequence in the data. With bucket lengths
    :math:`\ell_1 < \dots < \ell_K` a row of length :math:`n` belongs to the bucket with the smallest
    :math:`\ell_k \ge n`, and a batch uses the bucket of its longest row. The bucket lengths minimise the number of time
    steps over all batches.

    Args:
        data: All rows, on the device.
        lengths: Time steps of each row before its padding, shape ``(N,)``; None for data without sequences of unequal
            length.
        batch_size: Rows of a batch, B.
        least_saving: Time steps per batch, on average, that one more bucket must save.
        pad_one_step: Whether to pad sequences by one extra step, so that the longest bucket is also a strided view and
            one compiled graph can serve all buckets.
        num_data: Number of rows, if the program holds the data itself.
        sequences: Whether each tensor of the data holds sequences; None for those of shape ``(N, T, ...)``.

    Attributes:
        data: All rows, uncut.
        lengths: The length of each bucket, ascending; empty for data without sequences of unequal length.
        data_by_bucket: For each bucket all rows, cut to its length.
        bucket_of_row: The bucket of each row, shape ``(N,)``, on the CPU; None if there is only one bucket.
        numbers: The rows' numbers in the data; None for all rows.
        is_usual: Whether loops can take the next step.

    Examples:
        Half of the sequences are short:

        >>> x, lengths = torch.zeros(4, 32, 2), torch.tensor([12, 32, 12, 30])
        >>> buckets = LengthBuckets((x, lengths), lengths)
        >>> [tuple(x.shape) for x, _ in buckets.data_by_bucket], buckets.bucket_of_row.tolist()
        ([(4, 12, 2), (4, 32, 2)], [0, 1, 0, 1])
    """

    numbers: Tensor | None = None
    is_usual = True

    def __init__(
        self,
        data: Batch,
        lengths: Tensor | None = None,
        batch_size: int = 1,
        least_saving: float = 0.0,
        pad_one_step: bool = False,
        num_data: int = 1,
        sequences: Sequence[bool] | None = None,
    ) -> None:
        data = _without_shared_memory(data)
        self.data, self.data_by_bucket, self.num_data = data, [data], num_rows(data) if data else num_data
        self.lengths: list[int] = []
        self.bucket_of_row: Tensor | None = None
        if lengths is None or not num_rows(data):
            return
        lengths = lengths.cpu()
        # Up to UNROLLED steps a recurrence is unrolled, and its graph would differ from that of longer sequences.
        lengths = lengths.clamp(min=min(UNROLLED + 1, int(lengths.max())))
        self.lengths = best_lengths(longest_of_batches(lengths, batch_size), least_saving)
        sequences = sequences or [is_sequence(x.shape[1:]) for x in data]
        steps = next(x.shape[1] for x, found in zip(data, sequences, strict=True) if found)
        is_cut = [found and x.shape[1] == steps for x, found in zip(data, sequences, strict=True)]
        if pad_one_step and len(self.lengths) > 1:
            data = tuple(_padded_by_one_step(x) if cut else x for x, cut in zip(data, is_cut, strict=True))
        self.data_by_bucket = [
            tuple(x[:, :end] if cut else x for x, cut in zip(data, is_cut, strict=True)) for end in self.lengths
        ]
        if len(self.lengths) > 1:
            self.bucket_of_row = torch.bucketize(lengths, torch.tensor(self.lengths))

    def data_of(self, bucket: int) -> Batch:
        """What the next step of a bucket reads."""
        return self.data_by_bucket[bucket]

    def order(self, batch_size: int, seed: int) -> RowOrder:
        """The order of the rows of a fit.

        Args:
            batch_size: Rows of a batch, B.
            seed: The fit's seed.
        """
        return RowOrder(self.num_data, batch_size, self.bucket_of_row, seed)

    @property
    def digest(self) -> str:
        """What identifies the data: a hash of their content."""
        return digest(self.data)

    def training_rows(self, instance: ProgramInstance) -> TrainingRows | None:
        """What a posterior keeps of the rows; see `TrainingRows`."""
        return TrainingRows.of(self.data, instance)

    def rows_within(self, bucket: int) -> Tensor:
        """Indices of the rows that are no longer than a bucket."""
        if self.bucket_of_row is None:
            return torch.arange(self.num_data)
        return (self.bucket_of_row <= bucket).nonzero().squeeze(1)

    def consecutive(self, rows: Tensor) -> Iterator[tuple[int, int, int]]:
        """Group consecutive batches that use the same bucket.

        Args:
            rows: The rows of each batch, shape ``(n, B)``.

        Yields:
            The bucket, the first batch of the group, and the batch after its last one.
        """
        if self.bucket_of_row is None:
            yield 0, 0, len(rows)
            return
        buckets = self.bucket_of_row[rows].amax(1).tolist()
        first = 0
        for end in range(1, len(buckets) + 1):
            if end == len(buckets) or buckets[end] != buckets[first]:
                yield buckets[first], first, end
                first = end


def _without_shared_memory(data: Batch) -> Batch:
    """Clone tensors that share memory with an earlier one: a compiler would take both for one input."""
    seen: set[int] = set()
    parts = []
    for x in data:
        address = x.untyped_storage().data_ptr()
        parts.append(x.clone() if address in seen else x)
        seen.add(address)
    return tuple(parts)


def _padded_by_one_step(x: Tensor) -> Tensor:
    """A view of the sequences, in memory with room for one more step each."""
    longer = x.new_zeros(len(x), x.shape[1] + 1, *x.shape[2:])
    longer[:, :-1] = x
    return longer


def sequence_lengths(program: Program, data: Batch) -> Tensor | None:
    """Time steps of each row, shape ``(N,)``; None if the program does not declare sequences of unequal length.

    Raises:
        ValueError: If ``program.lengths`` does not return one whole number per row.
    """
    lengths = program.lengths(*data) if program.variable_length else None
    if lengths is None:
        return None
    name = type(program).__name__
    if not any(program.sequences_in(data)):
        raise ValueError(
            f"{name}.lengths needs an argument that is a sequence, shape (rows, steps, ...); got none. "
            "Return None for data without sequences."
        )
    if tuple(lengths.shape) != (len(data[0]),) or bool((lengths != lengths.round()).any()):
        raise ValueError(
            f"{name}.lengths must return a whole number for each of the {len(data[0])} rows; got "
            f"shape {tuple(lengths.shape)}. Return each row's number of time steps, without its padding."
        )
    return lengths.long()


def longest_of_batches(lengths: Tensor, batch_size: int) -> Tensor:
    """The longest sequence of each batch of an epoch when rows are sorted by length.

    Examples:
        >>> longest_of_batches(torch.tensor([5, 1, 4, 2, 3]), 2)
        tensor([2, 4, 5])
    """
    ascending = lengths.sort().values
    ends = torch.arange(batch_size - 1, len(ascending) + batch_size - 1, batch_size).clamp(max=len(ascending) - 1)
    return ascending[ends]


def best_lengths(longest: Tensor, least_saving: float = 0.0) -> list[int]:
    """Choose at most four bucket lengths, the longest among them, that minimise the number of time steps.

    Args:
        longest: The longest sequence of each batch, shape ``(M,)``.
        least_saving: Time steps per batch, on average, that one more bucket must save.

    Returns:
        The lengths, ascending.

    Examples:
        >>> best_lengths(torch.tensor([10, 11, 12, 50, 51, 100]))
        [12, 51, 100]
        >>> best_lengths(torch.tensor([98, 99, 100]))
        [100]
    """
    known = longest.numpy()
    if len(np.unique(known)) > _CANDIDATES:
        known = np.quantile(known, np.arange(1, _CANDIDATES + 1) / _CANDIDATES, method="higher")
    ends, counts = np.unique(known, return_counts=True)
    if ends[-1] <= _SHORT:
        return [int(ends[-1])]
    below = np.concatenate([[0], np.cumsum(counts)]) / len(known)
    # cost[i, j]: time steps of the batches whose lengths are candidates i to j, all padded to candidate j
    cost = np.where(np.tri(len(ends), dtype=bool).T, (below[None, 1:] - below[:-1, None]) * ends, np.inf)
    least, chosen = cost[0], [[end] for end in ends.tolist()]
    for _ in range(_MOST_BUCKETS - 1):
        # One more bucket: keep the best choice up to some candidate, and pad all longer batches to the last one.
        longer = np.concatenate([[np.inf], least[:-1]])[:, None] + cost
        start = longer.argmin(0)
        new = longer.min(0)
        if least[-1] - new[-1] <= max(least_saving, _LEAST_SHARE_SAVED * least[-1]):
            break
        chosen = [[*chosen[i - 1], end] if i else [end] for i, end in zip(start.tolist(), ends.tolist(), strict=True)]
        least = new
    return chosen[-1]
