"""Checks of observed values against the distributions that observe them."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from pyro.distributions.hmm import HiddenMarkovModel
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from deepprob.distributions.columns import Columns
from deepprob.distributions.per_draw import unwrapped
from deepprob.engine.deferred_errors import defer_error
from deepprob.programs.run import DRAWS
from deepprob.programs.sites import Site, is_data, is_deterministic, is_factor, is_local, observed_sites, sample_sites
from deepprob.programs.structure import Structure


def check_observations(trace: Trace, unchecked: Container[str] = ()) -> None:
    """Check the shape and support of a run's data against the distributions that observe them.

    Torch checks neither while validation is off, and it accepts every shape that broadcasts.

    Args:
        trace: Trace of a model.
        unchecked: Sites whose support is not checked: the user wrote ``validate_args=False``.

    Raises:
        ValueError: If data have another shape than their distribution, or lie outside of its support.
    """
    for name, site in observed_sites(trace).items():
        if isinstance(site["value"], list | tuple):
            raise ValueError(
                f"site {name!r} observes a {type(site['value']).__name__}, which has no log-probability. Give one "
                "number per row as a list or an array in the data, or make a tensor in the model."
            )
        _check_shape(name, site)
        _check_type(name, site)
        if name not in unchecked:
            _check_support(name, site)


def likelihood_sites(model_trace: Trace, plate: str) -> dict[str, Site]:
    """The sites whose log-probabilities are the likelihood: data, and factors inside the row plate.

    A factor outside of it is part of the prior.
    """
    sites = sample_sites(model_trace)
    return {n: s for n, s in sites if is_data(s) or (is_factor(s) and is_local(s, plate) and not is_deterministic(s))}


def check_data(model_trace: Trace, structure: Structure) -> None:
    """Refuse a query without data, or with data that do not fit their distributions.

    Raises:
        ValueError: If nothing is observed, if the program has no likelihood, or as in `check_observations`.
    """
    seen = observed_sites(model_trace) if structure.observed else likelihood_sites(model_trace, structure.row_plate)
    if not seen and structure.observed:
        raise ValueError("nothing is observed: give the observed arguments too, all that the fit was given.")
    if not seen:
        raise ValueError(
            "nothing is observed by row: the program has no observed site, and no factor inside a plate over rows. Ask "
            "for log_evidence, or write the factor inside that plate and name it: Program.of(..., data_plate=...)."
        )
    check_observations(model_trace, structure.unchecked)


def _check_shape(name: str, site: Site) -> None:
    fn, value = site["fn"], torch.as_tensor(site["value"])
    split = value.dim() - fn.event_dim
    given, own = tuple(value.shape[:split]), tuple(fn.batch_shape)
    plates = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}
    theirs = [dim for dim, frame in plates.items() if frame.name != DRAWS]
    if _is_event(fn, tuple(value.shape[split:])) and all(
        _agree(
            _at(own, d),
            _at(given, d),
            plates.get(d),
            strict=bool(theirs),
            inner=d > min(theirs, default=0),
            told=-d <= len(given),
        )
        for d in range(-max(len(own), len(given)), 0)
    ):
        return
    has, came, what = tuple(fn.shape()), tuple(value.shape), name if theirs else f"site {name!r}"
    if theirs and has[:1] == came[:1]:
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


def _check_type(name: str, site: Site) -> None:
    """Refuse bools and whole numbers without a log-probability: torch names neither the site nor the remedy."""
    fn, value = site["fn"], torch.as_tensor(site["value"])
    if value.is_floating_point() or _has_log_prob(fn, value):
        return
    if _has_log_prob(fn, value.to(torch.get_default_dtype())):  # else the values are wrong, not their type
        what = "bools" if value.dtype == torch.bool else "whole numbers"
        raise ValueError(
            f"site {name!r} observes {what}, of which the {_title(fn)} distribution takes no log-probability. "
            "Give floats: y.float()."
        )


def _has_log_prob(fn: Any, value: Tensor) -> bool:
    try:
        fn.log_prob(value)
    except (RuntimeError, ValueError):
        return False
    return True


def _at(shape: tuple[int, ...], dim: int) -> int:
    return shape[dim] if -dim <= len(shape) else 1


def _agree(own: int, given: int, plate: Any, *, strict: bool, inner: bool, told: bool) -> bool:
    """Whether a distribution and its data have the same size in one batch dimension.

    Args:
        own: The distribution's size.
        given: The data's.
        plate: The plate of this dimension, if any.
        strict: Whether the site is in a plate, so that it has no dimensions to the left of its plates.
        inner: Whether the dimension is to the right of a plate, where a site may have dimensions of its own.
        told: Whether the data have this dimension themselves.
    """
    if plate is None:
        return max(own, given) == 1 or (inner and own == given) or (not strict and own in (1, given))
    if own == given or (plate.size == -1 and own == 1):
        return True
    return given == 1 and (plate.name == DRAWS or not told)  # draws share the data; a plate may share one value


def _is_event(fn: Any, shape: tuple[int, ...]) -> bool:
    own = tuple(fn.event_shape)
    if isinstance(
        unwrapped(getattr(fn, "first", fn)), HiddenMarkovModel
    ):  # a homogeneous chain has any number of steps
        return own[1:] == shape[1:] and own[0] in (1, *shape[:1])
    return own == shape


def _check_support(name: str, site: Site) -> None:
    fn, value = site["fn"], torch.as_tensor(site["value"])
    if not defer_error(is_outside(site, value)):
        return
    base = _base(fn)
    if isinstance(base, Columns) and (found := base.outside(value)):
        column, fn, value = found
        name = f"column {column!r} of {name}"
    raise ValueError(
        f"{name} must be {_words(fn.support)} for a {_title(fn)} likelihood; got {_range(value)}. "
        "Change the values, or choose another distribution."
    )


def is_outside(site: Site, value: Tensor) -> Tensor:
    """Whether any part of a value that is not masked lies outside of the support of its site."""
    fn = site["fn"]
    try:
        good = fn.support.check(value)
    except (NotImplementedError, AttributeError):
        return torch.zeros((), dtype=torch.bool)
    for mask in (site["mask"], getattr(fn, "_mask", None)):
        if mask is not None:
            good = good | ~torch.as_tensor(mask, device=good.device)
    return torch.as_tensor(~good.all())


def outside_message(name: str, site: Site, value: Tensor) -> str:
    """The message for a value outside of the support of its site."""
    support, title = _words(site["fn"].support), _title(site["fn"])
    return f"{name} must be {support}, as its {title} site draws them; got {_range(value)}. Give another value."


def _range(value: Tensor) -> str:
    low, high = value.min().item(), value.max().item()
    return f"values from {low:g} to {high:g}" if value.numel() > 1 else f"{low:g}"


def _title(fn: Any) -> str:
    return type(_base(fn)).__name__


def _base(fn: Any) -> Any:
    fn = unwrapped(fn)
    return unwrapped(getattr(fn, "first", fn))


def _words(support: Any) -> str:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    low, high = _number(support, "lower_bound"), _number(support, "upper_bound")
    kind = "whole numbers" if support.is_discrete else "numbers"
    if type(support) is type(constraints.real):
        return "real numbers"
    if support is constraints.boolean:
        return "0 or 1"
    if support is constraints.one_hot:
        return "one-hot, one 1 and otherwise 0,"
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
