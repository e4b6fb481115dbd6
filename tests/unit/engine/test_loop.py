"""What is done to a graph before it is compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepprob.engine.loop import added_at

G = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("index", "values"),
    [
        (torch.tensor([0, 2, 2, -1]), torch.randn(4, 2, generator=G)),
        (torch.tensor([[0, 1], [1, 1]]), torch.randn(2, 2, 2, generator=G)),
        (torch.tensor([1, 1, 0]), torch.randn(2, generator=G)),
        (torch.tensor([1]), torch.tensor(3.0)),
        (torch.zeros(0, dtype=torch.long), torch.zeros(0, 2)),
    ],
)
def test_a_sum_over_all_numbers_is_what_index_put_adds(index: Tensor, values: Tensor) -> None:
    base = torch.randn(3, 2, generator=G)
    summed = added_at(base, [index], values, True)
    assert torch.allclose(summed, base.index_put([index], values, accumulate=True), atol=1e-6)


def test_what_is_no_sum_or_large_is_left_to_the_compiler() -> None:
    base, index = torch.zeros(3, 2), torch.tensor([0, 1])
    assert added_at(base, [index], torch.ones(2, 2), False) is NotImplemented
    assert added_at(base, [None, index], torch.ones(3, 2), True) is NotImplemented
    assert added_at(base, [index, index], torch.ones(2), True) is NotImplemented
    assert added_at(base, [base > 0], torch.ones(0), True) is NotImplemented
    assert added_at(torch.zeros(1000, 2), [index.repeat(10)], torch.ones(20, 2), True) is NotImplemented
