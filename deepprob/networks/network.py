"""The base class of networks, and checks of sizes and inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Generator, Tensor, nn

from deepprob.errors import whole


class Network(nn.Module):
    """Base class of networks: a module with sizes and a configuration.

    Attributes:
        in_features: Size of the input's last axis (of the whole image for an image encoder).
        out_features: Size of the output's last axis.
        config: The constructor's arguments as JSON values, and the network's name under ``"network"``.
    """

    in_features: int
    out_features: int
    config: dict[str, Any]

    def draw_weights(self, generator: Generator | None = None) -> dict[str, str]:
        """Redraw all weights.

        Args:
            generator: Source of the draws; None for torch's global generator.

        Returns:
            The scheme by parameter name.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define draw_weights. Define it in the subclass.")


def whole_sizes(name: str, values: object) -> list[int]:
    """Check that an argument is a sequence of sizes, and return it as a list.

    Args:
        name: Name of the argument, for error messages ("hidden_dims").
        values: Value of the argument.

    Raises:
        TypeError: If it is not a sequence.
        ValueError: If an entry is not a whole number of at least 1.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of whole numbers; got {values!r}. Write e.g. (64, 64).")
    return [whole(f"every size in {name}", value) for value in values]


def check_trailing(name: str, x: Tensor, expected: tuple[int | None, ...]) -> None:
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
            f"{name} expects inputs of shape (*batch, {shown}); got {tuple(x.shape)}. "
            "Reshape the data, or create the network for this shape."
        )
