"""Whether a fit's steps are compiled, and what is done to compile and check them."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from deepprob.engine.dynamic_length import DifferentGraphs
from deepprob.engine.loop import Loop, Noise, StepData
from deepprob.engine.machine import without_collector
from deepprob.engine.native.cache import NoCompiler, compiler
from deepprob.engine.random import RandomStream
from deepprob.engine.trace import Untraceable
from deepprob.fitting.buckets import Views
from deepprob.fitting.comparison import TOLERANCE, Reading, Trial, difference
from deepprob.fitting.cost_model import ANY_LENGTH, COMPILING, COMPILING_AN_OPERATION, FEWEST_STEPS, capacity_of, pays
from deepprob.fitting.gradients import GradientProgram, trace_gradients
from deepprob.fitting.held_out import HeldOut
from deepprob.fitting.objectives import Objective, Terms
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.state import State, gathered, repeated
from deepprob.fitting.step_loop import GRADIENTS, carried, eager_step, step_loop
from deepprob.fitting.steppers import CompiledStepper, EagerStepper, Stepper
from deepprob.fitting.update_rules import Carry
from deepprob.programs.minibatch import Batch, num_rows

# How far parameters are moved for the comparison; less where the bound is not finite there, as for small scales.
_SHIFTS = (1e-2, 1e-4, 0.0)


def choose_stepper(
    compile: bool | str, eager: EagerStepper, task: CompileTask, *, steps: int, noise: RandomStream
) -> Stepper:
    """Compiled steps where that is wanted, pays and works; else eager ones, with one line that says why.

    ``"auto"`` decides from the number of steps and the number of operations in one, never by a clock: one seed gives
    one result. The state's buffers become all those that a step changes.

    Args:
        compile: True, False or ``"auto"``.
        eager: The other choice.
        task: What would be compiled.
        steps: How many are planned.
        noise: The fit's random numbers.
    """
    state = task.state
    short = compile is False or (compile == "auto" and steps < FEWEST_STEPS)
    restored = {id(x) for x in state.carry["buffers"]}
    if short and all(id(x) in restored for x in state.instance.program.buffers()):
        return eager
    state.instance.program.train()
    with state.instance.running(), task.stream.drawing():
        size, changed = task.program.measure(*task.example(len(task.views.batches) - 1))
    state.carry["buffers"] = changed  # a step that is skipped changes none of them, however it is taken
    if short or (compile == "auto" and not pays(steps, size.operations)):
        return eager
    try:
        with without_collector():
            loops, failure, wrong = task.loops()
    except Untraceable as error:
        _warn(str(error))
        return eager
    if failure:
        _warn(failure, "its graph runs uncompiled")
    if wrong:
        _warn(wrong)
        return eager
    return CompiledStepper([x.loop for x in loops], task.views, [x.fixed for x in loops], task.optimizer, noise)


def compile_score(held_out: HeldOut, times: int, *, always: bool) -> None:
    """Compile the held-out score of a compiled fit where that pays; a score that cannot be compiled stays as it is.

    Args:
        held_out: The score.
        times: How often it will be taken.
        always: Whether to compile even if it does not pay.
    """
    if not always and not pays(times, held_out.operations):
        return
    if failure := _failure(held_out.compile):
        _warn(failure, "the held-out score is taken eagerly")


@dataclass(frozen=True, eq=False)
class _Traced:
    """A loop and the program's tensors that its steps read."""

    loop: Loop
    fixed: list[Tensor]


