"""What takes the steps of a fit: Python one by one, or a loop many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from deepprob.engine.loop import Loop, Noise, PerStep
from deepprob.engine.random import RandomStream
from deepprob.fitting.buckets import Views
from deepprob.fitting.objectives import Terms
from deepprob.fitting.optimizers import FloatArray, Optimizer
from deepprob.fitting.state import Knobs, State
from deepprob.fitting.step_loop import GRADIENTS, carried
from deepprob.programs.minibatch import Batch


class Stepper(Protocol):
    """Takes the steps of a fit.

    Attributes:
        capacity: Most steps that it takes at once.
        compiled_graphs: Number of graphs that were compiled for them.
    """

    capacity: int
    compiled_graphs: int

    def run(self, state: State, rows: Tensor, knobs: FloatArray) -> Terms:
        """Take some steps, inside a running program.

        Args:
            state: Where they start; it is updated in place.
            rows: The rows of each step's batch, shape ``(n, B)``, on the CPU.
            knobs: Learning rate, weight of the KL and values of annealed buffers of each step, shape ``(n, 2 + k)``.

        Returns:
            The terms of each step, each of shape ``(n,)``.
        """


class EagerStepper:
    """Steps as Python takes them.

    Args:
        take: One step, from the state, all rows, those of its batch and its knobs.
        views: All rows, on the device.
    """

    capacity = 1
    compiled_graphs = 0

    def __init__(self, take: Callable[[State, Batch, Tensor, Knobs], Terms], views: Views) -> None:
        self.take, self.views = take, views

    def run(self, state: State, rows: Tensor, knobs: FloatArray) -> Terms:
        taken, on_device = [], rows.to(state.instance.device)
        for view, first, end in self.views.runs(rows):
            for i in range(first, end):
                taken.append(self.take(state, self.views.batches[view], on_device[i], Knobs.of(knobs[i])))
        return {name: torch.stack([terms[name] for terms in taken]) for name in taken[0]}


class CompiledStepper:
    """Steps taken many at once by loops.

    Args:
        loops: A loop for every view; see `step_loop`.
        views: All rows, on the device.
        fixed: The program's tensors that steps read, by view.
        optimizer: The fit's optimizer.
        noise: The fit's random numbers.
    """

    def __init__(
        self,
        loops: Sequence[Loop],
        views: Views,
        fixed: Sequence[list[Tensor]],
        optimizer: Optimizer,
        noise: RandomStream,
    ) -> None:
        self.loops, self.views, self.optimizer, self.noise = loops, views, optimizer, noise
        self.fixed = [(list(data), tensors) for data, tensors in zip(views.batches, fixed, strict=True)]
        self.capacity = min(loop.capacity for loop in loops)
        self.compiled_graphs = sum(loop.is_compiled for loop in set(loops))

    def run(self, state: State, rows: Tensor, knobs: FloatArray) -> Terms:
        like = state.carry["packed"][0]
        rates = torch.from_numpy(knobs).to(like.device, like.dtype)
        records = []
        for view, first, end in self.views.runs(rows):
            loop, fixed, steps = self.loops[view], self.fixed[view], slice(first, end)
            noise = Noise(*loop.noise_for(fixed).draw(end - first, self.noise.generators, like.device))
            new, record = loop(carried(state), PerStep(rows[steps], rates[steps]), fixed, noise, state.step)
            if state.optimizer is None:
                state.take(new)
                state.step += end - first
            else:  # one step, whose gradients are compiled and whose update is torch's
                state.update(new[GRADIENTS], record["skipped"][0] == 0, float(knobs[first, 0]), self.optimizer)
                state.take({"buffers": new["buffers"]})
            records.append({name: x.clone() for name, x in record.items()})  # the loop's own memory on a GPU
        state.anneal(knobs[-1, 2:].tolist())  # a callback that looks between calls sees the present values
        return {name: torch.cat([record[name] for record in records]) for name in records[0]}
