r"""Precisions of groups of weights: the curvature of the likelihood, plus the precision of the prior.

A part covers some entries of a vector of weights. Its precision is :math:`P = \rho H + \mathrm{diag}(\delta)`, with the
curvature H of the likelihood, a factor :math:`\rho` for another noise, and the prior's precision :math:`\delta`. Its
determinant is differentiable in both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepprob.distributions.structured_normal import Block, Dense, Independent, Kronecker, LowRank
from deepprob.programs.laplace import NO_MODE, root_of_inverse

_LEAST = 1e-8  # of a prior's precision: a flat prior has 0


@dataclass(frozen=True, eq=False)
class Part:
    """Entries of a vector, and the curvature of the likelihood in them.

    Attributes:
        index: The positions of the entries in the vector, of any shape, ``n`` in number.
    """

    index: Tensor

    def log_det(self, prior: Tensor, ratio: Tensor) -> Tensor:
        """The logarithm of the precision's determinant.

        Args:
            prior: The prior's precision, ``(n,)``.
            ratio: What the curvature is multiplied with.
        """
        raise NotImplementedError

    def block(self, prior: Tensor) -> Block:
        """The normal distribution of this precision.

        Raises:
            ValueError: If the precision is not positive.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class IndependentPart(Part):
    """The diagonal of the curvature, ``(n,)``; its block has the variances of every entry given the others."""

    diagonal: Tensor

    def log_det(self, prior: Tensor, ratio: Tensor) -> Tensor:
        return (ratio * self.diagonal + prior).clamp_min(_LEAST).log().sum()

    def block(self, prior: Tensor) -> Block:
        precision = self.diagonal + prior
        if not bool((precision > 0).all()):
            raise ValueError(NO_MODE)
        return Independent(self.index.flatten(), precision.rsqrt())


@dataclass(frozen=True, eq=False)
class DensePart(Part):
    """The whole curvature, ``(n, n)``."""

    matrix: Tensor

    def log_det(self, prior: Tensor, ratio: Tensor) -> Tensor:
        root: Tensor = torch.linalg.cholesky(ratio * self.matrix + prior.diag())
        return 2.0 * root.diagonal().log().sum()

    def block(self, prior: Tensor) -> Block:
        return Dense(self.index.flatten(), root_of_inverse(self.matrix + prior.diag()))


@dataclass(frozen=True, eq=False)
class KroneckerPart(Part):
    r"""A layer whose curvature is the Kronecker product of a matrix of outputs and a matrix of inputs.

    .. math:: P = B \otimes A + I \otimes \Delta

    The prior's precision Delta is the mean over outputs of that of every input: exact where the prior has one scale for
    all weights of an input. The index has the shape ``(O, I)``.
    """

    outputs: Tensor
    inputs: Tensor

    def _scaled(self, prior: Tensor) -> tuple[Tensor, Tensor]:
        """The prior's sd of every input, and the inputs' matrix in these units."""
        scale = prior.reshape(self.index.shape).mean(0).clamp_min(_LEAST).rsqrt()
        return scale, scale.unsqueeze(-1) * self.inputs * scale

    def log_det(self, prior: Tensor, ratio: Tensor) -> Tensor:
        scale, inputs = self._scaled(prior)
        columns = torch.linalg.eigvalsh(inputs).clamp_min(0.0)
        rows = torch.linalg.eigvalsh(self.outputs).clamp_min(0.0)
        return (ratio * torch.outer(rows, columns)).log1p().sum() - 2.0 * len(rows) * scale.log().sum()

    def block(self, prior: Tensor) -> Block:
        scale, inputs = self._scaled(prior)
        columns, right = torch.linalg.eigh(inputs)
        rows, left = torch.linalg.eigh(self.outputs)
        sd = (1.0 + torch.outer(rows.clamp_min(0.0), columns.clamp_min(0.0))).rsqrt()
        return Kronecker(self.index, left, right, sd, scale)


@dataclass(frozen=True, eq=False)
class LowRankPart(Part):
    """The largest eigenvalues of the curvature, ``(k,)``, their eigenvectors ``(n, k)``, and the rest's diagonal."""

    vectors: Tensor
    values: Tensor
    rest: Tensor

    def _scaled(self, prior: Tensor, ratio: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        scale = (ratio * self.rest + prior).clamp_min(_LEAST).rsqrt()
        return scale, scale.unsqueeze(-1) * self.vectors * self.values.sqrt()

    def log_det(self, prior: Tensor, ratio: Tensor) -> Tensor:
        scale, factor = self._scaled(prior, ratio)
        small = torch.eye(len(self.values)).to(factor) + ratio * factor.mT @ factor
        found: Tensor = torch.linalg.slogdet(small).logabsdet
        return found - 2.0 * scale.log().sum()

    def block(self, prior: Tensor) -> Block:
        scale, factor = self._scaled(prior)
        left, roots, _ = torch.linalg.svd(factor, full_matrices=False)
        return LowRank(self.index.flatten(), scale, left, roots.square())
