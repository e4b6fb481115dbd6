"""Many small tensors in few large ones."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

_ALONE = 2**14  # elements from which on copying a gradient into a shared tensor costs more than a further tensor
_SUMMED = 2**13  # elements times tensors up to which a sum of padded tensors beats writing each to its place
_ALIGN = 16  # elements: no parameter shares a vector register with another


class Packing:
    """Parameters in few tensors: small ones of one type share one, large ones keep their own.

    A step over many small parameters is mostly the overhead of handling each; over few tensors it is arithmetic.

    Args:
        params: What to pack, in order.

    Examples:
        >>> packing = Packing([torch.ones(3), torch.zeros(2, 2)])
        >>> [group.shape for group in packing.pack([torch.ones(3), torch.zeros(2, 2)])]
        [torch.Size([32])]
        >>> [x.tolist() for x in packing.unpack([torch.arange(32.0)])]
        [[0.0, 1.0, 2.0], [[16.0, 17.0], [18.0, 19.0]]]
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.shapes = [p.shape for p in params]
        self.places: list[tuple[int, int]] = []  # group and first element; -1 where a parameter is a group of its own
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

    def pack(self, tensors: Sequence[Tensor], *, in_a_graph: bool = False) -> list[Tensor]:
        """The groups that hold some tensors of the parameters' shapes.

        Args:
            tensors: One for every parameter.
            in_a_graph: Whether this is to be compiled. Then small groups are sums of padded tensors: a concatenation is
                a place in memory that every part is written to, a sum is computed where it is used.
        """
        members: list[list[tuple[int, Tensor]]] = [[] for _ in range(self.groups)]
        for (group, start), x in zip(self.places, tensors, strict=True):
            members[group].append((start, x))
        return [_joined(group, in_a_graph) for group in members]

    def unpack(self, groups: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that some groups hold, as views."""
        return [
            groups[group] if start < 0 else groups[group].narrow(0, start, shape.numel()).view(shape)
            for (group, start), shape in zip(self.places, self.shapes, strict=True)
        ]


def _joined(members: Sequence[tuple[int, Tensor]], in_a_graph: bool) -> Tensor:
    """One tensor that holds some others, each from its place on."""
    if members[0][0] < 0:
        return members[0][1]
    parts = [(start, x.reshape(-1)) for start, x in members]
    size = parts[-1][0] + _padded(len(parts[-1][1]))
    if in_a_graph and size * len(parts) <= _SUMMED:
        spread = [pad(x, (start, size - start - len(x))) for start, x in parts]
        return functools.reduce(torch.add, spread)
    gaps = [_padded(len(x)) - len(x) for _, x in parts]
    return torch.cat(
        [y for (_, x), gap in zip(parts, gaps, strict=True) for y in ([x, x.new_zeros(gap)] if gap else [x])]
    )


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def norm_of(groups: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of a gradient."""
    total = torch.stack([(g * g).sum() for g in groups]).sum() if len(groups) > 1 else (groups[0] * groups[0]).sum()
    return total.sqrt()
