"""Networks for the functions one does not know: dense, convolutional, recurrent.

Every network maps ``(*batch, ...)`` to ``(*batch, out_features)`` and says how it was made in
``config``, from which :func:`network_from_config` makes it again.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from deepprob.engine.scan.recur import Tensors, is_traced, recur
from deepprob.errors import unknown
from deepprob.initialisation import (
    ACTIVATIONS,
    activation_module,
    draw_stack,
    fill_orthogonal,
    fill_uniform,
    init_weights,
    is_pretrained,
    pretrained,
)

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "NETWORKS",
    "ConvDecoder",
    "ConvEncoder",
    "Network",
    "Recurrent",
    "init_weights",
    "network_from_config",
    "pretrained",
]

_CELLS: dict[str, type[nn.GRU] | type[nn.LSTM] | type[nn.RNN]] = {
    "gru": nn.GRU,
    "lstm": nn.LSTM,
    "rnn": nn.RNN,
}


class Network(nn.Module):
    """A network that knows its sizes and how it was made.

    Attributes:
        in_features: Size of the input's last axis (of the whole image for an image encoder).
        out_features: Size of the output's last axis.
        config: The constructor's arguments as JSON, and the network's name under ``"network"``.
    """

    in_features: int
    out_features: int
    config: dict[str, Any]

    def draw_weights(self, generator: Generator | None = None) -> dict[str, str]:
        """Draw all weights anew.

        Args:
            generator: Where the draws come from; None for torch's own.

        Returns:
            The scheme by parameter name.
        """
        raise NotImplementedError(f"{type(self).__name__} has no draw_weights: define it.")


class _Stack(Network):
    """A network that is one stack of layers."""

    layers: nn.Sequential

    def draw_weights(self, generator: Generator | None = None) -> dict[str, str]:
        """Draw all weights anew, each by the activation that it meets: see ``init_weights``."""
        record = draw_stack(self.layers, generator)
        return {f"layers.{name}": scheme for name, scheme in record.items()}


class MLP(_Stack):
    r"""A dense network, applied to the last axis.

    .. math:: h_0 = x, \quad h_l = a(\mathrm{norm}(W_l h_{l-1} + b_l)), \quad y = W h_L + b

    Args:
        in_features: Size of the input's last axis.
        out_features: Size of the output's last axis.
        hidden_dims: Sizes of the hidden layers; ``()`` makes an affine map.
        activation: The nonlinearity ``a``, a key of ``ACTIVATIONS``.
        layer_norm: Whether each hidden layer is normalised before its activation.

    Raises:
        TypeError: If a size is not a whole number.
        ValueError: If a size is not positive, the activation is unknown, or an input has another
            last axis.

    Examples:
        Leading axes are batch, any number of them:

        >>> net = MLP(5, 2, hidden_dims=(16,))
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
    ) -> None:
        super().__init__()
        self.in_features = _size("in_features", in_features)
        self.out_features = _size("out_features", out_features)
        hidden = _sizes("hidden_dims", hidden_dims)
        self.config = {
            "network": "mlp",
            "in_features": in_features,
            "out_features": out_features,
            "hidden_dims": hidden,
            "activation": activation,
            "layer_norm": layer_norm,
        }
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip([in_features, *hidden], hidden, strict=False):
            layers.append(nn.Linear(fan_in, fan_out))
            if layer_norm:
                layers.append(nn.LayerNorm(fan_out))
            layers.append(activation_module(activation))
        last = hidden[-1] if hidden else in_features
        self.layers = nn.Sequential(*layers, nn.Linear(last, out_features))
        activation_module(activation)  # a wrong name is an error without hidden layers too
        self.draw_weights()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(*batch, in_features)`` to ``(*batch, out_features)``."""
        _check_trailing("MLP", x, (self.in_features,))
        y: Tensor = self.layers(x)
        return y


class ConvEncoder(_Stack):
    """Images to features: convolutions that halve the image, then one dense layer.

    Args:
        image_shape: ``(height, width)`` or ``(channels, height, width)``.
        out_features: Size of the output's last axis.
        channels: Channels of the convolutions, 3 x 3 with stride 2 each.
        activation: A key of ``ACTIVATIONS``.

    Raises:
        TypeError: If a size is not a whole number.
        ValueError: If a size is not positive, ``image_shape`` has another rank, the activation is
            unknown, or an input is not such an image.

    Examples:
        Images without an axis for channels have one channel:

        >>> net = ConvEncoder((8, 8), 10, channels=(4, 8))
        >>> net(torch.zeros(3, 2, 8, 8)).shape, net(torch.zeros(8, 8)).shape
        (torch.Size([3, 2, 10]), torch.Size([10]))
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        out_features: int,
        channels: Sequence[int] = (32, 64),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.image_shape, self._maps = _image("image_shape", image_shape)
        self.in_features = math.prod(self.image_shape)
        self.out_features = _size("out_features", out_features)
        widths = _sizes("channels", channels)
        self.config = {
            "network": "conv_encoder",
            "image_shape": list(self.image_shape),
            "out_features": out_features,
            "channels": widths,
            "activation": activation,
        }
        depth, height, width = self._maps
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip([depth, *widths], widths, strict=False):
            layers += [nn.Conv2d(fan_in, fan_out, 3, 2, 1), activation_module(activation)]
            height, width = _half(height), _half(width)
        last = (widths[-1] if widths else depth) * height * width
        self.layers = nn.Sequential(*layers, nn.Flatten(-3), nn.Linear(last, out_features))
        self.draw_weights()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(*batch, *image_shape)`` to ``(*batch, out_features)``."""
        _check_trailing("ConvEncoder", x, self.image_shape)
        batch = x.shape[: x.dim() - len(self.image_shape)]
        maps = x.reshape(math.prod(batch), *self._maps)  # (B, channels, height, width)
        y: Tensor = self.layers(maps)
        return y.reshape(*batch, self.out_features)


class ConvDecoder(_Stack):
    """Features to images: one dense layer, then transposed convolutions that double the image.

    The images come out flat, parameter after parameter, as a ``Conditional`` reads them: reshape to
    ``(*batch, num_params, *image_shape)`` to look at them.

    Args:
        in_features: Size of the input's last axis.
        image_shape: ``(height, width)`` or ``(channels, height, width)``; any sizes.
        channels: Channels of the maps, from the smallest image to the largest.
        num_params: Numbers per pixel: 1 for a Bernoulli, 2 for a normal likelihood.
        activation: A key of ``ACTIVATIONS``.

    Raises:
        TypeError: If a size is not a whole number.
        ValueError: If a size is not positive, ``image_shape`` has another rank, the activation is
            unknown, or an input has another last axis.

    Examples:
        The decoder ends at the size where an encoder began, odd sizes too:

        >>> net = ConvDecoder(10, (7, 5), channels=(8, 4))
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
    ) -> None:
        super().__init__()
        self.in_features = _size("in_features", in_features)
        self.image_shape, (depth, height, width) = _image("image_shape", image_shape)
        self.out_features = _size("num_params", num_params) * math.prod(self.image_shape)
        widths = _sizes("channels", channels)
        self.config = {
            "network": "conv_decoder",
            "in_features": in_features,
            "image_shape": list(self.image_shape),
            "channels": widths,
            "num_params": num_params,
            "activation": activation,
        }
        grids = [(height, width)]
        for _ in widths:
            grids.insert(0, (_half(grids[0][0]), _half(grids[0][1])))
        maps = [*widths, num_params * depth]
        layers: list[nn.Module] = [
            nn.Linear(in_features, maps[0] * math.prod(grids[0])),
            nn.Unflatten(-1, (maps[0], *grids[0])),
        ]
        for step, (rows, columns) in enumerate(grids[1:]):
            # doubling makes even sizes; an odd one is reached by one pixel less
            extra = (1 - rows % 2, 1 - columns % 2)
            layers.append(activation_module(activation))
            layers.append(nn.ConvTranspose2d(maps[step], maps[step + 1], 3, 2, 1, extra))
        self.layers = nn.Sequential(*layers)
        self.draw_weights()

    def forward(self, z: Tensor) -> Tensor:
        """Map ``(*batch, in_features)`` to ``(*batch, num_params * prod(image_shape))``."""
        _check_trailing("ConvDecoder", z, (self.in_features,))
        batch = z.shape[:-1]
        maps: Tensor = self.layers(z.reshape(math.prod(batch), self.in_features))
        return maps.reshape(*batch, self.out_features)


