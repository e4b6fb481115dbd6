r"""Draws that reach further than a guide.

A guide sees nothing beyond its own draws: where the posterior has heavier tails, or a wide part around a narrow one,
its importance weights and gradients look right. Draws of a mixture of multivariate Student distributions, with three
degrees of freedom, the guide's mean, and the guide's covariance times 1, 9 and 100 as scale matrices, lie there, too.
Their importance weights tell the posterior's mean and width.

References:
    Geweke (1989), Bayesian inference in econometric models using Monte Carlo integration.
"""

from __future__ import annotations

import math

import torch
from pyro.distributions import MultivariateStudentT
from torch import Tensor

from deepprob.programs.tracing import LogDensity

_FREEDOM, _SCALES, _DRAWS = 3.0, (1.0, 3.0, 10.0), 3000
_MOST_NUMBERS = 10  # in more, few of the draws have any weight


def wide_draws(density: LogDensity, own: Tensor, chunk: int) -> tuple[Tensor, Tensor] | None:
    """Draws that reach further than a guide, and their log-weights.

    Args:
        density: The density of the posterior.
        own: The guide's draws, shape ``(K, D)``, in the order of the density's coordinates.
        chunk: At how many points the density is evaluated at once.

    Returns:
        The draws ``(S, D)`` and ``log p - log q`` of them, ``(S,)``; None for more than ten coordinates, or where the
        guide's draws have no covariance.
    """
    own, size = own.double(), own.shape[1]
    factor, failed = torch.linalg.cholesky_ex(own.T.cov().reshape(size, size))
    if size > _MOST_NUMBERS or int(failed):
        return None
    unit, mean = MultivariateStudentT(torch.tensor(_FREEDOM).to(own), torch.zeros_like(own[0]), factor), own.mean(0)
    scales, count = torch.tensor(_SCALES).to(own), _DRAWS + -_DRAWS % chunk
    points = mean + unit.sample(torch.Size([count])) * scales[torch.arange(count) % len(scales), None]
    parts = unit.log_prob((points - mean) / scales[:, None, None]) - size * scales.log()[:, None]
    heights = torch.cat([density(part.to(torch.get_default_dtype()))[0] for part in points.split(chunk)])
    return points, heights.double() - (parts.logsumexp(0) - math.log(len(scales)))
