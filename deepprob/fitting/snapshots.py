"""Snapshots of a running fit: everything that its next steps depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.fitting.best import BestState
from deepprob.fitting.callbacks import Callback
from deepprob.fitting.course import Course
from deepprob.fitting.levelling import Levelling
from deepprob.fitting.row_order import RowOrder
from deepprob.fitting.state import State
from deepprob.fitting.steppers import Stepper
from deepprob.fitting.update_rules import Carry
from deepprob.posteriors.history import History
from deepprob.programs.late import late_to_json

_Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """Everything that the next steps of a fit depend on.

    Attributes:
        fit: The settings and digests that identify the fit, as JSON; a resumed fit must have the same.
        course: The state of the fit's course, as JSON.
        plan: How the steps are taken, as JSON; a resumed fit follows it.
        step: Steps done.
        epoch: Epochs done.
        stop: Whether a callback ended the fit.
        bad_in_a_row: Number of skipped steps in a row up to now.
        program: The program's parameters and buffers.
        late: The parameters that a later run registered, with their constraints as JSON.
        carry: The optimizer's memory, by name.
        optimizer: State of torch's optimizer, by ``<parameter>.<name>``; tensors and numbers.
        noise: Position of the noise.
        shuffle: State of the shuffle's generator before the current epoch.
        best: The best state so far.
        best_value: Its score.
        history: The history so far.
        callbacks: The state of each callback that steers the fit, as JSON.
        averages: The averages of the levelling test.
        levelling: The rest of its state, as JSON.
        starts: The starts of a fit with restarts.
        leads: The rest of their state, as JSON.
    """

    fit: dict[str, Any]
    course: dict[str, Any]
    plan: dict[str, Any]
    step: int
    epoch: int
    stop: bool
    bad_in_a_row: int
    program: _Tensors
    late: dict[str, Any]
    carry: dict[str, list[Tensor]]
    optimizer: dict[str, Any]
    noise: _Tensors
    shuffle: Tensor
    best: _Tensors
    best_value: float
    history: History
    callbacks: list[dict[str, Any]]
    averages: _Tensors
    levelling: dict[str, Any]
    starts: _Tensors
    leads: dict[str, Any]


class Position(NamedTuple):
    """Everything in memory that the next steps depend on, to go back to after a call with skipped steps."""

    carry: Carry
    optimizer: dict[str, Any] | None
    step: int
    noise: dict[str, Tensor]
    order: RowOrder.Position
    starts: Sequence[Any] = ()  # of a fit with restarts


class Resumable(Protocol):
    """The parts of a running fit that the next steps depend on."""

    state: State
    stepper: Stepper
    course: Course
    levelling: Levelling
    best: BestState
    noise: RandomStream
    order: RowOrder
    history: History
    callbacks: list[Callback]
    step: int
    epoch: int
    stop: bool
    bad_in_a_row: int

    def identity(self) -> dict[str, Any]:
        """The settings and digests that identify the fit; a resumed fit must have the same."""

    def starts_of_snapshot(self) -> tuple[_Tensors, dict[str, Any]]:
        """The starts of a fit with restarts, as tensors and JSON."""

    def restore_starts(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Restore what `starts_of_snapshot` returned."""


def snapshot(fit: Resumable) -> Snapshot:
    """A snapshot of a running fit; its tensors are the fit's own."""
    state = fit.state
    starts, leads = fit.starts_of_snapshot()
    return Snapshot(
        fit=fit.identity(),
        course=fit.course.state(),
        plan=fit.stepper.facts().get("plan", {}),
        step=fit.step,
        epoch=fit.epoch,
        stop=fit.stop,
        bad_in_a_row=fit.bad_in_a_row,
        program=state.instance.tensors(),
        late=late_to_json(state.instance),
        carry={name: group for name, group in state.carry.items() if name != "packed"},
        optimizer=entries_of(None if state.optimizer is None else state.optimizer.state_dict()),
        noise=fit.noise.state,
        shuffle=fit.order.epoch_state,
        best=fit.best.tensors,
        best_value=fit.best.value,
        history=fit.history,
        callbacks=[c.state() for c in fit.callbacks if c.steers],
        averages=fit.levelling.tensors(),
        levelling=fit.levelling.state(),
        starts=starts,
        leads=leads,
    )


