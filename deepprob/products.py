"""Large matrix products on all cores, inside of a step that otherwise keeps to one."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from deepprob.runtime import spare_threads
from deepprob.toolchain import NoCompiler, load_library

SOURCE = Path(__file__).with_name("shared_mm.cpp")

_LARGE = 2**22  # multiplications: two of the least chunks of shared_mm.cpp
_MOST_THREADS = 8

_aten = torch.ops.aten
_library = torch.library.Library("deepprob", "FRAGMENT")
_library.define("shared_mm(Tensor a, Tensor b, int threads) -> Tensor")
_library.impl("shared_mm", lambda a, b, _: torch.mm(a, b), "CPU")  # native code calls shared_mm.cpp instead

C_SHIMS = {
    torch.ops.deepprob.shared_mm.default: [
        "AOTITorchError aoti_torch_cpu_shared_mm(AtenTensorHandle, AtenTensorHandle, int64_t, AtenTensorHandle*)"
    ]
}
"""What native code calls for an operation of ours."""


@torch.library.register_fake("deepprob::shared_mm", lib=_library)  # type: ignore[untyped-decorator]
def _shape(a: Tensor, b: Tensor, threads: int) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def share_products(graph: GraphModule) -> GraphModule:
    """Let a graph's large matrix products run on all threads, wherever `deepprob.runtime.threads_for` left it one.

    A step of many small operations is no faster on several threads, and much slower where a core is busy. A large
    product among them may well be shared out, if it does not wait for threads that have not begun.

    Args:
        graph: Of tensor operations, on a CPU; it is changed in place, and so are the bodies of its loops.

    Returns:
        The same graph.
    """
    if spare_threads() == torch.get_num_threads():
        return graph
    graphs = [module for module in graph.modules() if isinstance(module, GraphModule)]
    large = [(each, node) for each in graphs for node in each.graph.nodes if _is_large(node)]
    threads = min(spare_threads(), _MOST_THREADS)
    if not large or not _has_threads(threads):
        return graph
    for each, node in large:
        *bias, a, b = node.args
        with each.graph.inserting_before(node):
            product = each.graph.call_function(torch.ops.deepprob.shared_mm.default, (a, b, threads))
            total = each.graph.call_function(_aten.add.Tensor, (bias[0], product)) if bias else product
        node.replace_all_uses_with(total)
        each.graph.erase_node(node)
    for each in graphs:
        each.recompile()
    return graph


def _is_large(node: Node) -> bool:
    if node.target not in (_aten.mm.default, _aten.addmm.default) or node.kwargs:
        return False
    a, b = (cast(Node, x).meta["val"] for x in node.args[-2:])
    return bool(a.shape[0] * a.shape[1] * b.shape[1] >= _LARGE)


def _has_threads(threads: int) -> bool:
    """Have so many threads for products; False if the code for it does not run here."""
    if sys.platform != "linux":
        return False
    try:
        load_library(SOURCE).deepprob_have_threads(threads)
    except NoCompiler:  # whoever compiles the step will say so
        return False
    except (RuntimeError, OSError) as error:
        warnings.warn(f"large matrix products keep to one thread: {error}", UserWarning, stacklevel=2)
        return False
    return True
