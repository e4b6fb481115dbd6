"""What takes the steps of a fit: Python one by one, or compiled code many at once; and which of the two."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from deepprob.engine.dynamic_length import NotAlike
from deepprob.engine.machine import without_collector
from deepprob.engine.native.cache import NoCompiler, compiler
from deepprob.engine.random import RandomStream
from deepprob.engine.trace import Untraceable
from deepprob.fitting.buckets import Views
from deepprob.fitting.comparison import first_difference, first_line
from deepprob.fitting.cost_model import ANY_LENGTH, COMPILING, COMPILING_AN_OPERATION, FEWEST_STEPS, capacity_of, pays
from deepprob.fitting.gradients import GradientProgram, trace_gradients
from deepprob.fitting.held_out import HeldOut
from deepprob.fitting.objectives import Objective, Terms
from deepprob.fitting.optimizers import FloatArray, Optimizer
from deepprob.fitting.state import Knobs, State, carried, gathered, repeated
from deepprob.fitting.step_loop import GRADIENTS, StepLoop
from deepprob.programs.minibatch import Batch


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
            new, record = loop(carried(state), data, on_device[steps], normal, uniform, rates[steps], state.step)
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
    short = compile is False or (compile == "auto" and steps < FEWEST_STEPS)
    restored = {id(x) for x in state.carry["buffers"]}
    if short and all(id(x) in restored for x in state.owned.program.buffers()):
        return eager
    program, stream = GradientProgram(state.owned, objective), RandomStream(0, state.owned.device)
    views = eager.views
    state.owned.program.train()
    with state.owned.running(), stream.drawing():
        size, changed = program.measure(*_example(views, len(views.batches) - 1, batch_size, state))
    state.carry["buffers"] = changed  # a step that is skipped changes none of them, however it is taken
    if short or (compile == "auto" and not pays(steps, size.operations)):
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
        return loops, failure, first_difference(loops, program, state, views, batch_size, stream)

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
            (COMPILING + COMPILING_AN_OPERATION * loop.operations) * (ANY_LENGTH if loop.any_length else 1)
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
    capacity = capacity_of(state, batch_size, noise) if state.optimizer is None else 1
    data = views.batches[view]
    try:
        return StepLoop(
            gradients, state.packing, optimizer, carried(state), data, batch_size, capacity, state.annealed
        )  # fmt: skip
    except Exception as error:  # of torch's, on a graph that it made itself
        raise Untraceable(f"its graph cannot be looped ({first_line(error)})") from error


def _example(views: Views, view: int, batch_size: int, state: State) -> tuple[Batch, Tensor]:
    """A batch that fits a view, and which rows they are."""
    rows = repeated(views.fitting(view), batch_size).to(state.owned.device)
    return gathered(views.batches[view], rows), rows


def compile_score(held_out: HeldOut, times: int, *, always: bool) -> None:
    """Compile the held-out score of a compiled fit where that pays; a score that cannot be compiled stays as it is.

    Args:
        held_out: The score.
        times: How often it will be taken.
        always: Whether to compile whether it pays or not.
    """
    if not always and not pays(times, held_out.operations):
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
        return f"torch's compiler failed with {type(error).__name__}: {first_line(error)}"
    return ""


def _warn(why: str, what: str = "the steps run eagerly, and more slowly") -> None:
    warnings.warn(f"not compiled: {why}; {what}.", UserWarning, stacklevel=4)


class Stepper(Protocol):
    """What takes the steps of a fit.

    Attributes:
        capacity: How many it takes at once, at most.
        specialisations: How many graphs were compiled for them.
    """

    capacity: int
    specialisations: int

    def run(self, state: State, rows: Tensor, knobs: FloatArray) -> Terms:
        """Take some steps, inside a running program.

        Args:
            state: Where they start; it is updated in place.
            rows: The rows of each step's batch, shape ``(n, B)``, on the CPU.
            knobs: Learning rate, weight of the KL and values of annealed buffers of each step, shape ``(n, 2 + k)``.

        Returns:
            The terms of each step, each of shape ``(n,)``.
        """
