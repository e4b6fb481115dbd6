"""The arguments of a program's call: tensors with rows, and everything else as the user gave it."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from deepprob.data import Split, as_split
from deepprob.data.frames import Columns, frame_of, is_frame, row_as_frame
from deepprob.data.intake import container_of, is_table, tensor_of
from deepprob.errors import counted
from deepprob.programs.origin import Fields, Origin


@dataclass(frozen=True)
class _Row:
    """The place of a tensor with rows in a call."""

    index: int


@dataclass(frozen=True)
class Call:
    """How tensors with rows, and constants, make the arguments of a call.

    Attributes:
        args: The positional arguments, with a mark in the place of every tensor with rows.
        kwargs: The keyword arguments, likewise.
        names: A name for every tensor with rows: its argument, or its place inside of it.
        lengths: The lengths of all tensors by name, if they differ.
        origin: Facts that the data brought along.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]
    lengths: Mapping[str, int] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin, compare=False)

    def fill(self, rows: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for some rows; without rows, None stands in the place of every tensor that has them."""

        def leaf(x: Any) -> Any:
            return (rows[x.index] if rows else None) if isinstance(x, _Row) else x

        return _mapped(self.args, leaf), _mapped(self.kwargs, leaf)

    def takes_as_one(self, data: Any) -> bool:
        """Whether data are one argument, the first of the fit, and not a tuple of arguments."""
        if is_frame(data):
            return bool(self.args)
        if not self.args or not (_is_nested(data) and _is_nested(self.args[0])):
            return False
        return not _is_alike(data, self.args) and _is_alike(data, self.args[0])

    @property
    def constants(self) -> list[Any]:
        """The values that are passed whole, in the order of the call."""
        found: list[Any] = []

        def leaf(x: Any) -> Any:
            if not isinstance(x, _Row):
                found.append(x)
            return x

        _mapped((self.args, self.kwargs), leaf)
        return found

    def without(self, left_out: Collection[int], instead: Mapping[int, Any] | None = None) -> Call:
        """The call with other values, or None, in the place of some tensors with rows, by their indices."""
        kept = [i for i in range(len(self.names)) if i not in left_out]

        def leaf(x: Any) -> Any:
            if not isinstance(x, _Row):
                return x
            return _Row(kept.index(x.index)) if x.index in kept else (instead or {}).get(x.index)

        args, kwargs = _mapped(self.args, leaf), _mapped(self.kwargs, leaf)
        return replace(self, args=args, kwargs=kwargs, names=tuple(self.names[i] for i in kept))

    def to(self, device: torch.device) -> Call:
        """The call with its constant tensors on a device."""

        def leaf(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor | PackedSequence) else x  # type: ignore[arg-type]

        return replace(self, args=_mapped(self.args, leaf), kwargs=_mapped(self.kwargs, leaf))


def call_to_json(call: Call | None) -> dict[str, Any] | None:
    """A call as JSON: of tensors that are passed whole only the type and shape, of other objects nothing."""
    if call is None:
        return None
    return {"args": _to_json(call.args), "kwargs": _to_json(call.kwargs), "names": list(call.names)}


def call_from_json(saved: Mapping[str, Any]) -> Call:
    """The inverse of `call_to_json`."""
    return Call(_from_json(saved["args"]), _from_json(saved["kwargs"]), tuple(saved["names"]))


def _to_json(value: Any) -> dict[str, Any]:
    if isinstance(value, _Row):
        return {"row": value.index}
    if isinstance(value, Mapping):
        return {"dict": [[key if isinstance(key, int) else str(key), _to_json(x)] for key, x in value.items()]}
    if isinstance(value, list | tuple) and not isinstance(value, PackedSequence):
        return {"list" if isinstance(value, list) else "tuple": [_to_json(x) for x in value]}
    if isinstance(value, Tensor):
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    return {"value": value if isinstance(value, bool | int | float | str) else None}


def _from_json(saved: Mapping[str, Any]) -> Any:
    ((kind, value),) = saved.items()
    if kind == "row":
        return _Row(value)
    if kind == "dict":
        return {key: _from_json(x) for key, x in value}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(_from_json(x) for x in value)
    if kind == "tensor":
        dtype: torch.dtype = getattr(torch, value[0])
        return torch.full(value[1], math.nan if dtype.is_floating_point else 0, dtype=dtype)
    return value


class Arguments(Fields):
    """Tensors that share their rows, in the order of a call, and the `Call` that they belong to."""

    call: Call

    def __new__(cls, rows: Sequence[Any], call: Call) -> Arguments:
        made = tuple.__new__(cls, rows)
        made.call, made.origin = call, call.origin
        return made

    def map(self, function: Callable[[Tensor], Tensor]) -> Arguments:
        """The same call with other rows."""
        return Arguments([function(x) for x in self], self.call)

    def without(self, left_out: Collection[int]) -> Arguments:
        """The call without some of its tensors, which are to be predicted."""
        return Arguments([x for i, x in enumerate(self) if i not in left_out], self.call.without(left_out))

    def whole(self, chosen: Collection[int]) -> Arguments:
        """The same call, with some of its tensors passed whole, not by row."""
        call = self.call.without(chosen, dict(enumerate(self)))
        return Arguments([x for i, x in enumerate(self) if i not in chosen], call)


def rows_of(batch: tuple[Any, ...], rows: slice | Tensor) -> tuple[Any, ...]:
    """Some rows of the arguments of a call."""
    return batch.map(lambda x: x[rows]) if isinstance(batch, Arguments) else tuple(x[rows] for x in batch)


def rejoined(rows: tuple[Any, ...], call: Call | None, origin: Origin) -> tuple[Any, ...]:
    """Tensors with the call and the origin that they had when they were accepted."""
    return Fields(rows, origin) if call is None else Arguments(rows, replace(call, origin=origin))


def read_arguments(
    data: Any,
    signature: inspect.Signature,
    *,
    what: str = "data",
    fitted: Sequence[str] = (),
    missing: bool = False,
    origin: Origin | None = None,
) -> Arguments:
    """Read a user's data as the arguments of a call.

    A tuple holds positional arguments. A dict holds keyword arguments if its keys are names of parameters, and is one
    argument otherwise. So does a frame whose columns are named after parameters, all of its columns or all required
    parameters. A `Split`, and what `as_split` reads as one, holds one argument a field: by name where the names are
    those of parameters, else in order. Arrays and frames become tensors; bools and whole numbers keep their type.

    Args:
        data: The data; None for a call without arguments.
        signature: The model's signature.
        what: The name of the data in error messages.
        fitted: The names of the tensors with rows in the fit. Without them, tensors have rows if they have the length
            that most tensors have, and the first one's if that is not clear.
        missing: Whether values may be missing (NaN).
        origin: Facts that the data of the fit brought along.

    Raises:
        TypeError: If the model cannot be called in this way.
        ValueError: If a value is not valid data.
    """
    frames = Columns((origin or Origin()).columns)
    args, kwargs = _split_up(data, signature, what, missing, frames, fitted)
    arguments = [*zip(_positional_names(signature, len(args)), args, strict=False), *kwargs.items()]
    leaves = dict(leaf for name, value in arguments for leaf in _leaves(name, value))
    tensors = {name: x for name, x in leaves.items() if isinstance(x, Tensor) and x.dim()}
    if any(name in fitted for name in tensors):
        chosen = [name for name in tensors if name in fitted]
        if len({len(tensors[name]) for name in chosen}) > 1:
            counts = ", ".join(f"{name!r} has {len(tensors[name])}" for name in chosen)
            raise ValueError(
                f"{what}: all fields must have the same number of rows; {counts}. Pass only the rows they share."
            )
    else:
        length = _common_length(list(tensors.values()))
        chosen = [name for name, x in tensors.items() if len(x) == length]
    places = {id(tensors[name]): _Row(i) for i, name in enumerate(chosen)}

    def leaf(x: Any) -> Any:
        return places.get(id(x), x)

    lengths = {name: len(x) for name, x in tensors.items()}
    call = Call(
        _mapped(args, leaf),
        _mapped(kwargs, leaf),
        tuple(chosen),
        lengths if len({*lengths.values()}) > 1 else {},
        Origin(frames.found).of(data, chosen),
    )
    return Arguments([tensors[name] for name in chosen], call)


@contextmanager
def explaining_lengths(call: Call | None) -> Iterator[None]:
    """Add the lengths of the arguments to an error about shapes, if they differ."""
    try:
        yield
    except ValueError as error:
        if call is None or not call.lengths:
            raise
        counts = ", ".join(f"{name!r} has {length}" for name, length in call.lengths.items())
        raise ValueError(
            f"{error} If these are fields of one table: all fields must have the same number of rows; {counts}."
        ) from error


def _common_length(tensors: Sequence[Tensor]) -> int:
    lengths = [len(x) for x in tensors]
    return max(lengths, key=lengths.count, default=0)  # the first of the most frequent


def _split_up(
    data: Any, signature: inspect.Signature, what: str, missing: bool, frames: Columns, fitted: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that data stand for, with tensors in the place of arrays."""
    if data is None:
        return (), {}
    data = container_of(data, what)
    parameters = signature.parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if fitted and named:
        data = row_as_frame(data, named)
    if is_frame(data):
        data, required = frame_of(data), _required(signature)
        # After a fit by column, a column that is lacking is to be predicted.
        needed = [name for name in required if name in data] if fitted and not frames.fitted else required
        data = _by_column(data, named, needed)
    if isinstance(data, Mapping) and (set(data) <= {*named} or _takes_keywords(signature)):
        return (), {n: _converted(value, n, what, missing, frames) for n, value in _in_order(data, named)}
    if isinstance(data, Mapping) and {*data} & {*named}:
        raise ValueError(
            f"the model takes {', '.join(named)}; {what} has the fields {', '.join(map(str, data))}. "
            "Name every field after its argument, or give a tuple in the model's order."
        )
    if type(data) is tuple:
        names = _positional_names(signature, len(data))
        args = tuple(_converted(x, name, what, missing, frames) for name, x in zip(names, data, strict=True))
    elif isinstance(data, Mapping) or is_table(data) or isinstance(data, PackedSequence):
        args = (_converted(data, _positional_names(signature, 1)[0], what, missing, frames),)
    else:  # splits, data sets, loaders, lists
        split = data if isinstance(data, Split) else as_split(data, what=what, missing=missing)
        read = {name: _converted(x, name, what, missing, frames) for name, x in zip(split.names, split, strict=True)}
        if {*split.names} & {*named}:
            return (), {name: x for name, x in _in_order(read, named) if name in named}
        args = tuple(read.values())
        if isinstance(data, Split) and not _takes_any(signature):
            args = args[: len(_positional_names(signature, 0))]
    _check_count(args, signature, what)
    return args, {}


def _by_column(frame: Any, named: Sequence[str], required: Sequence[str]) -> Any:
    """The columns of a frame by argument, if their names tell; otherwise the frame, which is one argument."""
    taken = {name: frame[name] for name in named if name in frame}
    all_taken = len(taken) == frame.shape[1] > 0
    return taken if all_taken or (required and {*required} <= {*taken}) else frame


def _in_order(data: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, Any]]:
    """The items of a dict in the order of the parameters."""
    known = [(name, data[name]) for name in names if name in data]
    return known + [(name, value) for name, value in data.items() if name not in names]


