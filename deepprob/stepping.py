"""What takes the steps of a fit: Python one by one, or compiled code many at once; and which of the two."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from deepprob.compiled import GRADIENTS, StepLoop
from deepprob.engine.dynamic_length import NotAlike
from deepprob.engine.machine import without_collector
from deepprob.engine.native.cache import NoCompiler, compiler
from deepprob.engine.noise import LiftedNoise
from deepprob.engine.packing import norm_of
from deepprob.engine.random import RandomStream
from deepprob.engine.trace import Untraceable
from deepprob.fitting import Knobs, State, Stepper
from deepprob.held_out import HeldOut
from deepprob.lengths import Views, sequence_lengths
from deepprob.objectives import Objective, Terms
from deepprob.optimizers import FloatArray, Optimizer
from deepprob.programs.minibatch import Batch, num_rows
from deepprob.tracing import GradientProgram, trace_gradients
from deepprob.updates import Carry

# Between eager and compiled terms and gradients, relative, by the precision of layers. Products in bfloat16 round to 3
# digits, and a fused sum rounds at other places; what grows out of that is measured, see `_compared`.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
_MOST_ROUNDING = 0.25  # beyond which a difference could be anything
# How far parameters are moved for the comparison; less where the bound is not finite there, as for small scales.
_SHIFTS = (1e-2, 1e-4, 0.0)

# What a compiled fit costs and gains, in seconds; measured on two cores, see benchmarks/README.md.
_COMPILING, _COMPILING_AN_OPERATION = 8.0, 0.02
_ANY_LENGTH = 1.3  # times as much where sequences may be of any length
_GAINED_AN_OPERATION = 1e-5
_FEWEST_STEPS = 1000  # below which nothing is gained, whatever the program
_A_LENGTH = 2**38  # multiplications that take about as long as one more compilation

_CAPACITY = 1024
_NOISE_BYTES = 2**25
_CALL = 2**35  # multiplications in one call, so that it ends in about a second


class EagerStepper:
    """Steps as Python takes them.

    Args:
        take: One step, from the state, all rows, those of its batch and its knobs.
        views: All rows, on the device.
    """

    capacity = 1
    specialisations = 0

    def __init__(self, take: Callable[[State, Batch, Tensor, Knobs], Terms], views: Views) -> None:
        self.take, self.views = take, views

    def run(self, state: State, rows: Tensor, knobs: FloatArray) -> Terms:
        taken, on_device = [], rows.to(state.owned.device)
        for view, first, end in self.views.runs(rows):
            for i in range(first, end):
                taken.append(self.take(state, self.views.batches[view], on_device[i], Knobs.of(knobs[i])))
        return {name: torch.stack([terms[name] for terms in taken]) for name in taken[0]}


class CompiledStepper:
    """Steps taken many at once by a `StepLoop`.

    Args:
        loops: A loop for every view.
        views: All rows, on the device.
        noise: The fit's random numbers.
    """

    def __init__(self, loops: Sequence[StepLoop], views: Views, noise: RandomStream) -> None:
        self.loops, self.views, self.noise = loops, views, noise
        self.capacity = min(loop.capacity for loop in loops)
        self.specialisations = sum(loop.is_compiled for loop in set(loops))

    def run(self, state: State, rows: Tensor, knobs: FloatArray) -> Terms:
        like = state.carry["packed"][0]
        rates = torch.from_numpy(knobs).to(like.device, like.dtype)
        on_device = rows if self.loops[0].full else rows.to(like.device)
        records = []
        for view, first, end in self.views.runs(rows):
            loop, steps = self.loops[view], slice(first, end)
            data = self.views.batches[view]
            normal, uniform = loop.noise_of(data).draw(end - first, self.noise.ahead, like.device)
            new, record = loop(_inside(state), data, on_device[steps], normal, uniform, rates[steps], state.step)
            if state.optimizer is None:
                state.take(new)
                state.step += end - first
            else:  # one step, whose gradients are compiled and whose update is torch's
                finite = record[0, loop.names.index("skipped")] == 0
                state.update(new[GRADIENTS], finite, float(knobs[first, 0]), loop.optimizer)
                state.take({"buffers": new["buffers"]})
            records.append(record.clone())  # the loop's own memory on a GPU
        state.anneal(knobs[-1, 2:].tolist())  # who looks between calls sees them
        record = torch.cat(records)
        return dict(zip(self.loops[0].names, record.unbind(1), strict=True))


def views_of(compile: bool | str, state: State, data: Batch, *, batch_size: int, steps: int) -> Views:
    """The rows of a fit, sequences cut to lengths that save more than they cost.

    Args:
        compile: True, False or ``"auto"``; where a fit compiles in any case or never, savings need no reason.
        state: What the first step starts from.
        data: All rows, on the device.
        batch_size: Rows of a step.
        steps: How many are planned.
    """
    owned = state.owned
    by_row = isinstance(owned.program.current_guide, AutoGuide) and bool(owned.structure.local)
    lengths = None if by_row else sequence_lengths(owned.program, data)  # a guide's parameters have one length
    compiled = compile is True or (compile == "auto" and steps >= _FEWEST_STEPS)
    weighed = compiled and compile == "auto"
    worth = _A_LENGTH / (state.work(batch_size) * steps) if weighed else 0.0
    return Views(data, lengths, batch_size, worth, roomy=compiled and owned.device.type == "cpu")


def choose_stepper(
    compile: bool | str,
    state: State,
    eager: EagerStepper,
    *,
    objective: Objective,
    optimizer: Optimizer,
    batch_size: int,
    steps: int,
    noise: RandomStream,
    talk: bool = True,
) -> Stepper:
    """Compiled steps where that is wanted, pays and works; else eager ones, with one line that says why.

    ``"auto"`` decides from the number of steps and the number of operations in one, never by a clock: one seed gives
    one result.

    Args:
        compile: True, False or ``"auto"``.
        state: What the first step starts from.
        eager: The other choice.
        objective: What is maximised.
        optimizer: How.
        batch_size: Rows of a step.
        steps: How many are planned.
        noise: The fit's random numbers.
        talk: Whether to say that compiling takes a while.
    """
    short = compile is False or (compile == "auto" and steps < _FEWEST_STEPS)
    restored = {id(x) for x in state.carry["buffers"]}
    if short and all(id(x) in restored for x in state.owned.program.buffers()):
        return eager
    program, stream = GradientProgram(state.owned, objective), RandomStream(0, state.owned.device)
    views = eager.views
    state.owned.program.train()
    with state.owned.running(), stream.drawing():
        size, changed = program.measure(*_example(views, len(views.batches) - 1, batch_size, state))
    state.carry["buffers"] = changed  # a step that is skipped changes none of them, however it is taken
    if short or (compile == "auto" and not _pays(steps, size.operations)):
        return eager
    try:
        with without_collector():
            loops, failure, difference = _loops(program, state, optimizer, views, batch_size, stream, talk)
    except Untraceable as error:
        _warn(str(error))
        return eager
    if failure:
        _warn(failure, "its graph runs uncompiled")
    if difference:
        _warn(difference)
        return eager
    return CompiledStepper(loops, views, noise)


def _loops(
    program: GradientProgram,
    state: State,
    optimizer: Optimizer,
    views: Views,
    batch_size: int,
    stream: RandomStream,
    talk: bool,
) -> tuple[list[StepLoop], str, str]:
    """The loop for every view; what went wrong when they were compiled, and what they do otherwise than eager steps.

    One loop serves all views where that can be and is right; else each has its own.

    Raises:
        Untraceable: If there is none.
    """

    def traced(view: int) -> StepLoop:
        with state.owned.running(), stream.drawing():
            return _trace(program, state, optimizer, views, view, batch_size)

    def checked(loops: list[StepLoop]) -> tuple[list[StepLoop], str, str]:
        failure = _compiled(list(dict.fromkeys(loops)), talk)
        return loops, failure, _first_difference(loops, program, state, views, batch_size, stream)

    count = len(views.batches)
    if count > 1 and state.owned.device.type == "cpu":
        shortest, longest = traced(0), traced(count - 1)
        with contextlib.suppress(NotAlike):
            longest.serve_any_length(shortest)
            loops, failure, difference = checked([longest] * count)
            if not difference:
                return loops, failure, difference
    return checked([traced(view) for view in range(count)])


def _compiled(loops: Sequence[StepLoop], talk: bool) -> str:
    """Compile loops, and say so before; what went wrong, in words."""
    fresh = [loop for loop in loops if not loop.is_cached()]
    if fresh and (failure := _failure(compiler)):
        return failure
    if talk and fresh:
        seconds = sum(
            (_COMPILING + _COMPILING_AN_OPERATION * loop.operations) * (_ANY_LENGTH if loop.any_length else 1)
            for loop in fresh
        )
        what = "the step" if len(loops) == 1 else f"the step for {len(loops)} lengths of sequences"
        operations = " + ".join(str(loop.operations) for loop in fresh)
        print(f"compiling {what} ({operations} operations), about {seconds:.0f} s", file=sys.stderr)
    failures = [_failure(loop.compile) for loop in loops]
    return next(filter(None, failures), "")


def _trace(
    program: GradientProgram, state: State, optimizer: Optimizer, views: Views, view: int, batch_size: int
) -> StepLoop:
    """The loop for one view, inside a running program.

    Raises:
        Untraceable: If there is none.
    """
    gradients = trace_gradients(program, *_example(views, view, batch_size, state))
    if {id(x) for x in state.annealed} & {id(x) for x in gradients.buffers}:
        raise Untraceable("it writes to a buffer that a callback anneals")
    if view and [id(x) for x in gradients.buffers] != [id(x) for x in state.carry["buffers"]]:
        raise Untraceable("it changes other buffers when sequences have another length")
    state.carry["buffers"] = gradients.buffers
    noise = gradients.noise.normal + gradients.noise.uniform
    capacity = _capacity(state, batch_size, noise) if state.optimizer is None else 1
    data = views.batches[view]
    try:
        return StepLoop(
            gradients, state.packing, optimizer, _inside(state), data, batch_size, capacity, state.annealed
        )  # fmt: skip
    except Exception as error:  # of torch's, on a graph that it made itself
        raise Untraceable(f"its graph cannot be looped ({_first_line(error)})") from error


def _example(views: Views, view: int, batch_size: int, state: State) -> tuple[Batch, Tensor]:
    """A batch that fits a view, and which rows they are."""
    rows = _repeated(views.fitting(view), batch_size).to(state.owned.device)
    return _gathered(views.batches[view], rows), rows


def _repeated(rows: Tensor, count: int) -> Tensor:
    return rows.repeat(-(-count // len(rows)))[:count]


def _gathered(data: Batch, rows: Tensor) -> Batch:
    return data if len(rows) == num_rows(data) else tuple(x.index_select(0, rows) for x in data)


def compile_score(held_out: HeldOut, times: int, *, always: bool) -> None:
    """Compile the held-out score of a compiled fit where that pays; a score that cannot be compiled stays as it is.

    Args:
        held_out: The score.
        times: How often it will be taken.
        always: Whether to compile whether it pays or not.
    """
    if not always and not _pays(times, held_out.operations):
        return
    if failure := _failure(held_out.compile):
        _warn(failure, "the held-out score is taken eagerly")


def _failure(compile: Callable[[], object]) -> str:
    """Compile; what went wrong, in words."""
    try:
        compile()
    except Untraceable as error:
        return str(error)
    except NotAlike:
        raise
    except NoCompiler as error:
        return str(error)
    except Exception as error:  # torch's compiler has no error of its own for what it cannot do
        return f"torch's compiler failed with {type(error).__name__}: {_first_line(error)}"
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _inside(state: State) -> Carry:
    """What compiled steps carry: all, or what gradients need where torch's own optimizer updates the parameters."""
    if state.optimizer is None:
        return state.carry
    packed = state.carry["packed"]
    return {"packed": packed, "buffers": state.carry["buffers"], GRADIENTS: [torch.zeros_like(p) for p in packed]}


