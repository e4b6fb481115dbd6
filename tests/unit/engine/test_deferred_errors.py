"""What would be an error, noted while a run is traced."""

from __future__ import annotations

import pytest
import torch

from deepprob.engine.deferred_errors import Failures, failed


def test_outside_of_a_trace_a_condition_is_its_value() -> None:
    assert failed(torch.tensor(True))
    assert not failed(torch.tensor(False))


@pytest.mark.parametrize("value", [True, False])
def test_inside_it_is_noted_and_spoils_the_answer(value: bool) -> None:
    with Failures() as outer:
        with Failures() as inner:
            assert not failed(torch.tensor(value))
        assert not failed(torch.tensor(False))
    assert bool(inner.spoil(torch.ones(3)).isnan().all()) == value
    assert torch.equal(outer.spoil(torch.ones(3)), torch.ones(3))


def test_matrices_without_a_factor_or_an_inverse() -> None:
    for attempt in (
        lambda: torch.linalg.cholesky(-torch.eye(2)),
        lambda: torch.linalg.inv(torch.zeros(2, 2)),
        lambda: torch.linalg.solve(torch.zeros(2, 2), torch.ones(2)),
    ):
        with pytest.raises(torch.linalg.LinAlgError):
            attempt()
        with Failures() as failures:
            attempt()
        assert bool(failures.spoil(torch.ones(())).isnan())
    with Failures() as failures:
        torch.linalg.cholesky(torch.eye(2))
    assert float(failures.spoil(torch.ones(()))) == 1.0
