"""A program's loss and gradients as one graph of tensor operations, traced once."""

from __future__ import annotations

import copy
import os
import random
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from deepprob.failures import Failures, failed
from deepprob.noise import LiftedNoise, NoiseSize
from deepprob.objectives import Objective, Terms
from deepprob.owned import OwnedProgram
from deepprob.program import Batch
from deepprob.python_state import changed, python_state

_LIBRARIES = tuple(
    f"{Path(str(file)).parent}{os.sep}" for file in (torch.__file__, pyro.__file__, np.__file__, __file__)
)


class Untraceable(Exception):
    """A program is not one fixed sequence of tensor operations; the message says why, and where."""


@dataclass(frozen=True)
class GradientGraph:
    """Loss, terms, gradients and new buffers as a pure function of tensors.

    Called with (parameters, buffers, fixed, batch, rows, normal, uniform, kl_weight), lists where they are several,
    it returns (loss, terms, gradients, new buffers).

    Attributes:
        function: The function; in-place operations of the program are still among its own.
        names: Names of the terms.
        buffers: The program's tensors that a run changes.
        fixed: Those that it only reads.
        noise: How much noise a call takes.
        layers: Precision in which layers multiply.
    """

    function: Callable[..., tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]]
    names: tuple[str, ...]
    buffers: list[Tensor]
    fixed: list[Tensor]
    noise: NoiseSize
    layers: str = "float32"


def loss_and_gradients(
    owned: OwnedProgram,
    objective: Objective,
    params: Sequence[Tensor],
    batch: Batch,
    rows: Tensor,
    kl_weight: float | Tensor,
) -> tuple[Tensor, Terms, list[Tensor]]:
    """Run an objective, inside a running program: loss and terms, detached, and a gradient for every parameter."""
    loss, terms = objective(
        owned.program,
        owned.program.prepare(*batch),
        rows,
        owned.num_data,
        kl_weight=kl_weight,
        plates=max(1, owned.structure.plates),
    )
    gradients = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    return loss.detach(), terms, list(gradients)


class GradientProgram:
    """One run of an objective and of its gradients, as Python runs it.

    Args:
        owned: The program.
        objective: What is maximised.
    """

    def __init__(self, owned: OwnedProgram, objective: Objective) -> None:
        self.owned, self.objective = owned, objective
        self.params = list(owned.parameters().values())

    def __call__(self, batch: Batch, rows: Tensor, kl_weight: float | Tensor) -> tuple[Tensor, Terms, list[Tensor]]:
        """Loss, detached terms, and a gradient for every parameter.

        Args:
            batch: The batch's rows of the data.
            rows: Which they are, shape ``(B,)``.
            kl_weight: Weight of the KL.
        """
        return loss_and_gradients(self.owned, self.objective, self.params, batch, rows, kl_weight)

    def measure(self, batch: Batch, rows: Tensor) -> tuple[NoiseSize, list[Tensor]]:
        """Run once: how much noise that takes, and which of the program's tensors it changes; they are put back."""
        others = self._others()
        before = [x.clone() for x in others]
        with LiftedNoise() as noise:
            self(batch, rows, 1.0)
        changed = [x for x, was in zip(others, before, strict=True) if not same_values(x, was)]
        _restore(others, before)
        return noise.size, changed

    def _others(self) -> list[Tensor]:
        """The program's tensors that are not trained."""
        trained = {id(p) for p in self.params}
        return [x for x in _tensors(self.owned) if id(x) not in trained]


def _tensors(owned: OwnedProgram) -> list[Tensor]:
    """All that a program holds: parameters, buffers and what is in its store, each once."""
    everything = [*owned.program.parameters(), *owned.program.buffers(), *owned.store["params"].values()]
    return list({id(x): x for x in everything}.values())


