"""Private parameter stores, so that programs do not share Pyro's global one."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.params.param_store import ParamStoreDict

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


def copy_parameter(source: StoreState, error: KeyError, device: torch.device) -> None:
    """Copy the parameter that a program read before it had a value, from another store into the one in use.

    Args:
        source: The state of the other store; it is not changed.
        error: The error that a run of the program raised.
        device: The device of the copy.

    Raises:
        KeyError: If the program looked for something other than a parameter.
        ValueError: If the other store has no such parameter either.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    if frames[-1][0].f_globals.get("__name__") != ParamStoreDict.__module__:
        raise error
    (name,) = error.args
    if name not in source["params"]:
        raise ValueError(
            f"the program reads parameter {name!r}, which has no value yet. Give it one, "
            f"pyro.param({name!r}, tensor), or set it in this way before the fit."
        ) from error
    value = source["params"][name].detach().to(device, copy=True).requires_grad_()
    pyro.get_param_store().set_state({"params": {name: value}, "constraints": {name: source["constraints"][name]}})
