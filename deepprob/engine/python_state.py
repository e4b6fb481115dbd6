"""State that a program keeps in Python from run to run: counters, schedules, random generators."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import site
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Hashable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_MOST_ITEMS = 1000  # of a container; a larger one counts as data, and only its length is recorded

PythonState = dict[tuple[str, ...], Hashable]
"""The path to each number, text, length and random generator, and its value as text."""


class _Array:
    """A tensor or an array that a function reads by name; it is equal to itself alone."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Array) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def python_state(root: object, *, arrays: bool = False) -> PythonState:
    """Collect the Python state that can be reached from a program: all but tensors.

    The search follows attributes, containers, closures, and the globals that the user's functions read. It misses
    objects that each run creates, and the internal state of libraries.

    Args:
        root: The program: an object, a module or a function.
        arrays: Whether to include which tensors and arrays the functions read by name.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> model.calls = 0
        >>> before = python_state(model)
        >>> model.calls += 1
        >>> changed(before, python_state(model))
        'calls'
    """
    found: PythonState = {}
    seen: dict[int, object] = {}  # holds the objects, so that no other object gets the same id
    pending: list[tuple[tuple[str, ...], object]] = [((), root)]
    while pending:
        path, x = pending.pop()
        if isinstance(x, _PLAIN):
            found[path] = repr(x)
        elif isinstance(x, _Array):
            if arrays:
                found[path] = x
        elif id(x) not in seen:
            seen[id(x)] = x
            if (state := _state_text(x)) is not None:
                found[path] = state
            pending.extend(((*path, name), part) for name, part in _parts(x))
    return found


def changed(before: PythonState, after: PythonState) -> str:
    """The name of a changed value, the one nearest to the program; empty if nothing changed."""
    paths = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    if not paths:
        return ""
    nearest = min(paths, key=lambda path: (len(path), path))
    return next((name for name in reversed(nearest) if not name.startswith("[")), "an argument")


def _state_text(x: object) -> str | None:
    """The state of a random generator or a counter, or the length of a container; None for other objects."""
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
    """The objects that an object refers to, each with its name, or a name in brackets if it has none."""
    if isinstance(x, _CONTAINERS):
        if len(x) <= _MOST_ITEMS:
            items = x.items() if isinstance(x, dict) else enumerate(x)
            yield from ((key if isinstance(key, str) else f"[{key!r}]", value) for key, value in items)
    elif isinstance(x, types.FunctionType):
        if _is_users(x.__module__):
            yield from _objects_read(x)
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


def _objects_read(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """The objects that a function reads: closure, attributes, defaults and globals, by name."""
    for name, value in _names_read(function):
        yield name, _Array(value) if isinstance(value, Tensor | np.ndarray) else value


def _names_read(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # the cell is still empty
            yield name, cell.cell_contents
    yield from vars(function).items()
    yield from (("[defaults]", function.__defaults__), ("[keywords]", function.__kwdefaults__))
    names = set(_names(function.__code__))
    for name in sorted(names & function.__globals__.keys()):
        value = function.__globals__[name]
        if not isinstance(value, types.ModuleType):
            yield name, value
        elif _is_users(value.__name__):
            yield from ((f"{name}.{key}", vars(value)[key]) for key in sorted(names & vars(value).keys()))


def _names(code: types.CodeType) -> Iterator[str]:
    """All names that a function's code uses, nested functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_users(module: str | None) -> bool:
    """Whether a module is the user's: neither this package, nor the standard library, nor an installed library."""
    top = (module or "").partition(".")[0]
    if top == __name__.partition(".")[0] or top in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return file is None or not is_library(file)


def is_library(file: str) -> bool:
    """Whether a file belongs to an installed library, in this environment or in one that it is layered over."""
    packages = (getattr(sys.modules.get(name), "__file__", None) for name in ("torch", "pyro"))
    return file.startswith(_library_folders(tuple(sys.path), tuple(x for x in packages if x)))


@functools.cache
def _library_folders(path: tuple[str, ...], packages: tuple[str, ...]) -> tuple[str, ...]:
    """The folders into which libraries are installed: the site's, those on the path that hold distributions, others."""
    known = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    known |= {*site.getsitepackages(), site.getusersitepackages(), *map(os.path.dirname, packages)}
    known |= {entry for entry in path if entry and any(Path(entry).glob("*.dist-info"))}
    return tuple(os.path.join(folder, "") for folder in known)
