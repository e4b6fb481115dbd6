"""Stochastic variational inference: fit a program's guide and networks by gradient steps on a bound.

From top to bottom: the state before the first step (`init`), one gradient step on a `State` (`step`), the routine
(`svi`), and its helpers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepprob.engine.machine import pick_device, threads_for
from deepprob.engine.packing import global_norm
from deepprob.engine.random import RandomStream
from deepprob.engine.trace import restore
from deepprob.errors import shown, whole
from deepprob.fitting.callbacks import Anneal, Callback
from deepprob.fitting.compiling import CompileTask
from deepprob.fitting.cost_model import length_buckets
from deepprob.fitting.gradients import loss_and_gradients
from deepprob.fitting.held_out import HeldOut
from deepprob.fitting.objectives import Objective, Terms, check_objective, description, objective_named, objective_on
from deepprob.fitting.optimizers import Optimizer, optimizer_named
from deepprob.fitting.run import FitSettings, RunningFit
from deepprob.fitting.state import Knobs, State, gather_rows
from deepprob.fitting.steppers import EagerStepper
from deepprob.fitting.tiers import choose_score, choose_stepper, saved_plan
from deepprob.fitting.update_rules import chosen
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.arguments import Arguments
from deepprob.programs.by_row import cut_by_row
from deepprob.programs.guides import GuideSpec, check_start
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch, num_rows
from deepprob.programs.parameters import buffer_named, warn_of_late
from deepprob.programs.program import Program

_DEFAULT_BATCH_SIZE = 128
_DEFAULT_EPOCHS = 100

QUICK = {"epochs": 3, "batch_size": 8}
"""Settings of a short fit, for the contract tests of all routines."""

__all__ = ["QUICK", "Knobs", "State", "init", "step", "svi"]


def init(instance: ProgramInstance, optimizer: Optimizer, learning_rate: float) -> State:
    """The state before the first step.

    Args:
        instance: The program to fit; steps update its parameters in place.
        optimizer: The optimizer.
        learning_rate: The peak step size.

    Raises:
        ValueError: If neither model nor guide has a parameter.
    """
    return State.start(instance, optimizer, learning_rate)


def step(
    state: State,
    data: Batch,
    rows: Tensor,
    noise: RandomStream,
    knobs: Knobs,
    objective: Objective,
    optimizer: Optimizer,
) -> tuple[State, Terms]:
    """Take one gradient step.

    A step whose loss or gradient is not finite is skipped: it changes neither parameters nor buffers.

    Args:
        state: The state before the step.
        data: All rows, on the device.
        rows: Indices of the batch's rows, shape ``(B,)``.
        noise: The source of random numbers.
        knobs: Learning rate, weight of the KL, and values of the state's annealed buffers.
        objective: The objective to maximize.
        optimizer: The optimizer.

    Returns:
        The state (the same object, updated) and detached terms: those of the objective, among them ``elbo``;
        ``gradient_norm``; and ``skipped``, which is 1 for a skipped step.
    """
    with state.instance.running(), noise.drawing():
        return _step_while_running(state, data, rows, knobs, objective, optimizer)


def svi(
    program: Program,
    data: Any = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | str | None = "auto",
    objective: str | Objective = "elbo",
    guide: GuideSpec = None,
    optimizer: str | Optimizer | type[torch.optim.Optimizer] | None = None,
    held_out: Any = None,
    weights: str = "auto",
    compile: bool | str = "auto",
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool | str = "auto",
    callbacks: Sequence[Callback] = (),
) -> Posterior:
    r"""Fit a program by stochastic variational inference.

    .. math:: \max_{\theta, \phi} \; \mathbb E_{q_\phi(z)} [\log p_\theta(x, z) - \log q_\phi(z)]

    The routine works on its own copy of the program. The caller's program, Pyro's global store and the caller's random
    state do not change. Two fits with the same seed give equal numbers.

    Args:
        program: A `Program`; wrap an existing Pyro model and guide with `Program.of`.
        data: The model's arguments: tensors, arrays, frames, a ``Dataset``, a split of a data set, or None for a
            program that holds its data.
        epochs: Passes over the data, 100 by default.
        steps: Gradient steps, in place of ``epochs``. The last epoch may have fewer steps than the others.
        batch_size: Rows per step; None for all rows; ``"auto"`` for 128, or all rows if the program has no data plate.
            The indices of the data plate select the rows of data that the program holds.
            If the program defines ``lengths``, sequences of similar length share a batch.
        objective: ``"elbo"``; ``"iwae"``, the importance-weighted bound; or an object with settings, such as `ELBO` or
            `IWAE`. See `deepprob.fitting.objectives`.
        guide: None for the program's own guide; ``"normal"``, ``"multivariate_normal"``, ``"low_rank"``, ``"flow"``,
            ``"laplace"``, ``"map"``; an ``AutoGuide`` class; or a callable.
        optimizer: A name, a class of ``torch.optim``, or an `Optimizer` with learning rate, schedule, clipping and
            averaging. Adam with a cosine schedule by default.
        held_out: Data to score after every epoch; the posterior then holds the parameters of the best epoch.
        weights: ``"auto"`` draws new weights under ``seed`` for the networks that a model of deepprob built, and keeps
            those that you made; ``"fresh"`` draws all anew, ``"keep"`` none. Modules marked by ``pretrained`` stay. A
            guide by name starts random weights there, too.
        compile: ``"auto"`` follows a plan: eager steps, the traced graph or native code, as saves time over the whole
            fit, estimated from the number of steps and the size of a step. True compiles before the first step, False
            never compiles. All take the same noise from the same seed, and may use different length buckets. The plan
            is in the posterior's ``config``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``.
        seed: Seed of weights, shuffle and noise.
        progress: Whether to show a progress bar; ``"auto"`` shows it in a terminal or a notebook.
        callbacks: KL warm-up, annealing, early stopping, checkpoints, logging: see `deepprob.fitting.callbacks`.

    Returns:
        The posterior. After Ctrl-C it holds the best state so far.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If data, program and settings do not fit together; raised before the first step.
        DivergenceError: If too many steps in a row are skipped; it carries the last good posterior.

    References:
        Hoffman, Blei, Wang, Paisley (2013), Stochastic Variational Inference.

    Examples:
        The posterior of this conjugate model is N(2, 1/3):

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
    _check_choices(program, compile, weights)
    compile = compile if isinstance(compile, str) else bool(compile)
    factory, device, seed = optimizer_named(optimizer), pick_device(device), whole("seed", seed, least=0)
    bound, callbacks = objective_on(objective_named(objective), device), _callback_list(callbacks)
    described, batch = description(bound), _accepted(program, data, batch_size, device)
    noise = RandomStream(seed, device)
    with noise.drawing():
        instance = _instance(program, batch, guide, device, batch_size, weights)
    size = _batch_size(batch_size, instance.num_data, program)  # of the data that the program holds, if it takes none
    per_epoch, total = _num_steps(epochs, steps, instance.num_data, size)
    batch = tuple(x.to(device) for x in batch)
    score = None if held_out is None else HeldOut(instance, _checked_held_out(instance, held_out))
    learning_rate = factory.learning_rate or program.learning_rate
    state = init(instance, factory, learning_rate)
    state.annealed = _annealed_buffers(instance, callbacks)
    check_objective(bound, instance, tuple(x[:size] for x in batch))

    def eager_step(state: State, data: Batch, rows: Tensor, knobs: Knobs) -> Terms:
        return _step_while_running(state, data, rows, knobs, bound, factory)[1]

    buckets = length_buckets(compile, state, batch, batch_size=size, steps=total)
    eager = EagerStepper(eager_step, buckets)
    task = CompileTask(state, bound, factory, buckets, size, announce=progress is not False)
    with threads_for(state.multiplications(size)):  # compiled code is specific to the number of threads
        plan = saved_plan(callbacks)
        stepper = choose_stepper(compile, eager, task, steps=total, noise=noise, plan=plan)
        if score is not None:
            choose_score(score, stepper, compile, times=math.ceil(total / per_epoch), resumed=plan is not None)
    config = {
        "routine": "svi",
        "epochs": None if steps is not None else total // per_epoch,
        "steps": total,
        "batch_size": size,
        "objective": described,
        "guide": instance.guide_name or "own",
        "optimizer": factory.describe() | {"learning_rate": learning_rate},
        "weights": weights,
        "lengths": buckets.lengths,
        "device": str(device),
    }
    settings = FitSettings(size, total, factory, learning_rate, seed, callbacks, config)
    return RunningFit(state, stepper, buckets, score, noise, settings).run(progress)


