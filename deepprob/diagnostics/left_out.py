"""Predictions of training rows that leave out each row's own effect, by importance weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepprob.diagnostics.check import Array, array
from deepprob.diagnostics.finite import finite_rows
from deepprob.diagnostics.observed import only_known
from deepprob.posteriors.arviz_compat import khat_limit
from deepprob.posteriors.loo import left_out_weights
from deepprob.posteriors.prediction import Prediction


@dataclass(frozen=True, eq=False)
class LeftOut:
    """Weights of posterior draws that leave a row out.

    Attributes:
        log_weights: Log-weights by draw and row, normalized over the draws, ``(K, rows)``.
        khat: Pareto k-hat of each row of the fit, shape ``(rows in the fit,)``; above `khat_limit` a row is too
            influential.
    """

    log_weights: Tensor
    khat: Array

    @property
    def words(self) -> str:
        """How the predictions were made, as a sentence."""
        limit = khat_limit(len(self.log_weights))
        bad = int((self.khat > limit).sum())
        unreliable = f"; those of {bad} row{'s' * (bad > 1)} are unreliable (k-hat above {limit:.2f})" if bad else ""
        return f"Rows of the fit have leave-one-out predictions{unreliable}."


def left_out(
    prediction: Prediction,
    target: Array,
    in_fit: NDArray[np.bool_],
    site: str,
    known: NDArray[np.bool_] | None = None,
) -> LeftOut | None:
    """The weights that leave each row of the fit out; rows that were not in the fit have equal weights.

    Args:
        prediction: The prediction of all rows.
        target: The observed values, shape ``(rows, ...)``.
        in_fit: Whether each row was in the fit.
        site: The observed site.
        known: Which values count, of the target's shape; None for all.

    Returns:
        The weights, see `left_out_weights`; None if no row was in the fit, or the rows have one distribution together.
    """
    if not in_fit.any():
        return None
    terms = array(prediction.log_prob_by_draw(torch.as_tensor(target)))  # (K, rows, ...)
    if terms.shape[1:2] != in_fit.shape:
        return None
    by_row = only_known(terms, known, 1).reshape(*terms.shape[:2], -1).sum(2)
    chosen = finite_rows(by_row[:, in_fit], f"log-likelihood of {site}", np.flatnonzero(in_fit), axis=1)
    weights = np.full(by_row.shape, -np.log(len(by_row)))
    weights[:, in_fit], khat = left_out_weights(chosen)
    return LeftOut(torch.from_numpy(weights), khat)
