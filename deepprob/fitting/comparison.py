"""An eager step and a loop, compared on the same inputs before the loop is trusted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepprob.engine.loop import Loop, Noise, PerStep, Step, StepData

# Largest relative difference, by the precision of layers. Products in bfloat16 round to 3 digits, and a fused sum
# rounds at other places; `difference` measures what grows out of that.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
_MOST_ROUNDING = 0.25  # beyond which a difference could be anything


class Trial(NamedTuple):
    """The inputs of one step.

    Attributes:
        carry: Where the step starts.
        data: What it sees of the data.
        noise: Its random numbers.
        knobs: Its knobs, shape ``(k,)``.
    """

    carry: Any
    data: StepData
    noise: Noise
    knobs: Tensor


class Reading(NamedTuple):
    """What a step's results show.

    Attributes:
        groups: Scalars by name; those of one group are compared relative to the largest of them (at least 1).
        named: Tensors by name, compared relative to their own size (at least a tenth of the largest of all).
        others: Tensors that are compared entry by entry.
    """

    groups: list[dict[str, Tensor]]
    named: dict[str, Tensor]
    others: list[Tensor]


Read = Callable[[Any, dict[str, Tensor]], Reading]
"""From a step's carry and record to its reading."""


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
    """What differs between a step as Python takes it and as a loop takes it, in words; empty if nothing does.

    Args:
        trials: Inputs. The first on which the eager step is finite is the one that counts.
        eager: The step as Python takes it.
        loop: The loop.
        read: What to compare.
        tolerance: Largest relative difference, beyond rounding.
        exact: The eager step without rounding, if `eager` rounds: it may be off by some rounding, and a loop by twice
            as much.
        drawing: Makes the context in which the loop runs, if it draws numbers that its noise does not serve.
    """
    for trial in trials:
        expected = read(*eager(*trial))
        if all(bool(torch.isfinite(x).all()) for group in expected.groups for x in group.values()):
            break
    else:
        return "the elbo or its gradient is not finite, so that nothing can be compared"
    with drawing():
        found = read(*_taken(loop, trial))
    exactly = expected if exact is None else read(*exact(*trial))
    return _differing(found, expected, exactly, tolerance)


def _taken(loop: Loop, trial: Trial) -> tuple[Any, dict[str, Tensor]]:
    """One step of a loop."""
    per_step = PerStep(trial.data.rows.unsqueeze(0), trial.knobs.unsqueeze(0))
    noise = Noise(*(x.unsqueeze(0) for x in trial.noise))
    carry, record = loop(trial.carry, per_step, trial.data.fixed, noise, int(trial.data.number))
    return carry, {name: x[0] for name, x in record.items()}


def _differing(found: Reading, expected: Reading, exact: Reading, tolerance: float) -> str:
    for a, b, c in zip(found.groups, expected.groups, exact.groups, strict=True):
        largest = max(1.0, *(float(x.abs()) for x in b.values()))
        if name := _far(a, b, c, dict.fromkeys(b, largest), tolerance):
            return f"the compiled {name} is {float(a[name]):.8g} where it should be {float(b[name]):.8g}"
    own = {name: float(x.abs().max()) for name, x in expected.named.items() if x.numel()}
    sizes = {name: max(size, 0.1 * max(own.values())) for name, size in own.items()}
    if name := _far(found.named, expected.named, exact.named, sizes, tolerance):
        return f"the compiled {name} differs from the eager one"
    for x, y, z in zip(found.others, expected.others, exact.others, strict=True):
        rounding = _distance(y, z) if y is not z else 0.0
        if not torch.allclose(x.double(), y.double(), rtol=tolerance, atol=tolerance + 2 * rounding):
            return "a buffer changes in another way when compiled"
    return ""


def _far(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    sizes: Mapping[str, float],
    tolerance: float,
) -> str:
    """Name of the first tensor outside of the tolerance, or "" if all agree.

    Args:
        found: By the loop.
        expected: By the eager step.
        exact: By an eager step without rounding.
        sizes: What differences are relative to.
        tolerance: How large they may be, beyond rounding.
    """
    rounding = max(
        (_distance(expected[name], exact[name]) / size if size else 0.0 for name, size in sizes.items()), default=0.0
    )
    allowed = tolerance + 2 * rounding
    if allowed > _MOST_ROUNDING:
        allowed = 0.0  # nothing could be seen
    for name, size in sizes.items():
        if not _distance(found[name], expected[name]) <= allowed * size:
            return name
    return ""


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
