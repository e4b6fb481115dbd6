"""The object that a trace runs: the words about it, and a check of its state in Python."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from deepprob.engine.python_state import changed, python_state


class Untraceable(Exception):
    """The function is not one fixed sequence of tensor operations; the message gives the reason and the line."""


class Subject(NamedTuple):
    """The object that a traced function runs, and the words about it in error messages.

    Attributes:
        owner: The object whose Python state the function must not change.
        name: Its name in messages.
        state: The place for state that changes from run to run.
        buffers: The tensors that it may change in place.
        inputs: The inputs that it may not change in place.
        libraries: Modules whose lines a message does not name, besides torch, numpy and this package.
    """

    owner: object
    name: str = "the step"
    state: str = "keep it in the carry"
    buffers: str = "made by the step: return a new one in the carry"
    inputs: str = "its carry or its data: return a new tensor"
    libraries: tuple[ModuleType, ...] = ()


@contextmanager
def unchanged_in_python(subject: Subject) -> Iterator[None]:
    """A context in which a subject is traced: its Python state would be frozen, so it must not change.

    Raises:
        Untraceable: If it changes, or if random numbers are drawn from Python or numpy.
    """
    generators, kept = _generator_states(), python_state(subject.owner)
    yield
    if generators != _generator_states():
        raise Untraceable(
            f"{subject.name} draws random numbers from Python or numpy, which would be frozen: draw them with torch"
        )
    if name := changed(kept, python_state(subject.owner)):
        raise Untraceable(
            f"{subject.name} changes {name!r} in Python from run to run, which would be frozen: {subject.state}"
        )


def _generator_states() -> tuple[Any, ...]:
    """The states of Python's and numpy's global random generators."""
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, tuple(np.asarray(keys).tolist()), *rest
