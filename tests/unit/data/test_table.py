"""table: every kind of column, its record, and what is refused."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_iris, load_wine

import deepprob as dp
from deepprob.data import TableEncoding
from deepprob.models import VAE, BayesianNeuralNetwork

N = 60


def penguins(seed: int = 0) -> pd.DataFrame:
    """Measurements, text, an order, dates, booleans and gaps, as a file of a field study has them."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "mass": rng.normal(4000, 600, N).round(),
            "island": rng.choice(["Biscoe", "Dream", "Torgersen"], N),
            "size": pd.Categorical(rng.choice(["S", "M", "L"], N), ["S", "M", "L"], ordered=True),
            "seen": pd.date_range("2008-11-01", periods=N, freq="31h"),
            "ringed": rng.random(N) > 0.4,
            "eggs": rng.integers(0, 3, N),
            "species": rng.choice(["Gentoo", "Adelie", "Chinstrap"], N),
        },
        index=[f"nest {i}" for i in range(N)],
    )
    frame.loc["nest 3":"nest 5", "mass"] = np.nan
    frame.loc["nest 8", "island"] = None
    return frame


def passengers() -> pd.DataFrame:
    """Prices, ages with gaps, cabins, and names that tell nothing."""
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(
        {
            "name": [f"Passenger, Mr. {i}" for i in range(N)],
            "class": rng.choice([1, 2, 3], N),
            "age": np.where(rng.random(N) < 0.2, np.nan, rng.uniform(1, 80, N)),
            "port": rng.choice(["S", "C", "Q"], N, p=[0.8, 0.15, 0.05]),
            "fare": rng.lognormal(3, 1, N),
            "survived": rng.random(N) > 0.6,
        }
    )
    frame["port"] = frame["port"].astype("category")
    return frame


def test_features_are_named_and_standardized() -> None:
    made = dp.table(penguins(), target="species")
    assert made.feature_names == (
        *("mass", "mass=missing", "island=Biscoe", "island=Dream", "island=Torgersen", "island=missing"),
        *("size", "seen", "ringed", "eggs"),
    )
    x = dict(zip(made.feature_names, made["x"].double().T, strict=True))
    for name in ("mass", "size", "seen", "eggs"):
        assert abs(float(x[name].mean())) < 1e-6
        assert abs(float(x[name].std(unbiased=False)) - 1) < 1e-6
    assert x["mass=missing"].sum() == 3
    assert {*x["ringed"].tolist()} == {0.0, 1.0}
    assert bool((x["island=Biscoe"] + x["island=Dream"] + x["island=Torgersen"] == 1).all())
    assert made.encoding.classes == ("Adelie", "Chinstrap", "Gentoo")
    assert made["y"].tolist() == [made.encoding.classes.index(x) for x in penguins()["species"]]
    days = (penguins()["seen"] - penguins()["seen"].mean()).dt.total_seconds().to_numpy() / 86_400
    np.testing.assert_allclose(x["seen"].numpy(), days / days.std(), rtol=1e-4)


def test_the_order_of_levels_and_cycles_of_dates() -> None:
    made = dp.table(penguins(), cyclic={"seen": ["day", "week"]}, ordinal={"eggs": [2, 1, 0]})
    x = dict(zip(made.feature_names, made["x"].double().T, strict=True))
    codes = penguins()["size"].cat.codes.to_numpy().astype(float)
    np.testing.assert_allclose(x["size"].numpy(), (codes - codes.mean()) / codes.std(), rtol=1e-5)
    assert np.corrcoef(x["eggs"].numpy(), penguins()["eggs"])[0, 1] == pytest.approx(-1.0)
    hours = penguins()["seen"].dt.hour.to_numpy()
    np.testing.assert_allclose(x["sine of seen in the day"].numpy(), np.sin(2 * np.pi * hours / 24), atol=1e-5)


