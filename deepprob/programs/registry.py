"""Programs by name, so that a saved posterior finds the class of its program."""

from __future__ import annotations

from typing import Any

from deepprob.errors import unknown

_PROGRAMS: dict[str, type[Any]] = {}


def register(name: str, cls: type[Any]) -> None:
    """Register a program class under a name.

    A class replaces an earlier one of its own name and module, as when a notebook cell runs twice. It also replaces one
    of its own name from a notebook or script, whose code has moved into a module.

    Args:
        name: The name that saved posteriors store.
        cls: A subclass of `Program`.

    Raises:
        TypeError: If the name is not a string.
        ValueError: If another class has the name.
    """
    if not isinstance(name, str):
        raise TypeError(f"registry_name of {cls.__qualname__} must be a string; got {name!r}.")
    known = _PROGRAMS.get(name)
    if known is not None and (known.__name__ != cls.__name__ or known.__module__ not in (cls.__module__, "__main__")):
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
