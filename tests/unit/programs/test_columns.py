"""Names of columns: stored with the fit, compared at every later door, saved and loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import deepprob as dp
from deepprob.data.frames import frame_of
from deepprob.inference import extend, svi
from deepprob.models import BayesianNeuralNetwork, DeepMarkovModel
from deepprob.posteriors.posterior import Posterior

RNG = np.random.default_rng(0)
X = pd.DataFrame({"age": RNG.normal(40, 9, 60), "height": RNG.normal(1.7, 0.1, 60), "weight": RNG.normal(70, 8, 60)})
Y = pd.Series(X["age"] * 0.1 - X["height"] + RNG.normal(0, 0.1, 60), name="score")
SWAPPED = X[["weight", "age", "height"]]
MORE = pd.concat([pd.DataFrame({"id": [*range(60)]}), SWAPPED], axis=1)
RNG_COLUMNS = {"mood": RNG.normal(size=20), "sleep": RNG.normal(size=20)}
RENAMED = X.rename(columns={"height": "heigth"})


def line(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)


def nested(group: dict[str, Tensor], y: Tensor | None = None) -> None:
    line(group["x"], y)


def fit(program: dp.Program, data: Any) -> Posterior:
    return svi(program, data, steps=40, batch_size=None, compile=False, progress=False)


def network() -> dp.Program:
    return BayesianNeuralNetwork(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))


PROGRAMS: dict[str, tuple[Callable[[], dp.Program], Callable[[Any], Any]]] = {
    "tuple": (lambda: dp.Program.of(line, "normal", data_plate="data"), lambda x: (x, Y)),
    "dict": (lambda: dp.Program.of(line, "normal"), lambda x: {"y": Y, "x": x}),
    "nested": (lambda: dp.Program.of(nested, "normal"), lambda x: ({"x": x}, Y)),
    "network": (network, lambda x: (x, Y.to_frame())),
}


@pytest.fixture(scope="module", params=PROGRAMS)
def case(request: pytest.FixtureRequest) -> tuple[Posterior, Callable[[Any], Any]]:
    program, data = PROGRAMS[request.param]
    return fit(program(), data(X)), data


DOORS: dict[str, Callable[[Posterior, Any], Any]] = {
    "predict": lambda p, data: p.predict(data, draws=3).draws,
    "sample": lambda p, data: p.sample(data, draws=3)[next(iter(p.latent_sites))],
    "log_likelihood": lambda p, data: p.log_likelihood(data, draws=3),
    "log_evidence": lambda p, data: p.log_evidence(data, particles=3),
    "check": lambda p, data: torch.tensor([c.value for c in dp.check(p, data, draws=10, particles=10).checks]),
    "extend": lambda p, data: extend(p, data, steps=2, progress=False).history.steps["elbo"],
    "to_arviz": lambda p, data: np.asarray(next(iter(p.to_arviz(data, draws=3)["constant_data"].data_vars.values()))),
}


@pytest.mark.parametrize("door", DOORS)
def test_other_orders_and_further_columns_give_the_same_answers(case: Any, door: str) -> None:
    posterior, data = case
    plain, more = (torch.as_tensor(DOORS[door](posterior, data(x))) for x in (X, MORE))
    torch.testing.assert_close(plain, more, equal_nan=True, rtol=0, atol=0)


def test_arrays_are_taken_in_the_order_of_the_fit(case: Any) -> None:
    posterior, data = case
    first, *others = (
        DOORS["predict"](posterior, data(x)) for x in (X, SWAPPED, X.to_numpy(), pd.DataFrame(X.to_numpy()))
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("door", DOORS)
def test_a_missing_column_is_named_with_the_nearest_one(case: Any, door: str) -> None:
    posterior, data = case
    with pytest.raises(ValueError, match=r"lacks the column 'height', which the fit had\. Rename 'heigth' if it is"):
        DOORS[door](posterior, data(RENAMED))


def test_held_out_columns_follow_their_names() -> None:
    program, data = PROGRAMS["tuple"]
    scores = []
    for x in (X, SWAPPED):
        posterior = svi(program(), data(X), epochs=3, held_out=data(x), compile=False, progress=False)
        scores.append(posterior.history.epochs["held_out_log_likelihood"])
    assert scores[0] == scores[1]
    with pytest.raises(ValueError, match="lacks the column 'height'"):
        svi(program(), data(X), epochs=1, held_out=data(RENAMED), progress=False)


def test_columns_are_saved_and_loaded_and_old_folders_still_load(case: Any, tmp_path: Path) -> None:
    posterior, data = case
    posterior.save(tmp_path / "new")
    program = None if type(posterior.program).registry_name and posterior.program.config else posterior.program
    loaded = Posterior.load(tmp_path / "new", program)
    torch.testing.assert_close(loaded.predict(data(MORE)).draws, posterior.predict(data(X)).draws, rtol=0, atol=0)
    with pytest.raises(ValueError, match="lacks the column 'height'"):
        loaded.predict(data(RENAMED))


def test_a_folder_without_columns_takes_any_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program, data = PROGRAMS["tuple"]
    posterior = fit(program(), data(X))
    from deepprob.posteriors import saving

    def earlier(specs: Any) -> Any:
        return [{k: v for k, v in row.items() if k != "columns"} for row in json.loads(json.dumps(rows_of(specs)))]

    rows_of = saving.specs_to_json
    monkeypatch.setattr(saving, "specs_to_json", earlier)
    posterior.save(tmp_path / "old")
    loaded = Posterior.load(tmp_path / "old", program())
    assert loaded.predict(data(RENAMED), draws=2).draws.shape == (2, 60)


def test_coordinates_of_an_export_follow_the_order_of_the_fit() -> None:
    program, data = PROGRAMS["tuple"]
    found = fit(program(), data(X)).to_arviz(data(MORE), draws=2)["constant_data"]["x"]
    assert [*found.coords["x_column"].values] == ["age", "height", "weight"]


def test_a_fit_on_an_array_takes_frames_of_any_names() -> None:
    program, data = PROGRAMS["tuple"]
    assert fit(program(), data(X.to_numpy())).predict(data(RENAMED), draws=2).draws.shape == (2, 60)


def test_a_column_that_comes_twice_is_refused() -> None:
    program, data = PROGRAMS["tuple"]
    twice = pd.concat([X, X[["age"]]], axis=1)
    with pytest.raises(ValueError, match=r"'x' has several columns 'age'\. Rename or drop all but one"):
        fit(program(), data(X)).predict(data(twice))


class Polars:
    """A frame with the attributes of one of polars that are used."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame, self.columns, self.shape = frame, [*frame.columns], frame.shape

    def __dataframe__(self) -> Any:
        raise AssertionError("polars' own interchange needs pyarrow")

    def get_column(self, name: str) -> pd.Series:
        return self.frame[name]


