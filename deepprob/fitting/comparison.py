"""Eager and compiled steps compared, before compiled ones are trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deepprob.engine.noise import LiftedNoise
from deepprob.engine.packing import norm_of
from deepprob.engine.random import RandomStream
from deepprob.fitting.buckets import Views
from deepprob.fitting.gradients import GradientProgram
from deepprob.fitting.objectives import Terms
from deepprob.fitting.state import State, carried, gathered, repeated
from deepprob.fitting.step_loop import GRADIENTS, StepLoop
from deepprob.fitting.update_rules import Carry
from deepprob.programs.minibatch import num_rows

# Between eager and compiled terms and gradients, relative, by the precision of layers. Products in bfloat16 round to 3
# digits, and a fused sum rounds at other places; what grows out of that is measured, see `_compared`.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
_MOST_ROUNDING = 0.25  # beyond which a difference could be anything
# How far parameters are moved for the comparison; less where the bound is not finite there, as for small scales.
_SHIFTS = (1e-2, 1e-4, 0.0)


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [""])[0]


def first_difference(
    loops: Sequence[StepLoop],
    program: GradientProgram,
    state: State,
    views: Views,
    batch_size: int,
    stream: RandomStream,
) -> str:
    """What differs between eager and compiled steps in the first view where something does, in words."""
    for view, loop in enumerate(loops):
        try:
            difference = _difference(loop, program, state, views, view, batch_size, stream)
        except Exception as error:  # what a graph does on rows that it was not made for can be anything
            difference = f"the traced step fails on other rows ({first_line(error)})"
        if difference:
            return difference
    return ""


def _difference(
    loop: StepLoop,
    program: GradientProgram,
    state: State,
    views: Views,
    view: int,
    batch_size: int,
    stream: RandomStream,
) -> str:
    """Take one step both ways, at other parameters, on other rows and with the same noise; what differs, in words."""
    owned, device = state.owned, state.owned.device
    packed, buffers, annealed = state.carry["packed"], state.carry["buffers"], state.annealed
    before = [x.clone() for x in (*packed, *buffers, *annealed)]
    generators = [torch.Generator(device).manual_seed(seed) for seed in (11, 12)]
    shifts = [torch.randn(p.shape, generator=generators[0], dtype=p.dtype, device=device) for p in packed]
    try:
        data, rows = views.batches[view], views.fitting(view)
        if batch_size < num_rows(data):
            order = torch.randperm(len(rows), generator=generators[1], device=device).cpu()
            rows = repeated(rows[order], batch_size)
        rows = rows.to(device)
        normal, uniform = loop.noise_of(data).draw(1, generators, device)
        rates = torch.ones(1, 2 + len(annealed), dtype=packed[0].dtype, device=device)
        for i, x in enumerate(annealed, 2):
            rates[0, i] = 0.9 * x + 0.05
        carry = {n: [torch.zeros_like(x) for x in t] for n, t in carried(state).items()}
        carry |= {n: [x.clone() for x in state.carry[n]] for n in ("packed", "buffers")}
        batch, position = gathered(data, rows), stream.state

        def eager(program: GradientProgram) -> tuple[Terms, Carry]:
            """The terms, and what is carried on."""
            state.anneal(rates[0, 2:].tolist())
            stream.state = position
            with owned.running(), stream.drawing(), LiftedNoise(normal[0], uniform[0]):
                loss, terms, gradients = program(batch, rows, rates[0, 1])
            with torch.no_grad():
                flat = state.packing.pack(gradients)
                norm = norm_of(flat)
                after: Carry = {GRADIENTS: flat}
                if state.optimizer is None:
                    finite = torch.isfinite(loss) & torch.isfinite(norm)
                    step = torch.zeros((), dtype=torch.long, device=device)
                    after = loop.optimizer.advance(carry, flat, finite, rates[0, 0], step)
                after["buffers"] = [x.clone() for x in buffers]
                for x, value in zip(buffers, carry["buffers"], strict=True):
                    x.copy_(value)
            return terms | {"gradient_norm": norm}, after

        for shift in _SHIFTS:
            with torch.no_grad():
                for p, start, direction in zip(packed, before, shifts, strict=False):
                    p.copy_(start + shift * direction)
            carry["packed"] = [p.clone() for p in packed]
            expected = exact = eager(program)
            if bool(torch.isfinite(expected[0]["elbo"]) & torch.isfinite(expected[0]["gradient_norm"])):
                break
        else:
            return "the elbo or its gradient is not finite, so that nothing can be compared"
        stream.state = position
        with stream.drawing():
            new, record = loop(carry, data, rows.unsqueeze(0), normal, uniform, rates, 0)
        if loop.gradients.layers != "float32":
            exact = eager(GradientProgram(owned, replace(program.objective, layers="float32")))
        return _compared(loop, state, expected, exact, new, record[0])
    finally:
        with torch.no_grad():
            for x, value in zip([*packed, *buffers, *annealed], before, strict=True):
                x.copy_(value)


def _compared(
    loop: StepLoop, state: State, expected: tuple[Terms, Carry], exact: tuple[Terms, Carry], new: Carry, row: Tensor
) -> str:
    """Terms, gradients as the optimizer's memory shows them, and buffers: what differs, in words.

    Where layers round, an eager step is itself off what is exact; a compiled one may be off it by twice as much.
    """
    tolerance = TOLERANCE[loop.gradients.layers]
    terms = [{name: x.reshape(1) for name, x in step[0].items()} for step in (expected, exact)]
    found = {name: x.reshape(1) for name, x in zip(loop.names, row, strict=True) if name in terms[0]}
    norms = [{"gradient_norm": column.pop("gradient_norm")} for column in (found, *terms)]
    for a, b, c in ((found, *terms), norms):
        largest = max(1.0, *(float(x.abs()) for x in b.values()))
        if name := _far(a, b, c, dict.fromkeys(b, largest), tolerance):
            return f"the compiled {name} is {float(a[name]):.8g} where it should be {float(b[name]):.8g}"
    key = next(k for k in (GRADIENTS, "accumulated", "first") if k in new)
    columns = [dict(zip(state.params, state.packing.unpack(x[key]), strict=True)) for x in (new, expected[1], exact[1])]
    own = {name: float(x.abs().max()) for name, x in columns[1].items() if x.numel()}
    sizes = {name: max(size, 0.1 * max(own.values())) for name, size in own.items()}
    if name := _far(columns[0], columns[1], columns[2], sizes, tolerance):
        return f"the compiled gradient of {name} differs from the eager one"
    for x, y, z in zip(new["buffers"], expected[1]["buffers"], exact[1]["buffers"], strict=True):
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
    """The first of some tensors that is not what is expected; none has nan, which shows nothing.

    Args:
        found: By the compiled step.
        expected: By the eager one.
        exact: By an eager one without rounding.
        sizes: What differences are relative to.
        tolerance: How large they may be, beyond rounding.
    """
    rounding = max(_distance(expected[name], exact[name]) / size if size else 0.0 for name, size in sizes.items())
    allowed = tolerance + 2 * rounding
    if allowed > _MOST_ROUNDING:
        allowed = 0.0  # nothing could be seen
    for name, size in sizes.items():
        if not _distance(found[name], expected[name]) <= allowed * size:
            return name
    return ""


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
