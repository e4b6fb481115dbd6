r"""Draws that reach further than a guide.

A guide sees nothing beyond its own draws: where the posterior has heavier tails, its importance weights and gradients
look right. Draws of a multivariate Student distribution with the guide's mean, the guide's covariance as its scale
matrix and three degrees of freedom lie there, too, and their importance weights tell the posterior's mean and width.

References:
    Geweke (1989), Bayesian inference in econometric models using Monte Carlo integration.
"""

from __future__ import annotations

import torch
from pyro.distributions import MultivariateStudentT
from torch import Tensor

from deepprob.programs.tracing import LogDensity

_FREEDOM, _DRAWS = 3.0, 2000
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
    wide = MultivariateStudentT(torch.tensor(_FREEDOM).to(own), own.mean(0), factor)
    points = wide.sample(torch.Size([_DRAWS + -_DRAWS % chunk]))
    heights = torch.cat([density(part.to(torch.get_default_dtype()))[0] for part in points.split(chunk)])
    return points, heights.double() - wide.log_prob(points)
