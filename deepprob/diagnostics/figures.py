"""Plots of posteriors and predictions by site, by row and by class, each a matplotlib `Figure`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from torch import Tensor

from deepprob.diagnostics.check import Array, array
from deepprob.diagnostics.style import BLUE, GREY, INK, ORANGE, new_axes, new_figure, panels


def entries(draws: Mapping[str, Tensor], least: float = 0.0) -> Iterator[tuple[str, Array]]:
    """The draws of every number of some sites whose mean is at least this far from zero, by name.

    Args:
        draws: Draws by site, each of shape ``(K, ...)``.
        least: The smallest absolute mean.

    Examples:
        >>> [name for name, _ in entries({"mu": torch.zeros(5), "w": torch.ones(5, 2)})]
        ['mu', 'w[0]', 'w[1]']
    """
    for name, value in draws.items():
        for place in (value.mean(0, dtype=torch.float64).abs() >= least).nonzero().tolist():
            entry = f"{name}[{', '.join(map(str, place))}]" if place else name
            yield entry, array(value[(slice(None), *place)])


def densities(draws: Mapping[str, ArrayLike]) -> Figure:
    """Marginal densities of scalar quantities, one panel each; of whole numbers their probabilities.

    Args:
        draws: Draws by name, each of shape ``(K,)``.
    """
    count = len(draws)
    columns = 4 if count in (4, 7, 8, 10, 11, 12) else 3
    figure, axes = panels(count, columns=columns, width=4.6 if count == 1 else 2.3)
    for place, (name, values) in zip(axes, draws.items(), strict=True):
        _density(place, array(values))
        place.set_title(name, fontsize=10)
        place.set_yticks([])
        place.spines["left"].set_visible(False)
        place.locator_params(axis="x", nbins=4)
    legend_above(figure)
    return figure


def _density(axes: Any, draws: Array) -> None:
    from scipy.stats import gaussian_kde

    low, high = np.quantile(draws, [0.05, 0.95])
    whole = np.unique(draws)
    if len(whole) <= 20 and (whole == whole.round()).all():  # whole numbers, or a point estimate
        share = np.array([(draws == value).mean() for value in whole])
        axes.bar(whole, share, color=BLUE, alpha=0.6, width=0.6, label="probability")
    elif len(whole) > 1:
        # The tails of a heavy-tailed site would flatten the rest of its density.
        left, right = np.quantile(draws, [0.005, 0.995])
        grid = np.linspace(left, right, 200)
        height = gaussian_kde(draws)(grid)
        axes.plot(grid, height, color=BLUE, linewidth=1.4)
        inside = (grid >= low) & (grid <= high)
        axes.fill_between(
            grid[inside], height[inside], color=BLUE, alpha=0.25, linewidth=0, label="90% of the probability"
        )
        axes.set_ylim(bottom=0)
    axes.axvline(draws.mean(), color=ORANGE, linewidth=1.2, label="mean")


def forest(draws: Mapping[str, ArrayLike], label: str = "value") -> Figure:
    """Means with 50% and 90% intervals of scalar quantities, one line each.

    Args:
        draws: Draws by name, each of shape ``(K,)``.
        label: What the values are.
    """
    kept = [*draws]
    table = np.stack([array(values) for values in draws.values()])
    figure = new_figure(5.6, 0.19 * len(kept) + 0.9)
    axes = new_axes(figure)
    place = np.arange(len(kept))[::-1]
    for tail, width, name in ((0.05, 1.0, "90% interval"), (0.25, 2.6, "50% interval")):
        axes.hlines(place, *np.quantile(table, [tail, 1 - tail], axis=1), color=BLUE, linewidth=width, label=name)
    axes.plot(table.mean(1), place, "o", color=ORANGE, markersize=3.5, label="mean")
    axes.axvline(0.0, color=GREY, linewidth=0.8, zorder=0)
    axes.set_yticks(place, kept)
    axes.set_ylim(-0.7, len(kept) - 0.3)
    axes.set_xlabel(label)
    legend_above(figure)
    return figure


def legend_above(figure: Figure, columns: int | None = None) -> None:
    """A legend above all axes, where it hides no data; in one line or a number of columns, or fewer where they fit."""
    pairs = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    handles = {label: handle for pair in pairs for handle, label in pair}
    for count in range(columns or max(len(handles), 1), 0, -1):
        legend = figure.legend([*handles.values()], [*handles], frameon=False, loc="outside upper center", ncols=count)
        if count == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def intervals_by_row(
    mean: ArrayLike,
    inner: tuple[Any, Any],
    outer: tuple[Any, Any],
    *,
    names: tuple[str, str] = ("50% interval", "90% interval"),
    axes: Any = None,
) -> Figure:
    """Means with two intervals, row by row.

    Args:
        mean: Means, shape ``(rows,)``.
        inner: Ends of the shorter intervals.
        outer: Ends of the longer intervals.
        names: What the two intervals are.
        axes: The axes to draw on; None for a new figure.
    """
    middle = array(mean).ravel()
    rows = np.arange(len(middle))
    axes = new_axes(new_figure()) if axes is None else axes
    thin = float(np.clip(120 / len(rows), 0.5, 2.5))
    for ends, width, label in ((outer, thin, names[1]), (inner, 2.2 * thin, names[0])):
        low, high = (array(end).ravel() for end in ends)
        axes.vlines(rows, low, high, color=BLUE, linewidth=width, alpha=0.6, label=label)
    axes.plot(rows, middle, "o", color=BLUE, markersize=min(4.0, 1.5 + thin), label="mean")
    axes.set_xlabel("row")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return axes.figure  # type: ignore[no-any-return]


def class_bars(probs: ArrayLike, observed: ArrayLike | None = None) -> Figure:
    """Stacked bars of class probabilities, one bar a row.

    Args:
        probs: Class probabilities, shape ``(rows, classes)``.
        observed: True classes, shape ``(rows,)``; None for none.
    """
    shares = array(probs)
    rows, count = shares.shape
    figure = new_figure(min(9.0, 2.6 + 0.22 * rows), 3.4)
    axes = new_axes(figure)
    many = None if count <= 10 else ScalarMappable(Normalize(0, count - 1), "viridis")
    colors = [f"C{i}" if many is None else many.cmap(i / (count - 1)) for i in range(count)]
    bottom = np.zeros(rows)
    for label in range(count):
        axes.bar(
            np.arange(rows),
            shares[:, label],
            bottom=bottom,
            color=colors[label],
            width=0.85,
            label="" if many else f"{label}",
        )
        bottom += shares[:, label]
    if observed is not None:
        truth = array(observed).ravel().astype(int)
        middle = shares.cumsum(1)[np.arange(rows), truth] - shares[np.arange(rows), truth] / 2
        axes.plot(np.arange(rows), middle, "o", color="white", markeredgecolor=INK, markersize=4.5, label="observed")
    axes.set_xlabel("row")
    axes.set_ylabel("probability")
    axes.set_ylim(0, 1)
    axes.set_xlim(-0.6, rows - 0.4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if many is not None:
        _color_bar(figure, axes, many, "class")
    handles, names = axes.get_legend_handles_labels()
    if names:
        title = "" if many else "class"
        figure.legend(handles, names, frameon=False, loc="outside right upper", title=title, reverse=True)
    return figure


def _color_bar(figure: Figure, axes: Any, drawn: Any, label: str) -> None:
    bar: Any = figure.colorbar(drawn, ax=axes, label=label)
    bar.outline.set_visible(False)


def heat(values: ArrayLike, label: str, most: float) -> Figure:
    """A grid of values: rows from top to bottom, their columns from left to right.

    Args:
        values: Shape ``(rows, columns)``.
        label: What the values are.
        most: The largest possible value; the smallest is 0.
    """
    grid = array(values)
    figure = new_figure(
        float(np.clip(2.5 + 0.12 * grid.shape[1], 4.0, 9.0)), float(np.clip(1.2 + 0.12 * len(grid), 2.4, 6.0))
    )
    axes = new_axes(figure)
    drawn = axes.imshow(grid, aspect="auto", cmap="Blues", interpolation="nearest", vmin=0, vmax=most)
    _color_bar(figure, axes, drawn, label)
    axes.set_xlabel("column")
    axes.set_ylabel("row")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return figure
