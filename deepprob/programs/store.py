"""Private parameter stores, so that programs do not share Pyro's global one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch

from deepprob.engine.machine import ONE_AT_A_TIME, placed_on

StoreState = Any  # pyro.params.param_store.StateDict, which Pyro does not export


def empty_store() -> StoreState:
    """The state of a parameter store that holds nothing."""
    return {"params": {}, "constraints": {}}


@contextmanager
def private_store(state: StoreState, *, validate: bool = False, device: torch.device | str = "cpu") -> Iterator[None]:
    """A context in which Pyro uses a private parameter store, one thread at a time.

    Args:
        state: The store's content; parameters registered inside are added to it.
        validate: Whether Pyro and torch check arguments and supports (slow; once per fit is enough).
        device: Device of tensors that are created without one; see `placed_on`.

    Examples:
        >>> mine = empty_store()
        >>> with private_store(mine):
        ...     _ = pyro.param("loc", torch.zeros(()))
        >>> "loc" in pyro.get_param_store(), "loc" in mine["params"]
        (False, True)
    """
    with ONE_AT_A_TIME, placed_on(device), pyro.validation_enabled(validate), pyro.get_param_store().scope(state):
        yield
