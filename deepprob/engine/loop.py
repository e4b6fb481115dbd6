r"""Apply one step many times in one call: traced, looped and compiled to native code.

.. math:: (s_k, r_k) = \mathrm{step}(s_{k-1}, x_k, \varepsilon_k, \eta_k), \qquad k = 1, \dots, n

A step is any pure function of a carry :math:`s`, of data :math:`x` (captured tensors and the step's row indices), of
noise :math:`\varepsilon` that was drawn ahead, and of knobs :math:`\eta`. It returns the new carry and a record
:math:`r`. A gradient step, a leapfrog step and a step of expectation maximisation are all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from deepprob.engine.cuda_graphs import Replay
from deepprob.engine.decompositions import index_put_as_sum
from deepprob.engine.dynamic_length import DifferentGraphs, Lengths, Line, serve_all_lengths
from deepprob.engine.loop_inputs import (
    Example,
    Noise,
    PerStep,
    StepData,
    check_call,
    check_example,
    check_noise,
    checked_result,
)
from deepprob.engine.machine import ONE_AT_A_TIME
from deepprob.engine.native.background import BackgroundBuild, start_build
from deepprob.engine.native.build import Run, compile_module, file_name, is_cached
from deepprob.engine.native.cache import is_being_built
from deepprob.engine.native.lower import Repeated
from deepprob.engine.noise import LiftedNoise, NoiseSize
from deepprob.engine.random import RandomStream
from deepprob.engine.records import Records
from deepprob.engine.scan.operator import run_loop
from deepprob.engine.subject import Subject, unchanged_in_python
from deepprob.engine.trace import (
    check_graph,
    lift_constants,
    numbers_written,
    same_values,
    trace_graph,
)

Step = Callable[[Any, StepData, Noise, Tensor], tuple[Any, dict[str, Tensor]]]
"""``step(carry, data, noise, knobs) -> (carry, record)``: pure; the new carry has the structure of the old one."""


class Loop:
    """Apply a step many times in one call.

    The step is traced once. On a CPU the loop over steps is part of the compiled code. On a GPU, blocks of steps are
    recorded as CUDA graphs. Before it is compiled, and without a compiler, the step itself is called once a step.

    Args:
        step: The step.
        carry: An example carry: tensors in lists, tuples and dicts.
        per_step: Example rows and knobs, for any number of steps.
        fixed: Example captured data: tensors in lists, tuples and dicts.
        noise: How much noise a step takes. None: the step draws from torch's generator, and its draws become inputs.
        capacity: The largest number of steps in one call.
        settled: Whether the captured data have the same values in every call; the shapes of a step's results may then
            depend on them.

    Attributes:
        noise: How much noise a step takes.
        capacity: The largest number of steps in one call.
        scalars: Names of the scalars in a record.

    Raises:
        ValueError: If the new carry differs from the old one in structure, shapes, dtypes or devices.
        TypeError: If the step does not return a carry and a dict of tensors.
        Untraceable: If the step keeps state in Python, changes its inputs, or depends on values other than by tensor
            operations.

    Examples:
        Powers of two, three steps in one call:

        >>> def double(carry, data, noise, knobs):
        ...     return [2 * carry[0]], {"value": carry[0]}
        >>> per_step = PerStep(torch.zeros(1, 1, dtype=torch.long), torch.zeros(3, 0))
        >>> loop = Loop(double, [torch.tensor(1.0)], per_step, [], capacity=3)
        >>> (last,), record = loop([torch.tensor(1.0)], per_step, [])
        >>> last, record["value"]
        (tensor(8.), tensor([1., 2., 4.]))
    """

    def __init__(
        self,
        step: Step,
        carry: Any,
        per_step: PerStep,
        fixed: Any,
        noise: NoiseSize | None = None,
        capacity: int = 1024,
        *,
        settled: bool = False,
    ) -> None:
        check_example(per_step)
        self.capacity, self._step, self._device = capacity, step, per_step.knobs.device
        self._carry, self._fixed = Example("carry", carry), Example("fixed", fixed)
        carry, fixed = self._carry.tree(), self._fixed.tree()
        self._subject = Subject(step)
        self._run: Run | None = None
        self._build: BackgroundBuild | None = None
        self._replay: Replay | None = None
        self._lengths: Lengths = {}
        self._noise_lines: tuple[Line, Line] | None = None
        with unchanged_in_python(self._subject):
            if noise is None:
                data = self._first_data(per_step, fixed)
                noise, self._step = _lift_draws(step, carry, data, per_step.knobs[0], self._subject)
            self.noise = noise
            new, record = self._try_step(carry, per_step, fixed)
            self._carry.check_new(new)
            self._records = Records(record)
            self.scalars = self._records.scalars
            self._make_inputs(carry, per_step, fixed)
            self._body = self._trace(settled)

    def _first_data(self, per_step: PerStep, fixed: Any) -> StepData:
        """The data of the first step."""
        return StepData(fixed, per_step.rows[0], torch.zeros((), dtype=torch.long, device=self._device))

    def _try_step(self, carry: Any, per_step: PerStep, fixed: Any) -> tuple[Any, dict[str, Tensor]]:
        """Take one step on tensors without values, to learn the shapes of its results.

        Rows of an example need not be rows that the step can be taken on. Where a constant mask decides a shape,
        ``x[mask]``, values are needed, and those of the first row are taken.
        """
        noise = Noise(*self.noise.draw_once([torch.Generator(self._device) for _ in range(2)], self._device))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        given = carry, self._first_data(per_step, fixed), noise, per_step.knobs[0]
        fake = tree_map_only(Tensor, lambda x: mode.from_tensor(x, static_shapes=True), given)
        try:
            with torch.no_grad(), mode:
                return checked_result(self._step(*fake))
        except DynamicOutputShapeException:
            with torch.no_grad(), RandomStream(0, self._device).drawing():
                return checked_result(self._step(*given))

    def _make_inputs(self, carry: Any, per_step: PerStep, fixed: Any) -> None:
        """Allocate the loop's inputs: carried tensors, and captured tensors at a fixed place in memory.

        The carry includes a counter of steps and the record of all steps; the last two captured tensors are the
        number of the first step and the number of steps.
        """
        count, device, dtype = self.capacity, self._device, per_step.knobs.dtype
        same_rows = len(per_step.rows) == 1
        rows = torch.zeros(1 if same_rows else count, per_step.rows.shape[1], dtype=torch.long, device=device)
        knobs = torch.zeros(count, per_step.knobs.shape[1], dtype=dtype, device=device)
        generators = [torch.Generator(device).manual_seed(0) for _ in range(2)]
        noise = Noise(*self.noise.draw(count, generators, device))
        index = torch.zeros((), dtype=torch.long, device=device)
        self._carried, self._carry_spec = tree_flatten((index, carry, self._records.empty(count, device)))
        captured = (fixed, PerStep(rows, knobs), noise, torch.zeros_like(index), torch.ones_like(index))
        self._captured, self._captured_spec = tree_flatten(captured)

    def _iteration(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One iteration of the loop, from carried and captured tensors to carried tensors."""
        count = len(self._carried)
        index, carry, tables = tree_unflatten(list(inputs[:count]), self._carry_spec)
        fixed, per_step, noise, first, _ = tree_unflatten(list(inputs[count:]), self._captured_spec)
        at = index.reshape(1)
        rows = per_step.rows[0] if len(per_step.rows) == 1 else per_step.rows.index_select(0, at).squeeze(0)
        mine = Noise(*(x.index_select(0, at).squeeze(0) for x in noise))
        knobs = per_step.knobs.index_select(0, at).squeeze(0)
        new, record = self._step(carry, StepData(fixed, rows, first + index), mine, knobs)
        tables = self._records.write(tables, at, record)
        given = {id(x) for x in inputs}
        # An input returned unchanged would share memory with a tensor that is still read.
        return tuple(x.clone() if id(x) in given else x for x in tree_flatten((index + 1, new, tables))[0])

    def _trace(self, settled: bool) -> GraphModule:
        with torch.no_grad():
            body = make_fx(
                torch.func.functionalize(self._iteration),
                decomposition_table={torch.ops.aten.index_put.default: index_put_as_sum},
                tracing_mode="fake",
                _allow_non_fake_inputs=True,
            )(*self._carried, *self._captured)
        inputs, first = body.graph.find_nodes(op="placeholder"), len(self._carried)
        unchanging = inputs[first : first + len(tree_leaves(self._fixed.tree()))] if settled else []
        check_graph(body, self._subject, settled=[node.name for node in unchanging])
        self._captured += [x.detach().clone() for x in lift_constants(body)]
        return body

    @property
    def operations(self) -> int:
        """The number of operations in a step."""
        return sum(node.op == "call_function" for node in self._body.graph.nodes)

    @property
    def numbers(self) -> int:
        """How many numbers the operations of a step write."""
        return numbers_written(self._body)

    @property
    def recurs(self) -> bool:
        """Whether a step has a loop over time; see `deepprob.engine.scan.recur`."""
        return any(node.target is run_loop for node in self._body.graph.nodes)

    @property
    def any_length(self) -> bool:
        """Whether the loop serves sequences of any length in a range."""
        return bool(self._lengths)

    def serve_any_length(self, shorter: Loop) -> None:
        """Let this loop serve sequences of any length between those of a shorter loop and its own.

        Args:
            shorter: The same loop for shorter sequences.

        Raises:
            DifferentGraphs: If the two graphs differ in more than whole numbers that are linear in the length.
        """
        lengths: Lengths = {}
        for i in range(len(self._fixed.tensors)):
            a, b = shorter._captured[i], self._captured[i]
            if a.shape != b.shape:
                lengths[len(self._carried) + i] = a.shape[1], b.shape[1]
        ends = set(lengths.values())
        count = self._captured_spec.num_leaves
        constants = shorter._captured[count:], self._captured[count:]
        alike = [a.shape == b.shape and same_values(a, b) for a, b in zip(*constants, strict=False)]
        if len(ends) != 1 or len(constants[0]) != len(constants[1]) or not all(alike):
            raise DifferentGraphs("the two loops differ in more than the length of their sequences")
        between = ends.pop()
        short, long = shorter.noise, self.noise
        lines = (Line(between, (short.normal, long.normal)), Line(between, (short.uniform, long.uniform)))
        serve_all_lengths(self._body, shorter._body, between, (min(lengths), 1))
        self._lengths, self._noise_lines = lengths, lines
        self._fixed.serve_lengths({i - len(self._carried): ends for i, ends in lengths.items()})

    def noise_for(self, fixed: Any) -> NoiseSize:
        """How much noise a step takes on captured data with sequences of this length."""
        if self._noise_lines is None:
            return self.noise
        normal, uniform = self._noise_lines
        length = tree_flatten(fixed)[0][min(self._lengths) - len(self._carried)].shape[1]
        return replace(self.noise, normal=normal(length), uniform=uniform(length))

    def is_cached(self) -> bool:
        """Whether the cache holds native code for the loop."""
        return is_cached(self._module, self._inputs, self._lengths)

    @property
    def is_compiled(self) -> bool:
        """Whether the steps run as native code rather than operation by operation."""
        return self._run is not None

    @cached_property
    def _module(self) -> nn.Module:
        # On a GPU the loop's condition would wait for every step; there, steps are recorded in CUDA graphs instead.
        if self._device.type == "cuda":
            return self._body
        return Repeated(self._body, len(self._carried), len(self._carried) + self._captured_spec.num_leaves - 1)

    @property
    def _inputs(self) -> list[Tensor]:
        return [*self._carried, *self._captured]

    def start_build(self) -> None:
        """Start to build the loop's native code in another process, of low priority, and return at once.

        `compile`, called with the same number of threads, waits for that process and loads what it built. It builds the
        code itself if no other process can: on a GPU, or without a cache that this process can write to.
        """
        if not self.is_cached():
            self._build = start_build(self._module, self._inputs, self._lengths)

    @property
    def is_building(self) -> bool:
        """Whether a process builds the loop's native code, the one of `start_build` or another: `compile` waits."""
        if self._build is not None and self._build.is_running:
            return True
        return not self.is_cached() and is_being_built(file_name(self._module, self._inputs, self._lengths))

    def compile(self) -> None:
        """Compile the loop to native code, or load it from the cache.

        Raises:
            NoCompiler: If there is no C++ compiler.
            BuildFailed: If the process of `start_build` failed; the message is the reason.
            DifferentGraphs: If native code cannot serve sequences of any length.
        """
        if self._build is not None:
            self._build.wait()
        with ONE_AT_A_TIME:
            self._run = compile_module(self._module, self._inputs, self._lengths)

    def __call__(
        self, carry: Any, per_step: PerStep, fixed: Any, noise: Noise | None = None, first: int = 0
    ) -> tuple[Any, dict[str, Tensor]]:
        """Take ``n`` steps.

        Args:
            carry: The carry to start from; it is not changed.
            per_step: Rows and knobs of each step; the number of rows of ``knobs`` is the number of steps.
            fixed: The captured data.
            noise: Noise of each step, of the size that `noise_for` returns; None if steps draw nothing.
            first: Number of the first step.

        Returns:
            The new carry, and the record of each step, ``(n, ...)`` by name. On a GPU they lie in the loop's own
            memory: clone them to keep them beyond the next call.

        Raises:
            ValueError: If a tensor differs from the example in shape, dtype or device, if there are more steps than
                `capacity`, or if there is no noise for a step that draws.
        """
        count = len(per_step.knobs)
        given, data = self._carry.match(carry), self._fixed.match(fixed)
        buffers = tree_unflatten(self._captured[: self._captured_spec.num_leaves], self._captured_spec)
        _, mine, drawn, number, steps = buffers
        check_call(per_step, mine, self.capacity)
        check_noise(noise, drawn, count, self.noise_for(fixed))
        if self._run is None and self._device.type != "cuda" and not self._lengths:
            return self._one_by_one(count, carry, per_step, fixed, noise or drawn, first)
        # Rows beyond `count` and noise beyond the need of shorter sequences are never read.
        mine.knobs[:count].copy_(per_step.knobs)
        same_rows = len(mine.rows) == 1
        mine.rows[: 1 if same_rows else count].copy_(per_step.rows[:1] if same_rows else per_step.rows)
        for buffer, x in zip(drawn, noise or (), strict=False):
            buffer[:count, : x.shape[1]].copy_(x)
        number.fill_(first)
        steps.fill_(count)
        captured = [*data, *self._captured[len(data) :]]
        index, *rest = self._carried
        with torch.no_grad():
            out = self._iterate(count, [index, *given, *rest[len(given) :]], captured)
        _, new, tables = tree_unflatten(list(out), self._carry_spec)
        return new, self._records.read(tables, count)

    def _one_by_one(
        self, count: int, carry: Any, per_step: PerStep, fixed: Any, noise: Noise, first: int
    ) -> tuple[Any, dict[str, Tensor]]:
        """Call the step once a step: without the tables and indices of the compiled loop it has fewer operations."""
        rows, records = per_step.rows.expand(count, -1), []
        with torch.no_grad():
            for k in range(count):
                number = torch.full((), first + k, dtype=torch.long, device=self._device)
                mine = Noise(noise.normal[k], noise.uniform[k])
                carry, record = self._step(carry, StepData(fixed, rows[k], number), mine, per_step.knobs[k])
                records.append(record)
        return carry, {name: torch.stack([record[name] for record in records]) for name in records[0]}

    def _iterate(self, count: int, carried: list[Tensor], captured: list[Tensor]) -> Sequence[Tensor]:
        on_gpu = self._device.type == "cuda"
        if self._run is not None and not on_gpu:
            return self._run([*carried, *captured])  # the native code contains the loop
        iteration: Run = self._run or (lambda inputs: list(self._body(*inputs)))
        # An unserved draw may read values, and the extra runs of a recording would advance torch's generator.
        if on_gpu and not self.noise.unserved:
            if self._replay is None or not self._replay.reads(captured):
                self._replay = Replay(iteration, carried, captured, self.capacity)
            return self._replay(count, carried)
        out: Sequence[Tensor] = carried
        for _ in range(count):
            out = iteration([*out, *captured])
        return out


def _lift_draws(step: Step, carry: Any, data: StepData, knobs: Tensor, subject: Subject) -> tuple[NoiseSize, Step]:
    """Count the draws of a step from torch's generator, and return the step with these draws as its noise."""
    # The step may change its inputs, which is refused only when it is traced.
    carry, data, knobs = tree_map_only(Tensor, torch.clone, (carry, data, knobs))
    empty = Noise(*(torch.zeros(0, device=knobs.device) for _ in range(2)))
    with torch.no_grad(), LiftedNoise() as counted:
        checked_result(step(carry, data, empty, knobs))

    def drawing(carry: Any, data: StepData, noise: Noise, knobs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        with LiftedNoise(*noise):
            return step(carry, data, noise, knobs)

    size = counted.size
    noise = Noise(*size.draw_once([torch.Generator(knobs.device) for _ in range(2)], knobs.device))
    return size, trace_graph(drawing, (carry, data, noise, knobs), [], subject=subject)
