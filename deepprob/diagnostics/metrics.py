"""Numbers without a verdict: scores of predictions in standard terms, and summaries of latent sites."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor

from deepprob.diagnostics.case import REFUSALS, Case, given
from deepprob.diagnostics.check import Array, array, number
from deepprob.diagnostics.checks.calibration import class_probs, one_label
from deepprob.diagnostics.figures import entries
from deepprob.diagnostics.proper_scores import aurc, bins_of, brier, brier_parts, crps

MOST_LATENTS = 40  # numbers of latent sites that a reader can look at


@dataclass(frozen=True)
class Score:
    """One number about predictions, without a verdict.

    Args:
        name: The name in standard terms.
        value: The score.
        se: Its standard error; None if it has none.
        unit: The unit; empty for a pure number.
        meaning: The score in words, in one line.
    """

    name: str
    value: float
    se: float | None
    unit: str
    meaning: str

    @property
    def measured(self) -> str:
        """The value and its standard error, rounded for print, with the unit."""
        return f"{number(self.value, self.se)} {self.unit}".strip()

    @property
    def slug(self) -> str:
        """The name in lower case with hyphens, the key of the score in JSON."""
        return self.name.lower().replace(" ", "-")


def scores(case: Case) -> dict[str, tuple[Score, ...]]:
    """The scores of every observed site that is predicted from inputs, by site."""
    found = {}
    for each in case.by_site():
        with suppress(*REFUSALS):  # the checks of the predictions tell the reason
            target = each.judged(each.target)
            if one_label(each):
                classes = _of_classes(class_probs(each), target.reshape(-1), each.class_names)
                found[each.site] = (*classes, *_of_doubt(each))
            elif each.supervised and each.prediction.kind in ("real", "count"):
                mean = each.finite(each.prediction.mean, "prediction").reshape(each.target.shape)
                ranked = crps(each.judged(array(each.prediction.draws), 1), target)
                found[each.site] = tuple(_of_numbers(each.judged(mean), target, ranked, f"units of {each.site}"))
    return found


def _of_numbers(mean: Array, target: Array, ranked: Array, unit: str) -> Iterator[Score]:
    residual = (target - mean).reshape(len(target), -1)
    squares, sizes = np.square(residual).mean(1), np.abs(residual).mean(1)
    rmse = float(np.sqrt(squares.mean()))
    total = float(np.square(target - target.mean(0)).mean())
    spread = float(np.sqrt(total))
    yield Score("RMSE", rmse, _se(squares) / (2 * rmse) if rmse else 0.0, unit, "The typical size of an error.")
    yield Score("MAE", float(sizes.mean()), _se(sizes), unit, "The mean absolute error.")
    ranked = ranked.reshape(len(target), -1).mean(1)
    words = "The continuous ranked probability score: the absolute error of the whole predictive distribution."
    yield Score("CRPS", float(ranked.mean()), _se(ranked), unit, words)
    if len(target) > 1 and spread:
        words = f"The share of the variance that the predictions explain; the sd of the data is {number(spread)}."
        yield Score("R2", 1 - float(squares.mean()) / total, None, "", words)


def _of_classes(probs: Array, labels: ArrayLike, names: Sequence[str]) -> Iterator[Score]:
    y = array(labels).astype(np.int64)
    right = (probs.argmax(1) == y) * 1.0
    counts = np.bincount(y, minlength=probs.shape[1])
    usual = (y == counts.argmax()) * 1.0
    yield Score("accuracy", float(right.mean()), _se(right), "", "The share of rows whose most likely class is right.")
    words = f"The accuracy of always saying {names[int(counts.argmax())]}, the most frequent class."
    yield Score("base rate", float(usual.mean()), _se(usual), "", words)
    gain = right - usual
    yield Score("gain over the base rate", float(gain.mean()), _se(gain), "", "What the inputs add to the accuracy.")
    loss = -np.log(np.maximum(probs[np.arange(len(y)), y], 1e-300))
    yield Score("log loss", float(loss.mean()), _se(loss), "nats", "Lower is better; 0 is certain and right.")
    squares, parts = brier(probs, y), brier_parts(probs, y)
    words = f"The squared error of the probabilities: reliability {number(parts.reliability)} (0 is calibrated), "
    words += f"resolution {number(parts.resolution)} (higher is better), base rates {number(parts.uncertainty)}."
    yield Score("Brier score", float(squares.mean()), _se(squares), "", words)
    words = "The mean error rate of the most confident rows, over all shares of rows that are kept; lower is better."
    yield Score("area under the risk-coverage curve", aurc(probs.max(1), 1 - right), None, "", words)
    if probs.shape[1] == 2 and 0 < y.sum() < len(y):
        no, yes = names
        words = f"The chance that a row of class {yes} gets a higher probability of it than one of {no}; 0.5 is luck."
        yield Score("AUROC", auroc(probs[:, 1], y), None, "", words)


def _of_doubt(case: Case) -> Iterator[Score]:
    """What part of the uncertainty more data would remove."""
    known = array(case.prediction.epistemic).reshape(len(case.target), -1).mean(1)
    words = "The uncertainty about the classes that comes from the parameters; more data would remove it."
    yield Score("mutual information", float(known.mean()), _se(known), "nats", words)


def auroc(score: ArrayLike, positive: ArrayLike) -> float:
    """Area under the ROC curve of a score: how often a positive row has a higher one than a negative row.

    Args:
        score: Shape ``(rows,)``.
        positive: Whether each row is positive, shape ``(rows,)``.

    Examples:
        >>> auroc([0.1, 0.4, 0.9], [False, True, True])
        1.0
    """
    chosen = array(positive) > 0
    count = int(chosen.sum())
    ranks = stats.rankdata(array(score))[chosen]
    return float((ranks.sum() - count * (count + 1) / 2) / (count * (len(chosen) - count)))


def _se(values: Array) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def shares_by_bin(score: ArrayLike, hit: ArrayLike, bins: int) -> tuple[Array, Array, Array, Array]:
    """Mean score and share of hits with its 90% interval, in bins of equal numbers of rows.

    Args:
        score: Shape ``(rows,)``.
        hit: Whether each row is a hit, shape ``(rows,)``.
        bins: Number of bins.
    """
    values, found = array(score), array(hit)
    index = bins_of(values, bins)
    parts = [index == b for b in range(index.max() + 1)]
    centre, share = (np.array([x[part].mean() for part in parts]) for x in (values, found))
    count = np.array([part.sum() for part in parts])
    # Wilson's interval has a positive width even where every row of a bin is a hit.
    z = 1.645
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return centre, share, middle - half, middle + half


def latent_draws(case: Case) -> dict[str, Tensor]:
    """Draws of the latent sites that hold few enough numbers to look at, by site."""
    found: dict[str, Tensor] = case._shared_by("draws of latent sites", lambda: _latent_draws(case))
    return found


def _latent_draws(case: Case, draws: int = 1000) -> dict[str, Tensor]:
    posterior = case.posterior
    # A local site has a number for every row: of many rows, only global sites can be few numbers.
    data = given(case.train) if case.rows <= MOST_LATENTS else ()
    one = posterior.sample(*data, draws=1, seed=case.seed)
    few = [name for name in posterior.latent_sites if name in one and one[name][0].numel() <= MOST_LATENTS]
    drawn = posterior.sample(*data, draws=draws, seed=case.seed) if few else {}
    return {name: drawn[name] for name in few}


def summaries(case: Case) -> dict[str, dict[str, float]]:
    """Mean, sd and 90% interval of the numbers of latent sites, if they are few, by name."""
    with suppress(*REFUSALS):
        found = dict(entries(latent_draws(case)))
        if len(found) <= MOST_LATENTS:
            return {
                name: {
                    "mean": float(values.mean()),
                    "sd": float(values.std()),
                    **dict(zip(("5%", "95%"), map(float, np.quantile(values, [0.05, 0.95])), strict=True)),
                }
                for name, values in found.items()
            }
    return {}
