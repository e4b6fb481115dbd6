"""Stochastic variational inference: fit a program's guide and networks by gradient steps on a bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from deepprob.engine.machine import pick_device, threads_for
from deepprob.engine.packing import Packing, global_norm
from deepprob.engine.random import RandomStream
from deepprob.errors import whole
from deepprob.fitting.callbacks import Anneal, Callback
from deepprob.fitting.compiling import CompileTask, choose_stepper, compile_score
from deepprob.fitting.cost_model import views_of
from deepprob.fitting.gradients import loss_and_gradients
from deepprob.fitting.held_out import HeldOut
from deepprob.fitting.objectives import Objective, Terms, objective_named
from deepprob.fitting.optimizers import Optimizer, optimizer_named
from deepprob.fitting.run import FitSettings, RunningFit
from deepprob.fitting.state import Knobs, State
from deepprob.fitting.steppers import EagerStepper
from deepprob.fitting.update_rules import first_carry
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.guides import GuideSpec
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch, num_rows
from deepprob.programs.program import Program

_DEFAULT_BATCH = 128
_EPOCHS = 100

QUICK = {"epochs": 3, "batch_size": 8}
"""Settings that make a fit short, for the tests of what all routines promise."""

__all__ = ["QUICK", "Knobs", "State", "init", "step", "svi"]


def init(instance: ProgramInstance, optimizer: Optimizer, learning_rate: float) -> State:
    """The state before the first step.

    Args:
        instance: The program to fit; the state takes it over.
        optimizer: How to minimise.
        learning_rate: The peak step size.

    Raises:
        ValueError: If there is nothing to train.
    """
    params = instance.parameters()
    if not params:
        raise ValueError("nothing to train: neither the model nor the guide has a parameter. Add one, or skip the fit.")
    packing = Packing(list(params.values()))
    packed = packing.pack([p.detach().clone() for p in params.values()])
    for p, view in zip(params.values(), packing.unpack(packed), strict=True):
        p.data = view
    own = optimizer.rule
    carry = first_carry(
        packed,
        moments=own[1] if own else 0,
        averaged=optimizer.average is not None,
        accumulating=optimizer.accumulate > 1,
    )
    foreign = None if own else optimizer.build(params.values(), learning_rate)
    norms = (m for m in instance.program.modules() if isinstance(m, _NormBase) and m.track_running_stats)
    carry["buffers"] = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    return State(instance, params, packing, carry, foreign)


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
        knobs: Learning rate, weights, and values of the state's annealed buffers.
        objective: What is maximised.
        optimizer: How to minimise.

    Returns:
        The next state (the same object, updated) and detached terms: the objective's, among them ``elbo``;
        ``gradient_norm``; and ``skipped``, 1 where the step was not applied.
    """
    with state.instance.running(), noise.drawing():
        return _step(state, data, rows, knobs, objective, optimizer)


def _step(
    state: State, data: Batch, rows: Tensor, knobs: Knobs, objective: Objective, optimizer: Optimizer
) -> tuple[State, Terms]:
    """`step` inside a running program, without entering and leaving it every time."""
    state.anneal(knobs.annealed)
    batch = data if len(rows) == num_rows(data) else tuple(x.index_select(0, rows) for x in data)
    before = [buffer.clone() for buffer in state.carry["buffers"]]
    params = list(state.params.values())
    loss, terms, gradients = loss_and_gradients(state.instance, objective, params, batch, rows, knobs.kl_weight)
    with torch.no_grad():
        packed = state.packing.pack(gradients)
        norm = global_norm(packed)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        state.update(packed, finite, knobs.learning_rate, optimizer)
        for buffer, value in zip(state.carry["buffers"], before, strict=True):
            buffer.copy_(torch.where(finite, buffer, value))
    return state, terms | {"gradient_norm": norm, "skipped": (~finite).to(norm.dtype)}