def trace_gradients(program: GradientProgram, batch: Batch, rows: Tensor) -> GradientGraph:
    """Trace a run of an objective and its gradients; inside a running program.

    Every tensor that can change from step to step is an input of the graph: parameters, buffers, the batch, its rows,
    the noise and the weight of the KL. So a value that is asked for while tracing (``.item()``, ``if tensor:``) is an
    error and not a constant.

    Args:
        program: What to trace.
        batch: A batch like those to come.
        rows: Its rows.

    Raises:
        Untraceable: If a run depends on values, or on random numbers that are not torch's.
    """
    batch, rows = tuple(x.clone() for x in batch), rows.clone()  # one tensor given twice would become one input
    size, buffers = program.measure(batch, rows)
    changed = {id(x) for x in buffers}
    others = program._others()
    fixed = [x for x in others if id(x) not in changed]
    names: list[str] = []

    def run(
        params: list[Tensor],
        buffers: list[Tensor],
        fixed: list[Tensor],
        batch: Batch,
        rows: Tensor,
        normal: Tensor,
        uniform: Tensor,
        kl_weight: Tensor,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        with LiftedNoise(normal, uniform), Failures() as failures, _Traceable(), _Unasked():
            loss, terms, gradients = program(batch, rows, kl_weight)
        names[:] = terms
        return failures.spoil(loss), list(terms.values()), gradients

    generators = [torch.Generator(rows.device).manual_seed(seed) for seed in (0, 1)]
    normal, uniform = size.draw_once(generators, rows.device)
    weight = torch.ones((), dtype=size.dtype, device=rows.device)
    inputs = (program.params, buffers, fixed, batch, rows, normal, uniform, weight)
    before = [x.clone() for x in buffers]
    changing_names = ["buffers"] if buffers else []
    settled = ["batch", "rows"] if len(rows) == program.owned.num_data else []
    try:
        graph = _traced(program.owned, run, inputs, [*program.params, *others], changing_names, settled)
    finally:
        _restore(buffers, before)

    def pure(
        params: list[Tensor], buffers: list[Tensor], *rest: Any
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        changing = [x.clone() for x in buffers]
        loss, terms, gradients = graph(params, changing, *rest)
        return loss, terms, gradients, changing

    return GradientGraph(pure, tuple(names), buffers, fixed, size, program.objective.layers)


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


def trace_query(owned: OwnedProgram, ask: Callable[[Batch], list[Tensor]], batch: Batch) -> QueryGraph:
    """Trace a question to a program, without gradients; inside a running program.

    Args:
        owned: The program.
        ask: The question: tensors for a batch. If a run fails that raises in Python, those with a fraction are nan.
        batch: Rows like those to come.

    Raises:
        Untraceable: If the answer depends on values in another way than by tensor operations.
    """
    batch, tensors = tuple(x.clone() for x in batch), _tensors(owned)
    try:
        with torch.no_grad(), LiftedNoise() as noise:
            ask(batch)
    except Untraceable:
        raise
    except Exception as error:  # of a question that is put in another way than the user's own
        raise Untraceable(_reason(error)) from error

    def run(tensors: list[Tensor], batch: Batch, normal: Tensor, uniform: Tensor) -> list[Tensor]:
        with torch.no_grad(), LiftedNoise(normal, uniform), Failures() as failures, _Traceable(), _Unasked():
            answer = ask(batch)
        return [failures.spoil(x) if x.is_floating_point() else x for x in answer]

    size, device = noise.size, owned.device
    drawn = size.draw_once([torch.Generator(device).manual_seed(seed) for seed in (0, 1)], device)
    graph = _traced(owned, run, (tensors, batch, *drawn), tensors)
    functional = _functional(graph, [x.detach() for x in tensors], batch, *drawn)
    return QueryGraph(functional, tensors, size, device)


def _functional(run: Callable[..., Any], *inputs: Any) -> GraphModule:
    """The operations of a graph without those that work in place.

    Raises:
        Untraceable: If its shapes depend on values.
    """
    try:
        with torch.no_grad():
            graph: GraphModule = make_fx(
                torch.func.functionalize(run), tracing_mode="fake", _allow_non_fake_inputs=True
            )(*inputs)  # fmt: skip
    except Exception as error:
        raise Untraceable(_reason(error)) from error
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _traced(
    owned: OwnedProgram,
    run: Callable[..., Any],
    inputs: tuple[Any, ...],
    own: Sequence[Tensor],
    changing: Sequence[str] = (),
    settled: Sequence[str] = (),
) -> GraphModule:
    """The operations of a function, whose inputs are all that may change.

    Args:
        owned: The program.
        run: The function, which runs it once.
        inputs: Its inputs.
        own: The program's tensors, all of which are among them.
        changing: Names of the arguments that the function may write to.
        settled: Names of the arguments whose values never change.

    Raises:
        Untraceable: If they are not all that decides what it does.
    """
    foreign, kept = _python_noise(), python_state(owned.program)
    try:
        with warnings.catch_warnings(), _taken_apart():
            warnings.simplefilter("ignore")  # the program was run before: what it has to say was said
            graph: GraphModule = make_fx(run, tracing_mode="real", _allow_non_fake_inputs=True)(*inputs)
    except Exception as error:
        raise Untraceable(_reason(error)) from error
    if foreign != _python_noise():
        raise Untraceable("the program draws from Python's or numpy's random numbers, which would be frozen")
    if name := changed(kept, python_state(owned.program)):
        raise Untraceable(
            f"the program changes {name!r} in Python from run to run, which would be frozen (a schedule can be a "
            "buffer that Anneal moves)"
        )
    _check_graph(graph, own, changing, settled)
    return graph


class _Indices(Tensor):
    """The indices of a whole plate, which are numbers to who loops over them."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __iter__(self) -> Any:
        return iter(range(len(self)))


class _Traceable(Messenger):
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


class _Unasked(TorchFunctionMode):
    """Takes from functions of torch what they ask of values only to check them; what fails is noted.

    Numbers that leave torch for Python would be constants of the graph: `make_fx` refuses ``.item()``, but is not
    asked about these.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is one_hot:
            x, classes = _one_hot_arguments(*args, **(kwargs or {}))
            if classes > 0:
                failed(((x < 0) | (x >= classes)).any())
                return (x.unsqueeze(-1) == torch.arange(classes, device=x.device)).long()
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__) and _depends_on_inputs(args[0]):
            raise RuntimeError("numbers of a tensor are read in Python, as by .item()")
        return func(*args, **(kwargs or {}))


def _depends_on_inputs(x: Tensor) -> bool:
    """Whether a tensor was computed in the graph that is being traced, from what is not a constant."""
    mode = get_proxy_mode()
    slot = None if mode is None else get_proxy_slot(x, mode.tracer, None)
    return slot is not None and slot.constant is None


def _one_hot_arguments(tensor: Tensor, num_classes: int = -1) -> tuple[Tensor, int]:
    return tensor, num_classes


def _unchecked(fn: Distribution) -> Distribution:
    """A distribution that takes any value: one that was made before the run may still check its own."""
    parts = {k: v for k, v in vars(fn).items() if isinstance(v, Distribution)}
    changed = {k: new for k, v in parts.items() if (new := _unchecked(v)) is not v}
    if not changed and not fn.__dict__.get("_validate_args"):
        return fn
    new = copy.copy(fn)
    new.__dict__.update(changed, _validate_args=False)
    return new


@contextmanager
def _taken_apart() -> Iterator[None]:
    """Without oneDNN and cuDNN recurrent layers are many operations: as one, their gradient cannot be run again, and
    cuDNN's batch norm does not say that it writes. Convolutions are one operation either way.
    """
    onednn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags sets, and warns of, much else
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)
        torch._C._set_cudnn_enabled(cudnn)


