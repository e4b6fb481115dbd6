"""Noise of the weights that is separate for every row: local reparameterization and Flipout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

GRADIENTS = ("shared", "local", "flipout")

_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
_TINY = 1e-16  # of a variance, whose root has no gradient at 0


class RowNoise(TorchFunctionMode):
    r"""Within this context linear and convolutional layers draw independent normal weights for every row.

    A row sees the same distribution of outputs as with weights that all rows share, so the expectation of a loss that
    is a sum over rows does not change, nor does its gradient. Its variance falls, because the noise of rows averages.

    ``"local"`` draws the outputs of a linear layer instead of its weights,
    :math:`a_i \sim N(m^\top x_i, (s^2)^\top x_i^2)`, for weights with mean :math:`m` and standard deviation :math:`s`.
    A convolution uses a weight at many positions of a row, so independent outputs would be wrong: it uses Flipout.

    ``"flipout"`` gives the deviation of the drawn weights from their mean random signs for every row,
    :math:`a_i = m^\top x_i + r_i \odot (w - m)^\top (x_i \odot t_i)`.

    Layers of other kinds, and layers whose input has another number of rows than the network's, use the drawn weights.

    Args:
        kind: ``"local"`` or ``"flipout"``.
        rows: Number of rows of the network's inputs.
        weights: The drawn weights by name.
        means: Their means.
        sds: Their standard deviations.

    References:
        Kingma, Salimans, Welling (2015), Variational Dropout and the Local Reparameterization Trick.
        Wen, Vicol, Ba, Tran, Grosse (2018), Flipout: Efficient Pseudo-Independent Weight Perturbations on
        Mini-Batches.

    Examples:
        Equal rows get different outputs:

        >>> layer, x = torch.nn.Linear(3, 1), torch.ones(2, 3)
        >>> parts = dict(layer.named_parameters())
        >>> with RowNoise("local", 2, parts, parts, {n: torch.ones_like(p) for n, p in parts.items()}):
        ...     y = layer(x)
        >>> bool(y[0] != y[1])
        True
    """

    def __init__(
        self,
        kind: str,
        rows: int,
        weights: Mapping[str, Tensor],
        means: Mapping[str, Tensor],
        sds: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self._kind, self._rows = kind, rows
        self._moments = {id(w): (name, means[name], sds[name]) for name, w in weights.items() if name in means}
        self._drawn: set[str] = set()
        self._signs: dict[str, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_linear = func is functional.linear
        if (is_linear or func in _CONVOLUTIONS) and len(args) > 1 and id(args[1]) in self._moments:
            x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias")
            batched = x.dim() > 1 if is_linear else x.dim() == weight.dim()
            if batched and len(x) == self._rows:
                layer = _without_bias(func, args[3:], kwargs)
                if is_linear and x.dim() == 2 and self._kind == "local":
                    return self._local(x, weight, bias)
                return self._flipped(layer, x, weight, bias, -1 if is_linear else 1)
        return func(*args, **kwargs)

    def _local(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        name, mean, sd = self._moments[id(weight)]
        if name in self._drawn:
            raise ValueError(
                f"the network uses weight {name!r} twice for one row, so gradients='local' would draw two independent "
                "weights. Use gradients='flipout'."
            )
        self._drawn.add(name)
        _, shift, spread = self._moments.get(id(bias), ("", bias, None))
        variance = functional.linear(x.square(), sd.square(), None if spread is None else spread.square())
        loc = functional.linear(x, mean, shift)
        return loc + variance.clamp_min(_TINY).sqrt() * torch.randn_like(loc)

    def _flipped(
        self, layer: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, axis: int
    ) -> Tensor:
        name, mean, _ = self._moments[id(weight)]
        loc = layer(x, mean)
        if name not in self._signs:  # a weight that a network uses twice is one weight
            self._signs[name] = _signs(x, axis), _signs(loc, axis)
        into, out = self._signs[name]
        deviation = layer(x * into, weight - mean)
        if bias is not None:
            _, shift, _ = self._moments.get(id(bias), ("", bias, None))
            places = [1] * loc.dim()
            places[axis] = -1
            loc, deviation = loc + shift.reshape(places), deviation + (bias - shift).reshape(places)
        return loc + out * deviation


def _without_bias(func: Callable[..., Any], rest: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Tensor]:
    """A layer as a function of input and weight, with its other options."""
    options = {name: value for name, value in kwargs.items() if name != "bias"}

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = func(x, weight, None, *rest, **options)
        return out

    return layer


def _signs(x: Tensor, axis: int) -> Tensor:
    """A random sign for every row and channel, of the rank of ``x``."""
    shape = [1] * x.dim()
    shape[0], shape[axis] = x.shape[0], x.shape[axis]
    return torch.where(torch.rand(shape, dtype=x.dtype, device=x.device) < 0.5, -1.0, 1.0).to(x.dtype)
