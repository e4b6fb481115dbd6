"""What all networks share: sizes, configuration and checks of what they are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Generator, Tensor, nn


class Network(nn.Module):
    """A network that knows its sizes and how it was made.

    Attributes:
        in_features: Size of the input's last axis (of the whole image for an image encoder).
        out_features: Size of the output's last axis.
        config: The constructor's arguments as JSON, and the network's name under ``"network"``.
    """

    in_features: int
    out_features: int
    config: dict[str, Any]

    def draw_weights(self, generator: Generator | None = None) -> dict[str, str]:
        """Draw all weights anew.

        Args:
            generator: Where the draws come from; None for torch's own.

        Returns:
            The scheme by parameter name.
        """
        raise NotImplementedError(f"{type(self).__name__} has no draw_weights: define it.")


def whole_size(name: str, value: object) -> int:
    """A size of at least 1, checked."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number; got {value!r} ({type(value).__name__}). Write an int.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}. Give the number of units.")
    return value


def whole_sizes(name: str, values: object) -> list[int]:
    """A sequence of sizes of at least 1, checked."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of whole numbers; got {values!r}. Write e.g. (64, 64).")
    return [whole_size(name, value) for value in values]


def check_trailing(what: str, x: Tensor, expected: tuple[int | None, ...]) -> None:
    """Compare the last dimensions of an input with the expected ones; None matches any size.

    Raises:
        ValueError: If they differ.
    """
    trailing = tuple(x.shape[max(0, x.dim() - len(expected)) :])
    matches = len(trailing) == len(expected) and all(
        size is None or size == found for size, found in zip(expected, trailing, strict=True)
    )
    if not matches:
        shown = ", ".join("T" if size is None else str(size) for size in expected)
        raise ValueError(
            f"{what} expects inputs of shape (*batch, {shown}); got {tuple(x.shape)}. "
            "Reshape the data, or make the network for this shape."
        )
