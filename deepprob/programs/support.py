"""Checks of observed values against the distributions that observe them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from deepprob.engine.deferred_errors import defer_error
from deepprob.programs.sites import Site, observed_sites


def check_observations(trace: Trace) -> None:
    """Check the shape and support of a run's data against the distributions that observe them.

    Torch checks neither while validation is off, and it accepts every shape that broadcasts.

    Args:
        trace: Trace of a model.

    Raises:
        ValueError: If data have another shape than their distribution, or lie outside of its support.
    """
    for name, site in observed_sites(trace).items():
        _check_shape(name, site)
        _check_support(name, site)


def check_data(model_trace: Trace) -> None:
    """Refuse a query without data, or with data that do not fit their distributions.

    Raises:
        ValueError: If nothing is observed, or as in `check_observations`.
    """
    if not observed_sites(model_trace):
        raise ValueError("nothing is observed: give the observed arguments too, all that the fit was given.")
    check_observations(model_trace)


def _check_shape(name: str, site: Site) -> None:
    fn, value = site["fn"], torch.as_tensor(site["value"])
    given = tuple(value.shape[: value.dim() - fn.event_dim])
    own = tuple(fn.batch_shape)
    both = tuple(np.broadcast_shapes(given, own))
    in_plates = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    stray = [d for d in range(-len(both), 0) if in_plates and d not in in_plates and both[d] > 1]
    if both in (given, own) and not stray:
        return
    has, came, what = tuple(fn.shape()), tuple(value.shape), name
    if has[:1] == came[:1]:
        has, came, what = has[1:], came[1:], f"every row of {name}"
    if has == came:
        raise ValueError(
            f"the {_title(fn)} distribution of {name} has batch shape {own}, more dimensions than its plates. "
            "Add .to_event(1) to it, or a plate, and write its shapes from the right."
        )
    raise ValueError(
        f"{what} must have shape {has}, as the model's {_title(fn)} distribution has; got {came}. "
        "Reshape the data, or the parameters of the distribution."
    )


def _check_support(name: str, site: Site) -> None:
    fn, value = site["fn"], torch.as_tensor(site["value"])
    try:
        support = fn.support
    except (NotImplementedError, AttributeError):
        return
    good = support.check(value)
    for mask in (site["mask"], getattr(fn, "_mask", None)):
        if mask is not None:
            good = good | ~torch.as_tensor(mask, device=good.device)
    if not defer_error(~good.all()):
        return
    raise ValueError(
        f"{name} must be {_words(support)} for a {_title(fn)} likelihood; got values from {value.min().item():g} to "
        f"{value.max().item():g}. Change the values, or choose another distribution."
    )


def _title(fn: Any) -> str:
    while hasattr(fn, "base_dist") and type(fn).__name__ in ("Independent", "MaskedDistribution"):
        fn = fn.base_dist
    return type(fn).__name__


def _words(support: Any) -> str:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    low, high = _number(support, "lower_bound"), _number(support, "upper_bound")
    kind = "whole numbers" if support.is_discrete else "numbers"
    if support is constraints.boolean:
        return "0 or 1"
    if low is not None and high is not None:
        return f"{kind} from {low:g} to {high:g}"
    if low is not None and not hasattr(support, "upper_bound"):
        least = "above" if type(support).__name__ == "_GreaterThan" else "of at least"
        return f"{kind} {least} {low:g}"
    if hasattr(support, "lower_bound") or hasattr(support, "upper_bound"):
        return f"{kind} within the bounds of their rows"
    return f"in the support {support}"


def _number(support: Any, name: str) -> float | None:
    bound = getattr(support, name, None)
    if isinstance(bound, Tensor):
        return float(bound.flatten()[0]) if bool((bound == bound.flatten()[0]).all()) else None
    return None if bound is None else float(bound)
