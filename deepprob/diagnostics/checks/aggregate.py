"""Do the codes of the rows together fill the prior?"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp
from sklearn.covariance import ledoit_wolf

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Array, Check, Verdict, array, number
from deepprob.diagnostics.checks.information import codes_of, has_codes
from deepprob.diagnostics.diagnostic import Diagnostic

NAME = "aggregate posterior"
_NATS = 1.0
_WIDTHS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
_LEARNED = (
    "Let the prior be learned: prior='mixture', 'vamp' or 'flow' of a VAE; one that is learned may need more "
    "components or layers."
)


def density_of_others(values: ArrayLike) -> Array:
    r"""The log-density of each row's codes under a density that was fitted to the codes of the other half of the rows.

    .. math:: r(z) = \frac1M \sum_j \mathrm N\big(z;\, m + \sqrt{1 - h^2}\, (z_j - m),\, h^2 S\big)

    with mean m and covariance S of the codes :math:`z_j`; with h = 1 it is one normal. The width h is that under which
    codes of one quarter of the rows are most likely, given those of another.

    Args:
        values: Codes, shape ``(draws, rows, latent)``.

    Returns:
        Log-densities, ``(draws, rows)``.

    Examples:
        >>> codes = np.random.default_rng(0).normal(size=(5, 400, 1))
        >>> log_prior = -np.square(codes[..., 0]) / 2 - np.log(2 * np.pi) / 2
        >>> bool(abs((density_of_others(codes) - log_prior).mean()) < 0.05)
        True
    """
    codes = array(values)
    order = np.random.default_rng(0).permutation(codes.shape[1])
    halves = order[::2], order[1::2]
    result = np.empty(codes.shape[:2])
    for known, new in (halves, halves[::-1]):
        fit, trial = codes[:, known[::2]], codes[:, known[1::2]]
        width = max(_WIDTHS, key=lambda h: float(_kernels(fit, trial, h).mean()))
        result[:, new] = _kernels(codes[:, known], codes[:, new], width)
    return result


def _kernels(known: Array, new: Array, width: float) -> Array:
    """The log-density of new codes, ``(draws, rows)``, under kernels around known ones."""
    centre, latent = known.mean((0, 1)), known.shape[-1]
    root = np.linalg.cholesky(np.atleast_2d(ledoit_wolf(known[0])[0]) + 1e-9 * np.eye(latent))
    a, b = (np.linalg.solve(root, (x - centre).reshape(-1, latent).T).T for x in (known, new))
    a *= math.sqrt(1 - width**2)
    squares = np.square(b).sum(1)[:, None] + np.square(a).sum(1) - 2 * b @ a.T  # (new, known)
    constant = latent * math.log(width * math.sqrt(2 * math.pi)) + float(np.log(np.diag(root)).sum())
    found: Array = logsumexp(-squares / (2 * width**2), axis=1) - math.log(len(a)) - constant
    return found.reshape(new.shape[:2])


def check_aggregate(aggregate: ArrayLike, others: ArrayLike, prior: ArrayLike) -> Check:
    r"""The KL divergence of the aggregate posterior from the prior, between two bounds.

    .. math:: \mathrm{KL}(q(z) \,\|\, p(z)) = \frac1N \sum_i \mathrm{KL}(q(z \mid x_i) \,\|\, p(z)) - I_q(x; z),
              \qquad q(z) = \mathbb E_x\, q(z \mid x)

    The mean of :math:`\log r(z) - \log p(z)` over codes is a lower bound, for any density r that has not seen their
    rows (`density_of_others`); with the guides of all rows in the place of r it is an upper bound. They are far apart
    if codes are sharp and rows are few.

    Args:
        aggregate: ``log 1/N sum_j q(z_i | x_j)``, shape ``(draws, N)``.
        others: ``log r(z_i)``.
        prior: ``log p(z_i)``.

    Returns:
        The lower bound, at least 0; a caution if it is surely above 1 nat: of a distribution that is the prior in some
        region and zero outside, more than 63 % of the draws of the prior lie outside.

    References:
        Hoffman, Johnson (2016), ELBO surgery.
        Poole, Ozair, van den Oord, Alemi, Tucker (2019), On Variational Bounds of Mutual Information.

    Examples:
        Codes everywhere twice as dense as the prior leave half of it empty:

        >>> check_aggregate(*np.log([[[2.0] * 9], [[2.0] * 9], [[1.0] * 9]])).value.__round__(3)
        0.693
    """
    below, above = ((array(x) - array(prior)).mean(0) for x in (others, aggregate))
    lower, upper = float(below.mean()), max(float(above.mean()), 0.0)
    se = float(below.std(ddof=1) / math.sqrt(len(below)))
    verdict: Verdict = "caution" if lower - 1.645 * se > _NATS else "pass"
    return Check(
        name=NAME,
        value=max(lower, 0.0),
        se=se if lower > 0 else None,
        threshold=_NATS,
        verdict=verdict,
        reading=f"The KL divergence from the codes of {len(below)} rows together to the prior is between "
        f"{number(max(lower, 0.0))} and {number(upper)} nats"
        + (": many codes that the prior draws are unlike those of rows." if verdict == "caution" else "."),
        next_step="" if verdict == "pass" else _LEARNED,
        details={"lower": lower, "upper": upper, "rows": len(below)},
        unit="nats",
    )


def _run(case: Case, level: float) -> Check:
    found = codes_of(case)
    return check_aggregate(found.aggregate, density_of_others(found.values), found.prior)


aggregate_posterior = Diagnostic(
    NAME, "Do the codes of the rows together fill the prior?", has_codes, _run, about="predictions"
)
