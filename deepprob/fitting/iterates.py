"""A fit that visits its iterates: the points of all members, in unconstrained coordinates, at some of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from deepprob.fitting.members import MembersFit
from deepprob.programs.point_guide import AutoPoint


class Iterates(Protocol):
    """What a fit keeps of the iterates of a member."""

    def add(self, point: Tensor) -> None:
        """Add an iterate, shape ``(D,)``."""

    def tensors(self) -> dict[str, Tensor]:
        """What was kept, for a checkpoint."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned."""


class IteratesFit(MembersFit):
    """A running fit of members whose guide is an `AutoPoint`.

    A subclass says at which steps it visits the iterates, and makes the `found` of every member.
    """

    found: list[Any]

    def next_visit(self, step: int) -> int:
        """The first step after this one that ends with a visit of the iterates; any later step if there is none."""
        raise NotImplementedError

    @property
    def guide(self) -> AutoPoint:
        """The guide."""
        guide: AutoPoint = self.state.instance.program.current_guide
        return guide

    def coordinates(self, member: int) -> Tensor:
        """The unconstrained coordinates of a member, shape ``(D,)``."""
        own = dict(zip(map(id, self.state.params.values()), self._unpacked(member), strict=True))
        pairs = zip(self.guide.points(), self.guide.units_of_points(), strict=True)
        return torch.cat([(own[id(p)] * unit).reshape(-1) for p, unit in pairs]).detach()

    def _unpacked(self, member: int) -> list[Tensor]:
        return self.state.packing.unpack(self.starts[member].at.carry["packed"])

    def _next_stop(self) -> int:
        return min(super()._next_stop(), self.next_visit(self.step))

    def _count_skipped(self, first: int, skipped: Sequence[float]) -> None:
        super()._count_skipped(first, skipped)
        self.visit()  # before a callback writes a checkpoint

    def visit(self) -> None:
        """Keep the iterates, if the last step ends with a visit."""
        if self.next_visit(self.step - 1) == self.step:
            for k in self.kept:
                self.found[k].add(self.coordinates(k))

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def starts_of_snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = super().starts_of_snapshot()
        kept = {f"iterates.{k}.{n}": x for k, own in enumerate(self.found) for n, x in own.tensors().items()}
        return tensors | kept, facts

    def restore_starts(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        own = {n.removeprefix("iterates."): x for n, x in tensors.items() if n.startswith("iterates.")}
        super().restore_starts({n: x for n, x in tensors.items() if not n.startswith("iterates.")}, facts)
        for k, found in enumerate(self.found):
            mine = {n.removeprefix(f"{k}."): x for n, x in own.items() if n.startswith(f"{k}.")}
            found.restore({n: x.to(self.state.instance.device) for n, x in mine.items()})
