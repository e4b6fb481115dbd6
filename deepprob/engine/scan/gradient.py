"""A cell of a recurrence, split for its gradient: what is kept, what is looped over, what is summed afterwards."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

_aten = torch.ops.aten
Tensors = tuple[Tensor, ...]
Nodes = list[Node]
Cell = Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]
Loop = Callable[[GraphModule, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], Tensors]


class Unsplittable(Exception):
    """A cell is not a pure, deterministic function of its arguments."""


class CellGradient:
    r"""A cell and its gradient, as graphs of tensor operations and what they take.

    The cell and its vector-Jacobian product are traced as one graph. What depends on a cotangent is linear in the
    cotangents; of the rest, what a linear operation needs is kept from the loop forwards:

    .. math:: (s_t, y_t, k_t) = f(s_{t-1}, x_t; \theta), \qquad
              (\bar s_{t-1}, \bar x_t, c_t) = L(k_t, x_t, \theta) \, (\bar s_t, \bar y_t), \qquad
              \bar\theta = \sum_t \bar\theta(k_t, c_t)

    Args:
        cell: From state, one slice of each input, and parameters, to new state and outputs.
        state: Before the first step.
        inputs: Of all steps, ``(T, ...)``.
        params: The same at every step.

    Attributes:
        states: Number of states.
        returned: Number of states and outputs.
        has_gradient: Whether anything needs one.

    Raises:
        Unsplittable: If the cell cannot be traced, is random, or has trained tensors of its own.
    """

    def __init__(self, cell: Cell, state: Tensors, inputs: Tensors, params: Tensors) -> None:
        self.has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (*state, *inputs, *params))
        with _disable_current_modes():
            self._joint = joint = _Joint(cell, (state, tuple(x[0] for x in inputs), params), self.has_gradient)
        self.states, self.returned = len(state), len(joint.new_state) + len(joint.outputs)
        self._sums = _Sums(joint, len(inputs[0]))
        collected = [g for g in joint.input_gradients if g is not None] + self._sums.collected
        self._collected = list(dict.fromkeys(collected))
        backward = [*joint.state_gradients, *self._sums.summed, *self._collected]
        slices, self._backward_fixed = joint.needs(backward, keep=True)
        self._slices = [*joint.seen, *slices]
        self._kept = [n for n in dict.fromkeys([*slices, *self._sums.kept]) if n not in {*joint.inputs, *joint.outputs}]
        forward = [*joint.new_state, *joint.outputs, *self._kept]
        _, self._forward_fixed = joint.needs(forward, keep=False)
        self._forward = joint.extract([*joint.state, *joint.inputs, *self._forward_fixed], forward)
        takes = [*joint.last, *self._slices, *self._backward_fixed]
        self._backward = joint.extract(takes, backward, self._sums.summed, len(joint.last), len(self._slices))
        fixed = [*self._forward_fixed, *self._backward_fixed, *self._sums.fixed]
        self._fixed = list(dict.fromkeys(fixed))
        self._hoisted = joint.extract([*joint.params, *joint.constants], self._fixed, fresh=False)

    def separate(self, everything: Sequence[Tensor]) -> tuple[Tensors, Tensors, Tensors]:
        """States, inputs and parameters, from all of them in a row."""
        a, b = len(self._joint.state), len(self._joint.inputs)
        return tuple(everything[:a]), tuple(everything[a : a + b]), tuple(everything[a + b :])

    def run(self, loop: Loop, everything: Sequence[Tensor]) -> Tensors:
        """Last states; outputs of all steps; what is kept of all steps."""
        states, inputs, params = self.separate(everything)
        fixed = self._values(params)
        return loop(self._forward, states, inputs, [fixed[n] for n in self._forward_fixed])

    def pull_back(
        self, loop: Loop, everything: Sequence[Tensor], stacks: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Gradients of states, inputs and parameters.

        Args:
            loop: What loops.
            everything: States, inputs and parameters.
            stacks: Outputs of all steps, and what was kept of them.
            cotangents: Of the last states and of the outputs.
        """
        joint = self._joint
        states, inputs, params = self.separate(everything)
        count, fixed = len(states), self._values(params)
        known = dict(zip([*joint.outputs, *self._kept], stacks, strict=True))
        known |= dict(zip([*joint.inputs, *joint.seen], [*inputs, *cotangents[count:]], strict=True))
        start = [x.contiguous() for x in cotangents[:count]]
        zeros = [inputs[0].new_zeros(_value(n).shape, dtype=_value(n).dtype) for n in self._sums.summed]
        # Read from behind, not turned round: that would copy all that was kept.
        index = torch.arange(len(inputs[0]) - 1, -1, -1, device=inputs[0].device)
        given = [*(known[n] for n in self._slices), *(fixed[n] for n in self._backward_fixed)]
        out = loop(self._backward, [*start, *zeros], [index], given)
        sums = dict(zip(self._sums.summed, out[count : count + len(zeros)], strict=True))
        collected = (x.flip(0) for x in out[count + len(zeros) :])
        known |= dict(zip(self._collected, collected, strict=True))
        totals = iter(self._sums.graph(*((sums | known | fixed)[n] for n in self._sums.takes)))
        return [
            *out[:count],
            *(None if g is None else known[g] for g in joint.input_gradients),
            *(None if g is None else next(totals) for g in joint.param_gradients),
        ]

    def _values(self, params: Tensors) -> dict[Node, Tensor]:
        return dict(zip(self._fixed, self._hoisted(*params, *self._joint.values), strict=True))


