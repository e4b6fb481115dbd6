"""The start of a fit, shared by gradient-based routines: its state before the first step, and the running fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepprob.engine.machine import pick_device, threads_for
from deepprob.engine.random import RandomStream
from deepprob.errors import whole
from deepprob.fitting.callbacks import Callback
from deepprob.fitting.compiling import CompileTask
from deepprob.fitting.cost_model import length_buckets
from deepprob.fitting.course import Course, Length
from deepprob.fitting.first_step import prepare_start
from deepprob.fitting.gradient_step import gradient_step
from deepprob.fitting.held_out import HeldOut
from deepprob.fitting.intake import annealed_buffers, check_program, checked_held_out, instance_of, rows_of_a_step
from deepprob.fitting.loop_state import LoopState
from deepprob.fitting.objectives import Objective, Terms, description, objective_named, objective_on
from deepprob.fitting.optimizers import Optimizer, optimizer_named
from deepprob.fitting.restarts import RestartedFit
from deepprob.fitting.row_order import RowOrder
from deepprob.fitting.rows_of_fit import check_length, chunks_of, rows_of_fit
from deepprob.fitting.run import RunningFit
from deepprob.fitting.settings import FitSettings
from deepprob.fitting.starts import Start
from deepprob.fitting.state import Knobs, State
from deepprob.fitting.steppers import EagerStepper
from deepprob.fitting.tiers import choose_score, choose_stepper, saved_plan
from deepprob.programs.guides import GuideSpec
from deepprob.programs.minibatch import Batch
from deepprob.programs.padding_influence import warn_of_padding
from deepprob.programs.program import Program


def start_fit(
    program: Program,
    data: Any,
    *,
    routine: str,
    epochs: int | None,
    steps: int | None,
    batch_size: int | str | None,
    objective: str | Objective,
    guide: GuideSpec,
    optimizer: str | Optimizer | type[torch.optim.Optimizer] | None,
    weights: str,
    device: str | torch.device,
    seed: int,
) -> LoopState:
    """The state before the first step. The arguments are those of `deepprob.inference.svi`, and the routine's name.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If data, program and settings do not fit together.
    """
    with torch.inference_mode(False):  # a fit needs gradients, whatever mode the caller is in
        check_program(program, weights, routine)
        factory, device, seed = optimizer_named(optimizer), pick_device(device), whole("seed", seed, least=0)
        bound = objective_on(objective_named(objective), device)
        described, rows = description(bound), rows_of_fit(program, data, batch_size, device, seed)
        noise = RandomStream(seed, device)
        with noise.drawing():
            instance = instance_of(program, rows.batch, guide, device, rows.batch_size, weights, num_data=rows.num_data)
        warn_of_padding(instance, rows.batch, known=program.origin.fitted)
        chunks = chunks_of(rows.stream, instance, seed)
        size = chunks.batch_size if chunks else rows_of_a_step(rows.batch_size, instance.num_data, program)
        length = Length.of(epochs, steps, chunks.steps_per_epoch if chunks else math.ceil(instance.num_data / size))
        check_length(rows.stream, length)
        batch = tuple(x.to(device) for x in rows.batch)
        learning_rate = factory.learning_rate or program.learning_rate
        prepare_start(instance, bound, batch, size, weights, length.expected, chunks.numbers if chunks else None)
        started = State.start(instance, factory, learning_rate)
        started.numbered = chunks is not None
        config = {
            "routine": routine,
            "batch_size": size,
            "objective": described,
            "guide": instance.guide_name or "own",
            "optimizer": factory.describe() | {"learning_rate": learning_rate},
            "weights": weights,
            "device": str(device),
        }
        return LoopState(
            **vars(started),
            data=batch,
            chunks=chunks,
            batch_size=size,
            length=length,
            objective=bound,
            factory=factory,
            learning_rate=learning_rate,
            noise=noise,
            order=chunks or RowOrder(instance.num_data, size, None, seed),
            seed=seed,
            config=config,
        )


def running_fit(
    state: LoopState,
    held_out: Any,
    compile: bool | str,
    callbacks: list[Callback],
    announce: bool,
    others: Sequence[Start] = (),
    kind: Callable[..., RunningFit] | None = None,
) -> RunningFit:
    """A fit before its first step, of one start or with others.

    Args:
        state: The state of `start_fit`.
        held_out: Data to score after every epoch, or None.
        compile: As in `deepprob.inference.svi`.
        callbacks: The callbacks.
        announce: Whether to say what a compiler does.
        others: The starts beside the first.
        kind: Makes the running fit from the other starts and the arguments of `RunningFit`; None for a fit that keeps
            its best start.
    """
    length, instance, batch, size = state.length, state.instance, state.data, state.batch_size
    factory, bound = state.factory, state.objective
    score = None if held_out is None else HeldOut(instance, checked_held_out(instance, held_out))
    state.annealed = annealed_buffers(instance, callbacks)

    def eager_step(state: State, data: Batch, rows: Tensor, knobs: Knobs) -> Terms:
        return gradient_step(state, data, rows, knobs, bound, factory)

    buckets = state.chunks or length_buckets(compile, state, batch, batch_size=size, steps=length.expected)
    eager = EagerStepper(eager_step, buckets)
    task = CompileTask(state, bound, factory, buckets, size, announce=announce, starts=1 + len(others))
    with threads_for(state.multiplications(size)):  # compiled code is specific to the number of threads
        plan = saved_plan(callbacks)
        stepper = choose_stepper(compile, eager, task, steps=length.expected, noise=state.noise, plan=plan)
        if score is not None:
            times = math.ceil(length.expected / length.steps_per_epoch)
            choose_score(score, stepper, compile, times=times, resumed=plan is not None)
    config = {
        **state.config,
        "epochs": length.epochs,
        "steps": length.total,
        "length": "fixed" if length.fixed else "level",
        "lengths": list(buckets.lengths),
    }
    settings = FitSettings(size, Course(factory, state.learning_rate, length), state.seed, callbacks, config)
    parts = state, stepper, buckets, score, state.noise, settings
    if kind is not None:
        return kind(others, *parts)
    return RestartedFit(others, *parts) if others else RunningFit(*parts)
