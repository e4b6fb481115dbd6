"""The Laplace approximation of a program at a mode: which sites, with which curvature, prior and scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepprob.distributions.structured_normal import Block
from deepprob.errors import unknown, whole
from deepprob.fitting.at_mode import AtMode
from deepprob.fitting.curvature import MOST_DENSE, STRUCTURES, Curvature
from deepprob.fitting.evidence import Evidence
from deepprob.fitting.precision import DensePart, IndependentPart, Part
from deepprob.fitting.to_mode import to_mode
from deepprob.programs.laplace import precision_at_mode
from deepprob.programs.network_program import NetworkProgram

PREDICTIONS = ("auto", "linearised", "sampled")
_POLISHES, _FEW = 60, 8  # steps to the mode, and those between searches for scales
_ROUNDING = 1e-3  # nats
_SAME = 0.02  # change of the logarithm of a scale after which no other search follows
_MOST_MOVED = 1.0  # of the logarithm of a scale, in one search: the curvature is that of the present mode


@dataclass(frozen=True)
class Choice:
    """The settings of a Laplace approximation, as the user gave them.

    Attributes:
        structure: ``"auto"`` or a name in `STRUCTURES`.
        subset: ``"all"``, ``"last"`` or names of sites.
        prediction: One of `PREDICTIONS`.
        tune: Whether known scales are tuned, too.
        rank: Eigenvalues of ``"low_rank"``.
    """

    structure: str
    subset: str | Sequence[str]
    prediction: str
    tune: bool
    rank: int

    def __post_init__(self) -> None:
        if self.structure not in ("auto", *STRUCTURES):
            raise unknown("structure", self.structure, ("auto", *STRUCTURES))
        if self.prediction not in PREDICTIONS:
            raise unknown("prediction", self.prediction, PREDICTIONS)
        if isinstance(self.subset, str) and self.subset not in ("all", "last"):
            raise ValueError(
                f"subset must be 'all', 'last' or a list of names of sites; got {self.subset!r}. Write "
                f"subset=[{self.subset!r}] for the site of that name."
            )
        whole("rank", self.rank)


class Laplace:
    """A Laplace approximation of a program at the mean of its guide.

    In a network, real sites are weights, and positive ones (scales of priors, noise) are hyperparameters: the
    approximation takes them as known, and `tune` gives them the values with the highest marginal likelihood. The
    weights have the Gauss-Newton curvature. In other programs all sites have the exact curvature of the log joint.

    Args:
        mode: The program at its mode.
        choice: The settings.

    Raises:
        ValueError: If the settings do not suit the program.
    """

    def __init__(self, mode: AtMode, choice: Choice) -> None:
        self.mode, self.choice = mode, choice
        found, sites = mode.instance.structure, list(mode.guide.sites)
        self.is_network = (bool(mode.covered) or isinstance(mode.program, NetworkProgram)) and not found.local
        self.structure = choice.structure
        if choice.structure == "auto":
            self.structure = "kronecker" if self.is_network and mode.covered else "full"
        weights = [name for name in sites if name in mode.real] if self.is_network else sites
        self.scales = [name for name in sites if name not in weights]
        self.names = self._subset(weights)
        self.kinds: set[str] = set()
        program: Any = mode.program
        self.known = list(program.known_scales) if choice.tune and isinstance(program, NetworkProgram) else []
        self._check()

    def _subset(self, weights: list[str]) -> list[str]:
        """The sites of the approximation."""
        subset = self.choice.subset
        if subset == "all":
            return weights
        if subset == "last":
            if not self.mode.last:
                raise ValueError(
                    "subset='last' is the last layer of a network, and no latent site of the program is the weight of "
                    "a layer. Name the sites, subset=[...], or leave subset out."
                )
            return [name for name in weights if name in self.mode.last]
        if not subset:
            raise ValueError("subset=[] leaves nothing to approximate. Name at least one site.")
        if wrong := [name for name in subset if name not in weights]:
            raise unknown("site in subset", wrong[0], weights)
        return [name for name in weights if name in subset]

    def _check(self) -> None:
        numbers = sum(place.stop - place.start for n, place in self.mode.guide.sites.items() if n in self.names)
        if not self.is_network and self.structure not in ("full", "diagonal"):
            raise ValueError(
                f"structure={self.structure!r} is for networks, and no global latent site of the program is the weight "
                "of a linear or convolutional layer. Choose from: 'full', 'diagonal'."
            )
        if self.choice.prediction == "linearised" and not self.linearises:
            raise ValueError(
                "prediction='linearised' expands one network in its weights, which only a BayesianNeuralNetwork does. "
                "Use prediction='sampled'."
            )
        if self.choice.tune and not (self.known or self.scales):
            raise ValueError(
                "tune=True has no known scale to tune. Give BayesianNeuralNetwork prior='normal', or leave tune out: "
                "scales that are latent sites of a network are always tuned."
            )
        if numbers > MOST_DENSE and (self.structure == "full" or not self.is_network):
            raise ValueError(
                f"structure={self.structure!r} needs a matrix of {numbers} x {numbers} numbers. Use 'kronecker' or "
                "'diagonal', or a subset, such as subset='last'."
            )

    @property
    def linearises(self) -> bool:
        """Whether the program can predict by the expansion of its network."""
        return self.is_network and isinstance(self.mode.program, NetworkProgram)

    @property
    def linearised(self) -> bool:
        """Whether it does."""
        return self.linearises and self.choice.prediction != "sampled"

    @property
    def tuned(self) -> list[str]:
        """The hyperparameters that `tune` sets."""
        return [*self.scales, *self.known]

    # -- at the mode ---------------------------------------------------------------------------------------------

    def parts(self) -> Sequence[Part]:
        """The curvature at the present mean."""
        if self.is_network:
            curvature = Curvature(self.mode, self.names)
            found = STRUCTURES[self.structure](curvature, self.choice.rank)
            self.kinds |= curvature.kinds
            return found
        index = Curvature(self.mode, self.names).index(self.names)
        matrix = precision_at_mode(self.mode.instance, self.mode.batch).double()[index][:, index]
        if self.structure == "full":
            return [DensePart(index, matrix)]
        return [IndependentPart(index, matrix.diagonal().clone())]

    def evidence(self, parts: Sequence[Part]) -> Evidence:
        """The marginal likelihood of a network at the present mean."""
        return Evidence(self.mode, self.names, parts, self.scales, self.known)

    def blocks(self, parts: Sequence[Part]) -> list[Block]:
        """The normal distributions of the parts, with the prior.

        Raises:
            ValueError: If the curvature is not that of a maximum.
        """
        prior = self._prior(parts)
        return [part.block(prior[part.index.flatten()]) for part in parts]

    def _prior(self, parts: Sequence[Part]) -> Tensor:
        if not self.is_network:  # the exact curvature has the prior in it
            return torch.zeros(self.mode.guide.latent_dim, dtype=torch.float64, device=self.mode.guide.loc.device)
        evidence = self.evidence(parts)
        return evidence.prior(evidence.start)[2].detach()

    def polish(self, parts: Sequence[Part], steps: int = _POLISHES) -> float:
        """Go to the mode, in units of the approximation.

        Args:
            parts: The curvature.
            steps: The most steps.

        Returns:
            What the log joint can still gain by such a step, in nats.
        """
        names = self.names if self.is_network else list(self.mode.guide.sites)
        return to_mode(self.mode, self.blocks(parts), names, steps)

    def set_scales(self, h: Tensor, evidence: Evidence) -> None:
        """Set the hyperparameters.

        Args:
            h: Their values, unconstrained.
            evidence: The marginal likelihood as a function of them.
        """
        guide, program, count = self.mode.guide, self.mode.program, len(evidence.places)
        with torch.no_grad():
            guide.loc[evidence.places] = h[:count]
        for name, value in zip(self.known, h[count:].exp().tolist(), strict=True):
            if isinstance(program, NetworkProgram):
                program.set_scale(name, value)

    def settle(self, rounds: int) -> tuple[Sequence[Part], float, float]:
        """Go to the mode and to the best hyperparameters, in turn, as long as the marginal likelihood rises.

        Args:
            rounds: The most searches for hyperparameters.

        Returns:
            The curvature there, what the log joint can still gain, and how far the hyperparameters have moved.
        """
        left = self.polish(self.parts(), _FEW if self.tuned else _POLISHES)
        parts = self.parts()
        if not self.tuned:
            return parts, left, 0.0
        evidence, share = self.evidence(parts), 1.0
        first = evidence.start
        for _ in range(rounds):
            here, loc = evidence.start, self.mode.guide.loc.detach().clone()
            there = here + share * (evidence.best() - here).clamp(-_MOST_MOVED, _MOST_MOVED)
            self.set_scales(there, evidence)
            self.polish(parts, _FEW)
            moved_parts = self.parts()
            moved = self.evidence(moved_parts)
            if not moved.total > evidence.total - _ROUNDING:
                with torch.no_grad():
                    self.mode.guide.loc.copy_(loc)
                self.set_scales(here, evidence)
                share *= 0.5
                continue
            parts, evidence = moved_parts, moved
            if float((there - here).abs().max()) < _SAME:
                break
        left = self.polish(parts)
        return self.parts(), left, float((evidence.start - first).abs().max())

    def log_marginal_likelihood(self, parts: Sequence[Part], blocks: Sequence[Block]) -> float:
        """The log marginal likelihood given the sites that are not in the approximation."""
        if self.is_network:
            return float(self.evidence(parts).value()[0].detach())
        value, _ = self.mode.gradient(self.mode.guide.loc, self.names)
        size = sum(block.index.numel() for block in blocks)
        return value + 0.5 * size * _LOG_TWO_PI + sum(float(block.log_det) for block in blocks)

    def facts(self) -> dict[str, Any]:
        """What was done, as JSON."""
        values = self.mode.values(self.mode.guide.loc.detach())
        program: Any = self.mode.program
        return {
            "structure": self.structure,
            "sites": self.names,
            "curvature": "gauss-newton" if self.is_network else "hessian",
            "fisher": sorted(self.kinds),
            "prediction": "linearised" if self.linearised else "sampled",
            "scales": {n: values[n].tolist() for n in self.scales} | {n: getattr(program, n) for n in self.known},
        }


_LOG_TWO_PI = 1.8378770664093453