class _Joint:
    """A cell and its vector-Jacobian product as one graph, and which node is what."""

    def __init__(self, cell: Cell, groups: tuple[Tensors, Tensors, Tensors], gradient: bool) -> None:
        state, slices, params = groups
        trained = [gradient and x.requires_grad for x in (*slices, *params)]
        wanted = [gradient] * len(state) + trained
        a, b = len(state), len(state) + len(slices)

        def run(*arguments: Tensor) -> list[Tensor]:
            given, bars = arguments[: len(wanted)], arguments[len(wanted) :]
            leaves = [x.detach().requires_grad_(want) for x, want in zip(given, wanted, strict=True)]
            with torch.set_grad_enabled(gradient):
                new, outputs = cell(tuple(leaves[:a]), tuple(leaves[a:b]), tuple(leaves[b:]))
            returned = [*new, *outputs]
            if not bars:
                return returned
            pairs = [(y, bar) for y, bar in zip(returned, bars, strict=True) if y.requires_grad]
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
                bars = [torch.zeros_like(y) for y in returned] if gradient else []
                graph = make_fx(run, tracing_mode="real", _allow_non_fake_inputs=True)(*flat, *bars)
                self.values = _lift_constants(graph)
                with torch.no_grad():
                    graph = make_fx(torch.func.functionalize(graph))(*flat, *bars, *self.values)
        except Unsplittable:
            raise
        except Exception as error:
            raise Unsplittable(str(error)) from error
        graph.graph.eliminate_dead_code()
        _check(graph)
        self.graph = graph
        count = len(returned) - len(state)
        sizes = [len(state), len(slices), len(params), *((len(state), count) if gradient else (0, 0)), len(self.values)]
        nodes = iter(graph.graph.find_nodes(op="placeholder"))
        self.state, self.inputs, self.params, self.last, self.seen, self.constants = (
            [next(nodes) for _ in range(size)] for size in sizes
        )
        results = iter(graph.graph.find_nodes(op="output")[0].args[0])
        self.new_state, self.outputs = ([next(results) for _ in range(size)] for size in (len(state), count))
        self.state_gradients: Nodes = [next(results) for _ in self.last]
        gradients = [next(results) if want else None for want in trained]
        self.input_gradients: list[Node | None] = gradients[: len(slices)]
        self.param_gradients: list[Node | None] = gradients[len(slices) :]
        self.linear, self.fixed = self._sort()

    def _sort(self) -> tuple[set[Node], set[Node]]:
        """What is linear in the cotangents, and what is the same at every step."""
        linear, fixed = {*self.last, *self.seen}, {*self.params, *self.constants}
        for node in self.graph.graph.nodes:
            before = set(node.all_input_nodes)
            if before & linear:
                linear.add(node)
            elif node.op == "call_function" and before <= fixed:
                fixed.add(node)
        return linear, fixed

    def needs(self, results: Iterable[Node], keep: bool) -> tuple[Nodes, Nodes]:
        """What has to be there to compute some results step by step: slices, and what is the same at every step.

        Args:
            results: What is computed.
            keep: Whether what does not depend on a cotangent is there, rather than computed again; views are always
                taken again.
        """
        slices, fixed, done = set(), set(), set()
        waiting = list(results)
        while waiting:
            node = waiting.pop()
            if node in done:
                continue
            done.add(node)
            settled = node.op == "placeholder" or not _is_view(node)
            if node in self.fixed and settled:
                fixed.add(node)
            elif node not in self.fixed and node not in self.linear and keep and settled:
                slices.add(node)
            else:
                waiting.extend(node.all_input_nodes)
        nodes = list(self.graph.graph.nodes)
        return [n for n in nodes if n in slices], [n for n in nodes if n in fixed]

    def extract(
        self, takes: Nodes, gives: Nodes, summed: Sequence[Node] = (), at: int = 0, indexed: int = 0, fresh: bool = True
    ) -> GraphModule:
        """The part of the graph between some nodes and others.

        Args:
            takes: What is given.
            gives: What is returned.
            summed: Those of the returned that are added to sums so far, which are given as well.
            at: Where among the given the sums stand.
            indexed: How many of the given that follow come as stacks of all steps, with the step's number before them.
            fresh: Whether what is returned shares memory with nothing else.
        """
        graph = Graph()
        env = {node: graph.placeholder(node.name) for node in takes[:at]}
        sums = {node: graph.placeholder(f"sum_{node.name}") for node in summed}
        index = [graph.placeholder("index")] if indexed else []
        env |= {node: graph.placeholder(node.name) for node in takes[at:]}
        given = set(env.values())
        for node in takes[at : at + indexed]:
            number = graph.call_function(_aten.reshape.default, (index[0], [1]))
            row = graph.call_function(_aten.index_select.default, (env[node], 0, number))
            env[node] = graph.call_function(_aten.squeeze.dim, (row, 0))
        waiting, needed = list(gives), set()
        while waiting:
            node = waiting.pop()
            if node not in env and node not in needed:
                needed.add(node)
                waiting.extend(node.all_input_nodes)
        for node in self.graph.graph.nodes:
            if node in needed:
                env[node] = graph.node_copy(node, env.__getitem__)
        out: Nodes = []
        for i, node in enumerate(gives):
            value = env[node]
            if at <= i < at + len(sums):
                value = graph.call_function(_aten.add.Tensor, (sums[node], value))
            elif fresh and (value in out or value in given or _is_view(value)):
                value = graph.call_function(_aten.clone.default, (value,), {"memory_format": torch.contiguous_format})
            out.append(value)
        graph.output(tuple(out))
        graph.eliminate_dead_code()
        return GraphModule(self.graph, graph)


