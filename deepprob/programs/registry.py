"""Programs by name, so that a saved posterior finds the class of its program."""

from __future__ import annotations

from typing import Any

from deepprob.errors import unknown

_PROGRAMS: dict[str, type[Any]] = {}


def register(name: str, cls: type[Any]) -> None:
    """Register a program class under a name.

    A class of the same module replaces an earlier one, as in a notebook whose cell runs twice.

    Args:
        name: The name that saved posteriors store.
        cls: A subclass of `Program`.

    Raises:
        ValueError: If a class of another module has the name.
    """
    known = _PROGRAMS.get(name)
    if known is not None and known.__module__ != cls.__module__:
        raise ValueError(
            f"registry_name {name!r} of {cls.__module__}.{cls.__qualname__} belongs to "
            f"{known.__module__}.{known.__qualname__}. Choose another name."
        )
    _PROGRAMS[name] = cls


def program_named(name: str) -> type[Any]:
    """The program class of a name.

    Raises:
        ValueError: If no class is registered under it.
    """
    if name not in _PROGRAMS:
        raise unknown("program", name, _PROGRAMS)
    return _PROGRAMS[name]
