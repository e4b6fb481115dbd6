"""Many steps in one call: a traced step, looped and compiled to native code.

The loop over steps is inside of the compiled code: data and noise are captured, parameters and what the optimizer
remembers are carried, a step that is not finite changes nothing, and the terms of every step come back at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from deepprob.engine.cuda_graphs import Replay
from deepprob.engine.dynamic_length import Line, NotAlike, generalise
from deepprob.engine.loop import added_at, lift_constants
from deepprob.engine.machine import ONE_AT_A_TIME
from deepprob.engine.native.build import Run, compile_module, is_cached
from deepprob.engine.native.lower import Lengths, Repeated
from deepprob.engine.noise import NoiseSize
from deepprob.engine.packing import Packing, norm_of
from deepprob.engine.trace import same_values
from deepprob.fitting.gradients import GradientGraph
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.update_rules import Carry
from deepprob.programs.minibatch import Batch

GRADIENTS = "gradients"


class StepLoop:
    r"""Steps of a fit as one function of tensors.

    .. math:: (s_k, t_k) = \mathrm{step}(s_{k-1}, x_{r_k}, \varepsilon_k, \eta_k, \beta_k), \quad k = 1, \dots, n

    with parameters and the optimizer's memory in :math:`s`, rows :math:`r`, noise :math:`\varepsilon`, learning rate
    :math:`\eta`, the weight of the KL and values of annealed buffers :math:`\beta`, and the terms of the objective
    :math:`t`.

    Args:
        gradients: The traced loss and gradients.
        packing: How parameters lie in the carry.
        optimizer: How parameters are updated; where only ``torch.optim`` knows, the carry has ``gradients`` for it.
        carry: What the first step starts from, with ``buffers``; an example of those to come.
        data: All rows, or rows like them where they are gathered.
        batch_size: Rows of a step.
        capacity: Most steps in one call, S.
        annealed: Buffers of the program that have another value at every step.

    Attributes:
        names: Names of the terms that a call returns.
        full: Whether every step sees all rows.
        any_length: Whether sequences may be of any length between two.
    """

    def __init__(
        self,
        gradients: GradientGraph,
        packing: Packing,
        optimizer: Optimizer,
        carry: Carry,
        data: Batch,
        batch_size: int,
        capacity: int,
        annealed: Sequence[Tensor] = (),
    ) -> None:
        self.gradients, self.packing, self.optimizer, self.capacity = gradients, packing, optimizer, capacity
        self.names = (*gradients.names, "gradient_norm", "skipped")
        self.full = batch_size == (len(data[0]) if data else batch_size)
        self._run: Run | None = None
        self._replay: Replay | None = None
        self._lengths: Lengths = {}
        self._noise: tuple[Line, Line] | None = None
        self._data = list(data)
        device, dtype = carry["packed"][0].device, carry["packed"][0].dtype
        self._device, self._dtype = device, dtype
        rows = torch.zeros((1 if self.full else capacity), batch_size, dtype=torch.long, device=device)
        places = {id(x): i for i, x in enumerate(gradients.fixed)}
        self._annealed = [places[id(x)] for x in annealed]
        rates = torch.zeros(capacity, 2 + len(annealed), dtype=dtype, device=device)
        noise = gradients.noise
        generators = [torch.Generator(device).manual_seed(0) for _ in range(2)]
        normal, uniform = noise.draw(capacity, generators, device)
        record = torch.zeros(capacity, len(self.names), dtype=dtype, device=device)
        index = torch.zeros((), dtype=torch.long, device=device)
        self._carried, self._carry_spec = tree_flatten((index, carry, record))
        first, count = torch.zeros_like(index), torch.ones_like(index)
        captured = (gradients.fixed, list(data), rows, normal, uniform, rates, first, count)
        self._captured, self._captured_spec = tree_flatten(captured)
        self._data_at = len(self._carried) + len(gradients.fixed)
        self._count_at = len(self._carried) + len(self._captured) - 1
        self._body = self._trace_body()

    def _step(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One step of the loop, from all that is carried and captured to all that is carried."""
        count = len(self._carried)
        index, carry, record = tree_unflatten(list(inputs[:count]), self._carry_spec)
        fixed, data, rows, normal, uniform, rates, first, _ = tree_unflatten(list(inputs[count:]), self._captured_spec)
        at = index.reshape(1)
        chosen = rows[0] if self.full else rows.index_select(0, at).squeeze(0)
        batch = tuple(data if self.full else [x.index_select(0, chosen) for x in data])
        epsilon, u = normal.index_select(0, at).squeeze(0), uniform.index_select(0, at).squeeze(0)
        rate, weight, *values = rates.index_select(0, at).squeeze(0).unbind(0)
        for i, value in zip(self._annealed, values, strict=True):
            fixed[i] = value.to(fixed[i].dtype)
        params = self.packing.unpack(carry["packed"])
        loss, terms, gradients, buffers = self.gradients.function(
            params, carry["buffers"], fixed, batch, chosen, epsilon, u, weight.to(self.gradients.noise.dtype)
        )
        packed = self.packing.pack(gradients, in_a_graph=True)
        norm = norm_of(packed)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        if self.optimizer.rule is None:  # torch's own optimizer takes the gradients from here
            new = {name: [x.clone() for x in tensors] for name, tensors in carry.items()} | {GRADIENTS: packed}
        else:
            new = self.optimizer.advance(carry, packed, finite, rate, first + index)
        pairs = zip(carry["buffers"], buffers, strict=True)
        new["buffers"] = [torch.where(finite, after, before) for before, after in pairs]
        row, columns = torch.zeros_like(record[0]), torch.arange(len(self.names), device=record.device)
        for column, x in enumerate((*terms, norm, ~finite)):
            # Stacked, every number would have a place in memory of its own first.
            row = torch.where(columns == column, x.to(record.dtype), row)
        record = record.index_copy(0, at, row.unsqueeze(0))
        new = {name: new[name] for name in carry}
        return tuple(tree_flatten((index + 1, new, record))[0])

    def _trace_body(self) -> GraphModule:
        with torch.no_grad():
            body = make_fx(
                torch.func.functionalize(self._step),
                decomposition_table={torch.ops.aten.index_put.default: added_at},
                tracing_mode="fake",
                _allow_non_fake_inputs=True,
            )(*self._carried, *self._captured)
        self._captured += lift_constants(body)
        return body

    @property
    def operations(self) -> int:
        """Operations in a step."""
        return sum(node.op == "call_function" for node in self._body.graph.nodes)

    @property
    def any_length(self) -> bool:
        return bool(self._lengths)

    def serve_any_length(self, shorter: StepLoop) -> None:
        """From now on, take steps on sequences of any length between another loop's and its own.

        Args:
            shorter: The same loop for shorter sequences.

        Raises:
            NotAlike: If the two differ in more than numbers that grow with the length.
        """
        lengths: Lengths = {}
        for i, (a, b) in enumerate(zip(shorter._data, self._data, strict=True), self._data_at):
            if a.shape != b.shape:
                lengths[i] = a.shape[1], b.shape[1]
        ends = set(lengths.values())
        count = self._captured_spec.num_leaves
        constants = shorter._captured[count:], self._captured[count:]
        alike = [a.shape == b.shape and same_values(a, b) for a, b in zip(*constants, strict=False)]
        if len(ends) != 1 or len(constants[0]) != len(constants[1]) or not all(alike):
            raise NotAlike("more than the length of sequences differs")
        between = ends.pop()
        short, long = shorter.gradients.noise, self.gradients.noise
        lines = (Line(between, (short.normal, long.normal)), Line(between, (short.uniform, long.uniform)))
        generalise(self._body, shorter._body, between, (min(lengths), 1))
        self._lengths, self._noise = lengths, lines

    def noise_of(self, data: Batch) -> NoiseSize:
        """How much noise a step takes, where sequences are as long as these."""
        noise = self.gradients.noise
        if self._noise is None:
            return noise
        normal, uniform = self._noise
        length = data[min(self._lengths) - self._data_at].shape[1]
        return replace(noise, normal=normal(length), uniform=uniform(length))

    def is_cached(self) -> bool:
        """Whether the loop was compiled before, by this process or another."""
        return is_cached(self._module, self._inputs, self._lengths)

    @property
    def is_compiled(self) -> bool:
        """Whether steps are native code; else the graph's operations are called one by one."""
        return self._run is not None

    @cached_property
    def _module(self) -> nn.Module:
        # On a GPU the loop's test would wait for every step: there, steps are recorded in a CUDA graph instead.
        if self._device.type == "cuda":
            return self._body
        return Repeated(self._body, len(self._carried), self._count_at)

    @property
    def _inputs(self) -> list[Tensor]:
        return [*self._carried, *self._captured]

    def compile(self) -> None:
        """Turn the loop into native code, or take it from the cache.

        Raises:
            NoCompiler: If there is no C++ compiler.
            NotAlike: If native code cannot serve sequences of any length.
        """
        with ONE_AT_A_TIME:
            self._run = compile_module(self._module, self._inputs, self._lengths)

    def __call__(
        self, carry: Carry, data: Batch, rows: Tensor, normal: Tensor, uniform: Tensor, rates: Tensor, step: int
    ) -> tuple[Carry, Tensor]:
        """Take ``n`` steps.

        Args:
            carry: Where to start; it stays as it is.
            data: All rows.
            rows: Of each step's batch, ``(n, B)``.
            normal: Noise of each step, ``(n, ...)``; see `NoiseSize.draw`.
            uniform: The same.
            rates: Learning rate, weight of the KL and values of annealed buffers of each step, ``(n, 2 + k)``.
            step: Number of the first one.

        Returns:
            The new carry, and the terms of each step, ``(n, terms)`` in the order of `names`.
        """
        count = len(rates)
        _, _, chosen, eps, u, knobs, first, number = tree_unflatten(
            self._captured[: self._captured_spec.num_leaves], self._captured_spec
        )
        # Rows beyond the steps that are taken are never read, nor noise beyond what shorter sequences take.
        for buffer, x in ((eps, normal), (u, uniform), (knobs, rates)):
            buffer[:count, : x.shape[1]].copy_(x)
        chosen[: 1 if self.full else count].copy_(rows[:1] if self.full else rows)
        first.fill_(step)
        number.fill_(count)
        captured = tree_flatten((self.gradients.fixed, list(data), chosen, eps, u, knobs, first, number))[0]
        captured += self._captured[len(captured) :]
        index, _, record = tree_unflatten(self._carried, self._carry_spec)
        carried = tree_flatten((index, carry, record))[0]
        with torch.no_grad():
            out = self._taken(count, carried, captured)
        _, new, record = tree_unflatten(list(out), self._carry_spec)
        return new, record[:count]

    def _taken(self, count: int, carried: list[Tensor], captured: list[Tensor]) -> Sequence[Tensor]:
        if self._device.type != "cuda" and self._run is not None:
            return self._run([*carried, *captured])  # the loop is in it
        step: Run = self._run or (lambda inputs: list(self._body(*inputs)))
        # What draws inside of a step may ask for values, and must not be run more often than steps are taken.
        if self._device.type == "cuda" and not self.gradients.noise.inside:
            if self._replay is None:
                self._replay = Replay(step, carried, captured, self.capacity)
            return self._replay(count, carried)
        out: Sequence[Tensor] = carried
        for _ in range(count):
            out = step([*out, *captured])
        return out
