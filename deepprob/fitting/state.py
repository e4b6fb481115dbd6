"""The state of a fit, which each step reads and updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from deepprob.engine.packing import Packing
from deepprob.fitting.optimizers import FloatArray, Optimizer
from deepprob.fitting.update_rules import Carry, accumulate_and_clip, count_and_average, first_carry
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.late import adopt, expect
from deepprob.programs.minibatch import Batch, num_rows

_VALUES = ("packed", "average")  # parts of the carry that hold values of the parameters


@dataclass
class State:
    """Parameters, optimizer memory and step count of a fit.

    Attributes:
        instance: The program, whose parameters and buffers are updated in place.
        params: The trained parameters by name; views of ``carry["packed"]``.
        packing: The layout of the parameters in the packed tensors.
        carry: Packed parameters, the optimizer's memory, the average of the parameters, and the buffers that a run of
            the program changes.
        optimizer: Torch's optimizer over `params`; None if the optimizer has an update rule of ours.
        step: Steps done.
        annealed: Buffers of the program that are set before every step.
        varied: Buffers of the program that every start of a fit with restarts has for itself.
        numbered: Whether the last tensor of the data numbers their rows, see `deepprob.fitting.chunks`.
    """

    instance: ProgramInstance
    params: dict[str, Tensor]
    packing: Packing
    carry: Carry
    optimizer: torch.optim.Optimizer | None = None
    step: int = 0
    annealed: list[Tensor] = field(default_factory=list)
    varied: list[Tensor] = field(default_factory=list)
    numbered: bool = False

    @classmethod
    def start(cls, instance: ProgramInstance, optimizer: Optimizer, learning_rate: float) -> State:
        """The state before the first step.

        Args:
            instance: The program to fit; steps update its parameters in place.
            optimizer: The optimizer.
            learning_rate: The peak step size.

        Raises:
            ValueError: If neither model nor guide has a parameter.
        """
        params = instance.parameters()
        if not params:
            raise ValueError(
                "nothing to train: neither the model nor the guide has a parameter. Add one, or skip the fit."
            )
        packing = Packing(list(params.values()))
        packed = packing.pack([p.detach().clone() for p in params.values()])
        for p, view in zip(params.values(), packing.unpack(packed), strict=True):
            p.data = view
        found = optimizer.rule
        carry = first_carry(
            packed,
            moments=found[1] if found else 0,
            averaged=optimizer.average is not None,
            accumulating=optimizer.accumulate > 1,
        )
        norms = (m for m in instance.program.modules() if isinstance(m, _NormBase) and m.track_running_stats)
        carry["buffers"] = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        torch_optimizer = None if found else optimizer.build(params.values(), learning_rate)
        return cls(instance, params, packing, carry, torch_optimizer)

    def join(self) -> list[str]:
        """Train the parameters that the last run registered, inside the running program.

        Returns:
            Their names in Pyro's store; empty if there are none.
        """
        if late := adopt(self.instance):
            self._grow()
        return late

    def expect(self, late: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Train the parameters that joined a fit before it was saved; see `deepprob.programs.late.expect`."""
        if late:
            expect(self.instance, late, tensors)
            self._grow()

    def _grow(self) -> None:
        """Give the parameters that the instance has gained their places in the carry and in torch's optimizer."""
        old = {
            name: dict(zip(self.params, self.packing.unpack(self.carry[name]), strict=True)) for name in self._packed
        }
        before, self.params = self.params, self.instance.parameters()
        added = {name: p for name, p in self.params.items() if name not in before}
        self.packing = Packing(list(self.params.values()))
        for kind, values in old.items():
            starts = {n: p.detach().clone() if kind in _VALUES else torch.zeros_like(p) for n, p in added.items()}
            with torch.no_grad():
                self.carry[kind] = [x.clone() for x in self.packing.pack([(starts | values)[n] for n in self.params])]
        for p, view in zip(self.params.values(), self.packing.unpack(self.carry["packed"]), strict=True):
            p.data = view
        if self.optimizer is not None and added:
            self.optimizer.add_param_group({"params": list(added.values())})

    @property
    def _packed(self) -> list[str]:
        """The parts of the carry with one number for every parameter."""
        return [name for name in self.carry if name not in ("buffers", "count")]

    @property
    def average(self) -> dict[str, Tensor] | None:
        """The average of the parameters, by name; None if none is kept."""
        if "average" not in self.carry:
            return None
        return dict(zip(self.params, self.packing.unpack(self.carry["average"]), strict=True))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the parameters are their average, if one is kept."""
        average = self.average
        if average is None:
            yield
            return
        live = {name: p.detach().clone() for name, p in self.params.items()}
        try:
            _assign(self.params, average)
            yield
        finally:
            _assign(self.params, live)

    def multiplications(self, batch_size: int) -> int:
        """Approximate multiplications of a step; for sequences those of one time step, as time steps run in turn."""
        return sum(p.numel() for p in self.params.values()) * batch_size

    def anneal(self, values: Sequence[float]) -> None:
        """Set the annealed buffers."""
        for buffer, value in zip(self.annealed, values, strict=True):
            buffer.fill_(value)

    def update(self, gradients: Sequence[Tensor], finite: Tensor, rate: float, optimizer: Optimizer) -> None:
        """Update the parameters in place; a step that is not finite is skipped.

        Args:
            gradients: Packed gradients of the loss.
            finite: Whether loss and gradients are finite.
            rate: The learning rate.
            optimizer: The factory that made the state.
        """
        packed = self.carry["packed"]
        step = torch.full((), self.step, device=packed[0].device)  # a copy from the CPU would wait for the device
        self.step += 1
        if self.optimizer is None:
            speed = torch.full((), rate, dtype=packed[0].dtype, device=packed[0].device)
            self.assign(optimizer.advance(self.carry, gradients, finite, speed, step))
            return
        gradients, applied, new = accumulate_and_clip(
            self.carry, gradients, finite, step, optimizer.clip_norm, optimizer.accumulate
        )
        if bool(applied):
            for p, g in zip(self.params.values(), self.packing.unpack(gradients), strict=True):
                p.grad = g
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.assign(new | count_and_average(self.carry, packed, applied, optimizer.average))

    def assign(self, new: Carry) -> None:
        """Copy tensors of another carry into this state's, in place."""
        with torch.no_grad():
            for name, tensors in new.items():
                for old, value in zip(self.carry[name], tensors, strict=True):
                    old.copy_(value)


