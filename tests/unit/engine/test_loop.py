"""Loops over steps, and the operations that replace others before compilation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepprob.engine.decompositions import index_put_as_sum
from deepprob.engine.loop import Loop
from deepprob.engine.loop_inputs import PerStep

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
def test_index_put_as_sum_equals_index_put(index: Tensor, values: Tensor) -> None:
    base = torch.randn(3, 2, generator=G)
    summed = index_put_as_sum(base, [index], values, True)
    assert torch.allclose(summed, base.index_put([index], values, accumulate=True), atol=1e-6)


def test_other_and_large_index_puts_are_left_to_the_compiler() -> None:
    base, index = torch.zeros(3, 2), torch.tensor([0, 1])
    assert index_put_as_sum(base, [index], torch.ones(2, 2), False) is NotImplemented
    assert index_put_as_sum(base, [None, index], torch.ones(3, 2), True) is NotImplemented
    assert index_put_as_sum(base, [index, index], torch.ones(2), True) is NotImplemented
    assert index_put_as_sum(base, [base > 0], torch.ones(0), True) is NotImplemented
    assert index_put_as_sum(torch.zeros(1000, 2), [index.repeat(10)], torch.ones(20, 2), True) is NotImplemented


def test_refuses_a_step_that_changes_the_structure_of_the_carry() -> None:
    per_step = PerStep(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 0))
    with pytest.raises(
        ValueError, match=r"(?s)must return a carry of the structure it was given.*Return the same lists"
    ):
        Loop(lambda carry, data, noise, knobs: ([*carry, *carry], {}), [torch.ones(())], per_step, [])