@pytest.mark.parametrize("frame", [penguins(), passengers().drop(columns="name")], ids=["penguins", "passengers"])
def test_the_record_is_json_and_encodes_alike(frame: pd.DataFrame) -> None:
    made = dp.table(frame, min_count=5)
    again = TableEncoding.from_json(json.loads(json.dumps(made.encoding.to_json())))
    assert again == made.encoding
    assert torch.equal(again.encode(frame.sample(frac=1.0, axis=1, random_state=0))["x"], made["x"])
    assert torch.equal(again.encode(frame.iloc[5:9])["x"], made["x"][5:9])


def test_rows_keep_their_weights_and_index() -> None:
    made = dp.table(penguins(), "eggs", weights=np.arange(N) + 1.0)
    first, second = made.split(0.5)
    assert isinstance(first, dp.Table)
    assert len(first) + len(second) == N
    assert first.weights is not None
    assert [f"nest {int(w) - 1}" for w in first.weights] == [*first.index]
    assert made.to("cpu").rows(-1).index[0] == "nest 59"


def test_rare_categories_share_a_feature_and_take_unseen_ones() -> None:
    frame = passengers().drop(columns="name")
    made = dp.table(frame, "survived", min_count=10)
    assert [n for n in made.feature_names if n.startswith("port")] == ["port=S", "port=rare"]
    other = frame.assign(port="Belfast")
    with pytest.warns(UserWarning, match=r"column 'port' has values that the fit has not seen: 'Belfast'\. .* 'rare'"):
        x = made.encoding.encode(other)["x"]
    assert bool((x[:, made.feature_names.index("port=rare")] == 1).all())


def test_an_unseen_category_is_no_category() -> None:
    made = dp.table(penguins(), "species")
    other = penguins().assign(island="Signy")
    with pytest.warns(UserWarning, match=r"column 'island' has values that the fit has not seen: 'Signy'\. .* no cat"):
        x = made.encoding.encode(other)["x"]
    assert x[:, 2:5].sum() == 0


def test_a_gap_where_the_fit_had_none_is_filled_with_a_warning() -> None:
    made = dp.table(penguins(), "species")
    other = penguins()
    other.loc["nest 0", "eggs"] = np.nan
    with pytest.warns(UserWarning, match=r"column 'eggs' has 1 gap and had none in the fit; filled with 1\."):
        made.encoding.encode(other)


def test_constant_columns_are_left_out_with_one_warning() -> None:
    with pytest.warns(UserWarning, match=r"make no feature: 'year', 'empty'. Leave them out: drop=\['year', 'empty'\]"):
        made = dp.table(penguins().assign(year=2009, empty=None), "species")
    assert not [name for name in made.feature_names if "year" in name or "empty" in name]


def test_class_weights_multiply_row_weights() -> None:
    frame = passengers().drop(columns="name")
    balanced = dp.table(frame, "survived", class_weights="balanced")
    assert balanced.weights is not None
    sums = [float(balanced.weights[balanced["y"] == c].sum()) for c in (0, 1)]
    assert sums == pytest.approx([N / 2, N / 2])
    both = dp.table(frame, "survived", weights="fare", class_weights={False: 1, True: 3})
    assert both.weights is not None
    expected = frame["fare"].to_numpy() * np.where(frame["survived"], 3, 1)
    np.testing.assert_allclose(both.weights.numpy(), expected, rtol=1e-5)
    assert "fare" not in both.feature_names


@pytest.mark.parametrize("bunch", [load_iris, load_wine], ids=["iris", "wine"])
def test_numbers_and_several_targets(bunch: Any) -> None:
    frame = bunch(as_frame=True).frame
    names = [*frame.columns[:2]]
    made = dp.table(frame, names)
    np.testing.assert_allclose(made["y"].numpy(), frame[names].to_numpy(), rtol=1e-6)
    assert made.encoding.targets == tuple(names)
    assert dp.table(frame, "target")["y"].dtype == torch.int64
    text = frame.assign(target=frame["target"].map({0: "c", 1: "a", 2: "b"}))
    assert dp.table(text, "target").encoding.classes == ("a", "b", "c")


def test_a_frame_without_its_target_is_encoded() -> None:
    made = dp.table(penguins(), "species")
    assert made.encoding.encode(penguins().drop(columns="species")).names == ("x",)
    assert made.encoding.encode(penguins().assign(species=None)).names == ("x",)


