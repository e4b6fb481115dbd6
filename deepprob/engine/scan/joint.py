"""A recurrent cell and its vector-Jacobian product traced as one graph, and subgraphs of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from deepprob.engine.scan.operator import Tensors
from deepprob.engine.trace import lift_constants

_aten = torch.ops.aten
Nodes = list[Node]
Cell = Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]


class Unsplittable(Exception):
    """A cell is not a pure, deterministic function of its arguments."""


class JointGraph:
    """A cell and its vector-Jacobian product as one graph.

    Args:
        cell: A function from state, one slice of each input, and parameters, to new state and outputs.
        groups: Examples of its three arguments.
        gradient: Whether to trace the vector-Jacobian product too.

    Attributes:
        graph: The graph.
        values: Values of the constants.
        state: Input nodes of the state; ``inputs``, ``params`` and ``constants`` likewise.
        state_cotangents: Input nodes of the new state's cotangents; ``output_cotangents`` likewise.
        new_state: Result nodes of the new state; ``outputs`` likewise.
        state_gradients: Result nodes of the state's gradients; ``input_gradients`` and ``param_gradients`` likewise,
            with None where no gradient is needed.
        linear: Nodes that depend on a cotangent; they are linear in the cotangents.
        fixed: Nodes that are the same at every step.

    Raises:
        Unsplittable: If the cell cannot be traced, is random, or has trained tensors of its own.
    """

    def __init__(self, cell: Cell, groups: tuple[Tensors, Tensors, Tensors], gradient: bool) -> None:
        state, slices, params = groups
        trained = [gradient and x.requires_grad for x in (*slices, *params)]
        self.graph, self.values, returned = _trace(cell, groups, [gradient] * len(state) + trained, gradient)
        count = returned - len(state)
        sizes = [len(state), len(slices), len(params), *((len(state), count) if gradient else (0, 0)), len(self.values)]
        nodes = iter(self.graph.graph.find_nodes(op="placeholder"))
        self.state, self.inputs, self.params, self.state_cotangents, self.output_cotangents, self.constants = (
            [next(nodes) for _ in range(size)] for size in sizes
        )
        results = iter(self.graph.graph.find_nodes(op="output")[0].args[0])
        self.new_state, self.outputs = ([next(results) for _ in range(size)] for size in (len(state), count))
        self.state_gradients: Nodes = [next(results) for _ in self.state_cotangents]
        gradients = [next(results) if want else None for want in trained]
        self.input_gradients: list[Node | None] = gradients[: len(slices)]
        self.param_gradients: list[Node | None] = gradients[len(slices) :]
        self.linear, self.fixed = self._classify()

    def _classify(self) -> tuple[set[Node], set[Node]]:
        """The nodes that depend on a cotangent, and the nodes that are the same at every step."""
        linear, fixed = {*self.state_cotangents, *self.output_cotangents}, {*self.params, *self.constants}
        for node in self.graph.graph.nodes:
            before = set(node.all_input_nodes)
            if before & linear:
                linear.add(node)
            elif node.op == "call_function" and before <= fixed:
                fixed.add(node)
        return linear, fixed

    def required(self, results: Iterable[Node], keep: bool) -> tuple[Nodes, Nodes]:
        """Inputs needed to compute ``results`` at one step: per-step slices, and fixed values.

        Args:
            results: The nodes to compute.
            keep: Whether values that depend on no cotangent are kept from the loop forwards, instead of computed
                again. Views are always computed again.
        """
        slices, fixed, done = set(), set(), set()
        waiting = list(results)
        while waiting:
            node = waiting.pop()
            if node in done:
                continue
            done.add(node)
            owns_memory = node.op == "placeholder" or not is_view(node)
            if node in self.fixed and owns_memory:
                fixed.add(node)
            elif node not in self.fixed and node not in self.linear and keep and owns_memory:
                slices.add(node)
            else:
                waiting.extend(node.all_input_nodes)
        nodes = list(self.graph.graph.nodes)
        return [n for n in nodes if n in slices], [n for n in nodes if n in fixed]

    def extract(
        self,
        given: Nodes,
        results: Nodes,
        summed: Sequence[Node] = (),
        at: int = 0,
        indexed: int = 0,
        fresh: bool = True,
    ) -> GraphModule:
        """Copy the part of the graph that computes some nodes from others.

        Args:
            given: The nodes that become inputs.
            results: The nodes that are returned.
            summed: The results that are added to running sums, which become inputs too.
            at: The position of the running sums, both among the inputs and among the results.
            indexed: The number of inputs after the running sums that are stacks over all steps. The step's index is
                one more input before them.
            fresh: Whether to clone results that share memory with another tensor.
        """
        graph = Graph()
        env = {node: graph.placeholder(node.name) for node in given[:at]}
        sums = {node: graph.placeholder(f"sum_{node.name}") for node in summed}
        index = [graph.placeholder("index")] if indexed else []
        env |= {node: graph.placeholder(node.name) for node in given[at:]}
        placeholders = set(env.values())
        for node in given[at : at + indexed]:
            number = graph.call_function(_aten.reshape.default, (index[0], [1]))
            row = graph.call_function(_aten.index_select.default, (env[node], 0, number))
            env[node] = graph.call_function(_aten.squeeze.dim, (row, 0))
        waiting, needed = list(results), set()
        while waiting:
            node = waiting.pop()
            if node not in env and node not in needed:
                needed.add(node)
                waiting.extend(node.all_input_nodes)
        for node in self.graph.graph.nodes:
            if node in needed:
                env[node] = graph.node_copy(node, env.__getitem__)
        out: Nodes = []
        for i, node in enumerate(results):
            value = env[node]
            if at <= i < at + len(sums):
                value = graph.call_function(_aten.add.Tensor, (sums[node], value))
            elif fresh and (value in out or value in placeholders or is_view(value)):
                value = graph.call_function(_aten.clone.default, (value,), {"memory_format": torch.contiguous_format})
            out.append(value)
        graph.output(tuple(out))
        graph.eliminate_dead_code()
        return GraphModule(self.graph, graph)


def value_of(node: Node) -> Tensor:
    """The example value of a node, which has its shape and dtype."""
    value: Tensor = node.meta["val"]
    return value


def is_view(node: Node) -> bool:
    """Whether a node's value is a view of another tensor."""
    if node.target is operator.getitem:
        return is_view(cast(Node, node.args[0]))
    return isinstance(node.target, OpOverload) and node.target.is_view


