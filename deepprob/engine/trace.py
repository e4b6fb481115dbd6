"""Trace a function into one graph of tensor operations, or raise an error that gives the reason and the user's line."""

from __future__ import annotations

import contextlib
import operator
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from deepprob.engine.deferred_errors import defer_error
from deepprob.engine.python_state import is_library
from deepprob.engine.subject import Subject, Untraceable, unchanged_in_python

_PAD = torch._C._VariableFunctions._pad_packed_sequence
_OUR_FOLDER = Path(__file__).parents[1]


def functionalise(run: Callable[..., Any], *inputs: Any) -> GraphModule:
    """Retrace a graph without in-place operations.

    Raises:
        Untraceable: If its shapes depend on values.
    """
    try:
        with torch.no_grad():
            graph: GraphModule = make_fx(torch.func.functionalize(run), _BATCHED, "fake", True)(*inputs)
    except Exception as error:
        raise Untraceable(reason_of(error)) from error
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _copied(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """A functional copy by operations that ``torch.vmap`` can batch."""
    return source.to(x.dtype).expand(x.shape)


def _ended(x: Tensor, source: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """A strided write with its bounds within the tensor; ``torch.vmap`` takes neither negative nor infinite ones."""
    first, last, _ = slice(start, end).indices(x.shape[dim])
    if (first, last) == (start, end):
        return NotImplemented
    return torch.ops.aten.slice_scatter.default(x, source, dim, first, last, step)


_BATCHED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.copy.default: _copied,
    torch.ops.aten.slice_scatter.default: _ended,
}


def trace_graph(
    run: Callable[..., Any],
    inputs: tuple[Any, ...],
    own: Sequence[Tensor],
    *,
    subject: Subject,
    changing: Sequence[str] = (),
    settled: Sequence[str] = (),
) -> GraphModule:
    """Trace a function into a graph, and check that its result depends on nothing but its inputs.

    Args:
        run: The function.
        inputs: Its inputs.
        own: The subject's tensors. They are among the inputs and may not become constants of the graph.
        subject: The object that the function runs.
        changing: Names of the arguments that the function may write to.
        settled: Names of the arguments whose values never change.

    Raises:
        Untraceable: If the result depends on anything else, or shapes depend on values.
    """
    with unchanged_in_python(subject):
        try:
            with warnings.catch_warnings(), _decomposed_layers():
                warnings.simplefilter("ignore")  # the function ran before and gave its warnings then
                graph: GraphModule = make_fx(run, tracing_mode="real", _allow_non_fake_inputs=True)(*inputs)
        except Exception as error:
            raise Untraceable(reason_of(error, subject.libraries)) from error
    check_graph(graph, subject, own, changing, settled)
    return graph


class SkipValueChecks(TorchFunctionMode):
    """Skips value checks inside torch functions while tracing; a failed check is recorded and makes the result nan.

    An index that is a computed whole number, ``table[k]``, is not read by Python, and the lengths of packed sequences,
    which torch writes past all modes, are computed. The mode also refuses
    ``.tolist()``, ``.numpy()`` and ``np.asarray`` of computed tensors: the numbers would become constants of the graph.
    `make_fx` itself refuses only ``.item()``. Values that only inputs which never change decide may be read.

    Args:
        settled: Names of the inputs whose values never change.

    Attributes:
        values_read: Whether any of their values was read, so that the graph holds for these values alone.
    """

    def __init__(self, settled: Sequence[str] = ()) -> None:
        super().__init__()
        self._settled = tuple(settled)
        self.values_read = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._settled and func in _READERS and all(_is_settled(x, self._settled) for x in args):
            self.values_read |= any(isinstance(x, Tensor) and _depends_on_inputs(x) for x in args)
            with _disable_current_modes():
                return func(*args, **(kwargs or {}))
        if func is one_hot:
            x, classes = _one_hot_arguments(*args, **(kwargs or {}))
            if classes > 0:
                defer_error(((x < 0) | (x >= classes)).any())
                return (x.unsqueeze(-1) == torch.arange(classes, device=x.device)).long()
        if func is Tensor.__setitem__ and _is_computed_flag(args[1]):  # torch would read the flag
            x, flag, value = args
            return x.copy_(torch.where(flag, value, x))
        if func is Tensor.__getitem__ and any(_is_computed_number(i) for i in _parts(args[1])):
            return _select(*args)
        if func is _PAD:
            (padded, _), steps = func(*args, **(kwargs or {})), args[1]
            row = torch.arange(padded.shape[0 if args[2] else 1], device=steps.device)
            return padded, (row < steps.unsqueeze(1)).sum(0)
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__) and _depends_on_inputs(args[0]):
            raise RuntimeError("Python reads the values of a tensor, as by .item()")
        result = func(*args, **(kwargs or {}))
        _note_line(result)
        return result


