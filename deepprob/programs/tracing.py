"""A question to a program as one graph of tensor operations, and as native code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from deepprob.engine.deferred_errors import Failures
from deepprob.engine.loop import lift_constants
from deepprob.engine.machine import ONE_AT_A_TIME
from deepprob.engine.native.build import compile_module
from deepprob.engine.noise import LiftedNoise, NoiseSize
from deepprob.engine.trace import SkipValueChecks, Untraceable, functionalise, reason_of, trace_graph
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch


def tensors_of(owned: ProgramInstance) -> list[Tensor]:
    """All that a program holds: parameters, buffers and what is in its store, each once."""
    everything = [*owned.program.parameters(), *owned.program.buffers(), *owned.store["params"].values()]
    return list({id(x): x for x in everything}.values())


@dataclass(frozen=True)
class QueryGraph:
    """A question to a program as a pure function of (its tensors, a batch, normal noise, uniform noise) to tensors.

    Attributes:
        graph: The function.
        tensors: The program's tensors.
        noise: How much noise a call takes.
        device: Where.
    """

    graph: GraphModule
    tensors: list[Tensor]
    noise: NoiseSize
    device: torch.device


def trace_query(owned: ProgramInstance, ask: Callable[[Batch], list[Tensor]], batch: Batch) -> QueryGraph:
    """Trace a question to a program, without gradients; inside a running program.

    Args:
        owned: The program.
        ask: The question: tensors for a batch. If a run fails that raises in Python, those with a fraction are nan.
        batch: Rows like those to come.

    Raises:
        Untraceable: If the answer depends on values in another way than by tensor operations.
    """
    batch, tensors = tuple(x.clone() for x in batch), tensors_of(owned)
    try:
        with torch.no_grad(), LiftedNoise() as noise:
            ask(batch)
    except Untraceable:
        raise
    except Exception as error:  # of a question that is put in another way than the user's own
        raise Untraceable(reason_of(error, [pyro])) from error

    def run(tensors: list[Tensor], batch: Batch, normal: Tensor, uniform: Tensor) -> list[Tensor]:
        with torch.no_grad(), LiftedNoise(normal, uniform), Failures() as failures, TraceableSites(), SkipValueChecks():
            answer = ask(batch)
        return [failures.spoil(x) if x.is_floating_point() else x for x in answer]

    size, device = noise.size, owned.device
    drawn = size.draw_once([torch.Generator(device).manual_seed(seed) for seed in (0, 1)], device)
    graph = trace_graph(run, (tensors, batch, *drawn), tensors, owner=owned.program, libraries=[pyro])
    functional = functionalise(graph, [x.detach() for x in tensors], batch, *drawn)
    return QueryGraph(functional, tensors, size, device)


class _Indices(Tensor):
    """The indices of a whole plate, which are numbers to who loops over them."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __iter__(self) -> Any:
        return iter(range(len(self)))


class TraceableSites(Messenger):
    """Spares a program what would ask for values though the answer is known."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if type(fn).__name__ == "_Subsample":
            # `for i in pyro.plate("p", 3)` reads its indices as numbers: they are made outside of the trace.
            if msg["value"] is None and fn.subsample_size in (None, fn.size):
                with _disable_current_modes():
                    msg["value"] = torch.arange(fn.size, device=fn.device or None).as_subclass(_Indices)
        elif isinstance(fn, Distribution):
            msg["fn"] = _unchecked(fn)


def _unchecked(fn: Distribution) -> Distribution:
    """A distribution that takes any value: one that was made before the run may still check its own."""
    parts = {k: v for k, v in vars(fn).items() if isinstance(v, Distribution)}
    changed = {k: new for k, v in parts.items() if (new := _unchecked(v)) is not v}
    if not changed and not fn.__dict__.get("_validate_args"):
        return fn
    new = copy.copy(fn)
    new.__dict__.update(changed, _validate_args=False)
    return new


class CompiledQuery:
    """A question to a program, answered by native code with one tensor.

    Args:
        query: The traced question.
        batch: An example of the rows it is asked about.

    Raises:
        NoCompiler: If there is no C++ compiler.
    """

    def __init__(self, query: QueryGraph, batch: Batch) -> None:
        self.query = query
        generators = [torch.Generator(query.device).manual_seed(seed) for seed in (0, 1)]
        inputs = [*query.tensors, *batch, *query.noise.draw_once(generators, query.device)]
        split = len(query.tensors), len(query.tensors) + len(batch)

        def flat(*given: Tensor) -> tuple[Tensor]:
            tensors, rows, noise = given[: split[0]], given[split[0] : split[1]], given[split[1] :]
            (answer,) = query.graph(list(tensors), tuple(rows), *noise)
            return (answer,)

        with ONE_AT_A_TIME, torch.no_grad():
            graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*(x.detach() for x in inputs))
            self._constants = lift_constants(graph)
            self._run = compile_module(graph, [*(x.detach() for x in inputs), *self._constants])

    def __call__(self, batch: Batch, normal: Tensor, uniform: Tensor) -> Tensor:
        """The answer, for rows and noise."""
        with torch.no_grad():
            tensors = [x.detach() for x in self.query.tensors]
            return self._run([*tensors, *batch, normal, uniform, *self._constants])[0]
