"""Normalizing flows of affine couplings: a distribution with a flexible shape and an exact density."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Generator, Tensor, nn
from torch.distributions import Transform, constraints

from deepprob.errors import whole
from deepprob.networks.conditional import positive_link
from deepprob.networks.dense import MLP
from deepprob.networks.network import whole_sizes

_MAX_LOG_SCALE = 2.0  # of one coupling; keeps both directions accurate in float32
_CONTEXT_DIM = 32
_FLOOR = 1e-4  # of standard deviations, as of Conditional


class Flow(nn.Module):
    r"""A stack of affine couplings, each of which moves some entries of a vector given the others and a context.

    .. math:: y = x + (1 - m) \odot \big(x \odot (e^{s} - 1) + t\big), \qquad (s, t) = \mathrm{net}(m \odot x, c)

    with a fixed mask :math:`m` and :math:`|s| < 2`. Both directions take one pass, and :math:`\log |\det J|` is the sum
    of :math:`(1 - m) \odot s`. New weights are the identity map.

    Args:
        dim: Size of the vector, at least 2: a coupling moves one part given the other.
        layers: Number of couplings.
        hidden_dims: Sizes of the hidden layers of each coupling's network.
        context_dim: Size of the context; 0 for none.

    Raises:
        TypeError: If ``hidden_dims`` is not a sequence.
        ValueError: If a size is not a whole number in its range.

    References:
        Dinh, Sohl-Dickstein, Bengio (2017), Density Estimation using Real NVP.

    Examples:
        The inverse undoes the map, and the change of volume is the same both ways:

        >>> flow = Flow(3)
        >>> for p in flow.parameters():
        ...     _ = p.data.normal_(std=0.3)
        >>> x = torch.randn(5, 3)
        >>> y, log_det = flow(x)
        >>> back, log_det_back = flow.inverse(y)
        >>> torch.allclose(x, back, atol=1e-5), torch.allclose(log_det, -log_det_back, atol=1e-5)
        (True, True)
    """

    mask: Tensor

    def __init__(self, dim: int, layers: int = 4, hidden_dims: Sequence[int] = (64,), context_dim: int = 0) -> None:
        super().__init__()
        self.dim = whole("dim", dim)
        if self.dim < 2:
            raise ValueError(
                "a flow needs at least 2 latent dimensions, because a coupling moves one given the other; got 1. "
                "Use posterior='normal', or prior='mixture'."
            )
        count, context_dim = whole("layers", layers), whole("context_dim", context_dim, least=0)
        hidden = whole_sizes("hidden_dims", hidden_dims)
        self.couplings = nn.ModuleList(MLP(self.dim + context_dim, 2 * self.dim, hidden, "silu") for _ in range(count))
        bits = (self.dim - 1).bit_length()  # every two entries differ in a bit of their index
        kept = [[(i >> (n // 2 % bits)) % 2 == n % 2 for i in range(self.dim)] for n in range(count)]
        self.register_buffer("mask", torch.tensor(kept, dtype=torch.get_default_dtype()), persistent=False)
        self.draw_weights()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``(*batch, dim)``; returns the result and ``log |det J|``, ``(*batch,)``."""
        log_det = x.new_zeros(())
        for mask, net in zip(self.mask.unbind(), self.couplings, strict=True):
            log_scale, shift = self._move(net, mask, x, context)
            x, log_det = x * log_scale.exp() + shift, log_det + log_scale.sum(-1)
        return x, log_det

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map back ``(*batch, dim)``; returns the result and the inverse's ``log |det J|``, ``(*batch,)``."""
        log_det = y.new_zeros(())
        for mask, net in zip(reversed(self.mask.unbind()), reversed(self.couplings), strict=True):
            log_scale, shift = self._move(net, mask, y, context)
            y, log_det = (y - shift) * (-log_scale).exp(), log_det - log_scale.sum(-1)
        return y, log_det

    def distribution(self, loc: Tensor, scale: Tensor, context: Tensor | None = None) -> Any:
        """The distribution of a normal's draws, ``(*batch, dim)``, after the map."""
        base = dist.Normal(loc, scale, validate_args=False).to_event(1)
        return dist.TransformedDistribution(base, [_FlowTransform(self, context)], validate_args=False)

    def draw_weights(self, generator: Generator | None = None) -> dict[str, str]:
        """Redraw the hidden layers; the last ones become zero, so that the flow is the identity."""
        record: dict[str, str] = {}
        for index, net in enumerate(self.couplings):
            own = net.draw_weights(generator)  # type: ignore[operator]
            last = len(net.layers) - 1  # type: ignore[arg-type]
            for parameter in net.layers[last].parameters():  # type: ignore[index, union-attr]
                nn.init.zeros_(parameter)
            own |= {f"layers.{last}.weight": "zeros", f"layers.{last}.bias": "zeros"}
            record |= {f"couplings.{index}.{name}": scheme for name, scheme in own.items()}
        return record

    def _move(self, net: nn.Module, mask: Tensor, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-scale and shift of a coupling, zero for the entries that it keeps."""
        seen = x * mask
        if context is not None:
            batch = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
            seen = torch.cat([seen.expand(*batch, -1), context.expand(*batch, -1)], -1)
        raw, shift = net(seen).chunk(2, -1)
        moved = 1.0 - mask
        return moved * _MAX_LOG_SCALE * torch.tanh(raw / _MAX_LOG_SCALE), moved * shift


class _FlowTransform(Transform):
    """A flow given a context, for one run: it remembers its last draw, whose density then costs nothing."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, flow: Flow, context: Tensor | None) -> None:
        super().__init__(cache_size=1)
        self.flow, self.context = flow, context
        self._cached_y_log_det: tuple[Tensor | None, Tensor | None] = (None, None)

    def _call(self, x: Tensor) -> Tensor:
        y: Tensor
        y, log_det = self.flow(x, self.context)
        self._cached_y_log_det = y, log_det
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, log_det = self.flow.inverse(y, self.context)
        self._cached_y_log_det = y, -log_det
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        known, log_det = self._cached_y_log_det
        if known is y and log_det is not None:
            return log_det
        found: Tensor = self.flow(x, self.context)[1]
        return found


class ConditionalFlow(nn.Module):
    r"""Distribution over a vector given a context: a normal that a flow bends, both from a network's outputs.

    .. math:: x = f(\mu + \sigma \odot \epsilon; h), \qquad (\mu, \sigma, h) = \mathrm{network}(c)

    Args:
        network: Maps a context to ``(*batch, size)``, with ``size`` from :meth:`size`: the mean, the raw standard
            deviation and 32 numbers that steer the flow.
        dim: Size of the vector.
        layers: Number of couplings.
        hidden_dims: Sizes of the hidden layers of each coupling's network.

    Raises:
        ValueError: If ``dim`` is less than 2, or another size is not a whole number of at least 1.

    References:
        Rezende, Mohamed (2015), Variational Inference with Normalizing Flows.

    Examples:
        >>> given = ConditionalFlow(nn.Linear(5, ConditionalFlow.size(2)), 2)
        >>> given(torch.zeros(3, 5)).batch_shape
        torch.Size([3])
    """

    def __init__(self, network: nn.Module, dim: int, *, layers: int = 4, hidden_dims: Sequence[int] = (64,)) -> None:
        super().__init__()
        self.flow = Flow(dim, layers, hidden_dims, _CONTEXT_DIM)
        self.network = network
        self.family, self.event_shape, self.in_size = "flow", torch.Size([dim]), self.size(dim)

    @staticmethod
    def size(dim: int) -> int:
        """Number of network outputs that a vector of some size needs."""
        return 2 * dim + _CONTEXT_DIM

    def forward(self, *context: Tensor) -> Any:
        """Distribution given a context, with its leading axes as batch shape."""
        return self.distribution(self.network(*context))

    def distribution(self, raw: Tensor) -> Any:
        """Distribution given the network's output, ``(*batch, size)``."""
        (dim,) = self.event_shape
        loc, scale, context = raw.split([dim, dim, _CONTEXT_DIM], -1)
        return self.flow.distribution(loc, positive_link(scale, _FLOOR), context)
