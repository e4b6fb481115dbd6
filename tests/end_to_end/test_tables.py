"""From a frame to a report in three lines, in the words of the frame, also after a save."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor

import deepprob as dp
from deepprob.inference import svi
from deepprob.models import BayesianNeuralNetwork

N = 120


def birds() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "mass": rng.normal(4000, 500, N),
            "island": rng.choice(["Biscoe", "Dream"], N),
            "seen": pd.to_datetime("2008-11-01") + pd.to_timedelta(rng.integers(0, 900, N), unit="h"),
        },
        index=[f"nest {i}" for i in range(N)],
    )
    heavy = frame["mass"] + 900 * (frame["island"] == "Dream")
    frame["species"] = np.where(heavy > 4700, "Gentoo", np.where(heavy > 4200, "Chinstrap", "Adelie"))
    frame.loc[::17, "mass"] = np.nan
    return frame


def fit(program: dp.Program, data: Any, **options: Any) -> dp.Posterior:
    return svi(program, data, steps=300, progress=False, compile=False, seed=0, **options)


def test_three_lines_from_a_frame_to_a_report(tmp_path: Path) -> None:
    train, test = birds().iloc[:90], birds().iloc[90:]
    program = BayesianNeuralNetwork.from_data(train, target="species", hidden_dims=(8,))
    posterior = fit(program, train, held_out=test)
    report = dp.check(posterior, test)
    assert "accuracy" in str(report)
    posterior.save(tmp_path / "birds")
    loaded = dp.Posterior.load(tmp_path / "birds")
    shuffled = test[["seen", "mass", "island"]]
    for queried in (posterior, loaded):
        prediction = queried.predict(shuffled, draws=50)
        assert prediction.class_names == ("Adelie", "Chinstrap", "Gentoo")
        assert {*prediction.classes} <= {*prediction.class_names}
        frame = prediction.to_frame()
        assert [*frame.columns] == ["class", "prob[Adelie]", "prob[Chinstrap]", "prob[Gentoo]"]
        assert [*frame.index] == [*test.index]
        assert (frame["class"] == test["species"]).mean() > 0.6
    before, after = (x.predict(shuffled, draws=50).probs for x in (posterior, loaded))
    assert torch.equal(before, after)
    before, after = (x.log_likelihood(test, draws=5) for x in (posterior, loaded))
    assert torch.equal(before, after)
    with pytest.raises(ValueError, match="the frame lacks the column 'mass'"):
        loaded.predict(test.drop(columns="mass"))
    with pytest.raises(ValueError, match=r"encoded by its own means and levels.*table\.encoding\.encode"):
        loaded.predict(dp.table(test, "species"))


def test_two_targets_have_their_names() -> None:
    frame = load_diabetes(as_frame=True).frame.iloc[:100].rename(columns={"target": "progression"})
    frame["sex"] = np.where(frame["sex"] > 0, "f", "m")
    made = dp.table(frame, ["progression", "bp"])
    posterior = fit(BayesianNeuralNetwork.from_data(made, hidden_dims=()), made)
    predicted = posterior.predict(frame, draws=20).to_frame()
    assert [*predicted.columns[:2]] == ["mean[progression]", "sd[progression]"]
    assert "95%[bp]" in predicted.columns
    assert np.corrcoef(predicted["mean[progression]"], frame["progression"])[0, 1] > 0.5


def test_a_textbook_program_takes_a_table(tmp_path: Path) -> None:
    frame = birds().drop(columns="seen").dropna()
    frame["wing"] = 190 + 0.01 * (frame["mass"] - 4000)

    def regression(x: Tensor, y: Tensor | None = None) -> None:
        offset = pyro.sample("offset", dist.Normal(190.0, 20.0))
        slope = pyro.sample("slope", dist.Normal(torch.zeros(x.shape[-1]), 10.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(offset + x @ slope, 1.0), obs=y)

    made = dp.table(frame, "wing", drop=["species"])
    posterior = fit(dp.Program.of(regression, "normal"), made, batch_size=None)
    posterior.save(tmp_path / "wings")
    loaded = dp.Posterior.load(tmp_path / "wings", dp.Program.of(regression, "normal"))
    first, again = (x.predict(frame.drop(columns="wing"), draws=20) for x in (posterior, loaded))
    assert torch.equal(first.mean, again.mean)
    assert first.columns == ("wing",)
    assert [*first.to_frame().columns] == ["mean", "sd", "5%", "95%"]
    assert posterior.instance.inputs[0].columns == made.feature_names


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BayesianNeuralNetwork.from_data(birds()), TypeError, r"from_data\(frame, target='column'\)"),
        (lambda: BayesianNeuralNetwork.from_data(dp.table(birds())), ValueError, "the table has no target"),
        (lambda: BayesianNeuralNetwork.from_data(birds(), target="specie"), ValueError, "Did you mean 'species'"),
    ],
)
def test_what_from_data_refuses(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.slow
def test_the_code_of_the_page_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "tables.md"
    space: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(code, str(page), "exec"), space)
    assert {*space["prediction"].classes} == {"Adelie", "Gentoo"}


@pytest.mark.parametrize(
    ("column", "change", "point"),
    [
        ("seen", pd.Timedelta(days=1000), r"seen is at most 2008-1\d-\d\d( \d\d:\d\d)? in"),
        ("mass", 4000.0, r"mass is at most \d+\.?\d*e?.* in"),
    ],
)
def test_drift_speaks_in_the_units_of_the_column(column: str, change: Any, point: str) -> None:
    train = birds().dropna()
    posterior = fit(BayesianNeuralNetwork.from_data(train, target="species", hidden_dims=()), train)
    moved = train.assign(**{column: train[column] + change})
    assert re.search(point, dp.check(posterior, moved, draws=20)["drift of inputs"].reading)
