"""A program around one network whose weights are global latent sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from deepprob.networks.linearised import linearise_at
from deepprob.programs.program import Program


class NetworkProgram(Program):
    """A program around one network whose weights are global latent sites, and which runs it by `lifting.run_with`.

    Attributes:
        net: The lifted network.
        shapes: The shapes of its random weights, by site.
        known_scales: Names of attributes that are known scales of the prior or the noise: positive numbers that the
            model reads when it runs, and that may be tensors while a routine looks for better ones.
    """

    net: nn.Module
    known_scales: tuple[str, ...] = ()

    if TYPE_CHECKING:

        @property
        def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def linearise(self, weights: Mapping[str, Tensor]) -> None:
        """From here on, run the network's first-order expansion around these weights.

        Args:
            weights: The weights by site, without leading dimensions.
        """
        linearise_at(self.net, {name: weights[name] for name in self.shapes})

    def set_scale(self, name: str, value: float) -> None:
        """Set a known scale, also among the settings from which a saved program is rebuilt.

        Args:
            name: One of `known_scales`.
            value: The positive number.
        """
        setattr(self, name, value)
        if self.config is not None:
            self.config = {**self.config, name: value}
