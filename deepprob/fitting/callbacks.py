"""What can be done between the steps of a fit: warm-up, annealing, early stopping, checkpoints, logging."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

from torch import Tensor

from deepprob.errors import unknown
from deepprob.posteriors.history import History


class Fit(Protocol):
    """What a callback sees of a running fit.

    Attributes:
        epoch: Epochs done.
        step: Steps done.
        total_steps: Steps planned.
        steps_per_epoch: Steps in one epoch.
        history: All that was recorded so far.
        stop: Set it to True to end the fit after this epoch.
        warm_up_steps: Steps until every warm-up is over.
    """

    epoch: int
    step: int
    total_steps: int
    steps_per_epoch: int
    history: History
    stop: bool
    warm_up_steps: int

    def parameters(self) -> dict[str, Tensor]:
        """A copy of what is trained, by name, as it is now: unconstrained values, detached."""

    def save_checkpoint(self, path: Path) -> None:
        """Write all that is needed to go on from here, bit for bit."""


class Callback:
    """Does nothing; subclass what you need."""

    def start(self, fit: Fit) -> None:
        """Called once, before the first step (and again when a fit is resumed)."""

    def warm_up(self, fit: Fit) -> int:
        """How many steps this callback changes the objective for; best states and early stopping wait for it."""
        return 0

    def kl_weight(self, step: int, steps_per_epoch: int) -> float:
        """What to multiply the KL with at a step."""
        return 1.0

    def interval(self, steps_per_epoch: int) -> int:
        """Steps between two calls of `step_end`; 0 for none. A compiled fit takes the steps between them at once."""
        return int(type(self).step_end is not Callback.step_end)

    def step_end(self, fit: Fit) -> None:
        """Called after every step whose number is a multiple of `interval`."""

    def epoch_end(self, fit: Fit) -> None:
        """Called after every epoch, when the epoch's row of the history is complete."""

    def state(self) -> dict[str, Any]:
        """What a resumed fit needs to know, as JSON."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""

    @property
    def watches_epochs(self) -> bool:
        """Whether `epoch_end` does anything; if nobody's does, several epochs may pass before the next look."""
        return type(self).epoch_end is not Callback.epoch_end

    @property
    def steers(self) -> bool:
        """Whether the fit's course depends on it, so that a resumed fit must have it too; a log's does not."""
        cls = type(self)
        return bool(self.course) or cls.kl_weight is not Callback.kl_weight or cls.state is not Callback.state

    @property
    def course(self) -> dict[str, Any]:
        """Settings without which a resumed fit would be another one, as JSON."""
        return {}

    @property
    def described(self) -> str:
        """The callback with its `course`, as a checkpoint holds it."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.course.items())})"


class KLWarmUp(Callback):
    r"""Raise the weight of the KL linearly from ``start_weight`` to 1.

    Args:
        epochs: Over how many epochs.
        start_weight: The weight at the first step.

    Examples:
        >>> warm_up = KLWarmUp(epochs=2)
        >>> [warm_up.kl_weight(step, steps_per_epoch=2) for step in range(5)]
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """

    def __init__(self, epochs: float, start_weight: float = 0.0) -> None:
        if not epochs > 0:
            raise ValueError(f"KLWarmUp's epochs must be positive; got {epochs}.")
        if not 0 <= start_weight <= 1:
            raise ValueError(f"KLWarmUp's start_weight must lie in [0, 1]; got {start_weight}.")
        self.epochs, self.start_weight = epochs, start_weight

    def start(self, fit: Fit) -> None:
        _warn_if_longer(self, self.epochs, fit, "the KL never gets its full weight. Shorten the warm-up")

    def warm_up(self, fit: Fit) -> int:
        return math.ceil(self.epochs * fit.steps_per_epoch)

    @property
    def course(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "start_weight": self.start_weight}

    def kl_weight(self, step: int, steps_per_epoch: int) -> float:
        done = min(1.0, step / (self.epochs * steps_per_epoch))
        return self.start_weight + (1.0 - self.start_weight) * done


class Anneal(Callback):
    r"""Move a number of the program's from one value to another, the temperature of a relaxed distribution for one.

    .. math:: \tau_s = \tau_0 \, (\tau_1 / \tau_0)^{r} \quad\text{or}\quad \tau_0 + r (\tau_1 - \tau_0), \qquad
              r = \min\!\big(1, s / (S - 1)\big)

    at step :math:`s`, with :math:`S` the steps of ``epochs``. The number is a buffer of the program, a scalar that it
    reads as ``self.temperature``; compiled steps take it as an input. Override `value` for another course.

    Args:
        buffer: Its name; of a buffer in a part of the program the last words of the name are enough.
        start: The value at the first step.
        end: The value at the last step of the ``epochs`` and from then on. Best states and early stopping wait for it.
        epochs: Over how many epochs.
        shape: ``"geometric"`` or ``"linear"``.

    Raises:
        ValueError: If a number is out of range, or the shape unknown.

    References:
        Jang, Gu, Poole (2017), Categorical Reparameterization with Gumbel-Softmax.

    Examples:
        >>> anneal = Anneal("temperature", start=1.0, end=0.25, epochs=1)
        >>> [anneal.value(step, steps_per_epoch=3) for step in range(5)]
        [1.0, 0.5, 0.25, 0.25, 0.25]

        A program's own buffer is what moves:

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
        _warn_if_longer(self, self.epochs, fit, f"{self.buffer} never gets to {self.end:g}. Shorten the annealing")

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
    def course(self) -> dict[str, Any]:
        ends = {"start": self.begin, "end": self.end}
        return {"buffer": self.buffer, **ends, "epochs": self.epochs, "shape": self.shape}


