"""Rows of images in one figure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from deepprob.diagnostics.check import Array, array
from deepprob.diagnostics.style import MIDDLE, new_figure


def image_rows(rows: Mapping[str, ArrayLike], *, columns: int = 10) -> Figure:
    """Rows of images on a common grey scale, each below its label.

    Args:
        rows: Images by label, shape ``(n, height, width)`` or with channels first or last.
        columns: Largest number of images in a row.
    """
    grids = {label: array(images)[:columns] for label, images in rows.items()}
    low = min(float(g.min()) for g in grids.values())
    high = max(float(g.max()) for g in grids.values())
    named = sum(bool(label.strip()) for label in grids)
    figure = new_figure(9.0, 9.0 / columns * len(grids) + 0.25 * named)
    places = figure.subplots(len(grids), columns, squeeze=False, gridspec_kw={"wspace": 0.05, "hspace": 0.05})
    for i, (label, images) in enumerate(grids.items()):
        for j in range(columns):
            axes = places[i, j]
            axes.set_axis_off()
            if j < len(images):
                axes.imshow(
                    _picture(images[j], low, high),
                    cmap="gray_r",
                    vmin=0,
                    vmax=1,
                    interpolation="nearest",
                )
        if label.strip():
            # The layout makes room for the height of a title, not for its width, which would spread the first columns.
            places[i, 0].set_title(" ", fontsize=9, pad=3)
            place = {"xycoords": "axes fraction", "xytext": (0, 3), "textcoords": "offset points"}
            places[i, 0].annotate(label, (0, 1), fontsize=9, color=MIDDLE, va="baseline", **place).set_in_layout(False)
    return figure


def _picture(image: Array, low: float, high: float) -> Array:
    if image.ndim == 3 and image.shape[0] in (1, 3):
        image = np.moveaxis(image, 0, -1)
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    return (image - low) / max(high - low, 1e-12)
