"""The last steps to a mode, on all rows and in units of a normal distribution that approximates the posterior."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from deepprob.distributions.structured_normal import Block
from deepprob.fitting.at_mode import AtMode

_NEWTON, _HALVINGS = 5, 4  # steps at the end, and shorter ones
_AT_MODE = 1e-8  # nats that the log joint may still gain
_ROUNDING = 1e-3  # nats


def to_mode(mode: AtMode, blocks: Sequence[Block], names: Collection[str], steps: int) -> float:
    """Climb the log joint by L-BFGS steps, and end with Newton steps, as long as they come closer.

    Args:
        mode: The program; the mean of its guide changes.
        blocks: The distribution, whose roots are the units of a step.
        names: The sites with a prior.
        steps: The most L-BFGS steps.

    Returns:
        What the log joint can still gain by a Newton step, in nats.
    """
    value, gradient = mode.gradient(mode.guide.loc, names)
    step, left = _newton(blocks, gradient)
    if left > _ROUNDING:
        _climb(mode, blocks, names, steps, value)
        value, gradient = mode.gradient(mode.guide.loc, names)
        step, left = _newton(blocks, gradient)
    for _ in range(_NEWTON):
        if not left > _AT_MODE:
            break
        for halving in range(_HALVINGS):
            moved = mode.guide.loc.detach() + (step * 0.5**halving).to(mode.guide.loc)
            higher, gradient = mode.gradient(moved, names)
            new, now = _newton(blocks, gradient)
            if now < left and higher > value - _ROUNDING:
                break
        else:
            break
        _move(mode, moved)
        step, left, value = new, now, higher
    return left


def _climb(mode: AtMode, blocks: Sequence[Block], names: Collection[str], steps: int, before: float) -> None:
    """Take L-BFGS steps, in the units of the blocks; none if the log joint falls."""
    start = mode.guide.loc.detach().clone()
    noise = torch.zeros(sum(b.index.numel() for b in blocks), dtype=torch.float64, device=start.device)
    noise.requires_grad_()
    search = torch.optim.LBFGS([noise], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-5)
    best = [(before, start)]

    def loss() -> Tensor:
        with torch.enable_grad():
            deviation = _deviation(blocks, noise, start)
        moved = start + deviation.detach().to(start)
        value, gradient = mode.gradient(moved, names)
        if value > best[0][0]:
            best[0] = value, moved
        (slope,) = torch.autograd.grad(-(deviation @ gradient), noise)
        noise.grad = slope
        return noise.new_tensor(-value)

    search.step(loss)
    _move(mode, best[0][1])


def _move(mode: AtMode, to: Tensor) -> None:
    with torch.no_grad():
        mode.guide.loc.copy_(to)


def _deviation(blocks: Sequence[Block], noise: Tensor, like: Tensor) -> Tensor:
    """The vector of deviations for standard normal noise of all blocks."""
    found = torch.zeros(like.shape, dtype=noise.dtype, device=noise.device)
    for block, part in zip(blocks, noise.split([b.index.numel() for b in blocks]), strict=True):
        found = found.index_add(0, block.index.flatten(), block.deviation(part))
    return found


def _newton(blocks: Sequence[Block], gradient: Tensor) -> tuple[Tensor, float]:
    """The Newton step for a gradient, and what it gains in a quadratic log joint."""
    size = sum(b.index.numel() for b in blocks)
    noise = torch.zeros(size, dtype=gradient.dtype, device=gradient.device, requires_grad=True)
    with torch.enable_grad():
        (pulled,) = torch.autograd.grad(_deviation(blocks, noise, gradient) @ gradient, noise)
    step = _deviation(blocks, pulled, gradient)
    return step, 0.5 * float(step @ gradient)
