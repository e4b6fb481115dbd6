"""What data made of a program, stored so that a saved program is built again without a run.

Before data come, a program has the modules of its constructor. `Program.adapt` and the first run add to it: parameters
in Pyro's store, parameters of guides, layers whose sizes the data determine. Their names, shapes and constraints are
stored. The rest, such as a network that a model makes by itself on its first run, waits for the first query.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.effect import AutoMessenger
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deepprob.programs.program import Program
from deepprob.programs.prototypes import prototypes_to_json, set_up
from deepprob.programs.store import StoreState
from deepprob.programs.structure import SiteInfo, Structure
from deepprob.programs.supports import NotStored, constraint_from_json, constraint_to_json

Forms = dict[str, tuple[int, ...] | None]


def forms(program: nn.Module) -> Forms:
    """The shapes of a program's state by name; None for tensors whose shape is not known yet."""
    state = program.state_dict(keep_vars=True)
    return {name: None if is_lazy(x) else tuple(x.shape) for name, x in state.items()}


def facts(program: nn.Module) -> dict[str, Any]:
    """The numbers, words and flags among the attributes of a program's modules, by name."""
    return {
        f"{path}.{name}": value
        for path, module in program.named_modules()
        for name, value in vars(module).items()
        if name != "training" and isinstance(value, bool | int | float | str | None)
    }


def setup_to_json(
    program: Program,
    store: StoreState,
    found: Structure,
    unseen: Collection[int],
    built: tuple[Forms, dict[str, Any]],
    adapted: tuple[Forms, dict[str, Any]],
) -> dict[str, Any]:
    """What data made of a program, as JSON.

    Args:
        program: The program.
        store: Its parameter store.
        found: Its structure.
        unseen: The ids of the parameters that Pyro does not see.
        built: Forms and facts of the program as it was built.
        adapted: Those after `Program.adapt`.
    """
    guides, left = prototypes_to_json(program, found.row_plate)
    made: dict[str, Any] = {}
    waiting: list[str] = []
    for name, shape in forms(program).items():
        if name in built[0] and built[0][name] == shape:
            continue
        entry = None if _is_within(name, left) else _made_to_json(program, name)
        if entry is not None:
            made[name] = entry
        lazy, ready = built[0].get(name, ()) is None, name in adapted[0] and adapted[0][name] == shape
        if entry is None or not (lazy or ready or _is_known(program, name)):
            waiting.append(f"program.{name}")
    paths = {id(p): name for name, p in program.named_parameters()}
    parameters: dict[str, Any] = {}
    for name, value in store["params"].items():
        try:
            entry = {"constraint": constraint_to_json(store["constraints"][name])}
            parameters[name] = entry | ({"of": paths[id(value)]} if id(value) in paths else {})
        except NotStored:
            waiting += [] if id(value) in paths else [f"store.{name}"]
    names = paths | {id(x): f"store.{n}" for n, x in store["params"].items() if id(x) not in paths}
    return {
        "structure": asdict(found),
        "facts": {n: x for n, x in adapted[1].items() if n not in built[1] or built[1][n] != x},
        "containers": [path for path, module in program.named_modules() if type(module) is PyroModule],
        "guides": guides,
        "made": made,
        "store": parameters,
        "waiting": waiting,
        "gradients": program.bound_rows.gradients,
        "unseen": [name for key, name in names.items() if key in unseen],
    }


def structure_from_json(saved: Mapping[str, Any]) -> Structure:
    """The structure in a set-up."""
    sites = {n: SiteInfo(**x | {"plate_dims": tuple(x["plate_dims"])}) for n, x in saved["structure"]["sites"].items()}
    return Structure(**saved["structure"] | {"sites": sites, "plate_names": tuple(saved["structure"]["plate_names"])})


