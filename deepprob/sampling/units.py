r"""Units of the coordinates of chains, from gradients on minibatches around a point.

The unit of a coordinate is :math:`D_i^{-1/2}` with the norm :math:`D_i` of row i of the Hessian of the energy:
equilibration, which needs no positive Hessian and is close to posterior sds where the coordinates hardly correlate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SHIFT = 1e-2  # of every coordinate, up or down
_PROBES = 32
_FLATTEST = 1e-8  # curvature

Gradient = Callable[[Sequence[Tensor], int, bool], Sequence[Tensor]]
"""From a point, the number of a minibatch, and whether it is large, to the gradient of the energy."""


def local_units(
    gradient: Gradient, points: Sequence[Sequence[Tensor]], generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    r"""The unit of every coordinate, and the variance of a minibatch's gradient in these units.

    .. math:: D_i^2 = \mathbb E_z (H z)_i^2, \quad z_i = \pm 1, \qquad
              H z \approx \frac{\nabla U(u + \delta z) - \nabla U(u - \delta z)}{2 \delta}

    with the gradients of large minibatches; the variance is that of the steps' own.

    Args:
        gradient: The gradient of the energy.
        points: The points of all chains, each in the same tensors.
        generator: Source of the signs.

    References:
        Dauphin, de Vries, Bengio (2015), Equilibrated adaptive learning rates for non-convex optimization.

    Examples:
        >>> units, noise = local_units(lambda u, number, large: [4.0 * u[0]], [[torch.ones(2)]], torch.Generator())
        >>> units[0].round(decimals=3), noise[0].round(decimals=3)
        (tensor([0.5000, 0.5000]), tensor([0., 0.]))
    """
    curvature = [torch.zeros_like(x) for x in points[0]]
    noise = [torch.zeros_like(x) for x in points[0]]
    for number, point in enumerate(points):
        found = []
        for probe in range(number * _PROBES, (number + 1) * _PROBES):
            moves = [_SHIFT * (2.0 * torch.randint(2, x.shape, generator=generator).to(x) - 1.0) for x in point]
            up = gradient([x + move for x, move in zip(point, moves, strict=True)], probe, True)
            down = gradient([x - move for x, move in zip(point, moves, strict=True)], probe, True)
            products = [(a - b) / (2.0 * _SHIFT) for a, b in zip(up, down, strict=True)]
            curvature = [c + h.square().nan_to_num(0.0, 0.0, 0.0) for c, h in zip(curvature, products, strict=True)]
            found.append(gradient(point, probe, False))
        spreads = [torch.stack(same).var(0).nan_to_num(0.0, 0.0, 0.0) for same in zip(*found, strict=True)]
        noise = [n + spread / len(points) for n, spread in zip(noise, spreads, strict=True)]
    rows = [(c / (len(points) * _PROBES)).sqrt().clamp_min(_FLATTEST) for c in curvature]
    return [row.rsqrt() for row in rows], [n / row for n, row in zip(noise, rows, strict=True)]