GAP = penguins().assign(species=penguins()["species"].where(np.arange(N) > 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dp.table(penguins(), "specie"), "unknown target 'specie'. Did you mean 'species'?"),
        (lambda: dp.table(GAP, "species"), r"target 'species' is missing in 5 rows of 60. Drop them: frame.dropna\("),
        (
            lambda: dp.table(passengers(), "survived"),
            r"column 'name' has 60 different texts .* drop=\['name'\] \(in the command: --drop name\)",
        ),
        (lambda: dp.table(penguins().assign(species="A"), "species"), "must have at least 2 classes; got 'A'"),
        (lambda: dp.table(penguins(), ["species", "mass"]), "several targets must be numbers; 'species' holds classes"),
        (lambda: dp.table(penguins(), "seen"), "the target 'seen' holds dates"),
        (lambda: dp.table(penguins(), drop=["masss"]), "unknown column to drop 'masss'. Did you mean 'mass'"),
        (lambda: dp.table(penguins(), weights="wt"), "unknown column of weights 'wt'"),
        (lambda: dp.table(penguins(), weights=[1.0, 2.0]), r"one number for each of 60 rows; got shape \(2,\)"),
        (lambda: dp.table(penguins(), weights=-np.ones(N)), "finite weights of at least 0; got -1 in row 0"),
        (lambda: dp.table(penguins(), weights=np.zeros(N)), "weights has weight 0 in every row"),
        (lambda: dp.table(penguins(), "mass", class_weights="balanced"), "class_weights needs a target of classes"),
        (lambda: dp.table(penguins(), "species", class_weights="even"), "unknown class_weights 'even'"),
        (lambda: dp.table(penguins(), "species", class_weights={"Gento": 1}), "unknown class .* 'Gento'. Did you mean"),
        (lambda: dp.table(penguins(), "species", class_weights={"Gentoo": 1}), "lacks 'Adelie', 'Chinstrap'"),
        (lambda: dp.table(penguins(), ordinal={"sise": ["S"]}), "unknown ordinal column 'sise'"),
        (
            lambda: dp.table(penguins(), ordinal={"island": ["Dream", "Biscoe"]}),
            "unknown level of 'island' 'Torgersen'",
        ),
        (lambda: dp.table(penguins(), cyclic={"mass": ["day"]}), "column 'mass' has cycles day but holds no dates"),
        (lambda: dp.table(penguins(), cyclic={"seen": ["month"]}), "unknown cycle 'month'"),
        (lambda: dp.table(penguins()[["species"]], "species"), "the frame has no column to predict from"),
        (lambda: dp.table(penguins().iloc[:0]), "the frame has no rows"),
        (lambda: dp.table(penguins().assign(mass=np.inf)), "column 'mass' has 60 infinite values"),
        (lambda: dp.table(pd.concat([penguins()] * 2, axis=1)), "the frame has several columns 'eggs'"),
        (lambda: dp.table(penguins(), "species").encoding.encode(penguins()[["mass"]]), "the frame lacks the columns"),
        (
            lambda: dp.table(penguins(), "species").encoding.encode(penguins().assign(mass="heavy")),
            "column 'mass' must hold numbers; got 'heavy'",
        ),
        (
            lambda: dp.table(penguins(), "species").encoding.encode(penguins().assign(seen=3)),
            "column 'seen' must hold dates",
        ),
        (
            lambda: dp.table(penguins(), "species").encoding.encode(penguins().assign(mass=pd.Timestamp("2020"))),
            r"column 'mass' must hold numbers; got .* \(dates are no numbers\)",
        ),
        (
            lambda: encoded_flag(["yes", "no"]),
            r"column 'flag' must hold True and False; .*\('yes' is neither of them\)",
        ),
        (lambda: encoded_flag([True, 0.5]), r"column 'flag' must hold True and False; .*\('0.5' is neither of them\)"),
        (lambda: dp.table(penguins(), "species").encoding.encode(penguins().iloc[:0]), "the frame has no rows"),
        (
            lambda: dp.table(penguins().assign(mass=np.linspace(1, 1e300, N)), "species"),
            r"column 'mass' has values up to 1e\+300, whose standard deviation no float can hold. Divide it",
        ),
        (
            lambda: dp.table(penguins().assign(mass=np.linspace(1, 1e40, N)), "mass"),
            r"the target 'mass' has values up to 1e\+40, beyond those of float32. Divide it",
        ),
        (
            lambda: dp.table(penguins(), "species").encoding.encode(penguins().assign(species="Emperor")),
            "unknown class of 'species' 'Emperor'",
        ),
        (
            lambda: dp.table(TWO, ["a", "b"]).encoding.encode(TWO[["a", "c"]]),
            "the frame lacks the column 'b'",
        ),
        (
            lambda: dp.table(penguins(), "species").encoding.encode(pd.concat([penguins()] * 2, axis=1)),
            "the frame has several columns 'mass'",
        ),
        (
            lambda: dp.table(penguins().rename(columns={"eggs": "island=Dream"})),
            "columns 'island' and 'island=Dream' both make a feature 'island=Dream'. Rename or drop one",
        ),
        (lambda: dp.table(levelled(), "a mass"), r"names of 2 levels, such as \('a', 'mass'\). Join the levels: frame"),
        (
            lambda: dp.table(penguins(), "species").encoding.encode(levelled()),
            "the columns of the frame have names of 2 levels",
        ),
        (lambda: dp.table(TWO.set_axis(range(3), axis=1), target=[0, 1, 0]), "got '0' several times. Make the values"),
        (lambda: dp.table(TWO.set_axis(range(3), axis=1), target=3), "unknown target '3'. Choose from: 0, 1, 2."),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def encoded_flag(values: list[Any]) -> Any:
    """A column that was True and False in the fit, and holds other values later."""
    return dp.table(pd.DataFrame({"flag": [True, False]})).encoding.encode(pd.DataFrame({"flag": values}))


def levelled() -> pd.DataFrame:
    frame = penguins()
    return frame.set_axis(pd.MultiIndex.from_product([["a"], frame.columns]), axis=1)


TWO = pd.DataFrame({"a": [1.0, 2.0], "b": [1.0, 3.0], "c": [0.0, 1.0]})


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.zeros((3, 2)), "table expects a frame of pandas or polars; got ndarray"),
        (penguins().assign(mixed=["a", 1] * 30), "column 'mixed' holds mixed-integer values; expected numbers, text"),
    ],
)
def test_wrong_types_are_refused(frame: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        dp.table(frame)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target": penguins()["mass"]},
            "target must be the name of a column; got values in a Series. Make the values",
        ),
        ({"target": np.zeros(N)}, r"got values in a ndarray. .* frame.assign\(y=values\), target='y'"),
        ({"ordinal": ["island"]}, r"ordinal must be a dict by column; got \['island'\]. Write ordinal={'size': \['sm"),
        ({"ordinal": {"island": "Dream"}}, "ordinal must have the levels of 'island' in a list, .* got 'Dream'"),
        ({"ordinal": {"island": {"Dream"}}}, "levels of 'island' in a list, in ascending order; got {'Dream'}"),
        ({"cyclic": "seen"}, "cyclic must be a dict by column; got 'seen'. Write cyclic={'time': 'day'}"),
        ({"weights": ["mass"]}, r"weights must be numbers, or the name of one column; got \['mass'\]"),
        (
            {"target": "species", "class_weights": [1.0, 2.0]},
            r"class_weights must be 'balanced', or a dict of weights by class; got \[1.0, 2.0\]. .*{'Adelie': 2.0",
        ),
    ],
)
def test_arguments_of_the_wrong_type_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        dp.table(penguins(), **options)


