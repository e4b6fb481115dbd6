"""Data as users have them, in every form: each form gives the right value, or a message that says what to do."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import deepprob as dp
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior

N = 40
RNG = np.random.default_rng(0)
WHOLE = RNG.integers(0, 9, (N, 2))
X = (WHOLE / 4 - 1).astype(np.float32)  # exact in float16, too
Y = (np.round((X @ [1.0, -2.0] + RNG.normal(size=N)) * 4) / 4).astype(np.float32)
MASK = np.arange(N) % 3 > 0
NAMES = ["a", "b"]
FRAME = pd.DataFrame(X, columns=NAMES)
KINDS = np.array(["cat", "dog", "eel"])[(WHOLE[:, 0] + WHOLE[:, 1]) % 3]


def slopes_of(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)


def fit(program: Any, data: Any, steps: int = 4, **options: Any) -> Posterior:
    program = program if isinstance(program, dp.Program) else dp.Program.of(program, "normal", data_plate="data")
    return svi(program, data, steps=steps, seed=0, progress=False, compile=False, **options)


def ask(data: Any) -> Tensor:
    return fit(slopes_of, data).sample(draws=3)["w"]


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    found, expected = (torch.as_tensor(x if isinstance(x, Tensor) else np.array(x)).double() for x in (found, expected))
    torch.testing.assert_close(found, expected.expand(found.shape), atol=tolerance, rtol=0.0)


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return ask((X, Y))


@pytest.fixture(scope="module")
def plain_whole() -> Tensor:
    return ask((WHOLE, Y))


@pytest.fixture(scope="module")
def by_name() -> Posterior:
    return fit(slopes_of, (FRAME, Y))


# -- arrays -----------------------------------------------------------------------------------------------------------

REALS: dict[str, Callable[[], Any]] = {
    "float64": lambda: X.astype(np.float64),
    "float16": lambda: X.astype(np.float16),
    "longdouble": lambda: X.astype(np.longdouble),
    "big-endian float64": lambda: X.astype(">f8"),
    "big-endian float32": lambda: X.astype(">f4"),
    "Fortran order": lambda: np.asfortranarray(X),
    "negative strides": lambda: X[::-1].copy()[::-1],
    "every second row": lambda: np.repeat(X, 2, 0)[::2],
    "broadcast and read-only": lambda: np.broadcast_to(X, (1, *X.shape))[0],
    "masked, nothing masked": lambda: np.ma.array(X),
    "nested lists": lambda: X.tolist(),
    "list of tuples": lambda: [tuple(row) for row in X.tolist()],
    "frame": lambda: FRAME,
    "frame of another index": lambda: FRAME.set_axis([f"row {i}" for i in range(N)][::-1], axis=0),
    "frame of one index for all": lambda: FRAME.set_axis([7] * N, axis=0),
    "nullable Float64": lambda: FRAME.astype("Float64"),
    "nullable Float32": lambda: FRAME.astype("Float32"),
    "float16 and float64 columns": lambda: FRAME.astype({"a": "float16", "b": "float64"}),
    "sparse columns": lambda: FRAME.astype(pd.SparseDtype("float32", 0.0)),
    "columns with two equal names": lambda: FRAME.set_axis(["a", "a"], axis=1),
    "columns with two levels": lambda: FRAME.set_axis(pd.MultiIndex.from_tuples([("m", "a"), ("m", "b")]), axis=1),
    "columns by number": lambda: FRAME.set_axis([0, 1], axis=1),
    "float64 tensor": lambda: torch.tensor(X, dtype=torch.float64),
    "bfloat16 tensor": lambda: torch.tensor(X).bfloat16(),
    "tensor with a gradient": lambda: torch.tensor(X, requires_grad=True),
    "transposed tensor": lambda: torch.tensor(X.T.copy()).T,
}


@pytest.mark.parametrize("form", REALS)
def test_real_numbers_in_any_form_are_the_same_data(plain: Tensor, form: str) -> None:
    assert torch.equal(ask((REALS[form](), Y)), plain)


WHOLES: dict[str, Callable[[], Any]] = {
    "int8": lambda: WHOLE.astype(np.int8),
    "uint8": lambda: WHOLE.astype(np.uint8),
    "uint16": lambda: WHOLE.astype(np.uint16),
    "uint64": lambda: WHOLE.astype(np.uint64),
    "big-endian int32": lambda: WHOLE.astype(">i4"),
    "lists": lambda: WHOLE.tolist(),
    "Int64": lambda: pd.DataFrame(WHOLE, columns=NAMES).astype("Int64"),
    "UInt8 and int16": lambda: pd.DataFrame(WHOLE, columns=NAMES).astype({"a": "UInt8", "b": "int16"}),
    "int8 tensor": lambda: torch.tensor(WHOLE, dtype=torch.int8),
}


@pytest.mark.parametrize("form", WHOLES)
def test_whole_numbers_in_any_form_are_the_same_data(plain_whole: Tensor, form: str) -> None:
    assert torch.equal(ask((WHOLES[form](), Y)), plain_whole)


TARGETS: dict[str, Callable[[], Any]] = {
    "series": lambda: pd.Series(Y),
    "series of another index": lambda: pd.Series(Y, index=range(100, 100 + N)),
    "series with the name of the other argument": lambda: pd.Series(Y, name="x"),
    "nullable series": lambda: pd.Series(Y).astype("Float64"),
    "extension array": lambda: pd.array(Y, dtype="Float64"),
    "index": lambda: pd.Index(Y),
    "list": lambda: Y.tolist(),
    "float16": lambda: Y.astype(np.float16),
}


@pytest.mark.parametrize("form", TARGETS)
def test_targets_in_any_form_are_the_same_data(plain: Tensor, form: str) -> None:
    assert torch.equal(ask((X, TARGETS[form]())), plain)


Pair = namedtuple("Pair", "y x")
CONTAINERS: dict[str, Callable[[], Any]] = {
    "dict by argument": lambda: {"y": Y, "x": X},
    "dict of frame and series": lambda: {"y": pd.Series(Y, name="price"), "x": FRAME},
    "named tuple in another order": lambda: Pair(y=Y, x=X),
    "tuple of lists": lambda: (X.tolist(), Y.tolist()),
    "split": lambda: dp.Split({"x": torch.tensor(X), "y": torch.tensor(Y)}),
    "tensor data set": lambda: TensorDataset(torch.tensor(X), torch.tensor(Y)),
}


@pytest.mark.parametrize("form", CONTAINERS)
def test_containers_in_any_form_are_the_same_data(plain: Tensor, form: str) -> None:
    assert torch.equal(ask(CONTAINERS[form]()), plain)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no rows": (lambda: (X[:0], Y[:0]), "'x' of data is empty.*at least one row"),
    "a frame without rows": (lambda: (FRAME[:0], Y[:0]), "'x' of data is empty.*at least one row"),
    "infinite": (lambda: (np.where(X > 0.9, np.inf, X), Y), "infinite value.*first in row"),
    "an infinite target": (lambda: (X, pd.Series(Y).mask(MASK, np.inf)), "'y'.*infinite values.*first in row 1"),
    "complex": (lambda: (X.astype(np.complex64), Y), "'x' of data must be numbers; got dtype complex64"),
    "a complex tensor": (lambda: (torch.tensor(X) * 1j, Y), "complex.*view_as_real"),
    "a sparse tensor": (lambda: (torch.tensor(X).to_sparse(), Y), "sparse tensor.*to_dense"),
    "numbers as text": (lambda: (X.astype(str), Y), "'x' of data must be numbers; got dtype <U"),
    "an object array": (lambda: (X.astype(object), Y), "'x' of data must be numbers; got dtype object"),
    "dates": (lambda: (np.full(N, "2020-01-01", "datetime64[D]"), Y), "must be numbers; got dtype datetime64"),
    "durations": (lambda: (np.full(N, 3, "timedelta64[D]"), Y), "must be numbers; got dtype timedelta64"),
    "a column of text": (lambda: (FRAME.assign(kind=KINDS), Y), r"not numbers: kind. Encode .*dp\.table"),
    "a column of categories": (lambda: (FRAME.assign(k=pd.Categorical(KINDS)), Y), r"not numbers: k\. .*dp\.table"),
    "a column of dates": (lambda: (FRAME.assign(t=pd.Timestamp("2020-01-01")), Y), r"not numbers: t\. .*dp\.table"),
    "text as target": (lambda: (X, pd.Series(KINDS, name="kind")), "not numbers: kind"),
    "arguments of unequal length": (lambda: {"x": X, "y": Y[:-1]}, "'x' has 40, 'y' has 39"),
    "an argument that the model lacks": (lambda: {"x": X, "z": Y}, "takes x, y; data has the fields x, z"),
    "a path": (lambda: "data.csv", "got str"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_no_data_is_refused(form: str) -> None:
    data, words = REFUSED[form]
    with pytest.raises((TypeError, ValueError), match=words):
        ask(data())


@pytest.mark.parametrize("y", [Y[:, None], pd.DataFrame({"y": Y})], ids=["array", "frame"])
def test_a_column_of_targets_does_not_broadcast_against_rows(y: Any) -> None:
    with pytest.raises(ValueError, match=r"every row of y must have shape \(\).*got \(1,\). Reshape the data"):
        ask((X, y))


def test_one_row_is_enough() -> None:
    posterior = fit(slopes_of, (FRAME[:1], Y[:1]))
    assert posterior.predict(FRAME[:1], draws=3).mean.shape == (1,)


# -- types: what the model sees ---------------------------------------------------------------------------------------

SEEN: dict[str, tuple[Any, torch.dtype]] = {
    "bool array": (MASK, torch.bool),
    "bool list": (MASK.tolist(), torch.bool),
    "bool series": (pd.Series(MASK), torch.bool),
    "nullable boolean": (pd.Series(MASK).astype("boolean"), torch.bool),
    "int8": (MASK.astype(np.int8), torch.int64),
    "codes of categories": (pd.Series(pd.Categorical(KINDS)).cat.codes, torch.int64),
    "Int8": (pd.Series(WHOLE[:, 0]).astype("Int8"), torch.int64),
    "float16": (X[:, 0].astype(np.float16), torch.float32),
    "float64": (X[:, 0].astype(np.float64), torch.float32),
}


@pytest.mark.parametrize("form", SEEN)
def test_the_model_sees_the_type_that_the_user_gave(form: str) -> None:
    seen: list[Tensor] = []
    given, dtype = SEEN[form]

    def model(x: Tensor, y: Tensor) -> None:
        seen.append(x)
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    fit(model, (given, Y))
    assert {x.dtype for x in seen} == {dtype}
    close(seen[0].double(), np.asarray(given, dtype=np.float64)[: len(seen[0])])


def masked(seen: Tensor, y: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)), pyro.poutine.mask(mask=seen):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


@pytest.mark.parametrize("mask", [MASK, pd.Series(MASK).astype("boolean"), MASK.tolist()], ids=["array", "NA", "list"])
def test_a_mask_leaves_rows_out(mask: Any) -> None:
    likelihood = fit(masked, (mask, Y)).log_likelihood(mask, Y, draws=3)
    assert np.array_equal(likelihood[0] != 0, MASK)


GAPS: dict[str, Callable[[], Any]] = {
    "NaN": lambda: np.where(MASK, Y, np.nan),
    "masked array": lambda: np.ma.array(Y, mask=~MASK),
    "NaN in a series": lambda: pd.Series(Y).where(MASK),
    "NA in a nullable series": lambda: pd.Series(Y).astype("Float64").where(MASK),
}


@pytest.mark.parametrize("form", GAPS)
def test_missing_targets_are_refused_by_row_unless_the_model_masks_them(form: str) -> None:
    def skipping(x: Tensor, y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=~y.isnan()):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y.nan_to_num())

    program = dp.Program.of(skipping, "normal", data_plate="data", missing="allow")
    likelihood = fit(program, (X, GAPS[form]())).log_likelihood(X, GAPS[form](), draws=3)
    assert np.array_equal(likelihood[0] != 0, MASK)
    with pytest.raises(ValueError, match=r"'y'.*NaN.*row 0.*Drop these rows or fill them in\. A .* missing='allow'"):
        ask((X, GAPS[form]()))


# -- frames and arrays at the other doors -----------------------------------------------------------------------------

SAME: dict[str, Callable[[], Any]] = {
    "other order": lambda: FRAME[["b", "a"]],
    "further columns": lambda: FRAME.assign(note="-", when=pd.Timestamp("2020-01-01"))[["note", "b", "when", "a"]],
    "other types": lambda: FRAME.astype({"a": "Float64", "b": "float64"}),
    "other index": lambda: FRAME.set_axis([*"xy"] * (N // 2), axis=0),
    "array": lambda: X,
    "lists": lambda: X.tolist(),
    "by number": lambda: FRAME.set_axis([0, 1], axis=1),
}


@pytest.mark.parametrize("form", SAME)
def test_a_frame_in_any_form_gives_the_same_predictions(by_name: Posterior, form: str) -> None:
    assert torch.equal(by_name.predict(SAME[form](), draws=4).mean, by_name.predict(FRAME, draws=4).mean)


OTHER: dict[str, tuple[Callable[[], Any], str]] = {
    "missing": (lambda: FRAME[["a"]], "lacks the column 'b'"),
    "renamed": (lambda: FRAME.rename(columns={"b": "bb"}), "lacks the column 'b'.*Rename 'bb'"),
    "twice": (lambda: pd.concat([FRAME, FRAME], axis=1), "several columns 'a'"),
    "text": (lambda: FRAME.astype({"b": str}), "not numbers: b"),
    "too wide": (lambda: np.ones((3, 5)), "must have 2 features per row as in the fit; got 5"),
    "one row without its axis": (lambda: X[3], r"x\.reshape\(1, -1\)"),
    "no rows": (lambda: FRAME[:0], "'x' of data is empty.*at least one row"),
}


@pytest.mark.parametrize("form", OTHER)
def test_another_frame_than_that_of_the_fit_is_refused(by_name: Posterior, form: str) -> None:
    data, words = OTHER[form]
    with pytest.raises((TypeError, ValueError), match=words):
        by_name.predict(data(), draws=3)


def test_one_row_of_a_frame_is_predicted_alone(by_name: Posterior) -> None:
    one = by_name.predict(FRAME.iloc[[3]], draws=50)
    assert one.mean.shape == (1,)
    assert torch.equal(one.mean, by_name.predict(FRAME.iloc[3], draws=50).mean)
    assert torch.equal(one.mean, by_name.predict(FRAME.assign(note="-").iloc[3][::-1], draws=50).mean)
    close(one.mean, by_name.predict(FRAME, draws=50).mean[3], 0.6)  # own draws


def test_a_polars_frame_is_a_frame(by_name: Posterior) -> None:
    polars = pytest.importorskip("polars")
    made = polars.DataFrame({"b": X[:, 1], "a": X[:, 0]})
    assert torch.equal(by_name.predict(made, draws=4).mean, by_name.predict(FRAME, draws=4).mean)
