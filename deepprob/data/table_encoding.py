"""`Table` and `TableEncoding`: rows of a frame as tensors, and the record that encodes other frames alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepprob.data.column_encoding import ColumnEncoding, as_numbers, text_of
from deepprob.data.frames import arranged, check_order, is_frame, missing_column, named
from deepprob.data.precision import lossy_columns
from deepprob.data.split import Rows, Split
from deepprob.errors import counted, unknown

_MOST_SHOWN = 5


class Table(Split):
    """The rows of a frame as tensors: features ``x`` and, with a target, ``y``; made by `deepprob.table`.

    Attributes:
        encoding: How columns became features, for later frames.
        weights: Weights of the rows in the log-likelihood, ``(N,)``; None for 1 each.
        index: The frame's index.
    """

    __slots__ = ("encoding", "index", "weights")

    def __init__(
        self, fields: Mapping[str, Tensor], encoding: TableEncoding, index: Any = None, weights: Tensor | None = None
    ) -> None:
        super().__init__(fields)
        self.encoding, self.index, self.weights = encoding, index, weights

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The names of the columns of ``x``, such as ``age`` or ``species=Adelie``."""
        return self.encoding.names

    def __repr__(self) -> str:
        shown = super().__repr__().removeprefix("Split").removesuffix(")")
        if (classes := self.encoding.classes) and "y" in self:
            names = ", ".join(classes[:_MOST_SHOWN]) + (", ..." if len(classes) > _MOST_SHOWN else "")
            shown += f", {len(classes)} classes of {self.encoding.targets[0]!r}: {names}"
        return f"Table{shown})"

    def rows(self, index: Rows) -> Table:
        part, kept = super().rows(index), Split({"row": torch.arange(len(self))}).rows(index)["row"]
        weights = None if self.weights is None else self.weights[kept.to(self.weights.device)]
        rows = None if self.index is None else self.index[kept.numpy()]
        return Table(dict(zip(part.names, part.tensors, strict=True)), self.encoding, rows, weights)

    def to(self, device: torch.device | str) -> Table:
        moved = super().to(device)
        weights = None if self.weights is None else self.weights.to(device)
        return Table(dict(zip(moved.names, moved.tensors, strict=True)), self.encoding, self.index, weights)


