"""Facts that data bring along beside their tensors: the names of columns, weights of rows, the encoding of a table."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import numpy as np
from torch import Tensor

from deepprob.data import DataSet, Sequences, Table, TableEncoding
from deepprob.data.frames import column_names, is_frame, named, row_as_frame
from deepprob.data.precision import reading
from deepprob.programs.held_precision import held_precision

_Accept = TypeVar("_Accept", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class Origin:
    """Facts about a batch that its tensors do not hold; a fitted program keeps those of its fit.

    Attributes:
        columns: Names of the columns of arguments that were frames, by argument.
        encoding: How a frame becomes a table; None if the data were no table.
        classes: The names of the classes of the target, by number, of data that are no table; empty if it has none.
        weights: Weights of the rows in the log-likelihood, ``(N,)``; None for 1 each.
        fitted: Whether these are the facts of a finished fit, which has given its warnings.
    """

    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    encoding: TableEncoding | None = None
    classes: tuple[str, ...] = ()
    weights: Tensor | None = None
    fitted: bool = False

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes of the target, by number; empty if it has none."""
        return self.classes if self.encoding is None else self.encoding.classes

    @classmethod
    def of_source(cls, data: Any) -> Origin:
        """What a program that is made for data keeps of them: the encoding of a table, the classes of a data set.

        Args:
            data: A table, a data set, or any other data, of which nothing is kept.
        """
        if isinstance(data, DataSet):
            if not isinstance(data.train, Table):
                return cls(classes=tuple(map(str, data.extras.get("class_names", ()))))
            data = data.train
        return cls(encoding=data.encoding if isinstance(data, Table) else None)

    def read(self, data: Any) -> Any:
        """A frame, alone or with its target, as the table that the encoding makes of it; any other data as they are.

        Args:
            data: A user's data.

        Raises:
            ValueError: If data are a table of another encoding, or sequences with other features than the fit.
        """
        if isinstance(data, Sequences) and len(self.columns) == 1:
            data.check_features(*self.columns.values())
        if self.encoding is None:
            return data
        if (frame := _one_frame(data, self.encoding)) is not None:
            weights = self.encoding.weights
            if weights and weights not in named(frame) and not self.fitted:
                warnings.warn(
                    f"the frame lacks the column of weights {weights!r}: every row counts once.",
                    UserWarning,
                    stacklevel=2,
                )
            return self.encoding.encode(frame)
        if isinstance(data, Table) and not self.encoding.agrees(data.encoding):
            raise ValueError(
                "the table was encoded by its own means and levels, not by those of the fit. Give the frame itself, or "
                "encode it alike: table.encoding.encode(frame), with the table of the fit."
            )
        if any(isinstance(part, np.ndarray) for part in _parts(data)[:1]):
            warnings.warn(
                "the fit was of a table, and an array has no columns to encode: its numbers are taken as features that "
                "are encoded already. Give the frame.",
                UserWarning,
                stacklevel=2,
            )
        return data

    def inputs(self, data: Any) -> Any:
        """Data for a query that does not need the target: a frame without targets that cannot be read, or weights.

        Args:
            data: A user's data.
        """
        if self.encoding is None or (frame := _one_frame(data, self.encoding)) is None:
            return data
        frame, unneeded = named(frame), [self.encoding.weights]
        try:
            if self.encoding.target:
                self.encoding.target.encode(frame)
        except ValueError:
            unneeded += self.encoding.targets
        return frame.drop(columns=[name for name in unneeded if name in frame])

    def after_fit(self, batch: Sequence[Any], columns: Mapping[str, tuple[str, ...]]) -> Origin:
        """What a fitted program keeps.

        Args:
            batch: The arguments of the fit.
            columns: Names of the columns of arguments that were frames, by argument.
        """
        encoding = origin_of(batch).encoding or self.encoding
        if encoding and not encoding.class_weights and len(batch) == 1 and [*columns.values()] == [encoding.names]:
            encoding = replace(encoding, target=None)  # the program does not read it, so later frames need none
        return replace(self, columns=columns, encoding=encoding, weights=None, fitted=True)

    def of(self, data: Any, names: Sequence[str]) -> Origin:
        """The origin of arguments that were read.

        Args:
            data: The user's data, a frame as its table.
            names: The names of the arguments.
        """
        if isinstance(data, Sequences):
            return replace(self, columns={"x" if "x" in names else names[0]: tuple(map(str, data.columns))})
        if not isinstance(data, Table):
            return self
        own = {"x": data.encoding.names} | ({"y": data.encoding.targets} if len(data.encoding.targets) > 1 else {})
        fields = {
            name if name in names else names[i]: own[name]
            for i, name in enumerate(data.names[: len(names)])
            if name in own
        }
        return replace(self, columns={**self.columns, **fields}, encoding=data.encoding, weights=data.weights)


