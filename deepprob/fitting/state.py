"""The state of a fit: what the next step needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepprob.engine.packing import Packing
from deepprob.fitting.optimizers import FloatArray, Optimizer
from deepprob.fitting.update_rules import Carry, counted, due
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch, num_rows


@dataclass
class State:
    """What the next step needs.

    Attributes:
        instance: The program, whose parameters and buffers are updated in place.
        params: What is trained, by name; views of ``carry["packed"]``.
        packing: How parameters lie in the packed tensors.
        carry: Packed parameters, what the optimizer remembers of them, their average, and the buffers that a run of
            the program changes.
        optimizer: Over `params`, where only ``torch.optim`` has it.
        step: Steps done.
        annealed: Buffers of the program that are set before every step.
    """

    instance: ProgramInstance
    params: dict[str, Tensor]
    packing: Packing
    carry: Carry
    optimizer: torch.optim.Optimizer | None = None
    step: int = 0
    annealed: list[Tensor] = field(default_factory=list)

    @property
    def average(self) -> dict[str, Tensor] | None:
        """The average of the parameters, by name, if one is kept."""
        if "average" not in self.carry:
            return None
        return dict(zip(self.params, self.packing.unpack(self.carry["average"]), strict=True))

    def work(self, batch_size: int) -> int:
        """Multiplications of a step, roughly; of sequences, of one time step, since those come one after the other."""
        return sum(p.numel() for p in self.params.values()) * batch_size

    def anneal(self, values: Sequence[float]) -> None:
        """Set the annealed buffers."""
        for buffer, value in zip(self.annealed, values, strict=True):
            buffer.fill_(value)

    def update(self, gradients: Sequence[Tensor], finite: Tensor, rate: float, optimizer: Optimizer) -> None:
        """One update of the parameters, in place; none where the step was not finite.

        Args:
            gradients: Packed.
            finite: Whether loss and gradients are.
            rate: The learning rate.
            optimizer: The factory that made the state.
        """
        packed = self.carry["packed"]
        step = torch.full((), self.step, device=packed[0].device)  # a copy from the CPU would wait
        self.step += 1
        if self.optimizer is None:
            speed = torch.full((), rate, dtype=packed[0].dtype, device=packed[0].device)
            self.take(optimizer.advance(self.carry, gradients, finite, speed, step))
            return
        gradients, applied, new = due(
            self.carry, gradients, finite, step, optimizer.clip_norm, optimizer.accumulate
        )  # fmt: skip
        if bool(applied):
            for p, g in zip(self.params.values(), self.packing.unpack(gradients), strict=True):
                p.grad = g
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.take(new | counted(self.carry, packed, applied, optimizer.average))

    def take(self, new: Carry) -> None:
        """Go on from another carry, in place."""
        with torch.no_grad():
            for name, tensors in new.items():
                for old, value in zip(self.carry[name], tensors, strict=True):
                    old.copy_(value)


@dataclass(frozen=True)
class Knobs:
    """What changes from step to step without changing what the step is.

    Attributes:
        learning_rate: The optimizer's.
        kl_weight: Weight of the KL in the loss.
        annealed: Values of the state's annealed buffers.
    """

    learning_rate: float
    kl_weight: float = 1.0
    annealed: tuple[float, ...] = ()

    @classmethod
    def of(cls, row: FloatArray) -> Knobs:
        """One row of many steps' knobs."""
        learning_rate, kl_weight, *annealed = row.tolist()
        return cls(learning_rate, kl_weight, tuple(annealed))


def repeated(rows: Tensor, count: int) -> Tensor:
    """Rows repeated until there are enough of them."""
    return rows.repeat(-(-count // len(rows)))[:count]


def gathered(data: Batch, rows: Tensor) -> Batch:
    """The rows of a batch; all of them as they are."""
    return data if len(rows) == num_rows(data) else tuple(x.index_select(0, rows) for x in data)