def _step_while_running(
    state: State, data: Batch, rows: Tensor, knobs: Knobs, objective: Objective, optimizer: Optimizer
) -> tuple[State, Terms]:
    """`step` inside a running program, whose context is entered once for many steps."""
    state.anneal(knobs.annealed)
    batch = gather_rows(data, rows)
    before = [buffer.clone() for buffer in state.carry["buffers"]]

    def run() -> tuple[Tensor, Terms, list[Tensor]]:
        params = list(state.params.values())
        return loss_and_gradients(state.instance, objective, params, batch, rows, knobs.kl_weight)

    loss, terms, gradients = run()
    while late := state.join():
        warn_of_late(late)
        restore(state.carry["buffers"], before)
        loss, terms, gradients = run()
    with torch.no_grad():
        packed = state.packing.pack(gradients)
        norm = global_norm(packed)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        state.update(packed, finite, knobs.learning_rate, optimizer)
        for buffer, value in zip(state.carry["buffers"], before, strict=True):
            buffer.copy_(chosen(finite, buffer, value))
    return state, terms | {"gradient_norm": norm, "skipped": (~finite).to(norm.dtype)}


def _check_choices(program: Any, compile: Any, weights: Any) -> None:
    """Raise if the program or one of the named choices is not valid."""
    if not isinstance(program, Program):
        raise TypeError(
            f"svi expects a Program; got {type(program).__name__}. Wrap a Pyro model: Program.of(model, guide)."
        )
    # The shape comes first, because comparing a tensor of several elements has no truth value.
    if getattr(compile, "shape", ()) != () or compile not in (True, False, "auto"):
        raise ValueError(f"compile must be True, False or 'auto'; got {shown(compile)}.")
    if weights not in ("auto", "fresh", "keep"):
        raise ValueError(f"weights must be 'auto', 'fresh' or 'keep'; got {shown(weights)}.")


