"""Stochastic variational inference: fit a program's guide and networks by gradient steps on a bound.

From top to bottom: the state before the first step (`init`), one gradient step (`step`), the routine
(`svi`), and its continuation (`extend`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepprob.fitting.callbacks import Callback, Fit, callback_list
from deepprob.fitting.extending import objective_after, optimizer_after, start_as, training_of
from deepprob.fitting.gradient_step import gradient_step
from deepprob.fitting.intake import checked_rows, rows_of_a_step
from deepprob.fitting.loop_state import LoopState
from deepprob.fitting.objectives import Objective, Terms
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.starting import running_fit, start_fit
from deepprob.fitting.starts import checked_restarts, other_starts
from deepprob.fitting.state import Knobs, State
from deepprob.fitting.tiers import compile_choice
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.guides import GuideSpec
from deepprob.programs.program import Program

QUICK = {"epochs": 3, "batch_size": 8}
"""Settings of a short fit, for the contract tests of all routines."""

__all__ = ["QUICK", "Knobs", "LoopState", "State", "extend", "init", "step", "svi"]


def init(
    program: Program,
    data: Any = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | str | None = "auto",
    objective: str | Objective = "elbo",
    guide: GuideSpec = None,
    optimizer: str | Optimizer | type[torch.optim.Optimizer] | None = None,
    weights: str = "auto",
    device: str | torch.device = "auto",
    seed: int = 0,
) -> LoopState:
    """The state before the first step. The arguments are those of `svi`.

    The state holds a copy of the program, which the steps change, and everything else that they need. A loop by hand
    takes as many steps as it likes, whatever ``epochs`` and ``steps`` say.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If data, program and settings do not fit together.
    """
    return start_fit(
        program,
        data,
        routine="svi",
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        objective=objective,
        guide=guide,
        optimizer=optimizer,
        weights=weights,
        device=device,
        seed=seed,
    )


def step(
    state: LoopState,
    rows: Tensor | Sequence[int] | None = None,
    *,
    learning_rate: float | None = None,
    kl_weight: float = 1.0,
) -> tuple[LoopState, Terms]:
    """Take one gradient step.

    A step whose loss or gradient is not finite is skipped: it changes neither the parameters nor the statistics of a
    batch norm.

    Args:
        state: The state before the step.
        rows: Indices of the batch's rows, shape ``(B,)``; by default the next rows of a shuffled pass over the data.
        learning_rate: The step size; by default that of the optimizer or the program, whose schedule a loop by hand
            does not follow.
        kl_weight: Weight of the KL.

    Returns:
        The state (the same object, updated) and detached terms: those of the objective, among them ``elbo``;
        ``gradient_norm``; and ``skipped``, which is 1 for a skipped step.

    Raises:
        TypeError: If the rows are not whole numbers.
        ValueError: If a row is not in the data, or there are fewer rows than data, and the program names no data plate.
    """
    with torch.inference_mode(False):
        instance = state.instance
        if rows is None:
            places = state.next_rows().to(instance.device)
        else:
            rows = checked_rows(rows, instance.num_data, instance.device)
            rows_of_a_step(len(rows), instance.num_data, instance.program)
            places = rows
        data = state.rows_at(places, chosen=rows is not None)
        places = torch.arange(len(places), device=instance.device) if state.numbered else places
        knobs = Knobs(state.learning_rate if learning_rate is None else learning_rate, kl_weight)
        instance.program.train()
        with instance.running(), state.noise.drawing():
            terms = gradient_step(state, data, places, knobs, state.objective, state.factory)
        return state, terms


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
    callbacks: Sequence[Callback | Callable[[Fit], object]] = (),
    restarts: int = 1,
) -> Posterior:
    r"""Fit a program by stochastic variational inference.

    .. math:: \max_{\theta, \phi} \; \mathbb E_{q_\phi(z)} [\log p_\theta(x, z) - \log q_\phi(z)]

    The routine works on its own copy of the program. The caller's program, Pyro's global store and the caller's random
    state do not change. Two fits with the same seed give equal numbers.

    Args:
        program: A `Program`; wrap an existing Pyro model and guide with `Program.of`.
        data: The model's arguments: tensors, arrays, frames, a split of a data set, or None for a program that holds
            its data; or rows that are read while the fit runs: a ``DataLoader``, whose batches are kept, a ``Dataset``,
            memory-mapped arrays, sparse matrices. See ``docs/loaders.md``.
        epochs: Passes over the data. Without ``epochs`` and ``steps`` the fit ends when its bound has levelled: when it
            changes by less than 0.01 nats for every latent number (at least 0.1 nats in all), at an error rate of 5 %.
            Its budget is 100 passes over the data, at least 10 000 and at most 100 000 steps. See
            `deepprob.fitting.levelling`.
        steps: Gradient steps, in place of ``epochs``. The last epoch may have fewer steps than the others.
        batch_size: Rows per step; None for all rows; ``"auto"`` for 128, or all rows if the program has no data plate.
            The data plate's indices select rows that the program holds. Sequences of similar ``lengths`` share a batch.
        objective: ``"elbo"``; ``"iwae"``, the importance-weighted bound; or an object with settings, such as `ELBO` or
            `IWAE`. See `deepprob.fitting.objectives`.
        guide: None for the program's own guide; ``"normal"``, ``"multivariate_normal"``, ``"low_rank"``, ``"flow"``,
            ``"laplace"``, ``"map"``; an ``AutoGuide`` class; or a callable. Up to 1000 latent numbers, the first three
            start near the posterior, and their steps are in its units.
        optimizer: A name, a class of ``torch.optim``, or an `Optimizer` with learning rate, schedule, clipping and
            averaging. Adam with a cosine schedule by default. A fit without a fixed length follows the schedule once
            its bound has levelled.
        held_out: Data to score after every epoch. If all latents are local the score is the ELBO, and the posterior
            holds the parameters of the best epoch. With global latents it is the expected log-likelihood, which lacks
            their KL, and the posterior holds the last parameters.
        weights: ``"auto"`` draws new weights under ``seed`` for the networks that a model of deepprob built, and keeps
            those that you made; ``"fresh"`` draws all anew, ``"keep"`` none. Modules marked by ``pretrained`` stay. A
            guide by name starts random weights there, too.
        compile: ``"auto"`` follows a plan: eager steps, the traced graph or native code, as saves time over the whole
            fit, estimated from the number of steps and the size of a step. True compiles before the first step, False
            never compiles. All take the same noise from the same seed, if the program calls torch's random functions as
            attributes (``torch.randn_like``), and may use different length buckets. The plan is in the posterior's
            ``config``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``.
        seed: Seed of weights, shuffle and noise.
        progress: Whether to show progress: a bar in a terminal or a notebook, elsewhere plain lines on standard error,
            at most one every ten seconds; True prints the first at once. Skipped steps are said: the first, the tenth,
            the hundredth, and so on; shown or not, a fit that skipped steps ends with a warning that counts them.
        callbacks: KL warm-up, annealing, early stopping, checkpoints, logging: see `deepprob.fitting.callbacks`. A
            function in the list is called with the fit after every epoch; it returns None or a bool, and True ends the
            fit.
        restarts: Number of starts, each with its own weights, start of the guide and noise. They take every step
            together, and the posterior is the one with the best bound at the end: see `deepprob.fitting.restarts` and
            ``posterior.history.restarts``. Progress and callbacks see the start that leads. Not with ``held_out``.

    Returns:
        The posterior. After Ctrl-C it holds the best state so far.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If data, program and settings do not fit together; raised before the first step, or before the
            steps of rows that are read while the fit runs.
        ReadingError: If a data set or a loader fails; it carries the posterior so far.
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
    with torch.inference_mode(False):
        callbacks, compile = callback_list(callbacks), compile_choice(compile)
        restarts = checked_restarts(restarts, held_out)
        state = init(
            program,
            data,
            epochs=epochs,
            steps=steps,
            batch_size=batch_size,
            objective=objective,
            guide=guide,
            optimizer=optimizer,
            weights=weights,
            device=device,
            seed=seed,
        )
        state.config = {**state.config, "restarts": restarts}
        others = other_starts(state, restarts, program, guide, batch_size, weights)
        return running_fit(state, held_out, compile, callbacks, progress is not False, others).run(progress)


