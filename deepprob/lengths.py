"""Sequences of unequal length: batches of similar ones, cut where they end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from deepprob.inputs import is_sequence
from deepprob.program import Batch, Program, num_rows

_MOST = 3  # lengths that batches are cut to
_LEAST_SAVED = 0.05  # of the time steps, by one more length
_SHORT = 16  # time steps, of which none are worth saving
_CANDIDATES = 256


class Views:
    r"""The rows of a fit, and its sequences cut to a few lengths.

    A batch of similar sequences need not be computed to the end of the longest of all. With lengths
    :math:`\ell_1 < \dots < \ell_K` a row of length :math:`n` belongs to the least :math:`\ell_k \ge n`; they are chosen
    to minimise the time steps of all rows, :math:`\sum_k \ell_k N_k`.

    Args:
        data: All rows, on the device.
        lengths: Time steps of each row, ``(N,)``, of sequences that are padded beyond; None if there are no such.
        worth: Time steps of all rows, each once, that one more length must save.

    Attributes:
        data: All rows, as they came.
        batches: All rows, cut to each of the lengths, ascending.
        groups: Which of `batches` each row belongs to, ``(N,)``, on the CPU; None if there is one for all.

    Examples:
        Half of the sequences are short:

        >>> x, lengths = torch.zeros(4, 32, 2), torch.tensor([8, 32, 8, 30])
        >>> views = Views((x, lengths), lengths)
        >>> [tuple(x.shape) for x, _ in views.batches], views.groups.tolist()
        ([(4, 8, 2), (4, 32, 2)], [0, 1, 0, 1])
    """

    def __init__(self, data: Batch, lengths: Tensor | None = None, worth: float = 0.0) -> None:
        data = _apart(data)
        self.data, self.batches = data, [data]
        self.groups: Tensor | None = None
        if lengths is None or not num_rows(data):
            return
        lengths = lengths.cpu().clamp(min=1)
        ends = torch.tensor(best_lengths(lengths, worth))
        self.batches = [tuple(x[:, :end] if is_sequence(x.shape[1:]) else x for x in data) for end in ends.tolist()]
        if len(ends) > 1:
            self.groups = torch.bucketize(lengths, ends)

    @classmethod
    def of(cls, program: Program, data: Batch, worth: float = 0.0) -> Views:
        """The views of a program's rows."""
        return cls(data, program.lengths(*data) if program.variable_length else None, worth)

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


def best_lengths(lengths: Tensor, worth: float = 0.0) -> list[int]:
    """At most three lengths, the longest among them, that leave the fewest time steps; ascending.

    Args:
        lengths: Of the sequences, ``(N,)``.
        worth: Time steps that one more length must save.

    Examples:
        >>> best_lengths(torch.tensor([10, 11, 12, 50, 51, 100]))
        [12, 51, 100]
        >>> best_lengths(torch.tensor([98, 99, 100]))
        [100]
    """
    known = lengths.numpy()
    if len(np.unique(known)) > _CANDIDATES:
        known = np.quantile(known, np.arange(1, _CANDIDATES + 1) / _CANDIDATES, method="higher")
    ends, counts = np.unique(known, return_counts=True)
    if ends[-1] <= _SHORT:
        return [int(ends[-1])]
    below = np.concatenate([[0], np.cumsum(counts)])
    # cost[i, j]: rows of the candidates from i to j, all as long as j
    every = (below[None, 1:] - below[:-1, None]) * (len(lengths) / len(known))
    cost = np.where(np.tri(len(ends), dtype=bool).T, every * ends, np.inf)
    least, chosen = cost[0], [[end] for end in ends.tolist()]
    for _ in range(_MOST - 1):
        # One length more: the rows up to some candidate as before, and the rest as long as the last.
        longer = np.concatenate([[np.inf], least[:-1]])[:, None] + cost
        start = longer.argmin(0)
        new = longer.min(0)
        if least[-1] - new[-1] <= max(worth, _LEAST_SAVED * least[-1]):
            break
        chosen = [[*chosen[i - 1], end] if i else [end] for i, end in zip(start.tolist(), ends.tolist(), strict=True)]
        least = new
    return chosen[-1]
