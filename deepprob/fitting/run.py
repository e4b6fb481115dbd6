"""A running fit, shared by gradient-based routines: epochs, scores, callbacks, interruptions and checkpoints."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepprob.engine.machine import keep_freed_memory, threads_for
from deepprob.engine.random import RandomStream
from deepprob.engine.served_calls import replaced_calls
from deepprob.fitting.best import BestState
from deepprob.fitting.buckets import LengthBuckets
from deepprob.fitting.callbacks import Anneal, Callback, Checkpoint
from deepprob.fitting.checkpoints import check_same, read_checkpoint, write_checkpoint
from deepprob.fitting.chunks import Chunks
from deepprob.fitting.digest import digest
from deepprob.fitting.divergence import (
    MOST_SKIPPED,
    DivergenceError,
    description_of_divergence,
    place_of_divergence,
    runs_of_skipped,
    warn_of_skipped,
)
from deepprob.fitting.extending import continue_from, training_after
from deepprob.fitting.held_out import HeldOut
from deepprob.fitting.interruption import interruptible, reading, warn_if_interrupted
from deepprob.fitting.judging import accuracy_after, gradient_signal
from deepprob.fitting.levelling import Groups, Levelling, warn_if_not_level
from deepprob.fitting.optimizers import FloatArray
from deepprob.fitting.progress import ProgressBar
from deepprob.fitting.row_order import in_calls
from deepprob.fitting.settings import FitSettings
from deepprob.fitting.snapshots import Position, restore, snapshot
from deepprob.fitting.state import State
from deepprob.fitting.steppers import Stepper
from deepprob.fitting.update_rules import Carry
from deepprob.posteriors.history import History
from deepprob.posteriors.margin import margin_of
from deepprob.posteriors.posterior import Posterior
from deepprob.posteriors.saving import Training
from deepprob.programs.laplace import finish_guide


class RunningFit:
    """A running fit. Callbacks may use the part of it that `deepprob.fitting.callbacks.Fit` declares.

    Args:
        state: The state before the first step.
        stepper: Takes the steps.
        buckets: The rows, on the device.
        held_out: The score to compute after every epoch, or None.
        noise: The fit's random numbers.
        settings: The settings of the fit.
    """

    def __init__(
        self,
        state: State,
        stepper: Stepper,
        buckets: LengthBuckets | Chunks,
        held_out: HeldOut | None,
        noise: RandomStream,
        settings: FitSettings,
    ) -> None:
        self.state, self.stepper, self.noise, self.settings = state, stepper, noise, settings
        self.first_shapes = {n: list(p.shape) for n, p in state.params.items()}  # others may join
        self.data, self.held_out, self.callbacks = buckets.data, held_out, list(settings.callbacks)
        self.buckets, self.order = buckets, buckets.order(settings.batch_size, settings.seed)
        self.steps_per_epoch, self.course = self.order.steps_per_epoch, settings.course
        self.history = History(steps_per_epoch=self.steps_per_epoch)
        self.anneals = [c for c in self.callbacks if isinstance(c, Anneal)]
        self.stop, self.step, self.epoch, self.first_step = False, 0, 0, 0
        self.warm_up_steps = max((c.warm_up(self) for c in self.callbacks), default=0)
        self.levelling = self._levelling()
        self.best = BestState(state.instance.snapshot(), scored=held_out is not None and held_out.is_bound)
        self.bad_in_a_row, self.epoch_seconds = 0, 0.0  # spent on the current epoch
        self.broken_off = False  # in the middle of a step
        # Stop after every epoch if something watches epochs; otherwise run several in one call.
        self.by_epoch = held_out is not None or any(c.watches_epochs for c in self.callbacks)

    @property
    def total_steps(self) -> int:
        """Planned steps; until a fit without a fixed length has levelled, its budget."""
        return self.course.total

    def continue_from(self, training: Training, posterior: Posterior) -> None:
        """Begin where the fit of a posterior ended; see `deepprob.fitting.extending`."""
        continue_from(self, training, posterior)
        self.first_step = self.step
        self.levelling = self._levelling()

    def _levelling(self) -> Levelling:
        instance, first = self.state.instance, max(self.first_step, self.warm_up_steps)
        found = Levelling(margin_of(instance), instance.num_data, first)
        if self.course.fixed:
            found.fixed(first, self.course.tail_begins)
        return found

    @property
    def _ends_by_budget(self) -> bool:
        """Whether the fit, at its end, may have needed more steps; not if held-out rows chose an earlier state."""
        chosen = self.best.scored and self.best.epoch * self.steps_per_epoch <= self.course.schedule_begins
        cut = self.history.interrupted or self.history.stopped_early
        return not (self.course.fixed or cut or chosen)

    def parameters(self) -> dict[str, Tensor]:
        """A detached copy of the trained parameters at their constrained values, by the names of a posterior's."""
        return self.state.instance.constrained(trained=True)

    def run(self, progress: bool | str) -> Posterior:
        """Take all steps, resuming from a checkpoint if there is one, and return the posterior.

        Args:
            progress: Whether to show progress, see `ProgressBar`.

        Raises:
            DivergenceError: If too many steps in a row are skipped; it carries the last good posterior.
        """
        saved = next((c for c in self.callbacks if isinstance(c, Checkpoint) and c.resume), None)
        if saved is not None and (saved.path / "manifest.json").exists():
            found = read_checkpoint(saved.path)
            check_same(self.identity(), found.fit, saved.path)
            restore(self, found)
        for callback in self.callbacks:
            callback.start(self)
        self.state.instance.program.train()
        bar = ProgressBar(self, progress)
        try:
            keep_freed_memory()
            threads = threads_for(self.state.multiplications(self.settings.batch_size))
            with bar, threads, replaced_calls(), interruptible() as interrupted, reading(self, interrupted):
                while self.step < self.total_steps and not self.stop and not interrupted:
                    self._advance(bar)
                if self.step > self.epoch * self.steps_per_epoch and not interrupted:
                    self._end_epochs(1, self._knobs(self.step - 1, self.step))  # the last epoch has fewer steps
                self.history.interrupted = bool(interrupted)
        except KeyboardInterrupt:
            self.history.interrupted = self.broken_off = True
        warn_if_interrupted(self.history, self.total_steps)
        self._warn_of_skipped()
        self.history.stopped_early = self.stop and self.step < self.total_steps
        if self._ends_by_budget:
            warn_if_not_level(self.history, self.first_step, self.warm_up_steps)
        return self._posterior()

    def save_checkpoint(self, path: Path) -> None:
        """Write a checkpoint, from which the fit resumes bit for bit."""
        write_checkpoint(path, snapshot(self))

    def starts_of_snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The starts of a fit with restarts, as tensors and JSON."""
        return {}, {}

    def restore_starts(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Restore what `starts_of_snapshot` returned."""

    def identity(self) -> dict[str, Any]:
        """The settings and digests that identify the fit; a resumed fit must have the same."""
        return {
            **self.settings.config,
            "seed": self.settings.seed,
            "num_data": self.state.instance.num_data,
            "parameters": self.first_shapes,
            "callbacks": [c.described for c in self.callbacks if c.steers],
            "data": self.buckets.digest,
            "row_weights": digest(tuple(self.state.instance.program.bound_rows.tensors)),
            "held_out": None if self.held_out is None else digest(self.held_out.batch),
        }

    # -- steps ---------------------------------------------------------------------------------------------------

    def _advance(self, bar: ProgressBar) -> None:
        """Take the steps up to the next stop."""
        began = time.perf_counter()
        first, end = self.step, self._next_stop()
        several_epochs = end - first > self.steps_per_epoch
        origin = self._position() if several_epochs else None
        rows, knobs = self.order.rows(first, end), self._knobs(first, end)
        record = self._take(rows, knobs)
        if origin is not None and any(record["skipped"]):
            # The last good state must be found epoch by epoch: take the same steps again, one epoch per call.
            self._go_back(origin)
            self.by_epoch = True
            return
        self.step = end
        for name, values in record.items():
            self.history.steps.setdefault(name, []).extend(values)
        self._count_skipped(first, record["skipped"])
        seconds = (time.perf_counter() - began) / (end - first)
        for callback in self.callbacks:
            if (interval := callback.interval(self.steps_per_epoch)) and end % interval == 0:
                callback.step_end(self)
        if self.course.waits or self.levelling.once:
            self._test_level()
        completed = end // self.steps_per_epoch - self.epoch
        self.epoch_seconds += seconds * (end - first)
        if completed:
            self._end_epochs(completed, knobs)
        bar.advance(at_most=self.course.holds)

    def _take(self, rows: Tensor, knobs: FloatArray) -> dict[str, list[float]]:
        """Take steps, and return their record."""
        return self._take_one(rows, knobs)

    def _take_one(self, rows: Tensor, knobs: FloatArray) -> dict[str, list[float]]:
        """Take steps from the state, and return their record."""
        if not self.state.instance.program.training:  # a score or a callback has changed the mode
            self.state.instance.program.train()
        with self.state.instance.running(), self.noise.drawing():
            terms = self.stepper.run(self.state, rows, knobs)
        return dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))  # the only host sync

    def _test_level(self) -> None:
        """Let the schedule begin if the bound has levelled, or if the budget of steps before it is spent."""
        course = self.course
        found = self.levelling.visit(self.step, self._packed(), self._packed("average"), self._bounds)
        if found is not None:
            self.history.add_levels(found)
        if course.holds and found is not None and found["level"]:
            course.level_at(self.step)
        elif course.holds and self.step >= course.schedule_begins:
            course.holds = False
            self.levelling.to_the_end(max(self.step, self.warm_up_steps), course.tail_begins)

    def _packed(self, name: str = "packed") -> Groups:
        """The packed parameters whose bound is to level, or their average if one is kept."""
        return self.state.carry.get(name, self.state.carry["packed"])

    @property
    def _bound(self) -> str:
        """The name of the objective in a record; a routine without objectives maximizes the ELBO."""
        return str(self.settings.config.get("objective", {}).get("name", "elbo"))

    def _bounds(self, points: Sequence[Groups], count: int) -> FloatArray:
        """The bound at packed parameters, by the next ``count`` steps with a learning rate of zero."""
        return self._bounds_at([{"packed": point} for point in points], count)

    def _bounds_at(self, points: Sequence[Carry], count: int) -> FloatArray:
        """The bound where the carry has these tensors."""
        origin, chunk = self._position(), self.stepper.capacity_from(self.step)
        knobs = np.repeat(self._knobs(self.step, self.step + 1), count, 0)
        knobs[:, 0] = 0.0
        found: list[list[float]] = []
        for point in points:
            values = list[float]()
            try:
                for rows in in_calls(self.order, self.step, self.step + count, chunk):
                    self.state.assign(point)
                    record = self._take_one(rows, knobs[: len(rows)])
                    values += record.get(self._bound, record["elbo"])
            except (RuntimeError, ValueError):  # the program fails there, as for a matrix that is not positive definite
                values = [math.nan] * count
            finally:
                self._go_back(origin)
            found.append(values)
        return np.array(found)

    def _end_epochs(self, count: int, knobs: FloatArray) -> None:
        """End one or more epochs; the last epoch of a fit may have fewer steps, and is then ended alone.

        Args:
            count: Number of epochs.
            knobs: The knobs of their steps, or of the last steps among them.
        """
        self._record_epochs(count, knobs)
        for callback in self.callbacks:
            callback.epoch_end(self)

    def _position(self) -> Position:
        carry = {name: [x.clone() for x in tensors] for name, tensors in self.state.carry.items()}
        torch_optimizer = self.state.optimizer
        memory = None if torch_optimizer is None else copy.deepcopy(torch_optimizer.state_dict())
        return Position(carry, memory, self.state.step, self.noise.state, self.order.position)

    def _go_back(self, position: Position) -> None:
        self.state.assign(position.carry)
        if self.state.optimizer is not None and position.optimizer is not None:
            self.state.optimizer.load_state_dict(copy.deepcopy(position.optimizer))
        self.state.step, self.noise.state = position.step, position.noise
        self.order.go_back(position.order)

    def _next_stop(self) -> int:
        """The next step at which a callback or the end of an epoch needs control."""
        size = self.steps_per_epoch
        end = min(self.total_steps, self.step + self.stepper.capacity_from(self.step))
        end = self.order.reach(self.step, end)
        if self.course.waits or self.levelling.once:
            end = min(end, self.levelling.next_stop(self.step))
        if self.course.holds:
            end = min(end, self.course.schedule_begins)
        if self.by_epoch:
            end = min(end, (self.step // size + 1) * size)
        for callback in self.callbacks:
            if interval := callback.interval(size):
                end = min(end, (self.step // interval + 1) * interval)
        whole = end - end % size
        return whole if whole > self.step else end

    def _knobs(self, first: int, end: int) -> FloatArray:
        """Learning rate, weight of the KL and values of annealed buffers of each step, shape ``(n, 2 + k)``."""
        weights = np.ones(end - first)
        for callback in self.callbacks:
            if type(callback).kl_weight is not Callback.kl_weight:
                weights *= [callback.kl_weight(step, self.steps_per_epoch) for step in range(first, end)]
        annealed = [[c.value(step, self.steps_per_epoch) for step in range(first, end)] for c in self.anneals]
        return np.stack([self.course.rates(first, end), weights, *annealed], 1)

    def _record_epochs(self, count: int, knobs: FloatArray) -> None:
        """Add the epochs that just ended to the history, and update the best state."""
        size, of_steps = self.steps_per_epoch, self.history.of_epochs(self.epoch, count)
        self.epoch += count
        last = knobs[len(knobs) - 1 - (count - 1) * size :: size]  # of the last step of each epoch
        rows: dict[str, Any] = {
            **of_steps,
            "learning_rate": last[:, 0].tolist(),
            "kl_weight": last[:, 1].tolist(),
            **{f"annealed.{c.buffer}": column.tolist() for c, column in zip(self.anneals, last[:, 2:].T, strict=True)},
            "seconds": [self.epoch_seconds / count] * count,
        }
        self.epoch_seconds = 0.0
        if self.held_out is not None:
            with self.state.averaged():
                rows[self.held_out.name] = [self.held_out()]
        self.history.add_epochs(rows)
        value = rows.get("held_out_elbo", rows["elbo"])[-1]  # never a score without the KL of global latents
        warming_up = self.step < min(self.warm_up_steps, self.total_steps)
        self.best.offer(value, self.epoch, self._current, warming_up=warming_up)
        self.history.best_epoch = self.best.epoch

    def _current(self) -> dict[str, Tensor]:
        """A copy of the state that the posterior would hold, with averaged parameters if the optimizer averages."""
        with self.state.averaged():
            return self.state.instance.snapshot()

    def _warn_of_skipped(self) -> None:
        warn_of_skipped(self.history)

    # -- ends ----------------------------------------------------------------------------------------------------

    def _count_skipped(self, first: int, skipped: Sequence[float]) -> None:
        """Count skipped steps in a row, and raise if there are too many."""
        if not any(skipped):
            self.bad_in_a_row = 0
            self.best.confirm()
            return
        runs = runs_of_skipped(self.bad_in_a_row, skipped, most := min(MOST_SKIPPED, self.total_steps))
        if 0 in runs:
            self.best.confirm()
        self.bad_in_a_row = runs[-1]
        if runs[-1] == most:
            self._raise_divergence(first + len(runs) - most)

    def _raise_divergence(self, first: int) -> None:
        """Raise the error of a fit whose steps are skipped from step ``first`` on.

        Raises:
            DivergenceError: Always; it carries the last good posterior.
        """
        instance = self.state.instance
        with torch.no_grad(), instance.running(), self.noise.drawing():
            where = place_of_divergence(instance, self.data)
        posterior = self._posterior()
        rate = float(self._knobs(first, first + 1)[0, 0])
        raise DivergenceError(description_of_divergence(self.history, first, where, rate), posterior)

    def _posterior(self) -> Posterior:
        instance = self.state.instance
        if self.bad_in_a_row:
            self.best.withdraw()
            self.history.best_epoch = self.best.epoch
        elif self.step > self.epoch * self.steps_per_epoch and not (self.best.scored and self.best.epoch):
            self.best.tensors = self._current()  # interrupted within an epoch, and every applied step was finite
        goes_on = not (self.bad_in_a_row or self.broken_off or instance.unsaved or instance.guide_name == "laplace")
        training = training_after(self) if goes_on else None
        instance.load(instance.snapshot() | self.best.tensors)  # some parameters may have joined after the best state
        try:
            finish_guide(instance, self.data)
        except ValueError:
            if not (self.history.interrupted or self.bad_in_a_row):
                raise  # a fit that was cut short returns the mode that it has reached
        scores = 0 if self.held_out is None else self.held_out.compiled_graphs
        self.history.compiled_graphs = self.stepper.compiled_graphs + scores
        config = {**self.settings.config, **self.stepper.facts(), "steps": self.total_steps}
        record: dict[str, Any] = {"history": self.history, "config": config, "seed": self.settings.seed}
        found = Posterior(instance, **record, training=training, training_rows=self.buckets.training_rows(instance))
        if not (self.history.interrupted or self.bad_in_a_row):
            seconds = sum(self.history.epochs.get("seconds", ()))
            if (numbers := self.buckets.numbers) is None:  # a sample of rows has another posterior
                found.accuracy = accuracy_after(found, self.data, seconds)
            self.history.gradients = gradient_signal(found, self.data, self.settings.batch_size, seconds, numbers)
        return found