GRADIENTS = "gradients"


def loop_carry(state: State) -> Carry:
    """The carry of a pure step.

    It is the state's whole carry. If torch's own optimizer updates the parameters, it is packed parameters, buffers and
    ``gradients``.
    """
    if state.optimizer is None:
        return state.carry
    packed = state.carry["packed"]
    return {"packed": packed, "buffers": state.carry["buffers"], GRADIENTS: [torch.zeros_like(p) for p in packed]}


@dataclass(frozen=True)
class Knobs:
    """Numbers that change from step to step.

    Attributes:
        learning_rate: The optimizer's learning rate.
        kl_weight: Weight of the KL in the loss.
        annealed: Values of the state's annealed buffers.
    """

    learning_rate: float
    kl_weight: float = 1.0
    annealed: tuple[float, ...] = ()

    @classmethod
    def of(cls, row: FloatArray) -> Knobs:
        """The knobs of one step, from a row of the array that holds the knobs of many steps."""
        learning_rate, kl_weight, *annealed = row.tolist()
        return cls(learning_rate, kl_weight, tuple(annealed))


def repeat_rows(rows: Tensor, count: int) -> Tensor:
    """Repeat row indices until there are ``count`` of them."""
    return rows.repeat(-(-count // len(rows)))[:count]


def gather_rows(data: Batch, rows: Tensor) -> Batch:
    """Select the rows of a batch; a full batch is returned without a copy."""
    return data if len(rows) == num_rows(data) else tuple(x.index_select(0, rows) for x in data)


def batch_at(data: Batch, places: Tensor, numbered: bool) -> tuple[Batch, Tensor]:
    """The rows of a batch, and their numbers for the data plate.

    Args:
        data: All rows, or a chunk of them.
        places: Where the rows of the batch are.
        numbered: Whether the last tensor numbers the rows; otherwise the places are their numbers.
    """
    batch = gather_rows(data, places)
    return (batch[:-1], batch[-1]) if numbered else (batch, places)


def _assign(target: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy values into tensors of the same names."""
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(values[name])
