"""Plots that judge predictions by the observed values, each a matplotlib `Figure`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from deepprob.diagnostics.check import Array, array
from deepprob.diagnostics.figures import intervals_by_row, legend_above
from deepprob.diagnostics.metrics import auroc, shares_by_bin
from deepprob.diagnostics.style import BLUE, GREY, INK, ORANGE, new_axes, new_figure, panels

_NAMED = 6  # most classes with a curve and a name of their own
_CELLS = 12  # most classes whose counts are written into a confusion matrix
_ROWS = 30  # most rows that are shown one by one
_POINTS = 1000  # most points of a scatter plot
_VALUES = 5000  # most values of a calibration curve


def residuals(mean: ArrayLike, target: ArrayLike) -> Figure:
    """Residuals against predicted means.

    Args:
        mean: Predicted means, shape ``(rows,)``.
        target: Observed values, shape ``(rows,)``.
    """
    m, y = array(mean).ravel(), array(target).ravel()
    shown = np.linspace(0, len(m) - 1, min(len(m), _POINTS)).astype(int)
    axes = new_axes(new_figure())
    axes.axhline(0.0, color=GREY, linewidth=1, linestyle="--")
    axes.plot(m[shown], (y - m)[shown], "o", color=BLUE, markersize=3, alpha=0.6)
    axes.set_xlabel("predicted")
    axes.set_ylabel("observed − predicted")
    return axes.figure  # type: ignore[no-any-return]


def quantile_calibration(draws: ArrayLike, target: ArrayLike) -> Figure:
    """Share of observed values below each predicted quantile, with the 90% range of perfect calibration.

    Args:
        draws: Draws from the predictive, shape ``(K, rows)``.
        target: Observed values, shape ``(rows,)``.
    """
    values, y = array(draws), array(target).ravel()
    values = values.reshape(len(values), -1)
    if len(y) > _VALUES:
        shown = np.linspace(0, len(y) - 1, _VALUES).astype(int)
        values, y = values[:, shown], y[shown]
    # A value takes the quantiles from the share of draws below it to that of draws up to it, evenly: counts have ties.
    low, high = (values < y).mean(0), (values <= y).mean(0)
    levels = np.linspace(0.0, 1.0, 101)
    share = ((levels[:, None] - low) / np.maximum(high - low, 1e-9)).clip(0, 1).mean(1)
    half = 1.645 * np.sqrt(levels * (1 - levels) / len(y))
    axes = new_axes(new_figure())
    band = np.clip(levels - half, 0, 1), np.clip(levels + half, 0, 1)
    axes.fill_between(levels, *band, color=GREY, alpha=0.5, linewidth=0, label="90% range if calibrated")
    axes.plot(levels, share, color=BLUE, linewidth=1.6, label="observed")
    axes.set_xlabel("predicted quantile")
    axes.set_ylabel("share of values below it")
    return _legend(axes)


def confusion(probs: ArrayLike, labels: ArrayLike, names: Sequence[str] = ()) -> Figure:
    """Confusion matrix: numbers of rows by true and by most likely class, colored by share of the true class.

    Args:
        probs: Class probabilities, shape ``(rows, classes)``.
        labels: True classes, shape ``(rows,)``.
        names: The names of the classes; by default their numbers.
    """
    p, y = array(probs), array(labels).astype(int)
    size = p.shape[1]
    counts = np.zeros((size, size))
    np.add.at(counts, (y, p.argmax(1)), 1)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes = new_axes(new_figure())
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if size <= _CELLS:
        for i, j in np.ndindex(size, size):
            color = "white" if share[i, j] > 0.55 else INK
            axes.text(j, i, f"{counts[i, j]:.0f}", ha="center", va="center", color=color)
        axes.set_xticks(range(size))
        axes.set_yticks(range(size))
        if names:
            axes.set_xticklabels(names, rotation=45)
            axes.set_yticklabels(names)
    axes.set_xlabel("most likely class")
    axes.set_ylabel("true class")
    return axes.figure  # type: ignore[no-any-return]


def roc(probs: ArrayLike, labels: ArrayLike, names: Sequence[str] = ()) -> Figure:
    """ROC curve of every class against the others; of two classes that of class 1.

    Args:
        probs: Class probabilities, shape ``(rows, classes)``.
        labels: True classes, shape ``(rows,)``.
        names: The names of the classes; by default their numbers.
    """
    axes = new_axes(new_figure())
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="chance")
    for name, color, score, positive in _against_others(probs, labels, names):
        hits, misses, _ = _sweep(score, positive)
        area = auroc(score, positive)
        label = f"{name}area {area:.2f}" if name is not None else None
        axes.plot(np.append(0, misses) / misses[-1], np.append(0, hits) / hits[-1], color=color, label=label)
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    return _legend(axes)


def precision_recall(probs: ArrayLike, labels: ArrayLike, names: Sequence[str] = ()) -> Figure:
    """Precision against recall of every class against the others; of two classes that of class 1.

    Args:
        probs: Class probabilities, shape ``(rows, classes)``.
        labels: True classes, shape ``(rows,)``.
        names: The names of the classes; by default their numbers.
    """
    axes = new_axes(new_figure())
    for name, color, score, positive in _against_others(probs, labels, names):
        hits, _, chosen = _sweep(score, positive)
        rate = float(positive.mean())
        label = f"{name}base rate {rate:.2f}" if name is not None else None
        axes.axhline(rate, color=color, linewidth=1, linestyle=":", label=None if name else label)
        axes.plot(hits / hits[-1], hits / chosen, color=color, label=label if name else None)
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")
    axes.set_ylim(-0.03, 1.03)
    return _legend(axes)


def class_reliability(probs: ArrayLike, labels: ArrayLike, names: Sequence[str] = (), *, bins: int = 8) -> Figure:
    """Share of rows of a class against its predicted probability; of two classes that of class 1, with 90% intervals.

    Args:
        probs: Class probabilities, shape ``(rows, classes)``.
        labels: True classes, shape ``(rows,)``.
        names: The names of the classes; by default their numbers.
        bins: Number of bins, of equal numbers of rows.
    """
    axes = new_axes(new_figure())
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfect calibration")
    curves = [*_against_others(probs, labels, names)]
    for name, color, score, positive in curves:
        centre, share, low, high = shares_by_bin(score, positive, bins)
        label = None if name is None else name.removesuffix(", ") or "observed, 90% interval"
        axes.plot(centre, share, "o-", color=color, markersize=3.5, linewidth=1, label=label)
        if len(curves) == 1:
            axes.vlines(centre, low, high, color=color, linewidth=1.2)
    axes.set_xlabel("predicted probability")
    axes.set_ylabel("share of rows")
    return _legend(axes)


def replicated(observed: ArrayLike, replicates: ArrayLike, *, most: int = 30) -> Figure:
    """Histogram of the data over histograms of replicated data; of few values each over the interval of its replicates.

    Args:
        observed: The data.
        replicates: Replicated data sets, shape ``(R, ...)``.
        most: Largest number of replicates to show.
    """
    seen, again = array(observed).ravel(), array(replicates)
    again = again.reshape(len(again), -1)
    if len(seen) <= _ROWS:
        axes = new_axes(new_figure())
        inner, outer = (np.quantile(again, [tail, 1 - tail], axis=0) for tail in (0.25, 0.05))
        intervals_by_row(again.mean(0), (inner[0], inner[1]), (outer[0], outer[1]), axes=axes)
        axes.plot(np.arange(len(seen)), seen, "D", color=ORANGE, markersize=4, label="data")
        axes.set_ylabel("value")
        return _legend(axes)
    again = again[:most]
    low, high = min(seen.min(), np.quantile(again, 0.005)), max(seen.max(), np.quantile(again, 0.995))
    whole = bool((seen == seen.round()).all() and (again == again.round()).all()) and high - low <= 60
    edges = np.arange(low, high + 2) - 0.5 if whole else np.linspace(low, high, int(np.clip(len(seen) ** 0.5, 8, 40)))
    axes = new_axes(new_figure())
    for values in again:
        axes.stairs(np.histogram(values, edges)[0] / len(values), edges, color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot([], color=BLUE, linewidth=0.8, label="replicates")
    axes.stairs(np.histogram(seen, edges)[0] / len(seen), edges, color=ORANGE, linewidth=1.8, label="data")
    axes.set_xlabel("value")
    axes.set_ylabel("share")
    return _legend(axes)


def rolls(grids: Mapping[str, ArrayLike]) -> Figure:
    """Sequences of many features, one panel each: time from left to right, features from bottom to top.

    Args:
        grids: Sequences by title, each of shape ``(T, D)``.
    """
    tables = {name: array(grid) for name, grid in grids.items()}
    used = np.flatnonzero(np.nansum(np.abs(next(iter(tables.values()))), 0))  # by the first sequence, the data
    low, high = (used.min(), used.max()) if len(used) else (0, 0)
    shown = np.concatenate(list(tables.values()))
    least, most = min(0.0, float(np.nanmin(shown))), float(np.nanmax(shown))
    figure, axes = panels(len(tables), columns=1, width=4.2, height=1.5)
    for place, (name, grid) in zip(axes, tables.items(), strict=True):
        place.imshow(
            grid.T, aspect="auto", origin="lower", cmap="Greys", vmin=least, vmax=most or 1, interpolation="nearest"
        )
        place.set_ylim(low - 0.5, high + 0.5)
        place.set_title(name, loc="left", fontsize=9)
        place.set_ylabel("feature")
    axes[-1].set_xlabel("step")
    return figure


def fan(
    observed: ArrayLike, mean: ArrayLike, low: ArrayLike, high: ArrayLike, *, start: int = 0, most: int = 3
) -> Figure:
    """Sequences of few features with predicted means and 90% bands, one panel a feature.

    Args:
        observed: Shape ``(T, D)``.
        mean: Predicted means, shape ``(T, D)``.
        low: Lower ends of the 90% intervals.
        high: Upper ends of the 90% intervals.
        start: The first step that is predicted.
        most: Largest number of features to show.
    """
    y, m, lo, hi = (array(v) for v in (observed, mean, low, high))
    count = min(y.shape[1], most)
    figure, axes = panels(count, columns=1, width=4.2, height=1.5 if count > 1 else 2.5)
    time = np.arange(len(y))
    for i, place in enumerate(axes):
        place.fill_between(time[start:], lo[start:, i], hi[start:, i], color=BLUE, alpha=0.25, linewidth=0, label="90%")
        place.plot(time[start:], m[start:, i], color=BLUE, linewidth=1.4, label="mean")
        place.plot(time, y[:, i], "o-", color=INK, markersize=2.5, linewidth=0.8, alpha=0.7, label="data")
        place.set_ylabel(f"feature {i}" if y.shape[1] > 1 else "value")
    axes[-1].set_xlabel("step")
    legend_above(figure)
    return figure


def _legend(axes: Any) -> Figure:
    """The figure, with a legend above the axes if something on them has a name."""
    figure: Figure = axes.figure
    if axes.get_legend_handles_labels()[0]:
        legend_above(figure, columns=2)
    return figure


def _against_others(probs: ArrayLike, labels: ArrayLike, names: Sequence[str]) -> Any:
    """Name, color, score and truth of every class that some rows have and some do not; of two classes that of class 1.

    More classes than a legend can hold have no names.
    """
    p, y = array(probs), array(labels).astype(int)
    classes = [1] if p.shape[1] == 2 else range(p.shape[1])
    seen = [c for c in classes if 0 < (y == c).sum() < len(y)]
    for c in seen:
        name = "" if len(classes) == 1 else f"class {names[c] if names else c}, " if len(seen) <= _NAMED else None
        yield name, BLUE if len(classes) == 1 else f"C{c % 10}", p[:, c], y == c


def _sweep(score: Array, positive: Any) -> tuple[Array, Array, Array]:
    """Numbers of positive, negative and all rows above each threshold, from high to low; ties count together."""
    order = np.argsort(-score, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    hits = np.cumsum(positive[order])[ends].astype(float)
    return hits, ends + 1 - hits, array(ends + 1)
