"""From a graph of tensor operations to C++, without tracing it time and again.

On the documented way, `torch.export` and then torch's compiler trace a loop and all that is in it several times, check
it, and trace it once more. Here it is traced once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop_op
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from deepprob.engine.dynamic_length import Lengths
from deepprob.engine.scan.operator import as_scan


class Repeated(nn.Module):
    """A graph, again and again, until it has been taken as often as one of its inputs says.

    Args:
        body: From all that is carried and captured to all that is carried, whose first tensor counts.
        carried: How many of its inputs are carried.
        count: Which input says how often.
    """

    def __init__(self, body: GraphModule, carried: int, count: int) -> None:
        super().__init__()
        self.body, self.carried, self.count = body, carried, count

    @property
    def code(self) -> str:
        """What is done in a step."""
        graphs = [module for module in self.body.modules() if isinstance(module, GraphModule)]
        return "".join(graph.code for graph in graphs)

    def is_on(self, *inputs: Tensor) -> Tensor:
        """Whether there is another step."""
        return inputs[0] < inputs[self.count]

    def forward(self, *inputs: Tensor) -> Any:
        carried, captured = inputs[: self.carried], inputs[self.carried :]
        # The operator itself: the function around it would trace the step once more.
        return while_loop_op(self.is_on, lambda *x: tuple(self.body(*x)), carried, captured)  # type: ignore[arg-type]


def lower(
    module: nn.Module,
    inputs: Sequence[Tensor],
    lengths: Lengths,
    folder: Path,
    settings: Any,
) -> list[str]:
    """A shared library for a module of tensor operations on a CPU.

    Args:
        module: A graph, or one that is `Repeated`; it writes to none of its inputs.
        inputs: An example of its inputs, with sequences of the longest length.
        lengths: Which of them hold sequences of any length between two.
        folder: Where the files go.
        settings: Of torch's compiler.

    Returns:
        The files: a shared library, and what torch wants to know of it.

    Raises:
        ValueError: If an input is written to, what is carried shares memory, or there is no code for all lengths.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._inductor import config
    from torch._inductor.compile_fx import _recursive_joint_graph_passes, _recursive_post_grad_passes, compile_fx_inner
    from torch._inductor.utils import BoxedBool
    from torch._inductor.virtualized import V
    from torch.fx.experimental import _config as size_config
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    settings = {
        **settings,
        "cpp_wrapper": True,
        "aot_inductor.precompile_headers": False,  # pays only after many steps
        "aot_inductor.output_path": str(folder),
    }
    mode = FakeTensorMode(shape_env=ShapeEnv())
    shapes = _shapes(inputs, lengths, mode)
    with enable_python_dispatcher():
        loop = isinstance(module, Repeated)
        graph = _loop(module, shapes, mode) if isinstance(module, Repeated) else _traced(module, shapes, mode)
        # The code that is written is to be right for all lengths, not only chosen well for one of them.
        for_all = size_config.patch(backed_size_oblivious=bool(lengths))  # type: ignore[attr-defined]
        with config.patch(settings), for_all, V.set_aot_compilation(True), V.set_fake_mode(mode):
            graph = _recursive_joint_graph_passes(graph, input_device=inputs[0].device)
            if loop:
                # Nothing is to be gained around it, and the compiler would look through all that is in it once more.
                _recursive_post_grad_passes(graph.body, is_inference=True)  # type: ignore[arg-type]
            (output,) = graph.graph.find_nodes(op="output")
            output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))
            with config.patch(use_post_grad_passes=not loop):
                lowered = compile_fx_inner(
                    graph, shapes, cudagraphs=BoxedBool(False), is_inference=True, cpp_wrapper=True, aot_mode=True
                )
    _check(mode, shapes, inputs, lengths)
    files: list[str] = lowered.filename  # type: ignore[attr-defined]
    return files


