"""Paths of Markov chains with Gaussian steps: drawn step by step, scored all at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints, register_kl
from torch.func import functional_call

from deepprob.engine.scan.operator import Tensors
from deepprob.engine.scan.recur import is_tracing, recur

Kernel = Callable[..., tuple[Tensor, Tensor]]


class GaussianPath(TorchDistribution):
    r"""Distribution of a path :math:`z_{1:T}` of a Markov chain with diagonal Gaussian steps, padded with zeros.

    .. math:: p(z_{1:T}) = \prod_{t=1}^{T_i} \mathcal N\big(z_t \mid \mu(z_{t-1}, c_t), \sigma^2(z_{t-1}, c_t)\big)

    A draw calls the kernel :math:`(z_{t-1}, c_t) \mapsto (\mu, \sigma)` step by step on ``(*batch, Z)``; a
    log-probability calls it once on ``(*batch, T, Z)``. Beyond its length, a path is zero and adds nothing to the
    log-probability. A draw has shape ``sample_shape + batch + (T, Z)``.

    ``kl_divergence(q, p)`` of two paths sums the closed-form KL of every step, given the previous step of the path that
    ``q`` drew last. The estimate is unbiased and reparameterized, with less variance than ``log q - log p``.

    Args:
        kernel: Maps the previous state, ``(*batch, Z)``, and one slice of each context, ``(*batch, C)``, to a mean and
            a standard deviation, each ``(*batch, Z)``, for any number of batch axes.
        initial: The state before the first step, :math:`z_0`, shape ``(Z,)``, or ``(*batch, Z)`` for one of each path.
        lengths: Number of real steps of each path, shape ``batch``.
        steps: Number of steps T, including padding.
        context: Other inputs of the kernel, each ``(*batch, T, C)``.

    Examples:
        Padding does not change the log-probability:

        >>> def walk(z):
        ...     return z, torch.ones_like(z)
        >>> z = torch.randn(1, 3, 2)
        >>> padded = torch.cat([z, torch.randn(1, 4, 2)], 1)
        >>> short = GaussianPath(walk, torch.zeros(2), torch.tensor([3]), 3)
        >>> long = GaussianPath(walk, torch.zeros(2), torch.tensor([3]), 7)
        >>> torch.allclose(short.log_prob(z), long.log_prob(padded))
        True
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self, kernel: Kernel, initial: Tensor, lengths: Tensor, steps: int, context: Sequence[Tensor] = ()
    ) -> None:
        self.kernel, self.initial, self.context = kernel, initial, tuple(context)
        self.inside = (torch.arange(steps, device=lengths.device) < lengths.unsqueeze(-1)).unsqueeze(-1)  # (*, T, 1)
        self._drawn: tuple[Tensor, Tensor, Tensor] | None = None
        super().__init__(lengths.shape, torch.Size([steps, initial.shape[-1]]), validate_args=False)

    @classmethod
    def example(cls) -> GaussianPath:
        """Three small paths, for the tests that every distribution passes."""

        def kernel(z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
            return 0.8 * z + context, torch.full_like(z, 0.5)

        return cls(kernel, torch.ones(2), torch.tensor([2, 2, 2]), 2, [torch.linspace(-1.0, 1.0, 6).reshape(3, 2, 1)])

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> GaussianPath:
        new: GaussianPath = self._get_checked_instance(GaussianPath, _instance)  # type: ignore[no-untyped-call]
        new.kernel, new.initial, new.context = self.kernel, self.initial, self.context
        new.inside, new._drawn = self.inside, None
        TorchDistribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        steps, size = self.event_shape
        shape = (*sample_shape, *self.batch_shape, size)
        # The time axis leads, so that a step's draw does not depend on the padding after it.
        noise = torch.randn((steps, *shape), dtype=self.initial.dtype, device=self.initial.device)
        kernel, params = _functional(self.kernel)

        def step(state: Tensors, slices: Tensors, params: Tensors) -> tuple[Tensors, Tensors]:
            loc, scale = kernel(params, state[0], *slices[1:])
            z = torch.addcmul(loc, scale, slices[0])
            return (z,), (z, loc, scale)

        inputs = [noise, *(c.movedim(-2, 0) for c in self.context)]
        _, drawn_steps = recur(step, [self.initial.expand(shape)], inputs, params)
        path, loc, scale = (y.movedim(0, -2) for y in drawn_steps)  # each (*shape, T, Z)
        drawn = torch.where(self.inside, path, 0.0)
        self._drawn = drawn, loc, scale
        return drawn

    def conditionals(self, path: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every step given the previous step of a path, each ``(*batch, T, Z)``."""
        if self._drawn is not None and path is self._drawn[0]:
            return self._drawn[1:]
        start = self.initial.unsqueeze(-2).expand(*path.shape[:-2], 1, path.shape[-1])
        return self.kernel(torch.cat([start, path[..., :-1, :]], -2), *self.context)

    def log_prob(self, value: Tensor) -> Tensor:
        loc, scale = self.conditionals(value)
        terms = -0.5 * ((value - loc) / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)
        return self._total(terms)

    def last_drawn(self) -> Tensor:
        """The path drawn last, or a new one if there is none."""
        return self.rsample() if self._drawn is None else self._drawn[0]

    def _total(self, terms: Tensor) -> Tensor:
        """Sum over coordinates and real steps: ``(*batch, T, Z)`` to ``batch``."""
        return torch.where(self.inside, terms, 0.0).sum((-2, -1))


@register_kl(GaussianPath, GaussianPath)  # type: ignore[untyped-decorator]
def _kl_paths(q: GaussianPath, p: GaussianPath) -> Tensor:
    path = q.last_drawn()
    (q_loc, q_scale), (p_loc, p_scale) = q.conditionals(path), p.conditionals(path)
    ratio = q_scale / p_scale
    terms = 0.5 * (ratio.square() + ((q_loc - p_loc) / p_scale).square() - 1.0) - ratio.log()
    return q._total(terms)


def _functional(kernel: Callable[..., Any]) -> tuple[Callable[..., Any], Tensors]:
    """A pure function and its tensors, if the kernel is a module that is traced; else the kernel and no tensors.

    Args:
        kernel: A module, or any callable.

    Examples:
        >>> function, params = _functional(torch.nn.Identity())
        >>> function(params, 1.0)
        1.0
    """
    if (
        not isinstance(kernel, nn.Module)
        or any(isinstance(m, PyroModule) for m in kernel.modules())
        or not is_tracing()
    ):
        return lambda params, *arguments: kernel(*arguments), ()
    module, tensors = kernel, dict(kernel.named_parameters()) | dict(kernel.named_buffers())

    def function(params: Tensors, *arguments: Tensor) -> Any:
        return functional_call(module, dict(zip(tensors, params, strict=True)), arguments)

    return function, tuple(tensors.values())
