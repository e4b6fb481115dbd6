"""What all networks share: sizes, configuration and checks of what they are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Generator, Tensor, nn

from deepprob.errors import whole


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
        raise NotImplementedError(f"{type(self).__name__} does not define draw_weights. Define it in the subclass.")


def whole_sizes(name: str, values: object) -> list[int]:
    """A sequence of sizes of at least 1, checked.

    Args:
        name: What the sizes are called, in the user's words ("hidden_dims").
        values: What the user wrote.

    Raises:
        TypeError: If it is no sequence.
        ValueError: If an entry is no whole number of at least 1.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of whole numbers; got {values!r}. Write e.g. (64, 64).")
    return [whole(f"every size in {name}", value) for value in values]


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
