"""Mean and standard deviation of rows, piece by piece."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_NUMBERS_AT_ONCE = 2**18


class Moments:
    r"""Mean and standard deviation of every entry of a row, over rows that come piece by piece, in float64.

    .. math:: M \leftarrow M + M_p + (m_p - m)^2 \, \frac{n n_p}{n + n_p}, \qquad
              m \leftarrow m + (m_p - m) \, \frac{n_p}{n + n_p}

    with the count :math:`n`, the mean :math:`m` and the sum of squared deviations :math:`M` of the rows so far, and
    those of a piece. Rows that do not fit in memory have the same moments as rows that do, bit for bit.

    Attributes:
        count: Number of rows.

    References:
        Chan, Golub, LeVeque (1983), Algorithms for computing the sample variance.

    Examples:
        >>> found = Moments()
        >>> for piece in (torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])):
        ...     found.add(piece)
        >>> found.mean.item(), round(found.sd().item(), 4)
        (3.0, 2.1602)
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._squares = torch.zeros((), dtype=torch.float64)

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """The moments of rows in memory; of a marked sample, those of all rows."""
        known: Moments | None = getattr(rows, "all_rows", None)
        if known is not None:
            return known
        found = cls()
        for piece in rows.split(rows_of_a_piece(rows[0].numel())):
            found.add(piece)
        return found

    def mark(self, sample: Tensor) -> None:
        """Let `of` of a sample of the rows return these moments of all of them."""
        sample.all_rows = self  # type: ignore[attr-defined]

    def add(self, rows: Tensor) -> None:
        """Count further rows; pieces of `rows_of_a_piece` give the moments of `of`."""
        values = rows.detach().to(torch.float64)
        mean, share = values.mean(0), len(rows) / (self.count + len(rows))
        squares = (values - mean).square().sum(0)
        self._squares = self._squares + squares + (mean - self._mean).square() * (self.count * share)
        self._mean = self._mean + (mean - self._mean) * share
        self.count += len(rows)

    @property
    def mean(self) -> Tensor:
        """The mean of every entry, in the shape of a row."""
        return self._mean

    def sd(self) -> Tensor:
        """The standard deviation of every entry (that of the rows, without a correction)."""
        return (self._squares / self.count).sqrt()

    def over_all(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over all rows and entries."""
        mean = self._mean.mean()
        return mean, ((self._squares / self.count).mean() + (self._mean - mean).square().mean()).sqrt()


def rows_of_a_piece(width: int) -> int:
    """Rows in a piece, whose rows have so many numbers."""
    return max(1, math.floor(_NUMBERS_AT_ONCE / max(1, width)))
