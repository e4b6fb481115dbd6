"""Arguments: every call that Pyro takes is read, and queries take the same forms as the fit."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import deepprob as dp
from deepprob.data import Split
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.arguments import missing, read_arguments
from deepprob.programs.program import Program

X = torch.linspace(-1.0, 1.0, 12)
Y = 2 * X
MASK = X > 0


def read(model: Any, data: Any) -> tuple[Any, ...]:
    """The tensors with rows, and the call that they make."""
    found = read_arguments(data, inspect.signature(model))
    return tuple(found), *found.call.fill(found)


def fitted(model: Any, data: Any, **options: Any) -> Posterior:
    return svi(Program.of(model, "normal", **options), data, steps=3, progress=False, compile=False)


@pytest.mark.parametrize(
    ("model", "data", "names"),
    [
        (lambda x, y=None: None, (X, Y), ("x", "y")),
        (lambda x, *, y=None: None, {"y": Y, "x": X}, ("x", "y")),
        (lambda data: None, {"a": X, "b": Y}, ("data[a]", "data[b]")),
        (lambda data: None, ({"a": X, "b": [Y, 3]},), ("data[a]", "data[b][0]")),
        (lambda x, pair: None, (X, (Y, MASK)), ("x", "pair[0]", "pair[1]")),
        (lambda *rows: None, (X, Y), ("argument 1", "argument 2")),
        (lambda **rows: None, {"a": X, "b": Y}, ("a", "b")),
        (lambda x, y: None, Split({"y": Y, "x": X}), ("x", "y")),
        (lambda x: None, Split({"images": X, "labels": Y}), ("x",)),
        (lambda x, flag, size, word, nothing: None, (X, True, 3, "normal", None), ("x",)),
    ],
)
def test_names_of_the_tensors_with_rows(model: Any, data: Any, names: tuple[str, ...]) -> None:
    assert read_arguments(data, inspect.signature(model)).call.names == names


def test_a_call_is_made_again_as_it_was_given() -> None:
    def model(x: Tensor, options: dict[str, Any], *, y: Tensor | None = None, scale: float = 1.0) -> None: ...

    rows, args, kwargs = read(model, {"x": X, "options": {"deep": (Y, "a", None)}, "scale": 0.5})
    assert args == () and kwargs["scale"] == 0.5 and kwargs["options"]["deep"][1:] == ("a", None)
    assert torch.equal(kwargs["x"], X) and torch.equal(kwargs["options"]["deep"][0], Y) and len(rows) == 2


@pytest.mark.parametrize("column", [pd.Series([True, False]), pd.Series([True, False], dtype="boolean")])
def test_columns_of_bools_are_bools(column: pd.Series) -> None:
    rows, _, _ = read(lambda x, options: None, {"x": column, "options": {"deep": column.to_frame()}})
    assert [x.dtype for x in rows] == [torch.bool, torch.bool] and rows[1].shape == (2, 1)
    rows, _, _ = read(lambda x: None, pd.DataFrame({"a": column, "b": [1.0, 2.0]}))
    assert rows[0].dtype == torch.float32


def test_types_stay() -> None:
    frame = pd.DataFrame({"a": [1.5, 2.5], "b": [1.0, 2.0]})
    values = (np.array([True, False]), np.array([1, 2]), np.array([1.0, 2.0]), [3, 4], frame)
    rows, _, _ = read(lambda *data: None, values)
    assert [x.dtype for x in rows] == [torch.bool, torch.int64, torch.float32, torch.int64, torch.float32]
    assert rows[-1].shape == (2, 2)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0)])
def test_tensors_of_another_length_are_passed_whole(order: tuple[int, ...]) -> None:
    given = (torch.ones(3), X, Y)
    data = tuple(given[i] for i in order)
    rows, args, _ = read(lambda *data: None, data)
    assert len(rows) == 2 and all(len(x) == 12 for x in rows)
    assert all(torch.equal(a, b) for a, b in zip(args, data, strict=True))


def test_columns_of_a_frame_are_arguments_by_name() -> None:
    def model(x: Tensor, k: Tensor, y: Tensor | None = None) -> None:
        keyword_only(x * k, y=y)

    frame = pd.DataFrame({"y": Y.numpy(), "k": [1, 2] * 6, "x": X.numpy()})
    for data in (frame, frame.assign(note="a")):
        rows, args, kwargs = read(model, data)
        assert args == () and [*kwargs] == ["x", "k", "y"] and kwargs["k"].dtype == torch.int64 and len(rows) == 3
    with pytest.raises(TypeError, match=r"'k' of data has columns that are not numbers: k"):
        read(model, frame.assign(k="a"))
    posterior = fitted(model, frame)
    assert posterior.predict(frame[["x", "k"]][:5], draws=2).draws.shape == (2, 5)
    assert posterior.log_likelihood(frame, draws=2).shape == (2, 12)


def test_a_frame_of_other_columns_is_one_argument() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        keyword_only(x.sum(-1), y=y)

    frame = pd.DataFrame({"a": X.numpy(), "x": X.numpy()})
    rows, args, _ = read(model, (frame, Y))
    assert args[0].shape == (12, 2) and len(rows) == 2
    posterior = fitted(model, (frame, Y))
    assert posterior.predict(frame[:5], draws=2).draws.shape == (2, 5)  # as in the fit
    rows, _, _ = read(lambda table: None, frame)
    assert rows[0].shape == (12, 2)


def test_missing_arguments_are_named() -> None:
    def model(x: Tensor, y: Tensor, *, weights: Tensor, scale: float = 1.0) -> None: ...

    signature = inspect.signature(model)
    assert missing((X,), {}, signature) == ["y", "weights"]
    with pytest.raises(ValueError, match=r"the model takes x, y; data lacks y, weights\. Pass a tuple in this order"):
        svi(Program.of(model, "normal"), X)


def test_a_dict_that_names_some_arguments_only_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the model takes x, y; data has the fields x, z\. Name every field after"):
        read_arguments({"x": X, "z": Y}, inspect.signature(lambda x, y: None))


def test_too_many_parts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes 0 arguments; data has 1 part\."):
        read_arguments((X,), inspect.signature(lambda: None))
    with pytest.raises(ValueError, match=r"takes 1 argument \(x\); data has 2 parts.*give a dict"):
        read_arguments((X, Y), inspect.signature(lambda x, *, y=None: None))


# -- fits and queries -------------------------------------------------------------------------------------------------


def keyword_only(x: Tensor, *, y: Tensor | None = None, scale: float = 0.5) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(b * x, scale), obs=y)


def one_dict(data: dict[str, Any]) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(data["x"])):
        pyro.sample("y", dist.Normal(b * data["x"], 0.5), obs=data.get("y"))


def nested(x: Tensor, rest: tuple[Tensor | None, str]) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(b * x, 0.5 if rest[1] == "sure" else 5.0), obs=rest[0])


def groups(series: list[Tensor]) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 3.0))
    for i, y in enumerate(series):
        with pyro.plate(f"rows_{i}", len(y)):
            pyro.sample(f"y_{i}", dist.Normal(b, 0.5), obs=y)


def test_an_argument_that_is_a_list_is_asked_for_as_one() -> None:
    posterior = fitted(groups, ([Y, Y[:5]],))
    for data in (([Y, Y[:5]],), [Y, Y[:5]]):
        assert float(posterior.log_evidence(data)) == float(posterior.log_evidence(([Y, Y[:5]],)))


class Pair(NamedTuple):
    x: Tensor
    y: Tensor | None = None


def one_pair(pair: Any) -> None:
    keyword_only(pair[0], y=pair[1])


def pair_in_a_pair(pairs: Any) -> None:
    (x, _), y = pairs
    keyword_only(x, y=y)


@pytest.mark.parametrize(
    ("model", "one", "new"),
    [
        (one_pair, (X, Y), (X[:5], None)),
        (one_pair, Pair(X, Y), Pair(X[:5])),
        (pair_in_a_pair, ((X, X), Y), ((X[:5], X[:5]), None)),
        (lambda pair, y=None: keyword_only(pair[0], y=pair[1]), (X, Y), (X[:5], None)),
    ],
)
def test_an_argument_that_holds_others_is_asked_for_as_one(model: Any, one: Any, new: Any) -> None:
    posterior = fitted(model, (one,))
    for data in (one, (one,)):
        assert posterior.log_likelihood(data, draws=2).shape == (2, 12)
    for data in (new, (new,)):
        assert posterior.predict(data, draws=2).draws.shape == (2, 5)


@pytest.mark.parametrize(
    ("model", "data", "new"),
    [
        (keyword_only, {"x": X, "y": Y}, ({"x": X[:5]}, X[:5])),
        (keyword_only, {"x": X, "y": Y, "scale": 0.1}, ({"x": X[:5], "scale": 0.1},)),
        (one_dict, {"x": X, "y": Y}, ({"x": X[:5]},)),
        (nested, (X, (Y, "sure")), ((X[:5], (None, "sure")),)),
        (functools.partial(keyword_only, scale=0.2), {"x": X, "y": Y}, ({"x": X[:5]},)),
    ],
)
def test_a_fit_is_asked_in_the_form_of_its_data(model: Any, data: Any, new: tuple[Any, ...]) -> None:
    posterior = fitted(model, data)
    assert posterior.sample(data, draws=3)["b"].shape == (3,)
    assert posterior.log_likelihood(data, draws=3).shape == (3, 12)
    assert posterior.log_evidence(data, particles=3).shape == ()
    for rows in new:
        assert posterior.predict(rows, draws=3).draws.shape == (3, 5)
    assert posterior.to_arviz(data, draws=3) is not None


def test_whole_tensors_stay_whole_in_queries_of_their_length() -> None:
    def model(x: Tensor, scales: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, scales).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(w.sum(-1, keepdim=True), 1.0), obs=x)

    posterior = fitted(model, (X, torch.ones(3)))
    assert posterior.sample(X[:3], torch.ones(3), draws=2)["w"].shape == (2, 3)
    assert posterior.log_likelihood(X[:3], torch.ones(3), draws=2).shape == (2, 3)


def test_whole_tensors_are_not_cut_into_minibatches() -> None:
    seen = set()

    def model(x: Tensor, scales: Tensor) -> None:
        seen.add((len(x), len(scales)))
        w = pyro.sample("w", dist.Normal(0.0, scales).to_event(1))
        with pyro.plate("rows", 12, subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(w.sum(-1, keepdim=True), 1.0), obs=x)

    svi(Program.of(model, "normal", data_plate="rows"), (X, torch.ones(3)), steps=4, batch_size=4, progress=False)
    assert (4, 3) in seen and all(scales == 3 for _, scales in seen)


def test_held_out_data_may_have_another_form() -> None:
    posterior = svi(
        Program.of(keyword_only, "normal"), {"x": X, "y": Y}, held_out={"y": Y, "x": X}, epochs=3, progress=False
    )
    assert len(posterior.history.epochs["held_out_log_likelihood"]) == 3


def test_arguments_that_are_left_out_are_predicted_or_named() -> None:
    def free(y: Tensor | None = None) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", 12):
            pyro.sample("y", dist.Normal(b, 0.5), obs=y)

    def bound(*, y: Tensor) -> None:
        free(y)

    posterior = fitted(free, Y)
    assert posterior.predict(draws=3).draws.shape == (3, 12)
    assert posterior.sample_prior(5)["y"].shape == (1, 5)
    with pytest.raises(ValueError, match="nothing is observed"):
        posterior.log_likelihood()
    with pytest.raises(ValueError, match=r"the program needs rows of y; got none"):
        fitted(bound, {"y": Y}).log_likelihood()
    with pytest.raises(ValueError, match=r"the model takes x, y; data lacks x"):
        svi(Program.of(lambda x, y=None: None, "normal"))
    assert svi(Program.of(lambda: free(Y), "normal"), steps=2, progress=False).structure.observed == ("y",)


@pytest.mark.parametrize(
    ("model", "data", "new", "name"),
    [
        (lambda x, scale, y=None: keyword_only(x, y=y, scale=1 * scale), (X, 0.5, Y), (X,), "'scale', which was"),
        (lambda y, x: keyword_only(x, y=y), (Y, X), (X,), "'x', which was"),
        (lambda x, y: keyword_only(x, y=y), (X, Y), ({"y": Y},), "'x', which was"),
        (lambda y=None, *, x: keyword_only(x, y=y), {"x": X, "y": Y}, (X,), "'x', which was"),
        (lambda a, b, y=None: keyword_only(a * b, y=y), (X, 0.5, Y), ({"y": Y},), "'a', 'b', which were"),
    ],
)
def test_a_required_argument_that_is_left_out_is_named(model: Any, data: Any, new: tuple[Any, ...], name: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot run without {name} left out: .*Give (it|them) too, by name"):
        fitted(model, data).predict(*new)
    with pytest.raises(ValueError, match=rf"cannot run without {name} left out"):
        dp.sample_prior(Program.of(model), new[0])


def test_a_tuple_keeps_its_order_in_a_check() -> None:
    def model(y: Tensor, x: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("obs", dist.Normal(b * x, 0.3), obs=y)

    data = (2 * X + 0.3 * torch.randn(X.shape, generator=torch.Generator().manual_seed(0)), X)
    posterior = svi(Program.of(model, "normal"), data, epochs=800, progress=False, compile=False, seed=0)
    assert dp.check(posterior, data).verdict != "fail"


def scaled(x: Any, y: Any = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (([1.0, 2.0, 3.0], (1.0, 2.0, 3.0)), r"site 'y' observes a tuple, .* Give one number per row as a list"),
        (((1.0, 2.0, 3.0), (1.0, 2.0, 3.0)), r"'x' is a tuple, .* Give one number per row as a list"),
        ((1.0, 2.0, 3.0), r"takes 2 arguments \(x, y\); data has 3 parts\. .* one argument of numbers is a list"),
        (([[1.0, 2.0], [3.0]], [1.0, 2.0]), r"'x' is a list of 2 parts of unequal length.*variable_length=True"),
        ({"x": [[1.0, 2.0], [3.0]], "y": [1.0, 2.0]}, r"'x' is a list of 2 parts of unequal length.*variable_length"),
    ],
)
def test_tuples_of_numbers_and_ragged_lists_are_named(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        svi(Program.of(scaled, "normal"), data, steps=2, progress=False)
