"""The public API as text: every name that a face exports, with its signature.

    python tests/unit/public_api.py > tests/unit/public_api.txt

A change of the public API shows up as a diff of that file.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # this checkout, not an installed package

FACES = (
    "deepprob.data",
    "deepprob.diagnostics",
    "deepprob.distributions",
    "deepprob.engine",
    "deepprob.fitting",
    "deepprob.inference",
    "deepprob.models",
    "deepprob.networks",
    "deepprob.posteriors",
    "deepprob.programs",
)


def lines() -> Iterator[str]:
    """One line a name: what it is and its signature; members of classes and modules indented below."""
    root = importlib.import_module("deepprob")
    yield "deepprob"
    for name in sorted(root.__all__):
        value = getattr(root, name)
        home = value.__name__ if inspect.ismodule(value) else f"{value.__module__}.{value.__qualname__}"
        yield f"  {name} is {home}"
    exported = {id(getattr(importlib.import_module(face), name)) for face in FACES for name in names_of(face)}
    for face in FACES:
        yield ""
        yield face
        for name in names_of(face):
            yield from _described(name, getattr(importlib.import_module(face), name), exported)
    yield ""
    yield "deepprob.diagnostics.report"
    yield from _described("check", root.check, exported)
    yield ""
    yield "deepprob.diagnostics.compare"
    yield from _described("compare", root.compare, exported)
    yield ""
    yield "deepprob.diagnostics.plotting"
    yield from _described("plot", root.plot, exported)
    yield ""
    yield "deepprob.diagnostics.plots"
    for name in sorted(root.plots.__all__):
        yield from _described(name, getattr(root.plots, name), exported)


def names_of(face: str) -> list[str]:
    """What a face exports."""
    return sorted(importlib.import_module(face).__all__)


def _described(name: str, value: Any, exported: set[int]) -> Iterator[str]:
    if inspect.isclass(value):
        yield f"  class {name}{_signature(value)}"
        for member in sorted(_own_members(value, exported)):
            found = inspect.getattr_static(value, member)
            if isinstance(found, property):
                yield f"    {member}: property"
            elif isinstance(found, staticmethod | classmethod) or inspect.isfunction(found):
                yield f"    {member}{_signature(getattr(value, member))}"
    elif inspect.isfunction(value):
        yield f"  def {name}{_signature(value)}"
    elif isinstance(value, dict | tuple):
        yield f"  {name}: {', '.join(map(str, value))}"
    else:
        yield f"  {name}"


def _own_members(cls: type, exported: set[int]) -> set[str]:
    """Public attributes that a class defines, or inherits from classes of the package that no face exports."""
    ours = [
        base
        for base in cls.__mro__
        if base is cls or (base.__module__.startswith("deepprob") and id(base) not in exported)
    ]
    return {name for base in ours for name in vars(base) if not name.startswith("_")}


def _signature(value: Any) -> str:
    try:
        return str(inspect.signature(value))
    except (ValueError, TypeError):
        return ""


if __name__ == "__main__":
    print("\n".join(lines()).rstrip())