def _python_noise() -> tuple[Any, ...]:
    """Where Python's and numpy's global generators are."""
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, tuple(np.asarray(keys).tolist()), *rest


def _check_graph(graph: GraphModule, own: Sequence[Tensor], changing: Sequence[str], settled: Sequence[str]) -> None:
    """Refuse a graph that hides what may change, or whose shapes do.

    Args:
        graph: As it was traced, with in-place operations.
        own: The program's tensors, none of which may be a constant.
        changing: Names of the inputs that may be written to.
        settled: Names of the inputs whose values never change.
    """
    memory = {x.untyped_storage().data_ptr() for x in own if x.numel()}
    roots: dict[Node, Node] = {}  # whose memory a value is
    varying: set[Node] = set()  # what depends on an input
    for node in graph.graph.nodes:
        given = node.op == "placeholder" and not node.name.startswith(tuple(settled))
        if given or varying.intersection(node.all_input_nodes):
            varying.add(node)
        roots[node] = node
        if node.op == "get_attr":
            value = getattr(graph, node.target)
            if isinstance(value, Tensor) and value.numel() and value.untyped_storage().data_ptr() in memory:
                raise Untraceable("the program reads a parameter's .data, which would not change from step to step")
        if node.op != "call_function":
            continue
        if not hasattr(node.target, "_schema"):
            roots[node] = roots.get(node.args[0], node)  # one of several parts
            continue
        _check_shape(node, varying)
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.alias_info is None or not isinstance(value, Node):
                continue
            root = roots[node] = roots[value]
            if argument.alias_info.is_write and root.op == "get_attr":
                raise Untraceable("the program changes a tensor that is not a buffer of it: register_buffer it")
            if argument.alias_info.is_write and root.op == "placeholder" and not root.name.startswith(tuple(changing)):
                raise Untraceable("the program changes a buffer, or its own input, in some steps only")


def _check_shape(node: Node, varying: set[Node]) -> None:
    """Refuse an operation whose result has as many entries as its values say, unless these are always the same."""
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return
    deciding = [x for x in node.all_input_nodes if x in varying]
    if node.target is torch.ops.aten.index.Tensor:
        masks = (torch.bool, torch.uint8)
        deciding = [x for x in deciding if x is not node.args[0] and x.meta["val"].dtype in masks]
    if deciding:
        raise Untraceable("values decide how many rows or entries there are (x[mask], nonzero): use torch.where")


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers; nan is the same as nan."""
    return bool(torch.equal(a, b)) or bool((a.isnan() & b.isnan() | (a == b)).all())


def _restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


def _reason(error: BaseException) -> str:
    """Why tracing failed, naming the innermost line that is the user's."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [f for f in frames if not f.filename.startswith((*_LIBRARIES, "<"))]
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "aten._local_scalar_dense" in str(error) or "item()" in str(error) or "bool" in text:
        text = "a value of a tensor decides what is computed (an if or while on it, or .item())"
    if not users:
        return text
    line = users[-1]
    return f"{text}, at {Path(line.filename).name}:{line.lineno} `{(line.line or '').strip()}`"