class Recurrent(Network):
    r"""A recurrent network over padded sequences of unequal length.

    .. math:: h_t = f(x_t, h_{t-1}), \quad\text{reversed: } h_t = f(x_t, h_{t+1}),
              \quad h_0 = h_{T_i + 1} = 0

    Reversed, each sequence ``i`` is read backwards from its own end ``T_i``, not the padding's, so
    that ``h_t`` summarises ``x_t, ..., x_{T_i}``. Values beyond a sequence's end are neither read
    nor returned: the output is zero there.

    Args:
        in_features: Size of an input vector ``x_t``.
        hidden_dim: Size of the state ``h_t``.
        kind: The cell ``f``: "gru", "lstm" or "rnn" (tanh).
        reverse: Whether to run backwards in time.
        bidirectional: Whether to run both ways; the output is then twice as wide, forwards first.

    Raises:
        TypeError: If a size is not a whole number.
        ValueError: If a size is not positive, the kind is unknown, both directions are asked for
            twice, or the shapes of an input do not match.

    Examples:
        What follows a sequence's end makes no difference:

        >>> net = Recurrent(3, 4, reverse=True)
        >>> x, lengths = torch.randn(1, 5, 3), torch.tensor([2])
        >>> short, padded = net(x[:, :2]), net(x, lengths)
        >>> torch.allclose(short, padded[:, :2]), bool((padded[:, 2:] == 0).all())
        (True, True)
    """

    def __init__(
        self,
        in_features: int,
        hidden_dim: int,
        kind: str = "gru",
        reverse: bool = False,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        if kind not in _CELLS:
            raise unknown("kind of recurrent network", kind, _CELLS)
        if reverse and bidirectional:
            raise ValueError(
                "reverse and bidirectional were both asked for, but a bidirectional network "
                "already runs backwards. Choose one."
            )
        self.in_features = _size("in_features", in_features)
        self.hidden_dim = _size("hidden_dim", hidden_dim)
        self.out_features = hidden_dim * (2 if bidirectional else 1)
        self.config = {
            "network": "recurrent",
            "in_features": in_features,
            "hidden_dim": hidden_dim,
            "kind": kind,
            "reverse": reverse,
            "bidirectional": bidirectional,
        }
        directions = {"forwards": not reverse, "backwards": reverse or bidirectional}
        self.cells = nn.ModuleDict(
            {
                name: _CELLS[kind](in_features, hidden_dim, batch_first=True)
                for name, wanted in directions.items()
                if wanted
            }
        )
        self.draw_weights()

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Map ``(*batch, T, in_features)`` to ``(*batch, T, out_features)``.

        Args:
            x: Padded sequences.
            lengths: Length of each, shape ``batch``, from 0 to ``T``; None if all are ``T``.

        Returns:
            The states, zero beyond each sequence's end.
        """
        _check_trailing("Recurrent", x, (None, self.in_features))
        *batch, steps, _ = x.shape
        if lengths is None:
            lengths = torch.full(batch, steps, device=x.device)
        if lengths.shape != x.shape[:-2]:
            raise ValueError(
                f"lengths must hold one number per sequence, shape {tuple(batch)}; got shape "
                f"{tuple(lengths.shape)}. Give one length for each row of x."
            )
        x = x.reshape(math.prod(batch), steps, self.in_features)  # (B, T, D)
        ends = lengths.reshape(-1, 1)  # (B, 1)
        times = torch.arange(steps, device=x.device)  # (T,)
        inside = (times < ends).unsqueeze(-1)  # (B, T, 1)
        x = torch.where(inside, x, 0.0)  # padding may be nan: it must not reach a gradient
        states = []
        for direction, cell in self.cells.items():
            if direction == "forwards":
                states.append(_states(cast(nn.RNNBase, cell), x))
            else:
                mirror = (ends - 1 - times).clamp(min=0).unsqueeze(-1)  # (B, T, 1); its own inverse
                backwards = _states(cast(nn.RNNBase, cell), x.gather(1, mirror.expand_as(x)))  # (B, T, H)
                states.append(backwards.gather(1, mirror.expand_as(backwards)))
        y = torch.where(inside, torch.cat(states, -1), 0.0)
        return y.reshape(*batch, steps, self.out_features)

    def draw_weights(self, generator: Generator | None = None) -> dict[str, str]:
        """Glorot for inputs and orthogonal for states, gate by gate; an LSTM remembers at first."""
        record: dict[str, str] = {}
        for name, parameter in self.named_parameters():
            if is_pretrained(self.get_submodule(name.rpartition(".")[0])):
                continue
            gates = parameter.detach().split(self.hidden_dim)  # each (H, D), (H, H) or (H,)
            if ".weight_ih" in name:
                record[name] = "glorot_uniform"
                bound = math.sqrt(6 / (self.in_features + self.hidden_dim))
                fill_uniform(parameter, bound, generator)
            elif ".weight_hh" in name:
                record[name] = "orthogonal"
                for gate in gates:
                    fill_orthogonal(gate, generator)
            else:
                record[name] = "zeros"
                nn.init.zeros_(parameter)
                if self.config["kind"] == "lstm" and ".bias_ih" in name:
                    record[name] = "zeros, forget gate ones"
                    gates[1].fill_(1.0)
        return record


def _states(cell: nn.RNNBase, x: Tensor) -> Tensor:
    """All states of a recurrent network of torch's, ``(B, T, D)`` to ``(B, T, H)``."""
    if not is_traced():
        with warnings.catch_warnings() if x.is_cuda else contextlib.nullcontext():
            if x.is_cuda:  # cuDNN copies weights that lie among a fit's other parameters, and says so at every call
                warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
            y: Tensor = cell(x)[0]
        return y
    step = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _rnn}[cell.mode]
    weight_in, weight, bias_in, bias = cell.all_weights[0]
    ahead = nn.functional.linear(x.transpose(0, 1), weight_in, bias_in)  # (T, B, gates H)
    start = x.new_zeros(len(x), cell.hidden_size)
    state = (start, start.clone()) if cell.mode == "LSTM" else (start,)
    _, (states,) = recur(step, state, [ahead], [weight, bias])
    return states.transpose(0, 1)


