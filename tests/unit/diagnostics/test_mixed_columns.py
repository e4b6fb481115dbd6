"""Reports about rows whose columns are of different kinds: every variable is judged by its kind, and named."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.checks.calibration import interval_coverage, probability_calibration
from deepprob.diagnostics.checks.predictive import posterior_predictive
from deepprob.diagnostics.checks.scores import predictive_skill
from deepprob.diagnostics.column_plots import table_columns
from deepprob.diagnostics.prediction_pictures import MAKERS
from deepprob.diagnostics.table_statistics import of_table
from deepprob.distributions import Columns
from deepprob.distributions.columns import Variable
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import VAE
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

NAMES = ("age", "smoker", "island=a", "island=b", "island=c", "visits")


def row(w: Tensor, x: Tensor) -> Columns:
    """A row given an input: every column has a slope."""
    at = x.unsqueeze(-1) * w  # (..., rows, 6)
    return Columns(
        [
            (dist.Normal(at[..., :1], 1.0), [0]),
            (dist.Bernoulli(logits=at[..., 1:2]), [1]),
            (dist.OneHotCategorical(logits=at[..., 2:5]), [2, 3, 4]),
            (dist.Poisson((at[..., 5:] / 2).exp()), [5]),
        ],
        NAMES,
    )


def model(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(torch.zeros(6), 2.0).to_event(1))
    with pyro.plate("data", len(x), dim=-1):
        return pyro.sample("y", row(w, x), obs=y)  # type: ignore[no-any-return]


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = torch.randn(count)
        return x, row(torch.tensor([2.0, 1.5, 1.0, -1.0, 0.0, 1.0]), x).sample()


@pytest.fixture(scope="module")
def predicted() -> Posterior:
    program = Program.of(model, "multivariate_normal", data_plate="data", missing="allow")
    return svi(program, data(300, 0), steps=300, optimizer=Optimizer(learning_rate=5e-2), compile=False)


def checks_of(posterior: Posterior, held: tuple[Tensor, Tensor]) -> dict[str, Any]:
    asked = interval_coverage, probability_calibration, predictive_skill, posterior_predictive
    cases = Case(posterior, held, draws=100).by_site()
    pairs = [(question, case) for question in asked for case in cases if question.applies(case)]
    return {f"{question.name} of {case.site}": question.answer(case, 0.01) for question, case in pairs}


def test_every_variable_of_a_prediction_is_judged_by_its_kind(predicted: Posterior) -> None:
    found = checks_of(predicted, data(200, 1))
    for name in ("age", "visits"):
        assert found[f"interval coverage of y[{name}]"].verdict == "pass"
    for name in ("smoker", "island"):
        assert found[f"calibration of probabilities of y[{name}]"].verdict == "pass"
    for name in ("age", "smoker", "island", "visits"):
        assert found[f"predictive skill of y[{name}]"].verdict == "pass"
        assert found[f"posterior predictive check of y[{name}]"].verdict == "pass"
    assert "interval coverage of y" not in found


def test_a_wrong_column_fails_by_its_name(predicted: Posterior) -> None:
    x, y = data(200, 1)
    y[:, 0] = 3 * y[:, 0]
    y[:, 1] = 1 - y[:, 1]
    found = checks_of(predicted, (x, y))
    assert found["interval coverage of y[age]"].verdict == "fail"
    assert found["predictive skill of y[smoker]"].verdict == "fail"
    assert found["interval coverage of y[visits]"].verdict == "pass"
    assert found["calibration of probabilities of y[island]"].verdict == "pass"


def test_missing_values_of_a_target_do_not_count(predicted: Posterior) -> None:
    x, y = data(200, 1)
    y[:50, 0], y[30:90, 2:5] = math.nan, math.nan
    case = Case(predicted, (x, y), draws=50)
    age, smoker, island, _ = case.by_site()
    assert [each.site for each in case.by_site()] == ["y[age]", "y[smoker]", "y[island]", "y[visits]"]
    assert age.mask is not None and age.mask.sum() == 150 and smoker.mask is None
    assert island.mask is not None and island.mask.sum() == 140 and island.kind == "classes"
    found = checks_of(predicted, (x, y))
    assert {c.verdict for n, c in found.items() if "y[" in n} <= {"pass"}


def test_statistics_of_a_table_are_named_and_ignore_what_does_not_count() -> None:
    rng = np.random.default_rng(0)
    variables = [Variable("age", "real", (0,)), Variable("c", "classes", (1, 2)), Variable("n", "count", (3,))]
    one = rng.integers(0, 2, (40, 30))
    tables = np.stack([rng.normal(size=(40, 30)), one, 1 - one, rng.poisson(2.0, (40, 30))], -1)
    known = np.ones((30, 4), bool)
    known[:5, 0] = False
    changed = tables.copy()
    changed[:, :5, 0] = 1e6
    found, units = of_table(tables, variables, ["age", "c=a", "c=b", "n"], known)
    again, _ = of_table(changed, variables, ["age", "c=a", "c=b", "n"], known)
    assert {"mean of age", "share of c=a", "share of c=b", "share of zeros of n", "max of n"} <= {*found}
    assert "min of n" not in found and units["share of c=a"] == 1.0
    assert units["sd of age"] == pytest.approx(tables[0, 5:, 0].std())
    for name in found:
        np.testing.assert_allclose(found[name], again[name], err_msg=name)


def test_a_table_whose_columns_are_unlike_the_model_fails() -> None:
    """A VAE of independent columns; the check names the column that differs, and passes on its own draws."""
    torch.manual_seed(0)
    kinds = [("real", "age"), ("binary", "smoker"), ("categories", "island", 2), ("count", "visits")]
    one = torch.nn.functional.one_hot(torch.randint(2, (300,)), 2)
    x = torch.cat([torch.randn(300, 1), (torch.rand(300, 1) < 0.3), one, torch.poisson(torch.full((300, 1), 3.0))], 1)
    program = VAE((5,), latent_dim=1, hidden_dims=(), likelihood=kinds)
    posterior = svi(program, x, steps=1, optimizer=Optimizer(learning_rate=1e-6), seed=0, progress=False)
    drawn = posterior.predict_prior(300, draws=1, seed=3).draws[0]
    right = posterior_predictive.answer(Case(posterior, drawn, particles=100), 0.05)
    assert right.verdict == "pass" and "mean of age" in right.details["statistics"]
    drawn[:, 1] = (torch.rand(300) < 0.9).to(drawn.dtype)
    wrong = posterior_predictive.answer(Case(posterior, drawn, particles=100), 0.05)
    assert wrong.verdict == "caution" or wrong.verdict == "fail"
    assert "the most extreme is share of smoker" in wrong.reading and "shares of categories" in wrong.next_step
    drawn[:40, 0], drawn[10:70, 2:4] = math.nan, math.nan
    posterior.program.table.complete.fill_(False)  # type: ignore[union-attr]
    pictures = [p for make in MAKERS for p in make(Case(posterior, drawn, particles=50))]
    assert [p.name for p in pictures] == ["columns"] and "age, smoker, island, visits" in pictures[0].alt


def test_a_plot_has_a_panel_for_every_variable() -> None:
    rng = np.random.default_rng(0)
    variables = [Variable("a very long name of a column of a table", "real", (0,)), Variable("c", "classes", (1, 2))]
    one = rng.integers(0, 2, (5, 30))
    tables = np.stack([rng.normal(size=(5, 30)), one, 1 - one], -1)
    tables[0, :3, 0] = np.nan
    figure = table_columns(tables[0], tables[1:], variables, ["a very long name of a column of a table", "c=x", "c=y"])
    assert [axes.get_title() for axes in figure.axes] == ["a very long name of a column…", "c"]
    assert [t.get_text() for t in figure.axes[1].get_xticklabels()] == ["x", "y"]
