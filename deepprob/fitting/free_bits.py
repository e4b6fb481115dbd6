"""The KL of local latents with a minimum for every dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from deepprob.distributions.per_draw import is_delta
from deepprob.fitting.particles import is_rough
from deepprob.programs.enumeration import any_enumerated
from deepprob.programs.kl import closed_form_kls, same_scale
from deepprob.programs.sites import Site, is_auxiliary, is_local, log_prob, sample_sites


def free_kl(plate: str, traces: Sequence[tuple[Trace, Trace]], free_bits: float, norm: float) -> Tensor:
    r"""The KL of local latents per datum, each dimension of them at least ``free_bits`` nats.

    .. math:: \sum_d \max\big(\lambda, \tfrac1B \textstyle\sum_i \mathrm{KL}(q(z_{id}) \,\|\, p(z_{id}))\big)

    A site that does not factorize over dimensions in closed form counts as one, with ``free_bits`` times its size.

    Args:
        plate: Name of the data plate.
        traces: The run's traces of guide and model.
        free_bits: The minimum, in nats.
        norm: What turns a sum over all rows into a mean: 1 over rows and particles.

    Raises:
        ValueError: If a site is summed out, discrete, or computed from another one.
    """
    if any_enumerated(traces):
        raise ValueError(
            "free_bits needs latent sites that the guide draws; this program sums sites out. Leave it out."
        )
    ((guide_trace, model_trace),) = traces
    closed = closed_form_kls(guide_trace, model_trace)
    total = torch.zeros(())
    for name, site in sample_sites(guide_trace):
        if site["is_observed"] or is_auxiliary(site) or not is_local(site, plate):
            continue
        if is_rough(site) or (is_delta(site["fn"]) and name not in closed):
            raise ValueError(
                f"free_bits needs latent sites that the guide draws itself, with a reparameterized gradient; {name!r} "
                "is discrete or computed from another site. Leave it out."
            )
        prior = model_trace.nodes[name]
        groups = _by_dimension(site, prior)
        if groups is None:
            groups = (closed[name] if name in closed else log_prob(site) - log_prob(prior)).sum()
        size = site["fn"].event_shape.numel() / max(1, groups.numel())
        total = total + (groups * norm).clamp_min(free_bits * size).sum()
    return total


def _by_dimension(guide: Site, model: Site) -> Tensor | None:
    """The KL of every dimension, summed over rows and draws, of the event's shape; None without a closed form."""
    q, p = guide["fn"], model["fn"]
    dims = q.event_dim
    while isinstance(q, Independent) and isinstance(p, Independent):
        if q.reinterpreted_batch_ndims != p.reinterpreted_batch_ndims:
            return None
        q, p = q.base_dist, p.base_dist
    if not dims or q.event_shape or p.event_shape or not same_scale(guide, model):
        return None
    try:
        kl = kl_divergence(q, p.expand(q.batch_shape) if p.batch_shape != q.batch_shape else p)
    except NotImplementedError:
        return None
    for factor in (guide["scale"], guide["mask"]):
        if isinstance(factor, Tensor):
            kl = kl * factor.reshape(factor.shape + (1,) * dims)
        elif factor is not None:
            kl = kl * float(factor)
    return kl.flatten(0, -dims - 1).sum(0) if kl.dim() > dims else kl
