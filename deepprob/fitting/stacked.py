"""Steps of several starts at once: their carries are stacked, and ``torch.vmap`` takes the step of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from deepprob.engine.batching import over_draws
from deepprob.engine.loop import Step
from deepprob.engine.loop_inputs import Noise, PerStep, StepData
from deepprob.engine.noise import NoiseSize
from deepprob.fitting.objectives import Terms
from deepprob.fitting.optimizers import FloatArray
from deepprob.fitting.steppers import LoopStepper
from deepprob.fitting.update_rules import Carry


def stack(carries: Sequence[Carry]) -> Carry:
    """The carries of several starts as one, with the starts along the first axis of every tensor."""
    return {
        name: [torch.stack(same) for same in zip(*(carry[name] for carry in carries), strict=True)]
        for name in carries[0]
    }


def unstack(carry: Carry, count: int) -> list[Carry]:
    """The inverse of `stack`."""
    return [{name: [x[k].clone() for x in group] for name, group in carry.items()} for k in range(count)]


def stacked_size(size: NoiseSize, count: int) -> NoiseSize:
    """How much noise a step of ``count`` starts takes; the numbers of a start lie side by side."""
    width = size.draw_once([torch.Generator(), torch.Generator()], torch.device("cpu"))[0].numel()
    return replace(size, normal=count * width, uniform=count * size.uniform)


def stacked_step(step: Step, carry: Carry, data: StepData, knobs: Tensor, size: NoiseSize, count: int) -> Step:
    """One graph that takes the step of every start, on the same rows.

    Args:
        step: The step of one start, without operations in place.
        carry: An example of the stacked carry.
        data: An example of the data.
        knobs: An example of the knobs.
        size: How much noise the step of all starts takes, see `stacked_size`.
        count: Number of starts.
    """

    def all_at_once(
        carry: Carry, fixed: Any, rows: Tensor, number: Tensor, normal: Tensor, uniform: Tensor, knobs: Tensor
    ) -> tuple[Carry, Terms]:
        def one(carry: Carry, normal: Tensor, uniform: Tensor) -> tuple[Carry, Terms]:
            return step(carry, StepData(fixed, rows, number), Noise(normal, uniform), knobs)

        result: tuple[Carry, Terms] = over_draws(one, carry, normal.view(count, -1), uniform.view(count, -1))
        return result

    noise = size.draw_once([torch.Generator(knobs.device) for _ in range(2)], knobs.device)
    with torch.no_grad():
        graph = make_fx(all_at_once, tracing_mode="fake", _allow_non_fake_inputs=True)(
            carry, data.fixed, data.rows, data.number, *noise, knobs
        )

    def stacked(carry: Carry, data: StepData, noise: Noise, knobs: Tensor) -> tuple[Carry, Terms]:
        result: tuple[Carry, Terms] = graph(carry, data.fixed, data.rows, data.number, *noise, knobs)
        return result

    return stacked


def in_turn(step: Step, count: int) -> Step:
    """The step of every start in turn, to compare it with `stacked_step`."""

    def stacked(carry: Carry, data: StepData, noise: Noise, knobs: Tensor) -> tuple[Carry, Terms]:
        noises = [Noise(*parts) for parts in zip(*(x.view(count, -1) for x in noise), strict=True)]
        results = [step(one, data, mine, knobs) for one, mine in zip(unstack(carry, count), noises, strict=True)]
        records = [record for _, record in results]
        return stack([new for new, _ in results]), {n: torch.stack([r[n] for r in records]) for n in records[0]}

    return stacked


class StackedStepper(LoopStepper):
    """Takes the steps of several starts in one call of a loop; see `LoopStepper`.

    Args:
        sizes: For each bucket, how much noise the step of one start takes.
        loops: The arguments of `LoopStepper`.
    """

    def __init__(self, sizes: Sequence[NoiseSize], *loops: Any) -> None:
        super().__init__(*loops)
        self.sizes = sizes

    def run_all(
        self,
        carries: Sequence[Carry],
        noises: list[dict[str, Tensor]],
        rows: Tensor,
        knobs: FloatArray,
        first: int,
    ) -> tuple[list[Carry], list[dict[str, list[float]]]]:
        """Take ``n`` steps from every start, inside a running program.

        Args:
            carries: The carry of each start.
            noises: The position of the noise of each start; it is moved on.
            rows: As for `LoopStepper.run`.
            knobs: As for `LoopStepper.run`.
            first: Number of the first step.

        Returns:
            The new carry and the record of each start.
        """
        carry, like = stack(carries), carries[0]["packed"][0]
        rates, parts = torch.from_numpy(knobs).to(like.device, like.dtype), []
        for bucket, begin, end in self.buckets.consecutive(rows):
            noise = self._draw(self.sizes[bucket], end - begin, noises, like.device)
            per_step = PerStep(rows[begin:end], rates[begin:end])
            with self.noise.drawing():  # for random operations that noise cannot serve
                carry, record = self.loops[bucket](carry, per_step, self.fixed[bucket], noise, first + begin)
            noises[-1] = self.noise.state
            carry = {name: [x.clone() for x in group] for name, group in carry.items()}
            parts.append(torch.stack(list(record.values())).clone())  # (terms, steps, starts)
        table = torch.cat(parts, 1).permute(2, 0, 1).tolist()  # the only host sync
        return unstack(carry, len(carries)), [dict(zip(record, columns, strict=True)) for columns in table]

    def _draw(self, size: NoiseSize, count: int, noises: list[dict[str, Tensor]], device: torch.device) -> Noise:
        """The noise of all starts, side by side; their positions are moved on."""
        drawn = []
        for k, position in enumerate(noises):
            self.noise.state = position
            drawn.append(size.draw(count, self.noise.generators, device))
            noises[k] = self.noise.state
        return Noise(*(torch.cat(same, 1) for same in zip(*drawn, strict=True)))
