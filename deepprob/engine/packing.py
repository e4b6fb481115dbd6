"""Pack many small tensors into few large ones."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.functional import pad

_ALONE = 2**14  # elements: from here on, copying a gradient into a shared tensor costs more than one more tensor
_SUMMED = 2**13  # elements times tensors: up to here, a sum of padded tensors is faster than a concatenation
_ALIGN = 16  # elements: no parameter shares a vector register with another


class Packing:
    """A layout of parameters in few tensors, the groups: small parameters of one dtype share a group.

    Each large parameter is a group of its own. A step over many small tensors is mostly overhead per tensor; over few
    large tensors it is mostly arithmetic.

    Args:
        params: The parameters, in order.

    Examples:
        >>> packing = Packing([torch.ones(3), torch.zeros(2, 2)])
        >>> [group.shape for group in packing.pack([torch.ones(3), torch.zeros(2, 2)])]
        [torch.Size([32])]
        >>> [x.tolist() for x in packing.unpack([torch.arange(32.0)])]
        [[0.0, 1.0, 2.0], [[16.0, 17.0], [18.0, 19.0]]]
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.shapes = [p.shape for p in params]
        self.places: list[tuple[int, int]] = []  # group and first element; -1 if the parameter is the whole group
        self.groups = 0
        shared: dict[tuple[torch.dtype, torch.device], tuple[int, int]] = {}
        for p in params:
            if p.numel() >= _ALONE:
                self.places.append((self.groups, -1))
                self.groups += 1
                continue
            key = p.dtype, p.device
            if key not in shared:
                shared[key] = self.groups, 0
                self.groups += 1
            group, start = shared[key]
            self.places.append((group, start))
            shared[key] = group, start + _padded(p.numel())

    def pack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Pack tensors of the parameters' shapes into groups.

        In a trace, small groups are sums of padded tensors: compiled code computes a sum where it is used, but writes
        a concatenation to memory part by part.

        Args:
            tensors: One tensor for every parameter.
        """
        members: list[list[tuple[int, Tensor]]] = [[] for _ in range(self.groups)]
        for (group, start), x in zip(self.places, tensors, strict=True):
            members[group].append((start, x))
        return [_concatenate(group) for group in members]

    def unpack(self, groups: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of the parameters' shapes in the groups, as views."""
        return [
            groups[group] if start < 0 else groups[group].narrow(0, start, shape.numel()).view(shape)
            for (group, start), shape in zip(self.places, self.shapes, strict=True)
        ]


def _concatenate(members: Sequence[tuple[int, Tensor]]) -> Tensor:
    """One tensor with each member from its first element on, and zeros between them."""
    if members[0][0] < 0:
        return members[0][1]
    parts = [(start, x.reshape(-1)) for start, x in members]
    size = parts[-1][0] + _padded(len(parts[-1][1]))
    if size * len(parts) <= _SUMMED and get_proxy_mode() is not None:
        spread = [pad(x, (start, size - start - len(x))) for start, x in parts]
        return functools.reduce(torch.add, spread)
    gaps = [_padded(len(x)) - len(x) for _, x in parts]
    return torch.cat(
        [y for (_, x), gap in zip(parts, gaps, strict=True) for y in ([x, x.new_zeros(gap)] if gap else [x])]
    )


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def global_norm(groups: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all elements of some tensors, such as a gradient."""
    total = torch.stack([(g * g).sum() for g in groups]).sum() if len(groups) > 1 else (groups[0] * groups[0]).sum()
    return total.sqrt()
