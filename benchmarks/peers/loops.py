"""How each library is customarily looped: Pyro's ``SVI.step``, a hand-written torch loop, NumPyro's ``update``.

Every loop shuffles by epochs and gathers its minibatches, keeps the losses, and reads none of them while it runs (Pyro
itself reads one a step).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import pyro
import torch
from torch import Tensor, nn

Data = tuple[Tensor, ...]
Prepare = Callable[..., Data]


class Loop(Protocol):
    """A fit that goes on from where it was.

    Attributes:
        unit: Steps are taken in multiples of it.
    """

    unit: int

    def run(self, steps: int) -> list[float]:
        """Take steps, wait until they are done, and return their losses, in nats over all rows."""


def batches(data: Data, batch_size: int | None, prepare: Prepare | None = None) -> Iterator[Data]:
    """Minibatches without end, every row once an epoch; all rows as they are where there is no batch size."""
    while batch_size is None:
        yield data
    while True:
        for rows in torch.randperm(len(data[0]), device=data[0].device).split(batch_size):
            batch = tuple(x.index_select(0, rows) for x in data)
            yield prepare(*batch) if prepare else batch


def synchronize() -> None:
    """Wait for the GPU, if one is used."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class PyroLoop:
    """``SVI.step`` with validation on, which is Pyro's default."""

    unit = 1

    def __init__(self, model: Any, guide: Any, optimizer: Any, objective: Any, minibatches: Iterator[Data]) -> None:
        self.svi, self.batches = pyro.infer.SVI(model, guide, optimizer, objective), minibatches
        self.store: Any = {"params": {}, "constraints": {}}

    def run(self, steps: int) -> list[float]:
        with pyro.get_param_store().scope(self.store), pyro.validation_enabled(True):
            losses = [self.svi.step(*batch) for batch in itertools.islice(self.batches, steps)]
            synchronize()
        return losses


class TorchLoop:
    """Loss, backward, optimizer; the loss is compiled if asked for."""

    unit = 1

    def __init__(
        self,
        net: nn.Module,
        learning_rate: float,
        minibatches: Iterator[Data],
        *,
        compiled: bool = False,
        clip_norm: float | None = None,
    ) -> None:
        self.loss: Callable[..., Tensor] = net.loss  # type: ignore[assignment]
        if compiled:
            self.loss = torch.compile(self.loss, fullgraph=True, dynamic=False)
        self.parameters, self.clip_norm = list(net.parameters()), clip_norm
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate, fused=True)
        self.batches = minibatches

    def run(self, steps: int) -> list[float]:
        losses = [self._step(batch) for batch in itertools.islice(self.batches, steps)]
        return torch.stack(losses).tolist()  # waits for the GPU too

    def _step(self, batch: Data) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(*batch)
        loss.backward()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        return loss.detach()


class CudaGraphLoop:
    """The hand-written step captured in a CUDA graph, replayed on new rows."""

    unit = 1

    def __init__(self, net: nn.Module, learning_rate: float, minibatches: Iterator[Data]) -> None:
        self.batches = minibatches
        self.batch = tuple(x.clone() for x in next(minibatches))
        optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate, fused=True, capturable=True)
        before = {name: value.clone() for name, value in net.state_dict().items()}

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss: Tensor = net.loss(*self.batch)  # type: ignore[operator]
            loss.backward()
            optimizer.step()
            return loss.detach()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # allocations, and what libraries choose at their first call
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = step()
        with torch.no_grad():  # the warm-up leaves no trace
            net.load_state_dict(before)
            for state in optimizer.state.values():
                for value in state.values():
                    value.zero_()

    def run(self, steps: int) -> list[float]:
        losses = []
        for batch in itertools.islice(self.batches, steps):
            for mine, new in zip(self.batch, batch, strict=True):
                mine.copy_(new)
            self.graph.replay()
            losses.append(self.loss.clone())
        return torch.stack(losses).tolist()


class NumPyroLoop:
    """A jitted ``update`` a step, or ``lax.scan`` over an epoch; shuffled by numpy, gathered inside the jit."""

    def __init__(
        self, model: Any, guide: Any, learning_rate: float, data: Data, batch_size: int | None, *, scan: int = 0
    ) -> None:
        import jax
        import jax.numpy as jnp
        import numpyro

        self.data = tuple(jnp.asarray(x.cpu().numpy()) for x in data)
        self.num_data, self.batch_size, self.scan = len(data[0]), batch_size or len(data[0]), scan
        self.svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(learning_rate), numpyro.infer.Trace_ELBO())
        self.full, self.unit = batch_size is None, scan or 1
        self.state = self.svi.init(jax.random.PRNGKey(0), *(x[: self.batch_size] for x in self.data))
        self.random = np.random.default_rng(0)
        self.place = self.per_epoch = self.num_data // self.batch_size
        self.full_step = jax.jit(lambda state, data: self.svi.update(state, *data), donate_argnums=0)
        self.one_step = jax.jit(self._gather_and_update, donate_argnums=0)
        self.many_steps = jax.jit(self._scanned, donate_argnums=0)

    def run(self, steps: int) -> list[float]:
        import jax
        import jax.numpy as jnp

        losses: list[Any] = []
        for _ in range(steps // self.unit):
            if self.scan:
                self.state, loss = self.many_steps(self.state, self._order(), self.data)
            elif self.full:
                self.state, loss = self.full_step(self.state, self.data)
            else:
                if self.place == self.per_epoch:
                    self.order, self.place, self.index = self._order(), 0, jnp.zeros((), jnp.int32)
                self.state, self.index, loss = self.one_step(self.state, self.index, self.order, self.data)
                self.place += 1
            losses.append(loss)
        jax.block_until_ready(self.state)
        return np.concatenate([np.atleast_1d(np.asarray(loss)) for loss in losses]).tolist()

    def _order(self) -> Any:
        import jax.numpy as jnp

        if self.full:
            return None
        rows = self.random.permutation(self.num_data)[: self.per_epoch * self.batch_size]
        return jnp.asarray(rows.astype(np.int32).reshape(self.per_epoch, self.batch_size))

    def _update(self, state: Any, rows: Any, data: Any) -> Any:
        batch = data if self.full else tuple(x.at[rows].get(mode="promise_in_bounds") for x in data)
        return self.svi.update(state, *batch)

    def _gather_and_update(self, state: Any, index: Any, order: Any, data: Any) -> Any:
        state, loss = self._update(state, order[index], data)
        return state, index + 1, loss

    def _scanned(self, state: Any, order: Any, data: Any) -> Any:
        import jax

        return jax.lax.scan(
            lambda state, rows: self._update(state, rows, data), state, order, length=self.scan if self.full else None
        )
