"""Running a program with all values of the sites that are marked for enumeration."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from queue import LifoQueue
from typing import Any

from pyro import poutine
from pyro.infer.discrete import _sample_posterior_from_trace
from pyro.infer.enum import iter_discrete_escape, iter_discrete_extend
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from deepprob.programs.minibatch import Batch
from deepprob.programs.program import Program
from deepprob.programs.run import share_masks, stacked, trace_guide
from deepprob.programs.sites import Site, sample_sites


def run_enumerated(
    program: Program,
    batch: Batch,
    rows: Tensor,
    num_data: int,
    *,
    draws: int | None = None,
    plates: int = 1,
    guide: Callable[..., Any] | None = None,
    enumerate_guide: bool = True,
) -> list[tuple[Trace, Trace]]:
    """Run guide and model with all values of the sites that are marked for enumeration.

    Args:
        program: The program.
        batch: Its arguments.
        rows: Which rows of the data they are, shape ``(B,)``.
        num_data: Number of rows of the whole data.
        draws: If given, a leading plate of so many draws surrounds both.
        plates: Depth of the program's own plates; enumerated dimensions go to the left of them and of the draws.
        guide: Another guide than the program's own.
        enumerate_guide: Whether the guide's marked sites are enumerated too, or drawn.

    Returns:
        Pairs of the guide's trace and the model's: one, or one for every combination of sequential values.
    """
    ours = _stacked_call(guide or program.guide, draws, plates)
    model = EnumMessenger()(_stacked_call(program.model, draws, plates))  # goes on where the guide's dimensions end
    if not enumerate_guide:
        ours = poutine.infer_config(ours, config_fn=_unmark)
    pending: LifoQueue[Trace] = LifoQueue()
    pending.put(Trace())
    # Dimensions are counted from the right; the first free one is to the left of the draws.
    ours = EnumMessenger(-plates - (1 if draws is None else 2))(ours)
    ours = poutine.queue(ours, pending, escape_fn=iter_discrete_escape, extend_fn=iter_discrete_extend)
    found = []
    with program.bound(rows, num_data):
        while not pending.empty():
            guide_trace = trace_guide(program, ours, batch)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*batch)
            share_masks(guide_trace, model_trace)
            found.append((guide_trace, model_trace))
    return found


def _stacked_call(fn: Callable[..., Any], draws: int | None, plates: int) -> Callable[..., Any]:
    def call(*batch: Any) -> Any:
        with stacked(draws, plates):
            return fn(*batch)

    return call


def _unmark(site: Site) -> Any:
    return {"enumerate": None}


def is_enumerated(site: Site) -> bool:
    """Whether a site of an enumerated run took all of its values."""
    return "_enumerate_dim" in site["infer"] or "_enum_total" in site["infer"]


def any_enumerated(traces: Iterable[tuple[Trace, Trace]]) -> bool:
    """Whether any site of these runs took all of its values."""
    return any(is_enumerated(site) for pair in traces for trace in pair for _, site in sample_sites(trace))


def draw_summed(
    program: Program,
    batch: Batch,
    rows: Tensor,
    *,
    draws: int,
    plates: int = 1,
    guide: Callable[..., Any] | None = None,
) -> tuple[Trace, Trace]:
    r"""Run the guide, and the model with what is summed out drawn from :math:`p(k \mid x, z)`, exactly.

    Forward filtering and backward sampling over the same sums as the bound's.

    Args:
        program: The program.
        batch: Its arguments, observed ones included.
        rows: Which rows of the data they are, shape ``(B,)``.
        draws: Number of draws of everything, in a leading plate.
        plates: Depth of the program's own plates.
        guide: Another guide than the program's own.

    Returns:
        The guide's trace and the model's.
    """
    ((guide_trace, model_trace),) = run_enumerated(
        program, batch, rows, len(rows), draws=draws, plates=plates, guide=guide, enumerate_guide=False
    )
    enumerated = prune_subsample_sites(model_trace)
    enumerated.compute_log_prob()
    enumerated.pack_tensors()
    model = poutine.trace(poutine.replay(_stacked_call(program.model, draws, plates), trace=guide_trace))
    with program.bound(rows, len(rows)):
        _sample_posterior_from_trace(model, enumerated, 1, False, *batch)
    return guide_trace, model.trace
