r"""A gradient step as a pure function, run eagerly or many times in one call.

.. math:: (\theta_k, m_k) = \mathrm{update}\big(\theta_{k-1}, m_{k-1}, \nabla L(\theta_{k-1}; x_{r_k}, \varepsilon_k,
          \beta_k), \eta_k\big), \qquad k = 1, \dots, n

with parameters :math:`\theta`, the optimizer's memory :math:`m`, rows :math:`r`, noise :math:`\varepsilon`, the weight
of the KL :math:`\beta` and the learning rate :math:`\eta`. A step whose loss or gradient is not finite is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deepprob.engine.loop import Loop, Step
from deepprob.engine.loop_inputs import Noise, PerStep, StepData
from deepprob.engine.noise import LiftedNoise
from deepprob.engine.packing import global_norm
from deepprob.engine.random import RandomStream
from deepprob.engine.trace import functionalise
from deepprob.fitting.gradients import GradientGraph, GradientProgram
from deepprob.fitting.objectives import Terms
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.stacked import stack, stacked_size, stacked_step
from deepprob.fitting.state import GRADIENTS, State, batch_at, loop_carry
from deepprob.fitting.update_rules import Carry, chosen
from deepprob.programs.minibatch import Batch, num_rows


def step_loop(
    state: State,
    gradients: GradientGraph,
    optimizer: Optimizer,
    data: Batch,
    batch_size: int,
    capacity: int,
    starts: int = 1,
) -> Loop:
    """Make a loop of gradient steps.

    Its knobs are the learning rate, the weight of the KL and the values of the state's annealed buffers. Its record has
    the objective's terms, ``gradient_norm``, and ``skipped``, which is 1 for a skipped step.

    Args:
        state: An example of the state before the first step.
        gradients: The traced loss and gradients.
        optimizer: The optimizer. Without an update rule of ours, the carry has ``gradients`` for torch's optimizer.
        data: All rows; for minibatches, an example of them.
        batch_size: Rows of a step.
        capacity: Most steps in one call.
        starts: Number of starts that take every step together. With more than one, the carry is that of
            `deepprob.fitting.stacked`, and every entry of the record has the starts along its first axis.
    """
    packed = state.carry["packed"][0]
    full_batch = batch_size == (len(data[0]) if data else state.instance.num_data)
    places = {id(x): i for i, x in enumerate(gradients.fixed)}
    annealed = [places[id(x)] for x in state.annealed]
    function = gradients.function if starts == 1 else without_writes(gradients, state, data, batch_size)

    def step(carry: Carry, inputs: StepData, noise: Noise, knobs: Tensor) -> tuple[Carry, Terms]:
        rows, (whole, fixed) = inputs.rows, inputs.fixed
        batch = tuple(whole if full_batch else [x.index_select(0, rows) for x in whole])
        if state.numbered:
            batch, rows = batch[:-1], batch[-1]
        rate, weight, *values = knobs.unbind(0)
        fixed = list(fixed)
        for i, value in zip(annealed, values, strict=True):
            fixed[i] = value.to(fixed[i].dtype)
        params = state.packing.unpack(carry["packed"])
        loss, terms, found, buffers = function(
            params, carry["buffers"], fixed, batch, rows, *noise, weight.to(gradients.noise.dtype)
        )
        named = dict(zip(gradients.names, terms, strict=True))
        flat = state.packing.pack(found)
        return _new_carry_and_record(carry, flat, loss, named, buffers, rate, inputs.number, optimizer)

    rows = torch.zeros((1 if full_batch else 2), batch_size, dtype=torch.long, device=packed.device)
    knobs = torch.zeros(2, 2 + len(annealed), dtype=packed.dtype, device=packed.device)
    fixed = (list(data), gradients.fixed)
    carry, noise = loop_carry(state), gradients.noise
    taken: Step = step
    if starts > 1:
        carry, noise = stack([carry] * starts), stacked_size(noise, starts)
        example = StepData(fixed, rows[0], torch.zeros((), dtype=torch.long, device=packed.device))
        taken = stacked_step(step, carry, example, knobs[0], noise, starts)
    return Loop(taken, carry, PerStep(rows, knobs), fixed, noise, capacity, settled=full_batch)


def without_writes(
    gradients: GradientGraph, state: State, data: Batch, batch_size: int
) -> Callable[..., tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]]:
    """The loss and gradients without operations in place, which ``torch.vmap`` cannot batch.

    Args:
        gradients: The traced loss and gradients.
        state: An example of the state.
        data: All rows; for minibatches, an example of them.
        batch_size: Rows of a step.
    """
    device = state.carry["packed"][0].device
    rows = torch.arange(batch_size, device=device)
    batch, rows = batch_at(data, rows % num_rows(data), state.numbered) if data else (data, rows)
    noise = gradients.noise.draw_once([torch.Generator(device) for _ in range(2)], device)
    weight = torch.ones((), dtype=gradients.noise.dtype, device=device)
    params = [p.detach() for p in state.packing.unpack(state.carry["packed"])]
    inputs = (params, gradients.buffers, gradients.fixed, tuple(batch), rows, *noise, weight)
    return functionalise(gradients.function, *inputs)


def eager_step(state: State, program: GradientProgram, optimizer: Optimizer, stream: RandomStream) -> Step:
    """The step of `step_loop` run by Python, to compare the two.

    Args:
        state: The state whose parameters and buffers the step uses; their values are restored.
        program: The loss and its gradients.
        optimizer: The optimizer.
        stream: The source of draws that the noise does not serve; every step begins at its present position.
    """
    used = [*state.carry["packed"], *state.carry["buffers"], *state.annealed]
    position = stream.state

    def step(carry: Carry, inputs: StepData, noise: Noise, knobs: Tensor) -> tuple[Carry, Terms]:
        before = [x.clone() for x in used]
        try:
            state.assign({name: carry[name] for name in ("packed", "buffers")})
            state.anneal(knobs[2:].tolist())
            batch, rows = batch_at(tuple(inputs.fixed[0]), inputs.rows, state.numbered)
            stream.state = position
            with state.instance.running(), stream.drawing(), LiftedNoise(*noise):
                loss, terms, found = program(batch, rows, knobs[1])
            with torch.no_grad():
                buffers = [x.clone() for x in state.carry["buffers"]]
                flat = state.packing.pack(found)
                return _new_carry_and_record(carry, flat, loss, terms, buffers, knobs[0], inputs.number, optimizer)
        finally:
            with torch.no_grad():
                for x, value in zip(used, before, strict=True):
                    x.copy_(value)

    return step


def _new_carry_and_record(
    carry: Carry,
    gradients: Sequence[Tensor],
    loss: Tensor,
    terms: Terms,
    buffers: Sequence[Tensor],
    rate: Tensor,
    number: Tensor,
    optimizer: Optimizer,
) -> tuple[Carry, Terms]:
    """The carry after a step, and the step's record."""
    norm = global_norm(gradients)
    finite = torch.isfinite(loss) & torch.isfinite(norm)
    if optimizer.rule is None:  # torch's own optimizer reads the gradients from the carry
        new = {name: [x.clone() for x in tensors] for name, tensors in carry.items()} | {GRADIENTS: list(gradients)}
    else:
        new = optimizer.advance(carry, gradients, finite, rate, number)
    pairs = zip(carry["buffers"], buffers, strict=True)
    new["buffers"] = [chosen(finite, after, before) for before, after in pairs]
    return {name: new[name] for name in carry}, terms | {"gradient_norm": norm, "skipped": (~finite).to(rate.dtype)}
