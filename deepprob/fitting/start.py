r"""Where the fit of a named guide starts: at a Gaussian near the posterior.

From the usual start a quasi-Newton path climbs the log joint. Every point of the path with its curvature is a Gaussian;
the one with the best bound is kept and improved by Newton steps on the bound,

.. math:: \Sigma^{-1} \leftarrow -\mathrm E_q[\nabla^2 \log p], \qquad
          m \leftarrow m + \Sigma \, \mathrm E_q[\nabla \log p],

with expectations over draws; then another path begins there, until little is gained. At the tip of a funnel the density
has no limit, but the bound is low: a path may lead there, the start does not.

References:
    Zhang, Carpenter, Gelman, Vehtari (2022), Pathfinder: Parallel quasi-Newton variational inference.
    Opper, Archambeau (2009), The variational Gaussian approximation revisited.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import NamedTuple, cast

import torch
from torch import Tensor

from deepprob.engine.batching import quiet
from deepprob.engine.noise import LiftedNoise
from deepprob.engine.random import RandomStream
from deepprob.engine.subject import Untraceable
from deepprob.fitting.elbo import ELBO
from deepprob.fitting.gradients import GradientGraph, GradientProgram, trace_gradients
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch
from deepprob.programs.relative_guides import RelativeGuide
from deepprob.programs.run import Run, run_guide

_MOST_NUMBERS = 1000  # of the latents; the root has their square
_FEWEST_STEPS = 100
_GRADIENTS = 500  # of the search of a program that cannot be traced
_TRACED_GRADIENTS = 5000  # of that of a traced program, which evaluates many at once
_PATH = 200  # gradients of the path
_POINTS = 400  # of a Newton step of a traced program; a pair of draws takes four times the number of latents
_MOST_PAIRS = 8
_SHIFT = 0.5  # in posterior sds: wide enough for differences of float32
_MOST_AT_ONCE = 2**22  # rows times points
_CANDIDATES = 8
_FEW_DRAWS, _DRAWS = 8, 32
_LEAST_RISE = 1e-2  # nats that the last step of a path gains at most
_ANOTHER_PATH, _ANOTHER_STEP = 1.0, 0.1  # nats that the bound gains, so that a path, or only a Newton step, follows


def start_near_posterior(instance: ProgramInstance, batch: Batch, rows: Tensor, steps: int) -> None:
    """Let a named guide start at a Gaussian near the posterior, if there is a better one than the usual start.

    The usual start stays if the user gave one, the guide is not a Gaussian guide by name, the fit is short, a run draws
    other noise than the guide's, or the log joint is not finite.

    Args:
        instance: The program before its first step.
        batch: All rows, on the device, or a sample of them.
        rows: Their indices.
        steps: Planned steps. The search does not depend on them, so that a short fit can be extended to a long one.
    """
    if steps < _FEWEST_STEPS:
        return
    guide = instance.program.current_guide
    if not isinstance(guide, RelativeGuide):
        return
    if any(instance.program.start(name) is not None for name in instance.structure.latent):
        return
    if sum(x.numel() for x in guide.locations()) > _MOST_NUMBERS:
        return
    log_joint = _LogJoint(instance, guide, batch, rows)
    if not log_joint.is_exact:
        return
    before = log_joint.mean
    found = _search(log_joint, before, _GRADIENTS if log_joint.graph is None else _TRACED_GRADIENTS)
    log_joint.mean = before
    if found is not None:
        guide.relate(found.mean, found.root)


class _Gaussian(NamedTuple):
    mean: Tensor
    root: Tensor


class _LogJoint:
    """The log joint of a program as a function of all latents, in unconstrained coordinates, in float64 on the CPU.

    It is the ELBO of the guide without noise, up to a constant. The program is traced if it can be, so that many points
    are evaluated at once.
    """

    def __init__(self, instance: ProgramInstance, guide: RelativeGuide, batch: Batch, rows: Tensor) -> None:
        self.instance, self.locations = instance, guide.locations()
        self.program = GradientProgram(instance, ELBO(analytic_kl=False))
        self.size = sum(x.numel() for x in self.locations)
        self.inputs = batch, rows
        self.evaluations, self.at_once, self.chunk = 0, True, max(1, _MOST_AT_ONCE // len(rows))
        self.graph: GradientGraph | None = None
        with instance.evaluating(), RandomStream(0, instance.device).drawing():
            size, changed = self.program.measure(*self.inputs)
            with LiftedNoise() as own, torch.no_grad():
                run_guide(Run(instance.program, instance.program.prepare(*batch), self.inputs[1], instance.num_data))
            self.is_exact = size.requests == own.size.requests and not (size.uniform or size.unserved or changed)
            self.noise = torch.zeros(-(-size.normal // 16) * 16, dtype=size.dtype, device=instance.device)
            if self.is_exact:
                with suppress(Untraceable):
                    self.graph = trace_gradients(self.program, *self.inputs)

    @property
    def mean(self) -> Tensor:
        """The mean of the guide."""
        return torch.cat([x.detach().reshape(-1) for x in self.locations]).double().cpu()

    @mean.setter
    def mean(self, value: Tensor) -> None:
        with torch.no_grad():
            for x, part in zip(self.locations, self._parts(value), strict=True):
                x.copy_(part)

    def _parts(self, point: Tensor) -> list[Tensor]:
        parts = point.split([x.numel() for x in self.locations])
        return [part.reshape(x.shape).to(x) for x, part in zip(self.locations, parts, strict=True)]

    def slope(self, point: Tensor) -> tuple[float, Tensor]:
        """The log joint and its gradient at a point; minus infinity where one is not finite."""
        values, gradients = self.slopes(point[None])
        return float(values[0]), gradients[0]

    def slopes(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The log joint and its gradient at many points, ``(P,)`` and ``(P, D)``."""
        self.evaluations += len(points)
        losses, gradients = self._evaluated(points)
        values = -self.instance.num_data * losses.detach().double().cpu()
        gradients = -self.instance.num_data * gradients.double().cpu()
        bad = ~(values.isfinite() & gradients.isfinite().all(1))
        return values.masked_fill(bad, -math.inf), gradients

    def _evaluated(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and gradients at many points."""
        points = points.to(self.noise)
        with torch.set_grad_enabled(self.graph is None):
            if self.graph is not None and self.at_once and len(points) > 1:
                with suppress(Exception), quiet():  # torch fails in many ways on a graph that works in place
                    found: tuple[Tensor, Tensor] = torch.func.vmap(self._traced, chunk_size=self.chunk)(points)
                    return found
                self.at_once = False
            losses, gradients = zip(*map(self._one, points), strict=True)
            return torch.stack(losses), torch.stack(gradients)

    def _one(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient at a point; nan where the program fails, as for a matrix that is not positive definite."""
        try:
            return self._run(point) if self.graph is None else self._traced(point)
        except (RuntimeError, ValueError):
            return point.new_full((), math.nan), torch.full_like(point, math.nan)

    def _traced(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient at a point, by the graph."""
        graph, (batch, rows) = cast(GradientGraph, self.graph), self.inputs
        own = dict(zip(map(id, self.locations), self._parts(point), strict=True))
        params = [own.get(id(p), p.detach()) for p in self.program.params]
        weight = torch.ones((), dtype=graph.noise.dtype, device=rows.device)
        inputs = batch, rows, self.noise, self.noise[:0], weight
        loss, _, gradients, _ = graph.function(params, graph.buffers, graph.fixed, *inputs)
        return loss, self._flat(gradients)

    def _run(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient at a point, by a run in Python."""
        self.mean = point
        with self.instance.evaluating(), LiftedNoise(self.noise, self.noise[:0]):
            loss, _, gradients = self.program(*self.inputs, 1.0)
        return loss, self._flat(gradients)

    def _flat(self, gradients: list[Tensor]) -> Tensor:
        known = dict(zip(map(id, self.program.params), gradients, strict=True))
        return torch.cat([known[id(x)].reshape(-1) for x in self.locations])

    def bound(self, gaussian: _Gaussian, noise: Tensor) -> float:
        """The ELBO of a Gaussian, up to a constant."""
        values, _ = self.slopes(gaussian.mean + noise @ gaussian.root.T)
        return float(values.mean() + gaussian.root.diagonal().log().sum())


def _search(log_joint: _LogJoint, start: Tensor, most: int) -> _Gaussian | None:
    """The best Gaussian that was found; None if no one is better than the usual start.

    Args:
        log_joint: The log joint.
        start: Where it begins.
        most: Gradients after which no other Newton step begins.
    """
    size = log_joint.size
    noise = torch.randn(_DRAWS, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = usual = _Gaussian(start, 0.1 * torch.eye(size, dtype=torch.float64))
    bound, gain = log_joint.bound(usual, noise), math.inf
    while gain >= _ANOTHER_STEP and log_joint.evaluations + 4 * size < most:
        before = bound
        if gain > _ANOTHER_PATH:
            candidate = _best_of_path(log_joint, found, None if found is usual else found.root @ found.root.T, noise)
            if (reached := log_joint.bound(candidate, noise)) > bound:
                found, bound = candidate, reached
        found, bound = _improve(log_joint, found, bound, noise)
        gain = bound - before
    return found if found is not usual and math.isfinite(bound) else None


def _best_of_path(log_joint: _LogJoint, start: _Gaussian, inverse: Tensor | None, noise: Tensor) -> _Gaussian:
    """The Gaussian with the best bound on a path upwards, the first one included."""
    path = _climb(log_joint, start.mean, inverse)
    count = min(_CANDIDATES, len(path))
    chosen = [path[round(i * (len(path) - 1) / max(1, count - 1))] for i in range(count)]
    roots = [(point, _root(covariance)) for point, covariance in chosen]
    gaussians = [start, *(_Gaussian(point, root) for point, root in roots if root is not None)]
    bounds = [log_joint.bound(gaussian, noise[:_FEW_DRAWS]) for gaussian in gaussians]
    return gaussians[max(range(len(bounds)), key=bounds.__getitem__)]


def _climb(log_joint: _LogJoint, point: Tensor, inverse: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Points of a BFGS path upwards, each with the path's estimate of the covariance there.

    Args:
        log_joint: The log joint.
        point: Where the path begins.
        inverse: An estimate of the inverse of the negative Hessian, or None.
    """
    value, gradient = log_joint.slope(point)
    path: list[tuple[Tensor, Tensor]] = []
    most = log_joint.evaluations + _PATH
    while math.isfinite(value) and log_joint.evaluations < most:
        step = gradient / gradient.norm() if inverse is None else inverse @ gradient
        length, new = _line_search(log_joint, point, step, value, float(step @ gradient), lengthen=inverse is None)
        gain, known = new[0] - value, inverse is not None
        if gain > 0.0:
            inverse = _updated(inverse, length * step, gradient - new[1])
            point, (value, gradient) = point + length * step, new
            if inverse is not None:
                path = [*(path[::2] if len(path) == 2 * _CANDIDATES else path), (point, inverse)]
        elif known:
            inverse = None
            continue
        if not gain > _LEAST_RISE:
            break
    return path


def _line_search(
    log_joint: _LogJoint, point: Tensor, step: Tensor, value: float, rise: float, *, lengthen: bool
) -> tuple[float, tuple[float, Tensor]]:
    """How many steps to take for a higher value, and value and gradient there."""
    length, new = 1.0, log_joint.slope(point + step)
    while not new[0] > value + 1e-4 * length * rise and length > 1e-12:
        lengthen = False
        peak = 0.5 * rise * length / max(rise * length + value - new[0], 1e-300)  # of a parabola
        length *= min(0.5, max(0.1, peak))
        new = log_joint.slope(point + length * step)
    while lengthen and (further := log_joint.slope(point + 4.0 * length * step))[0] > new[0]:
        length, new = 4.0 * length, further
    return length, new


def _updated(inverse: Tensor | None, moved: Tensor, change: Tensor) -> Tensor | None:
    """The BFGS estimate of the inverse of the negative Hessian after a step, which changed the negative gradient."""
    curvature = float(moved @ change)
    if not curvature > 1e-10 * float(moved.norm() * change.norm()):
        return inverse
    if inverse is None:
        inverse = curvature / float(change @ change) * torch.eye(len(moved), dtype=moved.dtype)
    mapped = inverse @ change
    cross = torch.outer(mapped, moved) / curvature
    square = (1.0 + float(change @ mapped) / curvature) / curvature * torch.outer(moved, moved)
    return inverse - cross - cross.T + square


def _root(covariance: Tensor) -> Tensor | None:
    """The lower Cholesky factor; None if the matrix has none in floating-point numbers."""
    root, info = torch.linalg.cholesky_ex(0.5 * (covariance + covariance.T))
    return root if int(info) == 0 and bool(root.isfinite().all()) else None


def _improve(log_joint: _LogJoint, found: _Gaussian, bound: float, noise: Tensor) -> tuple[_Gaussian, float]:
    """One Newton step on the bound, shortened until the bound rises; none if it does not.

    The gradients at draws, moved up and down along each column of the root, give the means of gradient and Hessian.
    """
    mean, root = found
    size = len(mean)
    pairs = min(_MOST_PAIRS, max(1, _POINTS // (4 * size))) if log_joint.graph is not None else 1
    half = torch.randn(pairs, size, dtype=torch.float64, generator=torch.Generator().manual_seed(log_joint.evaluations))
    draws = mean + torch.cat([half, -half]) @ root.T  # (K, D)
    points = draws[:, None] + torch.cat([_SHIFT * root.T, -_SHIFT * root.T])  # (K, 2 D, D)
    slopes = log_joint.slopes(points.reshape(-1, size))[1] @ root  # relative to the root
    gradients = slopes.reshape(-1, 2, size, size)
    if not bool(gradients.isfinite().all()):
        return found, bound
    gradient = gradients.mean((0, 1, 2))
    after, before = gradients.mean(0)
    precision = (before - after) / (2.0 * _SHIFT)
    values, vectors = torch.linalg.eigh(0.5 * (precision + precision.T))
    values = values.abs().clamp(1e-4, 1e6)
    step = root @ (vectors @ (vectors.T @ gradient / values))
    for length in (1.0, 0.5, 0.25, 0.1):
        inverse = vectors @ torch.diag(1.0 / (length * values + 1.0 - length)) @ vectors.T
        new = _root(root @ inverse @ root.T)
        if new is not None:
            gaussian = _Gaussian(mean + length * step, new)
            if (reached := log_joint.bound(gaussian, noise)) > bound:
                return gaussian, reached
    return found, bound
