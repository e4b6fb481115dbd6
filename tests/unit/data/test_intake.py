"""as_split: accepted types, results and errors."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from deepprob.data import Split, as_split

X = np.arange(12.0).reshape(4, 3)
Y = np.array([0, 1, 1, 0])


class Pairs(Dataset[Any]):
    """A map-style data set of (x, y)."""

    def __init__(self, rows: int = 4) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Any:
        return X[index], int(Y[index])


class Named(Pairs):
    def __getitem__(self, index: int) -> Any:
        return {"signal": X[index], "label": int(Y[index])}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return zip(X, Y.tolist(), strict=True)


class Batch(NamedTuple):
    inputs: np.ndarray
    target: np.ndarray


FRAME = pd.DataFrame(X, columns=["a", "b", "c"])
TENSORS = (torch.from_numpy(X), torch.from_numpy(Y))


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ((X, Y), "x y"),
        ([X, Y], "x y"),
        (TENSORS, "x y"),
        ((X.tolist(), Y.tolist()), "x y"),
        ({"signal": X, "label": Y}, "signal label"),
        (Batch(X, Y), "inputs target"),
        ((FRAME, pd.Series(Y, name="price")), "x price"),
        ((FRAME, pd.Series(Y)), "x y"),
        (TensorDataset(*TENSORS), "x y"),
        (Pairs(), "x y"),
        (Named(), "signal label"),
        (Subset(Pairs(), [0, 1, 2, 3]), "x y"),
        (Stream(), "x y"),
        (DataLoader(Pairs(), batch_size=3, shuffle=True, drop_last=True), "x y"),
        (DataLoader(Named(), batch_size=3), "signal label"),
        (DataLoader(Stream(), batch_size=3), "x y"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_every_container_gives_the_same_fields(data: Any, names: str, dtype: torch.dtype) -> None:
    split = as_split(data)
    assert split.names == tuple(names.split())
    x, y = split
    assert x.dtype == dtype and y.dtype == torch.int64
    assert torch.equal(x, torch.from_numpy(X).to(dtype)) and y.tolist() == Y.tolist()


@pytest.mark.parametrize("data", [X, FRAME, X.tolist(), [X], torch.from_numpy(X), Split({"x": TENSORS[0]})])
def test_single_field_is_named_x(data: Any) -> None:
    split = as_split(data)
    assert split.names == ("x",) and split["x"].tolist() == X.tolist()


def test_further_fields_are_numbered_and_equal_names_ignored() -> None:
    assert as_split((X, Y, X, Y)).names == ("x", "y", "data_2", "data_3")
    twice = pd.Series(Y, name="a")
    assert as_split((twice, twice)).names == ("x", "y")


@pytest.mark.parametrize(
    "array",
    [
        X[::-1],
        X[:, ::-1],
        X.T,
        X[::2],
        np.asfortranarray(X),
        X.astype(">f8"),
        X.astype(np.float16),
        X.astype(np.longdouble),
        torch.from_numpy(X).T,
        torch.from_numpy(X).to(torch.bfloat16),
        torch.from_numpy(X).clone().requires_grad_(),
    ],
)
def test_strides_and_widths_do_not_matter(array: Any, dtype: torch.dtype) -> None:
    (out,) = as_split(array)
    assert out.dtype == dtype and out.is_contiguous() and not out.requires_grad
    assert out.tolist() == array.tolist()


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", ">i4"])
def test_whole_numbers_stay_integers(kind: str) -> None:
    assert as_split(Y.astype(kind))["x"].dtype == torch.int64
    assert as_split(torch.tensor([1, 2], dtype=torch.uint8))["x"].dtype == torch.int64


def test_bools_become_floats(dtype: torch.dtype) -> None:
    for data in (Y > 0, torch.from_numpy(Y > 0), pd.Series(Y > 0), [False, True, True, False]):
        (x,) = as_split(data)
        assert x.dtype == dtype and x.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_arrays_are_copied() -> None:
    mine = X.astype(np.float32)
    (x,) = as_split(mine)
    mine[:] = -1
    assert x.min() == 0


def test_frames_of_mixed_numbers(dtype: torch.dtype) -> None:
    mixed = pd.DataFrame({"a": [1, 2], "b": [0.5, 1.5], "c": [True, False]})
    assert as_split(mixed)["x"].tolist() == [[1.0, 0.5, 1.0], [2.0, 1.5, 0.0]]
    assert as_split(mixed)["x"].dtype == dtype
    whole = as_split(pd.DataFrame({"a": pd.array([1, 2], dtype="Int64")}))["x"]
    assert whole.dtype == torch.int64 and whole.tolist() == [[1], [2]]


def test_sequences_of_unequal_length_are_padded(dtype: torch.dtype) -> None:
    songs = [np.ones((2, 3)), torch.full((4, 3), 2.0), np.ones((1, 3), dtype=bool)]
    split = as_split(songs)
    assert split.names == ("x", "lengths") and split["lengths"].tolist() == [2, 4, 1]
    assert split["x"].shape == (3, 4, 3) and split["x"].dtype == dtype
    assert split["x"].sum((1, 2)).tolist() == [6.0, 24.0, 3.0]
    assert as_split([np.ones((2, 1), int), np.ones((1, 1), int)])["x"].dtype == torch.int64


def test_series_of_one_feature_and_packed_sequences_are_padded(dtype: torch.dtype) -> None:
    series = [np.arange(3.0), torch.ones(1), pd.Series([5.0, 6.0])]
    split = as_split(series)
    assert split.names == ("x", "lengths") and split["lengths"].tolist() == [3, 1, 2]
    assert split["x"].dtype == dtype and split["x"][..., 0].tolist() == [[0, 1, 2], [1, 0, 0], [5, 6, 0]]
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(1, 2), torch.zeros(3, 2)], enforce_sorted=False)
    assert as_split(packed)["lengths"].tolist() == [1, 3]
    columns = [pd.Series([1.0, 2.0], name="a"), pd.Series([3.0, 4.0], name="b")]
    assert as_split(columns).names == ("a", "b")


def test_series_of_one_length_are_sequences_only_where_sequences_are_wanted() -> None:
    series = [np.arange(3.0), np.ones(3)]
    with pytest.raises(ValueError, match=r"2 arrays of one shape \(3,\) may be 2 sequences or 2 fields\. Stack them"):
        as_split(series)
    assert as_split(series, sequences=True)["x"].shape == (2, 3, 1)
    assert as_split([[1.0, 2.0], [3.0]], sequences=True)["lengths"].tolist() == [2, 1]
    assert as_split([X, X], sequences=True)["x"].shape == (2, *X.shape)


def test_loader_with_custom_collate_keeps_the_random_state() -> None:
    before = torch.random.get_rng_state()
    doubled = DataLoader(Pairs(), batch_size=2, collate_fn=lambda rows: torch.tensor(
        np.stack([2 * x for x, _ in rows])))  # fmt: skip
    assert as_split(doubled)["x"].tolist() == (2 * X).tolist()
    assert torch.equal(before, torch.random.get_rng_state())


NAN = X.copy()
NAN[2, 0] = NAN[3, 1] = np.nan
INF = X.copy()
INF[1, 2] = -np.inf
MASKED = np.ma.MaskedArray(X, mask=X == 4.0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (NAN, r"'x' of data has 2 NaN values, the first in row 2\. Drop these rows or fill"),
        ((X, Y * np.nan), r"'y' of data has 4 NaN values, the first in row 0"),
        (INF, r"'x' of data has 1 infinite value, the first in row 1\."),
        (pd.DataFrame(NAN), "2 NaN values"),
        (pd.DataFrame({"a": pd.array([1, None], dtype="Int64")}), "1 NaN value, .* row 1"),
        (MASKED, r"1 NaN value, the first in row 1"),
        ([np.ones((2, 1)), np.array([[np.nan]])], "sequence 1 has 1 NaN value"),
        (np.empty((0, 3)), r"'x' of data is empty: shape \(0, 3\)\. Pass at least one row"),
        ([], "'x' of data is empty"),
        (pd.DataFrame(), "'x' of data is empty"),
        (pd.DataFrame(index=[0, 1]), "'x' of data is empty"),
        ((), "data: a split needs at least one field"),
        ({}, "data: a split needs at least one field"),
        ((X, Y[:3]), r"data: all fields must have the same number of rows; 'x' has 4, 'y' has 3"),
        (3.0, "'x' of data is one number, not rows"),
        (np.float64(3), "'x' of data is one number, not rows"),
        ([[1.0], [2.0, 3.0]], r"the items of 'x' of data must have one shape; got a list of items of unequal"),
        ([X, X], r"2 arrays of one shape \(4, 3\) may be 2 sequences or 2 fields"),
        (Pairs(0), "data is empty; expected at least one row"),
        (DataLoader(Stream(), batch_size=8, drop_last=True), "expected at least one batch"),
    ],
)
def test_refuses_invalid_values(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_split(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, r"'x' of data must be numbers in a tensor, .* got NoneType\. Convert it"),
        ("digits", "got str"),
        ({"x": {"y": X}}, "'x' of data must be numbers .* got dict"),
        ((row for row in X), "got generator"),
        (SimpleNamespace(train=X, test=X), "Pass one of its parts, e.g. .train"),
        (np.array([{}, None]), "'x' of data must be numbers; got dtype object"),
        (["a", "b"], "'x' of data must be numbers; got dtype <U1. Encode text"),
        (np.array(["2020-01-01"], dtype="M8[D]"), "got dtype datetime64"),
        (X + 1j, "got dtype complex128"),
        (torch.ones(2, dtype=torch.complex64), "'x' of data is complex; expected real"),
        (torch.eye(2).to_sparse(), r"sparse tensor; expected a dense one. Use .to_dense\(\)"),
        (FRAME.assign(city="Rome", day=pd.Timestamp(0)), "not numbers: city, day. Encode"),
        (pd.Series(["a"], name="city"), "'city' of data has columns that are not numbers: city"),
        ({0: X}, "data: field names must be text; got 0"),
    ],
)
def test_refuses_values_that_are_not_numbers(data: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        as_split(data)


class Ragged(Pairs):
    def __getitem__(self, index: int) -> Any:
        return torch.ones(index + 1, 2)


def test_refuses_rows_and_batches_of_unequal_shape() -> None:
    with pytest.raises(ValueError, match=r"rows of songs must be numbers of one shape each .* list"):
        as_split(Ragged(), what="songs")
    longest = DataLoader(Ragged(), batch_size=2, collate_fn=lambda rows: (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)))  # fmt: skip
    with pytest.raises(ValueError, match=r"batches of data differ in shape.* Pad them"):
        as_split(longest)


def test_errors_name_the_data() -> None:
    with pytest.raises(ValueError, match="'x' of held_out has 2 NaN values"):
        as_split(NAN, what="held_out")
    with pytest.raises(ValueError, match="held_out: all fields must have"):
        as_split((X, Y[:1]), what="held_out")


def test_refuses_numbers_too_large_for_the_dtype() -> None:
    if torch.get_default_dtype() == torch.float32:
        with pytest.raises(ValueError, match="1 infinite value, the first in row 0"):
            as_split(np.array([1e300, 1.0]))
    # The sum of these finite values overflows.
    top = torch.finfo(torch.get_default_dtype()).max
    assert len(as_split(torch.full((4,), top))) == 4