def test_frames_of_other_libraries_bring_their_names() -> None:
    program, data = PROGRAMS["tuple"]
    posterior = fit(program(), data(Polars(X)))
    assert posterior.instance.inputs[0].columns == ("age", "height", "weight")
    same = [posterior.predict(data(x), draws=3).draws for x in (X, Polars(MORE), SWAPPED)]
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])
    assert [*frame_of(Polars(MORE)).columns] == [*MORE.columns]


def test_frames_of_polars_without_the_interchange_are_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    class DataFrame:
        """A frame of polars 2, which dropped the dataframe interchange, and whose array has no names."""

        def __init__(self, frame: pd.DataFrame) -> None:
            self.frame, self.columns, self.shape = frame, [*frame.columns], frame.shape

        def get_column(self, name: str) -> pd.Series:
            return self.frame[name]

        def __array__(self, *args: Any, **options: Any) -> np.ndarray:
            return self.frame.to_numpy()

    monkeypatch.setitem(sys.modules, "polars", SimpleNamespace(DataFrame=DataFrame))
    program, data = PROGRAMS["tuple"]
    posterior = fit(program(), data(DataFrame(X)))
    same = [posterior.predict(data(x), draws=3).draws for x in (X, DataFrame(SWAPPED))]
    assert torch.equal(*same)
    steps = pd.DataFrame({"who": np.repeat([0, 1], 10), "day": [*range(10)] * 2, **RNG_COLUMNS})
    first, second = (dp.data.sequences(frame, id="who", time="day")["x"] for frame in (steps, DataFrame(steps)))
    assert torch.equal(first, second)


