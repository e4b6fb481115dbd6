"""Tables for the records of many steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Tables = tuple[dict[torch.dtype, Tensor], dict[str, Tensor]]


class Records:
    """Tables for the records of many steps: one for all scalars of a dtype, and one for each other tensor.

    Args:
        example: The record of one step.

    Attributes:
        scalars: Names of the scalars in a record.

    Examples:
        A whole number keeps its dtype, and so all of its digits:

        >>> record = {"loss": torch.tensor(0.5), "count": torch.tensor(2**24 + 1)}
        >>> records = Records(record)
        >>> tables = records.write(records.empty(1, torch.device("cpu")), torch.tensor([0]), record)
        >>> records.read(tables, 1)
        {'loss': tensor([0.5000]), 'count': tensor([16777217])}
    """

    def __init__(self, example: Mapping[str, Tensor]) -> None:
        self._kinds = {name: (x.shape, x.dtype) for name, x in example.items()}
        self.scalars = tuple(name for name, x in example.items() if not x.dim())
        dtypes = dict.fromkeys(example[name].dtype for name in self.scalars)
        self._columns = {dtype: [n for n in self.scalars if example[n].dtype == dtype] for dtype in dtypes}

    def empty(self, count: int, device: torch.device) -> Tables:
        """Tables for the records of ``count`` steps."""
        scalars = {dtype: torch.zeros(count, len(n), dtype=dtype, device=device) for dtype, n in self._columns.items()}
        others = {
            name: torch.zeros((count, *shape), dtype=dtype, device=device)
            for name, (shape, dtype) in self._kinds.items()
            if shape
        }
        return scalars, others

    def write(self, tables: Tables, at: Tensor, record: Mapping[str, Tensor]) -> Tables:
        """The tables with the record of one step, whose index ``at`` has shape ``(1,)``."""
        scalars = {
            dtype: table.index_copy(0, at, _row([record[name] for name in self._columns[dtype]], table).unsqueeze(0))
            for dtype, table in tables[0].items()
        }
        others = {name: table.index_copy(0, at, record[name].unsqueeze(0)) for name, table in tables[1].items()}
        return scalars, others

    def read(self, tables: Tables, count: int) -> dict[str, Tensor]:
        """The records of the first ``count`` steps, ``(count, ...)`` by name."""
        found = {name: table[:count] for name, table in tables[1].items()}
        for dtype, names in self._columns.items():
            found |= zip(names, tables[0][dtype][:count].unbind(1), strict=True)
        return {name: found[name] for name in self._kinds}


def _row(numbers: Sequence[Tensor], table: Tensor) -> Tensor:
    """A row of a table, from its numbers."""
    row, columns = torch.zeros_like(table[0]), torch.arange(len(numbers), device=table.device)
    for column, number in enumerate(numbers):
        # torch.stack would first allocate memory for every number.
        row = torch.where(columns == column, number, row)
    return row
