"""Comparison of an eager step and a loop on the same inputs, before the loop is trusted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from deepprob.engine.loop import Loop, Step
from deepprob.engine.loop_inputs import Noise, PerStep, StepData

# Largest relative difference, by the precision of layers. Products in bfloat16 round to 3 digits, and a fused sum
# rounds at other places; `difference` measures how far such rounding grows.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
# Beyond these shares, rounding could hide any error.
_MOST_ROUNDING, _MOST_FLOAT32_ROUNDING = 0.25, 1e-3
_NEARBY = 4  # steps at numbers one unit off, of which the largest distance counts


class Trial(NamedTuple):
    """The inputs of one step.

    Attributes:
        carry: The carry before the step.
        data: The data of the step.
        noise: The random numbers of the step.
        knobs: The knobs of the step, shape ``(k,)``.
    """

    carry: Any
    data: StepData
    noise: Noise
    knobs: Tensor


class Reading(NamedTuple):
    """The results of a step that are compared.

    Attributes:
        groups: Groups of scalars by name. Differences are relative to the largest scalar of the group, at least 1.
        named: Tensors by name. Differences are relative to the tensor's largest entry, at least a tenth of the largest
            entry of all.
        others: Tensors by name that are compared entry by entry.
    """

    groups: list[dict[str, Tensor]]
    named: dict[str, Tensor]
    others: dict[str, Tensor]


Read = Callable[[Any, dict[str, Tensor]], Reading]
"""A function ``(carry, record) -> Reading``."""


def difference(
    trials: Iterable[Trial],
    eager: Step,
    loop: Loop,
    read: Read,
    *,
    tolerance: float = 1e-5,
    exact: Step | None = None,
    drawing: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> str:
    """Compare one step of a loop with the eager step.

    The rounding of the eager step is its distance from `exact`, or from itself with every number of the carry moved by
    one unit in the last place; the loop may differ by twice as much beyond the tolerance. A gradient that is a small
    difference of large numbers rounds by more than the tolerance.

    Args:
        trials: Inputs to try in turn. The first one on which the eager step is finite is compared.
        eager: The step run by Python.
        loop: The loop.
        read: Selects the results to compare.
        tolerance: Largest relative difference, beyond rounding.
        exact: The eager step in full precision, if `eager` runs layers in less.
        drawing: Makes the context in which the loop runs, for draws that its noise does not serve.

    Returns:
        The first difference, as a clause for a message; empty if there is none.
    """
    for trial in trials:
        expected = read(*eager(*trial))
        not_finite = _not_finite(expected)
        if not not_finite:
            break
    else:
        return f"the eager {not_finite} is not finite, so compiled and eager steps cannot be compared"
    with drawing():
        found = read(*_one_step(loop, trial))
    if exact is not None:
        return _first_difference(found, expected, read(*exact(*trial)), tolerance, _MOST_ROUNDING)
    first = _first_difference(found, expected, expected, tolerance, 0.0)
    for seed in range(_NEARBY if first else 0):
        nearby = read(*eager(*trial._replace(carry=_one_unit_off(trial.carry, seed))))
        if not _first_difference(found, expected, nearby, tolerance, _MOST_FLOAT32_ROUNDING):
            return ""
    return first


def _one_unit_off(carry: Any, seed: int) -> Any:
    """A carry whose numbers are moved by one unit in the last place, at random up or down."""
    generator = torch.Generator().manual_seed(seed)

    def moved(x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            return x
        up = torch.rand(x.shape, generator=generator).to(x.device) < 0.5
        return torch.nextafter(x.detach(), torch.where(up, torch.inf, -torch.inf).to(x.dtype))

    return tree_map(moved, carry)


def _not_finite(reading: Reading) -> str:
    """Name of the first scalar or tensor that is not finite, or "" if all are."""
    compared = [*reading.groups, reading.named]
    return next((name for group in compared for name, x in group.items() if not bool(torch.isfinite(x).all())), "")


def _one_step(loop: Loop, trial: Trial) -> tuple[Any, dict[str, Tensor]]:
    """The carry and record of one step of a loop."""
    per_step = PerStep(trial.data.rows.unsqueeze(0), trial.knobs.unsqueeze(0))
    noise = Noise(*(x.unsqueeze(0) for x in trial.noise))
    carry, record = loop(trial.carry, per_step, trial.data.fixed, noise, int(trial.data.number))
    return carry, {name: x[0] for name, x in record.items()}


def _first_difference(found: Reading, expected: Reading, exact: Reading, tolerance: float, most: float) -> str:
    for a, b, c in zip(found.groups, expected.groups, exact.groups, strict=True):
        largest = max(1.0, *(float(x.abs()) for x in b.values()))
        if name := _first_outside(a, b, c, dict.fromkeys(b, largest), tolerance, most):
            return f"the compiled {name} is {float(a[name]):.8g} but the eager one is {float(b[name]):.8g}"
    own = {name: float(x.abs().max()) for name, x in expected.named.items() if x.numel()}
    sizes = {name: max(size, 0.1 * max(own.values())) for name, size in own.items()}
    if name := _first_outside(found.named, expected.named, exact.named, sizes, tolerance, most):
        return f"the compiled {name} differs from the eager one"
    for name, y in expected.others.items():
        rounding = _largest_difference(y, exact.others[name]) if y is not exact.others[name] else 0.0
        if not torch.allclose(found.others[name].double(), y.double(), rtol=tolerance, atol=tolerance + 2 * rounding):
            return f"the compiled {name} differs from the eager one"
    return ""


def _first_outside(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    sizes: Mapping[str, float],
    tolerance: float,
    most: float,
) -> str:
    """Name of the first tensor outside the tolerance, or "" if all agree.

    Args:
        found: Results of the loop.
        expected: Results of the eager step.
        exact: Results of the eager step in full precision.
        sizes: The size that each difference is relative to.
        tolerance: Largest relative difference, beyond rounding.
        most: The largest rounding, relative too, in which an error can still be told.
    """
    rounding = max(
        (_largest_difference(expected[name], exact[name]) / size if size else 0.0 for name, size in sizes.items()),
        default=0.0,
    )
    allowed = tolerance + 2 * rounding
    if rounding and allowed > most:
        allowed = 0.0  # no difference could be told from rounding
    for name, size in sizes.items():
        if not _largest_difference(found[name], expected[name]) <= allowed * size:
            return name
    return ""


def _largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
