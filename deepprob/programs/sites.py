"""Properties of a trace's sites: data, factor, local, auxiliary; and their log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from deepprob.distributions.per_draw import is_delta

Site = Any


def sample_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """The sample sites of a trace, without those that hold the indices of plates."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample":
            yield name, site


def observed_sites(model_trace: Trace) -> dict[str, Site]:
    """The sites that were given data."""
    return {n: s for n, s in sample_sites(model_trace) if is_data(s)}


def drawn_sites(guide_trace: Trace) -> dict[str, Site]:
    """The sites that the guide drew, auxiliary ones included."""
    return {n: s for n, s in sample_sites(guide_trace) if not is_deterministic(s)}


def is_deterministic(site: Site) -> bool:
    """Whether a site is ``pyro.deterministic`` (an observed Delta) or an empty factor."""
    return bool(site["infer"].get("_deterministic"))


def is_factor(site: Site) -> bool:
    """Whether a site is ``pyro.factor``: it has a log-probability but no value."""
    return type(getattr(site["fn"], "first", site["fn"])).__name__ == "Unit"


def is_auxiliary(site: Site) -> bool:
    """Whether a guide's site is a helper for other sites, without a counterpart in the model."""
    return bool(site["infer"].get("is_auxiliary"))


def _is_computed(site: Site) -> bool:
    """Whether the model computes a site from others: ``pyro.deterministic``, and sites that were reparameterised."""
    return bool(site["is_observed"]) and is_delta(site["fn"])


def is_data(site: Site) -> bool:
    """Whether a site is observed data: neither a factor nor a computed value."""
    return bool(site["is_observed"]) and not (is_deterministic(site) or is_factor(site) or _is_computed(site))


def is_local(site: Site, plate: str) -> bool:
    """Whether a site lies inside a vectorized plate of this name."""
    return any(frame.name == plate and frame.vectorized for frame in site["cond_indep_stack"])


def log_prob(site: Site) -> Tensor:
    """A site's log-probability, scaled and masked, of its batch shape."""
    value: Tensor = scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])
    return value