def _pays(steps: int, operations: int) -> bool:
    cost = _COMPILING + _COMPILING_AN_OPERATION * operations
    return steps * operations * _GAINED_AN_OPERATION > cost


def _capacity(state: State, batch_size: int, numbers: int) -> int:
    """Steps in one call: few enough for its noise and its time to stay small."""
    return max(1, min(_CAPACITY, _NOISE_BYTES // (4 * numbers + 1), _CALL // (state.work(batch_size) + 1)))


def _warn(why: str, what: str = "the steps run eagerly, and more slowly") -> None:
    warnings.warn(f"not compiled: {why}; {what}.", UserWarning, stacklevel=4)


def _first_difference(
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
            difference = f"the traced step fails on other rows ({_first_line(error)})"
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
            rows = _repeated(rows[order], batch_size)
        rows = rows.to(device)
        normal, uniform = loop.noise_of(data).draw(1, generators, device)
        rates = torch.ones(1, 2 + len(annealed), dtype=packed[0].dtype, device=device)
        for i, x in enumerate(annealed, 2):
            rates[0, i] = 0.9 * x + 0.05
        carry = {n: [torch.zeros_like(x) for x in t] for n, t in _inside(state).items()}
        carry |= {n: [x.clone() for x in state.carry[n]] for n in ("packed", "buffers")}
        batch, position = _gathered(data, rows), stream.state

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
