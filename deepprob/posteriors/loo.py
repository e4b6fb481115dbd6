"""Leave-one-out cross-validation by importance sampling, for posteriors of every kind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepprob.posteriors.arviz_compat import khat_limit, psis
from deepprob.posteriors.densities import joint_weights, log_likelihood, row_weights
from deepprob.posteriors.draw_chunks import DrawArray, draw_chunks, seed_of_part
from deepprob.posteriors.fitted import FittedProgram
from deepprob.programs.minibatch import Batch, num_rows

Array = NDArray[np.float64]
_ROWS = 1000  # at a time; bounds the memory of a block of rows with all draws


@dataclass(frozen=True, eq=False)
class LOO:
    """The expected log predictive density of left-out rows, in nats; higher is better.

    Attributes:
        pointwise: One value per row, shape ``(B,)``; nan where a draw gives no finite density.
        khat: Pareto k-hat of every row's importance weights, shape ``(B,)``; infinite where ``pointwise`` is nan.
        p_loo: How much better the rows are predicted if they are not left out: the effective number of parameters.
        draws: Number of draws, K.
        method: The weights, in words.
        guide_khat: Pareto k-hat of the guide's own weights; None if they were not used.
        weights: Weights of the rows in the fit, shape ``(B,)``, which are left out and summed with their rows; None for
            1 each.
    """

    pointwise: Array
    khat: Array
    p_loo: float
    draws: int
    method: str
    guide_khat: float | None = None
    weights: Array | None = None

    @property
    def elpd(self) -> float:
        """The sum over rows, weighted as in the fit."""
        return float(self.contributions.sum())

    @property
    def se(self) -> float:
        """The standard error of the sum: the spread over rows times the root of their number; nan for one row."""
        rows = len(self.pointwise)
        return math.sqrt(rows) * float(self.contributions.std(ddof=1)) if rows > 1 else math.nan

    @property
    def contributions(self) -> Array:
        """The terms of the sum, one per row: `pointwise`, weighted as in the fit."""
        return self.pointwise if self.weights is None else self.weights * self.pointwise

    @property
    def khat_limit(self) -> float:
        """The largest reliable k-hat; see `deepprob.posteriors.arviz_compat.khat_limit`."""
        return khat_limit(self.draws)

    @property
    def influential(self) -> NDArray[np.int64]:
        """The rows whose k-hat is above its limit, the highest first: their values are not reliable."""
        order = np.argsort(-self.khat, kind="stable")
        return order[self.khat[order] > self.khat_limit]

    def __str__(self) -> str:
        rows, bad = len(self.pointwise), self.influential
        lines = [
            f"LOO of {rows} rows: elpd {self.elpd:.1f} ± {self.se:.1f} nats, p_loo {self.p_loo:.1f} ({self.method}, "
            f"{self.draws} draws)",
        ]
        if self.guide_khat is not None and self.guide_khat > self.khat_limit:
            lines.append(
                f"The weights that correct the guide are unreliable themselves: k-hat {self.guide_khat:.2f} > "
                f"{self.khat_limit:.2f}. corrected=False gives the numbers of the guide as it is."
            )
        if len(bad):
            names = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
            subject, verb = ("1 row has", "is") if len(bad) == 1 else (f"{len(bad)} rows have", "are")
            lines.append(f"{subject} a k-hat above {self.khat_limit:.2f} and {verb} not reliable: {names}.")
        else:
            lines.append(f"All rows are reliable: k-hat <= {self.khat_limit:.2f}.")
        return "\n".join(lines)


def leave_one_out(
    fitted: FittedProgram,
    batch: Batch,
    draws: int,
    seed: int,
    *,
    site: str | None = None,
    corrected: bool | None = None,
) -> LOO:
    """LOO of an accepted batch; see `Posterior.loo`. By default a guide is corrected where its weights have a mean."""
    if fitted.amortized and fitted.chains is None and site is None:
        return _by_evidence(fitted, batch, draws, seed)
    _check_rows(fitted, batch)
    wanted = corrected is not False and fitted.chains is None
    logs, weights = _densities(fitted, batch, draws, seed, site, wanted)
    if bool((logs == logs[:1]).all()):
        raise ValueError(
            "the posterior is one point: every draw gives the rows the same density, so no draw can stand for a fit "
            "without a row. Score held-out rows with log_likelihood, or fit with a guide that has a width."
        )
    smoothed, khat = psis(weights)
    if wanted and corrected is None and khat > 1:
        wanted, weights, smoothed = False, np.zeros(draws), np.full(draws, -math.log(draws))
    own = fitted.row_weights_of(batch)
    shares = np.ones(logs.shape[1]) if own is None else own
    blocks = _blocks(logs.shape[1])
    found = [_row(logs[:, rows].astype(np.float64), weights, smoothed, shares[rows]) for rows in blocks]
    pointwise, khats, within = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return LOO(
        pointwise,
        khats,
        p_loo=float((shares * (within - pointwise)).sum()),
        draws=draws,
        method="stored draws" if fitted.chains is not None else "guide corrected" if wanted else "guide as it is",
        guide_khat=float(khat) if wanted else None,
        weights=own,
    )


def predictive_density(fitted: FittedProgram, batch: Batch, draws: int, seed: int) -> Array:
    r"""Log predictive density of every held-out row, ``(B,)``, in nats.

    .. math:: \log p(y_i) \approx \log \frac1K \sum_k p(y_i \mid \theta_k)

    A row's local latents are integrated out by the guide's importance weights.
    """
    if fitted.amortized and fitted.chains is None:
        return _by_evidence(fitted, batch, draws, seed).pointwise
    logs, _ = _densities(fitted, batch, draws, seed, None, corrected=False)
    found = [np.logaddexp.reduce(logs[:, rows].astype(np.float64), 0) for rows in _blocks(logs.shape[1])]
    return np.concatenate(found) - math.log(draws)


def left_out_weights(logs: Array, weights: Array | None = None) -> tuple[Array, Array]:
    r"""The weights that turn draws from the posterior into draws from the posterior without a row, smoothed by PSIS.

    .. math:: w_{ik} \propto w_k / p(y_i \mid x_i, \theta_k)

    Args:
        logs: Log-likelihood of every row under every draw, ``(K, B)``.
        weights: Log-weights of the draws themselves, ``(K,)``; None for equal ones.

    Returns:
        The log-weights, normalized over the draws, ``(K, B)``, and the Pareto k-hat of every row, ``(B,)``.

    Raises:
        ValueError: If there are fewer than 25 draws.

    References:
        Vehtari, Gelman, Gabry (2017), Practical Bayesian model evaluation using leave-one-out cross-validation and
        WAIC.

    Examples:
        The same density under all draws leaves them alike:

        >>> set(left_out_weights(np.zeros((100, 1)))[0].ravel().round(2).tolist())
        {-4.61}
    """
    try:
        smoothed, khat = psis((-logs if weights is None else weights[:, None] - logs).T)
    except ValueError as error:
        raise ValueError(
            f"leave-one-out predictions of rows of the fit need at least 25 draws; got {len(logs)}. Judge the "
            "posterior on held-out rows, or take more draws."
        ) from error
    return smoothed.T, np.asarray(khat)


def _row(logs: Array, weights: Array, smoothed: Array, shares: Array) -> tuple[Array, Array, Array]:
    """Left-out density, k-hat and density within the sample, for a block of rows ``(K, B)`` with weights ``(B,)``."""
    known = np.isfinite(logs).all(0) & bool(np.isfinite(smoothed).all())
    pointwise, khats, within = (np.full(logs.shape[1], x) for x in (np.nan, np.inf, np.nan))
    if known.any():
        left_out, khats[known] = left_out_weights(shares[known] * logs[:, known], weights)
        pointwise[known] = np.logaddexp.reduce(left_out + logs[:, known], 0)
        within[known] = np.logaddexp.reduce(smoothed + logs[:, known].T, 1)
    return pointwise, khats, within


def _densities(
    fitted: FittedProgram, batch: Batch, draws: int, seed: int, site: str | None, corrected: bool
) -> tuple[NDArray[np.float32], Array]:
    """Log-density of every row under every draw, ``(K, B)``, and the guide's log-weights, ``(K,)``."""
    logs, weights = DrawArray(draws), np.zeros(draws)
    done = 0
    for part, count, own_seed in draw_chunks(fitted, batch, draws, seed):
        with part.querying(own_seed):
            # Local latents that the guide draws by row are integrated out: a row that is left out takes its own along.
            splits = site is None and part.chains is None and part.structure.by_row
            logs.add(
                row_weights(part, part.prepared(batch, count)) if splits else log_likelihood(part, batch, count, site)
            )
        if corrected:
            with part.querying(own_seed):
                weights[done : done + count] = (
                    joint_weights(part, part.prepared(batch, count, weighted=True)).double().cpu().numpy()
                )
        done += count
    return logs.finish(), weights


