"""Stochastic variational inference: fit a program's guide and networks by gradient steps on a bound."""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepprob.callbacks import Callback, Checkpoint
from deepprob.data import Shuffle
from deepprob.errors import DivergenceError
from deepprob.guides import GuideSpec
from deepprob.history import History
from deepprob.laplace import laplace
from deepprob.objectives import Objective, Terms, describe, objective_named
from deepprob.optimizers import Optimizer, optimizer_named
from deepprob.owned import OwnedProgram
from deepprob.posterior import Posterior
from deepprob.program import Batch, Program, num_rows
from deepprob.progress import ProgressBar
from deepprob.runtime import RandomStream, pick_device
from deepprob.storage import read, write
from deepprob.traces import first_bad_site

_DEFAULT_BATCH = 128
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
        step: Steps done.
    """

    owned: OwnedProgram
    params: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] | None
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


def init(owned: OwnedProgram, optimizer: Optimizer, learning_rate: float) -> State:
    """The state before the first step.

    Args:
        owned: The program to fit; the state takes it over.
        optimizer: How to minimise.
        learning_rate: The peak step size.

    Raises:
        ValueError: If there is nothing to train.
    """
    params = owned.parameters()
    if not params:
        raise ValueError("nothing to train: neither the model nor the guide has a parameter. Add one, or skip the fit.")
    average = None if optimizer.average is None else {n: p.detach().clone() for n, p in params.items()}
    return State(owned, params, optimizer.build(params.values(), learning_rate), average)


def step(
    state: State,
    data: Batch,
    rows: Tensor,
    noise: RandomStream,
    knobs: Knobs,
    objective: Objective,
    optimizer: Optimizer,
) -> tuple[State, Terms]:
    """One gradient step.

    A step whose loss or gradient is not finite is not applied: the state's parameters stay as they are.

    Args:
        state: What the last step left.
        data: All rows, on the device.
        rows: Which of them the batch holds, shape ``(B,)``.
        noise: Where random numbers come from.
        knobs: Learning rate and weights.
        objective: What is maximised.
        optimizer: How to minimise.

    Returns:
        The next state (the same object, updated) and detached terms: ``elbo``, ``likelihood``, ``kl_local``,
        ``kl_global``, ``gradient_norm``, and ``skipped``, 1 where the step was not applied.
    """
    owned = state.owned
    num_data = owned.num_data
    with owned.running(), noise.drawing():
        return _step(state, data, rows, num_data, knobs, objective, optimizer)


def _step(
    state: State, data: Batch, rows: Tensor, num_data: int, knobs: Knobs, objective: Objective, optimizer: Optimizer
) -> tuple[State, Terms]:
    """`step` inside a running program, without entering and leaving it every time."""
    program = state.owned.program
    batch = data if len(rows) == num_rows(data) else tuple(x.index_select(0, rows) for x in data)
    state.optimizer.zero_grad(set_to_none=True)
    loss, terms = objective(
        program,
        program.prepare(*batch),
        rows,
        num_data,
        kl_weight=knobs.kl_weight,
        plates=max(1, state.owned.structure.plates),
    )
    loss.backward()
    gradients = [p.grad for p in state.params.values() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    finite = torch.isfinite(loss.detach()) & torch.isfinite(norm)
    if bool(finite):
        if optimizer.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(list(state.params.values()), optimizer.clip_norm, norm)
        for group in state.optimizer.param_groups:
            group["lr"] = knobs.learning_rate
        state.optimizer.step()
        if state.average is not None and optimizer.average is not None:
            # Early averages forget the start faster, as in Adam's bias correction.
            decay = min(optimizer.average, (1 + state.step) / (10 + state.step))
            for name, value in state.params.items():
                state.average[name].lerp_(value.detach(), 1 - decay)
    state.step += 1
    return state, terms | {"gradient_norm": norm, "skipped": (~finite).to(norm.dtype)}


def svi(
    program: Program,
    data: Any,
    *,
    epochs: int = 100,
    batch_size: int | str | None = "auto",
    objective: str | Objective = "elbo",
    guide: GuideSpec = None,
    optimizer: str | Optimizer | type[torch.optim.Optimizer] | None = None,
    held_out: Any = None,
    init: str = "fresh",
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool | str = "auto",
    callbacks: Sequence[Callback] = (),
) -> Posterior:
    r"""Fit a program by stochastic variational inference.

    .. math:: \max_{\theta, \phi} \; \mathbb E_{q_\phi(z)} [\log p_\theta(x, z) - \log q_\phi(z)]

    The routine works on its own copy of the program; the caller's is never changed, nor is Pyro's global store or the
    caller's random state. Two fits with one seed give equal numbers.

    Args:
        program: A `Program`; an existing Pyro program becomes one by `Program.of`.
        data: The model's arguments: tensors, arrays, frames, a ``Dataset``, a split of a data set, or None.
        epochs: Passes over the data. A fit without data takes one step an epoch.
        batch_size: Rows per step; None for all of them; ``"auto"`` for 128, or all where the program has no data plate.
        objective: ``"elbo"``, or an `ELBO` with its settings.
        guide: None for the program's own; ``"normal"``, ``"multivariate_normal"``, ``"low_rank"``, ``"flow"``,
            ``"laplace"``, ``"map"``; an ``AutoGuide`` class; or a callable.
        optimizer: A name, a class of ``torch.optim``, or an `Optimizer` that carries learning rate, schedule, clipping
            and averaging. Adam with a cosine schedule by default.
        held_out: Data to score after every epoch; the posterior then holds the best epoch's parameters.
        init: ``"fresh"`` draws new weights under ``seed``, except in modules marked by ``pretrained``; ``"keep"``
            starts from the program's.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``.
        seed: Of weights, shuffle and noise.
        progress: Whether to show a bar; ``"auto"`` does in a terminal or a notebook.
        callbacks: KL warm-up, early stopping, checkpoints, logging: see `deepprob.callbacks`.

    Returns:
        The posterior. Ctrl-C returns the best one so far.

    Raises:
        ValueError: If data, program or settings do not fit together; before any training.
        DivergenceError: If steps stopped being finite; it carries the last good posterior.

    References:
        Hoffman, Blei, Wang, Paisley (2013), Stochastic Variational Inference.

    Examples:
        A conjugate model's posterior is known, N(2/3 of the mean, 1/3):

        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> posterior = svi(Program.of(model, "normal"), torch.tensor([2.0, 4.0]), epochs=1500, seed=0)
        >>> draws = posterior.sample(draws=4000)["loc"]
        >>> bool((draws.mean() - 2.0).abs() < 0.05), bool((draws.std() - 3**-0.5).abs() < 0.03)
        (True, True)
    """
    if not isinstance(program, Program):
        raise TypeError(
            f"svi fits a Program; got {type(program).__name__}. Make one of a Pyro model: Program.of(model, guide)."
        )
    fit = _Fit(program, data, epochs, batch_size, objective, guide, optimizer, held_out, init, device, seed, callbacks)
    return fit.run(progress)


class _Fit:
    """A running fit; what callbacks see of it is `deepprob.callbacks.Fit`."""

    def __init__(
        self,
        program: Program,
        data: Any,
        epochs: int,
        batch_size: int | str | None,
        objective: str | Objective,
        guide: GuideSpec,
        optimizer: str | Optimizer | type[torch.optim.Optimizer] | None,
        held_out: Any,
        init_: str,
        device: str | torch.device,
        seed: int,
        callbacks: Sequence[Callback],
    ) -> None:
        self.objective, self.optimizer = objective_named(objective), optimizer_named(optimizer)
        self.callbacks, self.seed = _callbacks(callbacks), _whole("seed", seed, least=0)
        self.epochs = _whole("epochs", epochs, least=1)
        if init_ not in ("fresh", "keep"):
            raise ValueError(f"init must be 'fresh' or 'keep'; got {init_!r}.")
        self.device = pick_device(device)
        batch = _complete(program, program.accept(data), "data")
        held = None if held_out is None else _complete(program, program.accept(held_out, what="held_out"), "held_out")
        num_data = num_rows(batch)
        size = _batch_size(batch_size, num_data, program)
        self.noise = RandomStream(self.seed, self.device)
        with self.noise.drawing():
            owned = OwnedProgram(
                program,
                batch,
                num_data,
                guide=guide,
                device=self.device,
                full_batch=size == num_data,
                fresh=init_ == "fresh",
            )
            if size < num_data and type(program).validate is Program.validate:
                owned.check_data(batch, size)
        if held is not None and len(held) != len(batch):
            raise ValueError(
                f"held_out must have the {len(batch)} parts of data ({', '.join(s.name for s in owned.inputs)}); "
                f"got {len(held)}. Give the observed ones too: it is scored."
            )
        if held is not None:
            held = tuple(s.conform(x, program.variable_length) for s, x in zip(owned.inputs, held, strict=True))
        self.data = tuple(x.to(self.device) for x in batch)
        self.held_out = None if held is None else tuple(x.to(self.device) for x in held)
        self.peak = self.optimizer.learning_rate or program.learning_rate
        self.state = init(owned, self.optimizer, self.peak)
        self.shuffle_generator = torch.Generator().manual_seed(self.seed + _SHUFFLE_SALT)
        self.shuffle_state = self.shuffle_generator.get_state()
        self.shuffle = Shuffle(num_data, size, self.shuffle_generator)
        self.steps_per_epoch = self.shuffle.steps_per_epoch
        self.total_steps = self.epochs * self.steps_per_epoch
        self.history = History(steps_per_epoch=self.steps_per_epoch)
        self.stop, self.step, self.epoch = False, 0, 0
        self.warm_up_steps = max((c.warm_up(self) for c in self.callbacks), default=0)
        self.best_value, self.best = -math.inf, owned.snapshot()
        self.bad_in_a_row = 0
        self.before_best: tuple[dict[str, Tensor], int] | None = None
        self.pending: list[Terms] = []
        self.config = {
            "routine": "svi",
            "epochs": self.epochs,
            "batch_size": size,
            "objective": describe(self.objective),
            "guide": owned.guide_name or "own",
            "optimizer": self.optimizer.describe() | {"learning_rate": self.peak},
            "init": init_,
            "device": str(self.device),
        }
        if self.held_out is not None:
            self._score(self.held_out)  # what cannot be scored is found before any training

    def run(self, progress: bool | str) -> Posterior:
        self._resume()
        for callback in self.callbacks:
            callback.start(self)
        bar = ProgressBar(self.total_steps, self.step, progress)
        try:
            with bar, _interruptible() as interrupted:
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
                self.state, terms = _step(
                    self.state, self.data, rows, self.state.owned.num_data, knobs, self.objective, self.optimizer
                )
            self.step += 1
            self.pending.append(terms)
            self._watch(terms)
            bar.advance(self.history)
            for callback in self.callbacks:
                callback.step_end(self)
            if interrupted:
                return
        self._flush()
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
        if self.bad_in_a_row < _PATIENCE:
            return
        self._flush()
        owned = self.state.owned
        with torch.no_grad(), owned.running(), self.noise.drawing():
            batch = owned.program.prepare(*self.data)
            where = first_bad_site(owned.program, batch, owned.num_data)
        found = self._posterior()
        epoch = (self.step - _PATIENCE) // self.steps_per_epoch + 1
        rate = self._knobs().learning_rate
        kept = f"epoch {self.history.best_epoch}" if self.history.best_epoch else "the start"
        value = self.history.steps["elbo"][-1]
        what = "the gradient stopped being finite" if math.isfinite(value) else f"elbo became {value:g}"
        raise DivergenceError(
            f"{what} at epoch {epoch}, step {self.step - _PATIENCE + 1} ({where}). "
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

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _fingerprint(self) -> dict[str, Any]:
        """What must be equal for a resumed fit to be the same fit."""
        shapes = {n: list(p.shape) for n, p in self.state.params.items()}
        return {**self.config, "seed": self.seed, "num_data": self.state.owned.num_data, "parameters": shapes}

    def save_checkpoint(self, path: Path) -> None:
        """Write all that is needed to go on from here, bit for bit."""
        self._flush()
        optimizer = self.state.optimizer.state_dict()
        tensors = {f"state.{n}": t for n, t in self.state.owned.tensors().items()}
        tensors |= {f"best.{n}": t for n, t in self.best.items()}
        tensors |= {f"average.{n}": t for n, t in (self.state.average or {}).items()}
        tensors |= {f"noise.{n}": t for n, t in self.noise.state.items()}
        tensors |= {f"history.{n}": t for n, t in self.history.to_tensors().items()}
        tensors["shuffle.state"] = self.shuffle_state
        numbers: dict[str, Any] = {}
        for index, entries in optimizer["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    numbers[f"{index}.{name}"] = value
        manifest = {
            "fit": self._fingerprint(),
            "optimizer": numbers,
            "step": self.step,
            "epoch": self.epoch,
            "stop": self.stop,
            "bad_in_a_row": self.bad_in_a_row,
            "best_value": self.best_value,
            "history": self.history.facts(),
            "callbacks": [c.state() for c in self.callbacks],
        }
        write(path, tensors, manifest, kind="checkpoint")

    def _resume(self) -> None:
        saved = next((c for c in self.callbacks if isinstance(c, Checkpoint) and c.resume), None)
        if saved is None or not (saved.path / "manifest.json").exists():
            return
        tensors, manifest = read(saved.path, kind="checkpoint")
        if (was := manifest["fit"]) != (now := self._fingerprint()):
            changed = ", ".join(f"{k} (was {was.get(k)}, now {now.get(k)})" for k in now if was.get(k) != now.get(k))
            raise ValueError(
                f"the checkpoint in {saved.path} is of another fit: {changed}. "
                "Give the same arguments, another folder, or Checkpoint(..., resume=False)."
            )
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            group, _, name = key.partition(".")
            groups.setdefault(group, {})[name] = value
        self.state.owned.load(groups["state"])
        self.best = {n: t.to(self.device) for n, t in groups["best"].items()}
        if self.state.average is not None:
            self.state.average = {n: t.to(self.device) for n, t in groups["average"].items()}
        self.noise.state = groups["noise"]
        self.shuffle_state = groups["shuffle"]["state"]
        self.shuffle_generator.set_state(self.shuffle_state)
        self._load_optimizer(groups.get("optimizer", {}), manifest["optimizer"])
        self.step, self.epoch, self.stop = manifest["step"], manifest["epoch"], manifest["stop"]
        self.state.step = self.step
        if self.step and self.step % self.steps_per_epoch == 0:
            self.shuffle.epoch()  # that epoch is over: the next one draws the next permutation
        self.bad_in_a_row, self.best_value = manifest["bad_in_a_row"], manifest["best_value"]
        self.history = History.restore(groups["history"], manifest["history"])
        for callback, state in zip(self.callbacks, manifest["callbacks"], strict=True):
            if state:
                callback.restore(state)

    def _load_optimizer(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        entries: dict[int, dict[str, Any]] = {}
        for key, value in [*tensors.items(), *numbers.items()]:
            index, _, name = key.partition(".")
            entries.setdefault(int(index), {})[name] = value
        groups = self.state.optimizer.state_dict()["param_groups"]
        self.state.optimizer.load_state_dict({"state": entries, "param_groups": groups})


def _assign(target: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(values[name])


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or (number := int(value)) < least:
        raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}.")
    return number


def _callbacks(callbacks: Any) -> list[Callback]:
    if not isinstance(callbacks, Sequence) or not all(isinstance(c, Callback) for c in callbacks):
        came = callbacks if not isinstance(callbacks, Sequence) else callbacks[0]
        raise TypeError(
            f"callbacks must be a list of Callback objects; got {type(came).__name__}. Write callbacks=[KLWarmUp(5)]."
        )
    return list(callbacks)


def _complete(program: Program, batch: Batch, what: str) -> Batch:
    if len(batch) < program.num_required:
        missing = ", ".join(program.argument_names[len(batch) : program.num_required])
        raise ValueError(
            f"the model takes {', '.join(program.argument_names)}; {what} lacks {missing}. "
            "Give a tuple in this order, the observed ones included."
        )
    return batch


def _batch_size(batch_size: int | str | None, num_data: int, program: Program) -> int:
    if batch_size is None:
        return num_data
    if batch_size == "auto":
        return min(_DEFAULT_BATCH, num_data) if program.data_name else num_data
    size = _whole("batch_size", batch_size, least=1)
    if size < num_data and not program.data_name:
        raise ValueError(
            f"batch_size={size} is smaller than the data ({num_data} rows), but the program names no data plate, so "
            "its KL would be weighed wrongly. Name it: Program.of(model, guide, data_plate='data'); or batch_size=None."
        )
    return min(size, num_data)


@contextmanager
def _interruptible() -> Iterator[list[bool]]:
    """Ctrl-C ends the fit after the step at hand; a second one ends it at once."""
    seen: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = signal.getsignal(signal.SIGINT)

    def note(signum: int, frame: Any) -> None:
        seen.append(True)
        signal.signal(signal.SIGINT, before)

    if before is not signal.default_int_handler:  # somebody else's: leave it alone
        yield seen
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
