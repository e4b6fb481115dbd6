"""Layers of a network, chosen by name, pattern or type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from deepprob.errors import shown

LAST = "last"
Layer = str | type


def chosen_parameters(net: nn.Module, layers: Layer | Sequence[Layer] | None, argument: str = "layers") -> list[str]:
    """Names of the trainable parameters of some layers, in the order of the network.

    A layer is chosen by its name (``"encoder.0"``), by that of a parameter (``"encoder.0.weight"``), by a pattern of
    such names (``"encoder.*"``, ``"*.bias"``), by its type (``nn.Conv2d``), or as ``"last"``, the last layer that has a
    trainable parameter.

    Args:
        net: The network.
        layers: A choice, or several; None for all layers.
        argument: The user's name for the choice, for error messages.

    Raises:
        TypeError: If a choice is neither a string nor a type of module.
        ValueError: If a choice names no trainable parameter of the network.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        >>> chosen_parameters(net, "last"), chosen_parameters(net, "*.bias")
        (['2.weight', '2.bias'], ['0.bias', '2.bias'])
    """
    trainable = [name for name, p in net.named_parameters() if p.requires_grad]
    if layers is None:
        return trainable
    choices = [layers] if isinstance(layers, str | type) else layers
    if not isinstance(choices, Sequence | set | frozenset):
        raise TypeError(f"{argument} must be a name, a type of layer or a list of them; got {shown(layers)}.")
    found = {name for choice in choices for name in _named_by(net, choice, trainable, argument)}
    if not found:
        raise ValueError(f"{argument} is empty, so nothing is random. Name a layer, or leave {argument} out for all.")
    return [name for name in trainable if name in found]


def by_parameter(net: nn.Module, choices: Mapping[Layer, Any], argument: str) -> dict[str, Any]:
    """What a mapping from layers gives each trainable parameter; the first matching choice counts.

    Args:
        net: The network.
        choices: Values by layer, see `chosen_parameters`.
        argument: The user's name for the mapping, for error messages.

    Raises:
        TypeError: If a choice is neither a string nor a type of module.
        ValueError: If a choice names no trainable parameter of the network.
    """
    found: dict[str, Any] = {}
    for layer, value in choices.items():
        for name in chosen_parameters(net, layer, argument):
            found.setdefault(name, value)
    return found


def _named_by(net: nn.Module, choice: Any, trainable: Sequence[str], argument: str) -> list[str]:
    """Names of the trainable parameters that one choice names."""
    canonical = {id(p): name for name, p in net.named_parameters()}
    # A weight that two layers share has one name, but belongs to both layers.
    names = {name: canonical[id(p)] for name, p in net.named_parameters(remove_duplicate=False)}
    if isinstance(choice, type) and issubclass(choice, nn.Module):
        prefixes = [name for name, part in net.named_modules() if isinstance(part, choice)]
        found = {own for name, own in names.items() for p in prefixes if not p or name.startswith(f"{p}.")}
    elif choice == LAST and LAST not in dict(net.named_modules()):
        layer = trainable[-1].rpartition(".")[0] if trainable else ""
        found = {own for name, own in names.items() if name.rpartition(".")[0] == layer}
    elif isinstance(choice, str):
        found = {own for name, own in names.items() if any(fnmatchcase(part, choice) for part in _paths(name))}
    else:
        raise TypeError(
            f"{argument} must name layers by strings or types of torch.nn; got {shown(choice)}. Write 'last', 'head', "
            "'*.bias' or nn.Linear."
        )
    chosen = [name for name in trainable if name in found]
    if not chosen:
        known = list(dict.fromkeys(name.rpartition(".")[0] or name for name in trainable))
        what = choice.__name__ if isinstance(choice, type) else repr(choice)
        raise ValueError(
            f"{argument} names {what}, which has no trainable parameter in net. Choose from its layers: "
            f"{', '.join(known)}."
        )
    return chosen


def _paths(name: str) -> list[str]:
    """The name of a parameter, and those of all modules around it."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