def _note_line(result: Any) -> None:
    """Note the user's line at the node of a result whose shape depends on values."""
    mode, x = get_proxy_mode(), result[0] if isinstance(result, tuple) and result else result
    slot = None if mode is None or not isinstance(x, Tensor) else get_proxy_slot(x, mode.tracer, None)
    if slot is not None:
        node = slot.proxy.node
        while node.target in (operator.getitem, torch.ops.aten.unbind.int):
            (node,) = node.all_input_nodes  # one of several results
        if torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()):
            node.meta.setdefault("line", _users_line(traceback.extract_stack()))


# Functions from tensors to Python's numbers, lists and arrays.
_READERS = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__),
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__contains__),
    *(torch.equal, Tensor.equal, torch.allclose, Tensor.allclose, torch.is_nonzero, Tensor.is_nonzero),
}


def _is_settled(x: Any, settled: tuple[str, ...]) -> bool:
    """Whether a value of the current trace depends on nothing but constants and inputs that never change."""
    mode = get_proxy_mode()
    slot = None if mode is None or not isinstance(x, Tensor) else get_proxy_slot(x, mode.tracer, None)
    if slot is None:
        return True
    roots: dict[Node, Node] = {}
    varying: set[Node] = set()  # nodes that depend on anything else, and memory that they were written to
    node = slot.proxy.node
    for n in node.graph.nodes:
        inputs = n.all_input_nodes
        random = torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())
        given = n.op == "placeholder" and not n.name.startswith(settled)
        if given or random or any(i in varying or roots[i] in varying for i in inputs):
            varying.add(n)
        roots[n] = n
        schema = getattr(n.target, "_schema", None)
        for argument, value in zip(schema.arguments if schema else (), n.args, strict=False):
            if argument.alias_info is not None and isinstance(value, Node):
                roots[n] = roots[value]
                if argument.alias_info.is_write and n in varying:
                    varying.add(roots[n])
        if schema is None and inputs:
            roots[n] = roots[inputs[0]]  # one of several outputs
    return node not in varying and roots[node] not in varying


def _depends_on_inputs(x: Tensor) -> bool:
    """Whether a tensor of the current trace was computed from inputs, and not from constants alone."""
    mode = get_proxy_mode()
    slot = None if mode is None else get_proxy_slot(x, mode.tracer, None)
    return slot is not None and slot.constant is None


def _parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _is_computed_number(index: Any) -> bool:
    """Whether an index is a whole number that the trace computed; torch would read its value."""
    if not isinstance(index, Tensor) or index.dim() or index.is_floating_point() or index.dtype == torch.bool:
        return False
    return _depends_on_inputs(index)


def _is_computed_flag(index: Any) -> bool:
    """Whether an index is a single truth value that the trace computed."""
    return isinstance(index, Tensor) and not index.dim() and index.dtype == torch.bool and _depends_on_inputs(index)


def _select(x: Tensor, index: Any) -> Tensor:
    """Index a tensor, with computed whole numbers as ``index_select``."""
    parts, rest, dim = list(_parts(index)), [], 0
    if (at := next((i for i, part in enumerate(parts) if part is Ellipsis), None)) is not None:
        given = sum(part.dim() if _is_mask(part) else part is not None for part in parts) - 1
        parts[at : at + 1] = [slice(None)] * (x.dim() - given)
    for part in parts:
        if _is_computed_number(part):
            part = torch.where(part < 0, part + x.shape[dim], part)
            x = x.index_select(dim, part.reshape(1)).squeeze(dim)
            continue
        rest.append(part)
        dim += part.dim() if _is_mask(part) else part is not None
    return x[tuple(rest)] if rest else x


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _one_hot_arguments(tensor: Tensor, num_classes: int = -1) -> tuple[Tensor, int]:
    return tensor, num_classes


@contextlib.contextmanager
def _decomposed_layers() -> Iterator[None]:
    """Turn oneDNN and cuDNN off, so that recurrent layers are traced as many small operations.

    The gradient of a fused recurrent layer cannot be run twice, and cuDNN's batch norm does not declare that it
    writes to its buffers. Convolutions are one operation either way.
    """
    onednn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags also sets other flags and warns about them
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)
        torch._C._set_cudnn_enabled(cudnn)


