"""Frames with columns of every kind: predictions in the words of the user; and eight tables up to the report."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import Tensor

import deepprob as dp
from deepprob.data import decode_rows
from deepprob.inference import svi
from deepprob.models import VAE, BayesianNeuralNetwork
from deepprob.posteriors.posterior import Posterior

sys.path.insert(0, str(Path(__file__).parent))
import own_tables

N = 60
RNG = np.random.default_rng(0)
SIZE = RNG.normal(10.0, 2.0, N)
KIND = np.array(["ant", "bee", "cow"])[RNG.integers(0, 3, N)]
GAP = np.arange(N) % 7 == 3
DAYS = pd.to_timedelta(RNG.integers(0, 900, N), unit="D")
PRICE = 2 * SIZE + 5.0 * (KIND == "bee") + RNG.normal(0, 0.5, N)
FRAME = pd.DataFrame({"size": SIZE, "kind": KIND, "price": PRICE}, index=[f"row {i}" for i in range(N)])


def standard(values: Any) -> Any:
    values = np.asarray(values, dtype=np.float64)
    return (values - values.mean()) / values.std()


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    found, expected = (torch.as_tensor(x if isinstance(x, Tensor) else np.array(x)).double() for x in (found, expected))
    torch.testing.assert_close(found, expected.expand(found.shape), atol=tolerance, rtol=0.0)


def fit(program: dp.Program, data: Any, steps: int = 10, learning_rate: float = 0.02) -> Posterior:
    optimizer = dp.Optimizer(learning_rate=learning_rate)
    return svi(program, data, steps=steps, batch_size=None, optimizer=optimizer, seed=0, progress=False, compile=False)


def features(column: Any, **options: Any) -> dict[str, Any]:
    """The features that a column becomes, by name, beside a target."""
    made = dp.table(pd.DataFrame({"c": column}).assign(y=PRICE), target="y", **options)
    return dict(zip(made.feature_names, made["x"].double().numpy().T, strict=True))


@pytest.fixture(scope="module")
def animals() -> Posterior:
    return fit(BayesianNeuralNetwork.from_data(FRAME, target="kind", hidden_dims=(8,)), FRAME)


@pytest.fixture(scope="module")
def prices() -> Posterior:
    return fit(BayesianNeuralNetwork.from_data(FRAME, target="price", hidden_dims=(8,)), FRAME)


# -- kinds of columns -------------------------------------------------------------------------------------------------

WHOLE = RNG.integers(0, 9, N)
NUMBERS: dict[str, Callable[[], Any]] = {
    "int8": lambda: WHOLE.astype(np.int8),
    "uint8": lambda: WHOLE.astype(np.uint8),
    "float16": lambda: WHOLE.astype(np.float16),
    "big-endian": lambda: WHOLE.astype(">i4"),
    "Int64": lambda: pd.array(WHOLE, dtype="Int64"),
    "Float32": lambda: pd.array(WHOLE, dtype="Float32"),
    "objects": lambda: WHOLE.astype(object),
    "whole and real objects": lambda: [float(x) if i % 2 else int(x) for i, x in enumerate(WHOLE)],
    "decimals": lambda: [Decimal(int(x)) for x in WHOLE],
    "durations": lambda: pd.to_timedelta(WHOLE, unit="D"),
    "Unix seconds": lambda: 1_700_000_000 + WHOLE,
    "prices of 1e8": lambda: 1e8 + WHOLE,
}


@pytest.mark.parametrize("form", NUMBERS)
def test_numbers_are_standardized_in_any_form(form: str) -> None:
    found = features(NUMBERS[form]())
    assert [*found] == ["c"]
    close(found["c"], standard(WHOLE))


TEXTS: dict[str, Callable[[], Any]] = {
    "objects": lambda: KIND.astype(object),
    "str": lambda: pd.Series(KIND, dtype="str").to_numpy(object),
    "string": lambda: pd.array(KIND, dtype="string"),
    "category": lambda: pd.Categorical(KIND),
    "category in another order": lambda: pd.Categorical(KIND, ["cow", "ant", "bee"]),
    "category with an unused level": lambda: pd.Categorical(KIND, ["ant", "bee", "cow", "dog"]),
}


@pytest.mark.parametrize("form", TEXTS)
def test_text_becomes_a_feature_a_level_in_any_form(form: str) -> None:
    found = features(TEXTS[form]())
    assert [*found] == ["c=ant", "c=bee", "c=cow"]
    for name, values in found.items():
        close(values, name.removeprefix("c=") == KIND)


DATES: dict[str, Callable[[], Any]] = {
    "dates": lambda: pd.Timestamp("2020-03-01") + DAYS,
    "a zone": lambda: pd.Timestamp("2020-03-01", tz="UTC") + DAYS,
    "another zone": lambda: (pd.Timestamp("2020-03-01", tz="UTC") + DAYS).tz_convert("Asia/Tokyo"),
    "in seconds": lambda: (pd.Timestamp("2020-03-01") + DAYS).as_unit("s"),
    "date objects": lambda: (pd.Timestamp("2020-03-01") + DAYS).date,
}


@pytest.mark.parametrize("form", DATES)
def test_dates_are_days(form: str) -> None:
    close(features(DATES[form]())["c"], standard(DAYS / pd.Timedelta(days=1)))


def test_booleans_are_0_and_1_and_orders_are_positions() -> None:
    large = SIZE > 10
    for column in (large, pd.array(large, dtype="boolean"), large.astype(object)):
        close(features(column)["c"], large)
    levels = ["small", "mid", "big"]
    close(features(pd.Categorical(np.array(levels)[WHOLE % 3], levels, ordered=True))["c"], standard(WHOLE % 3))
    close(features(np.array(levels)[WHOLE % 3], ordinal={"c": levels})["c"], standard(WHOLE % 3))


WITH_GAPS: dict[str, Callable[[], Any]] = {
    "NaN": lambda: pd.Series(SIZE).mask(GAP),
    "Int64": lambda: pd.Series(WHOLE).astype("Int64").mask(GAP),
    "boolean": lambda: pd.Series(SIZE > 10).astype("boolean").mask(GAP),
    "objects": lambda: pd.Series(SIZE > 10).astype(object).mask(GAP),
    "text": lambda: pd.Series(KIND.astype(object)).mask(GAP, None),
    "string": lambda: pd.Series(KIND).astype("string").mask(GAP),
    "category": lambda: pd.Series(pd.Categorical(KIND)).mask(GAP),
    "order": lambda: pd.Series(pd.Categorical(KIND, ordered=True)).mask(GAP),
    "date": lambda: pd.Series(pd.Timestamp("2020-03-01", tz="UTC") + DAYS).mask(GAP),
    "duration": lambda: pd.Series(DAYS).mask(GAP),
}


@pytest.mark.parametrize("form", WITH_GAPS)
def test_gaps_are_filled_and_marked(form: str) -> None:
    column = WITH_GAPS[form]()
    found = features(column)
    close(found.pop("c=missing"), GAP)
    whole = features(column.where(~GAP, column[~GAP].iloc[0]))  # the same column without gaps
    assert [*found] == [*whole]
    values = np.stack([*found.values()])
    assert np.isfinite(values).all()
    assert (values[:, GAP] == values[:, GAP][:, :1]).all()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "mixed objects": (lambda: [1, "a", None] * (N // 3), "column 'c' holds mixed.*drop=\\['c'\\]"),
    "lists": (lambda: [[1, 2]] * N, "column 'c' holds mixed values; expected numbers, text"),
    "a name a row": (lambda: [f"id-{i}" for i in range(N)], r"column 'c' has 60 different texts.*drop=\['c'\]"),
    "infinite": (lambda: np.where(GAP, np.inf, SIZE), "column 'c' has 9 infinite values"),
    "complex": (lambda: SIZE + 1j, "column 'c' holds complex values"),
    "intervals": (lambda: pd.arrays.IntervalArray.from_tuples([(0, 1)] * N), "column 'c' holds interval"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_a_column_of_no_use_is_refused_by_its_name(form: str) -> None:
    column, words = REFUSED[form]
    with pytest.raises((TypeError, ValueError), match=words):
        features(column())


@pytest.mark.parametrize("constant", [3.0, "x", pd.Timestamp("2020-01-01"), True, None], ids=repr)
def test_a_constant_column_is_dropped_with_a_word(constant: Any) -> None:
    with pytest.warns(UserWarning, match=r"without two different values.*'flat'.*drop=\['flat'\]"):
        made = dp.table(FRAME.assign(flat=constant), target="price")
    assert made.feature_names == ("size", "kind=ant", "kind=bee", "kind=cow")


# -- frames that are no tables ----------------------------------------------------------------------------------------

NO_TABLES: dict[str, tuple[Callable[[], Any], str]] = {
    "no rows": (lambda: dp.table(FRAME[:0], target="price"), "the frame has no rows"),
    "two equal names": (lambda: dp.table(FRAME.set_axis(["a", "a", "price"], axis=1), target="price"), "columns 'a'"),
    "an unknown target": (lambda: dp.table(FRAME, target="prize"), "'prize'. Did you mean 'price'"),
    "only a target": (lambda: dp.table(FRAME[["price"]], target="price"), "no column to predict from"),
    "gaps in the target": (
        lambda: dp.table(FRAME.assign(price=FRAME["price"].mask(GAP)), target="price"),
        r"'price' is missing in 9 rows of 60.*dropna\(subset=\['price'\]\)",
    ),
    "one class": (lambda: dp.table(FRAME.assign(kind="ant"), target="kind"), "at least 2 classes; got 'ant'"),
    "one row of a class": (lambda: dp.table(FRAME[:1], target="kind"), "at least 2 classes"),
    "dates as target": (lambda: dp.table(FRAME.assign(t=pd.Timestamp("2020-01-01") + DAYS), target="t"), "holds dates"),
    "classes among targets": (lambda: dp.table(FRAME, target=["kind", "price"]), "several targets must be numbers"),
    "an array": (lambda: dp.table(FRAME[["size"]].to_numpy(), target="y"), r"expects a frame.*ndarray.*pd\.DataFrame"),
    "weights of other length": (lambda: dp.table(FRAME, target="price", weights=[1.0, 2.0]), "each of 60 rows"),
    "negative weights": (lambda: dp.table(FRAME, target="price", weights=-SIZE), "weights must hold finite weights"),
    "an unknown class weight": (
        lambda: dp.table(FRAME, target="kind", class_weights={"ant": 1, "bee": 1, "dog": 2}),
        "'dog'",
    ),
    "no class to weigh": (
        lambda: dp.table(FRAME, target="price", class_weights="balanced"),
        "needs a target of classes",
    ),
}


@pytest.mark.parametrize("form", NO_TABLES)
def test_a_frame_that_is_no_table_is_refused(form: str) -> None:
    make, words = NO_TABLES[form]
    with pytest.raises((TypeError, ValueError), match=words):
        make()


def test_one_row_is_a_table_of_no_feature() -> None:
    with (
        pytest.warns(UserWarning, match="without two different values"),
        pytest.raises(ValueError, match="no column to predict from"),
    ):
        dp.table(FRAME[:1], target="price")


# -- predictions in the user's words ----------------------------------------------------------------------------------


def test_classes_have_names_and_rows_their_index(animals: Posterior) -> None:
    made = animals.predict(FRAME, draws=20)
    shown = made.to_frame()
    assert made.class_names == ("ant", "bee", "cow")
    assert [*shown.columns] == ["class", "prob[ant]", "prob[bee]", "prob[cow]"]
    assert shown.index.equals(FRAME.index)
    assert {*shown["class"]} <= {"ant", "bee", "cow"}
    close(shown.iloc[:, 1:].sum(axis=1), 1.0)


CLASSES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "booleans": (SIZE > 10, ("False", "True")),
    "nullable booleans": (pd.array(SIZE > 10, dtype="boolean"), ("False", "True")),
    "category": (pd.Categorical(KIND, ["cow", "bee", "ant", "unused"]), ("ant", "bee", "cow")),
    "string": (pd.array(KIND, dtype="string"), ("ant", "bee", "cow")),
    "category of numbers": (pd.Categorical(WHOLE % 3 + 1), ("1", "2", "3")),
}


@pytest.mark.parametrize("form", CLASSES)
def test_labels_in_any_form_are_classes(form: str) -> None:
    labels, names = CLASSES[form]
    frame = FRAME.assign(label=labels)[["size", "label"]]
    made = dp.table(frame, target="label")
    assert made.encoding.classes == names
    assert [names[i] for i in made["y"]] == [str(x) for x in np.asarray(labels)]


SAME: dict[str, Callable[[], Any]] = {
    "without the target": lambda: FRAME[["size", "kind"]],
    "a target of gaps": lambda: FRAME.assign(price=np.nan),
    "a target with gaps": lambda: FRAME.assign(price=FRAME["price"].mask(GAP)),
    "a target of text": lambda: FRAME.assign(price="?"),
    "other order": lambda: FRAME[["price", "kind", "size"]],
    "further columns": lambda: FRAME.assign(note="-"),
    "other types": lambda: FRAME.astype({"size": "Float64", "kind": "category"}),
    "a table": lambda: dp.table(FRAME, target="price"),
}


@pytest.mark.parametrize("form", SAME)
def test_later_frames_are_encoded_alike(prices: Posterior, form: str) -> None:
    assert torch.equal(prices.predict(SAME[form](), draws=4).mean, prices.predict(FRAME, draws=4).mean)


def test_a_target_that_is_not_needed_may_hold_anything(animals: Posterior) -> None:
    expected = animals.predict(FRAME[["size", "price"]], draws=4).mean
    for other in (FRAME.assign(kind="dog"), FRAME.assign(kind=FRAME["kind"].where(~GAP, None))):
        assert torch.equal(animals.predict(other, draws=4).mean, expected)
    drawn = animals.sample(FRAME.assign(kind="dog"), draws=2), animals.sample(FRAME, draws=2)
    assert all(torch.equal(value, drawn[1][name]) for name, value in drawn[0].items())
    prior = animals.predict_prior(N, FRAME.assign(kind="dog")), animals.predict_prior(N, FRAME)
    assert torch.equal(prior[0].mean, prior[1].mean)
    with pytest.raises(ValueError, match="unknown class of 'kind' 'dog'"):
        animals.log_likelihood(FRAME.assign(kind="dog"), draws=2)


def test_a_model_of_the_features_alone_does_not_read_the_target(tmp_path: Path) -> None:
    table = dp.table(FRAME, target="kind")
    posterior = fit(VAE.from_data(table, latent_dim=2, hidden_dims=(4,)), table, 3)
    posterior.save(tmp_path / "run")
    for made in (posterior, Posterior.load(tmp_path / "run")):
        expected = made.log_likelihood(FRAME, draws=2)
        assert torch.equal(made.log_likelihood(table, draws=2), expected)
        assert torch.equal(made.log_likelihood(FRAME.assign(kind="dog"), draws=2), expected)
        assert [*made.predict(FRAME.assign(kind=None), draws=2).to_rows().columns] == ["size", "price"]


def test_weights_are_not_needed_to_predict() -> None:
    frame = FRAME.assign(w=1.0 + (SIZE > 10))
    table = dp.table(frame, target="price", weights="w")
    posterior = fit(BayesianNeuralNetwork.from_data(table, hidden_dims=(4,)), table, 3)
    assert torch.equal(posterior.predict(frame.assign(w=np.nan), draws=3).mean, posterior.predict(frame, draws=3).mean)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.predict(FRAME, draws=3)
    with pytest.warns(UserWarning, match="the frame lacks the column of weights 'w': every row counts once"):
        fit(BayesianNeuralNetwork.from_data(table, hidden_dims=(4,)), FRAME, 3)


def test_one_row_of_a_frame_is_a_series(animals: Posterior) -> None:
    one, by_frame = animals.predict(FRAME.iloc[3], draws=4), animals.predict(FRAME.iloc[[3]], draws=4)
    assert one.to_frame().equals(by_frame.to_frame()) and [*one.to_frame().index] == ["row 3"]
    with pytest.raises(ValueError, match="the frame lacks the columns 'size', 'price'"):
        animals.predict(FRAME.iloc[3][["kind"]], draws=4)


def test_rows_in_another_order_beside_a_frame_are_refused(prices: Posterior) -> None:
    other = FRAME["price"].iloc[::-1]
    assert (other.to_numpy() != FRAME["price"].to_numpy()).any()
    for ask in (
        lambda: dp.table(FRAME, target="price", weights=other),
        lambda: prices.log_likelihood(FRAME.drop(columns="price"), other),
        lambda: prices.predict(FRAME, draws=3).log_prob(other),
    ):
        with pytest.raises(ValueError, match="have the labels of the rows in another order"):
            ask()
    assert prices.predict(FRAME, draws=3).log_prob(FRAME["price"]).shape == (N,)


def test_an_array_is_taken_as_encoded_with_a_word(prices: Posterior) -> None:
    encoded = dp.table(FRAME, target="price")["x"].numpy()
    with pytest.warns(UserWarning, match="the fit was of a table, and an array has no columns"):
        found = prices.predict(encoded, draws=4)
    assert found.to_frame()["mean"].tolist() == prices.predict(FRAME, draws=4).to_frame()["mean"].tolist()


def test_a_part_of_the_rows_is_encoded_by_all_rows(prices: Posterior) -> None:
    part = FRAME[FRAME["kind"] == "bee"][::-1]
    expected = prices.predict(FRAME, draws=4).to_frame().loc[part.index, "mean"]
    close(prices.predict(part, draws=4).to_frame()["mean"], expected, 1e-4)


def test_another_frame_is_refused_or_named_in_a_warning(prices: Posterior, animals: Posterior) -> None:
    with pytest.raises(ValueError, match=r"lacks the column 'kind'.*Rename 'kinds'"):
        prices.predict(FRAME.rename(columns={"kind": "kinds"}), draws=3)
    with pytest.raises(ValueError, match="column 'size' must hold numbers; got 'big'"):
        prices.predict(FRAME.assign(size="big"), draws=3)
    with pytest.warns(UserWarning, match=r"column 'kind' has values that the fit has not seen: 'dog'. .*no category"):
        prices.predict(FRAME.assign(kind="dog"), draws=3)
    with pytest.warns(UserWarning, match="column 'size' has 9 gaps and had none in the fit"):
        assert prices.predict(FRAME.assign(size=FRAME["size"].mask(GAP)), draws=3).mean.isfinite().all()
    with pytest.raises(ValueError, match=r"'kind'.*'dog'"):
        dp.check(animals, FRAME.assign(kind="dog"))
    with pytest.raises(ValueError, match="own means and levels"):
        prices.predict(dp.table(FRAME[:30], target="price"), draws=3)


def test_rare_categories_share_a_feature_with_new_ones() -> None:
    rare = FRAME.assign(kind=np.where(np.arange(N) < 2, "yak", KIND))
    made = dp.table(rare, target="price", min_count=3)
    assert made.feature_names == ("size", "kind=ant", "kind=bee", "kind=cow", "kind=rare")
    with pytest.warns(UserWarning, match=r"'emu'. They are encoded as the level 'rare'"):
        later = made.encoding.encode(FRAME[:1].assign(kind="emu"))
    close(later["x"][0, 1:], [0.0, 0.0, 0.0, 1.0])


def test_a_class_that_the_training_rows_lack_is_named() -> None:
    frame = FRAME.assign(kind=np.where(np.arange(N) == N - 1, "yak", KIND))
    posterior = fit(BayesianNeuralNetwork.from_data(frame[:-1], target="kind", hidden_dims=(4,)), frame[:-1], 3)
    with pytest.raises(ValueError, match=r"class of 'kind'.*'yak'.*ant, bee, cow"):
        posterior.log_likelihood(frame, draws=3)
    assert posterior.predict(frame.drop(columns="kind"), draws=3).class_names == ("ant", "bee", "cow")


def test_several_targets_have_names() -> None:
    frame = FRAME.assign(cost=PRICE / 2)
    posterior = fit(BayesianNeuralNetwork.from_data(frame, target=["price", "cost"], hidden_dims=(4,)), frame, 3)
    made = posterior.predict(frame, draws=5)
    assert made.columns == ("price", "cost")
    assert torch.equal(made.mean, posterior.predict(frame.drop(columns="cost"), draws=5).mean)
    assert [*made.to_frame().columns][:5] == ["mean[price]", "sd[price]", "5%[price]", "95%[price]", "mean[cost]"]


def test_labels_of_log_prob_may_be_names(animals: Posterior, prices: Posterior) -> None:
    made = animals.predict(FRAME, draws=5)
    expected = made.log_prob(dp.table(FRAME, target="kind")["y"])
    for labels in (FRAME["kind"], FRAME["kind"].astype("category"), KIND, [*KIND], FRAME[["kind"]], FRAME):
        assert torch.equal(made.log_prob(labels), expected)
    with pytest.raises(ValueError, match=r"unknown class 'dog'. .*Choose from: ant, bee, cow"):
        made.log_prob(FRAME["kind"].replace("cow", "dog"))
    with pytest.raises(ValueError, match="y lacks the column 'kind'"):
        made.log_prob(FRAME[["size"]])
    numbers = prices.predict(FRAME, draws=5)
    expected = numbers.log_prob(torch.tensor(PRICE)[:, None])
    for values in (FRAME["price"], FRAME["price"].astype("Float64"), PRICE, FRAME):
        assert torch.equal(numbers.log_prob(values), expected)
    with pytest.raises(TypeError, match="y holds text, but the classes of the fit have no names"):
        numbers.log_prob(FRAME["kind"])


def test_the_report_names_target_and_classes(animals: Posterior, prices: Posterior) -> None:
    report = dp.check(animals, FRAME)
    assert [*report.scores] == ["kind"] and "predictions of kind on data like these" in report.decision
    assert any("share of class bee" in check.reading for check in report.checks)
    (rate,) = [score for score in report.scores["kind"] if score.name == "base rate"]
    assert any(f"always saying {name}, the most" in rate.meaning for name in ("ant", "bee", "cow"))
    assert "units of price" in str(dp.check(prices, FRAME))


def test_rows_of_a_model_of_all_columns_are_in_the_users_words() -> None:
    frame = FRAME.assign(
        price=FRAME["price"].mask(GAP), tame=PRICE > 20, seen=pd.Timestamp("2020-01-01", tz="UTC") + DAYS
    )
    table = dp.table(frame, cyclic={"seen": "year"}, ordinal={"kind": ["ant", "bee", "cow"]}, drop="size")
    posterior = fit(VAE.from_data(table, latent_dim=2, hidden_dims=(8,)), table, 3)
    made = posterior.predict(frame, draws=20)
    shown, drawn = made.to_frame(), made.to_rows(3)
    spans = ("mean", "sd", "5%", "95%")
    assert [*shown.columns] == [
        *(f"{part}[kind]" for part in spans),
        *(f"{part}[price]" for part in spans),
        *("class[price=missing]", "prob[price=missing]"),
        *("class[tame]", "prob[tame]"),
        *(f"{part}[seen]" for part in spans),
    ]
    assert shown.index.equals(FRAME.index) and drawn.index.equals(FRAME.index)
    assert drawn.equals(decode_rows(table.encoding.columns, made.draws[3]).set_index(FRAME.index))
    assert [*drawn.columns] == ["kind", "price", "tame", "seen"] and {*drawn["kind"]} <= {"ant", "bee", "cow"}
    place = table.feature_names.index("price")
    column = table.encoding.columns[1]
    close(shown["mean[price]"], made.mean[:, place] * column.scale + column.center, 1e-4)
    close(shown["sd[price]"], made.sd[:, place] * column.scale, 1e-4)
    assert {*shown["mean[kind]"]} <= {"ant", "bee", "cow"} and shown["class[tame]"].dtype == bool
    assert (shown["5%[seen]"] <= shown["95%[seen]"]).all() and shown["mean[seen]"].dt.year.between(2015, 2026).all()
    with pytest.raises(ValueError, match=r"to_rows needs a model of all columns of a dp.table, but 'y' has no such"):
        fit(BayesianNeuralNetwork.from_data(FRAME, target="price"), FRAME, 1).predict(FRAME).to_rows()


def test_every_door_takes_the_frame_itself(animals: Posterior, tmp_path: Path) -> None:
    program = BayesianNeuralNetwork.from_data(FRAME, target="kind", hidden_dims=(8,))
    made = dp.table(FRAME, target="kind")
    by_frame = svi(program, FRAME, held_out=FRAME[:20], steps=4, seed=0, progress=False, compile=False)
    by_table = svi(program, made, held_out=made.rows(slice(20)), steps=4, seed=0, progress=False, compile=False)
    for ask in (
        lambda p: p.log_likelihood(FRAME, draws=3),
        lambda p: p.log_evidence(FRAME, particles=3),
        lambda p: p.predict(FRAME.assign(kind=None), draws=3).probs,
    ):
        assert torch.equal(ask(by_frame), ask(by_table))
    by_frame.save(tmp_path / "run")
    loaded = Posterior.load(tmp_path / "run")
    pd.testing.assert_frame_equal(loaded.predict(FRAME).to_frame(), by_frame.predict(FRAME).to_frame())
    assert animals.to_arviz(FRAME, draws=3) is not None


def test_the_user_chooses_another_likelihood_for_whole_numbers() -> None:
    frame = FRAME.assign(visits=WHOLE, ill=(SIZE > 10).astype(int))
    shown = {
        name: fit(BayesianNeuralNetwork.from_data(frame, target=target, likelihood=name, hidden_dims=(4,)), frame, 3)
        .predict(frame, draws=20)
        .to_frame()
        for name, target in (("poisson", "visits"), ("bernoulli", "ill"))
    }
    assert [*shown["bernoulli"].columns] == ["class", "prob"]
    assert (shown["poisson"]["5%"] >= 0).all()


def test_a_table_leaves_the_frame_as_it_is() -> None:
    frame, weights = FRAME.assign(size=FRAME["size"].mask(GAP)), np.ones(N)
    before = frame.copy(deep=True)
    dp.table(frame, target="kind", weights=weights, class_weights="balanced")
    pd.testing.assert_frame_equal(frame, before)
    assert (weights == 1).all()


# -- weights of rows --------------------------------------------------------------------------------------------------


def mean_of(x: Tensor, y: Tensor | None = None) -> None:
    m = pyro.sample("m", dist.Normal(20.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(m, 2.0), obs=y)


def test_a_row_of_weight_2_counts_like_two_rows() -> None:
    times = RNG.integers(0, 4, N)
    precision = times.sum() / 4 + 1 / 100
    exact, sd = ((times * PRICE).sum() / 4 + 20 / 100) / precision, precision**-0.5
    weighted = dp.table(FRAME.assign(times=times), target="price", weights="times")
    for data in (
        weighted,
        dp.table(FRAME, target="price", weights=times),
        dp.table(FRAME.loc[np.repeat(FRAME.index, times)], target="price"),
    ):
        m = fit(dp.Program.of(mean_of, "normal", data_plate="data"), data, 200, 0.05).sample(draws=4000)["m"]
        close(m.mean(), exact, 0.3 * sd)
        close(m.std(), sd, 0.2 * sd)
    assert "times" not in weighted.feature_names


def test_balanced_classes_have_equal_shares() -> None:
    frame = pd.DataFrame({"noise": RNG.normal(size=N), "ill": np.arange(N) % 10 == 0})
    shares = []
    for weights in (None, "balanced", {"False": 1.0, "True": 9.0}):
        made = dp.table(frame, target="ill", class_weights=weights)
        posterior = fit(BayesianNeuralNetwork.from_data(made, hidden_dims=(2,)), made, 120, 0.05)
        shares.append(float(posterior.predict(frame).to_frame()["prob[True]"].mean()))
    close(shares, [0.1, 0.5, 0.5], 0.1)


# -- eight tables, from the frame to the report -----------------------------------------------------------------------

IN_ANOTHER_PROCESS = """
import sys
import warnings
import pandas as pd
from deepprob import Posterior
run, frame, out = sys.argv[1:]
Posterior.load(run).predict(pd.read_pickle(frame), draws=40).to_frame().to_pickle(out)
"""


def linear_score(table: own_tables.OwnTable, train: pd.DataFrame, test: pd.DataFrame) -> float:
    """Accuracy of logistic regression, or RMSE of ridge regression, on the same columns."""
    encode = make_column_transformer(
        (make_pipeline(SimpleImputer(), StandardScaler()), make_column_selector(dtype_include="number")),
        (OneHotEncoder(handle_unknown="ignore"), make_column_selector(dtype_exclude="number")),
    )
    model = make_pipeline(encode, LogisticRegression(max_iter=2000) if table.classes else Ridge())
    x, rows = (own_tables.for_scikit_learn(frame.drop(columns=table.target)) for frame in (train, test))
    model.fit(x, train[table.target].astype(str) if table.classes else train[table.target])
    return table.score(pd.Series(model.predict(rows), index=test.index), test)


@pytest.mark.parametrize("name", own_tables.TABLES)
def test_three_lines_lead_from_a_frame_to_a_report(name: str, tmp_path: Path) -> None:
    table = own_tables.TABLES[name]
    train, test = table.parts()
    program = BayesianNeuralNetwork.from_data(train, target=table.target, hidden_dims=(20,))
    posterior = fit(program, train, table.steps)
    report = dp.check(posterior, test, draws=100)

    shown = posterior.predict(test, draws=100).to_frame()
    found, reference = table.score(shown["class" if table.classes else "mean"], test), linear_score(table, train, test)
    if table.classes:
        assert found >= reference - table.margin
    else:
        assert found <= reference * (1 + table.margin)
    assert report.verdict in str(report).lower()
    assert report.to_html().count("<img") >= 2

    posterior.save(tmp_path / "run")
    test.to_pickle(tmp_path / "test.pkl")  # keeps the types of columns
    paths = [str(tmp_path / x) for x in ("run", "test.pkl", "out.pkl")]
    subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, *paths], check=True, timeout=300)
    pd.testing.assert_frame_equal(
        pd.read_pickle(paths[2]), posterior.predict(test, draws=40).to_frame(), check_exact=True
    )
