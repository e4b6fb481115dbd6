"""Steppers take the steps of a fit: eagerly one by one, or many at once in compiled loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from deepprob.engine.loop import Loop
from deepprob.engine.loop_inputs import Noise, PerStep
from deepprob.engine.noise import LiftedNoise, NoiseSize
from deepprob.engine.random import RandomStream
from deepprob.engine.served_calls import served
from deepprob.fitting.buckets import LengthBuckets
from deepprob.fitting.chunks import Chunks
from deepprob.fitting.objectives import Terms
from deepprob.fitting.optimizers import FloatArray, Optimizer
from deepprob.fitting.state import GRADIENTS, Knobs, State, loop_carry
from deepprob.programs.minibatch import Batch


class Stepper(Protocol):
    """Takes the steps of a fit."""

    @property
    def compiled_graphs(self) -> int:
        """Number of compiled graphs that take the steps."""

    def capacity_from(self, step: int) -> int:
        """Most steps in a call of `run` that begins at this step, the fit's next one."""

    def facts(self) -> dict[str, Any]:
        """How the steps were taken, for a posterior's ``config``."""

    def run(self, state: State, rows: Tensor, knobs: FloatArray) -> Terms:
        """Take ``n`` steps, inside a running program.

        Args:
            state: The state before the first step; it is updated in place.
            rows: The rows of each step's batch, shape ``(n, B)``, on the CPU.
            knobs: Learning rate, weight of the KL and values of annealed buffers of each step, shape ``(n, 2 + k)``.

        Returns:
            The terms of the objective by name, each of shape ``(n,)``.
        """


class EagerStepper:
    """Takes steps one by one in Python.

    Args:
        step: Takes one step, given the state, all rows, the rows of the batch and the knobs, and returns its terms.
        buckets: The rows, on the device.
        noise: The fit's random numbers; None if steps draw from torch's generator.
        sizes: For each bucket, how much noise a step takes. A step that takes more draws the rest from torch's
            generator.
    """

    compiled_graphs = 0

    def __init__(
        self,
        step: Callable[[State, Batch, Tensor, Knobs], Terms],
        buckets: LengthBuckets | Chunks,
        noise: RandomStream | None = None,
        sizes: Sequence[NoiseSize] = (),
    ) -> None:
        self.step, self.buckets, self.noise, self.sizes = step, buckets, noise, sizes

    def capacity_from(self, step: int) -> int:
        return 1

    def facts(self) -> dict[str, Any]:
        return {}

    def run(self, state: State, rows: Tensor, knobs: FloatArray) -> Terms:
        records, on_device = [], rows.to(state.instance.device)
        for bucket, first, end in self.buckets.consecutive(rows):
            data = self.buckets.data_of(bucket)
            for i in range(first, end):
                with self._served(bucket, state.instance.device):
                    records.append(self.step(state, data, on_device[i], Knobs.of(knobs[i])))
        return {name: torch.stack([record[name] for record in records]) for name in records[0]}

    def _served(self, bucket: int, device: torch.device) -> AbstractContextManager[None]:
        """A context in which the next step takes the numbers that a loop would take."""
        if self.noise is None or not self.sizes:
            return nullcontext()
        return served(LiftedNoise(*self.sizes[bucket].draw_once(self.noise.generators, device), exact=False))


class LoopStepper:
    """Takes many steps in one call of a loop, as native code or operation by operation.

    Args:
        loops: The loop of each bucket, see `step_loop`; buckets may share one.
        buckets: The rows, on the device.
        fixed: For each bucket, the program's tensors that steps only read.
        optimizer: The fit's optimizer.
        noise: The fit's random numbers.
    """

    def __init__(
        self,
        loops: Sequence[Loop],
        buckets: LengthBuckets | Chunks,
        fixed: Sequence[list[Tensor]],
        optimizer: Optimizer,
        noise: RandomStream,
    ) -> None:
        self.loops, self.buckets, self.optimizer, self.noise = loops, buckets, optimizer, noise
        self.fixed = [(list(data), tensors) for data, tensors in zip(buckets.data_by_bucket, fixed, strict=True)]
        self.compiled_graphs = sum(loop.is_compiled for loop in set(loops))

    def capacity_from(self, step: int) -> int:
        return min(loop.capacity for loop in self.loops)

    def facts(self) -> dict[str, Any]:
        return {}

    def run(self, state: State, rows: Tensor, knobs: FloatArray) -> Terms:
        like = state.carry["packed"][0]
        rates = torch.from_numpy(knobs).to(like.device, like.dtype)
        records = []
        for bucket, first, end in self.buckets.consecutive(rows):
            loop, fixed, steps = self.loops[bucket], self.fixed[bucket], slice(first, end)
            noise = Noise(*loop.noise_for(fixed).draw(end - first, self.noise.generators, like.device))
            new, record = loop(loop_carry(state), PerStep(rows[steps], rates[steps]), fixed, noise, state.step)
            if state.optimizer is None:
                state.assign(new)
                state.step += end - first
            else:  # one step: the gradients are compiled, torch's optimizer updates the parameters
                state.update(new[GRADIENTS], record["skipped"][0] == 0, float(knobs[first, 0]), self.optimizer)
                state.assign({"buffers": new["buffers"]})
            records.append(
                {name: x.clone() for name, x in record.items()}
            )  # on a GPU the loop reuses the memory of its record
        state.anneal(knobs[-1, 2:].tolist())  # callbacks between calls see the values of the last step
        return {name: torch.cat([record[name] for record in records]) for name in records[0]}