def svi(
    program: Program,
    data: Any,
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

    The routine works on its own copy of the program; the caller's is never changed, nor is Pyro's global store or the
    caller's random state. Two fits with one seed give equal numbers.

    Args:
        program: A `Program`; an existing Pyro program becomes one by `Program.of`.
        data: The model's arguments: tensors, arrays, frames, a ``Dataset``, a split of a data set, or None.
        epochs: Passes over the data, 100 by default. A fit without data takes one step an epoch.
        steps: Gradient steps, in the place of ``epochs``.
        batch_size: Rows per step; None for all of them; ``"auto"`` for 128, or all where the program has no data plate.
            Sequences of unequal length go into batches of similar ones, if the program names their ``lengths``.
        objective: ``"elbo"``, or ``"iwae"``, the importance-weighted bound; or an object with settings, `ELBO` or
            `IWAE`; see `deepprob.fitting.objectives`.
        guide: None for the program's own; ``"normal"``, ``"multivariate_normal"``, ``"low_rank"``, ``"flow"``,
            ``"laplace"``, ``"map"``; an ``AutoGuide`` class; or a callable.
        optimizer: A name, a class of ``torch.optim``, or an `Optimizer` that carries learning rate, schedule, clipping
            and averaging. Adam with a cosine schedule by default.
        held_out: Data to score after every epoch; the posterior then holds the best epoch's parameters.
        weights: ``"fresh"`` draws new weights under ``seed``, except in modules marked by ``pretrained``; ``"keep"``
            starts from the program's; ``"auto"`` is ``"fresh"``.
        compile: Whether to trace the step once and run it as native code. ``"auto"`` does in fits with enough steps to
            pay for it, decided by their number and by the size of the step. Compiled and eager steps draw different
            noise from one seed, and may cut sequences of unequal length at other lengths.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``.
        seed: Of weights, shuffle and noise.
        progress: Whether to show a bar; ``"auto"`` does in a terminal or a notebook.
        callbacks: KL warm-up, annealing, early stopping, checkpoints, logging: see `deepprob.fitting.callbacks`.

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
    _check_choices(program, compile, weights)
    compile = compile if isinstance(compile, str) else bool(compile)
    chosen, maximised, seed = optimizer_named(optimizer), objective_named(objective), whole("seed", seed, least=0)
    callbacks = _callbacks(callbacks)
    where = pick_device(device)
    batch, held = _batches(program, data, held_out)
    size = _batch_size(batch_size, num_rows(batch), program)
    per_epoch = math.ceil(num_rows(batch) / size)
    total = _total_steps(epochs, steps, per_epoch)
    noise = RandomStream(seed, where)
    with noise.drawing():
        instance = _own(program, batch, guide, where, size, weights != "keep")
    rows = tuple(x.to(where) for x in batch)
    scored = None if held is None else HeldOut(instance, _conform(instance, held))
    learning_rate = chosen.learning_rate or program.learning_rate
    state = init(instance, chosen, learning_rate)
    state.annealed = _annealed(instance, callbacks)

    def take(state: State, data: Batch, indices: Tensor, knobs: Knobs) -> Terms:
        return _step(state, data, indices, knobs, maximised, chosen)[1]

    eager = EagerStepper(take, views_of(compile, state, rows, batch_size=size, steps=total))
    task = CompileTask(state, maximised, chosen, eager.views, size, announce=progress is not False)
    with threads_for(state.work(size)):  # compiled code is for so many threads as there were
        stepper = choose_stepper(compile, eager, task, steps=total, noise=noise)
        if scored is not None and stepper is not eager:
            compile_score(scored, total // per_epoch, always=compile is True)
    config = {
        "routine": "svi",
        "epochs": None if steps is not None else total // per_epoch,
        "steps": total,
        "batch_size": size,
        "objective": maximised.describe(),
        "guide": instance.guide_name or "own",
        "optimizer": chosen.describe() | {"learning_rate": learning_rate},
        "weights": weights,
        "compiled": stepper.compiled_graphs > 0,
        "lengths": eager.views.lengths,
        "device": str(where),
    }
    settings = FitSettings(size, total, chosen, learning_rate, seed, callbacks, config)
    return RunningFit(state, stepper, eager.views, scored, noise, settings).run(progress)


def _check_choices(program: Any, compile: Any, weights: Any) -> None:
    if not isinstance(program, Program):
        raise TypeError(
            f"svi fits a Program; got {type(program).__name__}. Make one of a Pyro model: Program.of(model, guide)."
        )
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile must be True, False or 'auto'; got {compile!r}.")
    if weights not in ("auto", "fresh", "keep"):
        raise ValueError(f"weights must be 'auto', 'fresh' or 'keep'; got {weights!r}.")


def _batches(program: Program, data: Any, held_out: Any) -> tuple[Batch, Batch | None]:
    """The program's arguments, for the fit and for the held-out score."""
    batch = _complete(program, program.accept(data), "data")
    if held_out is None:
        return batch, None
    return batch, _complete(program, program.accept(held_out, what="held_out"), "held_out")


def _total_steps(epochs: int | None, steps: int | None, steps_per_epoch: int) -> int:
    """Steps of the whole fit."""
    if steps is None:
        return whole("epochs", _EPOCHS if epochs is None else epochs) * steps_per_epoch
    if epochs is not None:
        raise ValueError(f"give epochs or steps, not both; got epochs={epochs!r} and steps={steps!r}. Leave one out.")
    return whole("steps", steps)


def _own(
    program: Program, batch: Batch, guide: GuideSpec, device: torch.device, size: int, fresh: bool
) -> ProgramInstance:
    num_data = num_rows(batch)
    full = size == num_data
    instance = ProgramInstance(program, batch, num_data, guide=guide, device=device, full_batch=full, fresh=fresh)
    if not full and type(program).validate is Program.validate:
        instance.check_data(batch, size)
    return instance


def _conform(instance: ProgramInstance, held_out: Batch) -> Batch:
    """Held-out data compared with the data, on the device."""
    if len(held_out) != len(instance.inputs):
        names = ", ".join(spec.name for spec in instance.inputs)
        raise ValueError(
            f"held_out must have the {len(instance.inputs)} parts of data ({names}); "
            f"got {len(held_out)}. Give the observed ones too: it is scored."
        )
    pairs = zip(instance.inputs, held_out, strict=True)
    return tuple(spec.conform(x, instance.program.variable_length).to(instance.device) for spec, x in pairs)


def _callbacks(callbacks: Any) -> list[Callback]:
    if not isinstance(callbacks, Sequence) or not all(isinstance(c, Callback) for c in callbacks):
        came = callbacks if not isinstance(callbacks, Sequence) else callbacks[0]
        raise TypeError(
            f"callbacks must be a list of Callback objects; got {type(came).__name__}. Write callbacks=[KLWarmUp(5)]."
        )
    return list(callbacks)


def _annealed(instance: ProgramInstance, callbacks: Sequence[Callback]) -> list[Tensor]:
    """The buffers that callbacks move."""
    names = [c.buffer for c in callbacks if isinstance(c, Anneal)]
    buffers = [instance.number(name) for name in names]
    if len({id(x) for x in buffers}) < len(buffers):
        raise ValueError(f"several callbacks anneal one buffer ({', '.join(names)}). Give each a buffer of its own.")
    return buffers


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
    size = whole("batch_size", batch_size)
    if size < num_data and not program.data_name:
        raise ValueError(
            f"batch_size={size} is smaller than the data ({num_data} rows), but the program names no data plate, so "
            "its KL would be weighed wrongly. Name it: Program.of(model, guide, data_plate='data'); or batch_size=None."
        )
    return min(size, num_data)
