"""Gradients of a recurrence's parameters: sums over time, most of them taken after the loop."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

from deepprob.engine.scan.joint import JointGraph, Nodes, value_of

_aten = torch.ops.aten


class ParameterSums:
    """A graph that sums the contributions of all steps to the gradients of the parameters, after the loop backwards.

    A sum over time of matrix products becomes one matrix product over batch and time, and a sum of sums over the batch
    one sum over both. Operations that are linear in these sums come after them. Anything else is summed in the loop.

    Args:
        joint: The cell and its vector-Jacobian product.
        steps: The number of steps.

    Attributes:
        graph: The graph, from the values of ``takes`` to one gradient for each trained parameter.
        takes: Nodes whose values the graph takes: ``summed``, stacks over all steps, and ``fixed``.
        summed: Nodes that the loop backwards sums.
        collected: Nodes that the loop backwards returns for every step.
        kept: Nodes that the loop forwards returns for every step.
        fixed: Nodes that are the same at every step.
    """

    def __init__(self, joint: JointGraph, steps: int) -> None:
        self._joint, self._steps, self._graph = joint, steps, Graph()
        self._placeholders: dict[Node, Node] = {}
        self._totals: dict[Node, Node] = {}
        self.summed: Nodes = []
        self.collected: Nodes = []
        self.kept: Nodes = []
        self.fixed: Nodes = []
        self._graph.output(())
        totals = [self._total(g) for g in joint.param_gradients if g is not None]
        self._graph.output_node().args = (tuple(totals),)
        self.takes = list(self._placeholders)
        self.graph = GraphModule(joint.graph, self._graph)

    def _take(self, node: Node, group: Nodes) -> Node:
        """The placeholder for a node's value; the first call adds the node to ``group``."""
        if node not in self._placeholders:
            group.append(node)
            before = list(self._placeholders.values())
            with self._graph.inserting_after(before[-1]) if before else self._graph.inserting_before():
                self._placeholders[node] = self._graph.placeholder(node.name)
        return self._placeholders[node]

    def _call(self, target: Any, *args: Any) -> Node:
        """Append an operation to the graph."""
        with self._graph.inserting_before(self._graph.output_node()):
            return self._graph.call_function(target, args)

    def _total(self, node: Node) -> Node:
        """The sum of a node over all steps, computed once."""
        if node not in self._totals:
            self._totals[node] = self._sum(node)
        return self._totals[node]

    def _sum(self, node: Node) -> Node:
        """The sum of a node over all steps, by the rule for its operation."""
        target, args = node.target, node.args
        if node in self._joint.fixed:
            return self._call(_aten.mul.Tensor, self._take(node, self.fixed), self._steps)
        if target in _LINEAR:
            return self._call(target, self._total(cast(Node, args[0])), *args[1:])
        if target is _aten.add.Tensor and not node.kwargs and all(isinstance(x, Node) for x in args):
            return self._call(target, *(self._total(cast(Node, x)) for x in args))
        if target in (_aten.mul.Tensor, _aten.mm.default):
            varying = [isinstance(x, Node) and x not in self._joint.fixed for x in args]
            if sum(varying) == 1:
                return self._call(
                    target,
                    *(
                        self._total(cast(Node, x)) if v else self._constant(x)
                        for x, v in zip(args, varying, strict=True)
                    ),
                )
            if target is _aten.mm.default:
                return self._product(cast(Node, args[0]), cast(Node, args[1]))
        if target is _aten.sum.dim_IntList and not node.kwargs:
            rank = value_of(cast(Node, args[0])).dim()
            over: Any = args[1]
            dims = [d % rank + 1 for d in over]
            return self._call(target, self._call(target, self._stack(cast(Node, args[0])), dims, *args[2:]), [0])
        return self._take(node, self.summed)

    def _constant(self, x: Any) -> Any:
        """An argument that is the same at every step: a fixed node's value, or a number."""
        return self._take(x, self.fixed) if isinstance(x, Node) else x

    def _product(self, a: Node, b: Node) -> Node:
        """The sum over time of matrix products, as one product over batch and time."""
        left, right = self._stack(a), self._stack(b)  # (T, m, k), (T, k, n)
        m, n = value_of(a).shape[0], value_of(b).shape[1]
        left = self._call(_aten.reshape.default, self._call(_aten.permute.default, left, [1, 0, 2]), [m, -1])
        return self._call(_aten.mm.default, left, self._call(_aten.reshape.default, right, [-1, n]))

    def _stack(self, node: Node) -> Node:
        """A node's values at all steps, ``(T, ...)``."""
        base, joint = (node.args or (None,))[0], self._joint
        if isinstance(base, Node):
            if node.target is _aten.t.default:
                return self._call(_aten.transpose.int, self._stack(base), 1, 2)
            if node.target is _aten.detach.default:
                return self._stack(base)
            if node.target in (_aten.view.default, _aten.reshape.default):
                return self._call(_aten.reshape.default, self._stack(base), [self._steps, *node.args[1]])  # type: ignore[misc]
        if node in {*joint.output_cotangents, *joint.inputs}:
            return self._take(node, [])
        return self._take(node, self.collected if node in joint.linear else self.kept)


_LINEAR = (  # operations on one tensor that commute with a sum over steps
    *(_aten.t.default, _aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.permute.default),
    *(_aten.transpose.int, _aten.squeeze.dim, _aten.unsqueeze.default, _aten.detach.default, _aten.neg.default),
)
