"""The observed values of a case: which argument holds them, which are known, and labels beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepprob.data import Split, as_split
from deepprob.diagnostics.check import Array, array
from deepprob.programs.arguments import Arguments
from deepprob.programs.layout import Layout
from deepprob.programs.minibatch import Batch
from deepprob.programs.sites import Site


def places_of(observed: Mapping[str, Site], batch: Batch, optional: Sequence[int], layout: Layout) -> dict[str, int]:
    """The place in a batch of the tensor that every observed site reads; sites without one are left out.

    Args:
        observed: The observed sites.
        batch: The program's arguments.
        optional: The places of arguments that may be left out to predict them.
        layout: The axes of the sites' values.
    """
    order = sorted(range(len(batch)), key=lambda i: (i not in optional, -i))
    found = {}
    for name, site in observed.items():
        same = [i for i in order if reads(site, batch[i], layout)]
        if not same and len(observed) == 1:  # data that the program changes, such as standardized ones
            same = [i for i in order if i in optional and len(batch) > 1]
        if same:
            found[name] = same[0]
    return found


def reads(site: Site, x: Tensor, layout: Layout) -> bool:
    """Whether a site observes the values of a tensor, unchanged where they count."""
    a, b = x.flatten(), site["value"].detach().flatten()
    if a.shape != b.shape:
        return False
    same = array(torch.isclose(a.to(b), b, rtol=0, atol=0, equal_nan=True)) > 0
    known = np.ravel(unmasked(site, layout))
    return bool(same[known].all() and known.any()) if known.size == same.size else bool(same.all())


def only_known(terms: Array, known: NDArray[np.bool_] | None, lead: int = 0) -> Array:
    """Log-densities, 0 in the place of those whose values do not count.

    Args:
        terms: Shape ``(..., rows, *batch)``.
        known: Which values count, shape ``(rows, *batch, *event)``; None for all.
        lead: Number of dimensions before the rows.
    """
    if known is None:
        return terms
    return np.where(known.reshape(*terms.shape[lead:], -1).any(-1), terms, 0.0)


def unmasked(site: Site, layout: Layout) -> NDArray[np.bool_] | bool:
    """Which values of a site count in the likelihood, of the shape of its value."""
    known: NDArray[np.bool_] | bool = True
    for mask, fn in _masks(site):
        whole = torch.as_tensor(mask, device=site["value"].device)
        whole = whole.expand(torch.broadcast_shapes(whole.shape, fn.batch_shape))[(..., *[None] * fn.event_dim)]
        whole = whole.expand(torch.broadcast_shapes(whole.shape, site["fn"].batch_shape + site["fn"].event_shape))
        known = known & (array(layout.draws_first({**site, "value": whole})[0]) > 0)
    return known


def _masks(site: Site) -> Iterator[tuple[Any, Any]]:
    """The masks of a site and of its distribution, each with the distribution that it is a mask of."""
    fn = site["fn"]
    if site["mask"] is not None:
        yield site["mask"], fn
    fn = getattr(fn, "first", fn)
    while fn is not None:
        if (mask := getattr(fn, "_mask", None)) is not None:
            yield mask, fn
        fn = getattr(fn, "base_dist", None)


def labels_of(data: Any, batch: Batch, rows: Tensor | None) -> tuple[str, Tensor] | None:
    """Name and values of a field of one number a row that the program does not take, for some rows."""
    if data is None or (isinstance(batch, Arguments) and not isinstance(data, Split)):
        return None
    split = as_split(data, missing=True)
    for name in split.names[len(batch) :]:
        if split[name].dim() == 1:
            return name, split[name] if rows is None else split[name][rows]
    return None
