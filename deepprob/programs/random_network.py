"""A network with random weights: a prior, and a mean-field guide relative to it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from deepprob.networks.lifting import copied, pretrained_names
from deepprob.programs.random_weights import RandomWeights

START_RAW, HYPER_RAW = (math.log(math.expm1(sd)) for sd in (1e-2, 0.1))  # softplus makes them standard deviations


class RandomNetwork(nn.Module):
    """A copy of a network, a prior of its weights, and a mean-field guide of them.

    Attributes:
        net: The copy, which always runs in evaluation mode.
        weights: The random weights and their priors.
        raw_loc: The guide's means in units of the prior; they start at the network's own weights.
        raw_sd: The guide's unbounded sds in these units.
        scale_loc: The guide's means of the logarithms of the priors' positive numbers.
        scale_raw: Their unbounded sds.
        frozen: Whether a weight of the given network was not trainable.
        kept: Names of the weights whose means a fit never draws anew.
    """

    def hold(
        self,
        net: nn.Module | Mapping[str, Any],
        prior: Any,
        prior_scale: float,
        layers: Any,
        *,
        prefix: str = "",
        taken: Collection[str] = (),
    ) -> None:
        """Copy a network and give its weights a prior and a guide.

        Args:
            net: The network, or the ``config`` of a deepprob network.
            prior: As of `RandomWeights`.
            prior_scale: As of `RandomWeights`.
            layers: As of `RandomWeights`.
            prefix: As of `RandomWeights`.
            taken: Names that no parameter may have.
        """
        self.net = copied(net, taken)
        self.frozen = not all(p.requires_grad for p in self.net.parameters())
        self.weights = RandomWeights(self.net, prior, prior_scale, layers, prefix)
        self.make_random()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the random weights by name; empty until the sizes of lazy layers are known."""
        return self.weights.shapes

    @torch.no_grad()
    def make_random(self) -> None:
        """Move the network's random weights to the guide, once their sizes are known."""
        self.weights.settle(self.net)
        self.kept = pretrained_names(self.net) | self.weights.centered
        self.raw_loc = nn.ParameterList(self.weights.relative(self.net))
        self.raw_sd = nn.ParameterList([torch.full_like(mean, START_RAW) for mean in self.raw_loc])
        self.weights.forget(self.net)
        like = next(self.net.parameters())
        starts = [start.to(like).log() for start in self.weights.hyper_starts().values()]
        self.scale_loc = nn.ParameterList(starts)
        self.scale_raw = nn.ParameterList([torch.full_like(start, HYPER_RAW) for start in starts])

    def sample_prior(self) -> dict[str, Tensor]:
        """Draw the weights from the prior, as sites; returns them by parameter."""
        return self.weights.sample(self.net)

    def sample_guide(self, *, per_row: bool = False) -> None:
        """Draw the weights from the mean-field guide, as sites; see `RandomWeights.sample_guide`."""
        self.weights.sample_guide(self.net, self, per_row=per_row)

    def start(self, site: str) -> Tensor | None:
        """Where a guide by name starts the site of a weight; None for other sites."""
        name = site.removeprefix(self.weights.prefix)
        if name not in self.shapes or site != self.weights.prefix + name:
            return None
        mean = self.raw_loc[list(self.shapes).index(name)].detach()
        loc, unit = self.weights.start_moments(name, self.net.get_parameter(name))
        at: Tensor = loc + unit * mean
        return at

    def draw_weights(self, generator: Generator | None = None) -> dict[str, str]:
        """Reset the guide to narrow distributions at means drawn from the prior; pretrained parts keep their means.

        Biases are drawn as well, because zero biases put the kinks of all rectifiers at the mean of the data. Weights
        that are trained as numbers are drawn by their own scheme.

        Args:
            generator: Source of the draws; None for torch's global generator.

        Returns:
            The scheme by parameter name.
        """
        record = {}
        with torch.no_grad():
            for i, (name, loc) in enumerate(zip(self.shapes, self.raw_loc, strict=True)):
                if name in self.kept:
                    continue
                loc.copy_(torch.randn(loc.shape, generator=generator))
                record[f"raw_loc.{i}"] = "prior"
        self.start_narrow()
        return record | self.weights.draw_others(self.net, generator)

    @torch.no_grad()
    def start_narrow(self) -> None:
        """Start at narrow distributions, so that a fit finds the function before its uncertainty."""
        for parameters, start in ((self.raw_sd, START_RAW), (self.scale_raw, HYPER_RAW)):
            for parameter in parameters:
                parameter.fill_(start)
        for loc, at in zip(self.scale_loc, self.weights.hyper_starts().values(), strict=True):
            loc.copy_(at.log())

    def train(self, mode: bool = True) -> RandomNetwork:
        """Set the mode; the network itself stays in evaluation mode."""
        super().train(mode)
        self.net.eval()
        return self
