"""Many applications of one step in one call: traced, looped and compiled to native code."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_SMALL_SUM = 2**12  # terms


def added_at(base: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """Numbers added to rows of a small table, as a sum over all numbers; anything else as it was.

    The compiler adds in place, and has been seen to read a table of four numbers before it was done. Large tables stay
    with it: there, as everywhere, the comparison before the first step is what protects.
    """
    if not accumulate or len(indices) != 1 or (index := indices[0]) is None or index.dtype != torch.long:
        return NotImplemented
    row, count = base.shape[1:], index.numel()
    if base.numel() * count > _SMALL_SUM:
        return NotImplemented
    index = torch.where(index < 0, index + len(base), index).reshape(1, count)
    here = index == torch.arange(len(base), device=base.device).unsqueeze(1)  # (rows, count)
    added = values.expand(*indices[0].shape, *row).reshape(1, count, math.prod(row))  # type: ignore[union-attr]
    return base + torch.where(here.unsqueeze(-1), added, 0).sum(1, dtype=base.dtype).reshape(base.shape)


def lift_constants(graph: GraphModule) -> list[Tensor]:
    """Make a graph's constants its last inputs, so that compiled code does not hold them and serves others as well."""
    constants: dict[str, Node] = {}
    found: list[Tensor] = []
    for node in list(graph.graph.find_nodes(op="get_attr")):
        value = getattr(graph, node.target)
        if not isinstance(value, Tensor):
            continue
        if node.target not in constants:
            found.append(value.detach().clone())
            last = graph.graph.find_nodes(op="placeholder")[-1]
            with graph.graph.inserting_after(last):
                constants[node.target] = graph.graph.placeholder(f"constant_{len(constants)}")
            constants[node.target].meta = {"val": value, **node.meta}
        node.replace_all_uses_with(constants[node.target])
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return found
