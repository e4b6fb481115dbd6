"""Closed-form KLs of sites."""

from __future__ import annotations

import numpy as np
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from deepprob.distributions.per_draw import is_delta
from deepprob.programs.enumeration import is_enumerated
from deepprob.programs.sites import Site, is_auxiliary, sample_sites


def closed_form_kls(guide_trace: Trace, model_trace: Trace) -> dict[str, Tensor]:
    """The KL of every site that has one in closed form, scaled and masked, of the site's batch shape.

    An AutoNormal draws an auxiliary normal and passes its value on as a Delta. If the value stays the same (an
    unconstrained site), the auxiliary normal is the site's posterior, and its two sites count once.

    Args:
        guide_trace: Trace of the guide.
        model_trace: Trace of the model replayed on it.

    Returns:
        KL by name. A site with an auxiliary site has its KL under its own name, and zero under the auxiliary's.
    """
    guide = {n: s for n, s in sample_sites(guide_trace) if not s["is_observed"]}
    order = list(guide)
    before: set[str] = set()
    found: dict[str, Tensor] = {}
    for name, prior in sample_sites(model_trace):
        if prior["is_observed"] or name not in guide:
            continue
        if is_enumerated(guide[name]):
            before.add(name)  # enumeration averages over all of its values
            continue
        site = guide[name]
        helper = guide.get(f"{name}_unconstrained")
        direct = helper is None or not is_auxiliary(helper) or not _same_memory(helper["value"], site["value"])
        posterior = site if direct or helper is None else helper
        # The closed form averages given earlier draws: sites earlier in the model must be earlier in the guide, too.
        if before <= set(order[: order.index(name)]):
            kl = _kl(posterior, prior)
            if kl is not None:
                found[name] = kl
                if posterior is not site:
                    found[f"{name}_unconstrained"] = torch.zeros_like(kl)
        before.add(name)
    return found


def same_scale(posterior: Site, prior: Site) -> bool:
    """Whether two sites have one scale; with different scales, log q and log p do not form one KL."""
    return posterior["scale"] is prior["scale"] or bool(posterior["scale"] == prior["scale"])


def _kl(posterior: Site, prior: Site) -> Tensor | None:
    q, p = posterior["fn"], prior["fn"]
    if not same_scale(posterior, prior):
        return None
    if is_delta(q):
        return None  # Pyro's closed form ignores log_density, which holds a change of variables
    shape = torch.Size(np.broadcast_shapes(q.batch_shape, p.batch_shape))
    # Some of torch's forms index one distribution's values by the other's: they need equal shapes.
    q, p = (d if d.batch_shape == shape else d.expand(shape) for d in (q, p))
    try:
        kl: Tensor = kl_divergence(q, p)
    except NotImplementedError:
        return None
    if kl.shape != shape:
        return None  # event dimensions interpreted differently
    return torch.as_tensor(scale_and_mask(kl, prior["scale"], prior["mask"]))


def _same_memory(one: Tensor, other: Tensor) -> bool:
    # A transform that changes nothing returns its argument, of which Delta makes a view.
    return one.shape == other.shape and one.data_ptr() == other.data_ptr()