def _lstm(state: Tensors, slices: Tensors, params: Tensors) -> tuple[Tensors, Tensors]:
    h, c = state
    gates = slices[0] + nn.functional.linear(h, *params)  # (B, 4 H)
    enter, remember, proposal, leave = gates.chunk(4, -1)
    c = torch.sigmoid(remember) * c + torch.sigmoid(enter) * torch.tanh(proposal)
    h = torch.sigmoid(leave) * torch.tanh(c)
    return (h, c), (h,)


def _gru(state: Tensors, slices: Tensors, params: Tensors) -> tuple[Tensors, Tensors]:
    (h,) = state
    reset_x, update_x, new_x = slices[0].chunk(3, -1)
    reset_h, update_h, new_h = nn.functional.linear(h, *params).chunk(3, -1)
    reset, update = torch.sigmoid(reset_x + reset_h), torch.sigmoid(update_x + update_h)
    h = torch.lerp(torch.tanh(new_x + reset * new_h), h, update)
    return (h,), (h,)


def _rnn(state: Tensors, slices: Tensors, params: Tensors) -> tuple[Tensors, Tensors]:
    h = torch.tanh(slices[0] + nn.functional.linear(state[0], *params))
    return (h,), (h,)


NETWORKS: dict[str, type[Network]] = {
    "mlp": MLP,
    "conv_encoder": ConvEncoder,
    "conv_decoder": ConvDecoder,
    "recurrent": Recurrent,
}


