r"""Draws that reach further than a guide.

A guide sees nothing beyond its own draws: where the posterior has heavier tails, its importance weights and gradients
look right. Draws of a multivariate Student distribution with the guide's mean, the guide's covariance as its scale
matrix and three degrees of freedom lie there, too, and their importance weights tell the posterior's mean and width.

References:
    Geweke (1989), Bayesian inference in econometric models using Monte Carlo integration.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from pyro.distributions import MultivariateStudentT
from torch import Tensor

from deepprob.engine.accuracy import Accuracy, accuracy_by_weights
from deepprob.posteriors.arviz_compat import khat_limit, psis
from deepprob.programs.tracing import LogDensity

_FREEDOM, _DRAWS = 3.0, 4000
_MOST_NUMBERS = 10  # in more, few of the draws have any weight
EFFECTIVE = 100  # effective draws of reliable importance weights


def accuracy_by_wide_draws(density: LogDensity, values: Mapping[str, Tensor], chunk: int) -> Accuracy | None:
    """The accuracy of a guide, by importance weights of draws that reach further.

    Args:
        density: The density of the posterior.
        values: The guide's draws, as coordinates by site, ``(K, n)`` each.
        chunk: At how many points the density is evaluated at once.

    Returns:
        Of every coordinate, in the order of the density; None where the weights tell nothing, or there are more than
        ten coordinates.
    """
    own = torch.cat([values[name] for name in density.shapes], 1).double()
    count, size = own.shape
    draws = _DRAWS + -_DRAWS % chunk
    if size > _MOST_NUMBERS:
        return None
    factor, failed = torch.linalg.cholesky_ex(own.T.cov().reshape(size, size))
    if int(failed):
        return None
    wide = MultivariateStudentT(torch.tensor(_FREEDOM).to(own), own.mean(0), factor)
    points = wide.sample(torch.Size([draws]))
    heights = torch.cat([density(part.to(torch.get_default_dtype()))[0] for part in points.split(chunk)])
    log_weights = (heights.double() - wide.log_prob(points)).nan_to_num(-np.inf, -np.inf).cpu().numpy()
    if not np.isfinite(log_weights).any():
        return None
    smoothed, khat = psis(np.maximum(log_weights, log_weights.max() - 700))
    weights = np.exp(smoothed)
    if float(khat) > khat_limit(draws) or 1 / float(np.square(weights).sum()) < EFFECTIVE:
        return None
    posterior, guide = np.concatenate([np.zeros(count), weights]), np.concatenate([np.ones(count), np.zeros(draws)])
    return accuracy_by_weights(torch.cat([own, points]).cpu().numpy(), posterior, guide)