def restore(fit: Resumable, found: Snapshot) -> None:
    """Continue a fit from a snapshot of the same fit, before its first step."""
    restore_state(fit, found)
    fit.course.restore(found.course)
    fit.levelling.restore(found.averages, found.levelling, fit.state.carry["packed"])
    fit.restore_starts(found.starts, found.leads)
    fit.stop = found.stop
    for callback, saved in zip((c for c in fit.callbacks if c.steers), found.callbacks, strict=True):
        if saved:
            callback.restore(saved)


def restore_state(fit: Resumable, found: Snapshot) -> None:
    """Continue from the parameters, the optimizer's memory, the noise, the order of rows and the record of a fit."""
    state = fit.state
    state.expect(found.late, found.program)
    state.instance.load(found.program)
    state.assign(found.carry)
    if state.optimizer is not None:
        state.optimizer.load_state_dict(memory_of(state.optimizer, found.optimizer))
    fit.noise.state = found.noise
    fit.order.resume(found.shuffle, found.step)
    fit.step, fit.epoch = found.step, found.epoch
    state.step, fit.bad_in_a_row = found.step, found.bad_in_a_row
    fit.history = found.history
    fit.best.tensors = {n: t.to(state.instance.device) for n, t in found.best.items()}
    fit.best.value, fit.best.epoch = found.best_value, found.history.best_epoch


def parts(found: Snapshot) -> tuple[_Tensors, dict[str, Any]]:
    """The tensors of a snapshot by dotted names, and the rest as JSON."""
    groups: dict[str, Mapping[str, Tensor]] = {
        "state": found.program,
        "best": found.best,
        "noise": found.noise,
        "history": found.history.to_tensors(),
        "optimizer": {n: t for n, t in found.optimizer.items() if isinstance(t, Tensor)},
        "averages": found.averages,
        "starts": found.starts,
        "shuffle": {"state": found.shuffle},
        "carry": {f"{name}.{i}": t for name, group in found.carry.items() for i, t in enumerate(group)},
    }
    facts = {
        "fit": found.fit,
        "course": found.course,
        "plan": found.plan,
        "levelling": found.levelling,
        "leads": found.leads,
        "optimizer": {n: x for n, x in found.optimizer.items() if not isinstance(x, Tensor)},
        "late": found.late,
        "step": found.step,
        "epoch": found.epoch,
        "stop": found.stop,
        "bad_in_a_row": found.bad_in_a_row,
        "best_value": found.best_value,
        "history": found.history.facts(),
        "callbacks": found.callbacks,
    }
    return {f"{group}.{n}": t for group, tensors in groups.items() for n, t in tensors.items()}, facts


def from_parts(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Snapshot:
    """The inverse of `parts`."""
    groups: dict[str, _Tensors] = {}
    for key, value in tensors.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = value
    carry: dict[str, list[Tensor]] = {}
    for key in sorted(groups.get("carry", {}), key=lambda key: int(key.rpartition(".")[2])):
        carry.setdefault(key.rpartition(".")[0], []).append(groups["carry"][key])
    return Snapshot(
        fit=facts["fit"],
        course=facts["course"],
        plan=facts["plan"],
        step=facts["step"],
        epoch=facts["epoch"],
        stop=facts["stop"],
        bad_in_a_row=facts["bad_in_a_row"],
        program=groups["state"],
        late=facts.get("late", {}),
        carry=carry,
        optimizer=groups.get("optimizer", {}) | facts["optimizer"],
        noise=groups["noise"],
        shuffle=groups["shuffle"]["state"],
        best=groups["best"],
        best_value=facts["best_value"],
        history=History.restore(groups["history"], facts["history"]),
        callbacks=facts["callbacks"],
        averages=groups.get("averages", {}),
        levelling=facts["levelling"],
        starts=groups.get("starts", {}),
        leads=facts.get("leads", {}),
    )


def entries_of(memory: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entries in the ``state_dict`` of torch's optimizer, by ``<parameter>.<name>``."""
    entries = {} if memory is None else memory["state"]
    return {f"{index}.{name}": value for index, named in entries.items() for name, value in named.items()}


def memory_of(optimizer: torch.optim.Optimizer, entries: Mapping[str, Any]) -> dict[str, Any]:
    """The ``state_dict`` with the entries that `entries_of` returned."""
    found: dict[int, dict[str, Any]] = {}
    for key, value in entries.items():
        index, _, name = key.partition(".")
        # The optimizer works on it in place, and the entries belong to a posterior or a checkpoint.
        found.setdefault(int(index), {})[name] = value.clone() if isinstance(value, Tensor) else value
    return {"state": found, "param_groups": optimizer.state_dict()["param_groups"]}