def _shapes(inputs: Sequence[Tensor], lengths: Lengths, mode: FakeTensorMode) -> list[Tensor]:
    """The inputs without their numbers, and with one unknown for the length of sequences."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    shapes: list[Tensor] = []
    for i, x in enumerate(inputs):
        if i not in lengths:
            shapes.append(mode.from_tensor(x, static_shapes=True))
            continue
        shortest, longest = lengths[i]
        # At an end of the range torch has been seen to take the length for a constant.
        example = x[:, : (shortest + longest) // 2]
        sizes = [DimDynamic.DUCK if d == 1 else DimDynamic.STATIC for d in range(x.ndim)]  # DUCK: all of them alike
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        shape = mode.from_tensor(example, symbolic_context=context, source=ConstantSource(f"input_{i}"))
        length: Any = shape.shape[1]
        mode.shape_env.constrain_symbol_range(length.node.expr, shortest, longest)  # type: ignore[union-attr]
        shapes.append(shape)
    return shapes


def _check(mode: FakeTensorMode, shapes: Sequence[Tensor], inputs: Sequence[Tensor], lengths: Lengths) -> None:
    """See that what was taken for granted on the way is true of all lengths.

    Raises:
        ValueError: If it is not.
    """
    env: Any = mode.shape_env
    for i, (shortest, longest) in lengths.items():
        length: Any = shapes[i].shape[1]
        if not isinstance(length, torch.SymInt) or not length.node.expr.is_Symbol:
            raise ValueError("a length turned out to be fixed")
        pairs: Any = zip(shapes[i].stride(), inputs[i].stride(), strict=True)
        strides = {known.node.expr: stride for known, stride in pairs if isinstance(known, torch.SymInt)}
        for guard in dict.fromkeys(guard.expr for guard in env.guards):
            for each in range(shortest, longest + 1):
                if not guard.subs({**strides, length.node.expr: each}):
                    raise ValueError(f"{guard} is not true of a length of {each}")


def _traced(function: Callable[..., Any], shapes: Sequence[Tensor], mode: FakeTensorMode) -> GraphModule:
    """A graph of the operations that torch's compiler knows how to turn into C++."""
    from torch._inductor.decomposition import select_decomp_table

    table = select_decomp_table()
    with torch.no_grad(), mode, as_scan():
        graph = make_fx(function, decomposition_table=table)(*shapes)
        if _writes(graph):
            # Some operations, a batch norm for one, are defined by what they write to a copy; the compiler takes all
            # copies for superfluous. In loops over time this puts more copies, so it is done where it must be.
            graph = make_fx(torch.func.functionalize(graph), decomposition_table=table)(*shapes)
    if _writes(graph):
        raise ValueError("one of its inputs is written to")
    return graph


def _writes(module: nn.Module) -> bool:
    nodes = [node for graph in module.modules() if isinstance(graph, GraphModule) for node in graph.graph.nodes]
    return any(isinstance(node.target, OpOverload) and node.target._schema.is_mutable for node in nodes)


def _loop(module: Repeated, shapes: Sequence[Tensor], mode: FakeTensorMode) -> GraphModule:
    """A graph of one operation, the loop."""
    root, graph, carried = nn.Module(), Graph(), module.carried
    root.body, root.is_on = (_traced(f, shapes, mode) for f in (module.body, module.is_on))
    inputs = [graph.placeholder(f"x{i}") for i in range(len(shapes))]
    functions = graph.get_attr("is_on"), graph.get_attr("body")
    loop = graph.call_function(while_loop_op, (*functions, tuple(inputs[:carried]), tuple(inputs[carried:])))
    (output,) = root.body.graph.find_nodes(op="output")
    after = tuple(node.meta["val"] for node in output.args[0])
    before = (node.meta["val"] for node in root.body.graph.find_nodes(op="placeholder"))
    memory = [{x.untyped_storage()._cdata for x in group} for group in (before, after)]
    if len(memory[1]) < len(after) or memory[0] & memory[1]:
        raise ValueError("what is carried shares memory")  # the compiled loop would write to what is still read
    outputs = [graph.call_function(operator.getitem, (loop, i)) for i in range(len(after))]
    graph.output(tuple(outputs))
    for node, value in zip([*inputs, loop, *outputs], [*shapes, after, *after], strict=True):
        node.meta["val"] = value
    return GraphModule(root, graph)
