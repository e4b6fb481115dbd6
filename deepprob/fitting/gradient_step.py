"""One gradient step, run in Python."""

from __future__ import annotations

import torch
from torch import Tensor

from deepprob.engine.packing import global_norm
from deepprob.engine.trace import restore
from deepprob.fitting.gradients import loss_and_gradients
from deepprob.fitting.objectives import Objective, Terms
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.state import Knobs, State, batch_at
from deepprob.fitting.update_rules import chosen
from deepprob.programs.minibatch import Batch
from deepprob.programs.parameters import warn_of_late


def gradient_step(
    state: State, data: Batch, rows: Tensor, knobs: Knobs, objective: Objective, optimizer: Optimizer
) -> Terms:
    """Take one gradient step inside a running program, whose context is entered once for many steps.

    Args:
        state: The state before the step; it is updated in place.
        data: All rows, or a chunk of them.
        rows: Places of the batch's rows in ``data``.
        knobs: Learning rate, weight of the KL and annealed values.
        objective: The objective.
        optimizer: The optimizer.

    Returns:
        The detached terms.
    """
    state.anneal(knobs.annealed)
    batch, rows = batch_at(data, rows, state.numbered)
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
    return terms | {"gradient_norm": norm, "skipped": (~finite).to(norm.dtype)}
