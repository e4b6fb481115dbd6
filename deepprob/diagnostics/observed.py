"""The observed values of a case: which argument holds them, which are known, and labels beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepprob.data import Split, as_split
from deepprob.diagnostics.check import array
from deepprob.programs.arguments import Arguments
from deepprob.programs.layout import Layout
from deepprob.programs.minibatch import Batch
from deepprob.programs.sites import Site


def places_of(observed: Mapping[str, Site], batch: Batch, optional: Sequence[int]) -> dict[str, int]:
    """The place in a batch of the tensor that every observed site reads; sites without one are left out.

    Args:
        observed: The observed sites.
        batch: The program's arguments.
        optional: The places of arguments that may be left out to predict them.
    """
    order = sorted(range(len(batch)), key=lambda i: (i not in optional, -i))
    found = {}
    for name, site in observed.items():
        same = [i for i in order if reads(site, batch[i])]
        if not same and len(observed) == 1:  # data that the program changes, such as standardized ones
            same = [i for i in order if i in optional and len(batch) > 1]
        if same:
            found[name] = same[0]
    return found


def reads(site: Site, x: Tensor) -> bool:
    """Whether a site observes the values of a tensor, unchanged."""
    a, b = x.flatten(), site["value"].detach().flatten()
    return a.shape == b.shape and bool(torch.isclose(a.to(b), b, rtol=0, atol=0, equal_nan=True).all())


def rows_in(site: Site, layout: Layout) -> int:
    """How many rows a run has observed at a site: the size of the row plate, or of the first axis without one."""
    shape, plates = layout.draws_first(site).shape[1:], layout.plates_of(site)
    return shape[plates.index(layout.plate) if layout.plate in plates else 0] if shape else 1


def unmasked(site: Site, layout: Layout) -> NDArray[np.bool_] | bool:
    """Which values of a site count in the likelihood, of the shape of its value."""
    known: NDArray[np.bool_] | bool = True
    for mask in (site["mask"], getattr(site["fn"], "_mask", None)):
        if mask is not None:
            fn, whole = site["fn"], torch.as_tensor(mask, device=site["value"].device)
            batch = torch.broadcast_shapes(whole.shape, fn.batch_shape)
            whole = whole.expand(batch)[(..., *[None] * fn.event_dim)].expand(*batch, *fn.event_shape)
            known = known & (array(layout.draws_first({**site, "value": whole})[0]) > 0)
    return known


def labels_of(data: Any, batch: Batch, rows: Tensor | None) -> tuple[str, Tensor] | None:
    """Name and values of a field of one number a row that the program does not take, for some rows."""
    if data is None or (isinstance(batch, Arguments) and not isinstance(data, Split)):
        return None
    split = as_split(data)
    for name in split.names[len(batch) :]:
        if split[name].dim() == 1:
            return name, split[name] if rows is None else split[name][rows]
    return None