def test_one_name_stands_for_a_list_of_it() -> None:
    made = dp.table(penguins(), "species", drop="island", cyclic={"seen": "day"})
    assert made.encoding == dp.table(penguins(), ["species"], drop=["island"], cyclic={"seen": ["day"]}).encoding
    assert dp.table(penguins(), drop=penguins().columns[:2]).encoding.columns[0].name == penguins().columns[2]


def test_columns_named_by_whole_numbers() -> None:
    numbers = pd.DataFrame(np.random.default_rng(0).random((20, 4)))
    numbers[4] = pd.date_range("2020-01-01", periods=20, freq="7h")
    made = dp.table(numbers, target=0, drop=1, weights=2, cyclic={4: "day"})
    by_text = dp.table(numbers.set_axis([*"01234"], axis=1), target="0", drop=["1"], weights="2", cyclic={"4": ["day"]})
    assert made.encoding == by_text.encoding and made.encoding.targets == ("0",)
    np.testing.assert_allclose(made["y"], numbers[0], rtol=1e-6)
    assert dp.table(numbers, target=np.int64(1)).encoding.targets == ("1",)
    assert dp.table(numbers, target=[0, 1])["y"].shape == (20, 2)


def test_levels_named_like_our_own_features_keep_their_names() -> None:
    frame = pd.DataFrame({"k": [*["missing", "rare", None] * 6, "x", "y"]})
    names = dp.table(frame, min_count=2).feature_names
    assert names == ("k=missing", "k=rare", "k=rare_", "k=missing_")
    program = VAE.from_data(dp.table(frame, min_count=2), latent_dim=1)
    assert program.table is not None and program.table.names == names


