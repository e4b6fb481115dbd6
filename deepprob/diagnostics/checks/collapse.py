"""Do the codes say anything about the rows?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import ArrayLike

from deepprob.diagnostics.case import Case, Diagnostic
from deepprob.diagnostics.check import Array, Check, Verdict, array, number

ACTIVE = 0.01
NAME = "codes are used"


def explained(draws: ArrayLike) -> tuple[Array, Array]:
    r"""The share of each code's variance that the rows explain, and its standard error.

    .. math:: A_d = \frac{\mathrm{Var}_x \mathbb{E}_q[z_d \mid x]}{\mathrm{Var}_x \mathbb{E}_q[z_d \mid x] +
              \mathbb{E}_x \mathrm{Var}_q[z_d \mid x]}

    The variance of the row means is freed of what the finite number of draws adds. For a prior of
    unit variance it is the activity of Burda et al.; a share does not depend on the prior's scale.

    Args:
        draws: Posterior draws, shape ``(draws, rows, latent)``.

    Returns:
        Two arrays of shape ``(latent,)``.

    References:
        Burda, Grosse, Salakhutdinov (2016), Importance Weighted Autoencoders.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> codes = np.stack([rng.normal(size=(100, 50)), rng.normal(size=50) + 0.1 * rng.normal(size=(100, 50))], -1)
        >>> (explained(codes)[0] > 0.01).tolist()
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


def information(guide_trace: Any, model_trace: Any) -> dict[str, Array]:
    """Nats that the guide holds about each coordinate of each local code, ``KL(q(z_d | x) || p(z_d))`` over rows.

    Args:
        guide_trace: Trace of the guide over some rows, draws leading.
        model_trace: Trace of the model on the guide's values.

    Returns:
        Site to an array, one number per coordinate of the last axis, the others averaged over; one
        number for a site whose guide does not factorise over coordinates.
    """
    result = {}
    for name, node in guide_trace.nodes.items():
        if node["type"] != "sample" or node.get("is_observed") or name not in model_trace.nodes:
            continue
        prior = model_trace.nodes[name]
        if isinstance(node["fn"], dist.Delta) or type(node["fn"]).__name__ == "_Subsample":
            continue
        result[name] = _coordinates(node["fn"], prior["fn"], node["value"])
    return result


def _coordinates(guide: Any, prior: Any, value: Any) -> Array:
    q, p = _base(guide), _base(prior)
    try:
        kl = torch.distributions.kl_divergence(q, p)
        factorised = not q.event_shape and bool(guide.event_shape)
    except NotImplementedError:
        kl, factorised = guide.log_prob(value) - prior.log_prob(value), False
    values = array(kl)
    if not factorised:
        return array([values.mean()])
    events = len(guide.event_shape)
    if events > 1:  # positions before the last axis belong to one code: their nats add up
        values = values.sum(tuple(range(values.ndim - events, values.ndim - 1)))
    return array(values.reshape(-1, values.shape[-1]).mean(0))


def _base(fn: Any) -> Any:
    while isinstance(fn, dist.Independent | torch.distributions.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def used_codes(draws: ArrayLike, nats: ArrayLike | None = None, *, name: str = NAME) -> Check:
    """How many coordinates of the code depend on the row at all.

    Args:
        draws: Posterior draws of the code, shape ``(draws, rows, latent)``.
        nats: KL of each coordinate from the prior, shape ``(latent,)``.
        name: What to call the check.

    Returns:
        The share of coordinates of which rows explain more than 1 %; a caution below a half, a fail
        at none.

    Examples:
        Codes drawn from the prior, whatever the row, have collapsed:

        >>> used_codes(np.random.default_rng(0).normal(size=(100, 200, 4))).verdict
        'fail'
    """
    share, se = explained(draws)
    active = share - 2 * se > ACTIVE
    count, latent = int(active.sum()), len(share)
    value = count / latent
    verdict: Verdict = "fail" if count == 0 else "caution" if value < 0.5 else "pass"
    total = None if nats is None else float(np.sum(array(nats)))
    said = "" if total is None else f", {number(total)} nats per row in all"
    return Check(
        name=name,
        value=value,
        se=None,
        threshold=0.5,
        verdict=verdict,
        reading=f"{count} of {latent} code coordinates depend on the row{said}"
        + (": the posterior has collapsed to the prior." if count == 0 else "."),
        next_step=""
        if verdict == "pass"
        else "Warm the KL up over more epochs, weaken the decoder, or lower latent_dim to what is used.",
        details={
            "explained": share.tolist(),
            "explained_se": se.tolist(),
            "kl": None if nats is None else array(nats).tolist(),
            "active": count,
            "latent": latent,
        },
    )


def codes(case: Case) -> tuple[Array, Array | None]:
    """Draws of all local continuous codes side by side, ``(draws, rows, latent)``, and the nats of each coordinate."""
    guide, model = case.traces
    nats = information(guide, model)
    values, amounts = [], []
    for site in nats:
        if case.posterior.latent_sites.get(site) != "local" or not guide.nodes[site]["value"].is_floating_point():
            continue
        value = array(guide.nodes[site]["value"])
        value = value.reshape(*value.shape[:2], -1) if value.ndim <= 3 else value.mean(tuple(range(2, value.ndim - 1)))
        values.append(value)
        amounts.append(nats[site])
    joined = np.concatenate(values, -1)
    complete = sum(len(a) for a in amounts) == joined.shape[-1]
    return joined, np.concatenate(amounts) if complete else None


def _applies(case: Case) -> bool:
    if not case.per_row or len(case.sample_batch[0]) < 2:
        return False
    nodes = case.traces[0].nodes
    return any(
        kind == "local" and site in nodes and nodes[site]["value"].is_floating_point()
        for site, kind in case.posterior.latent_sites.items()
    )


def _run(case: Case, level: float) -> Check:
    return used_codes(*codes(case))


codes_are_used = Diagnostic(NAME, "Do the codes say anything about the rows?", _applies, _run)
