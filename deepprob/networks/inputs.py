"""Inputs of a network: their names, types and units, and what a first run on rows shows."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deepprob.data.precision import read_dtype
from deepprob.engine.moments import Moments


def input_names(net: nn.Module) -> list[str]:
    """Names of the inputs of a network: the required arguments of ``forward``; a single input is called ``x``.

    Examples:
        >>> input_names(nn.Linear(3, 1)), input_names(nn.Bilinear(3, 4, 1))
        (['x'], ['input1', 'input2'])
    """
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    arguments = inspect.signature(net.forward).parameters.values()
    names = [p.name for p in arguments if p.kind in places and p.default is p.empty]
    if len(names) < 2:
        return ["x"]
    return [f"{name}_" if name == "y" else name for name in names]


def signature_of(names: Sequence[str]) -> inspect.Signature:
    """The signature of a model with these inputs and optional targets ``y``.

    Examples:
        >>> signature_of(["x"])
        <Signature (x, y=None)>
    """
    place = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [*(inspect.Parameter(n, place) for n in names), inspect.Parameter("y", place, default=None)]
    )


def has_lazy_parts(net: nn.Module) -> bool:
    """Whether the sizes of some parameters are unknown until the network has seen rows."""
    return any(map(is_lazy, (*net.parameters(), *net.buffers())))


@torch.no_grad()
def meet_rows(net: nn.Module, names: Sequence[str], inputs: Sequence[Tensor]) -> None:
    """Run a network once, which gives lazy parts their sizes and shows whether it writes to its inputs.

    From then on, a network that writes to its inputs gets copies, so that every draw sees the same rows. A network
    without lazy parts that fails is left to the first run of the whole program, which explains the error.

    Args:
        net: The network; it changes.
        names: Names of the inputs.
        inputs: Rows for every input.

    Raises:
        ValueError: If the network does not return one row of numbers for each row, or fails before its lazy parts have
            sizes.
    """
    inputs = [x.clone() for x in inputs]
    before = [x._version for x in inputs]
    try:
        with same_state(net) if not has_lazy_parts(net) else nullcontext():
            out = net(*inputs)
    except Exception as error:  # the network's own code may raise anything
        if has_lazy_parts(net):
            kinds = ", ".join(f"{name} {tuple(x.shape[1:])}" for name, x in zip(names, inputs, strict=False))
            raise ValueError(f"net has lazy layers, which get their sizes from rows of {kinds}: {error}") from error
        return
    checked_rows(out, net, inputs[0])
    if before != [x._version for x in inputs]:
        net.writes_inputs = True  # type: ignore[assignment]


@torch.no_grad()
def as_accepted(net: nn.Module, inputs: Sequence[Tensor], rows: int = 2) -> list[Tensor]:
    """Whole numbers and bools as they are if the network can run on them, such as those of an embedding, else as reals.

    Args:
        net: The network.
        inputs: Rows for every input.
        rows: The number of rows to try.

    Examples:
        >>> ids = torch.tensor([[3], [1]])
        >>> for net in (nn.Embedding(4, 2), nn.Linear(1, 2)):
        ...     print(as_accepted(net, [ids])[0].dtype)
        torch.int64
        torch.float32
    """
    real = [x.to(read_dtype()) for x in inputs]
    whole = [i for i, x in enumerate(inputs) if not x.is_floating_point()]
    if not whole:
        return real
    twin = copy.deepcopy(net) if has_lazy_parts(net) else net
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    for number in range(2 ** len(whole)):  # the first choice keeps all
        converted = {i for place, i in enumerate(whole) if number >> place & 1}
        tried = [real[i] if i in converted or x.is_floating_point() else x for i, x in enumerate(inputs)]
        try:
            with same_state(twin):
                twin(*(x[:rows].to(device, copy=True) for x in tried))
        except Exception:  # the network's own code may raise anything
            continue
        return tried
    # No choice runs, so the types are not the cause.
    return [x if i in whole else real[i] for i, x in enumerate(inputs)]


def moments(value: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the rows or over everything; constant values get standard deviation 1.

    Args:
        value: The rows; of a sample that knows the moments of all rows (`Moments.mark`), these are returned.
        axis: 0 for every entry of a row, None for one number over everything.
    """
    found = Moments.of(value)
    dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
    loc, sd = (x.to(value.device, dtype) for x in (found.over_all() if axis is None else (found.mean, found.sd())))
    # Rounding errors give a constant column a small standard deviation.
    return loc, torch.where(sd > 8 * torch.finfo(dtype).eps * loc.abs(), sd, torch.ones_like(sd))