def _trace(
    cell: Cell, groups: tuple[Tensors, Tensors, Tensors], wanted: Sequence[bool], gradient: bool
) -> tuple[GraphModule, list[Tensor], int]:
    """Trace a cell, and its vector-Jacobian product if there is to be a gradient.

    Args:
        cell: The cell.
        groups: Examples of its arguments.
        wanted: Whether each argument needs a gradient.
        gradient: Whether any does.

    Returns:
        The graph, the values of its constants, which are its last inputs, and the number of new states and outputs.
    """
    a, b = len(groups[0]), len(groups[0]) + len(groups[1])

    def run(*arguments: Tensor) -> list[Tensor]:
        given, cotangents = arguments[: len(wanted)], arguments[len(wanted) :]
        leaves = [x.detach().requires_grad_(want) for x, want in zip(given, wanted, strict=True)]
        with torch.set_grad_enabled(gradient):
            new, outputs = cell(tuple(leaves[:a]), tuple(leaves[a:b]), tuple(leaves[b:]))
        returned = [*new, *outputs]
        if not cotangents:
            return returned
        pairs = [(y, bar) for y, bar in zip(returned, cotangents, strict=True) if y.requires_grad]
        targets = [x for x in leaves if x.requires_grad]
        gradients = torch.autograd.grad(
            [y for y, _ in pairs], targets, [bar for _, bar in pairs], allow_unused=True, materialize_grads=True
        )
        return [*returned, *gradients]

    flat = [x.detach().clone() for group in groups for x in group]
    devices = {x.get_device() for x in flat if x.is_cuda}
    try:
        with torch.random.fork_rng(devices):
            returned = run(*flat)
            cotangents = [torch.zeros_like(y) for y in returned] if gradient else []
            graph = make_fx(run, tracing_mode="real", _allow_non_fake_inputs=True)(*flat, *cotangents)
            _check_constants(graph)
            values = lift_constants(graph)
            with torch.no_grad():
                graph = make_fx(torch.func.functionalize(graph))(*flat, *cotangents, *values)
    except Unsplittable:
        raise
    except Exception as error:
        raise Unsplittable(str(error)) from error
    graph.graph.eliminate_dead_code()
    _check_pure(graph)
    return graph, values, len(returned)


def _check_constants(graph: GraphModule) -> None:
    """Refuse a cell that closes over trained tensors, or over objects that are no tensors."""
    for node in graph.graph.find_nodes(op="get_attr"):
        value = getattr(graph, node.target)
        if not isinstance(value, Tensor) or value.requires_grad:
            raise Unsplittable("the cell has trained tensors of its own")


def _check_pure(graph: GraphModule) -> None:
    """Refuse a cell that is random, changes its arguments or keeps constants."""
    for node in graph.graph.nodes:
        if isinstance(node.target, OpOverload):
            if torch.Tag.nondeterministic_seeded in node.target.tags:
                raise Unsplittable("the cell is random")
            if node.target._schema.is_mutable:
                raise Unsplittable("the cell changes its arguments")
        elif node.op == "get_attr":
            raise Unsplittable("the cell has constants")
