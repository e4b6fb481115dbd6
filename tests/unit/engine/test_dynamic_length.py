"""One graph for all lengths: right at lengths that it was not traced at, and refused if the two graphs differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from deepprob.engine.dynamic_length import DifferentGraphs, Line, serve_all_lengths
from deepprob.engine.scan.recur import recur

G = torch.Generator().manual_seed(0)
X = torch.randn(3, 40, 2, generator=G)
SHORT, LONG = 12, 30

Function = Callable[[Tensor], Any]


def traced(function: Function, length: int) -> GraphModule:
    graph: GraphModule = make_fx(function)(X[:, :length])
    return graph


def any_length(function: Function) -> GraphModule:
    graph = traced(function, LONG)
    serve_all_lengths(graph, traced(function, SHORT), (SHORT, LONG), (0, 1))
    return graph


def loop(x: Tensor) -> Tensor:
    def cell(state: Any, slices: Any, params: Any) -> Any:
        new = torch.tanh(state[0] + slices[0])
        return (new,), (new,)

    return recur(cell, [torch.zeros(3, 2)], [x.transpose(0, 1)])[1][0]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum(1) / x.shape[1],
        lambda x: x.reshape(-1, 2) @ torch.ones(2, 4),
        lambda x: x[:, 1:] - x[:, :-1],
        lambda x: x.flip(1) + torch.arange(x.shape[1]).unsqueeze(-1),
        lambda x: torch.cat([torch.zeros(3, 2 * x.shape[1] + 1), x.reshape(3, -1)], 1),
        lambda x: torch.where(x.sum(1) > 0, torch.nan, x.sum(1)).nan_to_num(7.0),
        loop,
    ],
    ids=["mean", "product", "difference", "positions", "cat", "nan", "loop"],
)
@pytest.mark.parametrize("length", [SHORT, 13, 21, LONG, 33])
def test_a_graph_traced_at_two_lengths_serves_others(function: Function, length: int) -> None:
    x = X[:, :length]
    assert torch.allclose(any_length(function)(x), function(x), atol=1e-6)


def quarter(x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // 4].sum()


def scaled(x: Tensor) -> Tensor:
    return x * float(x.shape[1]) ** 0.5


def unrolled(x: Tensor) -> Tensor:
    return sum((step for step in x.unbind(1)), torch.zeros(()))


def different_operation(x: Tensor) -> Tensor:
    return x.exp() if x.shape[1] > SHORT else x.sin()


def different_operands(x: Tensor) -> Tensor:
    y = x.exp()
    return x - y if x.shape[1] > SHORT else y - x


def different_flag(x: Tensor) -> Tensor:
    return x.sum(1, keepdim=x.shape[1] > SHORT)


def different_count(x: Tensor) -> Tensor:
    return x.sum((0, 1) if x.shape[1] > SHORT else (0,))


@pytest.mark.parametrize(
    "function",
    [quarter, scaled, unrolled, different_operation, different_operands, different_flag, different_count],
    ids=lambda f: f.__name__,
)
def test_refuses_graphs_that_differ(function: Function) -> None:
    short, long = traced(function, SHORT), traced(function, LONG + 1)
    before = long.code
    with pytest.raises(DifferentGraphs):
        serve_all_lengths(long, short, (SHORT, LONG + 1), (0, 1))
    assert long.code == before


def test_refuses_loops_over_different_cells() -> None:
    def two_cells(x: Tensor) -> Tensor:
        def cell(state: Any, slices: Any, params: Any) -> Any:
            new = state[0] + (slices[0] if x.shape[1] == SHORT else slices[0].exp())
            return (new,), (new,)

        return recur(cell, [torch.zeros(3, 2)], [x.transpose(0, 1)])[1][0]

    with pytest.raises(DifferentGraphs):
        any_length(two_cells)


def test_a_line_goes_through_both_values() -> None:
    line = Line((10, 14), (39, 55))
    assert (line.slope, line.intercept, line(10), line(14)) == (4, -1, 39, 55)
    with pytest.raises(DifferentGraphs):
        Line((10, 14), (0, 3))
