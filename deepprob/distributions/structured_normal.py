r"""A normal distribution over many numbers whose covariance consists of structured blocks.

Each block covers some entries of the vector, and no two blocks share an entry. The deviation from the mean is
:math:`R \epsilon` with standard normal :math:`\epsilon` and a root :math:`R` of the block's covariance. No block but a
dense one makes a matrix over all of its entries. Entries without a block are fixed at their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """Entries of a vector, and a root of their covariance.

    Attributes:
        index: The positions of the entries in the vector, of any shape, ``n`` in number.
    """

    kind: ClassVar[str]
    index: Tensor

    def deviation(self, noise: Tensor) -> Tensor:
        """The root times standard normal noise, ``(*, n) -> (*, n)``."""
        raise NotImplementedError

    def noise(self, deviation: Tensor) -> Tensor:
        """The inverse of `deviation`."""
        raise NotImplementedError

    @property
    def log_det(self) -> Tensor:
        """The logarithm of the root's absolute determinant."""
        raise NotImplementedError

    @property
    def variance(self) -> Tensor:
        """The variance of every entry, ``(n,)``."""
        raise NotImplementedError

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, to save; ``BLOCKS[kind](**tensors)`` is the block."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, eq=False)
class Independent(Block):
    """Independent entries, with their standard deviations ``sd``, ``(n,)``."""

    kind: ClassVar[str] = "independent"
    sd: Tensor

    def deviation(self, noise: Tensor) -> Tensor:
        return noise * self.sd

    def noise(self, deviation: Tensor) -> Tensor:
        return deviation / self.sd

    @property
    def log_det(self) -> Tensor:
        return self.sd.log().sum()

    @property
    def variance(self) -> Tensor:
        return self.sd.square()


@dataclass(frozen=True, eq=False)
class Dense(Block):
    """Entries with any covariance, whose lower Cholesky factor is ``root``, ``(n, n)``."""

    kind: ClassVar[str] = "dense"
    root: Tensor

    def deviation(self, noise: Tensor) -> Tensor:
        return noise @ self.root.mT

    def noise(self, deviation: Tensor) -> Tensor:
        found: Tensor = torch.linalg.solve_triangular(self.root, deviation.unsqueeze(-1), upper=False)
        return found.squeeze(-1)

    @property
    def log_det(self) -> Tensor:
        return self.root.diagonal().log().sum()

    @property
    def variance(self) -> Tensor:
        return self.root.square().sum(-1)


@dataclass(frozen=True, eq=False)
class Kronecker(Block):
    r"""The weights of a layer, an ``(O, I)`` matrix :math:`W = U (S \circ E) V^T D` with standard normal entries of E.

    ``outputs`` is the orthogonal matrix U, ``inputs`` the orthogonal V, ``sd`` the positive ``(O, I)`` matrix S, and
    ``scale`` the positive diagonal of D. The index has the shape ``(O, I)``.
    """

    kind: ClassVar[str] = "kronecker"
    outputs: Tensor
    inputs: Tensor
    sd: Tensor
    scale: Tensor

    def deviation(self, noise: Tensor) -> Tensor:
        matrix: Tensor = self.outputs @ (self.sd * noise.unflatten(-1, self.sd.shape)) @ self.inputs.mT
        return (matrix * self.scale).flatten(-2)

    def noise(self, deviation: Tensor) -> Tensor:
        matrix: Tensor = self.outputs.mT @ (deviation.unflatten(-1, self.sd.shape) / self.scale) @ self.inputs
        return (matrix / self.sd).flatten(-2)

    @property
    def log_det(self) -> Tensor:
        return self.sd.log().sum() + len(self.outputs) * self.scale.log().sum()

    @property
    def variance(self) -> Tensor:
        squares = self.outputs.square() @ self.sd.square() @ self.inputs.square().mT
        return (squares * self.scale.square()).flatten()