def test_the_report_names_the_column_that_drifts() -> None:
    program, data = PROGRAMS["tuple"]
    posterior = fit(program(), data(X))
    moved = SWAPPED.assign(height=SWAPPED["height"] + 3.0)
    assert "height is at most" in dp.check(posterior, data(moved))["drift of inputs"].reading


TABLE_ROWS = pd.concat([X, Y], axis=1)
LABELLED = X.assign(tall=np.where(X["height"] > 1.7, "yes", "no"))
PARTS: dict[str, Callable[[pd.DataFrame, str], Any]] = {
    "tuple": lambda rows, target: (rows.drop(columns=target), rows[target]),
    "array of the target": lambda rows, target: (rows.drop(columns=target), rows[target].to_numpy()),
    "list of the target": lambda rows, target: (rows.drop(columns=target), [*rows[target]]),
    "frame of the target": lambda rows, target: (rows.drop(columns=target), rows[[target]]),
    "other order": lambda rows, target: (rows.drop(columns=target)[["weight", "age", "height"]], rows[target]),
    "dict": lambda rows, target: {"y": rows[[target]], "x": rows.drop(columns=target)},
}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("rows", "target"), [(TABLE_ROWS, "score"), (LABELLED, "tall")], ids=["numbers", "classes"])
def test_a_frame_beside_its_target_is_encoded_like_the_whole_frame(rows: Any, target: str, parts: str) -> None:
    data = PARTS[parts](rows, target)
    posterior = fit(BayesianNeuralNetwork.from_data(rows, target=target), rows)
    assert torch.equal(posterior.log_likelihood(data, draws=3), posterior.log_likelihood(rows, draws=3))
    assert torch.equal(posterior.predict(data, draws=3).draws, posterior.predict(rows, draws=3).draws)
    again = fit(BayesianNeuralNetwork.from_data(rows, target=target), data)
    assert again.history.steps["elbo"] == posterior.history.steps["elbo"]


def test_a_target_of_another_shape_beside_its_frame_is_refused() -> None:
    posterior = fit(BayesianNeuralNetwork.from_data(TABLE_ROWS, target="score"), TABLE_ROWS)
    assert torch.equal(posterior.predict({"x": X}, draws=3).draws, posterior.predict(X, draws=3).draws)
    with pytest.raises(ValueError, match=r"must have shape \(60, 1\), .*; got \(59,\). Give one value for each row"):
        posterior.log_likelihood((X, Y[1:]))
    with pytest.raises(ValueError, match="the target lacks the column 'score'"):
        posterior.log_likelihood((X, Y.rename("other").to_frame()))


def test_features_of_sequences_are_compared_with_those_of_the_fit(tmp_path: Path) -> None:
    frame = pd.DataFrame({"who": np.repeat([0, 1, 2, 3], 5), "day": [*range(5)] * 4, **RNG_COLUMNS})

    def read(rows: pd.DataFrame, **options: Any) -> Any:
        return dp.data.sequences(rows, id="who", time="day", **options)

    data, swapped = read(frame), frame[["sleep", "mood", "who", "day"]]
    svi(DeepMarkovModel.from_data(data), data, steps=2, progress=False).save(tmp_path)
    posterior = Posterior.load(tmp_path)
    arranged = read(swapped, columns=["mood", "sleep"])
    assert torch.equal(
        posterior.forecast(arranged, steps=2, draws=2).draws, posterior.forecast(data, steps=2, draws=2).draws
    )
    with pytest.raises(
        ValueError, match=r"features sleep, mood; the fit had mood, sleep, .* columns=\['mood', 'sleep'\]"
    ):
        posterior.forecast(read(swapped), steps=2)
    renamed = read(frame.rename(columns={"sleep": "sleeep"}))
    with pytest.raises(ValueError, match=r"sequences lacks the column 'sleep', .* Rename 'sleeep'"):
        dp.check(posterior, renamed)
    with pytest.raises(ValueError, match="sequences lacks the column 'sleep'"):
        svi(DeepMarkovModel.from_data(data), data, steps=2, held_out=renamed, progress=False)
