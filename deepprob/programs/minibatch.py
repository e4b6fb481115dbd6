"""The rows of a batch, and the handler that passes them to the data plate."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

Batch = tuple[Any, ...]


@dataclass
class BoundRows:
    """The rows of the data that a batch holds.

    Attributes:
        plate: Name of the plate that holds them: the data plate, or the row plate of a query.
        rows: Indices of the batch's rows, shape ``(B,)``; None outside of a run.
        num_data: Number of rows of the whole data, N; None where no plate holds them.
        whole: Whether every other plate has all of its rows, too.
        gradients: Whether the program takes gradients itself, so that every run of it, also in a query, needs them.
        weights: Weights of all rows in the log-likelihood, shape ``(N,)``; None for 1 each.
    """

    plate: str
    rows: Tensor | None = None
    num_data: int | None = None
    whole: bool = False
    gradients: bool = False
    weights: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The weights of the rows, one tensor or none."""
        return [] if self.weights is None else [self.weights]

    def take(self, weights: Tensor | None, device: torch.device) -> None:
        """Take on the weights of all rows, or none.

        Args:
            weights: The weights, shape ``(N,)``.
            device: The program's device.
        """
        self.weights = None if weights is None else weights.to(device)

    @contextmanager
    def to(
        self, plate: str, rows: Tensor, num_data: int, query: bool = False, weights: RowWeights | None = None
    ) -> Iterator[None]:
        """Within this context the plate of the rows holds those of a batch; see `Program.bound`.

        Args:
            plate: The plate that holds the rows; empty for none.
            rows: Indices of the batch's rows, shape ``(B,)``.
            num_data: Number of rows of the whole data, N.
            query: Whether every plate has all of its rows.
            weights: Weights of the batch's rows; None for 1 each.
        """
        before = vars(self).copy()
        vars(self).update(plate=plate, rows=rows, num_data=num_data if plate else None, whole=query)
        try:
            with Minibatch(plate, rows, num_data, query, self.gradients, weights):
                yield
        finally:
            vars(self).update(before)


