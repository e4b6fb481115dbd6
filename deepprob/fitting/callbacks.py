"""Callbacks, called between the steps of a fit: annealing, early stopping, checkpoints, logging.

A plain function is a callback, too: `svi` calls it after every epoch with the running fit, of which it may use the part
that `Fit` declares. It returns None or a bool, and True ends the fit::

    def until_good_enough(fit):
        print(fit.epoch, fit.history.epochs["elbo"][-1])
        return fit.history.epochs["elbo"][-1] > -1.0

    svi(program, data, callbacks=[until_good_enough])
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

import numpy as np
from torch import Tensor

from deepprob.errors import shown, unknown, whole
from deepprob.posteriors.history import History

_CHECKPOINT_STEPS = 100  # at least, between two checkpoints by default


class Fit(Protocol):
    """The part of a running fit that callbacks may use; of a fit with restarts, that of the start that leads.

    Attributes:
        epoch: Epochs done; the last epoch of a fit may have fewer steps.
        step: Steps done.
        first_step: The step at which the fit began: 0, or where the fit had ended that it extends.
        total_steps: Planned steps; until a fit without a fixed length has levelled, its budget.
        steps_per_epoch: Steps in one epoch.
        history: The history so far.
        stop: Set it to True to end the fit, and with it the current epoch.
        warm_up_steps: Steps until every warm-up is over.
    """

    epoch: int
    step: int
    first_step: int
    steps_per_epoch: int
    history: History
    stop: bool
    warm_up_steps: int

    @property
    def total_steps(self) -> int: ...

    def parameters(self) -> dict[str, Tensor]:
        """A detached copy of the trained parameters at their present constrained values.

        The names are those of `Posterior.parameters`.
        """

    def save_checkpoint(self, path: Path) -> None:
        """Write a checkpoint, from which the fit resumes bit for bit."""


class Callback:
    """Base class of callbacks, which does nothing. Override the methods you need."""

    def start(self, fit: Fit) -> None:
        """Called once, before the first step (and again when a fit is resumed)."""

    def warm_up(self, fit: Fit) -> int:
        """Steps for which this callback changes the objective; best states and early stopping wait for their end."""
        return 0

    def kl_weight(self, step: int, steps_per_epoch: int) -> float:
        """The factor of the KL at a step."""
        return 1.0

    def interval(self, steps_per_epoch: int) -> int:
        """Steps between two calls of `step_end`; 0 for no calls. A compiled fit takes the steps in between at once."""
        return int(type(self).step_end is not Callback.step_end)

    def step_end(self, fit: Fit) -> None:
        """Called after every step whose number is a multiple of `interval`."""

    def epoch_end(self, fit: Fit) -> None:
        """Called after every epoch, when the epoch is in the history; the end of a fit ends its last epoch."""

    def state(self) -> dict[str, Any]:
        """The callback's state, as JSON, which a checkpoint stores for a resumed fit."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a state that `state` returned."""

    @property
    def watches_epochs(self) -> bool:
        """Whether `epoch_end` is overridden. If no callback's is, several epochs may run in one call."""
        return type(self).epoch_end is not Callback.epoch_end

    @property
    def steers(self) -> bool:
        """Whether the callback affects the fit's result. If so, a resumed fit must have it too; a log has no effect."""
        cls = type(self)
        return bool(self.settings) or cls.kl_weight is not Callback.kl_weight or cls.state is not Callback.state

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that affect the fit's result, as JSON; a resumed fit must have the same."""
        return {}

    @property
    def described(self) -> str:
        """Name and `settings` of the callback, as a checkpoint stores them."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"


class _EpochFunction(Callback):
    """Calls a function of the user after every epoch."""

    def __init__(self, function: Callable[[Fit], object]) -> None:
        self.function = function

    def epoch_end(self, fit: Fit) -> None:
        answer: Any = self.function(fit)
        arrays = Tensor | np.ndarray | np.generic
        stop = answer.item() if isinstance(answer, arrays) and math.prod(answer.shape) == 1 else answer
        if not isinstance(stop, bool | None):
            raise TypeError(
                f"the callback {getattr(self.function, '__name__', shown(self.function))} must return a bool, of which "
                f"True ends the fit, or None; got {shown(answer)}. Remove its return statement, or return a comparison."
            )
        if stop:
            fit.stop = True


def callback_list(callbacks: Any) -> list[Callback]:
    """The callbacks that a user gave, as a list.

    Args:
        callbacks: A sequence of `Callback` objects and of functions. A function is called after every epoch with the
            fit; it returns None or a bool, and True ends the fit.

    Raises:
        TypeError: If the argument is not a sequence of them.
    """
    given = callbacks if isinstance(callbacks, Sequence) else [callbacks]
    # A class is a callback without its parentheses, and a built-in function knows no fit.
    wrong = [
        c
        for c in given
        if not isinstance(c, Callback) and (isinstance(c, type) or inspect.isbuiltin(c) or not callable(c))
    ]
    if wrong or given is not callbacks:
        raise TypeError(
            f"callbacks must be a list of Callback objects; got {type([*wrong, *given][0]).__name__}. "
            "Write callbacks=[KLWarmUp(5)], or put a function of the fit into the list."
        )
    return [c if isinstance(c, Callback) else _EpochFunction(c) for c in given]


class Anneal(Callback):
    r"""Move a number of the program from one value to another, such as the temperature of a relaxed distribution.

    .. math:: \tau_s = \tau_0 \, (\tau_1 / \tau_0)^{r} \quad\text{or}\quad \tau_0 + r (\tau_1 - \tau_0), \qquad
              r = \min\!\big(1, s / (S - 1)\big)

    at step :math:`s`, with :math:`S` the number of steps in ``epochs``. The number is a scalar buffer of the program,
    such as ``self.temperature``; compiled steps take it as an input. Override `value` for another schedule.

    Args:
        buffer: Name of the buffer. For a buffer of a submodule the end of its dotted name is enough.
        start: The value at the first step.
        end: The value at the last step of ``epochs`` and from then on. Best states and early stopping wait for it.
        epochs: Epochs until the value is ``end``.
        shape: ``"geometric"`` or ``"linear"``.

    Raises:
        ValueError: If a number is out of range or the shape is unknown.

    References:
        Jang, Gu, Poole (2017), Categorical Reparameterization with Gumbel-Softmax.

    Examples:
        >>> anneal = Anneal("temperature", start=1.0, end=0.25, epochs=1)
        >>> [anneal.value(step, steps_per_epoch=3) for step in range(5)]
        [1.0, 0.5, 0.25, 0.25, 0.25]

        The temperature of a program during a fit:

        >>> import torch, pyro, pyro.distributions as dist
        >>> from deepprob.inference import svi
        >>> from deepprob.programs.program import Program
        >>> class Coins(Program):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("temperature", torch.tensor(1.0))
        ...     def coin(self, x, chance):
        ...         return pyro.sample("z", dist.RelaxedBernoulli(self.temperature, probs=chance))
        ...     def model(self, x):
        ...         with self.data_plate(x):
        ...             pyro.sample("x", dist.Normal(self.coin(x, torch.tensor(0.3)), 0.5), obs=x)
        ...     def guide(self, x):
        ...         with self.data_plate(x):
        ...             self.coin(x, torch.sigmoid(pyro.param("slope", torch.tensor(0.0)) * x))
        >>> cooling = Anneal("temperature", start=1.0, end=0.5, epochs=10)
        >>> posterior = svi(Coins(), torch.tensor([0.1, 0.9, 1.1]), epochs=20, callbacks=[cooling])
        >>> round(posterior.history.epochs["annealed.temperature"][-1], 2)
        0.5
    """

    def __init__(
        self, buffer: str, start: float, end: float, epochs: float, shape: Literal["geometric", "linear"] = "geometric"
    ) -> None:
        if shape not in ("geometric", "linear"):
            raise unknown("shape", shape, ["geometric", "linear"])
        if not 0 < epochs < math.inf:
            raise ValueError(f"Anneal's epochs must be positive and finite; got {epochs}.")
        if not (math.isfinite(start) and math.isfinite(end)):
            raise ValueError(f"Anneal's start and end must be finite; got {start} and {end}.")
        if shape == "geometric" and not (start > 0 and end > 0):
            raise ValueError(
                f"Anneal's start and end must be positive; got {start} and {end}. To reach 0, write shape='linear'."
            )
        self.buffer, self.begin, self.end, self.epochs, self.shape = buffer, start, end, epochs, shape

    def start(self, fit: Fit) -> None:
        warn_if_longer(self, self.epochs, fit, f"{self.buffer} never reaches {self.end:g}. Shorten the annealing")

    def warm_up(self, fit: Fit) -> int:
        return math.ceil(self.epochs * fit.steps_per_epoch)

    def value(self, step: int, steps_per_epoch: int) -> float:
        """The number at a step."""
        last = self.epochs * steps_per_epoch - 1
        done = min(1.0, step / last) if last > 0 else 1.0
        if self.shape == "geometric":
            return float(self.begin * (self.end / self.begin) ** done)
        return self.begin + (self.end - self.begin) * done

    @property
    def settings(self) -> dict[str, Any]:
        ends = {"start": self.begin, "end": self.end}
        return {"buffer": self.buffer, **ends, "epochs": self.epochs, "shape": self.shape}


def warn_if_longer(callback: Callback, epochs: float, fit: Fit, consequence: str) -> None:
    """Warn if a callback's schedule is longer than the fit.

    Args:
        callback: The callback.
        epochs: The length of its schedule.
        fit: The running fit.
        consequence: What follows, and the first remedy.
    """
    if callback.warm_up(fit) > fit.total_steps:
        warnings.warn(
            f"{type(callback).__name__}(epochs={epochs}) is longer than the fit "
            f"({fit.total_steps / fit.steps_per_epoch:g} epochs): {consequence}, or fit for longer: raise epochs= or "
            "steps= of svi.",
            UserWarning,
            stacklevel=5,
        )


class EarlyStopping(Callback):
    """End the fit when the ELBO has not improved for ``patience`` epochs; waits for the end of any warm-up.

    The held-out ELBO counts if there is one, else the ELBO of the epoch: with global latents the held-out score lacks
    their KL, and would prefer a guide that is too narrow.

    Args:
        patience: Epochs without improvement.
        min_delta: Smallest increase that counts as an improvement, in nats per datum.
    """

    def __init__(self, patience: int = 10, min_delta: float = 0.0) -> None:
        self.patience, self.min_delta = whole("EarlyStopping's patience", patience), min_delta
        self.best, self.waited = -math.inf, 0

    def start(self, fit: Fit) -> None:
        if fit.step == fit.first_step:
            self.best, self.waited = -math.inf, 0

    def epoch_end(self, fit: Fit) -> None:
        if fit.step < fit.warm_up_steps:
            return
        epochs = fit.history.epochs
        bound = epochs.get("held_out_elbo", [math.nan])[-1]  # nan in a fit that goes on without held-out rows
        value = epochs["elbo"][-1] if math.isnan(bound) else bound
        if value > self.best + self.min_delta:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited < self.patience:
            return
        fit.stop = True
        if fit.steps_per_epoch == 1 and math.isnan(bound):
            warnings.warn(
                f"EarlyStopping(patience={self.patience}) ended the fit after {fit.step} steps: an epoch of this fit "
                "is one step, whose ELBO is a noisy estimate. Leave it out, since without epochs= and steps= a fit "
                "ends when its bound has levelled; or raise the patience to hundreds.",
                UserWarning,
                stacklevel=6,
            )

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def restore(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]


class Checkpoint(Callback):
    """Write checkpoints to a folder, and resume from a checkpoint found there.

    A fit can be killed at any moment. Started again with the same arguments, it ends with the same parameters as an
    undisturbed fit, bit for bit on the CPU.

    Args:
        path: The folder. From the first checkpoint on it always holds one complete checkpoint.
        every: Epochs between two checkpoints, rounded to whole steps. By default one epoch, or the epochs of 100 steps
            where an epoch has fewer.
        resume: Whether to resume from a checkpoint in the folder; False starts over.
    """

    def __init__(self, path: str | Path, every: float | None = None, *, resume: bool = True) -> None:
        if every is not None and not every > 0:
            raise ValueError(f"Checkpoint's every must be a positive number of epochs; got {every}.")
        self.path, self.every, self.resume = Path(path), every, resume

    def interval(self, steps_per_epoch: int) -> int:
        every = math.ceil(_CHECKPOINT_STEPS / steps_per_epoch) if self.every is None else self.every
        return max(1, round(every * steps_per_epoch))

    @property
    def watches_epochs(self) -> bool:
        return False  # but the ends of its intervals

    def step_end(self, fit: Fit) -> None:
        # At the end of an epoch epoch_end writes the checkpoint, when the epoch is in the history.
        if fit.step % self.interval(fit.steps_per_epoch) == 0 and fit.step % fit.steps_per_epoch:
            fit.save_checkpoint(self.path)

    def epoch_end(self, fit: Fit) -> None:
        if fit.step % self.interval(fit.steps_per_epoch) == 0 or fit.stop or fit.step >= fit.total_steps:
            fit.save_checkpoint(self.path)


class Log(Callback):
    """Print one line every few epochs.

    Args:
        every: Epochs between two lines.
        file: A text file to print to, standard output by default.
    """

    def __init__(self, every: int = 1, file: TextIO | None = None) -> None:
        self.every, self.file = whole("Log's every", every), file

    def epoch_end(self, fit: Fit) -> None:
        if fit.epoch % self.every == 0:
            last = {name: values[-1] for name, values in fit.history.epochs.items()}
            text = "  ".join(f"{name} {value:.4g}" for name, value in last.items())
            print(f"epoch {fit.epoch}  {text}", file=self.file or sys.stdout)