def _accepted(program: Program, data: Any, batch_size: int | str | None, device: torch.device) -> Batch:
    """The arguments with rows."""
    batch = _checked_arguments(program, program.accept(data), "data")
    return cut_by_row(program, batch, _batch_size(batch_size, num_rows(batch), program), device)


def _num_steps(epochs: int | None, steps: int | None, num_data: int, batch_size: int) -> tuple[int, int]:
    """Steps in an epoch, and steps of the whole fit."""
    per_epoch = math.ceil(num_data / batch_size)
    if steps is None:
        return per_epoch, per_epoch * whole("epochs", _DEFAULT_EPOCHS if epochs is None else epochs)
    if epochs is not None:
        raise ValueError(f"give epochs or steps, not both; got epochs={epochs!r} and steps={steps!r}. Leave one out.")
    return per_epoch, whole("steps", steps)


def _instance(
    program: Program, batch: Batch, guide: GuideSpec, device: torch.device, batch_size: int | str | None, weights: str
) -> ProgramInstance:
    """The routine's own copy of the program, checked against the data."""
    num_data = num_rows(batch)
    full = not batch or _batch_size(batch_size, num_data, program) == num_data
    instance = ProgramInstance(program, batch, num_data, guide=guide, device=device, full_batch=full, weights=weights)
    check_start(instance.program, instance.structure, weights)
    size = _batch_size(batch_size, instance.num_data, program)
    if isinstance(batch_size, int) and not (batch or instance.structure.rows):
        raise ValueError(
            f"batch_size={batch_size} needs rows, but no plate of the program holds the rows of its data at once. Put "
            "the observed sites into one, with pyro.plate('data', N) as rows: ... obs=data[rows], and name it: "
            "Program.of(..., data_plate='data'), or use batch_size=None."
        )
    if size < instance.num_data and (not batch or type(program).validate is Program.validate):
        instance.check_data(batch, size)
    return instance


def _checked_held_out(instance: ProgramInstance, data: Any) -> Batch:
    """Held-out data on the device, checked against the shapes of the data."""
    program = instance.program
    held_out = _checked_arguments(program, program.accept(data, what="held_out"), "held_out")
    if isinstance(held_out, Arguments) and {*held_out.call.names} == {spec.name for spec in instance.inputs}:
        by_name = dict(zip(held_out.call.names, held_out, strict=True))
        held_out = tuple(by_name[spec.name] for spec in instance.inputs)
    if len(held_out) != len(instance.inputs):
        names = ", ".join(spec.name for spec in instance.inputs)
        raise ValueError(
            f"held_out must have the {len(instance.inputs)} parts of data ({names}); "
            f"got {len(held_out)}. Include the observed values, which the score needs."
        )
    pairs = zip(instance.inputs, held_out, strict=True)
    return tuple(spec.conform(x, instance.program.variable_length).to(instance.device) for spec, x in pairs)


def _callback_list(callbacks: Any) -> list[Callback]:
    """The callbacks as a list, checked by type."""
    if not isinstance(callbacks, Sequence) or not all(isinstance(c, Callback) for c in callbacks):
        came = callbacks if not isinstance(callbacks, Sequence) else callbacks[0]
        raise TypeError(
            f"callbacks must be a list of Callback objects; got {type(came).__name__}. Write callbacks=[KLWarmUp(5)]."
        )
    return list(callbacks)


def _annealed_buffers(instance: ProgramInstance, callbacks: Sequence[Callback]) -> list[Tensor]:
    """The buffer that each `Anneal` callback moves."""
    names = [c.buffer for c in callbacks if isinstance(c, Anneal)]
    buffers = [buffer_named(instance.program, name) for name in names]
    if len({id(x) for x in buffers}) < len(buffers):
        raise ValueError(f"several callbacks anneal the same buffer ({', '.join(names)}). Keep one of them.")
    return buffers


def _checked_arguments(program: Program, batch: Batch, what: str) -> Batch:
    """The arguments, if none that the model requires is missing."""
    if lacking := program.missing_arguments(batch):
        raise ValueError(
            f"the model takes {', '.join(program.argument_names)}; {what} lacks {', '.join(lacking)}. "
            "Pass a tuple in this order, observed values included."
        )
    return batch


def _batch_size(batch_size: int | str | None, num_data: int, program: Program) -> int:
    """The number of rows per step."""
    if batch_size is None:
        return num_data
    if batch_size == "auto":
        return min(_DEFAULT_BATCH_SIZE, num_data) if program.data_name else num_data
    size = whole("batch_size", batch_size)
    if size < num_data and not program.data_name:
        raise ValueError(
            f"batch_size={size} is smaller than the data ({num_data} rows), but the program names no data plate, so "
            "its KL would be weighted wrongly. Write Program.of(model, guide, data_plate='data') or batch_size=None."
        )
    return min(size, num_data)
