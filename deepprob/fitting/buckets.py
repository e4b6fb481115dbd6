"""Sequences of unequal length: batches of similar ones, cut where they end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from deepprob.engine.scan.recur import UNROLLED
from deepprob.programs.inputs import is_sequence
from deepprob.programs.minibatch import Batch, num_rows
from deepprob.programs.program import Program

_MOST = 4  # lengths that batches are cut to
_LEAST_SAVED = 0.03  # of the time steps, by one more length
_SHORT = 16  # time steps, of which none are worth saving
_CANDIDATES = 256


class Views:
    r"""The rows of a fit, and its sequences cut to a few lengths.

    A batch of similar sequences need not be computed to the end of the longest of all. With lengths
    :math:`\ell_1 < \dots < \ell_K` a row of length :math:`n` belongs to the least :math:`\ell_k \ge n`, and a batch is
    as long as the longest of its rows; they are chosen to minimise the time steps of all batches.

    Args:
        data: All rows, on the device.
        lengths: Time steps of each row, ``(N,)``, of sequences that are padded beyond; None if there are no such.
        batch_size: Rows of a batch, B.
        worth: Time steps of a batch, on average, that one more length must save.
        roomy: Whether sequences are copied to where there is room for one step more, so that the longest, too, are laid
            out like a part of something: then one compiled step can serve all lengths.

    Attributes:
        data: All rows, as they came.
        lengths: What batches are cut to, ascending; empty if there are no sequences.
        batches: All rows, cut to each of the lengths.
        groups: Which of `batches` each row belongs to, ``(N,)``, on the CPU; None if there is one for all.

    Examples:
        Half of the sequences are short:

        >>> x, lengths = torch.zeros(4, 32, 2), torch.tensor([12, 32, 12, 30])
        >>> views = Views((x, lengths), lengths)
        >>> [tuple(x.shape) for x, _ in views.batches], views.groups.tolist()
        ([(4, 12, 2), (4, 32, 2)], [0, 1, 0, 1])
    """

    def __init__(
        self,
        data: Batch,
        lengths: Tensor | None = None,
        batch_size: int = 1,
        worth: float = 0.0,
        roomy: bool = False,
    ) -> None:
        data = _apart(data)
        self.data, self.batches = data, [data]
        self.lengths: list[int] = []
        self.groups: Tensor | None = None
        if lengths is None or not num_rows(data):
            return
        lengths = lengths.cpu()
        lengths = lengths.clamp(min=min(UNROLLED + 1, int(lengths.max())))  # up to there, graphs are of another kind
        self.lengths = best_lengths(longest_of_batches(lengths, batch_size), worth)
        steps = next(x.shape[1] for x in data if is_sequence(x.shape[1:]))
        cut = [is_sequence(x.shape[1:]) and x.shape[1] == steps for x in data]
        if roomy and len(self.lengths) > 1:
            data = tuple(_longer(x) if cuts else x for x, cuts in zip(data, cut, strict=True))
        self.batches = [
            tuple(x[:, :end] if cuts else x for x, cuts in zip(data, cut, strict=True)) for end in self.lengths
        ]
        if len(self.lengths) > 1:
            self.groups = torch.bucketize(lengths, torch.tensor(self.lengths))

    def fitting(self, view: int) -> Tensor:
        """The rows whose sequences end within a view."""
        if self.groups is None:
            return torch.arange(num_rows(self.data))
        return (self.groups <= view).nonzero().squeeze(1)

    def runs(self, rows: Tensor) -> Iterator[tuple[int, int, int]]:
        """Which view serves which batches: its number, the first batch, and the one after the last.

        Args:
            rows: The rows of each batch, ``(n, B)``.
        """
        if self.groups is None:
            yield 0, 0, len(rows)
            return
        views = self.groups[rows].amax(1).tolist()
        first = 0
        for end in range(1, len(views) + 1):
            if end == len(views) or views[end] != views[first]:
                yield views[first], first, end
                first = end


def _apart(data: Batch) -> Batch:
    """The data, no two parts of them in one memory: to a compiler, that would be one input."""
    seen: set[int] = set()
    parts = []
    for x in data:
        place = x.untyped_storage().data_ptr()
        parts.append(x.clone() if place in seen else x)
        seen.add(place)
    return tuple(parts)


def _longer(x: Tensor) -> Tensor:
    """Sequences, and room for one step more."""
    longer = x.new_zeros(len(x), x.shape[1] + 1, *x.shape[2:])
    longer[:, :-1] = x
    return longer


def sequence_lengths(program: Program, data: Batch) -> Tensor | None:
    """Time steps of each row, if the program says that they differ.

    Raises:
        ValueError: If what it says are not whole numbers, one a row.
    """
    lengths = program.lengths(*data) if program.variable_length else None
    if lengths is None:
        return None
    if not any(is_sequence(x.shape[1:]) for x in data):
        raise ValueError("the program names lengths, but no argument is a sequence, (rows, steps, ...).")
    if tuple(lengths.shape) != (len(data[0]),) or bool((lengths != lengths.round()).any()):
        raise ValueError(
            f"{type(program).__name__}.lengths must return a whole number for each of the {len(data[0])} rows; got "
            f"shape {tuple(lengths.shape)}. Return the number of time steps that matter."
        )
    return lengths.long()


def longest_of_batches(lengths: Tensor, batch_size: int) -> Tensor:
    """The longest sequence of every batch of an epoch, were the rows sorted.

    Examples:
        >>> longest_of_batches(torch.tensor([5, 1, 4, 2, 3]), 2)
        tensor([2, 4, 5])
    """
    ascending = lengths.sort().values
    ends = torch.arange(batch_size - 1, len(ascending) + batch_size - 1, batch_size).clamp(max=len(ascending) - 1)
    return ascending[ends]


def best_lengths(longest: Tensor, worth: float = 0.0) -> list[int]:
    """At most four lengths, the longest among them, that leave the fewest time steps; ascending.

    Args:
        longest: Of the sequences of each batch, ``(M,)``.
        worth: Time steps of a batch, on average, that one more length must save.

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
    # cost[i, j]: batches of the candidates from i to j, all as long as j
    cost = np.where(np.tri(len(ends), dtype=bool).T, (below[None, 1:] - below[:-1, None]) * ends, np.inf)
    least, chosen = cost[0], [[end] for end in ends.tolist()]
    for _ in range(_MOST - 1):
        # One length more: the batches up to some candidate as before, and the rest as long as the last.
        longer = np.concatenate([[np.inf], least[:-1]])[:, None] + cost
        start = longer.argmin(0)
        new = longer.min(0)
        if least[-1] - new[-1] <= max(worth, _LEAST_SAVED * least[-1]):
            break
        chosen = [[*chosen[i - 1], end] if i else [end] for i, end in zip(start.tolist(), ends.tolist(), strict=True)]
        least = new
    return chosen[-1]
