"""Tracing and compiling the steps of a fit, and their comparison with eager steps."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from deepprob.engine.dynamic_length import DifferentGraphs
from deepprob.engine.loop import Loop
from deepprob.engine.loop_inputs import Noise, StepData
from deepprob.engine.machine import without_collector
from deepprob.engine.native.background import builds_beside
from deepprob.engine.native.cache import NoCompiler, compiler
from deepprob.engine.noise import NoiseSize
from deepprob.engine.random import RandomStream
from deepprob.engine.subject import Untraceable
from deepprob.fitting.buckets import LengthBuckets
from deepprob.fitting.chunks import Chunks
from deepprob.fitting.comparison import TOLERANCE, Reading, Trial, difference
from deepprob.fitting.cost_model import capacity_of
from deepprob.fitting.gradients import GradientProgram, trace_gradients
from deepprob.fitting.objectives import Objective, Terms
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.plan import Work, compile_seconds
from deepprob.fitting.stacked import StackedStepper, in_turn, stack, unstack
from deepprob.fitting.state import GRADIENTS, State, batch_at, loop_carry, repeat_rows
from deepprob.fitting.step_loop import eager_step, step_loop
from deepprob.fitting.steppers import LoopStepper
from deepprob.fitting.update_rules import Carry
from deepprob.programs.minibatch import Batch

# How far the comparison moves the parameters. The next one is tried if the bound is not finite, as for small scales.
_SHIFTS = (1e-2, 1e-4, 0.0)


@dataclass(frozen=True, eq=False)
class _TracedLoop:
    """A loop, and the program's tensors that its steps only read."""

    loop: Loop
    fixed: list[Tensor]


