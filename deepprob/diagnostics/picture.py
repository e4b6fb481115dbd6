"""`Picture`, an image of a report."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from deepprob.diagnostics.style import INK

_WIDTH = 4.2  # inches: labels of 9 points are 10 px high on a phone, where an image is 350 px wide
_DPI, _FONT = 200, 9


@dataclass(frozen=True)
class Picture:
    """An image with title, caption and alternative text.

    Args:
        name: A short name, usable as a file name.
        title: The title.
        caption: How to read the image, in one sentence.
        alt: The alternative text for readers who do not see the image.
        png: The image.
        photos: Whether it shows images of the data, whose colors must stay as they are in dark mode.
    """

    name: str
    title: str
    caption: str
    alt: str
    png: bytes
    photos: bool = False

    @property
    def base64(self) -> str:
        """The image in base64, for a data URI."""
        return base64.b64encode(self.png).decode()


def drawn(figure: Figure, height: float | None = None) -> bytes:
    """A figure as PNG with a transparent background, legible on a phone.

    Args:
        figure: The figure.
        height: Its height in inches; None to keep its shape.
    """
    width, before = figure.get_size_inches()
    figure.set_size_inches(_WIDTH, before * _WIDTH / width if height is None else height)
    for legend in figure.findobj(Legend):
        for text in legend.get_texts():
            text.set(fontsize=_FONT, color=INK)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, transparent=True, metadata={"Software": None})
    return buffer.getvalue()