def _warn_if_longer(callback: Callback, epochs: float, fit: Fit, consequence: str) -> None:
    if callback.warm_up(fit) > fit.total_steps:
        warnings.warn(
            f"{type(callback).__name__}(epochs={epochs}) is longer than the fit "
            f"({fit.total_steps / fit.steps_per_epoch:g} epochs): {consequence} or raise epochs.",
            UserWarning,
            stacklevel=5,
        )


class EarlyStopping(Callback):
    """End the fit when the ELBO has not improved for a while; waits for any warm-up.

    Args:
        patience: How many epochs without improvement.
        min_delta: What counts as one, in nats per datum.
    """

    def __init__(self, patience: int = 10, min_delta: float = 0.0) -> None:
        if patience < 1:
            raise ValueError(f"EarlyStopping's patience must be at least 1 epoch; got {patience}.")
        self.patience, self.min_delta = patience, min_delta
        self.best, self.waited = -math.inf, 0

    def start(self, fit: Fit) -> None:
        if fit.step == 0:
            self.best, self.waited = -math.inf, 0

    def epoch_end(self, fit: Fit) -> None:
        if fit.step < fit.warm_up_steps:
            return
        epochs = fit.history.epochs
        value = (epochs.get("held_out_elbo") or epochs["elbo"])[-1]
        if value > self.best + self.min_delta:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            fit.stop = True

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def restore(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]


class Checkpoint(Callback):
    """Write checkpoints to a folder, and resume from one that is there.

    A fit that was killed at any moment and is started again with the same arguments ends with the same parameters,
    bit for bit on the CPU, as if it had not been.

    Args:
        path: The folder. It always holds one complete checkpoint, never half a one.
        every: Epochs between two checkpoints; fractions count steps.
        resume: Whether to go on from a checkpoint found there; False starts over.
    """

    def __init__(self, path: str | Path, every: float = 1, *, resume: bool = True) -> None:
        if not every > 0:
            raise ValueError(f"Checkpoint's every must be a positive number of epochs; got {every}.")
        self.path, self.every, self.resume = Path(path), every, resume

    def interval(self, steps_per_epoch: int) -> int:
        return max(1, round(self.every * steps_per_epoch))

    def step_end(self, fit: Fit) -> None:
        # The end of an epoch is written by epoch_end, when its row of the history is there.
        if fit.step % self.interval(fit.steps_per_epoch) == 0 and fit.step % fit.steps_per_epoch:
            fit.save_checkpoint(self.path)

    def epoch_end(self, fit: Fit) -> None:
        if fit.step % self.interval(fit.steps_per_epoch) == 0 or fit.stop or fit.step >= fit.total_steps:
            fit.save_checkpoint(self.path)


class Log(Callback):
    """Print one line every few epochs.

    Args:
        every: Epochs between two lines.
        file: Where to, standard output by default.
    """

    def __init__(self, every: int = 1, file: TextIO | None = None) -> None:
        if every < 1:
            raise ValueError(f"Log's every must be at least 1 epoch; got {every}.")
        self.every, self.file = every, file

    def epoch_end(self, fit: Fit) -> None:
        if fit.epoch % self.every == 0:
            last = {name: values[-1] for name, values in fit.history.epochs.items()}
            text = "  ".join(f"{name} {value:.4g}" for name, value in last.items())
            print(f"epoch {fit.epoch}  {text}", file=self.file or sys.stdout)
