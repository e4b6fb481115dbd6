"""Dense networks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Generator, Tensor, nn

from deepprob.errors import whole
from deepprob.networks.dropout import rate_in_range
from deepprob.networks.initialisation import activation_module, draw_stack
from deepprob.networks.network import Network, check_trailing, whole_sizes
from deepprob.networks.residual import ResidualBlock


class Stack(Network):
    """A network that is one stack of layers."""

    layers: nn.Sequential

    def draw_weights(self, generator: Generator | None = None) -> dict[str, str]:
        """Redraw all weights, each by the activation that follows it; see ``draw_stack``."""
        record = draw_stack(self.layers, generator)
        return {f"layers.{name}": scheme for name, scheme in record.items()}


class MLP(Stack):
    r"""A dense network, applied to the last axis.

    .. math:: h_0 = x, \quad h_l = a(\mathrm{norm}(W_l h_{l-1} + b_l)), \quad y = W h_L + b \; (+ A x)

    Args:
        in_features: Size of the input's last axis.
        out_features: Size of the output's last axis.
        hidden_dims: Sizes of the hidden layers; ``()`` makes an affine map.
        activation: The nonlinearity ``a``, a key of ``ACTIVATIONS``.
        layer_norm: Whether to normalize each hidden layer before its activation.
        linear_path: Whether to add a linear map of the input, :math:`A x`, to the output.
        dropout: Rate of dropout after each hidden layer's activation; 0 for none.
        residual: Whether to add a residual block of the same width to each hidden layer, before its activation.

    Raises:
        TypeError: If ``hidden_dims`` is not a sequence.
        ValueError: If a size is not a whole number of at least 1, the activation is unknown, a rate is out of range, or
            an input has the wrong last axis.

    Examples:
        Any number of leading axes is the batch:

        >>> net = MLP(5, 2, hidden_dims=(16,))
        >>> import torch
        >>> net(torch.zeros(5)).shape, net(torch.zeros(3, 4, 5)).shape
        (torch.Size([2]), torch.Size([3, 4, 2]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_dims: Sequence[int] = (64, 64),
        activation: str = "relu",
        layer_norm: bool = False,
        linear_path: bool = False,
        dropout: float = 0.0,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = whole("in_features", in_features)
        self.out_features = whole("out_features", out_features)
        hidden = whole_sizes("hidden_dims", hidden_dims)
        self.config = {
            "network": "mlp",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "hidden_dims": hidden,
            "activation": activation,
            "layer_norm": layer_norm,
        }
        if linear_path:
            self.config["linear_path"] = True
        if rate := rate_in_range("dropout", dropout):
            self.config["dropout"] = rate
        if residual:
            self.config["residual"] = True
        self.path = nn.Linear(self.in_features, self.out_features, bias=False) if linear_path else None
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip([self.in_features, *hidden], hidden, strict=False):
            layers.append(nn.Linear(fan_in, fan_out))
            if layer_norm:
                layers.append(nn.LayerNorm(fan_out))
            if residual:
                layers.append(ResidualBlock(fan_out, activation))
            layers.append(activation_module(activation))
            if rate:
                layers.append(nn.Dropout(rate))
        last = hidden[-1] if hidden else self.in_features
        self.layers = nn.Sequential(*layers, nn.Linear(last, self.out_features))
        activation_module(activation)  # an unknown name is an error even without hidden layers
        self.draw_weights()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(*batch, in_features)`` to ``(*batch, out_features)``."""
        check_trailing("MLP", x, (self.in_features,))
        y: Tensor = self.layers(x)
        return y if self.path is None else y + self.path(x)

    def draw_weights(self, generator: Generator | None = None) -> dict[str, str]:
        """Redraw all weights, see `Stack.draw_weights`; the linear path as a layer without activation."""
        record = super().draw_weights(generator)
        if self.path is not None:
            own = draw_stack(nn.Sequential(self.path), generator)
            record |= {name.replace("0.", "path."): scheme for name, scheme in own.items()}
        return record
