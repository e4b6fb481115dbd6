"""The look of all plots: colors, fonts and new figures, without global pyplot state."""

from __future__ import annotations

from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

BLUE, ORANGE, GREY, INK = "#2f6db3", "#d9822b", "#b8bec4", "#1d2329"
MIDDLE = "#7d868f"  # legible on white and on black
_STYLE: Any = {
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "xtick.color": "#5c6670",
    "ytick.color": "#5c6670",
    "font.size": 9,
}


def new_figure(width: float = 5.6, height: float = 4.0) -> Figure:
    """A figure of a size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def new_axes(figure: Figure) -> Any:
    """The only axes of a figure."""
    with rc_context(_STYLE):
        return figure.add_subplot()


def panels(count: int, *, columns: int = 3, width: float = 2.8, height: float = 2.0) -> tuple[Figure, list[Any]]:
    """A figure with a number of axes side by side, each of a size in inches."""
    columns = min(columns, count)
    rows = -(-count // columns)
    with rc_context(_STYLE):
        figure = new_figure(columns * width, rows * height + 0.3)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.set_axis_off()
    return figure, axes[:count]