class _Sums:
    """The graph that adds up, after the loop, what each step contributes to the gradients of the parameters.

    Matrix products and sums over a batch become one over batch and time; what is linear in them comes after; anything
    else is added up in the loop.

    Attributes:
        graph: The sums.
        takes: What it is given: nodes added up in the loop, nodes of all steps, and nodes that are fixed.
        summed: What is added up in the loop.
        collected: What the loop backwards has to collect.
        kept: What the loop forwards has to keep.
        fixed: What is the same at every step.
    """

    def __init__(self, joint: _Joint, steps: int) -> None:
        self._joint, self._steps, self._graph = joint, steps, Graph()
        self._given: dict[Node, Node] = {}
        self._totals: dict[Node, Node] = {}
        self.summed: Nodes = []
        self.collected: Nodes = []
        self.kept: Nodes = []
        self.fixed: Nodes = []
        self._graph.output(())
        totals = [self._total(g) for g in joint.param_gradients if g is not None]
        self._graph.output_node().args = (tuple(totals),)
        self.takes = list(self._given)
        self.graph = GraphModule(joint.graph, self._graph)

    def _take(self, node: Node, among: Nodes) -> Node:
        """A node's value is given; it is listed among those that have to be."""
        if node not in self._given:
            among.append(node)
            before = list(self._given.values())
            with self._graph.inserting_after(before[-1]) if before else self._graph.inserting_before():
                self._given[node] = self._graph.placeholder(node.name)
        return self._given[node]

    def _call(self, target: Any, *args: Any) -> Node:
        with self._graph.inserting_before(self._graph.output_node()):
            return self._graph.call_function(target, args)

    def _total(self, node: Node) -> Node:
        """The sum of a node over all steps."""
        if node not in self._totals:
            self._totals[node] = self._sum(node)
        return self._totals[node]

    def _sum(self, node: Node) -> Node:
        target, args = node.target, node.args
        if node in self._joint.fixed:
            return self._call(_aten.mul.Tensor, self._take(node, self.fixed), self._steps)
        if target in _PASSED:
            return self._call(target, self._total(cast(Node, args[0])), *args[1:])
        if target is _aten.add.Tensor and not node.kwargs and all(isinstance(x, Node) for x in args):
            return self._call(target, *(self._total(cast(Node, x)) for x in args))
        if target in (_aten.mul.Tensor, _aten.mm.default):
            varying = [isinstance(x, Node) and x not in self._joint.fixed for x in args]
            if sum(varying) == 1:
                return self._call(
                    target,
                    *(self._total(cast(Node, x)) if v else self._same(x) for x, v in zip(args, varying, strict=True)),
                )
            if target is _aten.mm.default:
                return self._product(cast(Node, args[0]), cast(Node, args[1]))
        if target is _aten.sum.dim_IntList and not node.kwargs:
            rank = _value(cast(Node, args[0])).dim()
            over: Any = args[1]
            dims = [d % rank + 1 for d in over]
            return self._call(target, self._call(target, self._stack(cast(Node, args[0])), dims, *args[2:]), [0])
        return self._take(node, self.summed)

    def _same(self, x: Any) -> Any:
        """What does not depend on the step."""
        return self._take(x, self.fixed) if isinstance(x, Node) else x

    def _product(self, a: Node, b: Node) -> Node:
        """The sum over time of products is a product over batch and time."""
        left, right = self._stack(a), self._stack(b)  # (T, m, k), (T, k, n)
        m, n = _value(a).shape[0], _value(b).shape[1]
        left = self._call(_aten.reshape.default, self._call(_aten.permute.default, left, [1, 0, 2]), [m, -1])
        return self._call(_aten.mm.default, left, self._call(_aten.reshape.default, right, [-1, n]))

    def _stack(self, node: Node) -> Node:
        """A node at all steps, ``(T, ...)``."""
        base, joint = (node.args or (None,))[0], self._joint
        if isinstance(base, Node):
            if node.target is _aten.t.default:
                return self._call(_aten.transpose.int, self._stack(base), 1, 2)
            if node.target is _aten.detach.default:
                return self._stack(base)
            if node.target in (_aten.view.default, _aten.reshape.default):
                return self._call(_aten.reshape.default, self._stack(base), [self._steps, *node.args[1]])  # type: ignore[misc]
        if node in {*joint.seen, *joint.inputs}:
            return self._take(node, [])
        return self._take(node, self.collected if node in joint.linear else self.kept)