@contextmanager
def same_state(net: nn.Module) -> Iterator[None]:
    """Undo changes of a network's attributes, so that no run sees what another one left there."""
    before = [(part, dict(vars(part)), dict(part._buffers)) for part in net.modules()]
    try:
        yield
    finally:
        for part, attributes, buffers in before:
            vars(part).clear()
            vars(part).update(attributes)
            part._buffers.update(buffers)


def checked_rows(out: Any, net: nn.Module, x: Tensor) -> Tensor:
    """A network's result if it has one row of outputs for each row of ``x``.

    Raises:
        ValueError: If it is not a tensor of shape ``(rows, outputs)``.
    """
    if not isinstance(out, Tensor):
        raise ValueError(
            f"the network must return one tensor, (rows, outputs); got {type(out).__name__}. "
            f"Wrap {type(net).__name__} in a module that returns only the output tensor."
        )
    if out.dim() != 2 or len(out) != len(x):
        raise ValueError(
            f"the network must return (rows, outputs) for rows of shape {tuple(x.shape[1:])}; got "
            f"{tuple(out.shape)} for {len(x)} rows. Flatten or unsqueeze its last layer's output."
        )
    return out


def run_by_row(
    name: str, net: nn.Module, x: Tensor, event_dim: int, size: int, needed_by: str, *others: Tensor
) -> Tensor:
    """Run a network on rows ``(rows, *event)``, whatever the leading dimensions of ``x``.

    Args:
        name: Name of the network for error messages ("decoder").
        net: The network, which may return a row in any shape.
        x: Its input, ``(*leading, *event)``.
        event_dim: Number of dimensions of the event.
        size: Outputs that a row needs.
        needed_by: What needs them, for error messages.
        others: Its further inputs, ``(B, *event)`` each, where the last of the leading dimensions is B.

    Returns:
        Outputs, ``(*leading, size)``.

    Raises:
        ValueError: If the network does not return ``size`` numbers for each row.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 12), nn.Unflatten(1, (3, 4)))  # dimension 1 counts from the rows
        >>> run_by_row("decoder", net, torch.zeros(7, 5, 2), 1, 12, "the likelihood").shape
        torch.Size([7, 5, 12])
        >>> run_by_row("decoder", nn.Bilinear(2, 3, 12), torch.zeros(7, 5, 2), 1, 12, "", torch.zeros(5, 3)).shape
        torch.Size([7, 5, 12])
    """
    leading = x.shape[: x.dim() - event_dim]
    rows = x if len(leading) == 1 else x.reshape(-1, *x.shape[x.dim() - event_dim :])
    if len(leading) > 1:
        others = tuple(other.expand(*leading[:-1], *other.shape).flatten(0, len(leading) - 1) for other in others)
    out = net(rows, *others)
    if not isinstance(out, Tensor) or not out.dim() or len(out) != len(rows):
        came = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"{name} must return one tensor with a row of outputs for each of {len(rows)} rows of shape "
            f"{tuple(rows.shape[1:])}; got {came}. Wrap it in a module that does."
        )
    check_outputs(name, math.prod(out.shape[1:]), size, needed_by)
    return out.reshape(*leading, size)


def check_outputs(name: str, found: int, size: int, needed_by: str) -> None:
    """Compare the number of a network's outputs per row with the number needed.

    Raises:
        ValueError: If they differ.
    """
    if found != size:
        raise ValueError(
            f"{name} returns {found} outputs per row, but {needed_by} needs {size}. Give its last layer {size} outputs."
        )