def _check_count(args: Sequence[Any], signature: inspect.Signature, what: str) -> None:
    names = _positional_names(signature, 0)
    if len(args) > len(names) and not _takes_any(signature):
        known = f" ({', '.join(names)})" if names else ""
        raise ValueError(
            f"the model takes {counted(len(names), 'argument')}{known}; {what} has {counted(len(args), 'part')}. "
            "Leave out what the model does not use, or give a dict by argument; one argument of numbers is a list."
        )


def _positional_names(signature: inspect.Signature, count: int) -> list[str]:
    """The names of the positional parameters, and at least ``count`` names."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in signature.parameters.values() if p.kind in kinds]
    more = [f"argument {i + 1}" for i in range(len(names), count)]
    return [*names, *more][: count or None]


def _takes_any(signature: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())


def _takes_keywords(signature: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def signature_of(model: Callable[..., Any]) -> inspect.Signature:
    """The signature of a model; Pyro's handlers wrap a model so that it is lost."""
    while isinstance(model, functools.partial) and model.args and isinstance(model.args[0], Messenger):
        model = model.args[1]
    return inspect.signature(model)


def missing(args: Sequence[Any], kwargs: Mapping[str, Any], signature: inspect.Signature) -> list[str]:
    """Names of the parameters without a default that a call does not give."""
    positional = _positional_names(signature, 0)
    given = {*positional[: len(args)], *kwargs}
    return [name for name in _required(signature) if name not in given]