@dataclass(frozen=True, eq=False)
class LowRank(Block):
    r"""Entries with the precision :math:`D^{-1} (1 + V \Lambda V^T) D^{-1}`.

    ``scale`` is the positive diagonal of D, ``vectors`` the orthonormal columns of V, ``(n, k)``, and ``values`` the
    diagonal of Lambda, at least 0.
    """

    kind: ClassVar[str] = "low_rank"
    scale: Tensor
    vectors: Tensor
    values: Tensor

    def deviation(self, noise: Tensor) -> Tensor:
        change = torch.rsqrt(1.0 + self.values) - 1.0
        return (noise + ((noise @ self.vectors) * change) @ self.vectors.mT) * self.scale

    def noise(self, deviation: Tensor) -> Tensor:
        plain, change = deviation / self.scale, torch.sqrt(1.0 + self.values) - 1.0
        return plain + ((plain @ self.vectors) * change) @ self.vectors.mT

    @property
    def log_det(self) -> Tensor:
        return self.scale.log().sum() - 0.5 * self.values.log1p().sum()

    @property
    def variance(self) -> Tensor:
        change = (1.0 + self.values).reciprocal() - 1.0
        return self.scale.square() * (1.0 + (self.vectors.square() * change).sum(-1))


BLOCKS: dict[str, type[Block]] = {kind.kind: kind for kind in (Independent, Dense, Kronecker, LowRank)}


class StructuredNormal(TorchDistribution):
    r"""A normal distribution over a vector, with a covariance in blocks.

    .. math:: z_b = m_b + R_b \epsilon_b, \qquad \epsilon_b \sim N(0, I)

    for the entries :math:`z_b` of every block. An entry without a block equals its mean and has no part in the density.

    Args:
        loc: The mean m, shape ``(D,)``.
        blocks: The blocks.

    Examples:
        Of two entries in one block, the second is twice the first; the third entry is fixed:

        >>> block = Dense(torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [2.0, 1e-3]]))
        >>> draws = StructuredNormal(torch.tensor([0.0, 0.0, 5.0]), [block]).sample((1000,))
        >>> bool((draws[:, 1] - 2 * draws[:, 0]).abs().max() < 0.01), draws[:, 2].unique()
        (True, tensor([5.]))
    """

    arg_constraints = {"loc": constraints.real_vector}  # noqa: RUF012  as in torch
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, blocks: Sequence[Block]) -> None:
        self.loc, self.blocks = loc, list(blocks)
        super().__init__(torch.Size(), loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> StructuredNormal:
        """Independent copies."""
        new: StructuredNormal = self._get_checked_instance(StructuredNormal, _instance)  # type: ignore[no-untyped-call]
        new.loc, new.blocks = self.loc, self.blocks
        TorchDistribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, ``(*sample_shape, *batch_shape, D)``."""
        batch = torch.Size(sample_shape) + self.batch_shape
        sizes = [block.index.numel() for block in self.blocks]
        noise = torch.randn(*batch, sum(sizes), dtype=self.loc.dtype, device=self.loc.device)
        found = self.loc.expand(*batch, *self.event_shape)
        for block, part in zip(self.blocks, noise.split(sizes, -1), strict=True):
            found = found.index_add(-1, block.index.flatten(), block.deviation(part))
        return found

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density of the entries in blocks, ``(*batch,)``."""
        deviation = value - self.loc
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        total = torch.zeros(shape, dtype=self.loc.dtype, device=self.loc.device)
        for block in self.blocks:
            noise = block.noise(deviation.index_select(-1, block.index.flatten()))
            constant = block.log_det + 0.5 * block.index.numel() * _LOG_TWO_PI
            total = total - 0.5 * noise.square().sum(-1) - constant
        return total

    @property
    def mean(self) -> Tensor:
        return self.loc.expand(*self.batch_shape, *self.event_shape)

    @property
    def variance(self) -> Tensor:
        found = torch.zeros_like(self.loc)
        for block in self.blocks:
            found = found.index_copy(-1, block.index.flatten(), block.variance)
        return found.expand(*self.batch_shape, *self.event_shape)


_LOG_TWO_PI = 1.8378770664093453
