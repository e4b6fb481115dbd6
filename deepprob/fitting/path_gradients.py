"""Gradients of a bound along the paths of the guide's draws, without the score of the guide."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from deepprob.fitting.particles import is_rough
from deepprob.programs.random_weights import PER_ROW
from deepprob.programs.sites import sample_sites


def path_loss(value: Tensor, model: Tensor, draws: Tensor, drawn: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    r"""The negative of a bound, whose gradient has one part from the model and one along the guide's draws.

    .. math:: \nabla_\theta \, m(\theta, z') + \sum_i \frac{\partial d(z')}{\partial z'_i} \nabla_\phi \, z_i(\phi)

    where :math:`z'` are copies of the draws :math:`z` that are leaves of the graph. The second part lacks the gradient
    of the guide's density at a fixed draw, the score, whose expectation is zero.

    Args:
        value: The bound.
        model: The term m, which is differentiated in the parameters; it must not depend on the guide's.
        draws: The term d, which is differentiated in the copies.
        drawn: Copies and draws, see `deepprob.programs.run.Run.leaves`.

    References:
        Roeder, Wu, Duvenaud (2017), Sticking the Landing.
    """
    total = model
    if drawn:
        slopes = torch.autograd.grad(draws, [leaf for leaf, _ in drawn], retain_graph=True, materialize_grads=True)
        paths = [(slope * draw).sum() for slope, (_, draw) in zip(slopes, drawn, strict=True)]
        total = model + torch.stack(paths).sum()
    return -(value.detach() + total - total.detach())


def check_reparameterized(estimator: str, guide_trace: Trace) -> None:
    """Check that all draws of a guide have a reparameterized gradient.

    Raises:
        ValueError: If one has not, or is drawn for every row alone.
    """
    for name, site in sample_sites(guide_trace):
        if site["infer"].get(PER_ROW):
            raise ValueError(
                f"{estimator!r} needs one draw of {name!r} for all rows, but the program draws it anew for every row. "
                "Use gradients='shared', or objective='elbo'."
            )
        if is_rough(site):
            raise ValueError(
                f"{estimator!r} needs draws with a reparameterized gradient, but site {name!r} is drawn from "
                f"{type(site['fn']).__name__}, which has none. Use objective='elbo' or 'iwae', or sum the site out."
            )
