"""A table of draws in text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def table(draws: Mapping[str, Tensor], local: Sequence[str]) -> str:
    """Mean, sd and central 90 % interval of every entry of some sites; of large sites, those of the norm.

    Args:
        draws: Draws by site, ``(K, *site)``.
        local: Sites inside the row plate; the table says how to draw those that ``draws`` lacks.
    """
    lines = [f"{'site':28s} {'mean':>10s} {'sd':>10s} {'5 %':>10s} {'95 %':>10s}"]
    for name, value in draws.items():
        flat = value.reshape(len(value), -1).double()
        columns = [(f"{name}[{i}]" if flat.shape[1] > 1 else name, flat[:, i]) for i in range(flat.shape[1])]
        if flat.shape[1] > 20:
            columns = [(f"|{name}| {tuple(value.shape[1:])}", flat.norm(dim=1))]
        for title, column in columns:
            low, high = torch.quantile(column, column.new_tensor([0.05, 0.95])).tolist()
            sd = column.std(unbiased=False)
            lines.append(f"{title:28s} {column.mean():10.4g} {sd:10.4g} {low:10.4g} {high:10.4g}")
    lines += [f"{name:28s} local, one value per row: call sample(*data)" for name in local if name not in draws]
    return "\n".join(lines)
