r"""Stochastic-gradient Hamiltonian dynamics: the kernel, and its step sizes over a run.

.. math:: m \leftarrow (1 - a) \, m + h \, \widehat{\nabla U}(u) + \sqrt{2 a - h^2 \hat V} \, \varepsilon, \qquad
          u \leftarrow u - h \, m

with the position :math:`u`, minus the momentum :math:`m`, the energy :math:`U = -\log p(x, u)`, its gradient on a
minibatch, the variance :math:`\hat V` that this gradient adds, the friction :math:`a` and the step size :math:`h`. With
:math:`a = 1` no momentum is left, and the kernel is Langevin's, with steps of :math:`h^2`.

On a normal density of sd 1, with exact gradients, the variance of the chain is
:math:`1 / (1 - h^2 / (2 (2 - a)))`, at most 0.5 % too large for :math:`h = 0.1`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

_LONGEST_RESPONSE = 200_000  # steps
_PHASES = 32  # of a pass


def hamiltonian_step(position: Tensor, momentum: Tensor, gradient: Tensor, step_size: Tensor, friction: float) -> tuple[
    Tensor, Tensor
]:  # fmt: skip
    """One step of the kernel.

    Args:
        position: The position.
        momentum: Minus the momentum.
        gradient: The gradient of the energy on a minibatch, with the noise of `noise_level`.
        step_size: The step size, h.
        friction: The share of the momentum that a step takes away, in (0, 1].

    Returns:
        The new position, and minus the new momentum.

    Examples:
        >>> import torch
        >>> one = torch.ones(1)
        >>> position, momentum = hamiltonian_step(one, 0.0 * one, one, torch.tensor(0.1), friction=1.0)
        >>> round(float(position), 4), round(float(momentum), 4)
        (0.99, 0.1)
    """
    momentum = (1.0 - friction) * momentum + step_size * gradient
    return position - step_size * momentum, momentum


def noise_level(friction: float, step_size: float) -> float:
    """The variance of a gradient's noise, that of the minibatch included, at which the chain has temperature 1.

    Examples:
        >>> round(noise_level(0.5, 0.1), 9)
        100.0
    """
    return 2.0 * friction / step_size**2


def share_of_shuffled(pass_steps: int, friction: float, step_size: float) -> float:
    r"""How much of the noise of independent minibatches is left to a chain whose passes visit every row once.

    .. math:: c = \frac{1}{E - 1} \Big(E - \frac{\sum_e (\sum_{k \in e} r_k)^2}{\sum_k r_k^2}\Big)

    with the response :math:`r_k` of the position, k steps after a kick, on a normal density of sd 1, and passes e of E
    steps: the gradients' errors in a pass sum to zero. A pass that is short beside the chain's motion leaves nothing.

    Args:
        pass_steps: Steps of a pass, E.
        friction: The friction.
        step_size: The step size.

    Examples:
        >>> [round(share_of_shuffled(steps, 0.1, 0.1), 2) for steps in (1, 4, 100_000)]
        [0.0, 0.02, 1.0]
    """
    if pass_steps == 1:
        return 0.0
    length = min(_LONGEST_RESPONSE, math.ceil(15.0 * max(2.0 / friction, friction / step_size**2)))
    response, position, momentum = np.zeros(length), 0.0, step_size
    for k in range(length):
        position -= step_size * momentum
        response[k] = position
        momentum = (1.0 - friction) * momentum + step_size * position
    sums = np.concatenate([[0.0], response.cumsum()])
    firsts = np.unique(np.linspace(1, pass_steps, _PHASES).astype(int))  # steps since the present pass began
    squares = [np.diff(sums[[0, *range(min(first, length), length, pass_steps), length]]) ** 2 for first in firsts]
    left = float(np.mean([x.sum() for x in squares])) / float((response**2).sum())
    return min(1.0, max(0.0, (pass_steps - left) / (pass_steps - 1)))


@dataclass
class Run:
    """The steps of a run: a climb to a mode, the rest of the warm-up, and the draws.

    With cycles, each begins with as many steps without noise, which look for another mode, as it has steps for draws;
    the step size falls from its full value to 0 over a cycle, as the root of a cosine.

    Args:
        warmup: Steps before the first draw; the first half of them climbs.
        draws: Draws of a chain.
        every: Steps between two draws.
        cycles: Number of cycles; 0 for a constant step size.
        step_size: The full step size.

    Examples:
        >>> run = Run(warmup=4, draws=2, every=3, cycles=0, step_size=0.1)
        >>> run.climb, run.total, [run.next_draw(step) for step in (0, 7, 10)]
        (2, 10, [7, 10, 13])
        >>> run = Run(warmup=4, draws=4, every=3, cycles=2, step_size=0.1)
        >>> run.total, [run.next_draw(step) for step in (0, 13, 16, 25)]
        (28, [13, 16, 25, 28])
        >>> [round(run.size(step), 3) for step in (3, 4, 10, 15)], [run.is_hot(step) for step in (3, 4, 10)]
        ([0.1, 0.1, 0.071, 0.013], [True, False, True])
        >>> [run.is_released(step) for step in (2, 3, 4, 10)]
        [False, True, False, True]
    """

    warmup: int
    draws: int
    every: int
    cycles: int
    step_size: float

    @property
    def climb(self) -> int:
        """Steps of the climb."""
        return self.warmup // 2

    @property
    def cycle(self) -> int:
        """Steps of a cycle; of a run without cycles, those for draws."""
        return 2 * self.every * (self.draws // self.cycles) if self.cycles else self.every * self.draws

    @property
    def total(self) -> int:
        """All steps of the run."""
        return self.warmup + self.cycle * max(1, self.cycles)

    def size(self, step: int) -> float:
        """The step size of a step, from 0."""
        if not self.cycles or step < self.warmup:
            return self.step_size
        return self.step_size * math.sqrt(0.5 + 0.5 * math.cos(math.pi * self._within(step) / self.cycle))

    def is_hot(self, step: int) -> bool:
        """Whether a step has noise."""
        if step < self.warmup or not self.cycles:
            return step >= self.climb
        return self._within(step) >= self.cycle // 2

    def is_released(self, step: int) -> bool:
        """Whether the scales of weights may move in a step: where there is noise, after half of it in the warm-up."""
        return step >= self.climb + (self.warmup - self.climb) // 2 and self.is_hot(step)

    def next_draw(self, step: int) -> int:
        """The first step after this one that ends with a draw."""
        begins, first = self.warmup, self.cycle // 2 if self.cycles else 0
        if step >= begins:
            begins += (step - begins) // self.cycle * self.cycle
        within = max(0, step - begins - first)
        return begins + first + (within // self.every + 1) * self.every

    def _within(self, step: int) -> int:
        return (step - self.warmup) % self.cycle
