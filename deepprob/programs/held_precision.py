"""The precision of the floats that a program holds: parameters and buffers, or the tensors of its functions."""

from __future__ import annotations

import dis
import itertools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deepprob.programs.copying import cell_content, functions_of


def held_precision(program: nn.Module, functions: tuple[Any, ...]) -> torch.dtype:
    """The precision in which a program reads floats: float64 if it holds float64 alone, else torch's default dtype.

    A program without parameters and buffers holds the tensors that its functions capture, and those that they make
    with ``dtype=torch.float64``.

    Args:
        program: The program.
        functions: Its model and guide.

    Examples:
        >>> def model():
        ...     return torch.zeros(3, dtype=torch.float64)
        >>> held_precision(nn.Module(), (model,))
        torch.float64
    """
    held = {x.dtype for x in (*program.parameters(), *program.buffers()) if x.dtype.is_floating_point}
    held = held or {dtype for function in functions_of(functions) for dtype in _precisions(function)}
    return torch.float64 if held == {torch.float64} else torch.get_default_dtype()


def _precisions(function: types.FunctionType) -> Iterator[torch.dtype]:
    """The types of the floats that a function captures or names."""
    code, cells = function.__code__, function.__closure__ or ()
    scope = function.__globals__ | dict(zip(code.co_freevars, map(cell_content, cells), strict=True))
    values = [scope.get(name) for name in (*code.co_names, *code.co_freevars)]
    values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    yield from (x.dtype for x in values if isinstance(x, Tensor) and x.is_floating_point())
    yield from _named(code)


def _named(code: types.CodeType) -> Iterator[torch.dtype]:
    """The precisions that code gives to the tensors it makes, by the keyword ``dtype``."""
    steps = list(dis.get_instructions(code))
    if any(isinstance(names, tuple) and "dtype" in names for names in code.co_consts):
        for module, name in itertools.pairwise(steps):
            if module.argval == "torch" and name.argval in ("float64", "double", "float32", "float"):
                yield getattr(torch, name.argval)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _named(inner)
