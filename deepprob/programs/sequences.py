"""The sequences among the arguments of a model, and the argument that holds their lengths."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepprob.data.intake import container_of, tensor_of
from deepprob.data.padding import checked_lengths, padded_sequences
from deepprob.errors import shown, unknown
from deepprob.programs.arguments import Arguments
from deepprob.programs.inputs import is_sequence


@dataclass(frozen=True)
class SequenceArguments:
    """Which arguments of a model are sequences of unequal length.

    Attributes:
        names: Names of the arguments that are sequences; empty for every one of shape ``(N, T, ...)``.
        lengths: Name of the argument that holds the lengths.
    """

    names: tuple[str, ...]
    lengths: str

    @classmethod
    def of(cls, variable_length: Any, lengths: str, signature: inspect.Signature) -> SequenceArguments | None:
        """From the arguments of `Program.of`; None for a program without sequences.

        Raises:
            TypeError: If ``variable_length`` is neither a bool nor names.
            ValueError: If the model has no such argument.
        """
        if isinstance(variable_length, bool):
            names: tuple[str, ...] = ()
        elif isinstance(variable_length, list | tuple) and all(isinstance(name, str) for name in variable_length):
            names = tuple(variable_length)
        else:
            raise TypeError(
                "variable_length must be True, or a list of the arguments that are sequences; got "
                f"{shown(variable_length)}. Write variable_length=['x']."
            )
        if not (names or variable_length):
            return None
        for name in (*names, *([] if lengths == "lengths" else [lengths])):
            if name not in signature.parameters:
                raise unknown("argument of the model", name, signature.parameters)
        return cls(names, lengths)

    def has(self, name: str, row: Sequence[int]) -> bool:
        """Whether an argument with rows of some shape holds sequences."""
        return len(row) > 0 and name in self.names if self.names else is_sequence(row)

    def read(self, data: Any, names: Sequence[str], what: str, missing: bool) -> Any:
        """Data with padded tensors and lengths in the place of lists of series."""

        def read(series: Any, label: str) -> Any:
            return tensor_of(series, f"{label} of {what}", missing)

        names, data = names or ("x", "lengths"), container_of(data, what)
        found = padded_sequences(data, read, certain=True, names=names, lengths=self.lengths, flat=self.names)
        if found is data or isinstance(data, Mapping):
            return found
        first = [name for name in names if name in found]  # a guide may have other names: positions, not keywords
        return tuple(found[name] for name in first) if first == [*names[: len(found)]] else found

    def checked(self, arguments: Arguments) -> Arguments:
        """The arguments, with whole lengths that fit the sequences."""
        named = dict(zip(arguments.call.names, arguments, strict=True))
        if self.lengths not in named:
            return arguments
        x = next(((name, x) for name, x in named.items() if self.has(name, x.shape[1:])), None)
        if x is None:
            return arguments
        named[self.lengths] = checked_lengths(named[self.lengths], x[1], self.lengths, x[0])
        return Arguments(list(named.values()), arguments.call)
