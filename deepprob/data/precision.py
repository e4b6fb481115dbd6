"""The precision in which numbers are read, and columns that would lose digits in it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_SHARE = 1e-3  # of a standard deviation: the largest distance of neighboring numbers that keeps a column's digits
_MOST_NAMED = 5

_dtype: ContextVar[torch.dtype | None] = ContextVar("dtype", default=None)
_warns: ContextVar[bool] = ContextVar("warns", default=False)
_told: ContextVar[set[str] | None] = ContextVar("told", default=None)


@contextmanager
def reading(dtype: torch.dtype, *, warn: bool) -> Iterator[None]:
    """Within this context floats are read in a precision.

    Args:
        dtype: The precision.
        warn: Whether to warn of columns that lose digits in it.
    """
    before = _dtype.set(dtype), _warns.set(warn)
    try:
        yield
    finally:
        _dtype.reset(before[0])
        _warns.reset(before[1])


def read_dtype() -> torch.dtype:
    """The precision in which floats are read here; torch's default dtype outside of `reading`."""
    return _dtype.get() or torch.get_default_dtype()


@contextmanager
def warning_once() -> Iterator[None]:
    """Within this context, for data that are read in pieces, an argument that loses digits gives one warning."""
    before = _told.set(set())
    try:
        yield
    finally:
        _told.reset(before)


def lossy_columns(x: Tensor, dtype: torch.dtype) -> list[int]:
    r"""The columns of float64 or whole numbers that lose digits in another precision.

    A column is lossy if the distance of neighboring numbers at its largest absolute value exceeds a thousandth of its
    standard deviation, and the other precision changes some of its values. A constant column has no digits to lose.

    Args:
        x: The tensor, its columns in the last dimension; a vector is one column.
        dtype: The precision.

    Examples:
        Seconds of a day since 1970 need float64; seconds since midnight do not:

        >>> seconds = torch.linspace(0.0, 86_400.0, 100, dtype=torch.float64)
        >>> lossy_columns(torch.stack([seconds, seconds + 1.7e9], 1), torch.float32)
        [1]
    """
    eps = torch.finfo(dtype).eps
    if x.dtype == torch.bool or (x.is_floating_point() and torch.finfo(x.dtype).eps >= eps):
        return []
    x = x.detach().reshape(-1, x.shape[-1] if x.dim() > 1 else 1)
    changed = (x.to(dtype).to(x.dtype) != x).any(0)
    if not changed.any():
        return []
    columns = x.double()
    exponent = columns.nan_to_num(0.0, 0.0, 0.0).abs().amax(0).frexp().exponent
    spacing = torch.ldexp(torch.full_like(columns[0], eps), exponent - 1)
    sd = (columns - columns.nanmean(0)).square().nanmean(0).sqrt()
    return [int(i) for i in ((sd > 0) & sd.isfinite() & (spacing > _SHARE * sd) & changed).nonzero()[:, 0]]


def in_precision(x: Tensor, label: str, names: Sequence[str] = ()) -> Tensor:
    """A float tensor in the precision of the context, torch's default dtype outside of one; whole numbers in int64.

    Whole numbers stay whole, but a program computes with them as floats, so they give the same warning.

    Args:
        x: The tensor.
        label: Its name in a warning.
        names: The names of its columns, if they have names.
    """
    dtype = read_dtype()
    whole = not (x.is_floating_point() or x.dtype == torch.bool)
    told = _told.get()
    if _warns.get() and label not in (told or ()) and (lossy := lossy_columns(x, dtype)):
        if told is not None:
            told.add(label)
        columns = x.reshape(-1, x.shape[-1] if x.dim() > 1 else 1)
        single = columns.shape[1] == 1
        means = columns.double().nanmean(0)
        parts = [
            (f"{means[i]:.0f}" if whole else f"{means[i]:.6g}")
            + " from "
            + (label if single else f"column {names[i]!r}" if names else f"column {i}")
            for i in lossy[:_MOST_NAMED]
        ]
        more = f" and the means of {len(lossy) - _MOST_NAMED} more columns" if len(lossy) > _MOST_NAMED else ""
        loses = "holds whole numbers that lose digits" if whole else "loses digits"
        warnings.warn(
            f"{label} {loses} in {str(dtype).removeprefix('torch.')}: neighboring numbers there are more than a "
            f"thousandth of a standard deviation apart. Subtract {', '.join(parts)}{more}, or give the program its "
            "parameters in float64.",
            UserWarning,
            stacklevel=2,
        )
    return x.to(torch.int64 if whole else dtype)
