"""Errors that are recorded while a run is traced."""

from __future__ import annotations

import pytest
import torch

from deepprob.engine.deferred_errors import DeferredErrors, defer_error


def test_outside_a_trace_the_condition_is_returned() -> None:
    assert defer_error(torch.tensor(True))
    assert not defer_error(torch.tensor(False))


@pytest.mark.parametrize("value", [True, False])
def test_inside_a_trace_the_condition_makes_the_answer_nan(value: bool) -> None:
    with DeferredErrors() as outer:
        with DeferredErrors() as inner:
            assert not defer_error(torch.tensor(value))
        assert not defer_error(torch.tensor(False))
    assert bool(inner.mark_nan(torch.ones(3)).isnan().all()) == value
    assert torch.equal(outer.mark_nan(torch.ones(3)), torch.ones(3))


def test_a_matrix_without_cholesky_factor_or_inverse_makes_the_answer_nan() -> None:
    for attempt in (
        lambda: torch.linalg.cholesky(-torch.eye(2)),
        lambda: torch.linalg.inv(torch.zeros(2, 2)),
        lambda: torch.linalg.solve(torch.zeros(2, 2), torch.ones(2)),
    ):
        with pytest.raises(torch.linalg.LinAlgError):
            attempt()
        with DeferredErrors() as errors:
            attempt()
        assert bool(errors.mark_nan(torch.ones(())).isnan())
    with DeferredErrors() as errors:
        torch.linalg.cholesky(torch.eye(2))
    assert float(errors.mark_nan(torch.ones(()))) == 1.0
