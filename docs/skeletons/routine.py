"""Maximum a posteriori by full-batch gradient ascent. A skeleton to copy to ``inference/<name>.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepprob.engine.machine import pick_device
from deepprob.engine.packing import global_norm
from deepprob.engine.random import RandomStream
from deepprob.errors import whole
from deepprob.fitting.buckets import LengthBuckets
from deepprob.fitting.callbacks import Anneal, Callback, callback_list
from deepprob.fitting.course import Course, Length
from deepprob.fitting.gradients import loss_and_gradients
from deepprob.fitting.objectives import ELBO, Terms
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.run import RunningFit
from deepprob.fitting.settings import FitSettings
from deepprob.fitting.state import Knobs, State
from deepprob.fitting.steppers import EagerStepper
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch, num_rows
from deepprob.programs.parameters import buffer_named
from deepprob.programs.program import Program

__all__ = ["QUICK", "Knobs", "State", "init", "map_estimate", "step"]

QUICK: dict[str, Any] = {"steps": 3}  # settings of the contract tests: all that the routine does, in a moment
_ADAM = Optimizer("adam", schedule="cosine")


def init(instance: ProgramInstance, learning_rate: float) -> State:
    """The state before the first step.

    Args:
        instance: The routine's copy of a program; steps update its parameters in place.
        learning_rate: The peak step size.

    Raises:
        ValueError: If the program has no parameter.
    """
    return State.start(instance, _ADAM, learning_rate)


def step(state: State, data: Batch, rows: Tensor, knobs: Knobs) -> tuple[State, Terms]:
    """One gradient step on all rows, inside ``instance.running()``.

    A step whose loss or gradient is not finite is skipped: the parameters stay as they are.

    Args:
        state: The state that the last step left.
        data: All rows, on the device.
        rows: Their indices, shape ``(N,)``.
        knobs: Learning rate, weight of the KL, and values of annealed buffers.

    Returns:
        The next state (the same object, updated) and detached terms; ``skipped`` is 1 for a skipped step.
    """
    state.anneal(knobs.annealed)
    params = list(state.params.values())
    loss, terms, gradients = loss_and_gradients(state.instance, ELBO(), params, data, rows, knobs.kl_weight)
    with torch.no_grad():
        packed = state.packing.pack(gradients)
        norm = global_norm(packed)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        state.update(packed, finite, knobs.learning_rate, _ADAM)
    return state, terms | {"gradient_norm": norm, "skipped": (~finite).to(norm.dtype)}


def map_estimate(
    program: Program,
    data: Any,
    *,
    steps: int = 1000,
    learning_rate: float | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool | str = "auto",
    callbacks: Sequence[Callback] = (),
) -> Posterior:
    r"""Find the mode of the latent sites and the best parameters, by gradient ascent on all rows.

    .. math:: \max_{z, \theta} \; \log p_\theta(x, z)

    ``svi(..., guide="map")`` has the same maximum and more settings; this file shows the parts of a routine.

    Args:
        program: A `Program`.
        data: The model's arguments.
        steps: Gradient steps.
        learning_rate: The peak step size; None for the program's own.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        seed: Seed of weights and starting values.
        progress: Whether to show progress, as in `svi`.
        callbacks: See `deepprob.fitting.callbacks`.

    Returns:
        A posterior whose guide is a point mass at the mode.

    Raises:
        TypeError: If ``program`` is not a `Program`.
        ValueError: If data, program or settings do not fit together; before the first step.
        DivergenceError: If too many steps in a row were not finite; it carries the last good posterior.

    References:
        Gelman et al. (2013), Bayesian Data Analysis, chapter 13.

    Examples:
        The mode of a conjugate normal model is the posterior's mean, 2/3 of the mean of the data:

        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> posterior = map_estimate(Program.of(model), torch.tensor([2.0, 4.0]), steps=300, learning_rate=0.1)
        >>> round(float(posterior.sample(draws=1)["loc"]), 2)
        2.0
    """
    if not isinstance(program, Program):
        raise TypeError(f"map_estimate expects a Program; got {type(program).__name__}. Make one: Program.of(model).")
    steps, seed, where = whole("steps", steps), whole("seed", seed, least=0), pick_device(device)
    batch, noise, callbacks = program.accept(data), RandomStream(seed, where), callback_list(callbacks)
    with noise.drawing():
        instance = ProgramInstance(program, batch, num_rows(batch), guide="map", device=where, weights="auto")
    rate = learning_rate or program.learning_rate
    state = init(instance, rate)
    state.annealed = [buffer_named(instance.program, c.buffer) for c in callbacks if isinstance(c, Anneal)]

    def take(state: State, data: Batch, rows: Tensor, knobs: Knobs) -> Terms:
        return step(state, data, rows, knobs)[1]

    buckets = LengthBuckets(tuple(x.to(where) for x in batch))
    config = {"routine": "map_estimate", "steps": steps, "learning_rate": rate, "device": str(where)}
    course = Course(_ADAM, rate, Length.of(None, steps, steps_per_epoch=1))
    settings = FitSettings(num_rows(batch), course, seed, callbacks, config)
    # Epochs, callbacks, checkpoints, Ctrl-C and the best state are the running fit's.
    return RunningFit(state, EagerStepper(take, buckets), buckets, None, noise, settings).run(progress)
