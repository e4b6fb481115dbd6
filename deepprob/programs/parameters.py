"""The parameters of a program: those that a run uses, those that Pyro sees, and their constrained values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from operator import attrgetter

from pyro.nn import PyroModule
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import transform_to

from deepprob.networks.lifting import refuse_scripted
from deepprob.programs.copying import module_paths, path_to
from deepprob.programs.program import FunctionProgram, Program
from deepprob.programs.relative_guides import RelativeGuide
from deepprob.programs.sites import log_prob, sample_sites
from deepprob.programs.store import StoreState


def unseen_parameters(program: Program, store: StoreState, traces: Sequence[Trace]) -> set[int]:
    """The ids of the parameters that Pyro does not see in a run, and so would not train.

    They are networks without ``pyro.module``, and parameters inside of ``poutine.block``. All parameters of a subclass
    of `Program` are trained.

    Args:
        program: The program.
        store: Its parameter store.
        traces: Traces of its guide and its model.
    """
    if not isinstance(program, FunctionProgram):
        return set()
    names = {name for trace in traces for name, site in trace.nodes.items() if site["type"] == "param"}
    seen = {id(store["params"][name]) for name in names}
    # The objective runs the networks of baselines, and Pyro sees what it runs of its own modules.
    seen |= {id(p) for net in _baselines(traces) if isinstance(net, PyroModule) for p in net.parameters()}
    return {id(p) for p in (*program.parameters(), *store["params"].values())} - seen


def warn_of_late(names: Sequence[str]) -> None:
    """Name the parameters that join a running fit."""
    shown = ", ".join(repr(name.replace("$$$", ".")) for name in names)
    warnings.warn(
        f"the first run of the program did not register {shown}; a later run did, so the fit trains it from there, and "
        "the steps run eagerly.",
        UserWarning,
        stacklevel=5,
    )


def used_parameters(traces: Sequence[Trace]) -> list[Tensor]:
    """The parameters that the log-probabilities and baselines of a run depend on."""
    used = parameters_of([log_prob(site).sum() for t in traces for _, site in sample_sites(t)])
    return used + [p for net in _baselines(traces) for p in net.parameters() if p.requires_grad]


def _baselines(traces: Sequence[Trace]) -> list[nn.Module]:
    """The networks of baselines of score-function sites."""
    found = [s["infer"].get("baseline", {}).get("nn_baseline") for t in traces for _, s in sample_sites(t)]
    return [net for net in found if isinstance(net, nn.Module)]


def warn_of_unseen(program: Program, used: Sequence[Tensor]) -> None:
    """Name the networks whose weights a run uses although Pyro does not see them.

    Args:
        program: The program.
        used: The parameters that a run uses and Pyro does not see.
    """
    networks = {id(p) for p in program.parameters()}
    fns = program.__dict__.get("_model"), program.current_guide
    for path in sorted({path_to(fns, p) for p in used if id(p) in networks}):
        name = path.rpartition(".")[2]
        warnings.warn(
            f"the weights of {path} are used but not registered with Pyro, so they stay as they are. "
            f'To train them, write pyro.module("{name}", {path}) in the model.',
            UserWarning,
            stacklevel=5,
        )


def check_ownership(program: Program, store: StoreState, used: Sequence[Tensor]) -> None:
    """Refuse parameters of the caller that were not copied: they would be trained in place, or not at all.

    Raises:
        ValueError: If there are any; with its own words if they belong to a scripted module.
    """
    own = {id(p) for p in (*program.parameters(), *store["params"].values())}
    if program.bound_rows.gradients:  # a tensor that the program itself marked for a gradient is no parameter
        used = [p for p in used if isinstance(p, nn.Parameter)]
    if foreign := [p for p in used if id(p) not in own]:
        refuse_scripted(program, "the program", users_names(program))
        raise ValueError(
            f"the program reaches parameters that are not its own, one of shape {tuple(foreign[0].shape)}. "
            "Make their network an attribute of the program, a variable of the model's file or function, or an "
            "argument bound by functools.partial, so that the fit can copy it. Of a single parameter, use the value "
            "that pyro.param(name, start) returns."
        )


def constrained_value(program: nn.Module, path: str) -> tuple[str, Tensor]:
    """Name and value of a module's parameter; a `PyroParam` is stored as ``<name>_unconstrained``."""
    owner, _, name = path.rpartition(".")
    module = program.get_submodule(owner)
    if (constrained := name.removesuffix("_unconstrained")) in getattr(module, "_pyro_params", ()):
        name = constrained
    name = f"{owner}.{name}" if owner else name
    for place, guide in program.named_modules():
        if isinstance(guide, RelativeGuide) and name.startswith(f"{place}."):
            return name, guide.absolute(name.removeprefix(f"{place}."))
    return name, attrgetter(name)(program)


