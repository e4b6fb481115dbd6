"""Do the latent dimensions depend on the data, or has the posterior collapsed to the prior?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import ArrayLike

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Array, Check, Verdict, array, number
from deepprob.diagnostics.diagnostic import Diagnostic
from deepprob.diagnostics.remedies import AGAINST_COLLAPSE
from deepprob.programs.minibatch import num_rows

ACTIVE_SHARE, LEAST_NATS = 0.01, 0.05
NAME = "active latent dimensions"


def explained_variance(draws: ArrayLike) -> tuple[Array, Array]:
    r"""Share of the variance of each latent dimension that differences between rows explain, with its standard error.

    .. math:: A_d = \frac{\mathrm{Var}_x \mathbb{E}_q[z_d \mid x]}{\mathrm{Var}_x \mathbb{E}_q[z_d \mid x] +
              \mathbb{E}_x \mathrm{Var}_q[z_d \mid x]}

    The variance of the row means is corrected for the finite number of draws. For a prior of unit variance
    it is the activity of Burda et al.; the share does not depend on the scale of the prior.

    Args:
        draws: Posterior draws, shape ``(draws, rows, latent)``.

    Returns:
        Two arrays of shape ``(latent,)``.

    References:
        Burda, Grosse, Salakhutdinov (2016), Importance Weighted Autoencoders.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> codes = np.stack([rng.normal(size=(100, 50)), rng.normal(size=50) + 0.1 * rng.normal(size=(100, 50))], -1)
        >>> (explained_variance(codes)[0] > 0.01).tolist()
        [False, True]
    """
    values = array(draws)
    count, rows = values.shape[:2]
    centre, noise = values.mean(0), values.var(0, ddof=1)  # (rows, latent)
    squares = np.square(centre - centre.mean(0)) * rows / (rows - 1) - noise / count
    between, within = squares.mean(0), noise.mean(0)
    total = np.maximum(between + within, np.finfo(float).tiny)
    share = np.clip(between, 0.0, None) / total
    se = squares.std(0, ddof=1) / np.sqrt(rows) / total
    return share, se


def kl_from_prior(guide_trace: Any, model_trace: Any) -> dict[str, Array]:
    """KL of each latent dimension from its prior, ``KL(q(z_d | x) || p(z_d))``, in nats, averaged over rows.

    Args:
        guide_trace: Trace of the guide on some rows; the leading dimension is draws.
        model_trace: Trace of the model with the guide's values.

    Returns:
        An array by site: one number per latent dimension, or a single number if the guide does not
        factorize over the dimensions.
    """
    result = {}
    for name, node in guide_trace.nodes.items():
        if node["type"] != "sample" or node.get("is_observed") or name not in model_trace.nodes:
            continue
        prior = model_trace.nodes[name]
        if isinstance(node["fn"], dist.Delta) or type(node["fn"]).__name__ == "_Subsample":
            continue
        result[name] = _dimension_kl(node["fn"], prior["fn"], node["value"])
    return result


def _dimension_kl(guide: Any, prior: Any, value: Any) -> Array:
    q, p = _base(guide), _base(prior)
    try:
        kl = torch.distributions.kl_divergence(q, p)
        factorized = not q.event_shape and bool(guide.event_shape)
    except NotImplementedError:
        kl, factorized = guide.log_prob(value) - prior.log_prob(value), False
    values = array(kl)
    if not factorized:
        return array([values.mean()])
    events = len(guide.event_shape)
    if events > 1:  # axes before the last one belong to the same code: sum their KL
        values = values.sum(tuple(range(values.ndim - events, values.ndim - 1)))
    return array(values.reshape(-1, values.shape[-1]).mean(0))


def _base(fn: Any) -> Any:
    while isinstance(fn, dist.Independent | torch.distributions.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def check_active_dimensions(draws: ArrayLike, kl: ArrayLike | None = None) -> Check:
    """How many latent dimensions depend on the row.

    Args:
        draws: Posterior draws of the code, shape ``(draws, rows, latent)``.
        kl: KL of each latent dimension from the prior in nats, shape ``(latent,)``.

    Returns:
        The share of active dimensions: those of whose variance the row surely explains more than 1 %, and which carry
        at least 0.05 nats for a row. A caution below a half, a fail if there is none.

    Examples:
        Codes that are drawn from the prior for every row have collapsed:

        >>> check_active_dimensions(np.random.default_rng(0).normal(size=(100, 200, 4))).verdict
        'fail'
    """
    share, se = explained_variance(draws)
    active = share - 2 * se > ACTIVE_SHARE
    if kl is not None:
        active &= array(kl) >= LEAST_NATS
    count, latent = int(active.sum()), len(share)
    value = count / latent
    verdict: Verdict = "fail" if count == 0 else "caution" if value < 0.5 else "pass"
    total = (
        "" if kl is None else f"; their KL from the prior is {number(float(np.sum(array(kl))))} nats per row in total"
    )
    found, remedy = ".", ""
    if verdict == "fail":
        found, remedy = ": the posterior has collapsed to the prior.", AGAINST_COLLAPSE
    elif verdict == "caution":
        found = f": the posterior of the other {latent - count} has collapsed to the prior."
        remedy = f"{AGAINST_COLLAPSE} If fewer dimensions are enough, reduce latent_dim."
    return Check(
        name=NAME,
        value=value,
        se=None,
        threshold=0.5,
        verdict=verdict,
        reading=f"{count} of {latent} latent dimensions depend on the row{total}{found}",
        next_step=remedy,
        details={
            "explained": share.tolist(),
            "explained_se": se.tolist(),
            "kl": None if kl is None else array(kl).tolist(),
            "active": count,
            "latent": latent,
        },
        good=">=",
    )


def code_draws(case: Case) -> tuple[Array, Array | None]:
    """Draws of all continuous local latents, joined to ``(draws, rows, latent)``, and the KL of each dimension."""
    guide, model = case.traces
    kl = kl_from_prior(guide, model)
    values, amounts = [], []
    for site in kl:
        if case.posterior.latent_sites.get(site) != "local" or not guide.nodes[site]["value"].is_floating_point():
            continue
        value = array(guide.nodes[site]["value"])
        value = value.reshape(*value.shape[:2], -1) if value.ndim <= 3 else value.mean(tuple(range(2, value.ndim - 1)))
        values.append(value)
        amounts.append(kl[site])
    joined = np.concatenate(values, -1)
    complete = sum(len(a) for a in amounts) == joined.shape[-1]
    return joined, np.concatenate(amounts) if complete else None


def _applies(case: Case) -> bool:
    if not (case.per_row and case.posterior._fitted.amortized) or num_rows(case.sample_batch) < 2:
        return False
    nodes = case.traces[0].nodes
    return any(
        kind == "local" and site in nodes and nodes[site]["value"].is_floating_point()
        for site, kind in case.posterior.latent_sites.items()
    )


def _run(case: Case, level: float) -> Check:
    return check_active_dimensions(*code_draws(case))


active_dimensions = Diagnostic(
    NAME, "How many latent dimensions depend on the data?", _applies, _run, about="posterior"
)
