"""Mean rows along lines through the latent space: traversals of a dimension, and interpolations between rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepprob.diagnostics.check import Array, array
from deepprob.posteriors.posterior import Posterior

_DRAWS = 20  # of decoder weights
_PRIOR_ROWS = 500
_REACH = 2.0  # prior sds


def traversed(
    posterior: Posterior, rows: Sequence[Any], dims: Sequence[int] | None, most: int, columns: int
) -> dict[str, Array]:
    r"""Mean rows as each latent dimension moves from -2 to 2 prior sds, and the others stay at the first row's.

    Args:
        posterior: The posterior.
        rows: The program's arguments.
        dims: The dimensions; None for those with the largest KL from the prior, a mean over the rows.
        most: Most dimensions of these.
        columns: Number of values.

    Returns:
        Rows by label, ``(columns, *row)`` each.
    """
    codes = posterior.encode(*rows)
    means, sds = _vector(codes.mean), _vector(codes.sd)  # (rows, Z)
    mean = means[0]
    (site,) = posterior.structure.local
    prior = posterior.sample_prior(_PRIOR_ROWS)[site][0]  # (rows, Z)
    loc, scale = prior.mean(0), prior.std(0)
    nats = ((scale / sds).log() + (sds.square() + (means - loc).square()) / (2 * scale.square()) - 0.5).mean(0)
    if dims is None:
        dims = nats.argsort(descending=True)[:most].tolist()
    if wrong := [d for d in dims if not 0 <= d < len(mean)]:
        raise ValueError(f"the code has {len(mean)} latent dimensions, from 0; got {wrong[0]}. Choose others.")
    steps = torch.linspace(-_REACH, _REACH, columns, device=mean.device)
    z = mean.repeat(len(dims), columns, 1)  # (dims, columns, Z)
    for place, d in enumerate(dims):
        z[place, :, d] = loc[d] + steps * scale[d]
    found = decoded_means(posterior, z)
    return {f"dimension {d}, {float(nats[d]):.2g} nats": images for d, images in zip(dims, found, strict=True)}


def interpolated(posterior: Posterior, a: Any, b: Any, columns: int) -> Array:
    """Mean rows on the lines between the codes of pairs of rows, ``(pairs, columns, *row)``.

    Args:
        posterior: The posterior.
        a: The rows at the left end, ``(pairs, *row)``.
        b: The rows at the right end.
        columns: Number of steps, both ends included.
    """
    left, right = (_vector(posterior.encode(x).mean).unsqueeze(1) for x in (a, b))  # (pairs, 1, Z)
    share = torch.linspace(0.0, 1.0, columns, device=left.device).unsqueeze(-1)
    return decoded_means(posterior, left + share * (right - left))


def decoded_means(posterior: Posterior, z: Tensor) -> Array:
    """Mean rows of codes ``(*leading, Z)``, or their most likely classes.

    Raises:
        ValueError: If the rows are not images.
    """
    found = posterior.decode(z.reshape(-1, z.shape[-1]), draws=_DRAWS)
    values = array(found.probs.argmax(-1) if found.kind == "classes" else found.mean)
    if values.ndim not in (3, 4):
        raise ValueError(f"the rows must be images, of two or three axes; got {values.ndim - 1}. Use posterior.decode.")
    return values.reshape(*z.shape[:-1], *values.shape[1:]).astype(np.float64)


def _vector(codes: Tensor | dict[str, Tensor]) -> Tensor:
    if not isinstance(codes, Tensor) or codes.dim() != 2:
        raise ValueError(
            "the picture needs one latent vector a row; this program has several latent sites, or one of another "
            "shape. Use posterior.decode with the values of all sites."
        )
    return codes
