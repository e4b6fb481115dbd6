"""Parameters and networks that an instance takes on after a run has registered them: in the first run, or later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pyro
import torch
from torch import Tensor, nn

from deepprob.programs.copying import check_containers
from deepprob.programs.program import FunctionProgram, Program
from deepprob.programs.store import StoreState
from deepprob.programs.supports import NotStored, constraint_from_json, constraint_to_json


class Instance(Protocol):
    """The part of a `ProgramInstance` that this file uses; see there."""

    program: Program
    store: StoreState
    device: torch.device
    unseen: set[int]
    registered: frozenset[str]
    late: list[str]
    unsaved: list[str]

    def parameters(self) -> dict[str, Tensor]:
        """The trained tensors by name."""


def adopt(instance: Instance) -> list[str]:
    """Take on the parameters that a run registered after the first, inside the running program.

    Args:
        instance: The instance.

    Returns:
        The names, in Pyro's store, of those that were not trained; empty if there are none.
    """
    store = pyro.get_param_store()
    if len(store) == len(instance.registered):
        return []
    state, trained = store.get_state(), {id(p) for p in instance.parameters().values()}
    late = [name for name in state["params"] if name not in instance.registered]
    before = {id(p) for p in instance.program.parameters()}
    found = [name for name in late if id(state["params"][name]) not in trained]
    own_parameters(instance, state, late)
    store.set_state(state)
    instance.store.update(state)
    instance.late += found
    new = {id(p) for p in instance.program.parameters()} - before
    instance.unsaved += [name for name in late if id(instance.store["params"][name]) in new]
    return found


def check_saved(instance: Instance) -> None:
    """Refuse to save networks that a later run than the first made, which a loaded program would lack.

    Raises:
        ValueError: If there are any.
    """
    if instance.unsaved:
        names = ", ".join(repr(name.replace("$$$", ".")) for name in instance.unsaved)
        raise ValueError(
            f"{names} cannot be saved: a later run than the first made their network, and a loaded program would lack "
            "it. Make the network before the fit, or in the first run of the program."
        )


def own_parameters(instance: Instance, store: StoreState, names: Sequence[str]) -> None:
    """Copy parameters of a store: ``pyro.param("loc", tensor)`` would train the caller's tensor in place."""
    if isinstance(instance.program, FunctionProgram):
        for fn in (instance.program.__dict__["_model"], instance.program.current_guide):
            check_containers(fn, instance.program.parts.modules())
        instance.program.gather()
    own = {id(p) for p in instance.program.parameters()}
    for name in names:
        value = store["params"][name]
        instance.unseen.discard(id(value))
        if id(value) not in own:
            store["params"][name] = value.detach().to(instance.device, copy=True).requires_grad_()
            if not isinstance(value, nn.Parameter):
                value.requires_grad_(False)  # undo Pyro's change to the caller's tensor
    instance.registered = frozenset(store["params"])


def late_to_json(instance: Instance) -> dict[str, Any]:
    """The parameters that a later run registered: constraint, and path in the program or empty, by name.

    Raises:
        ValueError: If the constraint of one has no name, or a later run made its network.
    """
    check_saved(instance)
    paths = {id(p): path for path, p in instance.program.named_parameters()}
    params, kinds = instance.store["params"], instance.store["constraints"]
    found = {}
    for name in instance.late:
        try:
            found[name] = [constraint_to_json(kinds[name]), paths.get(id(params[name]), "")]
        except NotStored as error:
            raise ValueError(
                f"parameter {name!r}, which the first run did not register, cannot be saved: {error}. Register it in "
                "every run of the program."
            ) from error
    return found


def expect(instance: Instance, late: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Make the parameters that a later run of a fit registered, so that their values can be loaded.

    Args:
        instance: The instance, after its first run.
        late: The parameters, as `late_to_json` wrote them.
        tensors: The saved state.
    """
    own, store = dict(instance.program.named_parameters()), instance.store
    late = {name: found for name, found in late.items() if name not in instance.registered}
    for name, (constraint, path) in late.items():
        store["params"][name] = own[path] if path else tensors[f"store.{name}"].to(instance.device)
        store["constraints"][name] = constraint_from_json(constraint)
    own_parameters(instance, store, list(late))
    instance.late += late
