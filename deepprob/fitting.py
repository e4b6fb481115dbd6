"""The loop that gradient-based routines share."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepprob.callbacks import Callback, Checkpoint
from deepprob.checkpoints import restore_checkpoint, write_checkpoint
from deepprob.data import Shuffle
from deepprob.errors import DivergenceError
from deepprob.history import History
from deepprob.interruption import interruptible
from deepprob.laplace import laplace
from deepprob.objectives import Terms
from deepprob.optimizers import Optimizer
from deepprob.owned import OwnedProgram
from deepprob.posterior import Posterior
from deepprob.program import Batch
from deepprob.progress import ProgressBar
from deepprob.runtime import RandomStream, threads_for
from deepprob.traces import first_bad_site

_PATIENCE = 20  # consecutive steps that were not finite, before the fit is given up
_HELD_OUT_SEED = 20_140_410
_SHUFFLE_SALT = 0x5EED


@dataclass
class State:
    """What the next step needs.

    Attributes:
        owned: The program, whose parameters and buffers are updated in place.
        params: What is trained, by name.
        optimizer: Over `params`.
        average: Exponential moving average of `params`, if asked for.
        statistics: Buffers that a run of the program changes (of batch norms).
        step: Steps done.
    """

    owned: OwnedProgram
    params: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] | None
    statistics: list[Tensor] = field(default_factory=list)
    step: int = 0


@dataclass(frozen=True)
class Knobs:
    """What changes from step to step without changing what the step is.

    Attributes:
        learning_rate: The optimizer's.
        kl_weight: Weight of the KL in the loss.
    """

    learning_rate: float
    kl_weight: float = 1.0


StepFunction = Callable[[State, Tensor, Knobs], tuple[State, Terms]]


class RunningFit:
    """A running fit: epochs, held-out scores, the best state, callbacks, interruptions and checkpoints.

    Routines that take gradient steps give it their step; what callbacks see of it is `deepprob.callbacks.Fit`.

    Args:
        state: What the first step needs.
        take_step: One step inside a running program, from the state, the batch's rows and the knobs.
        data: All rows, on the device.
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
        take_step: StepFunction,
        *,
        data: Batch,
        held_out: Batch | None,
        batch_size: int,
        epochs: int,
        optimizer: Optimizer,
        learning_rate: float,
        noise: RandomStream,
        seed: int,
        callbacks: Sequence[Callback],
        config: Mapping[str, Any],
    ) -> None:
        self.state, self.take_step = state, take_step
        self.data, self.held_out, self.device = data, held_out, state.owned.device
        self.optimizer, self.peak, self.noise, self.seed = optimizer, learning_rate, noise, seed
        self.callbacks, self.config = list(callbacks), dict(config)
        self.shuffle_generator = torch.Generator().manual_seed(seed + _SHUFFLE_SALT)
        self.shuffle_state = self.shuffle_generator.get_state()
        self.shuffle = Shuffle(state.owned.num_data, batch_size, self.shuffle_generator)
        self.steps_per_epoch = self.shuffle.steps_per_epoch
        self.total_steps = epochs * self.steps_per_epoch
        self.history = History(steps_per_epoch=self.steps_per_epoch)
        self.stop, self.step, self.epoch = False, 0, 0
        self.warm_up_steps = max((c.warm_up(self) for c in self.callbacks), default=0)
        self.best_value, self.best = -math.inf, state.owned.snapshot()
        self.bad_in_a_row = 0
        self.before_best: tuple[dict[str, Tensor], int] | None = None
        self.pending: list[Terms] = []
        if held_out is not None:
            self._score(held_out)  # what cannot be scored is found before any training

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
            with bar, threads_for(self._work()), interruptible() as interrupted:
                while self.step < self.total_steps and not self.stop:
                    self._epoch(bar, interrupted)
                    if interrupted:
                        break
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
        self._flush()
        return self._posterior()

    def _work(self) -> int:
        """Multiplications of a step, roughly."""
        return sum(p.numel() for p in self.state.params.values()) * self.shuffle.batch_size

    def _epoch(self, bar: ProgressBar, interrupted: list[bool]) -> None:
        """The rest of the current epoch."""
        began = time.perf_counter()
        if self.step % self.steps_per_epoch == 0:
            self.shuffle_state = self.shuffle_generator.get_state()
        all_rows = self.shuffle.epoch().to(self.device)
        program = self.state.owned.program
        program.train()
        first = self.step % self.steps_per_epoch
        knobs = self._knobs()
        for rows in all_rows[first:]:
            knobs = self._knobs()
            with self.state.owned.running(), self.noise.drawing():
                self.state, terms = self.take_step(self.state, rows, knobs)
            self.step += 1
            self.pending.append(terms)
            self._watch(terms)
            bar.advance(self.history)
            for callback in self.callbacks:
                callback.step_end(self)
            if interrupted:
                return
        self._flush()
        self.state.owned.check_complete()
        self.epoch += 1
        self._close_epoch(knobs, time.perf_counter() - began)
        for callback in self.callbacks:
            callback.epoch_end(self)

    def _knobs(self) -> Knobs:
        weight = 1.0
        for callback in self.callbacks:
            weight *= callback.kl_weight(self.step, self.steps_per_epoch)
        return Knobs(self.optimizer.rate(self.step, self.total_steps, self.peak), weight)

    def _flush(self) -> None:
        """Bring the terms of the last steps to the host, all at once."""
        for name in self.pending[0] if self.pending else ():
            values = torch.stack([terms[name] for terms in self.pending]).tolist()
            self.history.steps.setdefault(name, []).extend(values)
        self.pending = []

    def _close_epoch(self, knobs: Knobs, seconds: float) -> None:
        last = {n: v[-self.steps_per_epoch :] for n, v in self.history.steps.items()}
        good = [e for e, s in zip(last["elbo"], last["skipped"], strict=True) if not s]
        row = {
            "elbo": sum(good) / len(good) if good else math.nan,
            "learning_rate": knobs.learning_rate,
            "kl_weight": knobs.kl_weight,
            "skipped": sum(last["skipped"]),
            "seconds": seconds,
        }
        if self.held_out is not None:
            row["held_out_elbo"] = self._score(self.held_out)
        self.history.add_epoch(row)
        value = row.get("held_out_elbo", row["elbo"])
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
        if self.state.average is None:
            yield
            return
        live = {n: p.detach().clone() for n, p in self.state.params.items()}
        try:
            _assign(self.state.params, self.state.average)
            yield
        finally:
            _assign(self.state.params, live)

    def _score(self, batch: Batch) -> float:
        """Mean held-out ELBO per row, under the same noise every time, so that epochs can be compared."""
        owned = self.state.owned
        was_training = owned.program.training
        posterior = Posterior(owned)  # puts the program in evaluation mode
        stream = RandomStream(_HELD_OUT_SEED, self.device)
        with self._averaged(), torch.no_grad(), owned.running(), stream.drawing():
            value = float(posterior.elbo_of(batch, 1).mean())
        owned.program.train(was_training)
        return value

    def _watch(self, terms: Terms) -> None:
        """Count steps that were not applied, and give up when nothing else comes."""
        if not bool(terms["skipped"]):
            self.bad_in_a_row, self.before_best = 0, None
            return
        self.bad_in_a_row += 1
        if self.bad_in_a_row < min(_PATIENCE, self.total_steps):
            return
        self._flush()
        owned = self.state.owned
        with torch.no_grad(), owned.running(), self.noise.drawing():
            batch = owned.program.prepare(*self.data)
            where = first_bad_site(owned.program, batch, owned.num_data)
        found = self._posterior()
        first = self.step - self.bad_in_a_row + 1
        epoch = (first - 1) // self.steps_per_epoch + 1
        rate = self._knobs().learning_rate
        kept = f"epoch {self.history.best_epoch}" if self.history.best_epoch else "the start"
        value = self.history.steps["elbo"][-1]
        what = "the gradient stopped being finite" if math.isfinite(value) else f"elbo became {value:g}"
        raise DivergenceError(
            f"{what} at epoch {epoch}, step {first} ({where}). "
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
        self._flush()
        write_checkpoint(self, path)


def _assign(target: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(values[name])