def test_no_warning_without_a_cause() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = dp.table(penguins(), "species")
        made.encoding.encode(penguins())


def test_whole_numbers_with_two_values_are_classes_unless_the_user_decides() -> None:
    frame = pd.DataFrame({"a": np.arange(6.0), "label": [2, 10, 2, 10, 10, 2], "stars": [3, 4, 5, 3, 4, 5]})
    made = dp.table(frame, "label", drop=["stars"])
    assert made.encoding.classes == ("2", "10") and made["y"].tolist() == [0, 1, 0, 1, 1, 0]
    assert repr(made) == "Table(6 rows: x (1,) float32, y () int64, 2 classes of 'label': 2, 10)"
    assert dp.table(frame, "label", drop=["stars"], classes=False)["y"].tolist() == frame["label"].tolist()
    assert dp.table(frame.astype({"label": float}), "label").encoding.classes == ()
    assert dp.table(frame, "stars").encoding.classes == ()
    assert dp.table(frame, "stars", classes=True).encoding.classes == ("3", "4", "5")
    assert dp.table(frame, ["label", "stars"]).encoding.classes == ()


@pytest.mark.parametrize(
    ("likelihood", "shown"),
    [
        (None, "likelihood='categorical', num_classes=2, classes=('0', '1')"),
        ("categorical", "likelihood='categorical', num_classes=2, classes=('0', '1')"),
        ("bernoulli", "likelihood='bernoulli', classes=('0', '1')"),
        ("normal", "likelihood='normal'"),
        ("poisson", "likelihood='poisson'"),
    ],
)
def test_the_likelihood_decides_whether_labels_are_classes(likelihood: str | None, shown: str) -> None:
    frame = pd.DataFrame({"a": np.arange(6.0), "label": [0, 1, 0, 1, 1, 0]})
    options = {"likelihood": likelihood} if likelihood else {}
    program = BayesianNeuralNetwork.from_data(frame, target="label", **options)
    assert f"  {shown}" in repr(program).splitlines()
    assert program.accept(frame)[1].dim() == (1 if program.num_classes else 2)
    arrays = BayesianNeuralNetwork.from_data((frame[["a"]], frame["label"]), **options)
    assert arrays.likelihood == program.likelihood and arrays.num_classes == program.num_classes


def test_a_likelihood_of_numbers_needs_a_target_of_numbers() -> None:
    frame = pd.DataFrame({"a": np.arange(6.0), "kind": ["x", "y", "x", "y", "x", "y"]})
    with pytest.raises(
        ValueError, match=r"'normal' is for numbers, but the target 'kind' holds classes: 'x', 'y'\. Leave"
    ):
        BayesianNeuralNetwork.from_data(frame, target="kind", likelihood="normal")