def _parts(data: Any) -> list[Any]:
    return [*data.values()] if isinstance(data, Mapping) else [*data] if isinstance(data, tuple) else [data]


def _one_frame(data: Any, encoding: TableEncoding) -> Any:
    """The frame, or the row of one, that data consist of, with the target beside it; None for other data."""
    first, *others = _parts(data)
    parts = [encoding.framed(first), *others]
    frames = [row_as_frame(part, () if len(parts) == 1 else encoding.wanted) for part in parts]
    if len(parts) == 1:
        return frames[0] if is_frame(frames[0]) else None
    place = next((i for i, part in enumerate(frames) if is_frame(part) and not _is_target(part, encoding)), None)
    if place is None or len(parts) > 1 + bool(encoding.target):
        return None
    return encoding.joined(frames[place], parts[1 - place])


def _is_target(frame: Any, encoding: TableEncoding) -> bool:
    """Whether a frame holds the target alone."""
    return {*column_names(frame)}.isdisjoint(encoding.wanted) and not {*column_names(frame)}.isdisjoint(
        encoding.targets
    )


class Fields(tuple[Any, ...]):
    """Tensors that share their rows, in the order of a program's arguments, and their origin."""

    origin: Origin

    def __new__(cls, rows: Sequence[Any], origin: Origin) -> Fields:
        made = super().__new__(cls, rows)
        made.origin = origin
        return made


def origin_of(batch: Sequence[Any]) -> Origin:
    """The origin of a batch; of plain tensors nothing is known."""
    found: Origin = getattr(batch, "origin", Origin())
    return found


def in_own_precision(accept: _Accept) -> _Accept:
    """A method of a program that reads data, in the precision of the program: float64 if it holds float64 alone."""

    @functools.wraps(accept)
    def call(self: Any, data: Any, **options: Any) -> Any:
        functions = tuple(self.__dict__.get(f"_{name}", getattr(self, name)) for name in ("model", "guide"))
        with reading(held_precision(self, functions), warn=not self.origin.fitted):
            return accept(self, data, **options)

    return cast(_Accept, call)


def origin_to_json(origin: Origin) -> dict[str, Any]:
    """What a saved posterior keeps of the origin of its data, beside the names of columns, as JSON."""
    encoding = origin.encoding.to_json() if origin.encoding else None
    return {"encoding": encoding, **({"classes": list(origin.classes)} if origin.classes else {})}


def origin_from_json(saved: Mapping[str, Any] | None, columns: Mapping[str, tuple[str, ...]]) -> Origin:
    """The inverse of `origin_to_json`; a folder of an earlier version has no entry."""
    encoding, classes = (saved or {}).get("encoding"), tuple((saved or {}).get("classes", ()))
    return Origin(columns, TableEncoding.from_json(encoding) if encoding else None, classes, fitted=True)


def check_weighted(program: Any, found: Any) -> None:
    """Refuse weights of rows, if there are any, where the program does not tell which sites belong to a row.

    Args:
        program: The program.
        found: Its structure.

    Raises:
        ValueError: If it names no plate over rows, observes values outside of it, or has a guide that is one
            distribution over the latents of all rows.
    """
    if program.bound_rows.weights is None:
        return
    if not program.data_name:
        raise ValueError(
            "weights of rows need the name of the plate over rows, whose sites they scale. Write "
            "Program.of(model, guide, data_plate='...')."
        )
    if outside := [name for name in found.observed if not found.all_local((name,))]:
        raise ValueError(
            f"site {outside[0]!r} observes values outside of plate {program.data_name!r}, so weights of rows cannot "
            "scale them. Put it inside of the plate."
        )
    if found.local and not found.by_row:
        raise ValueError(
            "the guide is one distribution over the latents of all rows, so rows cannot have weights of their own. Use "
            "guide='normal', or an amortized guide."
        )
