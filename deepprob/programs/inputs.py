"""Types and shapes of a fit's data, to check later data and to run the program again without data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from deepprob.programs.origin import Origin


@dataclass(frozen=True)
class InputSpec:
    """One argument of a program, as it was in the fit.

    Attributes:
        name: The argument's name.
        shape: Shape of one row.
        dtype: Name of the type, without ``torch.``.
        fill: A value that occurred in the fit, for rows that the program can run on.
        columns: Names of the columns, if the argument was a frame.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    fill: float
    columns: tuple[str, ...] = ()

    def conform(self, value: Tensor, variable_length: bool = False) -> Tensor:
        """Check a later value, and convert it to the type used in the fit.

        Args:
            value: The value.
            variable_length: Whether it holds sequences, whose number of steps is free.

        Raises:
            ValueError: If its rows have another shape, or are not whole numbers where the fit's were.

        Examples:
            >>> InputSpec("x", (2,), "float32", 0.0).conform(torch.tensor([[1, 2]]))
            tensor([[1., 2.]])
        """
        self._check_shape(value, variable_length)
        dtype: torch.dtype = getattr(torch, self.dtype)
        if not dtype.is_floating_point and value.is_floating_point() and bool((wrong := value != value.round()).any()):
            raise ValueError(
                f"{self.name} must be whole numbers as in the fit; got {value[wrong][0].item():g}. "
                "Round them, or fit on such numbers."
            )
        return value.to(dtype)

    def _check_shape(self, value: Tensor, variable_length: bool) -> None:
        came, fitted = tuple(value.shape[1:]), self.shape
        free = int(variable_length and len(came) == len(fitted))
        if came[free:] == fitted[free:] and len(came) == len(fitted):
            return
        if len(came) == len(fitted) == 1:
            raise ValueError(
                f"{self.name} must have {fitted[0]} features per row as in the fit; got {came[0]}. "
                "Give the same columns in the same order."
            )
        hint = (
            f" Reshape one row to x.reshape(1, -1) or one column to x.reshape(-1, {fitted[0]})."
            if not came and fitted
            else ""
        )
        raise ValueError(f"{self.name} must have rows of shape {fitted} as in the fit; got {came}.{hint}")

    def example(self, rows: int) -> Tensor:
        """Some rows that the program can run on."""
        return torch.full((rows, *self.shape), self.fill, dtype=getattr(torch, self.dtype))


def is_sequence(row: Sequence[int]) -> bool:
    """Whether a row of this shape is a sequence ``(T, ...)`` in a program of variable length; a vector is not.

    Examples:
        >>> is_sequence((129, 88)), is_sequence((129,))
        (True, False)
    """
    return len(row) > 1


def specs_of(batch: Sequence[Tensor], names: Sequence[str], origin: Origin | None = None) -> list[InputSpec]:
    """The specification of a batch.

    Args:
        batch: The tensors.
        names: Names of the arguments.
        origin: Facts that the data brought along.

    Examples:
        >>> specs_of([torch.zeros(5, 2)], ["x"], Origin({"x": ("age", "height")}))
        [InputSpec(name='x', shape=(2,), dtype='float32', fill=0.0, columns=('age', 'height'))]
    """
    listed = [names[i] if i < len(names) else f"argument {i + 1}" for i in range(len(batch))]
    return [
        InputSpec(
            name=listed[i],
            shape=tuple(value.shape[1:]),
            dtype=str(value.dtype).removeprefix("torch."),
            fill=float(value.min()),
            columns=(origin or Origin()).columns.get(listed[i], ()),
        )
        for i, value in enumerate(batch)
    ]


def specs_to_json(specs: Sequence[InputSpec]) -> list[dict[str, Any]]:
    """Specifications as JSON; names of columns only where there are some."""
    return [{k: v for k, v in asdict(spec).items() if k != "columns" or v} for spec in specs]


def specs_from_json(rows: Sequence[dict[str, Any]]) -> list[InputSpec]:
    """The inverse of `specs_to_json`."""
    return [
        InputSpec(row["name"], tuple(row["shape"]), row["dtype"], row["fill"], tuple(row.get("columns", ())))
        for row in rows
    ]


def columns_of(specs: Sequence[InputSpec]) -> dict[str, tuple[str, ...]]:
    """The names of columns by argument, of those that were frames."""
    return {spec.name: spec.columns for spec in specs if spec.columns}
