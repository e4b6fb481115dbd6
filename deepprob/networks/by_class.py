"""Dense networks of a row and a class."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Generator, Tensor, nn

from deepprob.errors import whole
from deepprob.networks.dense import Stack
from deepprob.networks.initialisation import activation_module, draw_stack
from deepprob.networks.network import check_trailing, whole_sizes


class MLPByClass(Stack):
    r"""A dense network of a row and the probabilities of its classes.

    .. math:: h_1 = a(W_1 x + V p + b_1), \quad h_l = a(W_l h_{l-1} + b_l), \quad y = W h_L + b

    It is an `MLP` of the two joined. The map of the row is computed once for all classes.

    Args:
        in_features: Size of a row.
        num_classes: Number of classes.
        out_features: Size of the output's last axis.
        hidden_dims: Sizes of the hidden layers, at least one.
        activation: The nonlinearity ``a``, a key of ``ACTIVATIONS``.

    Raises:
        ValueError: If a size is not a whole number of at least 1, there is no hidden layer, the activation is unknown,
            or an input has the wrong last axis.

    Examples:
        Rows with every class, without a copy of the rows:

        >>> import torch
        >>> net = MLPByClass(5, 3, 2, (16,))
        >>> net(torch.zeros(7, 5), torch.eye(3).unsqueeze(1)).shape
        torch.Size([3, 7, 2])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        out_features: int,
        hidden_dims: Sequence[int] = (64, 64),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.in_features, self.num_classes = whole("in_features", in_features), whole("num_classes", num_classes)
        self.out_features, hidden = whole("out_features", out_features), whole_sizes("hidden_dims", hidden_dims)
        if not hidden:
            raise ValueError("hidden_dims must have at least one size, so that row and class can interact; got ().")
        self.config = {
            "network": "mlp_by_class",
            "in_features": self.in_features,
            "num_classes": self.num_classes,
            "out_features": self.out_features,
            "hidden_dims": hidden,
            "activation": activation,
        }
        self.row = nn.Linear(self.in_features, hidden[0])
        self.of_class = nn.Linear(self.num_classes, hidden[0], bias=False)
        layers: list[nn.Module] = [activation_module(activation)]
        for fan_in, fan_out in pairwise(hidden):
            layers += [nn.Linear(fan_in, fan_out), activation_module(activation)]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[-1], self.out_features))
        self.draw_weights()

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        """Map rows ``(*batch, in_features)`` and classes ``(*batch, num_classes)``, which broadcast, to outputs."""
        check_trailing("MLPByClass", x, (self.in_features,))
        check_trailing("MLPByClass", classes, (self.num_classes,))
        y: Tensor = self.layers(self.row(x) + self.of_class(classes))
        return y

    def draw_weights(self, generator: Generator | None = None) -> dict[str, str]:
        """Redraw all weights, each by the activation that follows it; see ``draw_stack``."""
        record = super().draw_weights(generator)
        for name, layer in (("row", self.row), ("of_class", self.of_class)):
            own = draw_stack(nn.Sequential(layer, self.layers[0]), generator)
            record |= {key.replace("0.", f"{name}."): scheme for key, scheme in own.items()}
        return record
