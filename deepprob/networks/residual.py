"""A residual block, dense or convolutional."""

from __future__ import annotations

from torch import Generator, Tensor, nn

from deepprob.networks.initialisation import activation_module, draw_stack


class ResidualBlock(nn.Module):
    r"""Adds to its input a correction of two layers: :math:`h + B\,a(A\,a(h))`.

    New weights have :math:`B = 0`, so that the block is the identity and a deep stack starts like a shallow one.

    Args:
        width: Number of features, or of channels of an image.
        activation: The nonlinearity :math:`a`, a key of ``ACTIVATIONS``.
        image: Whether the layers are 3 x 3 convolutions.

    References:
        He, Zhang, Ren, Sun (2016), Identity Mappings in Deep Residual Networks.
    """

    def __init__(self, width: int, activation: str, image: bool = False) -> None:
        super().__init__()
        first, last = ((nn.Conv2d(width, width, 3, 1, 1) if image else nn.Linear(width, width)) for _ in range(2))
        self.layers = nn.Sequential(activation_module(activation), first, activation_module(activation), last)
        self.draw_weights()

    def forward(self, h: Tensor) -> Tensor:
        """Map features to features of the same shape."""
        corrected: Tensor = h + self.layers(h)
        return corrected

    def draw_weights(self, generator: Generator | None = None) -> dict[str, str]:
        """Redraw the first layer; the last one becomes zero."""
        record = draw_stack(self.layers, generator) | {"3.weight": "zeros", "3.bias": "zeros"}
        for parameter in self.layers[3].parameters():
            nn.init.zeros_(parameter)
        return {f"layers.{name}": scheme for name, scheme in record.items()}
