"""Checks that depend on the rows of the fit: leave-one-out, leakage, drift, overfitting, weights; and nan by row."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import deepprob as dp
from deepprob.diagnostics import Case, Check, Diagnostic
from deepprob.diagnostics.baseline import class_baseline, normal_baseline
from deepprob.diagnostics.checks.calibration import check_calibration
from deepprob.diagnostics.checks.drift import check_drift, shifts
from deepprob.diagnostics.checks.leakage import check_leakage
from deepprob.diagnostics.checks.overfitting import check_overfitting
from deepprob.diagnostics.checks.weighting import check_weight
from deepprob.diagnostics.finite import NotFinite, finite_rows
from deepprob.diagnostics.overlap import overlap_of
from deepprob.inference import svi
from deepprob.models import VAE
from deepprob.posteriors.posterior import Posterior
from deepprob.posteriors.training_rows import TrainingRows, columns_of
from deepprob.programs.program import Program

NOISE = torch.Generator().manual_seed(0)
X = torch.randn(120, 2, generator=NOISE)
Y = X.sum(1) + torch.randn(120, generator=NOISE)
TRAIN, TEST = (X[:60], Y[:60]), (X[60:], Y[60:])


def line(x: Tensor, y: Tensor | None = None, weight: float = 1.0) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(x)), pyro.poutine.scale(scale=weight):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    return svi(Program.of(line, "multivariate_normal"), TRAIN, steps=600, progress=False, compile=False, seed=0)


def mixed() -> tuple[Tensor, Tensor]:
    return torch.cat([X[:20], X[60:]]), torch.cat([Y[:20], Y[60:]])


# -- which rows the data are ---------------------------------------------------------------------------------------


def test_a_report_says_which_data_it_was_given(posterior: Posterior, tmp_path: Path) -> None:
    posterior.save(tmp_path / "fit")
    loaded = Posterior.load(tmp_path / "fit", Program.of(line, "multivariate_normal"))
    for p in (posterior, loaded):
        said = [Case(p, data).overlap.words for data in (TRAIN, (X[:20], Y[:20]), mixed(), TEST)]
        assert said == [
            "the training data",
            "a part of the training data",
            "held-out data that share rows with the training data",
            "held-out data",
        ]
    assert dp.check(posterior, TEST, draws=50).facts["judged on"]["data"] == "held-out data"


def test_global_latents_are_judged_on_the_training_data_only(posterior: Posterior) -> None:
    known = [Case(posterior, data).knows_train for data in (TRAIN, mixed(), TEST)]
    assert known == [True, False, False] and Case(posterior, TEST, train=TRAIN).knows_train
    with pytest.raises(
        ValueError, match=r"train must hold the 60 rows of the fit; got 80 rows, 20 of them from the fit"
    ):
        Case(posterior, TEST, train=mixed())


def test_a_posterior_that_does_not_know_its_rows() -> None:
    unknown = overlap_of(None, (X,), 120)
    assert unknown.relation == "unknown" and not unknown.shared.any()
    assert overlap_of(TrainingRows.of((X, Y)), (X,), 120).relation == "unknown"  # other arguments than those of the fit
    assert overlap_of(TrainingRows.of((X,)), (), 1).relation == "unknown"  # data that have no tensor with rows
    assert overlap_of(None, None, 7).relation == "training"


def test_a_program_without_arguments_is_judged_on_its_own_data() -> None:
    held = svi(Program.of(lambda: line(*TRAIN), "normal"), steps=20, progress=False, compile=False)
    assert Case(held, None).overlap.relation == "training" and Case(held, None).knows_train


# -- leave-one-out -------------------------------------------------------------------------------------------------


def test_predictions_of_training_rows_leave_the_row_out(posterior: Posterior) -> None:
    """They are those of a normal regression on the other rows."""
    (case,) = Case(posterior, TRAIN, draws=4000).by_site()
    x, y = (t.double().numpy() for t in TRAIN)
    hat = x @ np.linalg.inv(x.T @ x + np.eye(2)) @ x.T
    fitted, influence = hat @ y, hat.diagonal()
    left_out = y - (y - fitted) / (1 - influence)
    mean = case.prediction.mean.double().numpy()
    assert np.abs(mean - left_out).max() < 0.1 < np.abs(fitted - left_out).max()
    assert np.abs(mean - left_out).mean() < np.abs(fitted - left_out).mean() / 2
    assert case.how == "Rows of the fit have leave-one-out predictions."
    assert case.new_targets(0.001).shape == (4000, 60) and case.left_out is not None


def test_held_out_rows_have_the_plain_predictions(posterior: Posterior) -> None:
    (case,) = Case(posterior, TEST, draws=50).by_site()
    assert case.left_out is None and case.how == ""
    (both,) = Case(posterior, mixed(), draws=50).by_site()
    assert both.left_out is not None and both.left_out.khat.shape == (20,)
    assert both.prediction.mean[20:].tolist() == pytest.approx(case.prediction.mean.tolist(), abs=1e-4)


def test_the_report_says_leave_one_out(posterior: Posterior) -> None:
    report = dp.check(posterior, TRAIN, draws=100)
    for name in ("interval coverage", "predictive skill"):
        assert "leave-one-out predictions" in report[name].reading
        assert "leave-one-out" not in dp.check(posterior, TEST, draws=100)[name].reading
    assert "leave-one-out" not in report["posterior predictive check"].reading


def test_leave_one_out_probabilities_do_not_sort_the_rows_by_their_labels() -> None:
    """Among 20 rows alike, half of them ones, each label has less than one half once its row is left out."""
    labels = np.arange(20) % 2
    p = np.where(labels == 1, 9 / 19, 10 / 19)
    probs, again = np.stack([1 - p, p], 1), (np.random.default_rng(0).random((200, 20)) < 0.5) * 1
    plain = np.full((20, 2), 0.5)
    assert check_calibration(probs, labels, again).verdict == "fail"  # rows of equal probability share a bin
    assert check_calibration(probs, labels, again, order=plain).verdict == "pass"


def test_draws_for_a_level_come_in_chunks(posterior: Posterior) -> None:
    (case,) = Case(posterior, TEST, draws=30).by_site()
    chunks = list(case.replicates_for(0.02))
    assert [chunk.shape for chunk in chunks] == [(30, 60)] * 4  # 2 / 0.02 = 100 replicates
    assert (chunks[0] == case.replicates).all() and not (chunks[1] == chunks[0]).any()


def test_a_level_that_few_draws_cannot_reach_is_reached(posterior: Posterior) -> None:
    narrow = dp.check(posterior, (TEST[0], TEST[0].sum(1) + 2.5 * torch.randn(60, generator=NOISE)), draws=10)
    for name in ("interval coverage", "posterior predictive check"):
        assert narrow[name].verdict == "fail"


# -- values that are not finite ------------------------------------------------------------------------------------


def test_rows_that_are_not_finite_are_named() -> None:
    values = np.zeros((3, 9))
    assert finite_rows(values, "x", range(9), axis=1) is not None
    values[1, [2, 5]] = np.nan, np.inf
    with pytest.raises(NotFinite, match=r"The x is not finite in rows 12, 15 \(of 9, counted from 0\)\."):
        finite_rows(values, "x", np.arange(9) + 10, axis=1)
    with pytest.raises(NotFinite, match=r"in rows 0, 1, 2, 3, 4 and 4 more"):
        finite_rows(np.full(9, np.nan), "x", range(9))
    with pytest.raises(NotFinite, match=r"in row 1 \(of 3"):
        finite_rows([0.0, np.nan], "x", range(3))  # values that are not by row


def test_nan_is_a_fail_that_names_the_rows_and_the_site() -> None:
    def logs(x: Tensor, y: Tensor | None = None) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(b + x.log(), 1.0), obs=y)

    x = torch.rand(50, generator=NOISE) + 0.5
    fit = svi(Program.of(logs, "normal"), (x, x.log()), steps=50, progress=False, compile=False)
    zero = x + 0.1
    zero[3] = 0.0
    report = dp.check(fit, (zero, zero.log().clamp_min(-5)), draws=50, ood=(zero, zero))
    for name in ("interval coverage", "predictive skill", "posterior predictive check", "overfitting"):
        assert report[name].verdict == "fail" and "of y is not finite in row 3 (of 50" in report[name].reading
        assert report[name].details["rows"] == [3] and report[name].next_step
    assert report.verdict == "fail" and not [c for c in report.checks if c.verdict == "pass" and math.isnan(c.value)]
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_value_that_is_nan_never_passes(posterior: Posterior) -> None:
    passed = Check("a", math.nan, None, None, "pass", "Fine.")
    question = Diagnostic("a", "Is it?", lambda case: True, lambda case, level: passed, about="fit")
    answer = question.answer(Case(posterior, TEST), 0.05)
    assert answer.verdict == "fail" and answer.reading.startswith("The value is not a number.")


def test_heavy_tails_without_moments_are_no_nan() -> None:
    def heavy(x: Tensor, y: Tensor | None = None) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Cauchy(b * x, 1.0), obs=y)

    y = dist.Cauchy(X[:, 0], 1.0).sample()
    fit = svi(Program.of(heavy, "normal"), (X[:, 0], y), steps=300, progress=False, compile=False)
    found = dp.check(fit, (X[:, 0], y), draws=50)["posterior predictive check"]
    assert found.verdict == "pass" and math.isfinite(found.details["statistics"]["residual"]["observed"])


# -- the baseline --------------------------------------------------------------------------------------------------


def test_the_baseline_is_that_of_the_training_targets(posterior: Posterior) -> None:
    skill = dp.check(posterior, (TEST[0][:2], TEST[1][:2]), draws=50)["predictive skill"]
    mean, sd = float(TRAIN[1].mean()), float(TRAIN[1].std()) * math.sqrt(1 + 1 / 60)
    expected = -dist.StudentT(59.0, mean, sd).log_prob(TEST[1][:2]).mean()
    assert skill.details["baseline"] == pytest.approx(float(expected), abs=1e-4) and skill.unit == "nats per row"
    residual = TEST[1] - posterior.predict(TEST[0], draws=200).mean
    details = dp.check(posterior, TEST)["predictive skill"].details
    assert details["rmse"] == pytest.approx(float(residual.square().mean().sqrt()), rel=0.01)
    assert details["mae"] == pytest.approx(float(residual.abs().mean()), rel=0.01)
    around = (TEST[1] - mean).square().sum()
    assert details["r2"] == pytest.approx(float(1 - residual.square().sum() / around), abs=0.01)


def test_a_baseline_of_two_rows_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"training targets that are kept apart, or 3 rows that predict each other; got 2"
    ):
        normal_baseline(np.zeros(2), None)
    assert class_baseline(np.array([1]), 2, None).tolist() == [[0.5, 0.5]]


def test_a_classifier_at_the_base_rate_is_a_caution() -> None:
    def churn(x: Tensor, y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=a + 0 * x[..., 0]), obs=None if y is None else y.float())

    x, y = torch.randn(1200, 2, generator=NOISE), (torch.rand(1200, generator=NOISE) < 0.27).long()
    fit = svi(Program.of(churn, "normal"), (x[:600], y[:600]), steps=600, progress=False, compile=False)
    skill = dp.check(fit, (x[600:], y[600:]), draws=50)["predictive skill"]
    assert skill.verdict == "caution" and "no better" in skill.reading
    assert skill.details["accuracy"]["mean"] == skill.details["base_rate"]


# -- leakage, drift, overfitting, weights --------------------------------------------------------------------------


def test_leakage_is_a_caution_and_twins_are_not(posterior: Posterior) -> None:
    leaked = dp.check(posterior, mixed(), draws=50)["data leakage"]
    assert leaked.verdict == "caution" and leaked.value == 0.25 and "20 of 80 rows were in the fit" in leaked.reading
    assert dp.check(posterior, TEST, draws=50)["data leakage"].verdict == "pass"
    assert "data leakage" not in {check.name for check in dp.check(posterior, TRAIN, draws=50).checks}
    table = (torch.rand(400, 3, generator=NOISE) < 0.5).float()
    twins = overlap_of(TrainingRows.of((table[:200],)), (table[200:],), 200)
    assert check_leakage(twins).verdict == "pass" and "as many as by chance" in check_leakage(twins).reading
    assert twins.relation == "held-out" and twins.matches == 200


def test_drift_names_the_column(posterior: Posterior) -> None:
    far = X[60:] + torch.tensor([0.0, 4.0])
    report = dp.check(posterior, (far, far.sum(1)), draws=50)
    drift = report["drift of inputs"]
    assert drift.verdict == "fail" and drift.details["drifted"] == ["x[1]"] and "x[1] is at most" in drift.reading
    assert dp.check(posterior, TEST, draws=50)["drift of inputs"].verdict == "pass"


def test_drift_of_columns_with_repeated_and_missing_values() -> None:
    x = torch.tensor([0.0, 1.0]).repeat(500)
    kept = TrainingRows.of((x,))
    assert kept is not None and kept.summaries[0] is not None
    same, other = (shifts("flag", columns_of(values), kept.summaries[0]) for values in (x[:200], torch.ones(200)))
    assert check_drift(same).verdict == "pass" and check_drift(other).verdict == "caution"
    assert check_drift(other).details["drifted"] == ["flag"]
    assert shifts("flag", np.full((3, 1), np.nan), kept.summaries[0]) == []


def test_overfitting_of_a_network() -> None:
    x = torch.rand(150, 12, generator=NOISE).round()
    fit = svi(VAE((12,), latent_dim=4, hidden_dims=(200,)), x[:30], epochs=400, seed=0, progress=False)
    found = dp.check(fit, x[30:], draws=50)["overfitting"]
    assert found.verdict in ("caution", "fail") and "too close to its own rows" in found.reading
    assert found.unit == "nats per row" and found.details["train"] > found.details["held_out"]


def test_overfitting_is_asked_where_both_scores_are_known(posterior: Posterior) -> None:
    assert dp.check(posterior, TEST, draws=50)["overfitting"].verdict == "pass"
    assert "overfitting" not in {check.name for check in dp.check(posterior, TRAIN, draws=50).checks}
    scores = np.random.default_rng(0).normal(size=300)
    assert [check_overfitting(1.0, scores, 300, rightly=r).verdict for r in (0.0, 0.8)] == ["caution", "pass"]


def test_a_scale_of_the_likelihood_is_named() -> None:
    for weight, word in ((10.0, "narrow"), (0.1, "wide")):
        fit = svi(Program.of(line, "normal"), (*TRAIN, weight), steps=50, progress=False, compile=False)
        found = dp.check(fit, (*TEST, weight), draws=50)["weight of the likelihood"]
        assert found.verdict == "fail" and found.value == pytest.approx(weight) and word in found.reading
        assert "temper" in found.next_step


@pytest.mark.parametrize("batch_size", [None, 10])
def test_a_plate_with_all_rows_has_a_weight_of_one(batch_size: int | None) -> None:
    program = Program.of(line, "normal", data_plate="rows")
    fit = svi(program, TRAIN, steps=20, batch_size=batch_size, progress=False, compile=False)
    assert dp.check(fit, (TEST[0][:7], TEST[1][:7]), draws=50)["weight of the likelihood"].verdict == "pass"


def test_weights_of_values() -> None:
    assert check_weight([1.0, 0.0, 1.0], "y").verdict == "pass"  # a mask
    uneven = check_weight([0.5, 2.0], "y")
    assert "from 0.5 to 2 times" in uneven.reading and uneven.verdict == "caution"
    assert "that of weighted rows" in check_weight([0.5, 1.5], "y").reading
    assert [check_weight(w, "y").verdict for w in (0.2, 0.3, 3.0, 5.0)] == ["fail", "caution", "caution", "fail"]
    assert check_weight(math.nan, "y").verdict == check_weight([0.0], "y").verdict == "fail"
    assert check_weight(1.0, "y", kl_weight=0.1).value == pytest.approx(10.0)


def test_a_warm_up_that_does_not_end_is_named() -> None:
    x = (torch.rand(60, 12, generator=NOISE) < 0.3).float()
    with pytest.warns(UserWarning, match="the KL never reaches its full weight"):
        fit = svi(VAE((12,), latent_dim=2), x, epochs=10, callbacks=[dp.KLWarmUp(epochs=100)], progress=False)
    assert dp.check(fit, x, draws=30, particles=30)["weight of the likelihood"].verdict == "fail"


def test_an_interrupted_fit_is_not_told_to_go_on() -> None:
    def stop(fit: Any) -> None:
        if fit.step >= 60:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"optimizer": dp.Optimizer(learning_rate=1e-4), "progress": False, "compile": False}
    with pytest.warns(UserWarning, match="interrupted"):
        cut = svi(Program.of(line, "normal"), (*TRAIN, 1.0), steps=300, callbacks=[stop], **options)
    whole = svi(Program.of(line, "normal"), (*TRAIN, 1.0), steps=60, **options)
    steps = [dp.check(fit, (*TRAIN, 1.0), draws=50)["ELBO convergence"].next_step for fit in (cut, whole)]
    assert steps == ["Fit again for longer: raise epochs= or steps=.", "Train on: dp.extend(posterior, data)."]
