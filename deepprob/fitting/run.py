"""The loop that gradient-based routines share: epochs, scores, callbacks, interruptions and checkpoints."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepprob.engine.machine import keep_freed_memory, threads_for
from deepprob.engine.random import RandomStream
from deepprob.fitting.best import Best
from deepprob.fitting.buckets import Views
from deepprob.fitting.callbacks import Anneal, Callback, Checkpoint
from deepprob.fitting.checkpoints import (
    Snapshot,
    digest,
    load_optimizer,
    optimizer_state,
    read_checkpoint,
    write_checkpoint,
)
from deepprob.fitting.divergence import DivergenceError
from deepprob.fitting.held_out import HeldOut
from deepprob.fitting.interruption import interruptible
from deepprob.fitting.optimizers import FloatArray, Optimizer
from deepprob.fitting.progress import ProgressBar
from deepprob.fitting.row_order import RowOrder
from deepprob.fitting.state import State
from deepprob.fitting.steppers import Stepper
from deepprob.fitting.update_rules import Carry
from deepprob.posteriors.history import History
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.laplace import finish_guide
from deepprob.programs.run import first_bad_site

_PATIENCE = 20  # consecutive steps that were not finite, before the fit is given up
_OWNED = ("packed", "buffers")  # parts of the carry that are the program's own tensors


@dataclass(frozen=True)
class FitSettings:
    """How a fit runs.

    Attributes:
        batch_size: Rows per step.
        total_steps: Steps of the whole fit.
        optimizer: The factory whose schedule the learning rate follows.
        learning_rate: The peak step size.
        seed: The fit's seed.
        callbacks: What is done between steps.
        config: The routine and its settings, as JSON.
    """

    batch_size: int
    total_steps: int
    optimizer: Optimizer
    learning_rate: float
    seed: int
    callbacks: Sequence[Callback]
    config: Mapping[str, Any]


class _Position(NamedTuple):
    """Where a fit was: all that the next steps depend on."""

    carry: Carry
    step: int
    noise: dict[str, Tensor]
    order: RowOrder.Position


class RunningFit:
    """A running fit; what callbacks see of it is `deepprob.fitting.callbacks.Fit`.

    Args:
        state: What the first step starts from.
        stepper: What takes the steps.
        views: All rows, on the device.
        held_out: Rows to score after every epoch, or None.
        noise: The fit's random numbers.
        settings: How the fit runs.
    """

    def __init__(
        self,
        state: State,
        stepper: Stepper,
        views: Views,
        held_out: HeldOut | None,
        noise: RandomStream,
        settings: FitSettings,
    ) -> None:
        self.state, self.stepper, self.noise, self.settings = state, stepper, noise, settings
        self.data, self.held_out, self.callbacks = views.data, held_out, list(settings.callbacks)
        self.order = RowOrder(state.instance.num_data, settings.batch_size, views.groups, settings.seed)
        self.steps_per_epoch, self.total_steps = self.order.steps_per_epoch, settings.total_steps
        graphs = stepper.compiled_graphs + (0 if held_out is None else held_out.compiled_graphs)
        self.history = History(steps_per_epoch=self.steps_per_epoch, compiled_graphs=graphs)
        self.anneals = [c for c in self.callbacks if isinstance(c, Anneal)]
        self.stop, self.step, self.epoch = False, 0, 0
        self.warm_up_steps = max((c.warm_up(self) for c in self.callbacks), default=0)
        self.best = Best(state.instance.snapshot(), scored=held_out is not None)
        self.bad_in_a_row = 0
        self.unclosed = 0.0  # seconds spent on the current epoch
        # Stop after every epoch if something watches epochs; otherwise run several in one call.
        self.by_epoch = held_out is not None or any(c.watches_epochs for c in self.callbacks)

    def parameters(self) -> dict[str, Tensor]:
        """A copy of what is trained, by name, as it is now."""
        return {name: p.detach().clone() for name, p in self.state.params.items()}

    def run(self, progress: bool | str) -> Posterior:
        """Take all steps, from a checkpoint on if there is one, and return the posterior.

        Args:
            progress: Whether to show a bar.

        Raises:
            DivergenceError: If steps stopped being finite; it carries the last good posterior.
        """
        saved = next((c for c in self.callbacks if isinstance(c, Checkpoint) and c.resume), None)
        if saved is not None and (saved.path / "manifest.json").exists():
            self._restore(read_checkpoint(saved.path, self._fingerprint()))
        for callback in self.callbacks:
            callback.start(self)
        bar = ProgressBar(self.total_steps, self.step, progress)
        try:
            keep_freed_memory()
            with bar, threads_for(self.state.work(self.settings.batch_size)), interruptible() as interrupted:
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

    def save_checkpoint(self, path: Path) -> None:
        """Write all that is needed to go on from here, bit for bit."""
        write_checkpoint(path, self._snapshot())

    # -- steps ---------------------------------------------------------------------------------------------------

    def _advance(self, bar: ProgressBar) -> None:
        """Take the steps to the next stop."""
        began = time.perf_counter()
        first, end = self.step, self._next_stop()
        several = end - first > self.steps_per_epoch
        origin = self._position() if several else None
        rows, knobs = self.order.rows(first, end), self._knobs(first, end)
        self.state.instance.program.train()
        with self.state.instance.running(), self.noise.drawing():
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
            self.state.instance.check_complete()
            self._close_epochs(closed, knobs)
            for callback in self.callbacks:
                callback.epoch_end(self)
        bar.advance(end - first, self.history)

    def _position(self) -> _Position:
        carry = {name: [x.clone() for x in tensors] for name, tensors in self.state.carry.items()}
        return _Position(carry, self.state.step, self.noise.state, self.order.position)

    def _go_back(self, position: _Position) -> None:
        self.state.take(position.carry)
        self.state.step, self.noise.state = position.step, position.noise
        self.order.go_back(position.order)

    def _next_stop(self) -> int:
        """The next step at which a callback or the end of an epoch needs control."""
        size = self.steps_per_epoch
        end = min(self.total_steps, self.step + self.stepper.capacity)
        if self.by_epoch:
            end = min(end, (self.step // size + 1) * size)
        for callback in self.callbacks:
            if interval := callback.interval(size):
                end = min(end, (self.step // interval + 1) * interval)
        whole = end - end % size
        return whole if whole > self.step else end

    def _knobs(self, first: int, end: int) -> FloatArray:
        """Learning rate, weight of the KL and values of annealed buffers of some steps, shape ``(n, 2 + k)``."""
        weights = np.ones(end - first)
        for callback in self.callbacks:
            if type(callback).kl_weight is not Callback.kl_weight:
                weights *= [callback.kl_weight(step, self.steps_per_epoch) for step in range(first, end)]
        moved = [[c.value(step, self.steps_per_epoch) for step in range(first, end)] for c in self.anneals]
        rates = self.settings.optimizer.rates(first, end, self.total_steps, self.settings.learning_rate)
        return np.stack([rates, weights, *moved], 1)

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
            with self._averaged():
                rows["held_out_elbo"] = [self.held_out()]
        self.history.add_epochs(rows)
        value = rows.get("held_out_elbo", rows["elbo"])[-1]
        warming_up = self.step < min(self.warm_up_steps, self.total_steps)
        self.best.offer(value, self.epoch, self._current, warming_up=warming_up)
        self.history.best_epoch = self.best.epoch

    def _current(self) -> dict[str, Tensor]:
        """A copy of the parameters as the posterior would hold them: averaged, if that was asked for."""
        with self._averaged():
            return self.state.instance.snapshot()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        average = self.state.average
        if average is None:
            yield
            return
        live = self.parameters()
        try:
            _assign(self.state.params, average)
            yield
        finally:
            _assign(self.state.params, live)

    # -- ends ----------------------------------------------------------------------------------------------------

    def _watch(self, first: int, skipped: Sequence[float]) -> None:
        """Count steps that were not applied, and give up after too many in a row."""
        if not any(skipped):
            self.bad_in_a_row = 0
            self.best.confirm()
            return
        patience = min(_PATIENCE, self.total_steps)
        for index, bad in enumerate(skipped):
            if not bad:
                self.bad_in_a_row = 0
                self.best.confirm()
                continue
            self.bad_in_a_row += 1
            if self.bad_in_a_row == patience:
                self._give_up(first + index + 1 - patience)

    def _give_up(self, first: int) -> None:
        """Say what happened from a step on, and hand over the last good state."""
        instance = self.state.instance
        with torch.no_grad(), instance.running(), self.noise.drawing():
            batch = instance.program.prepare(*self.data)
            where = first_bad_site(instance.program, batch, instance.num_data)
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
        instance = self.state.instance
        unscored = self.held_out is None or not self.history.best_epoch
        if self.bad_in_a_row:
            self.best.withdraw()
            self.history.best_epoch = self.best.epoch
        elif self.step % self.steps_per_epoch and unscored:
            self.best.tensors = self._current()  # stopped within an epoch: every applied step was finite
        instance.load(self.best.tensors)
        try:
            finish_guide(instance, self.data)
        except ValueError:
            if not (self.history.interrupted or self.bad_in_a_row):
                raise  # of a fit that was cut short the mode so far is what there is
        return Posterior(instance, history=self.history, config=dict(self.settings.config), seed=self.settings.seed)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _fingerprint(self) -> dict[str, Any]:
        """What must be equal for a resumed fit to be the same fit."""
        return {
            **self.settings.config,
            "seed": self.settings.seed,
            "num_data": self.state.instance.num_data,
            "parameters": {n: list(p.shape) for n, p in self.state.params.items()},
            "callbacks": [c.described for c in self.callbacks if c.steers],
            "data": digest(self.data),
            "held_out": None if self.held_out is None else digest(self.held_out.batch),
        }

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            fit=self._fingerprint(),
            step=self.step,
            epoch=self.epoch,
            stop=self.stop,
            bad_in_a_row=self.bad_in_a_row,
            program=self.state.instance.tensors(),
            carry={name: group for name, group in self.state.carry.items() if name not in _OWNED},
            optimizer=optimizer_state(self.state.optimizer),
            noise=self.noise.state,
            shuffle=self.order.epoch_state,
            best=self.best.tensors,
            best_value=self.best.value,
            history=self.history,
            callbacks=[c.state() for c in self.callbacks if c.steers],
        )

    def _restore(self, snapshot: Snapshot) -> None:
        """Put a fit that has not begun where a snapshot was."""
        self.state.instance.load(snapshot.program)
        self.state.take(snapshot.carry)
        if self.state.optimizer is not None:
            load_optimizer(self.state.optimizer, snapshot.optimizer)
        self.noise.state = snapshot.noise
        self.order.resume(snapshot.shuffle, snapshot.step)
        self.step, self.epoch, self.stop = snapshot.step, snapshot.epoch, snapshot.stop
        self.state.step, self.bad_in_a_row = snapshot.step, snapshot.bad_in_a_row
        self.history = snapshot.history
        device = self.state.instance.device
        self.best.tensors = {n: t.to(device) for n, t in snapshot.best.items()}
        self.best.value, self.best.epoch = snapshot.best_value, snapshot.history.best_epoch
        for callback, state in zip((c for c in self.callbacks if c.steers), snapshot.callbacks, strict=True):
            if state:
                callback.restore(state)


def _assign(target: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(values[name])
