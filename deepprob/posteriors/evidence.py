"""The noun `Evidence`: the log evidence of rows by importance sampling, with its sampling error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepprob.posteriors.annealing import annealed_weights
from deepprob.posteriors.densities import joint_weights, row_weights
from deepprob.posteriors.fitted import FittedProgram
from deepprob.programs.minibatch import Batch

# Numbers of one argument, of all particles together, in one run: its activations stay in a processor's caches, which
# is faster by a half than a run that fills memory. A graphics processor is busy only with larger runs.
_CACHED, _BUSY = 2**21, 2**24


@dataclass(frozen=True)
class Evidence:
    r"""Log evidence by importance sampling, in nats.

    .. math:: \log \hat p(x) = \log \frac1K \sum_k w_k, \qquad w_k = \frac{p(x, z_k)}{q(z_k \mid x)}, \qquad
        \mathrm{se}^2 = \frac{K / \mathrm{ess} - 1}{K - 1}, \qquad \mathrm{ess} = \frac{(\sum_k w_k)^2}{\sum_k w_k^2}

    The estimate of :math:`p(x)` is unbiased, so that the value is a lower bound in expectation; to first order it is
    too low by half of the squared standard error. With an effective sample size of a few particles both numbers mean
    little.

    Attributes:
        value: One number by row, ``(B,)``, if all latents are local, else one for all rows.
        se: Standard error of the particles, by the delta method, of the same shape; nan for one particle.
        ess: Effective sample size, of the same shape.
        particles: Number of particles, K.

    Examples:
        The weights of an exact guide are all equal:

        >>> Evidence.of_weights([torch.full((4, 2), -3.0)])
        Evidence: -3.000 nats per row on average (2 rows, 4 particles each; effective sample sizes from 4 to 4)
    """

    value: Tensor
    se: Tensor
    ess: Tensor
    particles: int

    @classmethod
    def of_weights(cls, parts: Iterable[Tensor]) -> Evidence:
        """The evidence from log-weights that come in parts of particles.

        Args:
            parts: Log-weights, each part of shape ``(particles, *rows)``.
        """
        first = second = torch.tensor(-math.inf, dtype=torch.float64)
        count = 0
        for part in parts:
            weights, count = part.double(), count + len(part)
            first = torch.logaddexp(first.to(weights.device), weights.logsumexp(0))
            second = torch.logaddexp(second.to(weights.device), (2 * weights).logsumexp(0))
        ess = (2 * first - second).exp().clamp(max=count)
        se = ((count / ess - 1) / (count - 1)).sqrt() if count > 1 else torch.full_like(ess, math.nan)
        return cls(first - math.log(count), se, ess, count)

    @property
    def mean(self) -> float:
        """The mean over rows."""
        return float(self.value.mean())

    @property
    def mean_se(self) -> float:
        """Standard error of `mean` as an estimate for all rows that the given ones were drawn from.

        The spread between rows contains the error of the particles. Of one number for all rows it is `se`.
        """
        return float(self.value.std() / len(self.value) ** 0.5) if self.value.dim() else float(self.se)

    @property
    def mean_mc_se(self) -> float:
        """Standard error of `mean` as an estimate for the given rows: that of the particles alone."""
        return float(self.se.square().sum().sqrt() / max(self.se.numel(), 1))

    def __repr__(self) -> str:
        digits = 2 if self.mean_se >= 0.005 else 3
        spread = f" ± {self.mean_se:.{digits}f}" if self.mean_se > 0 else ""
        start, count = f"Evidence: {self.mean:.{digits}f}{spread} nats", f"{self.particles} particles"
        if not self.value.dim():
            return f"{start} for all rows together ({count}; effective sample size {float(self.ess):.3g})"
        noise = f", ± {self.mean_mc_se:.3f} from the particles" if self.mean_mc_se >= 0.0005 else ""
        sizes = f"effective sample sizes from {float(self.ess.min()):.3g} to {float(self.ess.max()):.3g}"
        return f"{start} per row on average ({len(self.value)} rows, {count} each{noise}; {sizes})"


def weight_parts(fitted: FittedProgram, batch: Batch, particles: int) -> Iterator[Iterator[Tensor]]:
    """The log-weights of an accepted batch, by chunk of rows and, within one, by part of the particles.

    Data that the program draws anew at every use, such as binary pixels, are drawn once for all particles of a row.

    Args:
        fitted: The fitted program.
        batch: Its arguments.
        particles: Number of particles, K.

    Yields:
        For every chunk of rows its parts, ``(k, rows)``; if latents are not local, one chunk with parts ``(k,)``.
    """
    most, by_row = _most(fitted), fitted.amortized
    for chunk in fitted.chunks(batch, particles, most) if by_row else [batch]:
        run = fitted.prepared(chunk, particles, weighted=not by_row)
        size = max((x.numel() for x in run.batch if isinstance(x, Tensor)), default=1)
        parts = _split(particles, max(1, most // max(size, 1)))
        runs = (replace(run, draws=count) for count in parts)
        yield (row_weights(fitted, part) if by_row else joint_weights(fitted, part) for part in runs)


def _split(total: int, most: int) -> Iterator[int]:
    """Parts of almost equal size."""
    count = -(-total // most)
    return (total // count + (i < total % count) for i in range(count))


def evidence_of(fitted: FittedProgram, batch: Batch, particles: int, annealing: int = 0) -> Evidence:
    """The evidence of an accepted batch, by importance sampling or with steps of annealing."""
    if annealing:
        chunks = fitted.chunks(batch, particles, _most(fitted))
        found = [Evidence.of_weights([annealed_weights(fitted, chunk, particles, annealing)]) for chunk in chunks]
    else:
        found = [Evidence.of_weights(parts) for parts in weight_parts(fitted, batch, particles)]
    if len(found) == 1:
        return found[0]
    value, se, ess = (torch.cat([getattr(part, name) for part in found]) for name in ("value", "se", "ess"))
    return Evidence(value, se, ess, particles)


def _most(fitted: FittedProgram) -> int:
    return _CACHED if fitted.instance.device.type == "cpu" else _BUSY