def apply_setup(
    program: Program, store: StoreState, saved: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device
) -> set[int]:
    """Make of a newly built program what data made of it before it was saved.

    Args:
        program: The program, to be changed.
        store: Its empty parameter store.
        saved: The set-up.
        tensors: The saved state, for the shapes.
        device: The device.

    Returns:
        The ids of the parameters that Pyro does not see.
    """
    own = {n.removeprefix("program."): x.to(device) for n, x in tensors.items() if n.startswith("program.")}
    for name, value in saved["facts"].items():
        path, _, leaf = name.rpartition(".")
        if (module := _module(program, path)) is not None:
            module.__dict__[leaf] = value
    for name, tensor in (*program.named_parameters(), *program.named_buffers()):
        if is_lazy(tensor) and name in own:
            tensor.materialize(own[name].shape)
    program.bound_rows.gradients = saved["gradients"]
    program.restore()
    set_up(program, saved["guides"], device)
    for path in saved["containers"]:
        owner, _, leaf = path.rpartition(".")
        if _module(program, path) is None and (module := _module(program, owner)) is not None:
            setattr(module, leaf, PyroModule())
    known = forms(program)
    for name, entry in saved["made"].items():
        if known.get(name) != tuple(own[name].shape):
            _make(program, name, entry, own[name])
    parameters = dict(program.named_parameters())
    for name, entry in saved["store"].items():
        if "of" in entry and entry["of"] not in parameters:
            continue
        value = parameters[entry["of"]] if "of" in entry else tensors[f"store.{name}"].to(device).clone()
        store["params"][name] = value if "of" in entry else value.requires_grad_()
        store["constraints"][name] = constraint_from_json(entry["constraint"])
    everything = parameters | {f"store.{name}": value for name, value in store["params"].items()}
    return {id(everything[name]) for name in saved["unseen"] if name in everything}


def _made_to_json(program: nn.Module, name: str) -> dict[str, Any] | None:
    """How to make a tensor of the state again; None if it is not known."""
    path, _, leaf = name.rpartition(".")
    owner: Any = program.get_submodule(path)
    base = _base(leaf)
    if base == leaf or base not in getattr(owner, "_pyro_params", ()):
        return {"kind": "parameter" if leaf in owner._parameters else "buffer"}
    constraint, event_dim = owner._pyro_params[base]
    try:
        return {"kind": "pyro", "constraint": constraint_to_json(constraint), "event_dim": event_dim}
    except NotStored:
        return None


def _make(program: nn.Module, name: str, entry: Mapping[str, Any], value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner: Any = _module(program, path)
    if owner is None:
        return
    if entry["kind"] == "buffer":
        owner.register_buffer(leaf, value.clone())
    elif isinstance(owner, nn.ParameterList):
        if int(leaf) == len(owner):
            owner.append(nn.Parameter(value.clone()))
        else:
            owner[int(leaf)] = nn.Parameter(value.clone())
    else:
        owner.register_parameter(leaf, nn.Parameter(value.clone()))
        if entry["kind"] == "pyro":
            constraint = constraint_from_json(entry["constraint"])
            owner._pyro_params[_base(leaf)] = constraint, entry["event_dim"]


def _is_known(program: nn.Module, name: str) -> bool:
    """Whether a first run, too, finds a tensor that was made before it, and keeps it."""
    path, _, leaf = name.rpartition(".")
    if any(isinstance(module, AutoGuide | AutoMessenger) for module in _modules_on(program, path)):
        return True
    return isinstance(inspect.getattr_static(type(program.get_submodule(path)), _base(leaf), None), PyroParam)


def _base(leaf: str) -> str:
    """The name of a `PyroParam` whose unconstrained value has this name."""
    return leaf.removesuffix("_unconstrained")


def _modules_on(program: nn.Module, path: str) -> Iterator[nn.Module]:
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        yield program.get_submodule(".".join(parts[:end]))


def _module(program: nn.Module, path: str) -> nn.Module | None:
    try:
        return program.get_submodule(path)
    except AttributeError:
        return None


def _is_within(name: str, paths: Collection[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)
