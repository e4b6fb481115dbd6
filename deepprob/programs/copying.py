"""Copies of callables, together with the modules that they capture.

A model is often a function that reaches its networks through a closure or a global name. A fit must not train the
caller's networks in place, so the function is copied together with the modules that it captured.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import types
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from pyro.params import user_param_name
from torch import nn
from torch.distributions import Transform

from deepprob.programs.random_network import RandomNetwork


def captured_modules(fn: Any) -> list[nn.Module]:
    """The modules that a callable is, is bound to, or reaches through its closure and globals, each once."""
    found: dict[int, nn.Module] = {}
    for _, value in _walk(fn, set()):
        if isinstance(value, nn.Module):
            found.setdefault(id(value), value)
    return list(found.values())


def functions_of(fns: Any) -> list[types.FunctionType]:
    """The functions that callables are, or reach through their closures and the globals of their file."""
    return [value for _, value in _walk(fns, set()) if isinstance(value, types.FunctionType)]


class CapturedModules(nn.ModuleList):
    """The modules that some callables reach. Those in evaluation mode stay in it, as Pyro leaves them.

    Args:
        fns: The callables.
        resting: The modules that stay in evaluation mode; None for those that are in it now.
    """

    def __init__(self, fns: Any, resting: tuple[nn.Module, ...] | None = None) -> None:
        super().__init__(captured_modules(fns))
        self.resting = tuple(m for m in self.modules() if not m.training) if resting is None else resting

    def train(self, mode: bool = True) -> CapturedModules:
        """Set the mode of all modules but the resting ones."""
        super().train(mode)
        for module in self.resting:
            module.training = False
        return self


def check_containers(fn: Any, known: Iterable[nn.Module]) -> None:
    """Refuse networks that a run has put into a list or dict around a function, which the fit has not copied.

    Args:
        fn: A callable.
        known: The networks that the fit has copied.

    Raises:
        ValueError: If there are any.
    """
    own = {id(module) for module in known}
    found = [(path, id(value) in own) for path, value in _walk(fn, set()) if isinstance(value, nn.Module)]
    copied = {path.partition("[")[0] for path, is_own in found if is_own}  # with the networks that they had
    for path, _ in found:
        name, bracket, _ = path.partition("[")
        # A list of an object, self.nets, was copied with the object.
        if bracket and "." not in name and name not in copied:
            raise ValueError(
                f"a run of the program made the network {path}, in a list or dict that is not the fit's own. Make it "
                "before the fit, or give it a global name or an attribute of its own."
            )


def path_to(fns: tuple[Any, ...], parameter: torch.Tensor) -> str:
    """The words by which the code of some callables reaches the module that holds a parameter.

    Examples:
        >>> net = nn.Linear(1, 1)
        >>> path_to((lambda x: net(x),), net.weight)
        'net'
    """
    seen: set[int] = set()
    modules = ((path, x) for fn in fns for path, x in _walk(fn, seen) if isinstance(x, nn.Module))
    return next((path for path, module in modules if any(parameter is p for p in module.parameters())), "a network")


def lifted_weight(modules: Iterable[nn.Module], site: str) -> torch.Tensor | None:
    """The weight that became a site: of a lifted network, or by ``poutine.lift`` or ``random_module``.

    The latter two do not tell whose weight a site is, so one network alone must have its name.

    Examples:
        >>> net = nn.Linear(1, 1)
        >>> torch.equal(lifted_weight([net], "net$$$bias"), net.bias), lifted_weight([net, net], "net$$$bias")
        (True, None)
    """
    modules = list(modules)
    for net in (part for module in modules for part in module.modules() if isinstance(part, RandomNetwork)):
        if (start := net.start(site)) is not None:
            return start
    name = user_param_name(site)
    weights = [dict(part.named_parameters()).get(name) for part in modules] if name != site else []
    found = [weight.detach().clone() for weight in weights if weight is not None]
    return found[0] if len(found) == 1 else None


def module_paths(fns: tuple[Any, ...]) -> dict[int, str]:
    """The words by which the code of some callables reaches each module that it holds itself, by the module's id."""
    seen: set[int] = set()
    return {id(x): path for fn in fns for path, x in _walk(fn, seen) if isinstance(x, nn.Module)}