@dataclass(frozen=True)
class TargetEncoding:
    """How the columns of a target become ``y``: numbers in their own units, or class numbers.

    Attributes:
        names: The names of the columns.
        classes: The names of the classes, by number; empty for numbers.
        ordered: Whether the classes have an order beyond that of the alphabet, as numbers and ordered categories have.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...] = ()
    ordered: bool = False

    def encode(self, frame: Any) -> Tensor | None:
        """The target, ``(N,)``, or ``(N, K)`` for K columns; None if the frame lacks it or holds none of its values.

        Args:
            frame: A pandas frame.

        Raises:
            ValueError: If some rows have no value, a class is unknown, or a value is not a number.
        """
        known = [name for name in self.names if name in frame and frame[name].notna().any()]
        if not known:
            return None
        if lacking := [name for name in self.names if name not in frame]:
            raise missing_column("the frame", lacking, [*frame.columns])
        if count := int(frame[[*self.names]].isna().any(axis=1).sum()):
            listed = ", ".join(map(repr, self.names))
            raise ValueError(
                f"the target {listed} is missing in {counted(count, 'row')} of {len(frame)}. Drop them: "
                f"frame.dropna(subset=[{listed}])."
            )
        if self.classes:
            return self._numbers_of_classes(frame[self.names[0]])
        columns = [frame[name] for name in self.names]
        if all(column.dtype.kind in "iu" for column in columns):
            values = torch.from_numpy(np.stack([column.to_numpy(np.int64) for column in columns], 1))
        else:
            values = torch.from_numpy(np.stack([as_numbers(column, "numeric") for column in columns], 1))
            default = torch.get_default_dtype()
            for name, column in zip(self.names, values.T, strict=True):
                if (largest := column.abs().max()) > torch.finfo(default).max:
                    raise ValueError(
                        f"the target {name!r} has values up to {largest:.3g}, beyond those of "
                        f"{str(default).removeprefix('torch.')}. Divide it, or take its logarithm."
                    )
            # A program in float64 reads such a target as it is; any other program warns when it does.
            values = values if lossy_columns(values, default) else values.to(default)
        return values[:, 0] if len(columns) == 1 else values

    def _numbers_of_classes(self, column: Any) -> Tensor:
        places = {name: i for i, name in enumerate(self.classes)}
        values = [text_of(x) for x in column]
        for value in values:
            if value not in places:
                raise unknown(f"class of {self.names[0]!r}", value, self.classes)
        return torch.tensor([places[value] for value in values])


@dataclass(frozen=True)
class TableEncoding:
    """How a frame becomes a `Table`: the fitted numbers and names of every column, without code.

    Attributes:
        columns: The encodings of the columns that are features.
        target: The encoding of the target; None for a table without one.
        weights: The name of the column of row weights, if there is one.
        class_weights: The weight of every class; empty for 1 each.
        unnamed: Whether the columns were those of an array, so that later arrays hold them in this order.
    """

    columns: tuple[ColumnEncoding, ...]
    target: TargetEncoding | None = None
    weights: str | None = None
    class_weights: tuple[float, ...] = ()
    unnamed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the features, in the order of the columns of ``x``."""
        return tuple(name for column in self.columns for name in column.names)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The names of the frame's columns that become features."""
        return tuple(column.name for column in self.columns)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by number; empty if the target is not a class."""
        return self.target.classes if self.target else ()

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the target's columns; empty without a target."""
        return self.target.names if self.target else ()

    def encode(self, frame: Any) -> Table:
        """A frame as a table; columns follow their names, and further ones are ignored.

        Args:
            frame: A frame of pandas or polars, with the columns of the fit. The target may be left out.

        Raises:
            ValueError: If a column is missing, or does not hold values of the fit's kind.
        """
        frame, wanted = named(frame), self.wanted
        if lacking := [name for name in wanted if name not in frame]:
            used = {*wanted, *self.targets, self.weights}
            raise missing_column("the frame", lacking, [name for name in frame.columns if name not in used])
        twice = [name for name in (*wanted, *self.targets) if [*frame.columns].count(name) > 1]
        if twice:
            raise ValueError(f"the frame has several columns {twice[0]!r}. Rename or drop all but one.")
        parts = [column.encode(frame[column.name]) for column in self.columns]
        features = torch.from_numpy(np.concatenate(parts, 1)).to(torch.get_default_dtype())
        y = self.target.encode(frame) if self.target else None
        fields = {"x": features} if y is None else {"x": features, "y": y}
        return Table(fields, self, frame.index, self._weights(frame, y))

    def framed(self, rows: Any) -> Any:
        """An array of the columns of an unnamed fit as a frame; anything else as it is.

        Args:
            rows: The rows of a user.
        """
        if not self.unnamed or is_frame(rows) or getattr(rows, "ndim", 0) != 2:
            return rows
        import pandas as pd

        values = np.asarray(rows.detach().cpu() if hasattr(rows, "detach") else rows)
        return pd.DataFrame(values, columns=unnamed_columns(values.shape[1]))

    def joined(self, frame: Any, target: Any) -> Any:
        """A frame of features with its target, which comes apart from it.

        Args:
            frame: A frame of pandas or polars.
            target: The target: a frame with its columns, or values, row by row.

        Raises:
            ValueError: If the target lacks a column, or has another shape or another order of rows.
        """
        frame = named(frame)
        check_order(target, frame.index, "the values of the target")
        if is_frame(target):
            target = arranged(target, self.targets, "the target")
        elif hasattr(target, "detach"):
            target = target.detach().cpu()
        values = np.asarray(target)
        values = values[:, None] if values.ndim == 1 else values
        if values.shape != (expected := (len(frame), len(self.targets))):
            raise ValueError(
                f"the target must have shape {expected}, its {counted(expected[1], 'column')} beside the "
                f"{counted(expected[0], 'row')} of the frame; got {np.shape(target)}. Give one value for each row."
            )
        return frame.assign(**{name: values[:, i] for i, name in enumerate(self.targets)})

    def _weights(self, frame: Any, y: Tensor | None) -> Tensor | None:
        found = None
        if self.weights and self.weights in frame:
            found = checked_weights(as_numbers(frame[self.weights], "numeric"), f"the column {self.weights!r}")
        if self.class_weights and y is not None:
            own = torch.tensor(self.class_weights)[y]
            found = own if found is None else found * own
        return found

    def agrees(self, other: TableEncoding) -> bool:
        """Whether another encoding makes the same numbers of a frame, as far as this one makes them.

        Args:
            other: The other encoding, which may have a target that this one leaves out.
        """
        return self == (other if self.target else replace(other, target=None))

    def to_json(self) -> dict[str, Any]:
        """The encoding as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> TableEncoding:
        """The inverse of `to_json`."""
        target = saved["target"]
        return cls(
            tuple(ColumnEncoding(**_tuples(column)) for column in saved["columns"]),
            None if target is None else TargetEncoding(**_tuples(target)),
            saved["weights"],
            tuple(saved["class_weights"]),
            saved.get("unnamed", False),
        )


def unnamed_columns(count: int) -> list[str]:
    """The names of the columns of an array.

    Args:
        count: Number of columns.
    """
    return [f"x{i}" for i in range(count)]


def checked_weights(values: NDArray[np.float64], label: str) -> Tensor:
    """Weights of rows as a tensor.

    Args:
        values: The weights, ``(N,)``.
        label: Their name in error messages.

    Raises:
        ValueError: If a weight is negative or not finite, or all are 0.
    """
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"{label} must hold finite weights of at least 0; got {values[row]:g} in row {row}. Correct these rows."
        )
    if not values.any():
        raise ValueError(f"{label} has weight 0 in every row, so nothing is left to fit. Give some rows a weight.")
    return torch.tensor(values, dtype=torch.get_default_dtype())


def _tuples(saved: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
