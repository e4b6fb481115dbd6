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

from deepprob.programs.run import Run, cut_off, share_masks, trace_guide
from deepprob.programs.sites import Site, sample_sites


def run_enumerated(run: Run, *, enumerate_guide: bool = True) -> list[tuple[Trace, Trace]]:
    """Run guide and model with all values of the sites that are marked for enumeration.

    Args:
        run: The run; enumerated dimensions go to the left of its plates and of the draws.
        enumerate_guide: Whether to enumerate the guide's marked sites, too, instead of drawing them.

    Returns:
        Pairs of the guide's trace and the model's: one pair for every combination of sequential values.
    """
    ours = _stacked_call(run, run.fixed_guide)
    model = EnumMessenger()(_stacked_call(run, run.program.model))  # its dimensions continue the guide's
    if not enumerate_guide:
        ours = poutine.infer_config(ours, config_fn=_unmark)
    pending: LifoQueue[Trace] = LifoQueue()
    pending.put(Trace())
    # Dimensions are counted from the right; the first free one is to the left of the draws.
    ours = EnumMessenger(-run.plates - (1 if run.draws is None else 2))(ours)
    ours = poutine.queue(ours, pending, escape_fn=iter_discrete_escape, extend_fn=iter_discrete_extend)
    found = []
    with run.bound():
        while not pending.empty():
            guide_trace = trace_guide(run, ours)
            if run.leaves:
                cut_off(run, _stacked_call(run, run.fixed_guide), guide_trace)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*run.batch)
            share_masks(guide_trace, model_trace)
            found.append((guide_trace, model_trace))
    return found


def _stacked_call(run: Run, fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(*batch: Any) -> Any:
        with run.stacked():
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


def draw_summed(run: Run) -> tuple[Trace, Trace]:
    r"""Run the guide, and the model with its summed-out sites drawn exactly, from :math:`p(k \mid x, z)`.

    The method is forward filtering and backward sampling, over the same sums as in the bound.

    Args:
        run: The run; its batch includes the observed arguments.

    Returns:
        The guide's trace and the model's.
    """
    ((guide_trace, model_trace),) = run_enumerated(run, enumerate_guide=False)
    enumerated = prune_subsample_sites(model_trace)
    for name, site in list(sample_sites(enumerated)):
        known = name in guide_trace.nodes
        if (known or site["is_observed"]) and not _varies(run, site):  # no influence: the pixels given a code
            enumerated.remove_node(name)
        elif known:  # Pyro would gather a value with event dimensions as if it had none
            given: Site = {**site, "is_observed": True}
            enumerated.nodes[name] = given
    enumerated.compute_log_prob()
    enumerated.pack_tensors()
    model = poutine.trace(poutine.replay(_stacked_call(run, run.program.model), trace=guide_trace))
    with run.bound():
        _sample_posterior_from_trace(model, enumerated, 1, False, *run.batch)
    return guide_trace, model.trace


def _varies(run: Run, site: Site) -> bool:
    """Whether the density of a site may differ between values of the sites that are summed out."""
    fn, value, mask = site["fn"], site["value"], site["mask"]
    shapes = (fn.batch_shape, value.shape[: value.dim() - fn.event_dim], getattr(mask, "shape", ()))
    return max(map(len, shapes)) > run.plates + (run.draws is not None)
