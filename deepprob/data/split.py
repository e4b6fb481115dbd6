"""Split: named tensors that share one leading axis of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from deepprob.errors import unknown

Rows = int | slice | Tensor | np.ndarray | Sequence[int]


class Split:
    """Named tensors that share a leading axis of rows, in order: inputs before targets.

    Args:
        fields: The tensors by name, all with the same number of rows.

    Raises:
        TypeError: If a name is not text or a field is not a tensor.
        ValueError: If there is no field, a field has no axis, or two fields differ in length.

    Examples:
        Rows of all tensors stay together in every operation:

        >>> data = Split({"x": torch.arange(6.0).reshape(3, 2), "y": torch.arange(3)})
        >>> data
        Split(3 rows: x (2,) float32, y () int64)
        >>> x, y = data.rows(slice(1, None))
        >>> x, y
        (tensor([[2., 3.],
                [4., 5.]]), tensor([1, 2]))
    """

    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[str, Tensor]) -> None:
        if not fields:
            raise ValueError("a split needs at least one field; got none. Pass Split({'x': x}).")
        given: Iterable[tuple[object, object]] = fields.items()
        for name, field in given:
            if not isinstance(name, str):
                raise TypeError(f"field names must be text; got {name!r}. Rename it, e.g. 'x'.")
            if not isinstance(field, Tensor):
                kind = type(field).__name__
                raise TypeError(f"{name!r} must be a tensor; got {kind}. Use as_split(data).")
            if field.dim() == 0:
                raise ValueError(f"{name!r} is one number, not rows. Give it a leading axis.")
        lengths = {name: len(field) for name, field in fields.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{name!r} has {rows}" for name, rows in lengths.items())
            raise ValueError(f"all fields must have the same number of rows; {counts}. Pass only the rows they share.")
        self._fields = dict(fields)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the fields, in order."""
        return tuple(self._fields)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The fields, in order."""
        return tuple(self._fields.values())

    @property
    def shape(self) -> torch.Size:
        """The shape of one row of the first field."""
        return self.tensors[0].shape[1:]

    @property
    def device(self) -> torch.device:
        """The device of the first field."""
        return self.tensors[0].device

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._fields:
            raise unknown("field", name, self.names)
        return self._fields[name]

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def rows(self, index: Rows) -> Split:
        """The rows at ``index``: a number, a slice, several numbers or a mask. The axis of rows is kept.

        Examples:
            >>> Split({"x": torch.arange(5)}).rows(-1)["x"]
            tensor([4])
        """
        if isinstance(index, int):
            # A slice would give no rows instead of an error if the row does not exist.
            index = [index]
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device=self.device)
        return Split({name: field[index] for name, field in self._fields.items()})

    def to(self, device: torch.device | str) -> Split:
        """The same rows on another device."""
        return Split({name: field.to(device) for name, field in self._fields.items()})

    def split(self, fraction: float, seed: int = 0) -> tuple[Split, Split]:
        """Split the rows at random into two disjoint parts; rows keep their order.

        Args:
            fraction: The first part's share of the rows, between 0 and 1.
            seed: Random seed of the parts.

        Raises:
            ValueError: If ``fraction`` leaves one part without rows.

        Examples:
            The parts cover all rows:

            >>> first, second = Split({"x": torch.arange(10)}).split(0.8, seed=1)
            >>> torch.cat([first["x"], second["x"]]).sort().values.tolist() == list(range(10))
            True
        """
        size = round(fraction * len(self)) if 0 < fraction < 1 else 0
        if not 0 < size < len(self):
            raise ValueError(
                f"fraction must leave both parts at least one of {len(self)} rows; "
                f"got {fraction}. Choose a value between 0 and 1, e.g. 0.8."
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.rows(order[:size].sort().values), self.rows(order[size:].sort().values)

    def __repr__(self) -> str:
        fields = ", ".join(
            f"{name} {tuple(field.shape[1:])} {str(field.dtype).removeprefix('torch.')}"
            for name, field in self._fields.items()
        )
        return f"Split({len(self)} row{'s' * (len(self) != 1)}: {fields})"
