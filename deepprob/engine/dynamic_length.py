"""Make one graph serve sequences of all lengths, from its traces at two lengths."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

_aten = torch.ops.aten

Lengths = dict[int, tuple[int, int]]
"""The shortest and the longest T of each input that holds sequences, ``(N, T, ...)``, by the input's index."""


class DifferentGraphs(Exception):
    """Graphs at two lengths differ in more than whole numbers that are linear in the length."""


class Line:
    r"""The line :math:`a \ell + b`, with whole numbers, through two values at two lengths.

    Args:
        lengths: Two different lengths.
        values: The values at these lengths.

    Raises:
        DifferentGraphs: If ``a`` and ``b`` are not whole numbers.

    Examples:
        >>> line = Line((10, 14), (39, 55))
        >>> line.slope, line.intercept, line(12)
        (4, -1, 47)
    """

    def __init__(self, lengths: tuple[int, int], values: tuple[int, int]) -> None:
        self.slope, rest = divmod(values[1] - values[0], lengths[1] - lengths[0])
        self.intercept = values[0] - self.slope * lengths[0]
        if rest:
            raise DifferentGraphs(f"{values} at lengths {lengths} lie on no line with whole coefficients")

    def __call__(self, length: int) -> int:
        return self.slope * length + self.intercept


def serve_all_lengths(graph: GraphModule, other: GraphModule, lengths: tuple[int, int], place: tuple[int, int]) -> None:
    r"""Change a graph so that it serves sequences of any length between two, and not only the longer one.

    A program that treats all time steps alike gives the same operations in the same order at every length. A whole
    number that is :math:`n_1` in one graph and :math:`n_2` in the other becomes the :math:`a \ell + b` through both,
    with :math:`\ell` read from the shape of an input. Two lengths prove nothing about a third: compare the graph with
    the program at all lengths that it will meet.

    Args:
        graph: The graph at the second length; it is changed in place.
        other: The graph at the first length.
        lengths: The two lengths, ascending.
        place: The index of an input, and its dimension, whose size is the length.

    Raises:
        DifferentGraphs: If the graphs differ in anything else; the graph is then unchanged.
    """
    nodes, others = list(graph.graph.nodes), list(other.graph.nodes)
    if len(nodes) != len(others):
        raise DifferentGraphs(
            f"{len(others)} operations at length {lengths[0]} but {len(nodes)} at length {lengths[1]}"
        )
    number = {node: i for i, node in enumerate(nodes)} | {node: i for i, node in enumerate(others)}
    lines: list[tuple[int, int]] = []

    def compare(x: Any, y: Any) -> Any:
        """The argument if it is the same in both graphs, or the line through its two values."""
        if isinstance(x, Node) and isinstance(y, Node) and number[x] == number[y]:
            return x
        if isinstance(x, list | tuple) and type(x) is type(y) and len(x) == len(y):
            return type(x)(compare(p, q) for p, q in zip(x, y, strict=True))
        if isinstance(x, dict) and isinstance(y, dict) and x.keys() == y.keys():
            return {key: compare(x[key], y[key]) for key in x}
        if type(x) is int and type(y) is int and x != y:
            line = Line(lengths, (y, x))
            lines.append((line.slope, line.intercept))
            return line
        nan = isinstance(x, float) and isinstance(y, float) and math.isnan(x) and math.isnan(y)
        if isinstance(x, Node) or isinstance(y, Node) or type(x) is not type(y) or (x != y and not nan):
            raise DifferentGraphs(f"{y} at length {lengths[0]} but {x} at length {lengths[1]}")
        return x

    arguments = []
    for x, y in zip(nodes, others, strict=True):
        same = x.target == y.target if x.op == "call_function" else x.op != "get_attr" or _is_same(graph, x, other, y)
        if x.op != y.op or not same:
            raise DifferentGraphs(
                f"{y.format_node()} at length {lengths[0]} but {x.format_node()} at length {lengths[1]}"
            )
        arguments.append((compare(tuple(x.args), tuple(y.args)), compare(dict(x.kwargs), dict(y.kwargs))))
    sizes = _sizes(graph, dict.fromkeys(lines), place)

    def substitute(x: Any) -> Any:
        if isinstance(x, Line):
            return sizes[x.slope, x.intercept]
        if isinstance(x, list | tuple):
            return type(x)(substitute(p) for p in x)
        return {key: substitute(p) for key, p in x.items()} if isinstance(x, dict) else x

    for node, (args, kwargs) in zip(nodes, arguments, strict=True):
        node.args, node.kwargs = substitute(args), substitute(kwargs)
    graph.recompile()


def _sizes(graph: GraphModule, lines: dict[tuple[int, int], None], place: tuple[int, int]) -> dict[Any, Node]:
    """Insert a node for the value of each line, before all other operations."""
    inputs = graph.graph.find_nodes(op="placeholder")
    sizes = {}
    with graph.graph.inserting_before(inputs[-1].next):
        length = graph.graph.call_function(_aten.sym_size.int, (inputs[place[0]], place[1]))
        for slope, intercept in lines:
            size = length if slope == 1 else graph.graph.call_function(operator.mul, (length, slope))
            sizes[slope, intercept] = graph.graph.call_function(operator.add, (size, intercept)) if intercept else size
    return sizes


def _is_same(graph: GraphModule, x: Node, other: GraphModule, y: Node) -> bool:
    """Whether two attributes are cells of a loop with the same code (a cell has no constants)."""
    a, b = getattr(graph, str(x.target)), getattr(other, str(y.target))
    return isinstance(a, GraphModule) and isinstance(b, GraphModule) and a.code == b.code
