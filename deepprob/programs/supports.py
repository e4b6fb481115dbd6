"""Constraints as JSON, by their names in Pyro; the file that holds them never names code to import."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.constraints import Constraint

# Constraints with parameters: the class, and the attributes that its constructor takes.
_MADE: dict[str, tuple[Any, tuple[str, ...]]] = {
    "greater_than": (constraints.greater_than, ("lower_bound",)),
    "greater_than_eq": (constraints.greater_than_eq, ("lower_bound",)),
    "less_than": (constraints.less_than, ("upper_bound",)),
    "interval": (constraints.interval, ("lower_bound", "upper_bound")),
    "half_open_interval": (constraints.half_open_interval, ("lower_bound", "upper_bound")),
    "integer_interval": (constraints.integer_interval, ("lower_bound", "upper_bound")),
    "multinomial": (constraints.multinomial, ("upper_bound",)),
    "independent": (constraints.independent, ("base_constraint", "reinterpreted_batch_ndims")),
}
_PLAIN: dict[str, Any] = {n: c for n, c in vars(constraints).items() if isinstance(c, Constraint) and n != "dependent"}
_MOST_NUMBERS = 10_000


class NotStored(ValueError):
    """A constraint that a file does not hold."""


def constraint_to_json(constraint: Any, *, per_row: bool = False) -> Any:
    """A constraint as JSON.

    Args:
        constraint: The constraint.
        per_row: Whether bounds that differ from row to row must not be stored, because they are the user's data.

    Raises:
        NotStored: If the constraint is not one of Pyro's, or its bounds must not be stored.

    Examples:
        >>> constraint_to_json(constraints.interval(0.0, torch.tensor(2.0)))
        {'interval': [0.0, {'dtype': 'float32', 'shape': [], 'values': [2.0]}]}
        >>> constraint_from_json({"plain": "simplex"})
        Simplex()
    """
    for name, (kind, fields) in _MADE.items():
        if type(constraint) is kind:
            return {name: [_value_to_json(getattr(constraint, field), per_row) for field in fields]}
    for name, plain in _PLAIN.items():
        if type(constraint) is type(plain) and vars(constraint) == vars(plain):
            return {"plain": name}
    raise NotStored(f"constraint {constraint} cannot be stored")


def constraint_from_json(saved: Any) -> Any:
    """The inverse of `constraint_to_json`.

    Raises:
        ValueError: If there is no constraint of that name.
    """
    ((name, content),) = saved.items()
    if name == "plain" and content in _PLAIN:
        return _PLAIN[content]
    if name not in _MADE:
        raise ValueError(f"the file holds an unknown constraint {content if name == 'plain' else name!r}")
    return _MADE[name][0](*map(_value_from_json, content))


def _value_to_json(value: Any, per_row: bool) -> Any:
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Constraint):
        return {"constraint": constraint_to_json(value, per_row=per_row)}
    if not isinstance(value, Tensor):
        raise NotStored(f"a bound of type {type(value).__name__} cannot be stored")
    values = value.detach().flatten().tolist()
    if len({*values}) == 1:
        values = values[:1]
    if len(values) > (1 if per_row else _MOST_NUMBERS):
        raise NotStored("bounds that differ from row to row are not stored")
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "values": values}


def _value_from_json(saved: Any) -> Any:
    if not isinstance(saved, dict):
        return saved
    if "constraint" in saved:
        return constraint_from_json(saved["constraint"])
    values = torch.tensor(saved["values"], dtype=getattr(torch, saved["dtype"]))
    shape = torch.Size(saved["shape"])
    return values.expand(shape).clone() if len(values) == 1 and shape.numel() != 1 else values.reshape(shape)