def check_graph(
    graph: GraphModule,
    subject: Subject,
    own: Sequence[Tensor] = (),
    changing: Sequence[str] = (),
    settled: Sequence[str] = (),
) -> None:
    """Refuse a graph with a subject's tensor as a constant, an undeclared write, or shapes that depend on values.

    Args:
        graph: The traced graph, with in-place operations.
        subject: The object that was traced.
        own: The subject's tensors, none of which may be a constant.
        changing: Names of the inputs that may be written to.
        settled: Names of the inputs whose values never change.

    Raises:
        Untraceable: If the graph has any of these.
    """
    memory = {x.untyped_storage().data_ptr() for x in own if x.numel()}
    roots: dict[Node, Node] = {}  # the node that allocated the memory of a value
    varying: set[Node] = set()  # nodes that depend on an input
    for node in graph.graph.nodes:
        given = node.op == "placeholder" and not node.name.startswith(tuple(settled))
        if given or varying.intersection(node.all_input_nodes):
            varying.add(node)
        roots[node] = node
        if node.op == "get_attr":
            value = getattr(graph, node.target)
            if isinstance(value, Tensor) and value.numel() and value.untyped_storage().data_ptr() in memory:
                raise Untraceable(
                    f"{subject.name} reads a parameter's .data, which would be frozen: use the parameter itself"
                )
        if node.op != "call_function":
            continue
        if not hasattr(node.target, "_schema"):
            roots[node] = roots.get(node.args[0], node)  # getitem: one of several outputs
            continue
        _check_shape(node, varying)
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.alias_info is None or not isinstance(value, Node):
                continue
            root = roots[node] = roots[value]
            if argument.alias_info.is_write and root.op == "get_attr":
                raise Untraceable(f"{subject.name} changes a tensor that is not {subject.buffers}")
            if argument.alias_info.is_write and root.op == "placeholder" and not root.name.startswith(tuple(changing)):
                raise Untraceable(f"{subject.name} changes {subject.inputs}")


def _check_shape(node: Node, varying: set[Node]) -> None:
    """Refuse an operation whose result's shape depends on varying values (``x[mask]``, ``nonzero``)."""
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return
    deciding = [x for x in node.all_input_nodes if x in varying]
    if node.target is torch.ops.aten.index.Tensor:
        masks = (torch.bool, torch.uint8)
        deciding = [x for x in deciding if x is not node.args[0] and x.meta["val"].dtype in masks]
    if deciding:
        line = node.meta.get("line", "")
        raise Untraceable(f"the shape of a result depends on values (x[mask], nonzero): use torch.where{line}")


def lift_constants(graph: GraphModule) -> list[Tensor]:
    """Turn a graph's constants into its last inputs, and return the constants themselves.

    Graphs that differ only in their constants then share compiled code.
    """
    constants: dict[str, Node] = {}
    found: list[Tensor] = []
    for node in list(graph.graph.find_nodes(op="get_attr")):
        value = getattr(graph, node.target)
        if not isinstance(value, Tensor):
            continue
        if node.target not in constants:
            found.append(value)
            last = graph.graph.find_nodes(op="placeholder")[-1]
            with graph.graph.inserting_after(last):
                constants[node.target] = graph.graph.placeholder(f"constant_{len(constants)}")
            constants[node.target].meta = {"val": value, **node.meta}
        node.replace_all_uses_with(constants[node.target])
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return found


def numbers_written(graph: GraphModule) -> int:
    """How many numbers the operations of a graph write; views write none."""
    nodes = [node for node in graph.graph.nodes if hasattr(node.target, "_schema")]
    written = (n.meta.get("val") for n in nodes if not any(x.alias_info for x in n.target._schema.returns))
    return sum(x.numel() for x in written if isinstance(x, Tensor))


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers; nan equals nan."""
    return bool(torch.equal(a, b)) or bool((a.isnan() & b.isnan() | (a == b)).all())


def restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors, in place."""
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


def reason_of(error: BaseException, libraries: Sequence[ModuleType] = ()) -> str:
    """The reason why tracing failed, with the innermost line of the user's own code."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if (
        "get value out of a tracing tensor" in text
        or "aten._local_scalar_dense" in str(error)
        or "item()" in str(error)
    ):
        text = "the computation depends on a value of a tensor (if, while or .item())"
    return text + _users_line(traceback.extract_tb(error.__traceback__), libraries)


def _users_line(frames: Sequence[traceback.FrameSummary], libraries: Sequence[ModuleType] = ()) -> str:
    """The innermost line of the user's own code, ", at file:number `code`"; empty if there is none."""
    folders = [_OUR_FOLDER, *(Path(str(module.__file__)).parent for module in (torch, np, *libraries))]
    others = (*(f"{folder}{os.sep}" for folder in folders), contextlib.__file__, "<")
    users = [f for f in frames if not f.filename.startswith(others)]
    if not users:
        return ""
    line = next((f for f in reversed(users) if not is_library(f.filename)), users[-1])
    return f", at {Path(line.filename).name}:{line.lineno} `{(line.line or '').strip()}`"