def _by_evidence(fitted: FittedProgram, batch: Batch, draws: int, seed: int) -> LOO:
    """Rows that share no latents: the evidence of every row."""
    found = []
    for i, chunk in enumerate(fitted.chunks(batch, draws)):
        with fitted.querying(seed_of_part(seed, i)):
            weights = row_weights(fitted, fitted.prepared(chunk, draws)).double().cpu().numpy()  # (K, B)
        known = np.isfinite(weights).all(0)
        pointwise, khats = np.full(len(known), np.nan), np.full(len(known), np.inf)
        pointwise[known] = np.logaddexp.reduce(weights[:, known], 0) - math.log(draws)
        if known.any():
            khats[known] = psis(weights[:, known].T)[1]
        found.append((pointwise, khats))
    pointwise, khats = (np.concatenate(parts) for parts in zip(*found, strict=True))
    own = fitted.row_weights_of(batch)
    return LOO(pointwise, khats, p_loo=0.0, draws=draws, method="evidence of every row", weights=own)


def _check_rows(fitted: FittedProgram, batch: Batch) -> None:
    rows, known = num_rows(batch) if batch else fitted.instance.num_data, fitted.instance.num_data
    if rows != known:
        raise ValueError(
            f"loo needs the data of the fit, {known} rows, because the posterior has seen them; got {rows}. "
            "Score held-out rows with log_likelihood."
        )


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, count, _ROWS))