def network_from_config(config: Mapping[str, Any]) -> Network:
    """Make a network from its ``config``, with fresh weights.

    Args:
        config: What a network's ``config`` says; arguments left out keep their defaults.

    Returns:
        The network.

    Raises:
        ValueError: If the name of the network or of an argument is unknown.

    Examples:
        >>> net = MLP(5, 2, activation="tanh")
        >>> network_from_config(net.config).config == net.config
        True
    """
    arguments = dict(config)
    name = arguments.pop("network", None)
    if name not in NETWORKS:
        raise unknown("network", name, NETWORKS)
    known = list(inspect.signature(NETWORKS[name]).parameters)
    for argument in arguments:
        if argument not in known:
            raise unknown(f"argument of network {name!r}", argument, known)
    return NETWORKS[name](**arguments)


def _half(size: int) -> int:
    return (size + 1) // 2


def _size(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number; got {value!r} ({type(value).__name__}). Write an int.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}. Give the number of units.")
    return value


def _sizes(name: str, values: object) -> list[int]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of whole numbers; got {values!r}. Write e.g. (64, 64).")
    return [_size(name, value) for value in values]


def _image(name: str, shape: object) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """An image's shape as given, and with its axis for channels."""
    sizes = tuple(_sizes(name, shape))
    if len(sizes) not in (2, 3):
        raise ValueError(
            f"{name} must be (height, width) or (channels, height, width); got {sizes}. "
            "Reshape the data, or use an MLP."
        )
    *depth, height, width = sizes
    return sizes, (depth[0] if depth else 1, height, width)


def _check_trailing(what: str, x: Tensor, expected: tuple[int | None, ...]) -> None:
    trailing = tuple(x.shape[max(0, x.dim() - len(expected)) :])
    matches = len(trailing) == len(expected) and all(
        size is None or size == found for size, found in zip(expected, trailing, strict=True)
    )
    if not matches:
        shown = ", ".join("T" if size is None else str(size) for size in expected)
        raise ValueError(
            f"{what} expects inputs of shape (*batch, {shown}); got {tuple(x.shape)}. "
            "Reshape the data, or make the network for this shape."
        )