class CompileTask:
    """Compiles the steps of a fit and compares them with eager steps.

    Args:
        state: The state before the first step.
        objective: The objective to maximise.
        optimizer: The optimizer.
        buckets: All rows, on the device.
        batch_size: Rows of a step.
        announce: Whether to print how long compilation will take.
        starts: Number of starts that take every step together. It becomes 1 if they must take it in turn: the optimizer
            is torch's own, or the graph of a step cannot be batched.

    Attributes:
        sizes: How much noise a step takes, by bucket, once measured.
        traced: The loop of each bucket, once traced.
    """

    def __init__(
        self,
        state: State,
        objective: Objective,
        optimizer: Optimizer,
        buckets: LengthBuckets | Chunks,
        batch_size: int,
        *,
        announce: bool = True,
        starts: int = 1,
    ) -> None:
        self.starts = starts
        self.state, self.optimizer, self.buckets = state, optimizer, buckets
        self.batch_size, self.announce = batch_size, announce
        self.program = GradientProgram(state.instance, objective, state.varied)
        self.stream = RandomStream(0, state.instance.device)
        self.sizes: list[NoiseSize] = []
        self.traced: list[_TracedLoop] = []

    def measure(self) -> list[str]:
        """Measure one step of every bucket; the buffers in the state's carry become all that a step changes.

        Returns:
            Names of parameters that a step registered.
        """
        state = self.state
        state.instance.program.train()
        with state.instance.running(), self.stream.drawing():
            for bucket in range(len(self.buckets.data_by_bucket)):
                size, changed = self.program.measure(*self.example(bucket))
                self.sizes.append(size)
                state.carry["buffers"] = changed  # a skipped step restores these, eagerly and compiled
            return state.join()

    def trace(self) -> None:
        """Trace a loop for every bucket.

        On a CPU one loop serves all buckets if its graph can take any length; otherwise each bucket has its own.

        Raises:
            Untraceable: If a step cannot be traced.
        """
        count = len(self.buckets.data_by_bucket)
        if self.starts > 1 and self.optimizer.rule is None:
            self._take_in_turn(f"{self.optimizer.describe()['name']} is torch's own optimizer")
        with without_collector():
            if count > 1 and self.starts == 1 and self.state.instance.device.type == "cpu":
                shortest, longest = self._trace(0), self._trace(count - 1)
                with contextlib.suppress(DifferentGraphs):
                    longest.loop.serve_any_length(shortest.loop)
                    self.traced = [longest] * count
                    return
            self.traced = [self._trace(bucket) for bucket in range(count)]

    @property
    def loops(self) -> list[Loop]:
        """The loop of each bucket; buckets may share one."""
        return [each.loop for each in self.traced]

    @property
    def work(self) -> Work:
        """The size of all graphs; of their operations only those of the longest bucket run in every step."""
        loops, state = dict.fromkeys(self.loops), self.state
        operations, numbers = sum(loop.operations for loop in loops), max(loop.numbers for loop in loops)
        multiplications = self.starts * state.multiplications(self.batch_size)
        return Work(operations, numbers, multiplications, recurs=any(loop.recurs for loop in loops))

    def is_cached(self) -> bool:
        """Whether the cache holds native code for all loops."""
        return all(loop.is_cached() for loop in dict.fromkeys(self.loops))

    def is_building(self) -> bool:
        """Whether the native code that the cache lacks is being built."""
        return all(loop.is_cached() or loop.is_building for loop in dict.fromkeys(self.loops))

    def builds_beside(self) -> bool:
        """Whether another process can build native code while the fit runs."""
        return builds_beside(self.state.instance.device) and not failure_of(compiler)

    def start_build(self) -> None:
        """Start to build the native code of all loops in other processes."""
        for loop in dict.fromkeys(self.loops):
            loop.start_build()

    def check(self, *, compile: bool) -> tuple[str, str]:
        """Compare the loops with eager steps, compiled or operation by operation.

        If a loop that serves all buckets differs or cannot be compiled, each bucket gets its own.

        Args:
            compile: Whether to compile the loops first.

        Returns:
            The reason why compiling failed, and the first difference from eager steps; each is empty if there is none.
        """
        try:
            failure = _compile(list(dict.fromkeys(self.loops)), self.announce) if compile else ""
            mismatch = self._first_difference(self.traced)
        except DifferentGraphs as error:
            failure, mismatch = "", str(error)
        if mismatch and self.starts > 1:
            self._take_in_turn(mismatch)
            self.trace()
            return self.check(compile=compile)
        if mismatch and self.loops[0].any_length:
            self.traced = [self._trace(bucket) for bucket in range(len(self.traced))]
            return self.check(compile=compile)
        return failure, mismatch

    def stepper(self, noise: RandomStream) -> LoopStepper:
        """The steps that the loops take."""
        loops = self.loops, self.buckets, [x.fixed for x in self.traced], self.optimizer, noise
        return LoopStepper(*loops) if self.starts == 1 else StackedStepper(self.sizes, *loops)

    def _take_in_turn(self, reason: str) -> None:
        """Let the starts take their steps in turn from here on."""
        self.starts = 1
        warnings.warn(f"the starts take their steps in turn, which is slower: {reason}.", UserWarning, stacklevel=8)

    def example(self, bucket: int) -> tuple[Batch, Tensor]:
        """A batch of a bucket, and the indices of its rows."""
        rows = repeat_rows(self.buckets.rows_within(bucket), self.batch_size).to(self.state.instance.device)
        return batch_at(self.buckets.data_by_bucket[bucket], rows, self.state.numbered)

    def _trace(self, bucket: int) -> _TracedLoop:
        """Trace the loop of one bucket.

        Raises:
            Untraceable: If the step cannot be traced.
        """
        state = self.state
        with state.instance.running(), self.stream.drawing():
            gradients = trace_gradients(self.program, *self.example(bucket))
            if {id(x) for x in state.annealed} & {id(x) for x in gradients.buffers}:
                raise Untraceable("the program writes to a buffer that a callback anneals")
            if bucket and [id(x) for x in gradients.buffers] != [id(x) for x in state.carry["buffers"]]:
                raise Untraceable("the program changes different buffers at different sequence lengths")
            state.carry["buffers"] = gradients.buffers
            noise = self.starts * (gradients.noise.normal + gradients.noise.uniform)
            capacity = capacity_of(state, self.batch_size, noise) if state.optimizer is None else 1
            data = self.buckets.data_by_bucket[bucket]
            try:
                loop = step_loop(state, gradients, self.optimizer, data, self.batch_size, capacity, self.starts)
            except Exception as error:  # torch can fail in many ways on a graph of its own
                if self.starts > 1:
                    operation = re.search(r"aten::\w+", str(error))
                    reason = f"torch cannot batch {operation[0]}" if operation else _first_line(error)
                    self._take_in_turn(f"its graph cannot be batched ({reason})")
                    return self._trace(bucket)
                raise Untraceable(f"its graph cannot be looped ({_first_line(error)})") from error
        return _TracedLoop(loop, gradients.fixed)

    def _first_difference(self, loops: Sequence[_TracedLoop]) -> str:
        """The first difference between compiled and eager steps over all buckets; empty if there is none."""
        for bucket, traced in enumerate(loops):
            try:
                found = self._difference(bucket, traced)
            except Exception as error:  # a graph can fail in any way on rows that it was not traced on
                found = f"the traced step fails on other rows ({_first_line(error)})"
            if found:
                return found
        return ""

    def _difference(self, bucket: int, traced: _TracedLoop) -> str:
        """Compare one step run both ways, at other parameters and rows than traced and with the same noise."""
        objective, state, stream = self.program.objective, self.state, self.stream
        layers = getattr(objective, "layers", "float32")
        eager = eager_step(state, self.program, self.optimizer, stream)
        exact = None
        if layers != "float32":
            in_float32 = replace(cast(Any, objective), layers="float32")
            exact = eager_step(state, GradientProgram(state.instance, in_float32), self.optimizer, stream)
        position = stream.state

        @contextlib.contextmanager
        def drawing() -> Iterator[None]:
            stream.state = position
            with stream.drawing():
                yield

        return difference(
            self._trials(bucket, traced),
            in_turn(eager, self.starts) if self.starts > 1 else eager,
            traced.loop,
            self._reading,
            tolerance=TOLERANCE[layers],
            exact=in_turn(exact, self.starts) if exact and self.starts > 1 else exact,
            drawing=drawing,
        )

    def _trials(self, bucket: int, traced: _TracedLoop) -> Iterator[Trial]:
        """Inputs of a step at shifted parameters, the largest shift first."""
        state, device = self.state, self.state.instance.device
        packed, annealed = state.carry["packed"], state.annealed
        generators = [torch.Generator(device).manual_seed(seed) for seed in (11, 12)]
        shifts = [torch.randn(p.shape, generator=generators[0], dtype=p.dtype, device=device) for p in packed]
        data, rows = self.buckets.data_by_bucket[bucket], self.buckets.rows_within(bucket)
        if state.numbered or self.batch_size < state.instance.num_data:
            order = torch.randperm(len(rows), generator=generators[1], device=device).cpu()
            rows = repeat_rows(rows[order], self.batch_size)
        fixed = (list(data), traced.fixed)
        noise = Noise(*(x[0] for x in traced.loop.noise_for(fixed).draw(1, generators, device)))
        knobs = torch.ones(2 + len(annealed), dtype=packed[0].dtype, device=device)
        for i, x in enumerate(annealed, 2):
            knobs[i] = 0.9 * x + 0.05
        inputs = StepData(fixed, rows.to(device), torch.zeros((), dtype=torch.long, device=device))
        for shift in _SHIFTS:
            carry = {n: [torch.zeros_like(x) for x in tensors] for n, tensors in loop_carry(state).items()}
            carry["buffers"] = [x.clone() for x in state.carry["buffers"]]
            carry["packed"] = [p.detach() + shift * direction for p, direction in zip(packed, shifts, strict=True)]
            if self.starts > 1:
                moved = [[p + shift * k for p in carry["packed"]] for k in range(self.starts)]
                carry = stack([{**carry, "packed": packed} for packed in moved])
            yield Trial(carry, inputs, noise, knobs)

    def _reading(self, carry: Carry, record: Terms) -> Reading:
        """Terms, gradients (as a first step leaves them in the optimizer's memory) and buffers, of every start."""
        if self.starts == 1:
            return self._reading_of_one(carry, record)
        groups, named, others = list[Terms](), Terms(), Terms()
        for k, one in enumerate(unstack(carry, self.starts)):
            found = self._reading_of_one(one, {name: x[k] for name, x in record.items()})
            groups += [{f"{name} of start {k}": x for name, x in group.items()} for group in found.groups]
            named |= {f"{name} of start {k}": x for name, x in found.named.items()}
            others |= {f"{name} of start {k}": x for name, x in found.others.items()}
        return Reading(groups, named, others)

    def _reading_of_one(self, carry: Carry, record: Terms) -> Reading:
        """The reading of one start."""
        terms = {name: x for name, x in record.items() if name != "skipped"}
        norm = {"gradient_norm": terms.pop("gradient_norm")}
        key = next(k for k in (GRADIENTS, "accumulated", "first") if k in carry)
        gradients = zip(self.state.params, self.state.packing.unpack(carry[key]), strict=True)
        names = {id(x): name for name, x in self.state.instance.program.named_buffers()}
        buffers = {
            f"buffer {names.get(id(own), i)}": x
            for i, (own, x) in enumerate(zip(self.state.carry["buffers"], carry["buffers"], strict=True))
        }
        return Reading([terms, norm], {f"gradient of {name}": x for name, x in gradients}, buffers)


def _compile(loops: Sequence[Loop], announce: bool) -> str:
    """Compile loops, after announcing how long that will take.

    Returns:
        The reason why compiling failed; empty if it did not.
    """
    uncached = [loop for loop in loops if not loop.is_cached() and not loop.is_building]
    if uncached and (failure := failure_of(compiler)):
        return failure
    if announce and uncached:
        seconds = sum(compile_seconds(loop.operations, any_length=loop.any_length) for loop in uncached)
        what = "the step" if len(loops) == 1 else f"the step for {len(loops)} sequence lengths"
        operations = " + ".join(str(loop.operations) for loop in uncached)
        print(f"compiling {what} ({operations} operations), about {seconds:.0f} s", file=sys.stderr)
    failures = [failure_of(loop.compile) for loop in loops]
    return next(filter(None, failures), "")


def failure_of(compile: Callable[[], object]) -> str:
    """Call a function that compiles; the reason why it failed, or ""."""
    try:
        compile()
    except DifferentGraphs:
        raise
    except (Untraceable, NoCompiler) as error:
        return str(error)
    except Exception as error:  # torch's compiler raises errors of many types
        return f"torch's compiler failed with {type(error).__name__}: {_first_line(error)}"
    return ""


def _first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [""])[0]
