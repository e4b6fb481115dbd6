"""Baselines of score-function sites, which reduce the variance of their gradient."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pyro.distributions.util import detach
from pyro.infer.tracegraph_elbo import TrackNonReparam
from pyro.ops.provenance import detach_provenance
from torch import Tensor

from deepprob.errors import unknown
from deepprob.programs.program import Program
from deepprob.programs.sites import Site

_AVERAGE, _BETA, _NETWORK, _INPUT, _VALUE = _OPTIONS = (
    "use_decaying_avg_baseline",
    "baseline_beta",
    "nn_baseline",
    "nn_baseline_input",
    "baseline_value",
)


def tracking(program: Program) -> AbstractContextManager[Any]:
    """A context that finds which terms depend on a score-function site, if the program has baselines.

    As in Pyro's ``TraceGraph_ELBO``, the cost of a site is then the sum of these terms alone.
    """
    tracked = program.has_baselines and not program.enumerates
    return TrackNonReparam() if tracked else nullcontext()


def baseline_of(
    averages: MutableMapping[str, Tensor], name: str, site: Site, cost: Tensor
) -> tuple[Tensor, Tensor] | None:
    r"""The baseline of a site, and the squared error that trains its network or value.

    With :math:`c` the cost of the site, the decaying average is :math:`a_k = \beta a_{k-1} + (1 - \beta) c_k`, and step
    :math:`k` subtracts :math:`a_{k-1}`, which starts at zero.

    Args:
        averages: The decaying averages by site, which are updated in place.
        name: The site's name.
        site: The site of the guide, with Pyro's options in ``infer={"baseline": ...}``.
        cost: The terms that depend on the site, detached, by its own plates.

    Returns:
        The baseline, of the cost's shape, and the error; None if the site has no baseline.

    Raises:
        ValueError: If an option is unknown, two options exclude each other, or the baseline has another shape than the
            cost.
    """
    options: dict[str, Any] = site["infer"].get("baseline", {})
    for option in options:
        if option not in _OPTIONS:
            raise unknown(f"baseline option of site {name!r}", option, _OPTIONS)
    network, value = options.get(_NETWORK), options.get(_VALUE)
    parts = []
    if network is not None and value is not None:
        raise ValueError(f"site {name!r} has both {_NETWORK} and {_VALUE}. Leave one of them out.")
    if options.get(_AVERAGE):
        average = averages.setdefault(name, torch.zeros_like(cost))
        _check_shape(name, cost, average, "its decaying average, of an earlier step,")
        parts.append(average.clone())
        if torch.is_grad_enabled():  # a score without a gradient is no step
            beta = options.get(_BETA, 0.9)
            average.copy_((1 - beta) * cost + beta * average)
    if network is not None:
        parts.append(network(detach(options.get(_INPUT))))
    elif value is not None:
        parts.append(value)
    if not parts:
        return None
    baseline: Tensor = detach_provenance(sum(parts[1:], parts[0]))
    _check_shape(name, cost, baseline, "its baseline")
    return baseline, (cost - baseline).square().sum() if baseline.requires_grad else torch.zeros_like(cost.sum())


def _check_shape(name: str, cost: Tensor, baseline: Tensor, what: str) -> None:
    if baseline.shape != cost.shape:
        raise ValueError(
            f"the cost of site {name!r} has shape {tuple(cost.shape)}, but {what} has {tuple(baseline.shape)}. "
            "Give one number for every draw of the site."
        )
