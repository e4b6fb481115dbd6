r"""Annealed importance sampling of the evidence of rows, from the guide to the posterior.

.. math:: \log \pi_t(u) = (1 - b_t) \log q(u \mid x) + b_t \log p(x, u), \qquad 0 = b_0 < b_1 < \dots < b_T = 1

.. math:: \log w = \sum_{t=1}^T (b_t - b_{t-1}) \log \frac{p(x, u_{t-1})}{q(u_{t-1} \mid x)}, \qquad
    u_0 \sim q, \quad u_t \sim \mathrm{HMC}(u_{t-1}; \pi_t)

The mean of the weights is an unbiased estimate of the evidence. A chain that starts at an exact draw from the posterior
and goes the other way has weights whose mean reciprocal is an unbiased estimate of the reciprocal evidence, and so
bounds it from above (bidirectional Monte Carlo).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor
from torch.distributions import Transform, biject_to

from deepprob.posteriors.draws import Fixed
from deepprob.posteriors.fitted import FittedProgram
from deepprob.posteriors.guide_draws import has_coordinates, log_weights_of, scored_job
from deepprob.programs.layout import Layout
from deepprob.programs.run import Run, run_guide
from deepprob.programs.sites import Site, drawn_sites
from deepprob.programs.structure import is_discrete

_LEAPFROGS = 6  # of a transition
_ACCEPTED, _GAIN, _FIRST_SIZE = 0.7, 0.3, 0.4  # of the step sizes, in sds of the guide
_PILOT = 4  # the pilot run, which chooses step sizes, has this part of the steps
_SPREAD = 64  # draws for the guide's sds
_STEEP = 4.0  # of the schedule, which is dense at both ends


@dataclass(frozen=True)
class Step:
    """Densities of coordinates, ``(K, B)``, and the gradient of ``log q + b log w``, ``(K, B, D)``."""

    log_q: Tensor
    log_weight: Tensor
    gradient: Tensor

    def density(self, share: float) -> Tensor:
        """The annealed log-density."""
        return self.log_q + share * self.log_weight


class Path:
    """The densities between the guide and the posterior of the latents of rows, in unconstrained coordinates.

    Args:
        fitted: The fitted program; its latents are local.
        run: A prepared run with K draws; data that the program draws anew are drawn.

    Raises:
        ValueError: If a latent of the guide is discrete.
    """

    def __init__(self, fitted: FittedProgram, run: Run) -> None:
        self.structure, self.run = fitted.structure, run
        self.chains = run.draws or 1
        self.stacks = fitted._draws.stacks(scored_job(fitted), run)
        self.sites = self._drawn(replace(run, draws=None))
        self.maps: dict[str, Transform] = {n: biject_to(s["fn"].support) for n, s in self.sites.items()}

    def _drawn(self, run: Run) -> dict[str, Site]:
        found = drawn_sites(run_guide(run))
        for name, site in found.items():
            if is_discrete(site):
                raise ValueError(
                    f"annealing moves latent values by gradients, but site {name!r} is discrete. Ask for "
                    "evidence without annealing=, or sum the site out."
                )
        return {name: site for name, site in found.items() if has_coordinates(site)}

    def draw(self, draws: int) -> Tensor:
        """Coordinates drawn from the guide, ``(K, B, D)``."""
        runs = [replace(self.run, draws=draws)] if self.stacks else [replace(self.run, draws=None)] * draws
        return torch.cat([self._join({n: s["value"] for n, s in self._drawn(run).items()}, run) for run in runs])

    def coordinates(self, values: Mapping[str, Tensor]) -> Tensor:
        """Coordinates of one value of every latent site, ``(1, B, D)``."""
        return self._join(values, replace(self.run, draws=None))

    def _join(self, values: Mapping[str, Tensor], run: Run) -> Tensor:
        parts = []
        for name, site in self.sites.items():
            u = self.maps[name].inv(values[name].reshape(run.draws or 1, *site["value"].shape))
            parts.append(u.movedim(self._row_axis(site), 1).flatten(2) if u.dim() > 2 else u.unsqueeze(-1))
        return torch.cat(parts, -1)

    def _split(self, q: Tensor) -> dict[str, Tensor]:
        """Values of every site at coordinates ``(K, B, D)``, in the shape of a run."""
        found, start = {}, 0
        for name, site in self.sites.items():
            shape, axis = list(site["value"].shape), self._row_axis(site)
            rows = shape.pop(axis - 1)
            part = q[..., start : (start := start + math.prod(shape))]
            found[name] = part.reshape(len(q), rows, *shape).movedim(1, axis)
        return found

    def _row_axis(self, site: Site) -> int:
        """The axis of rows in coordinates with the chains first; supports may not change the number of axes."""
        (row,) = (f.dim for f in site["cond_indep_stack"] if f.name == self.structure.row_plate and f.vectorized)
        return int(1 + site["value"].dim() - site["fn"].event_dim + row)

    def __call__(self, q: Tensor, share: float) -> Step:
        """Densities and the annealed gradient at coordinates ``(K, B, D)``."""
        if self.stacks:
            return self._at(q, share, replace(self.run, draws=len(q)))
        found = [self._at(part, share, replace(self.run, draws=None)) for part in q.split(1)]
        return Step(*(torch.cat([getattr(x, n) for x in found]) for n in ("log_q", "log_weight", "gradient")))

    def _at(self, q: Tensor, share: float, run: Run) -> Step:
        layout = Layout(self.structure.row_plate, run.plates, run.draws or 1)
        with torch.enable_grad():
            q = q.detach().requires_grad_()
            points = {n: u if run.draws else u[0] for n, u in self._split(q).items()}
            with Fixed({n: self.maps[n](u) for n, u in points.items()}):
                weights, guide_trace = log_weights_of(self.structure, layout, True, run)
            sites = drawn_sites(guide_trace)
            log_q = sum(layout.log_prob(sites[n]) + self._jacobian(layout, n, u, sites[n]) for n, u in points.items())
            (gradient,) = torch.autograd.grad((log_q + share * weights).sum(), q)
        return Step(torch.as_tensor(log_q).detach(), weights.detach(), gradient)

    def _jacobian(self, layout: Layout, name: str, u: Tensor, site: Site) -> Tensor:
        """The log-Jacobian of a site's map by chain and row, ``(K, B)``."""
        found = self.maps[name].log_abs_det_jacobian(u, site["value"])
        found = sum_rightmost(found, site["fn"].event_dim - self.maps[name].codomain.event_dim)
        return layout.by_row(torch.as_tensor(scale_and_mask(found, 1.0, site["mask"])), site["cond_indep_stack"])


