"""Recurrences over time: in Python a plain loop; in a traced graph one operation, whatever the number of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from deepprob.engine.scan.gradient import CellGradient, Unsplittable
from deepprob.engine.scan.operator import run_loop

Tensors = tuple[Tensor, ...]
Cell = Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]

UNROLLED = 8  # steps, up to which unrolling costs less than a loop


def recur(
    cell: Cell, state: Sequence[Tensor], inputs: Sequence[Tensor], params: Sequence[Tensor] = ()
) -> tuple[Tensors, Tensors]:
    r"""Apply a cell to one slice of the inputs after the other.

    .. math:: (s_t, y_t) = f(s_{t-1}, x_t; \theta), \qquad t = 1, \dots, T

    While a program is traced, the graph gets one loop over time and another for its gradient, whatever :math:`T` is:

    .. math:: \bar s_{t-1} = \bar s_t \, \frac{\partial s_t}{\partial s_{t-1}}
              + \bar y_t \, \frac{\partial y_t}{\partial s_{t-1}}, \qquad
              \bar\theta = \sum_t \big(\bar s_t \, \partial_\theta s_t + \bar y_t \, \partial_\theta y_t\big)

    Only what needs :math:`\bar s_t` is computed inside of the second loop; what the first one computed is kept, and
    the sums over time of matrix products are one matrix product after the loop. A cell that draws random numbers, or
    that holds tensors of its own which are to be trained, is unrolled.

    Args:
        cell: A pure function of tensors: state, one slice of each input, and parameters, to new state and outputs.
        state: :math:`s_0`.
        inputs: :math:`x`, time first, each ``(T, ...)``; at least one.
        params: :math:`\theta`, the same at every step.

    Returns:
        The last state, and the outputs of all steps, each ``(T, ...)``.

    Raises:
        ValueError: If there are no inputs, or no steps.

    References:
        Radul, Paszke, Frostig, Johnson, Maclaurin (2023), You Only Linearize Once: the gradient of a loop by splitting
        its cell into what is linear in the cotangents and the rest.

    Examples:
        A sum that runs:

        >>> def add(state, x, params):
        ...     total = state[0] + x[0]
        ...     return (total,), (total,)
        >>> recur(add, [torch.zeros(())], [torch.ones(4)])
        ((tensor(4.),), (tensor([1., 2., 3., 4.]),))
    """
    if not inputs or not len(inputs[0]):
        raise ValueError("recur got no inputs, so no steps. Give inputs of shape (T, ...), T at least 1.")
    state, inputs, params = tuple(state), tuple(inputs), tuple(params)
    if is_traced() and len(inputs[0]) > UNROLLED:
        try:
            return _looped(cell, state, inputs, params)
        except Unsplittable:
            pass
    return _unrolled(cell, state, inputs, params)


def is_traced() -> bool:
    """Whether Python runs to be traced into a graph, and nothing else transforms what it does."""
    return get_proxy_mode() is not None and torch._C._functorch.peek_interpreter_stack() is None


def _unrolled(cell: Cell, state: Tensors, inputs: Tensors, params: Tensors) -> tuple[Tensors, Tensors]:
    steps = []
    for slices in zip(*(x.unbind(0) for x in inputs), strict=True):
        state, outputs = cell(state, slices, params)
        steps.append(outputs)
    return state, tuple(torch.stack(y) for y in zip(*steps, strict=True))


def _looped(cell: Cell, state: Tensors, inputs: Tensors, params: Tensors) -> tuple[Tensors, Tensors]:
    split = CellGradient(cell, state, inputs, params)
    everything = (*(s.clone(memory_format=torch.contiguous_format) for s in state), *inputs, *params)
    if split.has_gradient:
        out: Tensors = _Loop.apply(split, *everything)  # type: ignore[no-untyped-call]
    else:
        out = split.run(run_loop, everything)
    return out[: len(state)], out[len(state) :]


class _Loop(torch.autograd.Function):
    """The loop over time, and its gradient as a loop backwards."""

    @staticmethod
    def forward(ctx: Any, split: CellGradient, *everything: Tensor) -> Tensors:
        out = split.run(run_loop, everything)
        ctx.split, ctx.count = split, len(everything)
        ctx.save_for_backward(*everything, *out[split.states :])
        return out[: split.returned]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        everything, stacks = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        return None, *ctx.split.pull_back(run_loop, everything, stacks, cotangents)