def _required(signature: inspect.Signature) -> list[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind not in kinds]


def _converted(value: Any, name: str, what: str, missing: bool, frames: Columns) -> Any:
    """An argument with tensors in the place of arrays, frames and lists of numbers; anything else as it is."""
    label = f"{name!r} of {what}"
    if isinstance(value, PackedSequence) or (isinstance(value, Tensor) and not value.dim()):
        return value
    if is_table(value):
        return tensor_of(frames.read(name, value), label, missing)
    if isinstance(value, list | tuple | dict):
        places = {id(x): place for place, x in _leaves(name, value) if is_frame(x)}

        def leaf(x: Any) -> Any:
            x = frames.read(places[id(x)], x) if id(x) in places else x
            return tensor_of(x, label, missing) if is_table(x) and getattr(x, "ndim", True) else x

        return _mapped(value, leaf)
    return value


def _mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """A copy of nested tuples, lists and dicts, with every leaf replaced."""
    if isinstance(value, PackedSequence):
        return leaf(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(x, leaf) for x in value))
    if isinstance(value, list | tuple):
        return type(value)(_mapped(x, leaf) for x in value)
    if isinstance(value, Mapping):
        return {key: _mapped(x, leaf) for key, x in value.items()}
    return leaf(value)


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | tuple) and not isinstance(value, PackedSequence)


def _is_alike(value: Any, fitted: Any) -> bool:
    """Whether a value is nested as one of the fit, as far as both have parts."""
    if value is None or not _is_nested(fitted):
        return value is None or not isinstance(value, tuple) or isinstance(value, PackedSequence)
    parts = isinstance(value, list) == isinstance(fitted, list) and _is_nested(value)
    return parts and all(_is_alike(*pair) for pair in zip(value, fitted, strict=False))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of an argument, each with its name: the argument's, and its place inside of it."""
    if isinstance(value, PackedSequence) or not isinstance(value, list | tuple | Mapping):
        yield name, value
        return
    for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from _leaves(f"{name}[{key}]", part)