@dataclass(frozen=True)
class Kernel:
    """Hamiltonian transitions along a path, with the step sizes that a pilot run chose.

    Because they were chosen by other chains, every transition leaves its density as it is, and the bounds hold.

    Attributes:
        path: The path.
        unit: The guide's sd of every coordinate, ``(B, D)``.
        sizes: Step sizes along the path, ``(pilot steps, B)``.
    """

    path: Path
    unit: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, path: Path, steps: int) -> Kernel:
        """The kernel of a path, from a pilot run that is shorter than a run of some steps.

        Args:
            path: The path.
            steps: Number of steps of later runs.
        """
        spread = path.draw(_SPREAD)
        unit = spread.std(0).clamp_min(torch.finfo(spread.dtype).tiny ** 0.5)
        size = torch.full(unit.shape[:1], _FIRST_SIZE, dtype=unit.dtype, device=unit.device)
        q, sizes = path.draw(path.chains), []
        for share in schedule(max(10, steps // _PILOT))[1:]:
            kernel = cls(path, unit, size.unsqueeze(0))
            q, accepted = kernel.move(q, path(q, share), share)
            size = size * (_GAIN * (accepted.mean(0) - _ACCEPTED)).exp()
            sizes.append(size)
        return cls(path, unit, torch.stack(sizes))

    def move(self, q: Tensor, first: Step, share: float) -> tuple[Tensor, Tensor]:
        """One transition: the new coordinates, and the probability of acceptance by chain and row.

        Args:
            q: Coordinates, ``(K, B, D)``.
            first: The densities there.
            share: The place on the path, b.
        """
        shares = schedule(len(self.sizes))[1:]
        place = min(sum(b < share for b in shares), len(shares) - 1)
        jitter = 0.8 + 0.4 * torch.rand(q.shape[:2], dtype=q.dtype, device=q.device)
        size = (self.sizes[place] * jitter).unsqueeze(-1) * self.unit  # (K, B, D)
        momentum = torch.randn_like(q)
        step, moved, p = first, q, momentum
        for _ in range(_LEAPFROGS):
            p = p + 0.5 * size * step.gradient
            moved = moved + size * p
            step = self.path(moved, share)
            p = p + 0.5 * size * step.gradient
        change = step.density(share) - first.density(share)
        change = change + 0.5 * (momentum.square().sum(-1) - p.square().sum(-1))
        probability = change.exp().clamp(max=1.0).nan_to_num(0.0)
        accepted = torch.rand_like(probability) < probability
        return torch.where(accepted.unsqueeze(-1), moved, q), probability

    def log_weights(self, q: Tensor, steps: int, *, backward: bool = False) -> Tensor:
        """Log-weights of chains, ``(K, B)``.

        Args:
            q: Draws from the guide, or exact draws from the posterior for chains that go backward, ``(K, B, D)``.
            steps: Number of steps, T.
            backward: Whether the chains go from the posterior to the guide.
        """
        shares = schedule(steps)
        pairs = [*itertools.pairwise(shares)]
        total = torch.zeros(q.shape[:2], dtype=torch.float64, device=q.device)
        for low, high in reversed(pairs) if backward else pairs:
            share = low if backward else high
            step = self.path(q, share)
            total += (high - low) * step.log_weight.double()
            if 0 < share < 1:
                q, _ = self.move(q, step, share)
        return total


def schedule(steps: int) -> list[float]:
    """The places on the path from 0 to 1, by a logistic curve.

    Examples:
        >>> [round(b, 3) for b in schedule(4)]
        [0.0, 0.105, 0.5, 0.895, 1.0]
    """
    at = [1 / (1 + math.exp(-_STEEP * (2 * t / steps - 1))) for t in range(steps + 1)]
    return [(b - at[0]) / (at[-1] - at[0]) for b in at]


def annealed_weights(fitted: FittedProgram, batch: Any, chains: int, steps: int) -> Tensor:
    """Log-weights of chains from the guide to the posterior of accepted rows, ``(K, B)``."""
    path = Path(fitted, fitted.prepared(batch, chains))
    return Kernel.of(path, steps).log_weights(path.draw(chains), steps)


def sandwich(
    fitted: FittedProgram, batch: Any, latents: Mapping[str, Tensor], chains: int, steps: int
) -> tuple[Tensor, Tensor]:
    """Bounds of the log evidence of simulated rows from below and from above, each ``(B,)``.

    Args:
        fitted: The fitted program.
        batch: Rows drawn from its model, accepted.
        latents: The latent values that they were drawn with, an exact draw from their posterior.
        chains: Number of chains each way, K.
        steps: Number of steps, T.
    """
    path = Path(fitted, fitted.prepared(batch, chains))
    if unknown := [name for name in path.sites if name not in latents]:
        raise ValueError(f"the guide draws {', '.join(unknown)}, of which the model draws no value.")
    kernel = Kernel.of(path, steps)
    exact = path.coordinates(latents)
    up = kernel.log_weights(path.draw(chains), steps)
    down = kernel.log_weights(exact.expand(chains, -1, -1), steps, backward=True)
    return up.logsumexp(0) - math.log(chains), math.log(chains) - (-down).logsumexp(0)
