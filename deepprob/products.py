"""Large matrix products on all cores, inside of a step that otherwise keeps to one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from deepprob.runtime import spare_threads

_A_THREAD = 2**24  # multiplications that are worth a thread: a quarter of a millisecond on a core

_aten = torch.ops.aten
_library = torch.library.Library("deepprob", "FRAGMENT")
_library.define("shared_mm(Tensor a, Tensor b) -> Tensor")


@torch.library.impl(_library, "shared_mm", "CPU")
def _shared_mm(a: Tensor, b: Tensor) -> Tensor:
    threads = min(spare_threads(), _work(a, b) // _A_THREAD)
    if threads < 2:  # sequences may be shorter than they were when the graph was made
        return torch.mm(a, b)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return torch.mm(a, b)
    finally:
        torch.set_num_threads(before)


@torch.library.register_fake("deepprob::shared_mm", lib=_library)  # type: ignore[untyped-decorator]
def _shape(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def share_products(graph: GraphModule) -> GraphModule:
    """Let a graph's large matrix products run on all threads, wherever `deepprob.runtime.threads_for` left it one.

    A step of many small operations is no faster on several threads, and much slower where a core is busy. A large
    product among them may well be shared out: at worst it waits about as long as it takes.

    Args:
        graph: Of tensor operations, on a CPU; it is changed in place.

    Returns:
        The same graph.
    """
    if spare_threads() == torch.get_num_threads():
        return graph
    for node in list(graph.graph.nodes):
        if node.target not in (_aten.mm.default, _aten.addmm.default) or node.kwargs:
            continue
        *bias, a, b = node.args
        if _is_large(a, b):
            with graph.graph.inserting_before(node):
                product = graph.graph.call_function(torch.ops.deepprob.shared_mm.default, (a, b))
                total = graph.graph.call_function(_aten.add.Tensor, (bias[0], product)) if bias else product
            node.replace_all_uses_with(total)
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _is_large(a: Node, b: Node) -> bool:
    left, right = a.meta["val"], b.meta["val"]
    return left.device.type == "cpu" and _work(left, right) >= 2 * _A_THREAD


def _work(a: Tensor, b: Tensor) -> int:
    """Multiplications of a product."""
    return a.shape[0] * a.shape[1] * b.shape[1]
