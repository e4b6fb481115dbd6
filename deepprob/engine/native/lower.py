"""Turn a graph of tensor operations into C++ with a single trace.

The documented way, `torch.export` followed by torch's compiler, traces a loop and its body several times.
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
    """Repeat a graph as often as one of its inputs says.

    Args:
        body: One iteration, from carried and captured tensors to carried tensors. The first carried tensor counts the
            iterations.
        carried: The number of carried inputs; the captured ones follow.
        count: The index of the input that holds the number of iterations.
    """

    def __init__(self, body: GraphModule, carried: int, count: int) -> None:
        super().__init__()
        self.body, self.carried, self.count = body, carried, count

    @property
    def code(self) -> str:
        """The code of one iteration, inner loops included."""
        graphs = [module for module in self.body.modules() if isinstance(module, GraphModule)]
        return "".join(graph.code for graph in graphs)

    def is_on(self, *inputs: Tensor) -> Tensor:
        """Whether there is another iteration."""
        return inputs[0] < inputs[self.count]

    def forward(self, *inputs: Tensor) -> Any:
        carried, captured = inputs[: self.carried], inputs[self.carried :]
        # The public function `while_loop` would trace the body once more; the operator does not.
        return while_loop_op(self.is_on, lambda *x: tuple(self.body(*x)), carried, captured)  # type: ignore[arg-type]


def lower(
    module: nn.Module,
    inputs: Sequence[Tensor],
    lengths: Lengths,
    folder: Path,
    settings: Any,
) -> list[str]:
    """Compile a module of tensor operations for a CPU.

    Args:
        module: A graph, or a `Repeated` graph. It must not write to its inputs.
        inputs: Example inputs, with sequences of the longest length.
        lengths: The inputs that hold sequences, and the range of their lengths.
        folder: The folder for the files.
        settings: Settings of torch's compiler.

    Returns:
        Paths of the files: the C++ source, the shared library, and torch's metadata.

    Raises:
        ValueError: If the module writes to an input, if carried tensors share memory, or if the code would not be
            right for all lengths.
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
        # Otherwise the compiler may choose code that is right at the example's length only.
        for_all = size_config.patch(backed_size_oblivious=bool(lengths))  # type: ignore[attr-defined]
        with config.patch(settings), for_all, V.set_aot_compilation(True), V.set_fake_mode(mode):
            graph = _recursive_joint_graph_passes(graph, input_device=inputs[0].device)
            if loop:
                # The graph around the loop is trivial; a pass over it would process the loop's body a second time.
                _recursive_post_grad_passes(graph.body, is_inference=True)  # type: ignore[arg-type]
            (output,) = graph.graph.find_nodes(op="output")
            output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))
            with config.patch(use_post_grad_passes=not loop):
                lowered = compile_fx_inner(
                    graph, shapes, cudagraphs=BoxedBool(False), is_inference=True, cpp_wrapper=True, aot_mode=True
                )
    _check_guards(mode, shapes, inputs, lengths)
    files: list[str] = lowered.filename  # type: ignore[attr-defined]
    return files


def _shapes(inputs: Sequence[Tensor], lengths: Lengths, mode: FakeTensorMode) -> list[Tensor]:
    """Fake tensors for the inputs, with one symbol for the length of all sequences."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    shapes: list[Tensor] = []
    for i, x in enumerate(inputs):
        if i not in lengths:
            shapes.append(mode.from_tensor(x, static_shapes=True))
            continue
        shortest, longest = lengths[i]
        # At an end of the range torch may treat the length as a constant.
        example = x[:, : (shortest + longest) // 2]
        sizes = [DimDynamic.DUCK if d == 1 else DimDynamic.STATIC for d in range(x.ndim)]  # DUCK: one symbol for all
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        shape = mode.from_tensor(example, symbolic_context=context, source=ConstantSource(f"input_{i}"))
        length: Any = shape.shape[1]
        mode.shape_env.constrain_symbol_range(length.node.expr, shortest, longest)  # type: ignore[union-attr]
        shapes.append(shape)
    return shapes


def _check_guards(mode: FakeTensorMode, shapes: Sequence[Tensor], inputs: Sequence[Tensor], lengths: Lengths) -> None:
    """Check that the compiler's assumptions about shapes hold for all lengths.

    Raises:
        ValueError: If one does not.
    """
    env: Any = mode.shape_env
    for i, (shortest, longest) in lengths.items():
        length: Any = shapes[i].shape[1]
        if not isinstance(length, torch.SymInt) or not length.node.expr.is_Symbol:
            raise ValueError("torch's compiler fixed the length of sequences")
        pairs: Any = zip(shapes[i].stride(), inputs[i].stride(), strict=True)
        strides = {known.node.expr: stride for known, stride in pairs if isinstance(known, torch.SymInt)}
        for guard in dict.fromkeys(guard.expr for guard in env.guards):
            for each in range(shortest, longest + 1):
                if not guard.subs({**strides, length.node.expr: each}):
                    raise ValueError(f"the compiler assumes {guard}, which does not hold at length {each}")


def _traced(function: Callable[..., Any], shapes: Sequence[Tensor], mode: FakeTensorMode) -> GraphModule:
    """Trace a function into the operations that torch's compiler turns into C++."""
    from torch._inductor.decomposition import select_decomp_table

    table = select_decomp_table()
    with torch.no_grad(), mode, as_scan():
        graph = make_fx(function, decomposition_table=table)(*shapes)
        if _writes(graph):
            # The decompositions of some operations, such as batch norm, write to a copy, and the compiler removes all
            # copies. Functionalising adds copies to loops over time, so it is done only where it is needed.
            graph = make_fx(torch.func.functionalize(graph), decomposition_table=table)(*shapes)
    if _writes(graph):
        raise ValueError("the module writes to one of its inputs")
    return graph


def _writes(module: nn.Module) -> bool:
    nodes = [node for graph in module.modules() if isinstance(graph, GraphModule) for node in graph.graph.nodes]
    return any(isinstance(node.target, OpOverload) and node.target._schema.is_mutable for node in nodes)


def _loop(module: Repeated, shapes: Sequence[Tensor], mode: FakeTensorMode) -> GraphModule:
    """A graph of one operation, the loop over iterations."""
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
        raise ValueError("carried tensors share memory")  # the compiled loop would overwrite tensors still to be read
    outputs = [graph.call_function(operator.getitem, (loop, i)) for i in range(len(after))]
    graph.output(tuple(outputs))
    for node, value in zip([*inputs, loop, *outputs], [*shapes, after, *after], strict=True):
        node.meta["val"] = value
    return GraphModule(root, graph)
