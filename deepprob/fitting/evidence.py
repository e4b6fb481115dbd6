r"""Scales of priors and noise by the marginal likelihood of a Laplace approximation.

.. math:: \log p(y \mid h) \approx \log p(y \mid \hat w, h) + \log p(\hat w \mid h) + \tfrac D2 \log 2\pi
          - \tfrac12 \log \det P(h), \qquad P(h) = \rho(h) H + \mathrm{diag}(\delta(h))

with hyperparameters h, the mode :math:`\hat w` of D weights, the curvature H of the likelihood there, and the prior's
precision :math:`\delta`. The curvature is taken to change by one factor,

.. math:: \rho(h) = \frac{\sum_i \mathrm{tr}\, F_i(h) V_i}{\sum_i \mathrm{tr}\, F_i(\hat h) V_i}

with the Fisher information :math:`F_i` of row i and the variance :math:`V_i` of its distribution's parameters under the
approximation at :math:`\hat h`. That is exact for one noise of all rows, and otherwise has the exact gradient at
:math:`\hat h`, which is where the search ends if it is repeated.

References:
    MacKay (1992), A Practical Bayesian Framework for Backpropagation Networks.
    Immer, Bauer, Fortuin, Rätsch, Khan (2021), Scalable Marginal Likelihood Estimation for Model Selection.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from deepprob.distributions.structured_normal import StructuredNormal
from deepprob.fitting.at_mode import AtMode
from deepprob.fitting.fisher import information
from deepprob.fitting.precision import Part
from deepprob.programs.laplace import NO_MODE
from deepprob.programs.run import Run

_DRAWS, _STEP = 8, 1e-2  # of the variance of parameters: draws, and the share of their deviation to move by
_STEPS = 20  # of a search


class Evidence:
    """The log marginal likelihood of a Laplace approximation, as a function of hyperparameters.

    Args:
        mode: The program at its mode.
        names: The weights of the approximation.
        parts: The curvature of the likelihood in them.
        sites: Latent sites that are hyperparameters.
        known: Hyperparameters that are attributes of the program: positive numbers.
    """

    def __init__(
        self, mode: AtMode, names: Collection[str], parts: Sequence[Part], sites: Collection[str], known: Sequence[str]
    ) -> None:
        self.mode, self.names, self.parts = mode, frozenset(names), list(parts)
        self.sites, self.known = frozenset(sites), list(known)
        guide = mode.guide
        held = torch.zeros(guide.latent_dim, dtype=torch.bool, device=guide.loc.device)
        for name in self.sites:
            held[guide.sites[name]] = True
        self.places = held.nonzero().flatten()
        logs = [math.log(float(getattr(mode.program, name))) for name in self.known]
        self.start = torch.cat([guide.loc.detach()[self.places], guide.loc.new_tensor(logs)])
        self.variances: list[list[Tensor]] = []  # of the parameters of observed distributions, by run

    # -- terms ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _known_as(self, h: Tensor) -> Iterator[None]:
        """A context in which the program's attributes have other values."""
        program = self.mode.program
        before = [getattr(program, name) for name in self.known]
        try:
            for name, value in zip(self.known, h[len(self.places) :].exp(), strict=True):
                setattr(program, name, value)
            yield
        finally:
            for name, value in zip(self.known, before, strict=True):
                setattr(program, name, value)

    def _values(self, h: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values of all sites: hyperparameters from h, the others at the mode."""
        latent = self.mode.guide.loc.detach().index_copy(0, self.places, h[: len(self.places)])
        return {n: x if n in self.sites else leaves[n] for n, x in self.mode.values(latent).items()}

    def prior(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-densities of weights and of hyperparameters, and the precision of the weights' prior, ``(D,)``.

        Args:
            h: The hyperparameters, unconstrained.

        Raises:
            ValueError: If the weights are not independent in the prior.
        """
        mode, leaves = self.mode, self.mode.leaves(self.names)
        with mode.running(), self._known_as(h):
            trace = mode.trace(next(mode.runs(rows=1)), self._values(h, leaves))
            of_weights, of_scales = mode.log_prior(trace, self.names), mode.log_prior(trace, self.sites)
            weights = [x for name, x in leaves.items() if name in self.names]
            slopes = torch.autograd.grad(of_weights, weights, create_graph=True)
            found = [self._second(slopes, weights, probe) for probe in (None, torch.Generator().manual_seed(0))]
        first, second = (torch.cat([x.flatten() for x in parts]) for parts in found)
        if not bool((first - second).abs().max() <= 1e-3 * first.abs().max().clamp_min(1e-12)):
            raise ValueError(
                "laplace needs a prior under which the weights are independent given their scales; that of "
                f"{', '.join(sorted(self.names))} is not. Use independent priors, or svi(..., guide='low_rank')."
            )
        latent = mode.guide.loc.new_zeros(mode.guide.latent_dim, dtype=torch.float64)
        places = [mode.guide.sites[name] for name in leaves if name in self.names]
        index = torch.cat([torch.arange(p.start, p.stop, device=latent.device) for p in places])
        # A prior that is not log-concave at a weight counts as flat there.
        return of_weights, of_scales, latent.index_copy(0, index, first.clamp_min(0.0).double())

    @staticmethod
    def _second(slopes: Sequence[Tensor], weights: Sequence[Tensor], probe: torch.Generator | None) -> list[Tensor]:
        """The negative second derivatives, from one product with ones or random signs."""
        signs = [
            torch.ones_like(x) if probe is None else (torch.rand(x.shape, generator=probe).to(x) < 0.5) * 2.0 - 1.0
            for x in weights
        ]
        total = sum((g * s).sum() for g, s in zip(slopes, signs, strict=True))
        if not (isinstance(total, Tensor) and total.requires_grad):  # a prior whose log-density is linear or flat
            return [torch.zeros_like(x) for x in weights]
        found = torch.autograd.grad(total, weights, create_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if d is None else -d * s for d, s, x in zip(found, signs, weights, strict=True)]

    def likelihood(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The log-likelihood of all rows, and the sum of their information times the parameters' variances."""
        mode, leaves = self.mode, self.mode.leaves(())
        total = trace_of = torch.zeros((), dtype=torch.float64, device=h.device)
        with mode.running(), self._known_as(h):
            for number, run in enumerate(mode.runs()):
                trace = mode.trace(run, self._values(h, leaves))
                total = total + mode.log_likelihood(trace, run).double()
                found = [x for site, _ in mode.observed(trace, run) for _, x in information(site)]
                for x, v in zip(found, self.variances[number] if self.variances else (), strict=False):
                    trace_of = trace_of + (x * v).sum().double()
        return total, trace_of

    @cached_property
    def at_start(self) -> tuple[bool, float]:
        """Whether the likelihood depends on hyperparameters, and its logarithm at the mode."""
        h = self.start.clone().requires_grad_()
        value, _ = self.likelihood(h)
        return value.requires_grad, float(value.detach())

    def _spread(self) -> None:
        """Find the variances of the parameters of observed distributions under the approximation."""
        mode, loc = self.mode, self.mode.guide.loc.detach()
        precision = self.prior(self.start)[2].detach()
        blocks = [part.block(precision[part.index.flatten()]) for part in self.parts]
        with mode.running(), torch.no_grad():
            draws = StructuredNormal(torch.zeros_like(precision), blocks).sample((_DRAWS,)).to(loc)
            self.variances = []
            for run in mode.runs():
                here = self._parameters(loc, run)
                moved = [self._parameters(loc + _STEP * draw, run) for draw in draws]
                squares = [[((x - y) / _STEP).square() for x, y in zip(m, here, strict=True)] for m in moved]
                self.variances.append([torch.stack(x).mean(0) for x in zip(*squares, strict=True)])

    def _parameters(self, latent: Tensor, run: Run) -> list[Tensor]:
        trace = self.mode.trace(run, self.mode.values(latent))
        return [p for site, _ in self.mode.observed(trace, run) for p, _ in information(site)]

    # -- the whole -----------------------------------------------------------------------------------------------

    def log_det(self, precision: Tensor, ratio: Tensor) -> Tensor:
        """The logarithm of the determinant of the whole precision."""
        try:
            return torch.stack([p.log_det(precision[p.index.flatten()], ratio) for p in self.parts]).sum()
        except RuntimeError as error:
            raise ValueError(NO_MODE) from error

    def value(self, h: Tensor | None = None, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The log marginal likelihood, and the log-density of the hyperparameters.

        Args:
            h: The hyperparameters; None for those of the mode.
            before: The information of the rows at the mode, see `likelihood`; None for the curvature of the mode.
        """
        h = self.start if h is None else h
        of_weights, of_scales, precision = self.prior(h)
        varies, fixed = self.at_start
        likelihood, now = self.likelihood(h) if varies else (torch.tensor(fixed), None)
        one = torch.ones((), dtype=torch.float64, device=h.device)
        ratio = one if before is None or now is None or not float(before) > 0 else now / before
        size = sum(part.index.numel() for part in self.parts)
        constant = 0.5 * size * math.log(2.0 * math.pi)
        return likelihood + of_weights + constant - 0.5 * self.log_det(precision, ratio), of_scales

    @cached_property
    def total(self) -> float:
        """The log marginal likelihood plus the log-density of the hyperparameters, at the mode; what `best` raises."""
        value, of_scales = self.value()
        return float((value + of_scales).detach())

    def best(self) -> Tensor:
        """The hyperparameters with the highest log marginal likelihood plus log-density, unconstrained.

        Raises:
            ValueError: If the search leaves the finite numbers.
        """
        h, before = self.start.clone().requires_grad_(), None
        if self.at_start[0]:
            self._spread()
            before = self.likelihood(self.start)[1].detach()
        search = torch.optim.LBFGS([h], max_iter=_STEPS, line_search_fn="strong_wolfe", tolerance_change=1e-6)

        def loss() -> Tensor:
            search.zero_grad()
            value, of_scales = self.value(h, before)
            total = -(value + of_scales)
            (h.grad,) = torch.autograd.grad(total, h)
            return total.detach()

        with torch.enable_grad():
            search.step(loss)
        if not bool(h.isfinite().all()):
            raise ValueError(
                "the search for scales by the marginal likelihood left the finite numbers. Give them: "
                "BayesianNeuralNetwork(prior='normal', prior_scale=..., noise=...) and tune=False."
            )
        return h.detach()
