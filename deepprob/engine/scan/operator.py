"""A loop over time as one operation, in traced graphs and in compiled code."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, get_proxy_mode, track_tensor_tree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

Tensors = tuple[Tensor, ...]

_AS_SCAN: ContextVar[bool] = ContextVar("as_scan", default=False)


def run_loop(cell: GraphModule, state: Sequence[Tensor], inputs: Sequence[Tensor], fixed: Sequence[Tensor]) -> Tensors:
    """Apply a cell step by step.

    In a traced graph this is one node, and the cell is a graph of its own. In compiled code it is torch's scan, which
    writes outputs in place (a ``while_loop`` would copy them at every step).

    Args:
        cell: A pure graph from state, a slice of each input, and fixed tensors, to state and outputs. No result may
            be an alias of another tensor.
        state: The state before the first step.
        inputs: Inputs of all steps, each ``(T, ...)``.
        fixed: Tensors that are the same at every step.

    Returns:
        The last state, then the outputs of all steps, each ``(T, ...)``.
    """
    state, inputs, fixed = tuple(state), tuple(inputs), tuple(fixed)
    if _is_compiling():
        from torch._higher_order_ops.scan import scan_op

        scanned: Tensors = scan_op(cell, state, inputs, fixed)
        return scanned
    mode = get_proxy_mode()
    if mode is None or torch._C._functorch.peek_interpreter_stack() is not None:
        out: Tensors = _loop_op(cell, state, inputs, fixed)
        return out
    # Without the dispatcher: other active modes, such as LiftedNoise, must not see the operations in the cell.
    unaliased = _without_aliases(state, inputs, fixed)
    return _add_node(mode, cell, unaliased[0], unaliased[1], unaliased[2])


@contextlib.contextmanager
def as_scan() -> Iterator[None]:
    """Let `run_loop` call torch's scan within this context, in this thread."""
    token = _AS_SCAN.set(True)
    try:
        yield
    finally:
        _AS_SCAN.reset(token)


def _is_compiling() -> bool:
    return _AS_SCAN.get() or torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


class _LoopOp(HigherOrderOperator):
    """The operator behind `run_loop` in torch's dispatcher; it has no gradient."""

    def __init__(self) -> None:
        super().__init__("deepprob_loop")  # type: ignore[no-untyped-call]

    def __call__(self, cell: Any, state: Tensors, inputs: Tensors, fixed: Tensors) -> Any:
        return super().__call__(cell, state, inputs, fixed)  # type: ignore[no-untyped-call]


_loop_op = _LoopOp()


@_loop_op.py_impl(DispatchKey.CompositeExplicitAutograd)
def _in_python(cell: Any, state: Tensors, inputs: Tensors, fixed: Tensors) -> Tensors:
    count, steps = len(state), []
    for row in zip(*(x.unbind(0) for x in inputs), strict=True):
        out = cell(*state, *row, *fixed)
        state = tuple(out[:count])
        steps.append(out[count:])
    return (*state, *(torch.stack(y) for y in zip(*steps, strict=True)))


def _first_step(cell: Any, state: Tensors, inputs: Tensors, fixed: Tensors) -> Tensors:
    """The results of a loop with the right shapes, from its first step only: tracing needs no values."""
    out = cell(*state, *(x[0] for x in inputs), *fixed)
    count, steps = len(state), len(inputs[0])
    return (*out[:count], *(y.expand(steps, *y.shape).contiguous() for y in out[count:]))


@_loop_op.py_impl(FakeTensorMode)
def _in_shapes(mode: FakeTensorMode, cell: Any, state: Tensors, inputs: Tensors, fixed: Tensors) -> Tensors:
    with mode:
        return _first_step(cell, state, inputs, fixed)


@_loop_op.py_impl(DispatchKey.Autograd)
def _without_autograd(cell: Any, state: Tensors, inputs: Tensors, fixed: Tensors) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return _loop_op(cell, state, inputs, fixed)


@_loop_op.py_impl(ProxyTorchDispatchMode)
def _traced(mode: Any, cell: GraphModule, state: Tensors, inputs: Tensors, fixed: Tensors) -> Tensors:
    with mode:
        unaliased = _without_aliases(state, inputs, fixed)
    return _add_node(mode, cell, unaliased[0], unaliased[1], unaliased[2])


def _without_aliases(*groups: Tensors) -> list[Tensors]:
    """The same tensors, cloned where two share memory: scan takes no aliases, and packed parameters are views."""
    seen: set[int] = set()
    out = []
    for group in groups:
        members = []
        for x in group:
            memory = x.untyped_storage()._cdata
            members.append(x.clone() if memory in seen else x)
            seen.add(memory)
        out.append(tuple(members))
    return out


class _RecordShapes(Interpreter):
    """Run a cell, and record each node's result as ``meta["val"]``, without values, as a trace does."""

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            n.meta["val"] = out if isinstance(out, FakeTensor) else out.detach().to("meta")
        return out


def _add_node(mode: Any, cell: GraphModule, state: Tensors, inputs: Tensors, fixed: Tensors) -> Tensors:
    """Add the loop as one node to the graph that is being traced."""
    tracer = mode.tracer
    # The name depends on the cell's code, so that graphs with different cells have different code.
    name = f"cell_{hashlib.sha256(cell.code.encode()).hexdigest()[:16]}"
    if not hasattr(tracer.root, name):
        tracer.root.register_module(name, cell)
    cell = getattr(tracer.root, name)
    with _disable_current_modes():
        out = _first_step(_RecordShapes(cell).run, state, inputs, fixed)
    proxies = tree_map(tracer.unwrap_proxy, (cell, state, inputs, fixed))
    node = tracer.create_proxy("call_function", run_loop, proxies, {}, name="loop")
    tracked: Tensors = track_tensor_tree(out, node, constant=None, tracer=tracer)
    return tracked


@_loop_op.py_functionalize_impl
def _functional(ctx: Any, cell: Any, state: Tensors, inputs: Tensors, fixed: Tensors) -> Any:
    tensors = [ctx.unwrap_tensors(x) for x in (state, inputs, fixed)]
    with ctx.redispatch_to_next():
        out = _loop_op(cell, tensors[0], tensors[1], tensors[2])
    return ctx.wrap_tensors(out)