def forget_values(module: nn.Module) -> None:
    """Clear the caches of a module's transforms.

    A transform recognizes its last input by identity, so after an update of its parameters it would return the old
    result for the same data.
    """
    for part in module.modules():
        if isinstance(part, Transform):
            for name, value in list(vars(part).items()):
                if name == "_cached_x_y":
                    part.__dict__[name] = (None, None)
                elif name.startswith("_cache") and isinstance(value, torch.Tensor):
                    part.__dict__[name] = None


def copy_with_modules(fns: Any, memo: dict[Any, Any] | None = None) -> Any:
    """Copy a callable, or a tuple of callables, together with every module that it captures.

    The copies share a module if the originals do.

    Args:
        fns: A callable or a tuple of callables (other values are returned as they are).
        memo: As in ``copy.deepcopy``.

    Examples:
        >>> net = nn.Linear(1, 1)
        >>> def f(x):
        ...     return net(x)
        >>> g = copy_with_modules(f)
        >>> captured_modules(g)[0] is net, captured_modules(f)[0] is net
        (False, True)
    """
    memo = {} if memo is None else memo
    if isinstance(fns, tuple):
        return tuple(copy_with_modules(fn, memo) for fn in fns)
    return _copy(fns, memo)


def _globals_used(fn: types.FunctionType) -> dict[str, Any]:
    """Global names that a function's code, nested code included, refers to, in the order of the code."""
    # The order names the parameters in a saved file, so it must be the same in every process.
    names: dict[str, None] = {}
    todo = [fn.__code__]
    while todo:
        code = todo.pop(0)
        names |= {i.argval: None for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        todo.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
    return {name: fn.__globals__[name] for name in names if name in fn.__globals__}


def _partial_parts(value: functools.partial[Any]) -> tuple[Any, ...]:
    # Pyro's handlers use a subclass whose own .func already contains the arguments: read the slot of the base class.
    return (functools.partial.func.__get__(value), *value.args)


def cell_content(cell: types.CellType) -> Any:
    """The content of a closure's cell, or None if the name is not bound yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _is_followed(value: Any, fn: types.FunctionType) -> bool:
    """Whether to follow a global: a network, a list or dict of networks, or a function of the same file."""
    parts = value.values() if type(value) is dict else value if type(value) in (list, tuple) else [value]
    if any(isinstance(part, nn.Module) for part in parts):
        return True
    return isinstance(value, types.FunctionType) and value.__module__ == fn.__module__


def _walk(value: Any, seen: set[int], path: str = "model") -> Iterator[tuple[str, Any]]:
    """The modules and functions that a value reaches, each with the words by which the code reaches it."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield path, value
        if isinstance(value, AutoGuide):
            yield from _walk(getattr(value, "_model", None), seen, path)
    elif inspect.ismethod(value):
        yield from _walk(value.__self__, seen, "self")
        yield from _walk(value.__func__, seen, path)
    elif isinstance(value, functools.partial):
        for part in _partial_parts(value):
            yield from _walk(part, seen, path)
        for name, part in value.keywords.items():
            yield from _walk(part, seen, name)
    elif isinstance(value, types.FunctionType):
        yield path, value
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            yield from _walk(cell_content(cell), seen, name)
        for name, part in _globals_used(value).items():
            if _is_followed(part, value):
                yield from _walk(part, seen, name)
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _walk(part, seen, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _walk(part, seen, f"{path}[{key!r}]")
    elif hasattr(value, "__dict__") and not isinstance(value, type | types.ModuleType):
        for name, part in vars(value).items():
            if isinstance(part, nn.Module | list | tuple | dict):
                yield from _walk(part, seen, f"{path}.{name}")


def _copy(value: Any, memo: dict[Any, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Module):
        return _copy_module(value, memo)
    if isinstance(value, types.FunctionType):
        return _copy_function(value, memo)
    if inspect.ismethod(value):
        return types.MethodType(_copy(value.__func__, memo), _copy(value.__self__, memo))
    if isinstance(value, functools.partial):
        keywords = {k: _copy(v, memo) for k, v in value.keywords.items()}
        target, *arguments = [_copy(part, memo) for part in _partial_parts(value)]
        return functools.partial(target, *arguments, **keywords)
    if type(value) in (list, tuple, dict):
        return _copy_container(value, memo)
    if isinstance(value, type | types.ModuleType | str) or value is None:
        return value
    if isinstance(value, torch.Tensor):
        return value  # data and initial values are read, never trained in place
    try:
        return copy.deepcopy(value, memo)
    except TypeError:
        if captured_modules(value):
            raise
        return value  # a lock, a file, a generator: nothing in it is trained


def _copy_container(value: Any, memo: dict[Any, Any]) -> Any:
    if not captured_modules(value):
        return value
    twin: Any
    if isinstance(value, dict):
        twin = {key: _copy(part, memo) for key, part in value.items()}
    else:
        twin = type(value)(_copy(part, memo) for part in value)
    memo[id(value)] = twin
    return twin


def _copy_module(module: nn.Module, memo: dict[Any, Any]) -> nn.Module:
    forget_values(module)
    # Copying an AutoGuide clears its model and its master, in the original as well.
    guides = [m for m in module.modules() if isinstance(m, AutoGuide)]
    kept = [(g.__dict__["_model"], g.__dict__["master"]) for g in guides]
    try:
        twin = copy.deepcopy(module, memo)
    finally:
        for guide, (model, master) in zip(guides, kept, strict=True):
            guide.__dict__.update(_model=model, master=master)
    for guide, (model, _) in zip(guides, kept, strict=True):
        memo[id(guide)].__dict__["_model"] = tuple(_copy(m, memo) for m in model)
    return twin


def _copy_function(fn: types.FunctionType, memo: dict[Any, Any]) -> types.FunctionType:
    if not any(isinstance(x, nn.Module) or _sets_a_name(x) for _, x in _walk(fn, set())):
        return fn
    # Functions of one file, or around one variable, share the copy, where the first run may put a network.
    pairs = [(c, memo.setdefault(("cell", id(c)), types.CellType())) for c in fn.__closure__ or ()]
    scope = memo.setdefault(("globals", id(fn.__globals__)), dict(fn.__globals__))
    twin = types.FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__, tuple(c for _, c in pairs) or None)
    twin.__kwdefaults__ = fn.__kwdefaults__
    twin.__dict__.update(fn.__dict__)
    memo[id(fn)] = twin  # before its captures: a recursive function captures itself
    for original, cell in pairs:
        with suppress(ValueError):  # a name that is not bound yet
            cell.cell_contents = _copy(original.cell_contents, memo)
    for name, part in _globals_used(fn).items():
        if _is_followed(part, fn):
            scope[name] = _copy(part, memo)
    return twin


def _sets_a_name(fn: types.FunctionType) -> bool:
    """Whether a function sets a global name or a variable around it that is unset or None, as for a lazy network."""
    around = dict(zip(fn.__code__.co_freevars, map(cell_content, fn.__closure__ or ()), strict=True))
    todo = [fn.__code__]
    while todo:
        code = todo.pop()
        for i in dis.get_instructions(code):
            if i.opname == "STORE_GLOBAL" and fn.__globals__.get(i.argval) is None:
                return True
            if i.opname == "STORE_DEREF" and i.argval in around and around[i.argval] is None:
                return True
        todo.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
    return False
