r"""The gradient of a recurrence: its cell is split into work before, inside and after the loops over time.

An example, :math:`h_t = \tanh(h_{t-1} W + x_t)` with :math:`W = \exp V` and output :math:`y_t = h_t`. The cell and its
vector-Jacobian product are traced as one graph; ``dh`` is the cotangent of ``h``::

    W  = exp(V)                             the same at every step
    h' = tanh(h @ W + x),  y = h'           varies from step to step
    g  = (dh' + dy) * (1 - y**2)            linear in the cotangents
    dh = g @ W.T,  dx = g                   linear in the cotangents
    dV = (h.T @ g) * W                      linear in the cotangents

This graph is split into four::

    before the loops        W  = exp(V)
         |
         v  W
    loop forwards           h' = tanh(h @ W + x);  y = h'
     t = 1, ..., T          keeps h
         |
         v  W, and y of all steps
    loop backwards          g  = (dh' + dy) * (1 - y**2);  dh = g @ W.T
     t = T, ..., 1          collects g
         |
         v  W, and h and g of all steps
    after the loops         dV = (H.T @ G) * W              H, G: h, g of all steps and rows, one matrix each
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes

from deepprob.engine.scan.joint import Cell, JointGraph, value_of
from deepprob.engine.scan.operator import Tensors
from deepprob.engine.scan.sums import ParameterSums

RunLoop = Callable[[GraphModule, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], Tensors]


class CellGradient:
    r"""A cell and its gradient, as graphs of tensor operations.

    The gradient is linear in the cotangents. The values :math:`k_t` that it needs are kept from the loop forwards, and
    the values :math:`c_t` that the parameters' gradients need are collected in the loop backwards:

    .. math:: (s_t, y_t, k_t) = f(s_{t-1}, x_t; \theta), \qquad
              (\bar s_{t-1}, \bar x_t, c_t) = L(k_t, x_t, \theta) \, (\bar s_t, \bar y_t), \qquad
              \bar\theta = \sum_t \bar\theta(k_t, c_t)

    Args:
        cell: A function from state, one slice of each input, and parameters, to new state and outputs.
        state: The state before the first step.
        inputs: Inputs of all steps, each ``(T, ...)``.
        params: Parameters, the same at every step.

    Attributes:
        states: Number of states.
        returned: Number of states and outputs.
        has_gradient: Whether any argument needs a gradient.

    Raises:
        Unsplittable: If the cell cannot be traced, is random, or has trained tensors of its own.
    """

    def __init__(self, cell: Cell, state: Tensors, inputs: Tensors, params: Tensors) -> None:
        self.has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (*state, *inputs, *params))
        with _disable_current_modes():
            self._joint = joint = JointGraph(cell, (state, tuple(x[0] for x in inputs), params), self.has_gradient)
        self.states, self.returned = len(state), len(joint.new_state) + len(joint.outputs)
        self._sums = ParameterSums(joint, len(inputs[0]))
        collected = [g for g in joint.input_gradients if g is not None] + self._sums.collected
        self._collected = list(dict.fromkeys(collected))
        backward = [*joint.state_gradients, *self._sums.summed, *self._collected]
        slices, self._backward_fixed = joint.required(backward, keep=True)
        self._slices = [*joint.output_cotangents, *slices]
        self._kept = [n for n in dict.fromkeys([*slices, *self._sums.kept]) if n not in {*joint.inputs, *joint.outputs}]
        forward = [*joint.new_state, *joint.outputs, *self._kept]
        _, self._forward_fixed = joint.required(forward, keep=False)
        self._forward = joint.extract([*joint.state, *joint.inputs, *self._forward_fixed], forward)
        bars = joint.state_cotangents
        given = [*bars, *self._slices, *self._backward_fixed]
        self._backward = joint.extract(given, backward, self._sums.summed, len(bars), len(self._slices))
        fixed = [*self._forward_fixed, *self._backward_fixed, *self._sums.fixed]
        self._fixed = list(dict.fromkeys(fixed))
        self._before = joint.extract([*joint.params, *joint.constants], self._fixed, fresh=False)

    def separate(self, everything: Sequence[Tensor]) -> tuple[Tensors, Tensors, Tensors]:
        """Split one sequence of tensors into states, inputs and parameters."""
        a, b = len(self._joint.state), len(self._joint.inputs)
        return tuple(everything[:a]), tuple(everything[a : a + b]), tuple(everything[a + b :])

    def run(self, loop: RunLoop, everything: Sequence[Tensor]) -> Tensors:
        """Run the loop forwards: the last states, then the outputs and the kept values of all steps."""
        states, inputs, params = self.separate(everything)
        fixed = self._fixed_values(params)
        return loop(self._forward, states, inputs, [fixed[n] for n in self._forward_fixed])

    def pull_back(
        self, loop: RunLoop, everything: Sequence[Tensor], stacks: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Run the loop backwards: gradients of states, inputs and parameters.

        Args:
            loop: A function that applies a graph step by step, such as `run_loop`.
            everything: States, inputs and parameters.
            stacks: Outputs and kept values of all steps.
            cotangents: Cotangents of the last states and of the outputs.
        """
        joint = self._joint
        states, inputs, params = self.separate(everything)
        count, fixed = len(states), self._fixed_values(params)
        known = dict(zip([*joint.outputs, *self._kept], stacks, strict=True))
        known |= dict(zip([*joint.inputs, *joint.output_cotangents], [*inputs, *cotangents[count:]], strict=True))
        start = [x.contiguous() for x in cotangents[:count]]
        zeros = [inputs[0].new_zeros(value_of(n).shape, dtype=value_of(n).dtype) for n in self._sums.summed]
        # The loop reads the stacks by a descending index; flipping them would copy all kept values.
        index = torch.arange(len(inputs[0]) - 1, -1, -1, device=inputs[0].device)
        given = [*(known[n] for n in self._slices), *(fixed[n] for n in self._backward_fixed)]
        out = loop(self._backward, [*start, *zeros], [index], given)
        sums = dict(zip(self._sums.summed, out[count : count + len(zeros)], strict=True))
        collected = (x.flip(0) for x in out[count + len(zeros) :])
        known |= dict(zip(self._collected, collected, strict=True))
        totals = iter(self._sums.graph(*((sums | known | fixed)[n] for n in self._sums.takes)))
        return [
            *out[:count],
            *(None if g is None else known[g] for g in joint.input_gradients),
            *(None if g is None else next(totals) for g in joint.param_gradients),
        ]

    def _fixed_values(self, params: Tensors) -> dict[Node, Tensor]:
        """The values that are the same at every step, computed before a loop."""
        return dict(zip(self._fixed, self._before(*params, *self._joint.values), strict=True))