_PASSED = (
    *(_aten.t.default, _aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.permute.default),
    *(_aten.transpose.int, _aten.squeeze.dim, _aten.unsqueeze.default, _aten.detach.default, _aten.neg.default),
)


def _value(node: Node) -> Tensor:
    """What a node is like: its shape and dtype."""
    value: Tensor = node.meta["val"]
    return value


def _is_view(node: Node) -> bool:
    if node.target is operator.getitem:
        return _is_view(cast(Node, node.args[0]))
    return isinstance(node.target, OpOverload) and node.target.is_view


def _lift_constants(graph: GraphModule) -> list[Tensor]:
    """Make inputs of a graph's constants; returns their values."""
    values: list[Tensor] = []
    placed: dict[Any, Node] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        value = getattr(graph, node.target)
        if not isinstance(value, Tensor) or value.requires_grad:
            raise Unsplittable("the cell has trained tensors of its own")
        if node.target not in placed:
            values.append(value)
            with graph.graph.inserting_after(graph.graph.find_nodes(op="placeholder")[-1]):
                placed[node.target] = graph.graph.placeholder(f"constant_{len(values)}")
        node.replace_all_uses_with(placed[node.target])
        graph.graph.erase_node(node)
    graph.recompile()
    return values


def _check(graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        if isinstance(node.target, OpOverload):
            if torch.Tag.nondeterministic_seeded in node.target.tags:
                raise Unsplittable("the cell is random")
            if node.target._schema.is_mutable:
                raise Unsplittable("the cell changes its arguments")
        elif node.op == "get_attr":
            raise Unsplittable("the cell has constants")
