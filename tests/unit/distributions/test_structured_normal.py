"""Normal distributions with a covariance in blocks, against dense ones."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.distributions.structured_normal import (
    BLOCKS,
    Block,
    Dense,
    Independent,
    Kronecker,
    LowRank,
    StructuredNormal,
)


def _orthogonal(size: int, columns: int | None = None) -> Tensor:
    return torch.linalg.qr(torch.randn(size, columns or size))[0].contiguous()


def _blocks() -> dict[str, tuple[Block, Tensor]]:
    """Blocks over six entries, each with its covariance."""
    torch.manual_seed(0)
    index, sd = torch.arange(6), torch.rand(6) + 0.5
    root = torch.randn(6, 6).tril(-1) + sd.diag()
    outputs, inputs, sds, scale = _orthogonal(2), _orthogonal(3), torch.rand(2, 3) + 0.5, torch.rand(3) + 0.5
    mixed = torch.kron(outputs, scale.diag() @ inputs)
    vectors, values = _orthogonal(6, 2), torch.tensor([3.0, 0.5])
    precision = sd.reciprocal().diag() @ (torch.eye(6) + vectors @ values.diag() @ vectors.T) @ sd.reciprocal().diag()
    return {
        "independent": (Independent(index, sd), sd.square().diag()),
        "dense": (Dense(index, root), root @ root.T),
        "kronecker": (
            Kronecker(index.reshape(2, 3), outputs, inputs, sds, scale),
            mixed @ sds.flatten().square().diag() @ mixed.T,
        ),
        "low_rank": (LowRank(index, sd, vectors, values), precision.inverse()),
    }


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_density_and_variance_are_those_of_the_dense_normal(kind: str) -> None:
    block, covariance = _blocks()[kind]
    loc, value = torch.randn(6), torch.randn(4, 6)
    exact = dist.MultivariateNormal(loc, covariance)
    found = StructuredNormal(loc, [block])
    torch.testing.assert_close(found.log_prob(value), exact.log_prob(value), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.variance, exact.variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_the_root_of_a_block_is_a_root_of_its_covariance(kind: str) -> None:
    block, covariance = _blocks()[kind]
    root = block.deviation(torch.eye(6)).T
    torch.testing.assert_close(root @ root.T, covariance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.noise(block.deviation(torch.eye(6))), torch.eye(6), rtol=1e-4, atol=1e-5)
    assert BLOCKS[kind](**block.tensors).log_det == block.log_det


def test_blocks_share_a_vector_and_other_entries_are_fixed() -> None:
    first = Dense(torch.tensor([4, 0]), torch.tensor([[1.0, 0.0], [0.5, 2.0]]))
    found = StructuredNormal(torch.arange(5.0), [first, Independent(torch.tensor([2]), torch.tensor([3.0]))])
    assert found.variance.tolist() == [4.25, 0.0, 9.0, 0.0, 1.0]
    draws = found.expand([7, 1]).rsample((3,))
    assert draws.shape == (3, 7, 1, 5) and found.expand([7, 1]).log_prob(draws).shape == (3, 7, 1)
    assert (draws[..., [1, 3]] == torch.tensor([1.0, 3.0])).all()
    exact = dist.MultivariateNormal(torch.tensor([4.0, 0.0]), scale_tril=first.root).log_prob(draws[..., [4, 0]])
    exact = exact + dist.Normal(2.0, 3.0).log_prob(draws[..., 2])
    torch.testing.assert_close(found.log_prob(draws), exact)
