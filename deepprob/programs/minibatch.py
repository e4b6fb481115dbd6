"""The rows of a batch, and the handler that passes them to the data plate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor

Batch = tuple[Any, ...]


@dataclass
class BoundRows:
    """The rows of the data that a batch holds.

    Attributes:
        plate: Name of the data plate.
        rows: Indices of the batch's rows, shape ``(B,)``; None outside of a run.
        num_data: Number of rows of the whole data, N.
    """

    plate: str
    rows: Tensor | None = None
    num_data: int | None = None


class Minibatch(Messenger):
    """A handler that passes a batch's rows to the data plate.

    Pyro requests the indices of every plate in a message, and this handler answers for the data plate, in the model
    and in the guide alike. The plate's scale is then ``num_data / len(rows)``, and parameters of a row belong to the
    row rather than to its position in the batch.

    Args:
        plate: Name of the data plate.
        rows: Indices of the batch's rows, shape ``(B,)``.
        num_data: Number of rows of the whole data, N.
    """

    def __init__(self, plate: str, rows: Tensor, num_data: int) -> None:
        super().__init__()
        self.plate, self.rows, self.num_data = plate, rows, num_data

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.plate and type(msg["fn"]).__name__ == "_Subsample":
            # A plate of the batch's own length, plate("data", len(x)), already has all its rows.
            size = msg["fn"].size
            if msg["value"] is None and (size == self.num_data or size != len(self.rows)):
                msg["value"] = self.rows
            return
        for frame in msg["cond_indep_stack"]:
            if frame.name == self.plate and frame.size == len(self.rows):
                # Pyro scales by full_size / size, which is right for plate("data", N), not for plate("data", len(x)).
                pyros, ours = (frame.full_size or frame.size) / frame.size, self.num_data / len(self.rows)
                if pyros != ours:
                    msg["scale"] = msg["scale"] * (ours / pyros)

    def _pyro_param(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            other_data = frame.name == self.plate and frame.full_size not in (None, self.num_data, frame.size)
            if other_data and msg["kwargs"].get("event_dim") is not None:
                raise ValueError(unknown_rows_message(self.plate, frame.full_size, len(self.rows)))


def unknown_rows_message(plate: str, fitted: int, came: int) -> str:
    """The message for rows that a guide has no parameters for."""
    return (
        f"the guide keeps parameters for every row of plate {plate!r}, {fitted} in the fit; got {came} rows. "
        "Give those rows, or use an amortized guide."
    )


def run_bound(bound: BoundRows, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a model or guide on the bound rows, even if the program blocks outer handlers."""
    if bound.rows is None or bound.num_data is None:
        return call_sampling(fn, *args, **kwargs)
    with Minibatch(bound.plate, bound.rows, bound.num_data):
        return call_sampling(fn, *args, **kwargs)


def call_sampling(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a model or guide so that a ``PyroSample`` attribute read in it is a sample statement.

    Pyro does so only in ``forward`` and in methods marked ``pyro_method``; anywhere else the attribute is a draw from
    the prior that no handler sees.
    """
    owner = getattr(fn, "__self__", None)
    if not isinstance(owner, PyroModule) or not any(m.__dict__.get("_pyro_samples") for m in owner.modules()):
        return fn(*args, **kwargs)
    with owner._pyro_context:
        return fn(*args, **kwargs)


def num_rows(batch: Sequence[Any]) -> int:
    """Number of rows of a batch: the length of its first tensor, or 1 where there is none."""
    return next((len(x) for x in batch if isinstance(x, Tensor) and x.dim()), 1)
