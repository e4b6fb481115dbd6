"""Checks of later rows against those of the fit."""

from __future__ import annotations

import pytest
import torch

from deepprob.programs.inputs import InputSpec, specs_from_json, specs_of, specs_to_json

X = InputSpec("x", (3,), "float32", 0.5)
LABELS = InputSpec("y", (), "int64", 1.0)
NOTES = InputSpec("notes", (20, 88), "float32", 0.0)


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (X, (5, 2), r"x must have 3 features per row as in the fit; got 2\. Give the same columns in the same order\."),
        (X, (5,), r"x must have rows of shape \(3,\) as in the fit; got \(\)\. Reshape one row to x\.reshape\(1, -1\)"),
        (X, (5, 3, 1), r"x must have rows of shape \(3,\) as in the fit; got \(3, 1\)\."),
        (LABELS, (5, 1), r"y must have rows of shape \(\) as in the fit; got \(1,\)\."),
        (NOTES, (5, 30, 88), r"notes must have rows of shape \(20, 88\) as in the fit; got \(30, 88\)\."),
    ],
)
def test_refuses_rows_of_another_shape(spec: InputSpec, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec.conform(torch.zeros(shape))


def test_sequences_may_be_longer_but_not_wider() -> None:
    assert NOTES.conform(torch.zeros(5, 30, 88), variable_length=True).shape == (5, 30, 88)
    with pytest.raises(ValueError, match=r"notes must have rows of shape \(20, 88\)"):
        NOTES.conform(torch.zeros(5, 30, 87), variable_length=True)


def test_values_are_converted_to_the_types_of_the_fit() -> None:
    assert X.conform(torch.ones(2, 3, dtype=torch.int64)).dtype == torch.float32
    assert LABELS.conform(torch.tensor([1.0, 2.0])).dtype == torch.int64
    with pytest.raises(ValueError, match=r"y must be whole numbers as in the fit; got 1\.5\. Round them"):
        LABELS.conform(torch.tensor([1.0, 1.5]))


def test_specs_become_json_and_examples() -> None:
    specs = specs_of([torch.full((4, 3), 2.0), torch.tensor([3, 1, 2, 2]), torch.zeros(4)], ["x", "y"])
    assert specs_from_json(specs_to_json(specs)) == specs
    assert [s.name for s in specs] == ["x", "y", "argument 3"]
    assert torch.equal(specs[1].example(2), torch.tensor([1, 1]))
    assert specs[0].example(2).shape == (2, 3)
