"""The parts of a network that drop units at random, and how they stay active."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from deepprob.errors import shown

USUAL_RATE = 0.1  # of networks that are made for Monte Carlo dropout


def dropout_parts(net: nn.Module) -> dict[str, nn.Module]:
    """The parts that drop units in training mode, by name: dropout layers, and other layers with a rate of their own.

    Args:
        net: A network, or a program with networks.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), nn.LSTM(2, 2, 2, dropout=0.2), nn.Dropout(0.0))
        >>> list(dropout_parts(net))
        ['1', '2']
    """
    return {name: part for name, part in net.named_modules() if rate_of(part) > 0.0}


def rate_in_range(name: str, rate: Any) -> float:
    """A rate of dropout.

    Args:
        name: The argument's name in the error message.
        rate: The rate.

    Raises:
        ValueError: If it is not a number of at least 0 and below 1.
    """
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise ValueError(f"{name} must be a rate of at least 0 and below 1; got {shown(rate)}. Write {name}=0.1.")
    return float(rate)


def rate_of(part: nn.Module) -> float:
    """The share of units that a part drops in training mode; 0 for other parts."""
    if isinstance(part, _DropoutNd):
        return float(part.p)
    own = isinstance(part, nn.RNNBase | nn.MultiheadAttention)
    return float(part.dropout) if own else 0.0  # type: ignore[arg-type]


def activate_dropout(net: nn.Module) -> None:
    """Put a network into evaluation mode, except for its dropout.

    Args:
        net: A network, or a program with networks.
    """
    for part in net.modules():
        part.training = False
    for part in _run_by_dropout(net):
        part.training = True


def _run_by_dropout(net: nn.Module) -> Iterator[nn.Module]:
    """The parts whose mode decides whether units are dropped."""
    yield from dropout_parts(net).values()
    for part in net.modules():
        # In evaluation mode these run fused kernels, which pass over the dropout layers inside.
        if isinstance(part, nn.TransformerEncoderLayer | nn.TransformerEncoder) and dropout_parts(part):
            yield part
