"""Networks as pure functions of their weights, and the facts about weights that a prior needs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deepprob.engine.batching import over_draws
from deepprob.networks.initialisation import is_pretrained
from deepprob.networks.inputs import checked_rows, same_state
from deepprob.networks.linearised import expansion_of, linearised
from deepprob.networks.registry import network_from_config
from deepprob.networks.row_noise import RowNoise

Check = Callable[[Any, nn.Module, Tensor], Tensor]
Parts = dict[tuple[str, str], Tensor]


class Noise(NamedTuple):
    """The distribution of weights whose draws are separate for every row, see `RowNoise`."""

    kind: str
    moments: Mapping[str, tuple[Tensor, Tensor]]


def copied(net: Any, taken: Collection[str] = ()) -> nn.Module:
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
    net: nn.Module,
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    *inputs: Tensor,
    event_dims: Sequence[int] | None = None,
    check: Check = checked_rows,
    noise: Noise | None = None,
) -> Tensor:
    """Run a network, or its expansion (see `linearised`), with given weights, for every draw of them.

    Args:
        net: The network.
        weights: Weights by name, each with the same leading dimensions ``(*K, 1)`` or none.
        shapes: The shape of each weight without leading dimensions.
        inputs: Rows, ``(B, ...)`` each.
        event_dims: Number of axes of one row of each input, which may then have leading dimensions ``(*K, B, ...)``;
            None for inputs that all draws share.
        check: Checks what the network returns for rows ``(B, ...)``.
        noise: Means and standard deviations of the weights, for draws that are separate for every row.

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
    parts = {("value", name): weight for name, weight in weights.items()}
    for name, (mean, sd) in ({} if noise is None else noise.moments).items():
        parts |= {("mean", name): mean, ("sd", name): sd}

    def run_one(parts: Parts, *inputs: Tensor) -> Tensor:
        rows = tuple(x.clone() for x in inputs) if getattr(net, "writes_inputs", False) else inputs
        drawn, means, sds = ({n: x for (k, n), x in parts.items() if k == kind} for kind in ("value", "mean", "sd"))
        separate = nullcontext() if noise is None else RowNoise(noise.kind, len(inputs[0]), drawn, means, sds)
        with same_state(net), separate:
            return check(functional_call(net, drawn, rows), net, inputs[0])

    at = expansion_of(net, shapes)

    def run(parts: Parts, *inputs: Tensor) -> Tensor:
        if at is None:
            return run_one(parts, *inputs)
        expanded = linearised(lambda values: run_one({("value", n): x for n, x in values.items()}, *inputs), at)
        return expanded({name: parts["value", name] for name in at})

    leading = torch.broadcast_shapes(*(x.shape[: x.dim() - len(shapes[n])] for (_, n), x in parts.items()))
    # A last dimension of size 1 holds the place of the row axis, which the network adds.
    draws = leading[:-1] if leading and leading[-1] == 1 else leading
    before = [x.shape[: x.dim() - 1 - n] for x, n in zip(inputs, event_dims or (), strict=False)]
    if not leading and not any(before):
        return run(parts, *inputs)
    common = torch.broadcast_shapes(draws, *before)
    own_rows = list(zip(inputs, before, strict=True)) if any(before) else []
    rows = [x.expand(*common, *x.shape[len(own) :]).reshape(-1, *x.shape[len(own) :]) for x, own in own_rows]
    if not leading:  # one network for the rows of all draws
        out = run(parts, *(x.flatten(0, 1) for x in rows))
        return out.reshape(*common, -1, *out.shape[1:])
    stacked = {(k, n): _spread(x, shapes[n], draws, common) for (k, n), x in parts.items()}
    out = _all_draws(run if rows else lambda one: run(one, *inputs), stacked, *rows)
    return out.reshape(*common, *out.shape[1:])


def _spread(weight: Tensor, shape: tuple[int, ...], draws: torch.Size, common: torch.Size) -> Tensor:
    """A weight for every entry of some leading dimensions, as one axis."""
    before = weight.shape[: weight.dim() - len(shape)]
    own = weight.reshape(*before[: len(draws)], *shape) if before else weight
    return own.expand(*common, *shape).reshape(-1, *shape)


def _all_draws(run_one: Callable[..., Tensor], stacked: Parts, *rows: Tensor) -> Tensor:
    """Outputs for weights ``(K, *weight)``, in one call if ``vmap`` supports the network, else draw by draw."""
    try:
        found: Tensor = over_draws(run_one, stacked, *rows)
        return found
    except Exception:  # vmap supports neither recurrent layers nor branches on values; the network's own errors recur
        count = len(next(iter(stacked.values())))
        return torch.stack(
            [run_one({n: w[k] for n, w in stacked.items()}, *(x[k] for x in rows)) for k in range(count)]
        )


def input_axis(net: nn.Module, name: str) -> int:
    """The axis of the inputs of a matrix of weights: 0 in a transposed convolution, else 1."""
    return 0 if type(net.get_submodule(name.rpartition(".")[0])).__name__.startswith("ConvTranspose") else 1


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
            found[name] = weight.numel() // weight.shape[1 - input_axis(net, name)]
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
