"""One loop over time as one node of a traced graph, and inside of compiled code."""

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
    """Apply a cell step by step: the last state, then each step's further outputs, ``(T, ...)``.

    In a graph it is one node, and the cell a graph of its own. Compiled, it is torch's scan, whose outputs are written
    in place (a ``while_loop`` would copy them at every step).

    Args:
        cell: A pure graph from state, a slice of each input, and what is fixed, to state and outputs, none of which is
            an alias of another tensor.
        state: Where it starts.
        inputs: Each ``(T, ...)``.
        fixed: The same at every step.
    """
    state, inputs, fixed = tuple(state), tuple(inputs), tuple(fixed)
    if _is_compiled():
        from torch._higher_order_ops.scan import scan_op

        scanned: Tensors = scan_op(cell, state, inputs, fixed)
        return scanned
    mode = get_proxy_mode()
    if mode is None or torch._C._functorch.peek_interpreter_stack() is not None:
        out: Tensors = _loop_op(cell, state, inputs, fixed)
        return out
    # Modes that watch the program see operations; what is in a cell is none of theirs.
    apart = _apart(state, inputs, fixed)
    return _node(mode, cell, apart[0], apart[1], apart[2])


@contextlib.contextmanager
def as_scan() -> Iterator[None]:
    """Make loops torch's own scans, in this thread."""
    token = _AS_SCAN.set(True)
    try:
        yield
    finally:
        _AS_SCAN.reset(token)


def _is_compiled() -> bool:
    return _AS_SCAN.get() or torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


class _LoopOp(HigherOrderOperator):
    """What `run_loop` is to torch's dispatcher; it has no gradient of its own."""

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


def _once(cell: Any, state: Tensors, inputs: Tensors, fixed: Tensors) -> Tensors:
    """What a loop returns, as if every step were like the first: to trace, shapes are enough."""
    out = cell(*state, *(x[0] for x in inputs), *fixed)
    count, steps = len(state), len(inputs[0])
    return (*out[:count], *(y.expand(steps, *y.shape).contiguous() for y in out[count:]))


@_loop_op.py_impl(FakeTensorMode)
def _in_shapes(mode: FakeTensorMode, cell: Any, state: Tensors, inputs: Tensors, fixed: Tensors) -> Tensors:
    with mode:
        return _once(cell, state, inputs, fixed)


@_loop_op.py_impl(DispatchKey.Autograd)
def _without_autograd(cell: Any, state: Tensors, inputs: Tensors, fixed: Tensors) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return _loop_op(cell, state, inputs, fixed)


@_loop_op.py_impl(ProxyTorchDispatchMode)
def _traced(mode: Any, cell: GraphModule, state: Tensors, inputs: Tensors, fixed: Tensors) -> Tensors:
    with mode:
        apart = _apart(state, inputs, fixed)
    return _node(mode, cell, apart[0], apart[1], apart[2])


def _apart(*groups: Tensors) -> list[Tensors]:
    """The same tensors, no two in one memory: scan takes no aliases, and parameters often lie in one tensor."""
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


class _Noted(Interpreter):
    """A run of a cell that notes at every node what came out, without its numbers, as a trace does."""

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            n.meta["val"] = out if isinstance(out, FakeTensor) else out.detach().to("meta")
        return out


def _node(mode: Any, cell: GraphModule, state: Tensors, inputs: Tensors, fixed: Tensors) -> Tensors:
    """Put the loop into the graph that is traced."""
    tracer = mode.tracer
    # The name says what the cell computes, so that the code of the whole graph does.
    name = f"cell_{hashlib.sha256(cell.code.encode()).hexdigest()[:16]}"
    if not hasattr(tracer.root, name):
        tracer.root.register_module(name, cell)
    cell = getattr(tracer.root, name)
    with _disable_current_modes():
        out = _once(_Noted(cell).run, state, inputs, fixed)
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
