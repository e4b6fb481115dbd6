"""SWAG: a Gaussian from the iterates of gradient steps at a constant learning rate.

From top to bottom: the moments of the iterates (`Moments`), the state before the first step (`init`), the routine
(`swag`), and its running fit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deepprob.errors import positive, whole
from deepprob.fitting.callbacks import Callback, Fit, callback_list
from deepprob.fitting.iterates import IteratesFit
from deepprob.fitting.loop_state import LoopState
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.points import check_common_buffers, check_global_sites
from deepprob.fitting.starting import running_fit, start_fit
from deepprob.fitting.starts import batch_of, other_starts
from deepprob.fitting.tiers import compile_choice
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.guides import with_prior_guide
from deepprob.programs.point_guide import AutoPoint
from deepprob.programs.program import Program
from deepprob.programs.relative_guides import AutoLowRankMultivariateNormal

QUICK = {"epochs": 3, "batch_size": 8, "iterates": 6, "max_rank": 4, "every": 2}
"""Settings of a short fit, for the contract tests of all routines."""

_DRAWS = 30  # of every member of multi-SWAG
_LEAST_VARIANCE = 1e-12  # of a coordinate that the steps do not move
_FEWEST = 3  # iterates that make a Gaussian
_FEWEST_BETWEEN = 10  # steps between two iterates
_SLOWER = 0.1  # the constant learning rate, in peak rates of the fit

__all__ = ["QUICK", "Moments", "init", "swag"]


class Moments:
    r"""The mean, the variances and the last of the iterates of a fit.

    Args:
        max_rank: How many of the last iterates to keep, K.

    Examples:
        >>> moments = Moments(2)
        >>> for value in (1.0, 2.0, 6.0):
        ...     moments.add(torch.tensor([value]))
        >>> moments.mean, moments.variance, [x.tolist() for x in moments.last]
        (tensor([3.]), tensor([7.]), [[2.0], [6.0]])
    """

    def __init__(self, max_rank: int) -> None:
        self.max_rank, self.count = max_rank, 0
        self.mean = self.squares = torch.zeros(0)
        self.last: list[Tensor] = []

    def add(self, point: Tensor) -> None:
        """Add an iterate, shape ``(D,)``."""
        if not self.count:
            self.mean, self.squares = torch.zeros_like(point), torch.zeros_like(point)
        self.count += 1
        off = point - self.mean
        self.mean = self.mean + off / self.count
        self.squares = self.squares + off * (point - self.mean)
        self.last = [*self.last, point][-self.max_rank :]

    @property
    def variance(self) -> Tensor:
        """The variance of every coordinate, shape ``(D,)``."""
        return self.squares / (self.count - 1)

    @property
    def gaussian(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean ``(D,)``, the sds of the independent part ``(D,)`` and the factor of the low-rank part ``(D, K)``."""
        off = torch.stack(self.last, 1) - self.mean[:, None]
        sds = (0.5 * self.variance).clamp_min(_LEAST_VARIANCE).sqrt()
        return self.mean, sds, off / (2.0 * (len(self.last) - 1)) ** 0.5

    def tensors(self) -> dict[str, Tensor]:
        """The state, for a checkpoint."""
        counts = {"count": torch.tensor(self.count), "mean": self.mean, "squares": self.squares}
        return counts | {f"last.{i}": x for i, x in enumerate(self.last)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        self.count, self.mean, self.squares = int(tensors["count"]), tensors["mean"], tensors["squares"]
        self.last = [tensors[f"last.{i}"] for i in range(min(self.count, self.max_rank))]


def init(
    program: Program,
    data: Any = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | str | None = "auto",
    optimizer: str | Optimizer | type[torch.optim.Optimizer] | None = None,
    weights: str = "auto",
    device: str | torch.device = "auto",
    seed: int = 0,
) -> LoopState:
    """The state before the first step, of which `deepprob.inference.svi.step` takes the steps of a loop by hand.

    The arguments are those of `swag`, and ``weights``, as in `svi`.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If data, program and settings do not fit together.
    """
    state = start_fit(
        program,
        data,
        routine="swag",
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        objective="elbo",
        guide=AutoPoint,
        optimizer=optimizer,
        weights=weights,
        device=device,
        seed=seed,
    )
    check_global_sites(state, "swag")
    return state


def swag(
    program: Program,
    data: Any = None,
    *,
    members: int = 1,
    max_rank: int = 20,
    iterates: int = 40,
    every: int | None = None,
    learning_rate: float | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | str | None = "auto",
    optimizer: str | Optimizer | type[torch.optim.Optimizer] | None = None,
    compile: bool | str = "auto",
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool | str = "auto",
    callbacks: Sequence[Callback | Callable[[Fit], object]] = (),
) -> Posterior:
    r"""Fit a mode, and a Gaussian to the iterates of further steps at a constant learning rate.

    .. math:: q(v) = N\Big(\bar v, \; \tfrac12 \operatorname{diag}(s^2) + \tfrac{1}{2 (K - 1)} D D^\top\Big)

    with the mean :math:`\bar v` and the variances :math:`s^2` of the :math:`T` iterates, and the deviations :math:`D`
    of the last :math:`K` iterates from that mean. The coordinates :math:`v` are unconstrained, as those of the guide
    ``"low_rank"``, which the posterior has; the mode is that of the density in these coordinates. Priors matter as in
    `map_estimate`.

    The covariance is that of the steps, not that of the posterior: it depends on learning rate and batch size. In a
    problem that is linear and Gaussian, whose loss per datum has the Hessian :math:`A`, plain gradient descent
    (``dp.Optimizer("sgd")``) at a small rate :math:`\eta` has iterates around the mode, with a covariance
    :math:`\Sigma` that solves :math:`A \Sigma + \Sigma A = \eta C / B`; :math:`C` is the covariance of the gradient of
    one row, and B the number of rows of a step. Where the model is right, C is close to A, and :math:`\Sigma` close to
    :math:`\eta I / (2 B)`, whatever the data say. The posterior's covariance is :math:`A^{-1} / N`. This holds where
    the iterates forget within a pass over the rows; in a shorter pass over shuffled rows the noise cancels, and the
    Gaussian is narrower. On all rows the steps have no noise, and it shrinks to a point.

    Args:
        program: A `Program` whose trained numbers are all latent sites, such as `BayesianNeuralNetwork`.
        data: As in `svi`.
        members: Number of fits from random starts, each with a Gaussian of its own (multi-SWAG). With one, the fit
            starts as in `map_estimate`.
        max_rank: The rank of the low-rank part, K; at most the number of iterates.
        iterates: Number of iterates, T.
        every: Steps between two iterates; None for a pass over the data, at least ten.
        learning_rate: The constant learning rate of the optimizer; None for a tenth of its peak rate.
        epochs: Passes over the data to find the mode. Without ``epochs`` and ``steps`` that fit ends when the density
            has levelled.
        steps: Gradient steps to find the mode, in place of ``epochs``.
        batch_size: As in `svi`.
        optimizer: As in `svi`, for both parts of the fit.
        compile: As in `svi`.
        device: As in `svi`.
        seed: Seed of weights and shuffle, and of the draws of multi-SWAG.
        progress: As in `svi`.
        callbacks: As in `svi`; of several members, they see the one that leads.

    Returns:
        The posterior. With one member it holds the guide ``"low_rank"``; with several it holds draws, 30 in the chain
        of each member. A fit that ends before its third iterate returns the modes, as draws.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If the program has no latent site, has sites for every row, or trains parameters that are not sites;
            or if data, program and settings do not fit together.
        DivergenceError: If too many steps in a row are skipped; it carries the last good posterior.

    References:
        Maddox, Garipov, Izmailov, Vetrov, Wilson (2019), A Simple Baseline for Bayesian Uncertainty in Deep Learning.
        Wilson, Izmailov (2020), Bayesian Deep Learning and a Probabilistic Perspective of Generalization.
        Mandt, Hoffman, Blei (2017), Stochastic Gradient Descent as Approximate Bayesian Inference.

    Examples:
        The mean is near the mode, here 1.99; a tenth of the learning rate leaves less spread:

        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> program, y = Program.of(model, data_plate="data"), torch.linspace(1.0, 3.0, 200)
        >>> def fit(rate):
        ...     sgd = Optimizer("sgd", learning_rate=0.1)
        ...     settings = {"optimizer": sgd, "steps": 200, "batch_size": 10, "progress": False}
        ...     return swag(program, y, learning_rate=rate, **settings).sample(draws=1000)["loc"]
        >>> wide, narrow = fit(0.1), fit(0.01)
        >>> bool((narrow.mean() - 1.99).abs() < 0.05), bool(narrow.std() < 0.5 * wide.std())
        (True, True)
    """
    with torch.inference_mode(False):
        callbacks, compile = callback_list(callbacks), compile_choice(compile)
        members, max_rank = whole("members", members), whole("max_rank", max_rank, least=2)
        if (iterates := whole("iterates", iterates, least=_FEWEST)) < max_rank:
            raise ValueError(
                f"max_rank={max_rank} needs as many iterates, and iterates={iterates}. Raise iterates, or lower "
                "max_rank."
            )
        weights = "auto" if members == 1 else "fresh"
        state = init(
            program,
            data,
            epochs=epochs,
            steps=steps,
            batch_size=batch_size,
            optimizer=optimizer,
            weights=weights,
            device=device,
            seed=seed,
        )
        length = state.length
        between = max(length.steps_per_epoch, _FEWEST_BETWEEN) if every is None else whole("every", every)
        rate = _SLOWER * state.learning_rate if learning_rate is None else positive("learning_rate", learning_rate)
        state.length = replace(length, tail=between * iterates, tail_rate=rate)
        own = {"guide": "point", "members": members, "max_rank": max_rank, "iterates": iterates, "every": between}
        state.config = {**state.config, **own, "constant_learning_rate": rate}
        batch = batch_of(state)
        others = other_starts(state, members, program, AutoPoint, batch_size, weights, "members")
        kind = functools.partial(_SwagFit, program=program, batch=batch, every=between, max_rank=max_rank)
        fit = running_fit(state, None, compile, callbacks, progress is not False, others, kind)
        check_common_buffers(state, "swag")
        return fit.run(progress)


class _SwagFit(IteratesFit):
    """The running fit of `swag`, which visits the iterates of its tail.

    Args:
        fit: The arguments of `MembersFit`.
        every: Steps between two iterates.
        max_rank: How many of the last iterates to keep.
        options: The keywords of `MembersFit`.
    """

    def __init__(self, *fit: Any, every: int, max_rank: int, **options: Any) -> None:
        super().__init__(*fit, **options)
        self.every = every
        self.found = [Moments(max_rank) for _ in self.starts]

    def next_visit(self, step: int) -> int:
        begins = self.course.tail_begins
        return begins + (max(0, step - begins) // self.every + 1) * self.every

    def _posterior(self) -> Posterior:
        if min(self.found[k].count for k in self.kept) < _FEWEST:
            return super()._posterior()
        if len(self.starts) == 1:
            return self._one()
        return self._several()

    def _one(self) -> Posterior:
        """The posterior of one member: a Gaussian as the guide "low_rank"."""
        mean, sds, factor = self.found[0].gaussian
        record = self._record()
        build = functools.partial(AutoLowRankMultivariateNormal, rank=factor.shape[1])
        instance = self._instance(guide=build)
        instance.guide_name = "low_rank"
        instance.program.current_guide.become(mean, sds, factor)
        record["config"]["guide"] = "low_rank"
        return self._judged(Posterior(instance, **record))

    def _several(self) -> Posterior:
        """The posterior of several members: draws from the Gaussian of each."""
        generator, drawn = torch.Generator().manual_seed(self.settings.seed), []
        for k in self.kept:
            mean, sds, factor = self.found[k].gaussian
            noise = torch.randn(_DRAWS, len(mean), generator=generator).to(mean)
            shared = torch.randn(_DRAWS, factor.shape[1], generator=generator).to(mean)
            drawn.append(mean + noise * sds + shared @ factor.T)
        chains = {name: x.detach() for name, x in self.guide.values(torch.stack(drawn)).items()}
        instance = self._instance(lambda program: with_prior_guide(program, chains))
        return self._judged(Posterior(instance, chains=chains, **self._record()))
