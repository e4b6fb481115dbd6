r"""Several starts of one fit: they take every step together, and the best is kept.

Start 0 is the fit without restarts. Start :math:`k > 0` has its own seed: its own random weights, its own noise, and
for a guide by name a start that is uniform from -2 to 2 for every unconstrained number, as in Stan. All starts take the
same steps on the same rows, under one schedule. A guide that looks for a Gaussian near the posterior does so from every
start, and may find another mode; the buffers that hold it are each start's own. Other buffers, and parameters that are
not trained, are those of start 0.

During the fit, one start *leads*: progress, callbacks and the levelling test see this start alone, and its record is
the fit's history. Another start takes the lead when its bound over the last 200 steps is significantly higher. The fit
therefore ends when the bound of the start that leads at that time has levelled.

At the end, steps of size zero estimate the bound at the last state of every start, on the same rows and with the same
noise: first 32 steps, then more (at most one for every 16 steps of the fit, and 512) until the difference between the
best two is known to be positive or smaller than the margin of `deepprob.fitting.levelling`. The posterior holds the
start with the best bound.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepprob.engine.machine import threads_for
from deepprob.engine.served_calls import replaced_calls
from deepprob.engine.statistics import paired_change
from deepprob.fitting.divergence import MOST_SKIPPED, runs_of_skipped
from deepprob.fitting.levelling import Groups
from deepprob.fitting.optimizers import FloatArray
from deepprob.fitting.row_order import in_calls
from deepprob.fitting.run import RunningFit
from deepprob.fitting.snapshots import Position, entries_of, memory_of
from deepprob.fitting.stacked import StackedStepper
from deepprob.fitting.starts import Start
from deepprob.fitting.tiers import PlannedStepper
from deepprob.fitting.update_rules import Carry
from deepprob.posteriors.fitted import FittedProgram
from deepprob.posteriors.latent_draws import latent_draws
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.instance import ProgramInstance

_RECENT = 200  # steps whose bound decides which start leads
_FEWEST, _MOST = 32, 512  # steps of size zero at each start
_DRAWS = 400  # of the guide, for its mean and sd


@dataclass
class _Running:
    """A start during the fit.

    Attributes:
        at: Everything that its next steps depend on.
        steps: Its record by step.
        new: The record of the last call.
        bad_in_a_row: Number of skipped steps in a row up to now.
        out: Whether it takes no more steps, because too many in a row were skipped.
    """

    at: Position
    steps: dict[str, list[float]] = field(default_factory=dict)
    new: dict[str, list[float]] = field(default_factory=dict)
    bad_in_a_row: int = 0
    out: bool = False


class RestartedFit(RunningFit):
    """A running fit of several starts, which take every step together.

    Between calls the fit's state, noise and history are those of the start that leads.

    Args:
        others: The starts beside the first.
        fit: The arguments of `RunningFit`.
    """

    noun, keyword = "start", "restarts"  # in messages

    def __init__(self, others: Sequence[Start], *fit: Any) -> None:
        super().__init__(*fit)
        self.lead = 0
        first = super()._position()
        self.starts = [_Running(first, self.history.steps), *(_Running(self._begin(first, x)) for x in others)]

    def _begin(self, first: Position, start: Start) -> Position:
        """The position of another start, with the optimizer's memory of the first."""
        params, packing = self.state.params, self.state.packing
        packed = packing.pack([start.values.get(name, p).detach() for name, p in params.items()])
        own = dict(zip(map(id, self.state.varied), start.varied, strict=True))
        buffers = zip(self.state.carry["buffers"], first.carry["buffers"], strict=True)
        groups = dict.fromkeys(("packed", "average"), packed) | {"buffers": [own.get(id(x), was) for x, was in buffers]}
        carry = {n: groups.get(n, group) for n, group in first.carry.items()}
        return first._replace(carry=carry, noise=start.noise)

    # -- steps ---------------------------------------------------------------------------------------------------

    def _take(self, rows: Tensor, knobs: FloatArray) -> dict[str, list[float]]:
        if self._together is None:
            self._take_in_turn(rows, knobs)
        else:
            found = self._take_together(self._together, [s.at.carry for s in self.starts], self._noises(), rows, knobs)
            for start, carry, noise, record in zip(self.starts, *found, strict=True):
                start.at = start.at._replace(carry=carry, noise=noise, step=self.step + len(knobs))
                start.new = {} if start.out else record
        self._enter(self._leader)
        return self._leader.new

    def _noises(self) -> list[dict[str, Tensor]]:
        return [start.at.noise for start in self.starts]

    @property
    def _together(self) -> StackedStepper | None:
        """The stepper of all starts at once, where the present tier has one."""
        now = self.stepper.now if isinstance(self.stepper, PlannedStepper) else None
        return now if isinstance(now, StackedStepper) else None

    def _take_together(
        self,
        stepper: StackedStepper,
        carries: Sequence[Carry],
        noises: list[dict[str, Tensor]],
        rows: Tensor,
        knobs: FloatArray,
    ) -> tuple[list[Carry], list[dict[str, Tensor]], list[dict[str, list[float]]]]:
        """Take steps from several carries at once; the new carries, positions of the noise, and records."""
        with self.state.instance.running():
            new, records = stepper.run_all(carries, noises, rows, knobs, self.step)
        self.state.anneal(knobs[-1, 2:].tolist())
        return new, noises, records

    def _take_in_turn(self, rows: Tensor, knobs: FloatArray) -> None:
        for start in self._going:
            self._enter(start)
            start.new = self._take_one(rows, knobs)
            if len(self.state.params) != len(self.first_shapes):
                raise ValueError(
                    f"{self.keyword}={len(self.starts)} needs every parameter before the first step, but step "
                    f"{self.step + 1} registered another one. Register it in every run, or use {self.keyword}=1."
                )
            start.at = super()._position()

    @property
    def _leader(self) -> _Running:
        return self.starts[self.lead]

    @property
    def _going(self) -> list[_Running]:
        return [start for start in self.starts if not start.out]

    def _enter(self, start: _Running) -> None:
        """Let the state and the noise be those of a start; the order of rows is common to all."""
        super()._go_back(start.at._replace(order=self.order.position))

    def _position(self) -> Position:
        return super()._position()._replace(starts=[replace(start) for start in self.starts])

    def _go_back(self, position: Position) -> None:
        super()._go_back(position)
        self.starts = [replace(start) for start in position.starts]

    def _count_skipped(self, first: int, skipped: Sequence[float]) -> None:
        most = min(MOST_SKIPPED, self.total_steps)
        for start in self._going:
            if start is not self._leader:  # the leader's record is the history
                for name, values in start.new.items():
                    start.steps.setdefault(name, []).extend(values)
            runs = runs_of_skipped(start.bad_in_a_row, start.new["skipped"], most)
            start.bad_in_a_row, start.out = runs[-1], runs[-1] == most
        if not self._going:
            super()._count_skipped(first, skipped)  # raises
        for k, start in enumerate(self.starts):
            if start.out and start.new:
                start.new = {}
                warnings.warn(
                    f"{self.noun} {k} of {len(self.starts)} (counted from 0) is out: {most} steps in a row up to step "
                    f"{first + len(skipped)} were not finite. The others go on.",
                    UserWarning,
                    stacklevel=5,
                )
        self._follow(self._best_of_late())
        self.bad_in_a_row = self._leader.bad_in_a_row
        if not self.bad_in_a_row:
            self.best.confirm()

    def _best_of_late(self) -> int:
        """The start that leads from here on: another one only if its bound is significantly higher."""
        recent = [np.array(start.steps["elbo"][-_RECENT:]) for start in self.starts]
        finite = [x[np.isfinite(x)] for x in recent]
        means = [
            x.mean() if len(x) and not start.out else -np.inf for x, start in zip(finite, self.starts, strict=True)
        ]
        if not np.isfinite(means).any() and not self._leader.out:
            return self.lead
        best = int(np.argmax(means))
        if self._leader.out:
            return best if not self.starts[best].out else self.starts.index(self._going[0])
        both = np.isfinite(recent[best]) & np.isfinite(recent[self.lead])
        rise = paired_change(recent[self.lead][both], recent[best][both])
        return best if rise.value > 0 and rise.is_beyond(0.0) else self.lead

    def _follow(self, lead: int) -> None:
        """Let another start lead."""
        if lead == self.lead:
            return
        self.lead, self.history.steps = lead, self.starts[lead].steps
        self._enter(self._leader)
        if self.epoch:
            self.history.epochs |= self.history.of_epochs(0, self.epoch)

    # -- the bound -----------------------------------------------------------------------------------------------

    def _packed(self, name: str = "packed") -> Groups:
        """The parameters of all starts, stacked: whichever leads at the end of a window has its average there."""
        groups = [start.at.carry.get(name, start.at.carry["packed"]) for start in self.starts]
        return [torch.stack(same) for same in zip(*groups, strict=True)]

    def _bounds(self, points: Sequence[Groups], count: int) -> FloatArray:
        return super()._bounds([[x[self.lead] for x in point] for point in points], count)

    def _bounds_at(self, points: Sequence[Carry], count: int) -> FloatArray:
        """See `RunningFit._bounds_at`; as many points at once as there are starts."""
        if self._together is None:
            return super()._bounds_at(points, count)
        origin, chunk, size = self._position(), self.stepper.capacity_from(self.step), len(self.starts)
        knobs = np.repeat(self._knobs(self.step, self.step + 1), count, 0)
        knobs[:, 0] = 0.0
        found: list[list[float]] = []
        for group in (points[i : i + size] for i in range(0, len(points), size)):
            carries = [{**self.state.carry, **point} for point in [*group, *[group[0]] * (size - len(group))]]
            noises, values = [origin.noise] * size, [list[float]() for _ in carries]
            for rows in in_calls(self.order, self.step, self.step + count, chunk):
                carries, noises, records = self._take_together(
                    self._together, carries, noises, rows, knobs[: len(rows)]
                )
                for column, record in zip(values, records, strict=True):
                    column += record.get(self._bound, record["elbo"])
            found += values[: len(group)]
            self._go_back(origin)
        return np.array(found)

    def _end_bounds(self) -> FloatArray:
        """The bound of every start in nats of the whole posterior at common steps of size zero, ``(starts, n)``."""
        going = [k for k, start in enumerate(self.starts) if not start.out]
        carries = [self.starts[k].at.carry for k in going]
        points = [{"packed": x.get("average", x["packed"]), "buffers": x["buffers"]} for x in carries]
        count, most = _FEWEST, min(max(_FEWEST, self.step // 16), _MOST)
        while True:
            found = self.levelling.num_data * self._bounds_at(points, count)
            order = np.argsort(-np.nan_to_num(found.mean(1), nan=-np.inf, posinf=-np.inf))
            gap = paired_change(found[order[1]], found[order[0]]) if len(order) > 1 else None
            decided = gap is None or gap.is_beyond(0.0) or gap.is_within(self.levelling.margin)
            if decided or count == most or not np.isfinite(found).all():
                break
            count = min(4 * count, most)
        bounds = np.full((len(self.starts), count), np.nan)
        bounds[going] = found
        return bounds

    # -- the end -------------------------------------------------------------------------------------------------

    def _posterior(self) -> Posterior:
        if self._going:
            self._keep_best()
        self.starts = []  # what goes on from here is the kept start
        varied = {id(x) for x in self.state.varied}
        self.state.carry["buffers"] = [x for x in self.state.carry["buffers"] if id(x) not in varied]
        return super()._posterior()

    def _keep_best(self) -> None:
        """Let the start with the best bound be the fit's, and record how far the others are."""
        with threads_for(self.state.multiplications(self.settings.batch_size)), replaced_calls():
            bounds = self._end_bounds()
        finite = np.isfinite(bounds).all(1)
        if not finite.any():
            return
        kept = int(np.argmax(np.where(finite, bounds.mean(1), -np.inf)))
        behind = [paired_change(row, bounds[kept]) for row in bounds]
        self.history.restarts = {
            "bound": bounds.mean(1).tolist(),
            "se": (bounds.std(1, ddof=1) / bounds.shape[1] ** 0.5).tolist(),
            "behind": [change.value for change in behind],
            "behind_se": [change.se for change in behind],
            "kept": [float(k == kept) for k in range(len(self.starts))],
            "skipped": [sum(start.steps.get("skipped", [])) for start in self.starts],
            **self._distances(kept),
        }
        self._follow(kept)
        self.bad_in_a_row = 0  # its bound is finite
        self.best.confirm()
        self.best.tensors, self.best.epoch = self._current(), self.epoch
        self.history.best_epoch = self.epoch

    def _distances(self, kept: int) -> dict[str, list[float]]:
        """For each global latent site the distance of every start's guide from the kept one's, in its sd.

        A point estimate has no sd, and its distance is in the units of the site.
        """
        draws = []
        for start in self.starts:
            self._enter(start)
            with self.state.averaged():
                draws.append({} if start.out else _global_draws(self.state.instance))
        self._enter(self._leader)
        columns = {}
        for name, own in draws[kept].items():
            if own.is_floating_point():
                is_point = bool((own == own[:1]).all())
                mean, sd = own.mean(0), torch.ones_like(own[0]) if is_point else own.std(0)
                found = [(x[name].mean(0) - mean) / sd if x else torch.full_like(mean, torch.nan) for x in draws]
                columns[f"distance.{name}"] = [float(x.square().mean().sqrt()) for x in found]
        return columns

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def starts_of_snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        memories = []
        for k, start in enumerate(self.starts):
            carry = {f"carry.{n}.{i}": x for n, group in start.at.carry.items() for i, x in enumerate(group)}
            steps = {f"steps.{n}": torch.tensor(x, dtype=torch.float64) for n, x in start.steps.items()}
            noise = {f"noise.{n}": x for n, x in start.at.noise.items()}
            memory = entries_of(start.at.optimizer)
            entries = {f"optimizer.{n}": x for n, x in memory.items() if isinstance(x, Tensor)}
            tensors |= {f"{k}.{n}": x for n, x in {**carry, **steps, **noise, **entries}.items()}
            memories.append({n: x for n, x in memory.items() if not isinstance(x, Tensor)})
        facts = {
            "lead": self.lead,
            "bad_in_a_row": [start.bad_in_a_row for start in self.starts],
            "out": [start.out for start in self.starts],
            "optimizers": memories,
        }
        return tensors, facts if self.starts else {}

    def restore_starts(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        for k, start in enumerate(self.starts):
            groups: dict[str, dict[str, Tensor]] = {"carry": {}, "steps": {}, "noise": {}, "optimizer": {}}
            for key, x in tensors.items():
                number, group, name = key.split(".", 2)
                if int(number) == k:
                    groups[group][name] = x
            carry = {
                n: [groups["carry"][f"{n}.{i}"].to(x.device) for i, x in enumerate(group)]
                for n, group in start.at.carry.items()
            }
            memory, optimizer = groups["optimizer"] | facts["optimizers"][k], self.state.optimizer
            start.at = start.at._replace(
                carry=carry,
                noise=groups["noise"],
                step=self.step,
                optimizer=None if optimizer is None else copy.deepcopy(memory_of(optimizer, memory)),
            )
            start.steps = {n: x.tolist() for n, x in groups["steps"].items()}
            start.bad_in_a_row, start.out = facts["bad_in_a_row"][k], facts["out"][k]
        self.lead = facts["lead"]
        self._leader.steps = self.history.steps


def _global_draws(instance: ProgramInstance) -> dict[str, Tensor]:
    """Draws of the global latent sites; empty if there are none, or they depend on the data."""
    instance.program.eval()
    try:
        found = latent_draws(FittedProgram(instance), (), _DRAWS, 0) if instance.structure.global_ else {}
    except (ValueError, RuntimeError):
        return {}
    return {name: x.detach().clone() for name, x in found.items() if name in instance.structure.global_}
