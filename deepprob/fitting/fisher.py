r"""Square roots of the Fisher information of observed distributions.

The Fisher information of an observation's distribution in its parameters :math:`\theta` is
:math:`F = \mathrm E_y[\nabla \log p(y \mid \theta) \nabla \log p(y \mid \theta)^T]`. With :math:`F = R R^T` the
generalised Gauss-Newton matrix of weights :math:`w` is the sum over rows of :math:`J^T R R^T J`, where
:math:`J = \partial \theta / \partial w`: the sum of outer products of the gradients of :math:`\theta` in the directions
of R's columns.

References:
    Martens (2020), New Insights and Perspectives on the Natural Gradient Method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepprob.distributions.per_draw import unwrapped
from deepprob.programs.sites import Site

_MOST_COLUMNS = 128  # of a row; more are summed with random signs
SAMPLES = 32  # of a sum with random signs, and of observations of a family without a closed form


@dataclass(frozen=True, eq=False)
class Fisher:
    """A square root of the Fisher information of one observed site.

    Attributes:
        parameters: The parameters of the distribution, each ``(*batch, *event)``.
        columns: For each parameter the columns of R, ``(K, *parameter)``: column k of every row at once.
        kind: ``"exact"``, ``"signs"`` for exact columns summed with random signs, or ``"sampled"``.
    """

    parameters: list[Tensor]
    columns: list[Tensor]
    kind: str


def parameters_of(fn: Any) -> list[Tensor]:
    """The parameters of an observed distribution that depend on what is differentiated."""
    fn = unwrapped(fn)
    family = type(fn).__name__
    if family in _CLASSES:
        found = [fn.logits]
    elif family in _ELEMENTWISE:
        found = [getattr(fn, name) for name in _ELEMENTWISE[family](fn)]
    else:
        found = [x for name in fn.arg_constraints if torch.is_tensor(x := fn.__dict__.get(name))]
    return [x for x in found if x.requires_grad]


def fisher_of(site: Site, weight: Tensor | float) -> Fisher | None:
    """The square root for an observed site; None if its distribution does not depend on what is differentiated.

    Args:
        site: The site, of a run on rows, which are along the first axis of every parameter.
        weight: Its weight in the log-likelihood, a number or a tensor of its batch shape, masks included.
    """
    fn = unwrapped(site["fn"])
    family = type(fn).__name__
    weight = _unmasked(site["fn"], weight)
    if not (params := parameters_of(fn)):
        return None
    if family in _CLASSES:
        probs = params[0].detach().softmax(-1)
        root = probs.sqrt()
        # R = diag(sqrt p) - p sqrt(p)^T, one column for every class
        matrix = torch.diag_embed(root) - probs.unsqueeze(-1) * root.unsqueeze(-2)  # (*batch, C, C)
        return _exact(params, [_one_by_one(matrix * _root(weight, matrix), params[0])])
    if family in _ELEMENTWISE:
        found = _ELEMENTWISE[family](fn)
        whole = [x.detach().expand(getattr(fn, name).shape) for name, x in found.items()]
        whole = [x for x, name in zip(whole, found, strict=True) if getattr(fn, name).requires_grad]
        return _exact(params, [_diagonal(x.sqrt() * _root(weight, x)) for x in whole])
    return _sampled(site, params, weight)


def information(site: Site) -> list[tuple[Tensor, Tensor]]:
    """The parameters of an observed site whose information is elementwise in a closed form, each with it.

    Args:
        site: The site.
    """
    fn = unwrapped(site["fn"])
    found = _ELEMENTWISE[type(fn).__name__](fn) if type(fn).__name__ in _ELEMENTWISE else {}
    return [(getattr(fn, name), x.expand(getattr(fn, name).shape)) for name, x in found.items()]


_CLASSES = ("Categorical", "OneHotCategorical", "OneHotCategoricalStraightThrough")

_ELEMENTWISE: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "Normal": lambda fn: {"loc": fn.scale**-2, "scale": 2.0 * fn.scale**-2},
    "LogNormal": lambda fn: {"loc": fn.scale**-2, "scale": 2.0 * fn.scale**-2},
    "Laplace": lambda fn: {"loc": fn.scale**-2, "scale": fn.scale**-2},
    "StudentT": lambda fn: {
        "loc": (fn.df + 1.0) / (fn.df + 3.0) / fn.scale**2,
        "scale": 2.0 * fn.df / (fn.df + 3.0) / fn.scale**2,
    },
    "Bernoulli": lambda fn: {"logits": fn.probs * (1.0 - fn.probs)},
    "Binomial": lambda fn: {"logits": fn.total_count * fn.probs * (1.0 - fn.probs)},
    "Poisson": lambda fn: {"rate": fn.rate.reciprocal()},
    "Exponential": lambda fn: {"rate": fn.rate**-2},
    "NegativeBinomial": lambda fn: {"logits": fn.total_count * fn.probs},
}


def _unmasked(fn: Any, weight: Tensor | float) -> Tensor | float:
    """A weight of a site's batch shape, times the masks of its distribution."""
    while type(fn).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        if isinstance(mask := getattr(fn, "_mask", None), Tensor):
            weight = torch.as_tensor(weight).reshape(*torch.as_tensor(weight).shape, *_ones(mask, weight)) * mask
        fn = fn.base_dist
    return weight