class RowWeights:
    """Weights of a batch's rows, which scale the log-probabilities of the sites of a row.

    Guide and model share one tensor for each scale, so that a closed-form KL sees that the two are equal.

    Args:
        values: The weights, shape ``(B,)``.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._known: dict[tuple[float, int], Tensor] = {}

    def scaled(self, scale: Any, dim: int) -> Tensor:
        """A site's scale times the weights, along the dimension of its plate.

        Args:
            scale: The scale, a number or a tensor.
            dim: The plate's dimension, counted from the right.
        """
        if isinstance(scale, Tensor):
            return scale * self.values.reshape(-1, *[1] * (-dim - 1))
        if (scale, dim) not in self._known:
            self._known[scale, dim] = scale * self.values.reshape(-1, *[1] * (-dim - 1))
        return self._known[scale, dim]


class Minibatch(Messenger):
    """A handler that passes a batch's rows to the data plate.

    Pyro requests the indices of every plate in a message, and this handler answers for the data plate, in the model
    and in the guide alike. The plate's scale is then ``num_data / len(rows)``, and parameters of a row belong to the
    row rather than to its position in the batch. In a query, all other plates have all of their rows.

    Args:
        plate: Name of the plate that holds the rows; empty for none.
        rows: Indices of the batch's rows, shape ``(B,)``.
        num_data: Number of rows of the whole data, N.
        whole: Whether plates that draw some of their rows get all of them.
        gradients: Whether to enable gradients.
        weights: Weights of the batch's rows; None for 1 each.
    """

    def __init__(
        self,
        plate: str,
        rows: Tensor,
        num_data: int,
        whole: bool = False,
        gradients: bool = False,
        weights: RowWeights | None = None,
    ) -> None:
        super().__init__()
        self.gradients, self.weights = gradients, weights
        self.plate, self.rows, self.num_data, self.whole = plate, rows, num_data, whole

    def __enter__(self) -> Any:
        # Pyro refuses an answer that is not as long as the plate's own subsample_size.
        self._pyros = SubsampleMessenger._subsample
        SubsampleMessenger._subsample = staticmethod(functools.partial(self._subsample, self._pyros))  # type: ignore
        self._outer = torch.is_grad_enabled()
        torch.set_grad_enabled(self._outer or self.gradients)
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        SubsampleMessenger._subsample = staticmethod(self._pyros)  # type: ignore[method-assign]
        torch.set_grad_enabled(self._outer)
        return super().__exit__(*error)

    def _subsample(self, pyros: Callable[..., Any], name: str, size: Any = None, count: Any = None, *rest: Any) -> Any:
        if size is None and self.whole and name == self.plate:
            size = len(self.rows)  # a plate without a size, which Pyro would not broadcast over
        size, count, drawn = pyros(name, size, None if self._answers(name) else count, *rest)
        if name == self.plate and drawn is not None and len(drawn) == size != len(self.rows):
            # poutine.block hid the message, as in the parts of an AutoGuideList.
            drawn = self.rows if size == self.num_data else drawn
        return size, len(drawn) if drawn is not None else count, drawn

    def _answers(self, name: str) -> bool:
        return self.whole or name == self.plate

    def _pyro_sample(self, msg: Any) -> None:
        if type(msg["fn"]).__name__ == "_Subsample":
            if self._answers(msg["name"]) and msg["value"] is None:
                msg["value"] = self._rows_of(msg["name"], msg["fn"])
            return
        for frame in msg["cond_indep_stack"]:
            if frame.name == self.plate and not (frame.vectorized or self.whole) and len(self.rows) < self.num_data:
                raise ValueError(
                    f"plate {self.plate!r} is sequential, a loop over its rows, and a minibatch has some of them only. "
                    f"Write with pyro.plate({self.plate!r}, ...), or use batch_size=None."
                )
            # A plate without a size, plate("data"), has as many rows as the batch.
            if frame.name == self.plate and frame.size in (-1, len(self.rows)):
                # Pyro scales by full_size / size, which is right for plate("data", N), not for plate("data", len(x)).
                pyros, ours = (frame.full_size or frame.size) / frame.size, self.num_data / len(self.rows)
                if pyros != ours:
                    msg["scale"] = msg["scale"] * (ours / pyros)
                if self.weights is not None:
                    msg["scale"] = self.weights.scaled(msg["scale"], frame.dim)

    def _rows_of(self, name: str, plate: Any) -> Tensor:
        # A plate of the batch's own length, plate("data", len(x)), already has all its rows.
        if name == self.plate and (plate.size == self.num_data or plate.size != len(self.rows)):
            return self.rows
        return torch.arange(plate.size, device=plate.device)

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
    if bound.rows is None:
        return call_sampling(fn, *args, **kwargs)
    with Minibatch(bound.plate, bound.rows, bound.num_data or len(bound.rows), bound.whole, bound.gradients):
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


def sampling_method(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a program that is called as by `call_sampling`."""

    @functools.wraps(method)
    def call(self: Any, *batch: Any) -> Any:
        return call_sampling(types.MethodType(method, self), *batch)

    return call


def num_rows(batch: Sequence[Any]) -> int:
    """Number of rows of a batch: the length of its first tensor, or 1 where there is none."""
    return next((len(x) for x in batch if isinstance(x, Tensor) and x.dim()), 1)


def draws_rows(trace: Trace, plate: str) -> bool:
    """Whether a plate of a trace, other than the named one, drew some of its rows."""
    plates: list[tuple[str, Any]] = [
        (n, s) for n, s in trace.nodes.items() if type(s.get("fn")).__name__ == "_Subsample"
    ]
    return any(len(s["value"]) < s["fn"].size for n, s in plates if n != plate)
