"""Results of single draws, put together into one result with the draws first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from deepprob.distributions.per_draw import PerDraw, put_together, take_apart
from deepprob.engine.trace import same_values
from deepprob.programs.elimination import Term
from deepprob.programs.run import DRAWS, Run
from deepprob.programs.sites import is_deterministic, sample_sites

Result = list[Trace] | list[Term]


@dataclass(frozen=True)
class Recipe:
    """How tensors of many draws make one result with the draws first.

    Attributes:
        items: For each trace the static parts of its sites, or for each term its part and frames.
    """

    items: list[Any]

    def stack(self, tensors: Sequence[Tensor], run: Run) -> Result:
        """The result of all draws, from tensors ``(K, *shape)``."""
        rest, draws = iter(tensors), number_of(run)
        found: list[Any] = []
        for item in self.items:
            if isinstance(item, Term):
                found.append(replace(item, value=_with_rank(next(rest), run.plates + 1)))
                continue
            trace = Trace()
            for site, template, count, of_scale, of_mask in item:
                fn = PerDraw(template, [next(rest) for _ in range(count)], draws=draws, plates=run.plates)
                value = next(rest)
                if not site["is_observed"] or is_deterministic(site) or not _is_shared(value):
                    value = _with_rank(value, 1 + run.plates + len(fn.event_shape))
                else:
                    value = value[0]  # data
                frames = (*site["cond_indep_stack"], CondIndepStackFrame(DRAWS, -run.plates - 1, draws, 0))
                node = site | {"fn": fn, "value": value, "cond_indep_stack": frames}
                for name, is_tensor in (("scale", of_scale), ("mask", of_mask)):
                    if is_tensor:
                        node[name] = _with_rank(next(rest), 1 + run.plates)
                trace.add_node(site["name"], **node)
            found.append(trace)
        return found


def taken_apart(result: Result) -> tuple[Recipe, list[Tensor]]:
    """Split a result of one draw into a recipe and its tensors."""
    items: list[Any] = []
    tensors: list[Tensor] = []
    for part in result:
        if isinstance(part, Term):
            items.append(replace(part, value=torch.empty(0)))
            tensors.append(part.value)
            continue
        sites = []
        for _, site in sample_sites(part):
            template, own = take_apart(site["fn"])
            extra = [name for name in ("scale", "mask") if isinstance(site[name], Tensor)]
            static = {k: v for k, v in site.items() if k not in ("fn", "value", "args", "kwargs", *extra)}
            static |= {"args": (), "kwargs": {}}
            tensors += [*own, torch.as_tensor(site["value"]), *(site[name] for name in extra)]
            sites.append((static, template, len(own), "scale" in extra, "mask" in extra))
        items.append(sites)
    return Recipe(items), tensors


def detached(result: Result) -> Result:
    """The traces of a program that takes gradients itself, without gradients; terms have none."""
    for trace in result:
        for _, site in sample_sites(trace) if not isinstance(trace, Term) else ():
            template, tensors = take_apart(site["fn"])
            site["fn"], site["value"] = put_together(template, [x.detach() for x in tensors]), site["value"].detach()
    return result


def _is_shared(value: Tensor) -> bool:
    """Whether a value is the same for all draws."""
    return len(value) == 1 or value.stride(0) == 0 or same_values(value, value[:1].expand(value.shape))


def _with_rank(value: Tensor, rank: int) -> Tensor:
    """Insert dimensions of size 1 after the first one."""
    return value.reshape(value.shape[:1] + (1,) * (rank - value.dim()) + value.shape[1:])


def number_of(run: Run) -> int:
    """The number of draws of a run."""
    return run.draws or 1
