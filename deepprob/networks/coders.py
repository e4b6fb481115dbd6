"""The encoder and the decoder of an autoencoder, by the name of their kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from deepprob.errors import unknown
from deepprob.networks.convolutional import ConvDecoder, ConvEncoder
from deepprob.networks.dense import MLP
from deepprob.networks.network import whole_sizes

CODERS = ("dense", "conv", "residual")
_DEFAULTS = {"dense": (400,), "conv": (32, 64), "residual": (256, 256)}


@dataclass(frozen=True)
class Coders:
    """Networks for rows of one shape: dense, convolutional, or either with residual blocks.

    Args:
        network: ``"dense"``; ``"conv"``, for images; or ``"residual"``, convolutional for images and dense for rows of
            one axis, with a residual block after every layer.
        shape: Shape of a row.
        hidden_dims: Sizes of the encoder's hidden layers, of images the channels of its convolutions, each of which
            halves the image; reversed in the decoder. None for (400,), of images (32, 64), of residual rows (256, 256).
        activation: Activation of the hidden layers.

    Raises:
        TypeError: If ``hidden_dims`` is not a sequence.
        ValueError: If the name is unknown, a size is not a whole number of at least 1, or rows are no images.
    """

    network: str
    shape: tuple[int, ...]
    hidden_dims: Sequence[int] | None
    activation: str

    def __post_init__(self) -> None:
        if self.network not in CODERS:
            raise unknown("network", self.network, CODERS)
        axes = len(self.shape)
        if (self.network == "conv" and axes not in (2, 3)) or (self.network == "residual" and axes > 3):
            raise ValueError(
                f"network={self.network!r} needs images, (height, width) or (channels, height, width); got rows of "
                f"shape {self.shape}. Use network='dense', or give an encoder and a decoder."
            )
        default = _DEFAULTS["conv" if self._images else self.network]
        sizes = whole_sizes("hidden_dims", default if self.hidden_dims is None else self.hidden_dims)
        object.__setattr__(self, "hidden_dims", tuple(sizes))

    @property
    def _images(self) -> bool:
        return self.network != "dense" and len(self.shape) > 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the encoder's hidden layers."""
        return tuple(self.hidden_dims or ())

    def encoder(self, in_size: int, out_size: int) -> nn.Module:
        """A network from rows, of ``in_size`` numbers each, to ``out_size`` outputs."""
        residual = self.network == "residual"
        if self._images:
            return ConvEncoder(self.shape, out_size, self.sizes, self.activation, residual)
        dense = MLP(in_size, out_size, self.sizes, self.activation, residual=residual)
        return nn.Sequential(nn.Flatten(-len(self.shape)), dense)

    def decoder(self, in_size: int, out_size: int) -> nn.Module:
        """A network from codes of ``in_size`` numbers to ``out_size`` outputs, those of a value side by side."""
        residual, sizes = self.network == "residual", self.sizes[::-1]
        if not self._images:
            return MLP(in_size, out_size, sizes, self.activation, residual=residual)
        per_value = out_size // math.prod(self.shape)
        found = ConvDecoder(in_size, self.shape, sizes, per_value, self.activation, residual)
        return found if per_value == 1 else nn.Sequential(found, SideBySide(per_value))


class SideBySide(nn.Module):
    """Puts the outputs of a value side by side: from maps, ``(*batch, P * values)``, to ``(*batch, values * P)``.

    Args:
        per_value: Number of outputs per value, P.
    """

    def __init__(self, per_value: int) -> None:
        super().__init__()
        self.per_value = per_value

    def forward(self, x: Tensor) -> Tensor:
        """Rearrange the last axis."""
        maps: Tensor = x.unflatten(-1, (self.per_value, -1))
        return maps.transpose(-1, -2).flatten(-2)
