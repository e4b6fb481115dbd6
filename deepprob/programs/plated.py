"""The plate over a program's rows, the arguments that have these rows, and the rows that it currently holds."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn

from deepprob.networks.dropout import activate_dropout
from deepprob.programs.arguments import Call, missing
from deepprob.programs.inputs import is_sequence
from deepprob.programs.minibatch import BoundRows, RowWeights, num_rows


class Plated(PyroModule):
    """A module with a model and a plate over the rows of its arguments; see `Program` for its attributes.

    With ``active_dropout`` its dropout is always active, and all else in evaluation mode.
    """

    data_name: str = "data"
    call: Call | None = None
    found_plate: str = ""
    variable_length: bool = False
    active_dropout: bool = False
    model: Any

    def train(self, mode: bool = True) -> Any:
        """Set the mode."""
        super().train(mode)
        return self.at_rest()

    def at_rest(self, *parts: nn.Module) -> Any:
        """The program, with some parts in evaluation mode, except for active dropout."""
        for part in parts:
            part.eval()
        if self.active_dropout:
            activate_dropout(self)
        return self

    def data_plate(self, *batch: Any) -> pyro.plate:
        """The plate over rows: ``pyro.plate("data", num_data)``, with the rows of the current batch.

        Args:
            batch: The program's arguments; outside of a routine the first tensor gives the number of rows.
        """
        size = self.bound_rows.num_data if self.bound_rows.num_data is not None else num_rows(batch)
        return pyro.plate(self.data_name, size, dim=-1)

    @contextmanager
    def bound(
        self,
        rows: Tensor,
        num_data: int,
        query: str | None = None,
        call: Call | None = None,
        weights: RowWeights | None = None,
    ) -> Iterator[None]:
        """Within this context the data plate has ``num_data`` rows, of which the batch holds ``rows``.

        Args:
            rows: Indices of the batch's rows, shape ``(B,)``.
            num_data: Number of rows of the whole data, N.
            query: In a query, the plate that holds the rows, empty for none; every plate then has all of its rows.
            call: How the batch makes the arguments; None for the call of the fit.
            weights: Weights of the batch's rows in the log-likelihood; None for 1 each.
        """
        fitted, plate = self.call, self.data_name if query is None else query
        self.__dict__["call"] = call or fitted
        try:
            with self.bound_rows.to(plate, rows, num_data, query is not None, weights):
                yield
        finally:
            self.__dict__["call"] = fitted

    @property
    def bound_rows(self) -> BoundRows:
        """The rows that the data plate currently holds."""
        found: BoundRows = self.__dict__.setdefault("_bound_rows", BoundRows(self.data_name))
        return found

    @property
    def row_plate(self) -> str:
        """The plate over rows: the data plate, or the one that a first run showed; empty if there is none."""
        return self.data_name or self.found_plate

    @property
    def argument_names(self) -> list[str]:
        """Names of the model's arguments, in order."""
        parameters = self._signature().parameters.values()
        return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

    @property
    def num_required(self) -> int:
        """How many of the model's arguments have no default."""
        return len(missing((), {}, self._signature()))

    @property
    def takes_any(self) -> bool:
        """Whether the model takes any number of arguments."""
        return any(p.kind is p.VAR_POSITIONAL for p in self._signature().parameters.values())

    def _signature(self) -> inspect.Signature:
        return inspect.signature(self.model)

    @property
    def row_names(self) -> Sequence[str]:
        """Names of the tensors of a batch, in order."""
        return self.call.names if self.call else self.argument_names

    def is_sequence(self, name: str, row: Sequence[int]) -> bool:
        """Whether an argument with rows of a shape holds sequences, whose number of steps is free."""
        return self.variable_length and is_sequence(row)

    def sequences_in(self, batch: Sequence[Tensor]) -> list[bool]:
        """Whether each tensor of a batch holds sequences."""
        names = [*self.row_names, *([""] * len(batch))]
        return [self.is_sequence(name, x.shape[1:]) for name, x in zip(names, batch, strict=False)]
