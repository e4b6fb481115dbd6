"""The loop that gradient-based routines share."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepprob.data import Shuffle
from deepprob.engine.machine import keep_freed_memory, threads_for
from deepprob.engine.random import RandomStream
from deepprob.fitting.buckets import Views
from deepprob.fitting.callbacks import Anneal, Callback, Checkpoint
from deepprob.fitting.checkpoints import restore_checkpoint, write_checkpoint
from deepprob.fitting.divergence import DivergenceError
from deepprob.fitting.held_out import HeldOut
from deepprob.fitting.interruption import interruptible
from deepprob.fitting.optimizers import FloatArray, Optimizer
from deepprob.fitting.progress import ProgressBar
from deepprob.fitting.state import State
from deepprob.fitting.steppers import Stepper
from deepprob.fitting.update_rules import Carry
from deepprob.posteriors.history import History
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.laplace import laplace
from deepprob.programs.run import first_bad_site

_PATIENCE = 20  # consecutive steps that were not finite, before the fit is given up
_SHUFFLE_SALT = 0x5EED


@dataclass(frozen=True)
class Position:
    """Where a fit was: all that the next steps depend on."""

    carry: Carry
    step: int
    noise: dict[str, Tensor]
    shuffle: tuple[Tensor, Tensor, Tensor | None]


class RunningFit:
    """A running fit: epochs, held-out scores, the best state, callbacks, interruptions and checkpoints.

    Routines that take gradient steps give it their step; what callbacks see of it is `deepprob.fitting.callbacks.Fit`.

    Args:
        state: What the first step needs.
        stepper: What takes the steps.
        views: All rows, on the device.
        held_out: Rows to score after every epoch, or None.
        batch_size: Rows per step.
        epochs: Passes over the data.
        optimizer: The factory whose schedule the learning rate follows.
        learning_rate: The peak step size.
        noise: The fit's random numbers.
        seed: The fit's seed.
        callbacks: What is done between steps.
        config: The routine and its settings, as JSON.
    """

    def __init__(
        self,
        state: State,
        stepper: Stepper,
        *,
        views: Views,
        held_out: HeldOut | None,
        batch_size: int,
        epochs: int,
        optimizer: Optimizer,
        learning_rate: float,
        noise: RandomStream,
        seed: int,
        callbacks: Sequence[Callback],
        config: Mapping[str, Any],
    ) -> None:
        self.state, self.stepper = state, stepper
        self.data, self.held_out, self.device = views.data, held_out, state.owned.device
        self.optimizer, self.peak, self.noise, self.seed = optimizer, learning_rate, noise, seed
        self.callbacks, self.config = list(callbacks), dict(config)
        self.shuffle_generator = torch.Generator().manual_seed(seed + _SHUFFLE_SALT)
        self.shuffle_state = self.shuffle_generator.get_state()
        self.shuffle = Shuffle(state.owned.num_data, batch_size, self.shuffle_generator, views.groups)
        self.steps_per_epoch = self.shuffle.steps_per_epoch
        self.total_steps = epochs * self.steps_per_epoch
        self.history = History(steps_per_epoch=self.steps_per_epoch)
        self.anneals = [c for c in self.callbacks if isinstance(c, Anneal)]
        self.stop, self.step, self.epoch = False, 0, 0
        self.warm_up_steps = max((c.warm_up(self) for c in self.callbacks), default=0)
        self.best_value, self.best = -math.inf, state.owned.snapshot()
        self.bad_in_a_row = 0
        self.before_best: tuple[dict[str, Tensor], int] | None = None
        self.order: Tensor | None = None  # the rows of the current epoch
        self.unclosed = 0.0  # seconds spent on the current epoch
        # Who looks at every epoch gets to see it; otherwise several may pass in one call.
        self.by_epoch = held_out is not None or any(c.watches_epochs for c in self.callbacks)

    def run(self, progress: bool | str) -> Posterior:
        """Take all steps, from a checkpoint on if there is one, and return the posterior.

        Args:
            progress: Whether to show a bar.

        Raises:
            DivergenceError: If steps stopped being finite; it carries the last good posterior.
        """
        saved = next((c for c in self.callbacks if isinstance(c, Checkpoint) and c.resume), None)
        if saved is not None and (saved.path / "manifest.json").exists():
            restore_checkpoint(self, saved.path)
        for callback in self.callbacks:
            callback.start(self)
        bar = ProgressBar(self.total_steps, self.step, progress)
        try:
            keep_freed_memory()
            with bar, threads_for(self.state.work(self.shuffle.batch_size)), interruptible() as interrupted:
                while self.step < self.total_steps and not self.stop and not interrupted:
                    self._advance(bar)
                self.history.interrupted = bool(interrupted)
        except KeyboardInterrupt:
            self.history.interrupted = True
        if self.history.interrupted:
            warnings.warn(
                f"the fit was interrupted after {self.step} of {self.total_steps} steps; this is the best so far.",
                UserWarning,
                stacklevel=3,
            )
        self.history.stopped_early = self.stop and self.step < self.total_steps
        return self._posterior()

    def _advance(self, bar: ProgressBar) -> None:
        """Take the steps until somebody wants to look, or as many as can be taken at once."""
        began = time.perf_counter()
        first, end = self.step, self._next_stop()
        several = end - first > self.steps_per_epoch
        origin = self._position() if several else None
        rows, knobs = self._rows(end), self._knobs(first, end)
        self.state.owned.program.train()
        with self.state.owned.running(), self.noise.drawing():
            terms = self.stepper.run(self.state, rows, knobs)
        record = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))  # the only host sync
        if origin is not None and any(record["skipped"]):
            # Which state is the last good one is seen epoch by epoch: the same steps are taken again, one epoch each.
            self._go_back(origin)
            self.by_epoch = True
            return
        self.step = end
        for name, values in record.items():
            self.history.steps.setdefault(name, []).extend(values)
        self._watch(first, record["skipped"])
        seconds = (time.perf_counter() - began) / (end - first)
        for callback in self.callbacks:
            if (interval := callback.interval(self.steps_per_epoch)) and end % interval == 0:
                callback.step_end(self)
        closed = end // self.steps_per_epoch - self.epoch
        self.unclosed += seconds * (end - first)
        if closed:
            self.state.owned.check_complete()
            self._close_epochs(closed, knobs)
            for callback in self.callbacks:
                callback.epoch_end(self)
        bar.advance(end - first, self.history)

    def _position(self) -> Position:
        carry = {name: [x.clone() for x in tensors] for name, tensors in self.state.carry.items()}
        shuffle = self.shuffle_generator.get_state(), self.shuffle_state, self.order
        return Position(carry, self.state.step, self.noise.state, shuffle)

    def _go_back(self, position: Position) -> None:
        self.state.take(position.carry)
        self.state.step, self.noise.state = position.step, position.noise
        generator, self.shuffle_state, self.order = position.shuffle
        self.shuffle_generator.set_state(generator)

    def _next_stop(self) -> int:
        """The step before which nobody wants to look."""
        size = self.steps_per_epoch
        end = min(self.total_steps, self.step + self.stepper.capacity)
        if self.by_epoch:
            end = min(end, (self.step // size + 1) * size)
        for callback in self.callbacks:
            if interval := callback.interval(size):
                end = min(end, (self.step // interval + 1) * interval)
        whole = end - end % size
        return whole if whole > self.step else end

    def _rows(self, end: int) -> Tensor:
        """The rows of every step's batch from here to a step, shape ``(n, B)``."""
        size = self.steps_per_epoch
        if self.shuffle.batch_size == self.shuffle.num_data:
            every = torch.arange(self.shuffle.num_data)
            return every.expand(end - self.step, -1)  # (n, N), without a copy
        parts, step = [], self.step
        while step < end:
            start = step % size
            if start == 0:
                self.shuffle_state = self.shuffle_generator.get_state()
            if start == 0 or self.order is None:
                self.order = self.shuffle.epoch()
            parts.append(self.order[start : start + end - step])
            step += len(parts[-1])
        return torch.cat(parts)

    def _knobs(self, first: int, end: int) -> FloatArray:
        """Learning rate, weight of the KL and values of annealed buffers of some steps, shape ``(n, 2 + k)``."""
        weights = np.ones(end - first)
        for callback in self.callbacks:
            if type(callback).kl_weight is not Callback.kl_weight:
                weights *= [callback.kl_weight(step, self.steps_per_epoch) for step in range(first, end)]
        moved = [[c.value(step, self.steps_per_epoch) for step in range(first, end)] for c in self.anneals]
        return np.stack([self.optimizer.rates(first, end, self.total_steps, self.peak), weights, *moved], 1)

    def _close_epochs(self, count: int, knobs: FloatArray) -> None:
        """Sum up the epochs that were completed by the last steps."""
        size, first = self.steps_per_epoch, self.epoch * self.steps_per_epoch
        self.epoch += count
        done = slice(first, first + count * size)
        elbo = np.array(self.history.steps["elbo"][done]).reshape(count, size)
        skipped = np.array(self.history.steps["skipped"][done]).reshape(count, size)
        kept = np.where(skipped, 0.0, elbo)
        with np.errstate(invalid="ignore"):
            means = kept.sum(1) / np.where(skipped.all(1), np.nan, size - skipped.sum(1))
        last = knobs[len(knobs) - 1 - (count - 1) * size :: size]  # the last step's of every epoch
        rows: dict[str, Any] = {
            "elbo": means.tolist(),
            "learning_rate": last[:, 0].tolist(),
            "kl_weight": last[:, 1].tolist(),
            **{f"annealed.{c.buffer}": column.tolist() for c, column in zip(self.anneals, last[:, 2:].T, strict=True)},
            "skipped": skipped.sum(1).tolist(),
            "seconds": [self.unclosed / count] * count,
        }
        self.unclosed = 0.0
        if self.held_out is not None:
            rows["held_out_elbo"] = [self._score(self.held_out)]
        self.history.add_epochs(rows)
        value = rows.get("held_out_elbo", rows["elbo"])[-1]
        warming_up = self.step < min(self.warm_up_steps, self.total_steps)
        # Without held-out data, and while values cannot be compared, the last state is the one to keep.
        if math.isfinite(value) and (self.held_out is None or warming_up or value > self.best_value):
            if self.held_out is None:
                self.before_best = self.best, self.history.best_epoch
            self.best_value = -math.inf if warming_up else value
            self.best, self.history.best_epoch = self._current(), self.epoch

    def _current(self) -> dict[str, Tensor]:
        """A copy of the parameters as the posterior would hold them: averaged, if that was asked for."""
        with self._averaged():
            return self.state.owned.snapshot()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        average = self.state.average
        if average is None:
            yield
            return
        live = {n: p.detach().clone() for n, p in self.state.params.items()}
        try:
            _assign(self.state.params, average)
            yield
        finally:
            _assign(self.state.params, live)

    def _score(self, held_out: HeldOut) -> float:
        with self._averaged():
            return held_out()

    def _watch(self, first: int, skipped: Sequence[float]) -> None:
        """Count steps that were not applied, and give up when nothing else comes."""
        patience = min(_PATIENCE, self.total_steps)
        if not any(skipped):
            self.bad_in_a_row, self.before_best = 0, None
            return
        for index, bad in enumerate(skipped):
            if not bad:
                self.bad_in_a_row, self.before_best = 0, None
                continue
            self.bad_in_a_row += 1
            if self.bad_in_a_row == patience:
                self._give_up(first + index + 1 - patience)

    def _give_up(self, first: int) -> None:
        """Say what happened from a step on, and hand over the last good state."""
        owned = self.state.owned
        with torch.no_grad(), owned.running(), self.noise.drawing():
            batch = owned.program.prepare(*self.data)
            where = first_bad_site(owned.program, batch, owned.num_data)
        found = self._posterior()
        epoch = first // self.steps_per_epoch + 1
        rate = float(self._knobs(first, first + 1)[0, 0])
        kept = f"epoch {self.history.best_epoch}" if self.history.best_epoch else "the start"
        value = self.history.steps["elbo"][first]
        what = "the gradient stopped being finite" if math.isfinite(value) else f"elbo became {value:g}"
        raise DivergenceError(
            f"{what} at epoch {epoch}, step {first + 1} ({where}). "
            f"The best state so far ({kept}) is kept. "
            f"Lower learning_rate (now {rate:g}), clip the gradient, or bound the scale.",
            found,
        )

    def _posterior(self) -> Posterior:
        owned = self.state.owned
        incomparable = self.held_out is None or not self.history.best_epoch
        if self.bad_in_a_row:
            if self.before_best is not None:  # no step has been finite on the best so far
                self.best, self.history.best_epoch = self.before_best
        elif self.step % self.steps_per_epoch and incomparable:
            self.best = self._current()  # stopped within an epoch: every applied step was finite
        owned.load(self.best)
        if owned.guide_name == "laplace":
            self._laplace()
        return Posterior(owned, history=self.history, config=self.config, seed=self.seed)

    def _laplace(self) -> None:
        try:
            laplace(self.state.owned, self.data)
        except ValueError:
            if not (self.history.interrupted or self.bad_in_a_row):
                raise  # of a fit that was cut short the mode so far is what there is

    def save_checkpoint(self, path: Path) -> None:
        """Write all that is needed to go on from here, bit for bit."""
        write_checkpoint(self, path)


def _assign(target: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(values[name])
