"""Stochastic-gradient Hamiltonian Monte Carlo: chains whose steps need the gradient on a minibatch only.

From top to bottom: the update of a step (`Dynamics`), the state before the first step (`init`), the routine (`sghmc`),
and its running fit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.errors import positive, shown, whole
from deepprob.fitting.callbacks import Anneal, Callback, Fit, callback_list
from deepprob.fitting.gradients import loss_and_gradients
from deepprob.fitting.iterates import IteratesFit
from deepprob.fitting.levelling import Levelling
from deepprob.fitting.log_joint import LogJoint
from deepprob.fitting.loop_state import LoopState
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.points import check_common_buffers, check_global_sites
from deepprob.fitting.starting import running_fit, start_fit
from deepprob.fitting.starts import batch_of, other_starts
from deepprob.fitting.state import gather_rows
from deepprob.fitting.tiers import compile_choice
from deepprob.fitting.update_rules import Carry, advance, rule_named
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.guides import with_prior_guide
from deepprob.programs.minibatch import num_rows
from deepprob.programs.point_guide import AutoPoint
from deepprob.programs.program import Program
from deepprob.sampling.hamiltonian import Run, hamiltonian_step, noise_level, share_of_shuffled
from deepprob.sampling.units import local_units

QUICK = {"chains": 2, "draws": 6, "warmup": 8, "every": 2, "batch_size": 8}
"""Settings of a short fit, for the contract tests of all routines."""

_LONGEST = 0.1  # default step, in units
_SHARE = 0.02  # most of the noise that the minibatch makes, at the default step
_LARGE = 1000  # rows of a minibatch that tells the units
_CYCLES = 4  # with cyclical=True

__all__ = ["QUICK", "Dynamics", "init", "sghmc"]


@dataclass(frozen=True)
class Dynamics(Optimizer):
    """The update of a chain's step: steps of Adam during the climb, then those of `hamiltonian_step`.

    Args:
        climb: Steps of the climb.
        friction: The share of the momentum that a step takes away.
    """

    climb: int = 0
    friction: float = 1.0

    def advance(self, carry: Carry, gradients: Sequence[Tensor], finite: Tensor, rate: Tensor, step: Tensor) -> Carry:
        """The carry after a step; see `deepprob.fitting.update_rules.advance`."""
        adam, climbs, first = self._adam, step < self.climb, step == self.climb

        def rule(
            p: Tensor, g: Tensor, moments: Sequence[Tensor], number: Tensor, rate: Tensor
        ) -> tuple[Tensor, tuple[Tensor, ...]]:
            up, (mean, square) = adam(p, g, moments, number, rate)
            momentum = torch.where(first, torch.zeros_like(moments[0]), moments[0])
            moved, momentum = hamiltonian_step(p, momentum, g, rate, self.friction)
            second = torch.where(climbs, square, moments[1])
            return torch.where(climbs, up, moved), (torch.where(climbs, mean, momentum), second)

        return advance(carry, gradients, finite, rate, step, rule)

    @property
    def _adam(self) -> Any:
        found = rule_named("adam", {})
        return found[0] if found else None


class _Steered(Anneal):
    """Sets a number of the guide at every step of a run."""

    def __init__(self, buffer: str, run: Run, at: Callable[[int], float]) -> None:
        self.buffer, self.run, self.at = buffer, run, at

    def start(self, fit: Fit) -> None:
        """Nothing: the run has its length."""

    def warm_up(self, fit: Fit) -> int:
        return 0

    def value(self, step: int, steps_per_epoch: int) -> float:
        return float(self.at(step))

    settings = property(lambda self: {**vars(self.run)})


def init(
    program: Program,
    data: Any = None,
    *,
    run: Run,
    friction: float = 0.1,
    batch_size: int | str | None = "auto",
    weights: str = "fresh",
    device: str | torch.device = "auto",
    seed: int = 0,
) -> LoopState:
    """The state of the first chain before its first step.

    Args:
        program: As in `sghmc`.
        data: As in `sghmc`.
        run: The steps of the run; its step size may change until the first step.
        friction: As in `sghmc`.
        batch_size: As in `sghmc`.
        weights: As in `sghmc`.
        device: As in `sghmc`.
        seed: As in `sghmc`.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If data, program and settings do not fit together.
    """

    def schedule(step: int, total: int) -> float:
        if step < run.climb:
            return program.learning_rate * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * step / run.climb)))
        return run.size(step)

    state = start_fit(
        program,
        data,
        routine="sghmc",
        epochs=None,
        steps=run.total,
        batch_size=batch_size,
        objective=LogJoint(),
        guide=AutoPoint,
        optimizer=Dynamics(learning_rate=1.0, schedule=schedule, climb=run.climb, friction=friction),
        weights=weights,
        device=device,
        seed=seed,
    )
    check_global_sites(state, "sghmc")
    return state


def sghmc(
    program: Program,
    data: Any = None,
    *,
    chains: int = 4,
    draws: int = 500,
    warmup: int = 1000,
    every: int = 10,
    friction: float = 0.1,
    step_size: float | None = None,
    cyclical: bool | int = False,
    batch_size: int | str | None = "auto",
    weights: str = "fresh",
    compile: bool | str = "auto",
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool | str = "auto",
    callbacks: Sequence[Callback | Callable[[Fit], object]] = (),
) -> Posterior:
    r"""Draw from the posterior by Hamiltonian or Langevin dynamics with gradients on minibatches.

    .. math:: m \leftarrow (1 - a) \, m + h \, \widehat{\nabla U}(u) + \sqrt{2 a - h^2 \hat V} \, \varepsilon, \qquad
              u \leftarrow u - h \, m, \qquad U(u) = -\log p(D, u)

    in unconstrained coordinates :math:`u`, with minus the momentum :math:`m`, the friction :math:`a` and the step size
    :math:`h`. The density is exact as :math:`h \to 0`: there is no accept step. The gradient of a minibatch has noise
    of its own. The variance :math:`\hat V` that it adds is estimated for every coordinate at the end of the climb, less
    what cancels in a pass over shuffled rows, and left out of the noise that is added. Its correlations stay, so that
    small batches of many rows need small steps. On all rows the relative error of a variance is about
    :math:`h^2 / 4`.

    Every chain first climbs to a mode from a random start by Adam, in the first half of the warm-up; the scales of a
    network's prior keep their medians for three quarters of it, and wherever a cycle looks for a mode, as the joint
    mode of scales and weights is at zero. Gradients at the end of the climb give the units of all coordinates, see
    `deepprob.sampling.units`: a step of size 1 is about a posterior sd. All chains take every step together.

    Args:
        program: A `Program` whose trained numbers are all latent sites, such as `BayesianNeuralNetwork`.
        data: As in `svi`.
        chains: Number of chains, C.
        draws: Draws of each chain, S.
        warmup: Steps before the first draw, of which the first half climbs.
        every: Steps between two draws.
        friction: The share of the momentum that a step takes away, in (0, 1]; with 1 the dynamics are Langevin's
            (SGLD), with steps of :math:`h^2`.
        step_size: The step size h, in units of the coordinates; None for 0.1, or less where the minibatch would make
            more than a fiftieth of the noise.
        cyclical: Number of cycles, which divides ``draws``; True for 4, False for a constant step size. In each, the
            step size falls from its full value to 0. The first half of a cycle has no noise and no draws, and looks for
            another mode; a cycle has twice as many steps as its draws need.
        batch_size: As in `svi`.
        weights: ``"fresh"`` starts every chain at random weights; ``"auto"`` and ``"keep"`` as in `svi`.
        compile: As in `svi`.
        device: As in `svi`.
        seed: Seed of weights, shuffle and noise.
        progress: As in `svi`.
        callbacks: As in `svi`; they see the chain that leads. The ``elbo`` of the history is the log joint density per
            datum.

    Returns:
        The posterior, which holds draws: ``posterior.chains[site]`` has shape ``(C, S, *site)``. ``deepprob.check``
        compares the chains by R-hat and effective sample size. A run that ends before its first draw returns the
        present positions.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If the program has no latent site, has sites for every row, or trains parameters that are not sites;
            or if data, program and settings do not fit together.
        DivergenceError: If all chains skip too many steps in a row; it carries the last good posterior.

    References:
        Chen, Fox, Guestrin (2014), Stochastic Gradient Hamiltonian Monte Carlo.
        Welling, Teh (2011), Bayesian Learning via Stochastic Gradient Langevin Dynamics.
        Zhang, Li, Zhang, Chen, Wilson (2020), Cyclical Stochastic Gradient MCMC for Bayesian Deep Learning.

    Examples:
        The posterior of this conjugate model is N(2, 1/3):

        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> posterior = sghmc(Program.of(model), torch.tensor([2.0, 4.0]), progress=False)
        >>> loc = posterior.chains["loc"]
        >>> loc.shape, bool((loc.mean() - 2.0).abs() < 0.1), bool((loc.std() - 3**-0.5).abs() < 0.06)
        (torch.Size([4, 500]), True, True)
    """
    with torch.inference_mode(False):
        own_callbacks, compile = callback_list(callbacks), compile_choice(compile)
        chains, friction = whole("chains", chains), _share("friction", friction)
        size = None if step_size is None else positive("step_size", step_size)
        run = _run(draws, warmup, every, cyclical, size)
        state = init(
            program,
            data,
            run=run,
            friction=friction,
            batch_size=batch_size,
            weights=weights,
            device=device,
            seed=seed,
        )
        if size is None:
            run.step_size = _default_size(friction, state.instance.num_data, state.batch_size)
        state.config = {**state.config, "guide": "point", "chains": chains, "friction": friction, **vars(run)}
        batch = batch_of(state)
        others = other_starts(state, chains, program, AutoPoint, batch_size, weights, "chains")
        kind = functools.partial(_ChainsFit, program=program, batch=batch, plan=run, friction=friction)
        noise = _Steered("noise_level", run, lambda i: noise_level(friction, run.size(i)) if run.is_hot(i) else 0.0)
        own_callbacks += [noise, _Steered("released", run, run.is_released)]
        fit = running_fit(state, None, compile, own_callbacks, progress is not False, others, kind)
        check_common_buffers(state, "sghmc")
        return fit.run(progress)


def _run(draws: Any, warmup: Any, every: Any, cyclical: Any, size: float | None) -> Run:
    """The steps of a run, checked."""
    draws, every = whole("draws", draws), whole("every", every)
    cycles = (_CYCLES if cyclical else 0) if isinstance(cyclical, bool) else whole("cyclical", cyclical)
    if cycles and draws % cycles:
        raise ValueError(
            f"draws must be a multiple of the number of cycles, {cycles}; got {draws}. Write draws="
            f"{max(1, draws // cycles) * cycles}, or another number for cyclical."
        )
    return Run(whole("warmup", warmup, least=2), draws, every, cycles, size or _LONGEST)


def _share(name: str, value: Any) -> float:
    """A number above 0 and at most 1, checked."""
    number = positive(name, value)
    if number > 1.0:
        raise ValueError(f"{name} must be at most 1, at which no momentum is left; got {shown(value)}.")
    return number


def _default_size(friction: float, rows: int, batch_size: int) -> float:
    """The step size whose minibatches make at most a share of the noise, if rows have about the same curvature.

    The gradient on B of N rows then has the variance N / B - 1 in units of the coordinates.

    Examples:
        >>> [round(_default_size(0.1, *rows), 3) for rows in ((100, 100), (200, 20), (100_000, 100))]
        [0.1, 0.08, 0.005]
    """
    size, extra, passed = _LONGEST, rows / batch_size - 1.0, math.ceil(rows / batch_size)
    while size**2 * extra * share_of_shuffled(passed, friction, size) > 2.0 * friction * _SHARE:
        size *= 0.8
    return size


class _Draws:
    """The draws of a chain, in unconstrained coordinates."""

    def __init__(self) -> None:
        self.points: list[Tensor] = []

    def add(self, point: Tensor) -> None:
        self.points.append(point)

    def tensors(self) -> dict[str, Tensor]:
        return {"points": torch.stack(self.points)} if self.points else {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.points = list(tensors["points"]) if tensors else []


class _ChainsFit(IteratesFit):
    """The running fit of `sghmc`.

    Args:
        fit: The arguments of `MembersFit`.
        plan: The steps of the run.
        friction: The friction.
        options: The keywords of `MembersFit`.
    """

    noun, keyword = "chain", "chains"

    def __init__(self, *fit: Any, plan: Run, friction: float, **options: Any) -> None:
        super().__init__(*fit, **options)
        self.plan, self.friction = plan, friction
        self.found = [_Draws() for _ in self.starts]

    def _levelling(self) -> Levelling:
        found = Levelling(1.0, self.state.instance.num_data)
        found.fixed(0, 0)  # the density of a chain does not level
        return found

    def next_visit(self, step: int) -> int:
        return self.plan.next_draw(step)

    def _next_stop(self) -> int:
        end = super()._next_stop()
        return min(end, self.plan.climb) if self.step < self.plan.climb else end

    def visit(self) -> None:
        super().visit()
        if self.step == self.plan.climb:
            self._take_units()

    def _take_units(self) -> None:
        """Let the coordinates have units in which a step of size 1 is about a posterior sd, where the chains are."""
        instance, guide, points = self.state.instance, self.guide, []
        for k in self.kept:
            self._enter(self.starts[k])
            points.append([p.detach().clone() for p in guide.points()])
        guide.released.fill_(1.0)  # until the next step sets it
        units, variances = local_units(self._gradient, points, torch.Generator().manual_seed(self.settings.seed))
        share = share_of_shuffled(self.steps_per_epoch, self.friction, self.plan.step_size)
        with torch.no_grad():
            for own, new in zip(guide.units_of_points(), units, strict=True):
                own.copy_(new)
            for own, new in zip(guide.variances_of_points(), variances, strict=True):
                own.copy_(share * new)
        unit_of = {id(p): unit for p, unit in zip(guide.points(), units, strict=True)}
        for start in self.starts:
            carry, packing = start.at.carry, self.state.packing
            pairs = zip(self.state.params.values(), packing.unpack(carry["packed"]), strict=True)
            packed = packing.pack([x / unit_of[id(p)] if id(p) in unit_of else x for p, x in pairs])
            start.at = start.at._replace(carry={**carry, "packed": [x.detach().clone() for x in packed]})
        self._enter(self._leader)
        instance.graphs.clear()

    def _gradient(self, point: Sequence[Tensor], number: int, large: bool) -> list[Tensor]:
        """The gradient of the energy at a point, on a minibatch; without units."""
        size = max(self.settings.batch_size, _LARGE) if large else self.settings.batch_size
        instance, guide, numbers = self.state.instance, self.guide, self.buckets.numbers
        count, order = num_rows(self.data) if self.data else instance.num_data, torch.Generator().manual_seed(number)
        chosen = torch.randperm(count, generator=order)[:size].to(instance.device)
        rows = chosen if numbers is None else numbers[chosen]
        with torch.no_grad():
            for own, new in zip(guide.points(), point, strict=True):
                own.copy_(new)
        with instance.running(), RandomStream(number, instance.device).drawing():
            batch = gather_rows(self.data, chosen) if self.data else ()
            return loss_and_gradients(instance, LogJoint(), guide.points(), batch, rows, 1.0)[2]

    def _posterior(self) -> Posterior:
        drawn = [torch.stack(self.found[k].points) for k in self.kept if self.found[k].points]
        if not drawn:
            return super()._posterior()
        count = min(map(len, drawn))  # a chain that was out for a moment has fewer
        values = self.guide.values(torch.stack([x[-count:] for x in drawn]))
        chains = {name: x.detach() for name, x in values.items()}
        instance = self._instance(lambda program: with_prior_guide(program, chains))
        return self._judged(Posterior(instance, chains=chains, **self._record()))
