"""Missing values (NaN) in the data of sites that mask them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from deepprob.distributions.columns import Columns
from deepprob.distributions.per_draw import unwrapped
from deepprob.engine.deferred_errors import defer_error
from deepprob.errors import MissingValueError, counted, unknown
from deepprob.programs.sites import is_data

MISSING = ("refuse", "allow")  # what a program does with missing values (NaN) in its data


class MissingValues(Messenger):
    """A handler that replaces missing values of observed sites, where the site masks them.

    `Columns` leave missing values out themselves.

    A masked entry does not count, whatever its value is, but the gradient of its log-probability at NaN is NaN. The
    site therefore observes another value there, of another row or another coordinate.

    Examples:
        >>> import pyro, pyro.distributions as dist
        >>> y = torch.tensor([1.0, torch.nan])
        >>> with MissingValues(), pyro.poutine.mask(mask=~y.isnan()):
        ...     pyro.sample("y", dist.Normal(torch.zeros(2), 1.0), obs=y)
        tensor([1., 1.])
    """

    def _pyro_sample(self, msg: Any) -> None:
        fn, value = msg["fn"], msg["value"]
        if not (isinstance(value, Tensor) and value.is_floating_point() and is_data(msg)):
            return
        if isinstance(unwrapped(fn), Columns):
            return
        unmasked = absent = value.isnan()
        for mask, events in _masks(msg):  # of independent values inside of an event, each may have its own mask
            unmasked = unmasked & torch.as_tensor(mask, device=value.device)[(..., *[None] * events)]
        if defer_error(unmasked.any()):
            came = counted(int(unmasked.sum()), "missing value")
            raise ValueError(
                f"site {msg['name']!r} observes {came} (NaN) that it does not mask. "
                "Sample it in pyro.poutine.mask(mask=...), with False where a value is missing."
            )
        event = tuple(value.shape[value.dim() - unwrapped(fn).event_dim :])
        values = value.reshape(-1, *event)  # a number outside of the support has no finite gradient: take another value
        complete = (~values.isnan().reshape(len(values), -1).any(1)).int().argmax()
        other = values.index_select(0, complete.reshape(1)).nan_to_num()[0]
        msg["value"] = torch.where(absent, other, value)


def _masks(msg: Any) -> Iterator[tuple[Any, int]]:
    """The masks of a site, each with the number of event dimensions of what it masks."""
    fn = msg["fn"]
    if msg["mask"] is not None:
        yield msg["mask"], fn.event_dim
    while fn is not None:
        if getattr(fn, "_mask", None) is not None:
            yield fn._mask, fn.event_dim
        fn = getattr(fn, "base_dist", None)


def checked_missing(missing: str) -> str:
    """What a program does with missing values, if it is one of the known ways.

    Raises:
        ValueError: If it is not.
    """
    if missing not in MISSING:
        raise unknown("missing", missing, MISSING)
    return missing


@contextmanager
def explaining_masks(
    remedy: str = "A model that masks them takes them: Program.of(..., missing='allow').",
) -> Iterator[None]:
    """Add to an error about missing values (NaN) how a model takes them.

    Args:
        remedy: The sentence that says it.
    """
    try:
        yield
    except MissingValueError as error:
        raise MissingValueError(f"{error} {remedy}") from None
