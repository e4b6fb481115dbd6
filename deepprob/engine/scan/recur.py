"""Recurrences over time: a plain loop in Python, one operation in a traced graph, whatever the number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from deepprob.engine.scan.gradient import CellGradient
from deepprob.engine.scan.joint import Cell, Unsplittable
from deepprob.engine.scan.operator import Tensors, run_loop

UNROLLED = 8  # steps: up to here, unrolling costs less than a loop


def recur(
    cell: Cell, state: Sequence[Tensor], inputs: Sequence[Tensor], params: Sequence[Tensor] = ()
) -> tuple[Tensors, Tensors]:
    r"""Apply a cell to the slices of the inputs, one after the other.

    .. math:: (s_t, y_t) = f(s_{t-1}, x_t; \theta), \qquad t = 1, \dots, T

    In a traced graph this is one loop over time, and one more for the gradient, whatever :math:`T` is:

    .. math:: \bar s_{t-1} = \bar s_t \, \frac{\partial s_t}{\partial s_{t-1}}
              + \bar y_t \, \frac{\partial y_t}{\partial s_{t-1}}, \qquad
              \bar\theta = \sum_t \big(\bar s_t \, \partial_\theta s_t + \bar y_t \, \partial_\theta y_t\big)

    The second loop computes only the values that depend on :math:`\bar s_t` and reads the others from the first loop.
    A sum over time of matrix products is one matrix product after the loop. A cell is unrolled if it draws random
    numbers or uses trained tensors that are not among its arguments.

    Args:
        cell: A pure function from state, one slice of each input, and parameters, to new state and outputs.
        state: :math:`s_0`.
        inputs: :math:`x`, time first, each ``(T, ...)``; at least one.
        params: :math:`\theta`, the same at every step.

    Returns:
        The last state, and the outputs of all steps, each ``(T, ...)``.

    Raises:
        ValueError: If there are no inputs, or no steps.

    References:
        Radul, Paszke, Frostig, Johnson, Maclaurin (2023), You Only Linearize Once: the gradient of a loop by splitting
        its cell into operations that are linear in the cotangents and the rest.

    Examples:
        A running sum:

        >>> def add(state, x, params):
        ...     total = state[0] + x[0]
        ...     return (total,), (total,)
        >>> recur(add, [torch.zeros(())], [torch.ones(4)])
        ((tensor(4.),), (tensor([1., 2., 3., 4.]),))
    """
    if not inputs or not len(inputs[0]):
        raise ValueError(
            "recur got no inputs, or inputs without steps. Give at least one input of shape (T, ...), T at least 1."
        )
    state, inputs, params = tuple(state), tuple(inputs), tuple(params)
    if is_tracing() and len(inputs[0]) > UNROLLED:
        try:
            return _looped(cell, state, inputs, params)
        except Unsplittable:
            pass
    return _unrolled(cell, state, inputs, params)


def is_tracing() -> bool:
    """Whether the running code is being traced into a graph, and no transform of torch.func is active."""
    return get_proxy_mode() is not None and torch._C._functorch.peek_interpreter_stack() is None


def _unrolled(cell: Cell, state: Tensors, inputs: Tensors, params: Tensors) -> tuple[Tensors, Tensors]:
    steps = []
    for slices in zip(*(x.unbind(0) for x in inputs), strict=True):
        state, outputs = cell(state, slices, params)
        steps.append(outputs)
    return state, tuple(torch.stack(y) for y in zip(*steps, strict=True))


def _looped(cell: Cell, state: Tensors, inputs: Tensors, params: Tensors) -> tuple[Tensors, Tensors]:
    gradient = CellGradient(cell, state, inputs, params)
    everything = (*(s.clone(memory_format=torch.contiguous_format) for s in state), *inputs, *params)
    if gradient.has_gradient:
        out: Tensors = _DifferentiableLoop.apply(gradient, *everything)  # type: ignore[no-untyped-call]
    else:
        out = gradient.run(run_loop, everything)
    return out[: len(state)], out[len(state) :]


class _DifferentiableLoop(torch.autograd.Function):
    """The loop over time, with a loop backwards as its gradient."""

    @staticmethod
    def forward(ctx: Any, gradient: CellGradient, *everything: Tensor) -> Tensors:
        out = gradient.run(run_loop, everything)
        ctx.gradient, ctx.count = gradient, len(everything)
        ctx.save_for_backward(*everything, *out[gradient.states :])
        return out[: gradient.returned]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        everything, stacks = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        return None, *ctx.gradient.pull_back(run_loop, everything, stacks, cotangents)