class CompileTask:
    """All that compiling a fit's steps needs.

    Args:
        state: What the first step starts from.
        objective: What is maximised.
        optimizer: How.
        views: All rows, on the device.
        batch_size: Rows of a step.
        announce: Whether to print how long compilation will take.
    """

    def __init__(
        self,
        state: State,
        objective: Objective,
        optimizer: Optimizer,
        views: Views,
        batch_size: int,
        *,
        announce: bool = True,
    ) -> None:
        self.state, self.optimizer, self.views = state, optimizer, views
        self.batch_size, self.announce = batch_size, announce
        self.program = GradientProgram(state.instance, objective)
        self.stream = RandomStream(0, state.instance.device)

    def loops(self) -> tuple[list[_Traced], str, str]:
        """A loop for every view; why compiling failed, and what the loops do otherwise than eager steps.

        One loop serves all views where that can be and is right; else each has its own.

        Raises:
            Untraceable: If there is none.
        """
        count = len(self.views.batches)
        if count > 1 and self.state.instance.device.type == "cpu":
            shortest, longest = self._traced(0), self._traced(count - 1)
            with contextlib.suppress(DifferentGraphs):
                longest.loop.serve_any_length(shortest.loop)
                found = self._checked([longest] * count)
                if not found[2]:
                    return found
        return self._checked([self._traced(view) for view in range(count)])

    def example(self, view: int) -> tuple[Batch, Tensor]:
        """A batch that fits a view, and which rows they are."""
        rows = repeated(self.views.fitting(view), self.batch_size).to(self.state.instance.device)
        return gathered(self.views.batches[view], rows), rows

    def _checked(self, loops: list[_Traced]) -> tuple[list[_Traced], str, str]:
        failure = _compile([x.loop for x in dict.fromkeys(loops)], self.announce)
        return loops, failure, self._first_difference(loops)

    def _traced(self, view: int) -> _Traced:
        """The loop for one view.

        Raises:
            Untraceable: If there is none.
        """
        state = self.state
        with state.instance.running(), self.stream.drawing():
            gradients = trace_gradients(self.program, *self.example(view))
            if {id(x) for x in state.annealed} & {id(x) for x in gradients.buffers}:
                raise Untraceable("it writes to a buffer that a callback anneals")
            if view and [id(x) for x in gradients.buffers] != [id(x) for x in state.carry["buffers"]]:
                raise Untraceable("it changes other buffers when sequences have another length")
            state.carry["buffers"] = gradients.buffers
            noise = gradients.noise.normal + gradients.noise.uniform
            capacity = capacity_of(state, self.batch_size, noise) if state.optimizer is None else 1
            data = self.views.batches[view]
            try:
                loop = step_loop(state, gradients, self.optimizer, data, self.batch_size, capacity)
            except Exception as error:  # of torch's, on a graph that it made itself
                raise Untraceable(f"its graph cannot be looped ({_first_line(error)})") from error
        return _Traced(loop, gradients.fixed)

    def _first_difference(self, loops: Sequence[_Traced]) -> str:
        """What differs between eager and compiled steps in the first view where something does, in words."""
        for view, traced in enumerate(loops):
            try:
                found = self._difference(view, traced)
            except Exception as error:  # what a graph does on rows that it was not made for can be anything
                found = f"the traced step fails on other rows ({_first_line(error)})"
            if found:
                return found
        return ""

    def _difference(self, view: int, traced: _Traced) -> str:
        """Take one step both ways, at other parameters, on other rows and with the same noise."""
        objective, state, stream = self.program.objective, self.state, self.stream
        layers = getattr(objective, "layers", "float32")
        eager = eager_step(state, self.program, self.optimizer, stream)
        exact = None
        if layers != "float32":
            precise = replace(cast(Any, objective), layers="float32")
            exact = eager_step(state, GradientProgram(state.instance, precise), self.optimizer, stream)
        position = stream.state

        @contextlib.contextmanager
        def drawing() -> Iterator[None]:
            stream.state = position
            with stream.drawing():
                yield

        return difference(
            self._trials(view, traced),
            eager,
            traced.loop,
            self._read,
            tolerance=TOLERANCE[layers],
            exact=exact,
            drawing=drawing,
        )

    def _trials(self, view: int, traced: _Traced) -> Iterator[Trial]:
        """Inputs of a step at moved parameters, the larger moves first."""
        state, device = self.state, self.state.instance.device
        packed, annealed = state.carry["packed"], state.annealed
        generators = [torch.Generator(device).manual_seed(seed) for seed in (11, 12)]
        shifts = [torch.randn(p.shape, generator=generators[0], dtype=p.dtype, device=device) for p in packed]
        data, rows = self.views.batches[view], self.views.fitting(view)
        if self.batch_size < num_rows(data):
            order = torch.randperm(len(rows), generator=generators[1], device=device).cpu()
            rows = repeated(rows[order], self.batch_size)
        fixed = (list(data), traced.fixed)
        noise = Noise(*(x[0] for x in traced.loop.noise_for(fixed).draw(1, generators, device)))
        knobs = torch.ones(2 + len(annealed), dtype=packed[0].dtype, device=device)
        for i, x in enumerate(annealed, 2):
            knobs[i] = 0.9 * x + 0.05
        inputs = StepData(fixed, rows.to(device), torch.zeros((), dtype=torch.long, device=device))
        for shift in _SHIFTS:
            carry = {n: [torch.zeros_like(x) for x in tensors] for n, tensors in carried(state).items()}
            carry["buffers"] = [x.clone() for x in state.carry["buffers"]]
            carry["packed"] = [p.detach() + shift * direction for p, direction in zip(packed, shifts, strict=True)]
            yield Trial(carry, inputs, noise, knobs)

    def _read(self, carry: Carry, record: Terms) -> Reading:
        """Terms, gradients as the optimizer's memory shows them, and buffers."""
        terms = {name: x for name, x in record.items() if name != "skipped"}
        norm = {"gradient_norm": terms.pop("gradient_norm")}
        key = next(k for k in (GRADIENTS, "accumulated", "first") if k in carry)
        gradients = zip(self.state.params, self.state.packing.unpack(carry[key]), strict=True)
        return Reading([terms, norm], {f"gradient of {name}": x for name, x in gradients}, carry["buffers"])


def _compile(loops: Sequence[Loop], announce: bool) -> str:
    """Compile loops, and say so before; why it failed, in words."""
    fresh = [loop for loop in loops if not loop.is_cached()]
    if fresh and (failure := _failure(compiler)):
        return failure
    if announce and fresh:
        seconds = sum(
            (COMPILING + COMPILING_AN_OPERATION * loop.operations) * (ANY_LENGTH if loop.any_length else 1)
            for loop in fresh
        )
        what = "the step" if len(loops) == 1 else f"the step for {len(loops)} lengths of sequences"
        operations = " + ".join(str(loop.operations) for loop in fresh)
        print(f"compiling {what} ({operations} operations), about {seconds:.0f} s", file=sys.stderr)
    failures = [_failure(loop.compile) for loop in loops]
    return next(filter(None, failures), "")


def _failure(compile: Callable[[], object]) -> str:
    """Compile; why it failed, in words."""
    try:
        compile()
    except DifferentGraphs:
        raise
    except (Untraceable, NoCompiler) as error:
        return str(error)
    except Exception as error:  # torch's compiler has no error of its own for what it cannot do
        return f"torch's compiler failed with {type(error).__name__}: {_first_line(error)}"
    return ""


def _first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [""])[0]


def _warn(why: str, what: str = "the steps run eagerly, and more slowly") -> None:
    warnings.warn(f"not compiled: {why}; {what}.", UserWarning, stacklevel=4)
