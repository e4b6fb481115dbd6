"""Plots of arrays, each a matplotlib `Figure`."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from deepprob.diagnostics.check import array
from deepprob.diagnostics.figures import legend_above
from deepprob.diagnostics.image_grid import image_rows
from deepprob.diagnostics.latent_walks import interpolation, manifold, traversal
from deepprob.diagnostics.metrics import shares_by_bin
from deepprob.diagnostics.style import BLUE, GREY, INK, ORANGE, new_axes, new_figure

__all__ = [
    "image_rows",
    "interpolation",
    "kl_bars",
    "latent_scatter",
    "manifold",
    "predicted_against_observed",
    "predictive_band",
    "reliability",
    "render",
    "training_curve",
    "traversal",
]


def render(figure: Figure) -> bytes:
    """A figure as PNG, without global pyplot state."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def training_curve(
    elbo: ArrayLike, held_out: ArrayLike = (), *, steps_per_epoch: int = 1, held_out_name: str = "held-out ELBO"
) -> Figure:
    """The ELBO of every step, its mean over blocks of steps, and the score of held-out rows.

    Args:
        elbo: One value per step, nats per datum.
        held_out: One value per epoch.
        steps_per_epoch: Steps in an epoch.
        held_out_name: The name of the score of held-out rows.
    """
    values, held = array(elbo), array(held_out)
    values = np.where(np.isfinite(values), values, np.nan)
    figure = new_figure()
    axes = new_axes(figure)
    time = (np.arange(len(values)) + 1) / steps_per_epoch
    width = max(len(values) // 50, 1)
    color, thickness = (GREY, 0.6) if width > 1 else (BLUE, 1.6)
    axes.plot(time, values, color=color, linewidth=thickness, label="step")
    blocks = len(values) // width
    if width > 1:
        centre = values[len(values) - blocks * width :].reshape(blocks, width)
        axes.plot(
            time[len(values) - blocks * width :].reshape(blocks, width).mean(1),
            np.nanmean(centre, 1),
            color=BLUE,
            linewidth=1.6,
            label=f"mean of {width} steps",
        )
    if np.isfinite(held).any():
        ends = np.minimum(np.arange(len(held)) + 1.0, max(len(values) / steps_per_epoch, 1.0))  # the last may be short
        axes.plot(ends, held, color=ORANGE, linewidth=1.6, label=held_out_name)
    seen = np.concatenate([values[len(values) // 10 :], held[len(held) // 10 :]])
    seen = seen[np.isfinite(seen)]
    if len(seen):  # the first steps may be so low that they would flatten the rest of the curve: clip them
        low, high = float(np.quantile(seen, 0.002)), float(seen.max())
        axes.set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.05 * (high - low) + 1e-9)
    axes.set_xlabel("epoch" if steps_per_epoch > 1 or len(held) else "step")
    axes.set_ylabel("ELBO, nats per datum")
    legend_above(figure)
    return figure


def latent_scatter(centres: ArrayLike, labels: ArrayLike | None = None) -> Figure:
    """Scatter plot of codes: in their own two dimensions, or along the first two principal axes if there are more.

    Args:
        centres: Posterior means, shape ``(rows, latent)``.
        labels: Values for the colors, shape ``(rows,)``.
    """
    points = array(centres)
    plane, names = points, ["first latent dimension", "second latent dimension"]
    if points.shape[1] > 2:
        centred = points - points.mean(0)
        _, size, axes_ = np.linalg.svd(centred, full_matrices=False)
        plane = centred @ axes_[:2].T
        share = np.square(size[:2]) / max(float(np.square(size).sum()), 1e-300)
        names = [f"{which} principal axis ({part:.0%})" for which, part in zip(("first", "second"), share, strict=True)]
    elif points.shape[1] == 1:
        plane, names = np.concatenate([points, np.zeros_like(points)], 1), ["latent dimension", ""]
    figure = new_figure()
    axes = new_axes(figure)
    if labels is None:
        axes.scatter(*plane.T, s=9, alpha=0.7, color=BLUE, linewidths=0)
    else:
        classes = np.unique(array(labels))
        if len(classes) <= 10:
            for i, value in enumerate(classes):
                chosen = array(labels) == value
                axes.scatter(
                    *plane[chosen].T,
                    s=10,
                    alpha=0.8,
                    color=f"C{i}",
                    linewidths=0,
                    label=f"{value:g}",
                )
            figure.legend(frameon=False, loc="outside right upper", handletextpad=0.1, markerscale=1.6)
        else:
            drawn = axes.scatter(*plane.T, s=9, c=array(labels), cmap="viridis", linewidths=0)
            figure.colorbar(drawn, ax=axes, label="label")
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    return figure


def kl_bars(nats: ArrayLike) -> Figure:
    """KL of every latent dimension from its prior, largest first.

    Args:
        nats: KL in nats, shape ``(latent,)``.
    """
    values = np.sort(array(nats))[::-1]
    figure = new_figure()
    axes = new_axes(figure)
    axes.bar(np.arange(1, len(values) + 1), values, color=BLUE, width=0.8)
    axes.set_xlabel("latent dimension, by rank")
    axes.set_ylabel("KL from the prior, nats per row")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def reliability(probs: ArrayLike, labels: ArrayLike, *, bins: int = 10) -> Figure:
    """Accuracy against confidence, in bins of equal numbers of rows, with 90% intervals.

    Args:
        probs: Class probabilities, shape ``(rows, classes)``.
        labels: True classes, shape ``(rows,)``.
        bins: Number of bins.
    """
    p, y = array(probs), array(labels)
    centre, hit, low, high = shares_by_bin(p.max(1), p.argmax(1) == y, bins)
    figure = new_figure()
    axes = new_axes(figure)
    least = min(float(centre.min()), float(low.min()))
    axes.plot([least, 1], [least, 1], color=GREY, linestyle="--", label="perfect calibration")
    axes.vlines(centre, low, high, color=BLUE, linewidth=1.2)
    axes.plot(centre, hit, "o-", color=BLUE, markersize=4, linewidth=1, label="observed, 90% interval")
    axes.set_xlabel("confidence in the predicted class")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False, loc="upper left")
    return figure


def predicted_against_observed(
    target: ArrayLike, mean: ArrayLike, low: ArrayLike, high: ArrayLike, *, axes: Any = None
) -> Figure:
    """Predicted means and 90% intervals against observed values.

    Args:
        target: Observed values, shape ``(rows,)``.
        mean: Predicted means, shape ``(rows,)``.
        low: Lower ends of the 90% intervals.
        high: Upper ends of the 90% intervals.
        axes: The axes to draw on; None for a new figure.
    """
    y, m, lo, hi = (array(v).ravel() for v in (target, mean, low, high))
    if len(y) > 300:
        y, m, lo, hi = (v[np.linspace(0, len(v) - 1, 300).astype(int)] for v in (y, m, lo, hi))
    outside = (y < lo) | (y > hi)
    axes = new_axes(new_figure()) if axes is None else axes
    for chosen, color, label in (
        (~outside, BLUE, "inside the interval"),
        (outside, ORANGE, "outside the interval"),
    ):
        axes.vlines(y[chosen], lo[chosen], hi[chosen], color=color, linewidth=0.8, alpha=0.5)
        axes.plot(y[chosen], m[chosen], "o", color=color, markersize=3, label=label)
    ends = [float(min(y.min(), m.min())), float(max(y.max(), m.max()))]
    axes.plot(ends, ends, color=GREY, linestyle="--", linewidth=1)
    axes.set_xlabel("observed")
    axes.set_ylabel("predicted, with 90% interval")
    axes.legend(frameon=False, loc="upper left")
    return axes.figure  # type: ignore[no-any-return]


def predictive_band(
    inputs: ArrayLike,
    target: ArrayLike | None,
    mean: ArrayLike,
    half: tuple[Any, Any],
    most: tuple[Any, Any],
) -> Figure:
    """Predicted mean with 50% and 90% bands against one input, and the data.

    Args:
        inputs: The input, shape ``(rows,)``.
        target: Observed values, shape ``(rows,)``; None for the prediction alone.
        mean: Predicted means, shape ``(rows,)``.
        half: Ends of the 50% intervals.
        most: Ends of the 90% intervals.
    """
    x = array(inputs).ravel()
    order = np.argsort(x)
    figure = new_figure()
    axes = new_axes(figure)
    for ends, alpha, label in ((most, 0.18, "90% band"), (half, 0.35, "50% band")):
        low, high = (array(end).ravel()[order] for end in ends)
        axes.fill_between(x[order], low, high, color=BLUE, alpha=alpha, linewidth=0, label=label)
    axes.plot(x[order], array(mean).ravel()[order], color=BLUE, linewidth=1.6, label="mean")
    if target is not None:
        axes.plot(x, array(target).ravel(), "o", color=INK, markersize=2.5, alpha=0.6, label="data")
    axes.set_xlabel("input")
    axes.set_ylabel("target")
    axes.legend(frameon=False)
    return figure
