"""Split and Shuffle."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from deepprob.data import Shuffle, Split


def pair(rows: int = 10) -> Split:
    x = torch.arange(2 * rows, dtype=torch.float32).reshape(rows, 2)
    return Split({"x": x, "y": torch.arange(rows)})


def test_split_holds_its_fields_in_order() -> None:
    data = pair()
    x, y = data
    assert data.names == ("x", "y") and data["x"] is x and data.tensors[1] is y
    assert len(data) == 10 and data.shape == (2,)
    assert "x" in data and "z" not in data
    assert repr(pair(1)) == "Split(1 row: x (2,) float32, y () int64)"


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (3, [3]),
        (-1, [9]),
        (slice(2, 5), [2, 3, 4]),
        ([4, 1], [4, 1]),
        (np.array([0, 0]), [0, 0]),
        (torch.arange(10) > 7, [8, 9]),
    ],
)
def test_rows_keeps_the_axis_and_the_pairing(index: object, expected: list[int]) -> None:
    part = pair().rows(index)  # type: ignore[arg-type]
    assert part["y"].tolist() == expected
    assert part["x"][:, 0].tolist() == [2.0 * row for row in expected]


def test_rows_refuses_a_missing_row() -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        pair().rows(10)


def test_to_moves_every_field() -> None:
    moved = pair().to("meta")
    assert moved.device.type == "meta" and all(field.is_meta for field in moved)


def test_split_depends_on_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    first, second = pair(100).split(0.8, seed=3)
    again, _ = pair(100).split(0.8, seed=3)
    other, _ = pair(100).split(0.8, seed=4)
    assert len(first) == 80 and len(second) == 20
    assert torch.equal(first["y"], again["y"]) and not torch.equal(first["y"], other["y"])
    assert not set(first["y"].tolist()) & set(second["y"].tolist())
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2, 1.5, 0.01, float("nan")])
def test_split_refuses_an_empty_part(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"both parts at least one of 10 rows; got .* e\.g\. 0\.8"):
        pair().split(fraction)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({}, ValueError, "needs at least one field; got none"),
        ({0: torch.ones(2)}, TypeError, "field names must be text; got 0"),
        ({"x": [1, 2]}, TypeError, "'x' must be a tensor; got list. Use as_split"),
        ({"x": torch.tensor(1.0)}, ValueError, "'x' is one number, not rows"),
        (
            {"x": torch.ones(3), "y": torch.ones(2)},
            ValueError,
            r"same number of rows; 'x' has 3, 'y' has 2\. Pass only",
        ),
    ],
)
def test_split_refuses_invalid_fields(fields: dict[str, torch.Tensor], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Split(fields)


def test_error_names_an_unknown_field() -> None:
    with pytest.raises(ValueError, match=r"unknown field 'image'\. Did you mean 'images'\?"):
        Split({"images": torch.ones(1)})["image"]


@pytest.mark.parametrize(("rows", "batch"), [(10, 3), (10, 5), (7, 6), (3, 1)])
def test_epoch_holds_every_row_and_repeats_only_its_start(rows: int, batch: int) -> None:
    shuffle = Shuffle(rows, batch, torch.Generator().manual_seed(0))
    epoch = shuffle.epoch()
    flat = epoch.flatten()
    assert epoch.shape == (shuffle.steps_per_epoch, batch) == (-(-rows // batch), batch)
    assert sorted(flat[:rows].tolist()) == list(range(rows))
    assert torch.equal(flat[rows:], flat[: len(flat) - rows])


@pytest.mark.parametrize("batch", [None, 10, 11])
def test_full_batch_is_in_order_and_draws_nothing(batch: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    shuffle = Shuffle(10, batch, generator)
    assert shuffle.epoch().tolist() == [list(range(10))]
    assert (shuffle.batch_size, shuffle.steps_per_epoch) == (10, 1)
    assert torch.equal(before, generator.get_state())


def test_batches_are_endless_and_follow_the_generator() -> None:
    first = list(islice(Shuffle(5, 2, torch.Generator().manual_seed(1)), 7))
    shuffle = Shuffle(5, 2, torch.Generator().manual_seed(1))
    epochs = torch.cat([shuffle.epoch() for _ in range(3)])
    assert torch.equal(torch.stack(first), epochs[:7])
    assert not torch.equal(epochs[:3], epochs[3:6])


@pytest.mark.parametrize(
    ("rows", "batch", "message"),
    [
        (0, 1, r"num_data must be a whole number of at least 1; got 0\."),
        (5, 0, r"batch_size must be a whole number of at least 1; got 0\."),
        (5, -2, r"batch_size must be a whole number of at least 1; got -2\."),
        (5, 2.0, r"batch_size must be a whole number of at least 1; got 2\.0\."),
        (True, 2, r"num_data must be a whole number of at least 1; got True\."),
    ],
)
def test_shuffle_refuses_invalid_sizes(rows: int, batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shuffle(rows, batch, torch.Generator())
