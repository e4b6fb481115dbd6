"""Plots of the columns of tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from deepprob.diagnostics.check import Array, array
from deepprob.diagnostics.figures import legend_above
from deepprob.diagnostics.style import BLUE, ORANGE, panels
from deepprob.distributions.columns import Variable

_MOST_SHARES = 12  # categories that are shown, those of the largest shares
_MOST_REPLICATES = 30
_LETTERS = 12  # of all names side by side
_LONGEST = 14  # letters of a label


def table_columns(
    observed: ArrayLike, replicates: ArrayLike, variables: Sequence[Variable], names: Sequence[str]
) -> Figure:
    """A panel for every variable: histograms of a number, shares of categories, of the data over replicates.

    Args:
        observed: The table, shape ``(rows, D)``; NaN where a value is missing.
        replicates: Replicated tables, shape ``(R, rows, D)``.
        variables: The variables to show.
        names: The names of the columns.
    """
    seen, again = array(observed), array(replicates)[:_MOST_REPLICATES]
    figure, axes = panels(len(variables), columns=2)
    for axis, variable in zip(axes, variables, strict=True):
        places = [*variable.places]
        known = ~np.isnan(seen[:, places[0]])
        if variable.kind in ("real", "count"):
            _histograms(axis, seen[known, places[0]], again[:, known, places[0]])
        else:
            labels = [_label(names[i], variable.name) for i in places]
            _shares(axis, seen[known][:, places].mean(0), again[:, known][:, :, places].mean(1), labels)
        axis.set_title(variable.name if len(variable.name) < 2 * _LONGEST else f"{variable.name[: 2 * _LONGEST]}…")
    axes[0].plot([], color=BLUE, linewidth=1.2, label="replicates")
    axes[0].plot([], color=ORANGE, linewidth=1.8, label="data")
    legend_above(figure)
    return figure


def _histograms(axis: Any, seen: Array, again: Array) -> None:
    low, high = min(seen.min(), np.quantile(again, 0.005)), max(seen.max(), np.quantile(again, 0.995))
    whole = bool((seen == seen.round()).all() and (again == again.round()).all()) and high - low <= 60
    edges = np.arange(low, high + 2) - 0.5 if whole else np.linspace(low, high, int(np.clip(len(seen) ** 0.5, 8, 30)))
    for values in again:
        axis.stairs(np.histogram(values, edges)[0] / len(seen), edges, color=BLUE, alpha=0.25, linewidth=0.8)
    axis.stairs(np.histogram(seen, edges)[0] / len(seen), edges, color=ORANGE, linewidth=1.8)
    axis.set_ylabel("share")


def _shares(axis: Any, seen: Array, again: Array, labels: Sequence[str]) -> None:
    shown = np.sort(np.argsort(-seen, kind="stable")[:_MOST_SHARES])
    low, high = np.quantile(again[:, shown], [0.05, 0.95], axis=0)
    axis.vlines(np.arange(len(shown)), low, high, color=BLUE, linewidth=4)
    axis.plot(np.arange(len(shown)), seen[shown], "D", color=ORANGE, markersize=4)
    names = [labels[i] for i in shown]
    axis.set_xticks(np.arange(len(shown)), names, rotation=30 if len("".join(names)) > _LETTERS else 0)
    axis.set_xlim(-0.6, len(shown) - 0.4)
    axis.set_ylim(0.0, min(1.0, 1.15 * float(max(high.max(), seen.max(), 0.05))))
    axis.set_ylabel("share")


def _label(column: str, variable: str) -> str:
    """The name of a category; of zeros and ones, what a one is."""
    own = column.removeprefix(f"{variable}=") if column != variable else "1"
    return own if len(own) <= _LONGEST else f"{own[: _LONGEST - 1]}…"