def _ones(mask: Tensor, weight: Tensor | float) -> tuple[int, ...]:
    rank = torch.as_tensor(weight).dim()
    return (1,) * (mask.dim() - rank) if rank else ()


def _root(weight: Tensor | float, like: Tensor) -> Tensor:
    """The root of a weight, with axes to the right for those that a tensor has beyond it."""
    root = torch.as_tensor(weight, dtype=like.dtype, device=like.device).sqrt()
    return root.reshape(*root.shape, *(1,) * (like.dim() - root.dim())) if root.dim() else root


def _exact(parameters: list[Tensor], columns: list[Tensor]) -> Fisher:
    """Exact columns, those of several parameters one after the other."""
    counts = [len(x) for x in columns]
    whole = []
    for number, (p, own) in enumerate(zip(parameters, columns, strict=True)):
        before, after = sum(counts[:number]), sum(counts[number + 1 :])
        whole.append(torch.cat([p.new_zeros(before, *p.shape), own, p.new_zeros(after, *p.shape)]))
    if sum(counts) <= _MOST_COLUMNS:
        return Fisher(parameters, whole, "exact")
    signs = torch.randint(0, 2, (SAMPLES, sum(counts)), device=whole[0].device).to(whole[0]) * 2.0 - 1.0
    mixed = [(signs @ x.flatten(1)).reshape(SAMPLES, *x.shape[1:]) / SAMPLES**0.5 for x in whole]
    return Fisher(parameters, mixed, "signs")


def _diagonal(root: Tensor) -> Tensor:
    """Columns of a diagonal root, ``(*row shape, ...)``: one for every entry of a row."""
    flat = root.reshape(_rows(root), -1)  # (B, E)
    return torch.diag_embed(flat).movedim(-1, 0).reshape(-1, *root.shape)  # (E, B, E)


def _one_by_one(matrix: Tensor, like: Tensor) -> Tensor:
    """Columns of a root that is one matrix for every categorical value of a row."""
    size = like.shape[-1]
    flat = matrix.reshape(_rows(matrix) if like.dim() > 1 else 1, -1, size, size)  # (B, E, C, C): columns last
    values = flat.shape[1]
    placed = torch.einsum("beck,ef->fkbec", flat, torch.eye(values).to(flat))  # (E, C, B, E, C)
    return placed.reshape(values * size, *like.shape)


def _rows(x: Tensor) -> int:
    return len(x) if x.dim() else 1


def _sampled(site: Site, params: list[Tensor], weight: Tensor | float) -> Fisher:
    """Scores of drawn observations, of a family without a closed form."""
    scores: list[list[Tensor]] = []
    for _ in range(SAMPLES):
        density = (site["fn"].log_prob(site["fn"].sample()) * torch.as_tensor(weight).sqrt()).sum()
        found = torch.autograd.grad(density, params, retain_graph=True, allow_unused=True)
        scores.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)])
    return Fisher(params, [torch.stack(x) / SAMPLES**0.5 for x in zip(*scores, strict=True)], "sampled")
