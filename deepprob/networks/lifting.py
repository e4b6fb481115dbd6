"""Networks as pure functions of their weights, and the facts about weights that a prior needs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deepprob.engine.batching import over_draws
from deepprob.networks.initialisation import is_pretrained
from deepprob.networks.inputs import checked_rows, same_state
from deepprob.networks.linearised import expansion_of, linearised
from deepprob.networks.registry import network_from_config


def lift(net: Any, taken: Collection[str] = ()) -> nn.Module:
    """Copy a network, so that it can run with random weights.

    Args:
        net: A network, or the ``config`` of a deepprob network.
        taken: Names that no parameter of ``net`` may have.

    Returns:
        The copy.

    Raises:
        TypeError: If ``net`` is not a network.
        ValueError: If no parameter is trainable, a batch norm makes rows depend on each other, a name is taken, or a
            part is a scripted module.
    """
    if isinstance(net, Mapping):
        net = network_from_config(net)
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module; got {type(net).__name__}. Write e.g. MLP(D, outputs).")
    refuse_scripted(net, "net")
    lifted = copy.deepcopy(net)
    names = [n for n, p in lifted.named_parameters() if p.requires_grad]
    if not names:
        raise ValueError("net has no trainable parameter, so nothing is random. Set requires_grad=True.")
    if found := sorted(set(taken) & set(names)):
        raise ValueError(f"net has a parameter named {found[0]!r}, but the program has a site of that name. Rename it.")
    for name, part in lifted.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
            raise ValueError(
                f"net has a batch norm without running statistics ({name!r}), which makes rows depend on each other. "
                "Use LayerNorm or GroupNorm, or track_running_stats=True."
            )
    return lifted


def refuse_scripted(net: nn.Module, title: str, named: Callable[[str], str] = str) -> None:
    """Refuse a network with a scripted part, whose parameters are new objects at every look.

    Args:
        net: The network, or a program with networks.
        title: Its name in the message.
        named: From the name of a part to the user's name for it.

    Raises:
        ValueError: If a part is a scripted module.
    """
    for name, part in net.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ValueError(
                f"{title} has a scripted module ({named(name) or f'{title} itself'!r}), whose weights can be neither "
                "copied nor replaced by draws. Give the Python module that was scripted or traced."
            )


def run_with(
    net: nn.Module, weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], *inputs: Tensor
) -> Tensor:
    """Run a network, or its expansion (see `linearised`), with given weights, for every draw of them.

    Args:
        net: The network.
        weights: Weights by name, each with the same leading dimensions ``(*K, 1)`` or none.
        shapes: The shape of each weight without leading dimensions.
        inputs: Rows, ``(B, ...)`` each.

    Returns:
        Outputs, ``(*K, B, outputs)``.

    Raises:
        ValueError: If the network does not return one row of numbers for each row.

    Examples:
        Each draw of the weights is a separate network:

        >>> net, x = nn.Linear(3, 2, bias=False), torch.ones(5, 3)
        >>> draws = torch.stack([torch.zeros(2, 3), torch.ones(2, 3)]).unsqueeze(1)  # (K, 1, 2, 3)
        >>> run_with(net, {"weight": draws}, {"weight": (2, 3)}, x)[:, 0].tolist()
        [[0.0, 0.0], [3.0, 3.0]]
    """

    def run_one(weights: dict[str, Tensor]) -> Tensor:
        rows = tuple(x.clone() for x in inputs) if getattr(net, "writes_inputs", False) else inputs
        with same_state(net):
            return checked_rows(functional_call(net, weights, rows), net, inputs[0])

    at = expansion_of(net, shapes)
    run = run_one if at is None else linearised(run_one, at)
    leading = torch.broadcast_shapes(*(w.shape[: w.dim() - len(shapes[n])] for n, w in weights.items()))
    if not leading:
        return run(dict(weights))
    stacked = {n: w.expand(*leading, *shapes[n]).reshape(-1, *shapes[n]) for n, w in weights.items()}  # (K, *weight)
    out = _all_draws(run, stacked)
    # The last leading dimension holds the place of the row axis, which the network adds.
    return out.reshape(*leading[:-1], *out.shape[-2:])


def _all_draws(run_one: Callable[[dict[str, Tensor]], Tensor], stacked: dict[str, Tensor]) -> Tensor:
    """Outputs for weights ``(K, *weight)``, in one call if ``vmap`` supports the network, else draw by draw."""
    try:
        found: Tensor = over_draws(run_one, stacked)
        return found
    except Exception:  # vmap supports neither recurrent layers nor branches on values; the network's own errors recur
        count = len(next(iter(stacked.values())))
        return torch.stack([run_one({n: w[k] for n, w in stacked.items()}) for k in range(count)])


def fans(net: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Fan-in of every weight that has an axis of inputs: how many numbers one output sums.

    Examples:
        >>> net = nn.Conv2d(3, 8, 5)
        >>> fans(net, dict(net.named_parameters())), 3 * 5 * 5
        ({'weight': 75}, 75)
    """
    found = {}
    for name, weight in weights.items():
        if weight.dim() > 1:
            transposed = type(net.get_submodule(name.rpartition(".")[0])).__name__.startswith("ConvTranspose")
            found[name] = weight.numel() // weight.shape[1 if transposed else 0]
    return found


def gains(net: nn.Module) -> set[str]:
    """Names of the weights of normalization layers; their neutral value is 1, not 0."""
    norms = [name for name, part in net.named_modules() if "Norm" in type(part).__name__]
    return {f"{name}.weight".removeprefix(".") for name in norms}


def pretrained_names(net: nn.Module) -> set[str]:
    """Names of the parameters of modules marked as pretrained."""
    marked = [prefix for prefix, part in net.named_modules() if is_pretrained(part)]
    names = [name for name, _ in net.named_parameters()]
    return {name for name in names for prefix in marked if not prefix or name.startswith(f"{prefix}.")}


def check_columns(outputs: int, columns: int, num_classes: int | None, *, exactly: bool) -> None:
    """Refuse a network with another number of outputs than classes or columns of y.

    Args:
        outputs: The number of outputs.
        columns: The number of columns of y.
        num_classes: The number of classes, if y are classes.
        exactly: Whether y is given; before a fit its columns are unknown.

    Raises:
        ValueError: If the numbers differ.
    """
    if num_classes is not None:
        if outputs != num_classes:
            raise ValueError(f"the network has {outputs} outputs, but num_classes={num_classes}. Make them equal.")
    elif columns != outputs and (exactly or columns != 1):
        raise ValueError(f"the network has {outputs} outputs, but y has {columns} columns. Make them equal.")
