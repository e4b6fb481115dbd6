"""What a program keeps in Python from one run to the next: counters, schedules, generators of random numbers."""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from torch import nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_MOST_ITEMS = 1000  # of a container; a larger one is data, of which only the length is kept
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))

PythonState = dict[tuple[str, ...], str]
"""Where each number, text, length and generator was met, and what it was."""


def python_state(root: object) -> PythonState:
    """What can be reached from a program and is not a tensor.

    Followed are attributes, containers, closures, and what functions of the user's read from their modules. What is
    made anew in each run is not seen, nor is what a library keeps for itself.

    Args:
        root: The program: an object, a module or a function.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> model.calls = 0
        >>> before = python_state(model)
        >>> model.calls += 1
        >>> changed(before, python_state(model))
        'calls'
    """
    found: PythonState = {}
    seen: dict[int, object] = {}  # held, so that no other object gets its number
    pending: list[tuple[tuple[str, ...], object]] = [((), root)]
    while pending:
        path, x = pending.pop()
        if isinstance(x, _PLAIN):
            found[path] = repr(x)
        elif id(x) not in seen:
            seen[id(x)] = x
            if (own := _own_state(x)) is not None:
                found[path] = own
            pending.extend(((*path, name), part) for name, part in _parts(x))
    return found


def changed(before: PythonState, after: PythonState) -> str:
    """The name of something that is not what it was, the nearest to the program; empty if there is none."""
    paths = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    if not paths:
        return ""
    nearest = min(paths, key=lambda path: (len(path), path))
    return next((name for name in reversed(nearest) if not name.startswith("[")), "an argument")


def _own_state(x: object) -> str | None:
    if isinstance(x, random.Random):
        return repr(x.getstate())
    if isinstance(x, np.random.Generator):
        return repr(x.bit_generator.state)
    if isinstance(x, np.random.RandomState):
        return repr(x.get_state(legacy=False))
    if isinstance(x, itertools.count):
        return repr(x)
    return str(len(x)) if isinstance(x, _CONTAINERS) else None


def _parts(x: Any) -> Iterator[tuple[str, object]]:
    """What belongs to an object, with its name, or in brackets where it has none."""
    if isinstance(x, _CONTAINERS):
        if len(x) <= _MOST_ITEMS:
            items = x.items() if isinstance(x, dict) else enumerate(x)
            yield from ((key if isinstance(key, str) else f"[{key!r}]", value) for key, value in items)
    elif isinstance(x, types.FunctionType):
        if _is_users(x.__module__):
            yield from _read_by(x)
    elif isinstance(x, types.MethodType):
        yield from (("[self]", x.__self__), ("[function]", x.__func__))
    elif isinstance(x, (staticmethod, classmethod)):
        yield "[function]", x.__func__
    elif isinstance(x, property):
        yield from (("[get]", x.fget), ("[set]", x.fset))
    elif isinstance(x, partial):
        yield from (("[function]", x.func), ("[args]", x.args), ("[keywords]", x.keywords))
    elif isinstance(x, type):
        if _is_users(x.__module__):
            yield from vars(x).items()
    elif isinstance(x, nn.Module) or _is_users(type(x).__module__):
        yield from getattr(x, "__dict__", {}).items()
        yield from ((f"[{kind.__name__}]", kind) for kind in type(x).__mro__)


def _read_by(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """What a function finds outside of itself."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not filled yet
            yield name, cell.cell_contents
    yield from vars(function).items()
    yield from (("[defaults]", function.__defaults__), ("[keywords]", function.__kwdefaults__))
    names = set(_names(function.__code__))
    for name in sorted(names & function.__globals__.keys()):
        value = function.__globals__[name]
        if not isinstance(value, types.ModuleType):
            yield name, value
        elif _is_users(value.__name__):
            yield from ((f"{name}.{own}", vars(value)[own]) for own in sorted(names & vars(value).keys()))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_users(module: str | None) -> bool:
    """Whether code is neither ours nor of a library."""
    top = (module or "").partition(".")[0]
    if top == __name__.partition(".")[0] or top in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return file is None or not file.startswith(_LIBRARIES)
