"""A distribution taken apart into its tensors, and put together again from others."""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint

_PLAIN = (
    *(bool, int, float, complex, str, type(None), type),
    *(torch.Size, torch.dtype, torch.device, types.BuiltinFunctionType),
)
_MADE_OF_PARTS = (Distribution, Transform, Constraint)


def parts_of(distribution: Distribution, modules: Collection[nn.Module] = ()) -> list[Tensor]:
    """The tensors that a distribution is made of, in an order that depends on what it is made of alone.

    Args:
        distribution: The distribution.
        modules: Those whose tensors are known elsewhere, and stay in it (a program's networks).

    Raises:
        TypeError: If something in it may hold tensors that are not seen.

    Examples:
        >>> [x.shape for x in parts_of(torch.distributions.Normal(torch.zeros(3), torch.ones(3)))]
        [torch.Size([3]), torch.Size([3])]
    """
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    _mapped(distribution, note, {id(module): module for module in modules})
    return found


def with_parts(
    distribution: Distribution, parts: Iterable[Tensor], modules: Collection[nn.Module] = ()
) -> Distribution:
    """A distribution like another one, made of other tensors.

    Args:
        distribution: What it is like; it stays as it is.
        parts: As `parts_of` gave them.
        modules: As for `parts_of`.

    Examples:
        >>> like = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
        >>> with_parts(like, [torch.full((3,), 5.0), torch.ones(3)]).mean
        tensor([5., 5., 5.])
    """
    rest = iter(parts)
    made: Distribution = _mapped(distribution, lambda _: next(rest), {id(module): module for module in modules})
    return made


def _mapped(x: Any, change: Callable[[Tensor], Tensor], done: dict[int, Any]) -> Any:
    """A copy with other tensors; what occurs twice is copied once (a transform and its inverse know each other)."""
    if isinstance(x, _PLAIN) or (isinstance(x, types.FunctionType) and not x.__closure__ and not x.__defaults__):
        return x
    if isinstance(x, weakref.ref):
        return None  # of a transform to its inverse, which it makes again
    if id(x) in done:
        return done[id(x)]
    if isinstance(x, Tensor):
        new: Any = change(x)
    elif isinstance(x, _MADE_OF_PARTS) and not isinstance(x, nn.Module):
        done[id(x)] = new = copy.copy(x)
        new.__dict__.update({name: _mapped(value, change, done) for name, value in vars(x).items()})
    elif type(x) in (list, tuple):
        new = type(x)(_mapped(value, change, done) for value in x)
    elif type(x) is dict:
        new = {key: _mapped(value, change, done) for key, value in x.items()}
    else:
        raise TypeError(f"a {type(x).__name__} may hold tensors that are not seen")
    done[id(x)] = new
    return new
