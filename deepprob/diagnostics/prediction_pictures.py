"""The pictures of predictions: of numbers, of classes, and of replicated data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from deepprob.diagnostics import judging
from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import array
from deepprob.diagnostics.checks.calibration import class_probs, interval_of, one_label
from deepprob.diagnostics.column_plots import table_columns
from deepprob.diagnostics.picture import Picture, drawn
from deepprob.diagnostics.plots import predicted_against_observed, predictive_band, reliability

_PANELS = 6  # columns of a table in one picture


def _numbers(case: Case) -> Iterator[Picture]:
    if not case.supervised or case.prediction.kind not in ("real", "count"):
        return
    target, (low, high) = case.judged(case.target), interval_of(case, 0.9)
    mean = case.judged(array(case.prediction.mean).reshape(case.target.shape))
    inputs = array(case.predictors[0]) if len(case.predictors) == 1 else None
    if inputs is not None and inputs.size == len(inputs) == case.target.size:
        x = case.judged(inputs.reshape(case.target.shape))
        figure = predictive_band(x, target, mean, interval_of(case, 0.5), (low, high))
        figure.axes[0].set_ylabel(case.site)
        caption = "Nine of ten points should lie in the 90% band, half of them in the 50% band."
    else:
        figure = predicted_against_observed(target, mean, low, high)
        caption = "Nine of ten intervals should cross the dashed line, on which prediction and observation agree."
    rows, site = len(target), case.site
    yield Picture(
        "predictions",
        "Predictions and observations",
        caption,
        f"Predictions of {rows} rows with 90% intervals, against the observed values.",
        drawn(figure),
    )
    yield Picture(
        "residuals",
        "Residuals against predictions",
        "The points should scatter around zero, equally wide everywhere and without a curve.",
        f"Scatter plot of observed minus predicted {site} of {rows} rows against the predicted values.",
        drawn(judging.residuals(mean, target)),
    )
    yield Picture(
        "quantiles",
        "Calibration of quantiles (PIT)",
        "The line should stay inside the band. An S shape means intervals of the wrong width, a bow means a bias.",
        f"Share of {rows} observed values below each predicted quantile, with the range of perfect calibration.",
        drawn(judging.quantile_calibration(case.judged(case.replicates, 1), target)),
    )


def _classes(case: Case) -> Iterator[Picture]:
    if not one_label(case):
        return
    probs, labels = class_probs(case), case.judged(case.target).reshape(-1)
    names = case.prediction.class_names
    rows, of = (
        len(labels),
        f"of class {names[1] if names else 1}" if probs.shape[1] == 2 else "of each class against the others",
    )
    yield Picture(
        "confusion",
        "Confusion matrix",
        "Rows on the diagonal are right; a dark cell off it names two classes that the model confuses.",
        f"Confusion matrix of {rows} rows and {probs.shape[1]} classes.",
        drawn(judging.confusion(probs, labels, names)),
    )
    yield Picture(
        "roc",
        f"ROC curve {of}",
        "The nearer a curve comes to the upper left corner, the better; the dashed line is chance.",
        f"ROC curve {of}, from {rows} rows.",
        drawn(judging.roc(probs, labels, names)),
    )
    yield Picture(
        "precision-recall",
        f"Precision and recall {of}",
        "The nearer a curve comes to the upper right corner, the better; a dotted line is the base rate.",
        f"Precision against recall {of}, from {rows} rows.",
        drawn(judging.precision_recall(probs, labels, names)),
    )
    yield Picture(
        "class-reliability",
        f"Reliability {of}",
        "On the dashed line a class is as frequent as predicted.",
        f"Share of rows {of} against its predicted probability, from {rows} rows.",
        drawn(judging.class_reliability(probs, labels, names)),
    )
    if probs.shape[1] > 2:
        yield Picture(
            "reliability",
            "Reliability of the predicted class",
            "On the dashed line the accuracy equals the confidence; points below it are over-confident.",
            f"Reliability diagram of {rows} predictions.",
            drawn(reliability(probs, labels)),
        )


def _replicates(case: Case) -> Iterator[Picture]:
    if case.supervised or case.ragged:
        return
    if case.sample_case.columns is not None:
        yield from _columns(case)
        return
    if case.sample_case.mask is not None:
        return
    drawn_again, seen = case.prior_replicates_for(0.05), case.sample_case.target
    if set(drawn_again.ravel()[:1000]) <= {0.0, 1.0} or seen.size < 2:
        return  # a histogram of zeros and ones is the mean
    yield Picture(
        "replicates",
        "Data and replicated data",
        "Replicated data sets are drawn from the model. The data should look like one of them.",
        f"The data, {seen.size} values, over data sets that are drawn from the model.",
        drawn(judging.replicated(seen, drawn_again)),
    )


def _columns(case: Case) -> Iterator[Picture]:
    """The columns of a table whose columns are of different kinds, a panel each."""
    sample, columns = case.sample_case, case.sample_case.columns
    if columns is None:
        return
    again, mask = case.prior_replicates_for(0.05), sample.mask
    seen = sample.target if mask is None else np.where(mask, sample.target, np.nan)
    for number, start in enumerate(range(0, len(columns.variables), _PANELS)):
        variables = columns.variables[start : start + _PANELS]
        names = [variable.name for variable in variables]
        yield Picture(
            f"columns-{number + 1}" if number else "columns",
            f"Columns of data and replicated data: {names[0]} to {names[-1]}" if len(names) > 1 else names[0],
            "Numbers: the data should look like one of the replicates. Shares: a diamond, the data, should lie on its "
            "line, the 90% range of replicates.",
            f"The columns {', '.join(names)} of {len(seen)} rows over tables that are drawn from the model.",
            drawn(table_columns(seen, again, variables, columns.names)),
        )


MAKERS = (_numbers, _classes, _replicates)
