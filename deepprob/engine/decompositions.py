"""Operations that a loop writes in another way for the compiler."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_SMALL_SUM = 2**12  # table entries times added numbers


def index_put_as_sum(base: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """Compute ``index_put(accumulate=True)`` on rows of a small table as a sum; return NotImplemented otherwise.

    The compiler adds in place, and was once seen to read a table of four numbers before all additions were done. Large
    tables are left to the compiler; the comparison of compiled and eager steps before a fit guards against the error.
    """
    if not accumulate or len(indices) != 1 or (index := indices[0]) is None or index.dtype != torch.long:
        return NotImplemented
    row, count = base.shape[1:], index.numel()
    if base.numel() * count > _SMALL_SUM:
        return NotImplemented
    index = torch.where(index < 0, index + len(base), index).reshape(1, count)
    here = index == torch.arange(len(base), device=base.device).unsqueeze(1)  # (rows, count)
    added = values.expand(*indices[0].shape, *row).reshape(1, count, math.prod(row))  # type: ignore[union-attr]
    return base + torch.where(here.unsqueeze(-1), added, 0).sum(1, dtype=base.dtype).reshape(base.shape)