def extend(
    posterior: Posterior,
    data: Any = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    held_out: Any = None,
    optimizer: str | Optimizer | type[torch.optim.Optimizer] | None = None,
    objective: str | Objective | None = None,
    compile: bool | str = "auto",
    progress: bool | str = "auto",
    callbacks: Sequence[Callback | Callable[[Fit], object]] = (),
) -> Posterior:
    r"""Train on from the last step of a fit by `svi`, with the optimizer's memory.

    .. math:: \mathrm{extend}(\mathrm{svi}(S), n) = \mathrm{svi}(S + n)

    bit for bit, if the schedule does not depend on the number of steps (``Optimizer(schedule="constant")``) and both
    run by the same plan; a Gaussian guide by name looks for its start in fits of at least 100 steps. Other schedules
    continue as in a fit of the whole length: the default, a cosine, rises at the seam from its end in the short fit to
    its value at that step of the long one. The given posterior does not change.

    Args:
        posterior: The result of `svi`, of an earlier `extend`, or of `Posterior.load`.
        data: The data of the fit.
        epochs: Passes over the data, beyond those done.
        steps: Gradient steps, beyond those done. Without both, the fit goes on until its bound has levelled, as in
            `svi`.
        held_out: Data to score after every epoch, as in `svi`.
        optimizer: An optimizer that continues with the memory of the fit's own, with another learning rate or schedule.
        objective: Another objective; needed where the fit had one of the user.
        compile: As in `svi`.
        progress: As in `svi`.
        callbacks: As in `svi`; those of the fit are not remembered.

    Returns:
        The posterior of the longer fit, with the whole history.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If the fit cannot go on, or the data are not those of the fit.
        DivergenceError: If too many steps in a row are skipped.

    Examples:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> y, constant = torch.tensor([2.0, 4.0]), Optimizer(schedule="constant")
        >>> short = svi(Program.of(model, "normal"), y, steps=20, optimizer=constant)
        >>> long = svi(Program.of(model, "normal"), y, steps=30, optimizer=constant)
        >>> extend(short, y, steps=10).history.steps == long.history.steps
        True
    """
    with torch.inference_mode(False):
        training, config = training_of(posterior), posterior.config
        callbacks, compile = callback_list(callbacks), compile_choice(compile)
        state = init(
            posterior.program,
            data,
            epochs=epochs,
            steps=steps,
            batch_size=config["batch_size"],
            objective=objective_after(posterior, objective),
            guide=posterior.instance.guide_name,
            optimizer=optimizer_after(posterior, optimizer),
            weights="keep",
            device=posterior.instance.device,
            seed=posterior.seed,
        )
        kept: dict[str, Any] = {name: config[name] for name in ("weights", "data", "restarts") if name in config}
        state.config = {**state.config, **kept}
        start_as(state.instance.program, posterior.program)
        state.length = state.length.after(training.facts["step"])
        fit = running_fit(state, held_out, compile, callbacks, progress is not False)
        fit.continue_from(training, posterior)
        return fit.run(progress)
