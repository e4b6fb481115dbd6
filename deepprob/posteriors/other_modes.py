r"""Another mode of a posterior, found by climbing from draws of the prior.

The climb ends at points :math:`u_j`. The mass around one is, by Laplace's method,
:math:`p(u_j, x) \sqrt{(2 \pi)^D / \det H_j}`, with :math:`H_j` the negative Hessian there. It is compared with the
evidence that the guide's own draws give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import biject_to

from deepprob.posteriors.fitted import FittedProgram
from deepprob.programs.minibatch import Batch
from deepprob.programs.sites import sample_sites
from deepprob.programs.tracing import LogDensity, log_density

POINTS = 48
_STEPS, _MOST_NUMBERS, _MOST_WORK = 150, 30, 2**23
_SPEED = 0.1  # of the climb, in sds of the prior for each step
_APART = 3.0  # sds of both between the guide's mean and another mode, in some coordinate


class OtherMode(NamedTuple):
    """A mode that a guide does not cover.

    Attributes:
        log_mass: The logarithm of its mass, divided by that which the guide describes.
        distance: How far it is from the guide's mean, in sums of the sds of both, in the site where that is most.
        site: That site.
    """

    log_mass: float
    distance: float
    site: str


def density_to_search(fitted: FittedProgram, batch: Batch, values: Mapping[str, Tensor]) -> LogDensity:
    """The density of the posterior at any points, `POINTS` at once.

    Args:
        fitted: The program of a posterior that holds a guide.
        batch: The training data, accepted.
        values: The guide's draws, as coordinates by site, ``(K, n)`` each.

    Raises:
        ValueError: If the latent sites are not a few numbers that all rows share, or the data are large.
        Untraceable: If the model is not one sequence of tensor operations.
    """
    found = fitted.structure
    numbers = sum(x.shape[1] for x in values.values())
    work = POINTS * max((x.numel() for x in batch), default=1)
    searched = not (found.local or found.summed) and values.keys() == set(found.latent)
    if not searched or numbers > _MOST_NUMBERS or work > _MOST_WORK:
        raise ValueError(f"the search is for at most {_MOST_NUMBERS} numbers that all rows share, and for small data.")
    return log_density(fitted.instance, batch, chains=POINTS)


def other_mode(
    fitted: FittedProgram,
    batch: Batch,
    density: LogDensity,
    values: Mapping[str, Tensor],
    log_evidence: float,
    seed: int,
) -> OtherMode | None:
    """Search for the mode with the most mass that a guide does not cover; None if none is found.

    Args:
        fitted: The program of a posterior that holds a guide.
        batch: The training data, accepted.
        density: `density_to_search` of them.
        values: The guide's draws, as coordinates by site, ``(K, n)`` each.
        log_evidence: What the guide's draws say of the evidence, in nats.
        seed: Random seed of the starts.
    """
    starts = _prior_draws(fitted, batch, density, seed)
    ends = _climb(density, starts)
    centre, spread = (torch.cat([f(values[n]) for n in density.shapes]) for f in (_mean, _sd))
    best: OtherMode | None = None
    heights, _ = density(ends)
    for k in heights.argsort(descending=True).tolist():
        log_mass, sd = _laplace(density, ends[k], spread)
        if not math.isfinite(log_mass):
            continue
        far, at = ((ends[k] - centre).abs() / (spread + sd)).max(0)
        if far > _APART and (best is None or log_mass - log_evidence > best.log_mass):
            best = OtherMode(log_mass - log_evidence, float(far), _site_of(density, int(at)))
    return best


def _mean(x: Tensor) -> Tensor:
    return x.mean(0)


def _sd(x: Tensor) -> Tensor:
    return x.std(0).clamp_min(1e-12)


def _site_of(density: LogDensity, at: int) -> str:
    names = [name for name, shape in density.shapes.items() for _ in range(shape.numel())]
    return names[at]


def _prior_draws(fitted: FittedProgram, batch: Batch, density: LogDensity, seed: int) -> Tensor:
    with fitted.querying(seed):
        trace = fitted.run_prior(batch, len(batch[0]) if batch else 1, POINTS)
    sites = dict(sample_sites(trace))
    columns = [biject_to(sites[n]["fn"].support).inv(sites[n]["value"]).reshape(POINTS, -1) for n in density.shapes]
    return torch.cat(columns, 1).nan_to_num(0.0)


def _climb(density: LogDensity, starts: Tensor) -> Tensor:
    """Ascend by Adam from all starts, with a speed that falls to zero."""
    speed, q = _SPEED * _sd(starts), starts.clone()
    first, second = torch.zeros_like(q), torch.zeros_like(q)
    for step in range(_STEPS):
        _, gradient = density(q)
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient.square()
        rate = first / (1 - 0.8 ** (step + 1)) / ((second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-12)
        q = q + speed * (1 - step / _STEPS) * rate
    return q


def _laplace(density: LogDensity, mode: Tensor, spread: Tensor) -> tuple[float, Tensor]:
    """The log of the mass around a mode, and its sds, by the Hessian there; nan where that is not a mode.

    Args:
        density: The density.
        mode: A point, ``(D,)``.
        spread: The guide's sds, the unit of the coordinates.
    """
    size, step = len(mode), 0.05
    points = torch.cat([mode + step * torch.diag(spread), mode - step * torch.diag(spread)])
    padded = torch.cat([points, mode.expand(-len(points) % POINTS, size)])
    gradients = torch.cat([density(part)[1] for part in padded.split(POINTS)])[: len(points)]
    scaled = (gradients[size:] - gradients[:size]) * spread / (2 * step)
    precision = ((scaled + scaled.T) / 2).double()
    height = density(mode.expand(POINTS, size))[0][0]
    if not bool(precision.isfinite().all()) or float(torch.linalg.eigvalsh(precision).min()) <= 0:
        return math.nan, spread
    log_volume = size / 2 * math.log(2 * math.pi) - float(precision.logdet()) / 2 + float(spread.double().log().sum())
    sd = spread * torch.linalg.inv(precision).diagonal().sqrt().to(spread.dtype)
    return float(height) + log_volume, sd
