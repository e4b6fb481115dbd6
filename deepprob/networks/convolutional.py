"""Convolutional networks: images to features, and features to images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from deepprob.errors import whole
from deepprob.networks.dense import Stack
from deepprob.networks.initialisation import activation_module
from deepprob.networks.network import check_trailing, whole_sizes
from deepprob.networks.residual import ResidualBlock


class ConvEncoder(Stack):
    """Maps images to features: convolutions that halve the image, then one dense layer.

    Args:
        image_shape: ``(height, width)`` or ``(channels, height, width)``.
        out_features: Size of the output's last axis.
        channels: Channels of the convolutions, 3 x 3 with stride 2 each.
        activation: A key of ``ACTIVATIONS``.
        residual: Whether to add a residual block to the maps before each activation.

    Raises:
        TypeError: If ``image_shape`` or ``channels`` is not a sequence.
        ValueError: If a size is not a whole number of at least 1, ``image_shape`` has the wrong rank, the activation is
            unknown, or an input has the wrong shape.

    Examples:
        Images without a channel axis have one channel:

        >>> net = ConvEncoder((8, 8), 10, channels=(4, 8))
        >>> import torch
        >>> net(torch.zeros(3, 2, 8, 8)).shape, net(torch.zeros(8, 8)).shape
        (torch.Size([3, 2, 10]), torch.Size([10]))
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        out_features: int,
        channels: Sequence[int] = (32, 64),
        activation: str = "relu",
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.image_shape, self._maps = _image("image_shape", image_shape)
        self.in_features = math.prod(self.image_shape)
        self.out_features = whole("out_features", out_features)
        widths = whole_sizes("channels", channels)
        self.config = {
            "network": "conv_encoder",
            "image_shape": list(self.image_shape),
            "out_features": self.out_features,
            "channels": widths,
            "activation": activation,
        }
        if residual:
            self.config["residual"] = True
        depth, height, width = self._maps
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip([depth, *widths], widths, strict=False):
            layers.append(nn.Conv2d(fan_in, fan_out, 3, 2, 1))
            layers += [ResidualBlock(fan_out, activation, image=True)] if residual else []
            layers.append(activation_module(activation))
            height, width = _half(height), _half(width)
        last = (widths[-1] if widths else depth) * height * width
        self.layers = nn.Sequential(*layers, nn.Flatten(-3), nn.Linear(last, self.out_features))
        self.draw_weights()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(*batch, *image_shape)`` to ``(*batch, out_features)``."""
        check_trailing("ConvEncoder", x, self.image_shape)
        batch = x.shape[: x.dim() - len(self.image_shape)]
        maps = x.reshape(math.prod(batch), *self._maps)  # (B, channels, height, width)
        y: Tensor = self.layers(maps)
        return y.reshape(*batch, self.out_features)


class ConvDecoder(Stack):
    """Maps features to images: one dense layer, then transposed convolutions that double the image.

    The output is flat and concatenates the parameters, as ``Conditional`` expects. Reshape it to
    ``(*batch, num_params, *image_shape)`` to view the images.

    Args:
        in_features: Size of the input's last axis.
        image_shape: ``(height, width)`` or ``(channels, height, width)``; any sizes.
        channels: Channels of the maps, from the smallest image to the largest.
        num_params: Numbers per pixel: 1 for a Bernoulli, 2 for a normal likelihood.
        activation: A key of ``ACTIVATIONS``.
        residual: Whether to add a residual block to the maps before each activation.

    Raises:
        TypeError: If ``image_shape`` or ``channels`` is not a sequence.
        ValueError: If a size is not a whole number of at least 1, ``image_shape`` has the wrong rank, the activation is
            unknown, or an input has the wrong last axis.

    Examples:
        The decoder returns any image size, including odd ones:

        >>> net = ConvDecoder(10, (7, 5), channels=(8, 4))
        >>> import torch
        >>> net(torch.zeros(3, 2, 10)).reshape(3, 2, 7, 5).shape
        torch.Size([3, 2, 7, 5])
    """

    def __init__(
        self,
        in_features: int,
        image_shape: Sequence[int],
        channels: Sequence[int] = (64, 32),
        num_params: int = 1,
        activation: str = "relu",
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = whole("in_features", in_features)
        self.image_shape, (depth, height, width) = _image("image_shape", image_shape)
        num_params = whole("num_params", num_params)
        self.out_features = num_params * math.prod(self.image_shape)
        widths = whole_sizes("channels", channels)
        self.config = {
            "network": "conv_decoder",
            "in_features": self.in_features,
            "image_shape": list(self.image_shape),
            "channels": widths,
            "num_params": num_params,
            "activation": activation,
        }
        if residual:
            self.config["residual"] = True
        grids = [(height, width)]
        for _ in widths:
            grids.insert(0, (_half(grids[0][0]), _half(grids[0][1])))
        maps = [*widths, num_params * depth]
        layers: list[nn.Module] = [
            nn.Linear(self.in_features, maps[0] * math.prod(grids[0])),
            nn.Unflatten(-1, (maps[0], *grids[0])),
        ]
        for step, (rows, columns) in enumerate(grids[1:]):
            # doubling gives an even size; an odd size is one pixel less
            extra = (1 - rows % 2, 1 - columns % 2)
            layers += [ResidualBlock(maps[step], activation, image=True)] if residual else []
            layers.append(activation_module(activation))
            layers.append(nn.ConvTranspose2d(maps[step], maps[step + 1], 3, 2, 1, extra))
        self.layers = nn.Sequential(*layers)
        self.draw_weights()

    def forward(self, z: Tensor) -> Tensor:
        """Map ``(*batch, in_features)`` to ``(*batch, num_params * prod(image_shape))``."""
        check_trailing("ConvDecoder", z, (self.in_features,))
        batch = z.shape[:-1]
        maps: Tensor = self.layers(z.reshape(math.prod(batch), self.in_features))
        return maps.reshape(*batch, self.out_features)


def _half(size: int) -> int:
    return (size + 1) // 2


def _image(name: str, shape: object) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """Image shape as given, and as ``(channels, height, width)``."""
    sizes = tuple(whole_sizes(name, shape))
    if len(sizes) not in (2, 3):
        raise ValueError(
            f"{name} must be (height, width) or (channels, height, width); got {sizes}. "
            "Reshape the data, or use an MLP."
        )
    *depth, height, width = sizes
    return sizes, (depth[0] if depth else 1, height, width)
