"""Mean images of codes along lines and in planes: traversals of a dimension, interpolations, and the plane of codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from deepprob.diagnostics.check import Array, array
from deepprob.diagnostics.checks.collapse import kl_from_prior
from deepprob.diagnostics.image_grid import image_rows
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
    loc, scale = _prior_moments(posterior)
    nats = _kl_by_dimension(posterior, rows)
    if len(nats) != len(mean):  # no closed form by dimension: that of normals with the same moments
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


def plane(posterior: Posterior, columns: int) -> Array:
    """The mean images of a grid of codes of two numbers, side by side as one image; the largest second number first."""
    loc, scale = _prior_moments(posterior)
    if len(loc) != 2:
        raise ValueError(f"a plane needs codes of two numbers; got {len(loc)}. Use dp.plots.traversal.")
    shares = (torch.arange(columns, device=loc.device) + 0.5) / columns
    first, second = (loc + scale * torch.special.ndtri(shares).unsqueeze(-1)).T
    grid = torch.stack([first.expand(columns, -1), second.flip(0).unsqueeze(-1).expand(-1, columns)], -1)
    images = decoded_means(posterior, grid)
    height = 1 if images.ndim == 5 and images.shape[2] in (1, 3) else 0  # axis of the height in an image
    gaps = [(0, int(axis in (height + 2, height + 3))) for axis in range(images.ndim)]  # of a pixel between neighbours
    images = np.pad(images, gaps, constant_values=images.min())
    return np.concatenate([np.concatenate([*line], height + 1) for line in images], height)


def traversal(
    posterior: Posterior, *rows: Any, dims: Sequence[int] | None = None, most: int = 6, columns: int = 9
) -> Figure:
    """Images as each latent dimension moves from -2 to 2 sds of its prior, and the others stay at a row's.

    Args:
        posterior: A posterior of images with one latent vector a row.
        rows: The program's arguments; the code of the first row moves.
        dims: The dimensions; None for those with the largest KL from the prior, a mean over all rows.
        most: Most dimensions of these.
        columns: Number of values of a dimension.

    Raises:
        ValueError: If the rows are no images, or a dimension does not exist.
    """
    return image_rows(traversed(posterior, rows, dims, most, columns), columns=columns)


def interpolation(posterior: Posterior, a: Any, b: Any, *, columns: int = 9) -> Figure:
    """Images on the lines between the codes of pairs of rows.

    Args:
        posterior: A posterior of images with one latent vector a row.
        a: The rows at the left end, ``(pairs, ...)``.
        b: The rows at the right end.
        columns: Number of images in a row, those of the ends included.

    Raises:
        ValueError: If the rows are no images.
    """
    rows = interpolated(posterior, a, b, columns)
    return image_rows({" " * (i + 1): images for i, images in enumerate(rows)}, columns=columns)


def manifold(posterior: Posterior, *, columns: int = 15) -> Figure:
    """Images of a plane of codes: from left to right the first dimension grows, from bottom to top the second.

    The codes of neighbours are quantiles of equal distance of a normal with the prior's mean and sd.

    Args:
        posterior: A posterior of images with one latent vector of two numbers a row.
        columns: Number of images on either side.

    Raises:
        ValueError: If the rows are no images, or a code has not two numbers.
    """
    return image_rows({"": plane(posterior, columns)[None]}, columns=1)


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


def _kl_by_dimension(posterior: Posterior, rows: Sequence[Any]) -> Tensor:
    """KL of each latent dimension from the prior in nats, a mean over rows; one number if it has no closed form."""
    (site,) = posterior.structure.local
    return torch.from_numpy(kl_from_prior(*posterior.trace(*rows, draws=_DRAWS))[site])


def _prior_moments(posterior: Posterior) -> tuple[Tensor, Tensor]:
    """Mean and sd of each dimension of the prior, estimated from draws: ``(Z,)``."""
    sites = posterior.structure.local
    prior = posterior.sample_prior(_PRIOR_ROWS)
    codes = _vector(prior[sites[0]][0] if len(sites) == 1 else {name: prior[name] for name in sites})
    return codes.mean(0), codes.std(0)
