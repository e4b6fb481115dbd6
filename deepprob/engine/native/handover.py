"""Write a module of tensor operations as text, so that another process can build its native code.

The text holds the code of the module's graphs, and the shapes of its inputs without their values.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from operator import attrgetter
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from deepprob.engine.dynamic_length import Lengths
from deepprob.engine.native.lower import Repeated


def as_text(module: nn.Module, inputs: Sequence[Tensor], lengths: Lengths) -> str:
    """A module and its example inputs as JSON.

    Args:
        module: A graph or a `Repeated` graph, without constants.
        inputs: Example inputs.
        lengths: The inputs that hold sequences, and the range of their lengths.
    """
    repeated = isinstance(module, Repeated)
    root = module.body if isinstance(module, Repeated) else module
    graphs = {name: graph for name, graph in root.named_modules() if isinstance(graph, GraphModule)}
    return json.dumps(
        {
            "graphs": {name: _code_of(graph) for name, graph in graphs.items()},
            "repeated": [module.carried, module.count] if repeated else None,
            "inputs": [[tuple(x.shape), x.stride(), _name_of(x.dtype)] for x in inputs],
            "lengths": list(lengths.items()),
            "dtype": _name_of(torch.get_default_dtype()),
            "threads": torch.get_num_threads(),
        }
    )


def from_text(text: str) -> tuple[nn.Module, list[Tensor], Lengths]:
    """The module, example inputs and lengths of `as_text`; sets torch's default dtype and threads to the same values.

    Args:
        text: The text. It holds code, which is run: it must come from a process of the same user.
    """
    given = json.loads(text)
    torch.set_default_dtype(getattr(torch, given["dtype"]))
    torch.set_num_threads(given["threads"])
    root = nn.Module()
    for name, code in given["graphs"].items():  # a graph precedes those inside of it
        parent, _, own = name.rpartition(".")
        graph = nn.Module() if name else root
        graph.forward = MethodType(_function(**code), graph)
        if name:
            root.get_submodule(parent).add_module(own, graph)
    module: Any = Repeated(root, *given["repeated"]) if given["repeated"] else root  # type: ignore[arg-type]
    inputs = [torch.empty_strided(shape, stride, dtype=getattr(torch, d)) for shape, stride, d in given["inputs"]]
    return module, inputs, {i: (shortest, longest) for i, (shortest, longest) in given["lengths"]}


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _code_of(graph: GraphModule) -> dict[str, Any]:
    """The source of a graph, and where the functions that it names are found."""
    python, known = graph.graph.python_code("self"), _known_names()
    others = {name: value for name, value in python.globals.items() if name not in known}
    return {"source": python.src, "names": {name: (x.__module__, x.__qualname__) for name, x in others.items()}}


def _function(source: str, names: dict[str, tuple[str, str]]) -> Any:
    found = {name: attrgetter(attribute)(import_module(module)) for name, (module, attribute) in names.items()}
    namespace = {**_known_names(), **found}
    exec(source, namespace)
    return namespace["forward"]


def _known_names() -> dict[str, Any]:
    """The names that the code of every graph may use."""
    return Graph().python_code("self").globals