def constrained_parameters(program: Program, store: StoreState, is_kept: Callable[[Tensor], bool]) -> dict[str, Tensor]:
    """A copy of the parameters at their constrained values; see `ProgramInstance.constrained`.

    Args:
        program: The program.
        store: Its parameter store.
        is_kept: Which parameters to include.
    """
    named = {id(value): name.replace("$$$", ".") for name, value in store["params"].items()}
    found: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        while name in found:
            name = f"store.{name}"
        found[name] = value.detach().clone()

    own, users = dict(program.named_parameters()), users_names(program)
    for path, parameter in own.items():
        if is_kept(parameter):
            name, value = constrained_value(program, path)
            add(named.get(id(parameter), name if users(name) in found else users(name)), value)
    known = {id(parameter) for parameter in own.values()}
    for name, value in store["params"].items():
        if id(value) not in known and is_kept(value):
            add(named[id(value)], transform_to(store["constraints"][name])(value))
    return found


def users_names(program: Program) -> Callable[[str], str]:
    """From a parameter's name in a program to the words by which the user's functions reach it: ``net.weight``."""
    if not isinstance(program, FunctionProgram):
        return str
    paths = module_paths((program.__dict__["_model"], program.current_guide))
    known = {f"parts.{i}": paths.get(id(part), f"parts.{i}") for i, part in enumerate(program.parts)}

    def named(name: str) -> str:
        part = ".".join(name.split(".")[:2])
        words = known.get(part, part) + name[len(part) :]
        return words.removeprefix("model.").removeprefix("self.")

    return named


def buffer_named(program: nn.Module, name: str) -> Tensor:
    """A buffer of the program that is one number.

    Args:
        program: The program.
        name: Its full name, or the part after a dot.

    Raises:
        ValueError: If no buffer or several have this name, or the buffer is not one real number.
    """
    kept = program.state_dict().keys()
    buffers = {n: b for n, b in program.named_buffers(remove_duplicate=False) if n in kept}
    found = [n for n in buffers if n == name] or [n for n in buffers if n.endswith(f".{name}")]
    if len({id(buffers[n]) for n in found}) > 1:
        raise ValueError(f"{name!r} may be any of {', '.join(found)}. Give the whole name of one.")
    if not found:
        raise ValueError(
            f"the program has no buffer {name!r}, only {', '.join(buffers) or 'none at all'}. Register it: "
            f"self.register_buffer({name!r}, torch.tensor(1.0))."
        )
    buffer = buffers[found[0]]
    if buffer.shape != () or not buffer.is_floating_point():
        raise ValueError(
            f"the buffer {name!r} must be one real number; got shape {tuple(buffer.shape)}, {buffer.dtype}."
        )
    return buffer


def parameters_of(terms: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that a gradient of some terms would reach.

    Examples:
        >>> import torch
        >>> weight, shift = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
        >>> [p is weight for p in parameters_of([weight.exp() + shift.detach()])]
        [True]
    """
    found = []
    todo = [term.grad_fn for term in terms if term.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found.append(leaf)
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                todo.append(after)
    return found
