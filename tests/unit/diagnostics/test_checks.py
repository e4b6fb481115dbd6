"""Every question by itself, on arrays."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from deepprob.diagnostics import CHECKS, Check
from deepprob.diagnostics.check import jsonable, number, worst
from deepprob.diagnostics.checks.calibration import bins_of, calibration, coverage, ece
from deepprob.diagnostics.checks.collapse import explained, used_codes
from deepprob.diagnostics.checks.convergence import levelled_off, settled
from deepprob.diagnostics.checks.khat import importance, khat_limit, row_importance
from deepprob.diagnostics.checks.novelty import noticed
from deepprob.diagnostics.checks.predictive import look_alike
from deepprob.diagnostics.checks.replicates import joint_p, two_sided
from deepprob.diagnostics.checks.scores import brier, crps, skill
from deepprob.diagnostics.checks.steps import applied_steps
from deepprob.diagnostics.checks.tightness import bound_gap, bounds
from deepprob.posteriors.history import History


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_a_check_needs_a_known_verdict() -> None:
    with pytest.raises(ValueError, match=r"unknown verdict 'passed'\. Did you mean 'pass'"):
        Check("a", 0.0, None, None, "passed", "")  # type: ignore[arg-type]


def test_registry_names_are_those_of_its_entries() -> None:
    assert all(name == question.name for name, question in CHECKS.items())
    assert all(question.question.endswith("?") for question in CHECKS.values())


def test_worst_and_number() -> None:
    assert worst(["pass", "fail", "caution"]) == "fail"
    assert number(1.5, 0.0) == "1.500 ± 0.000"
    assert number(float("nan"), 1.0) == "nan"
    assert number(123456.0) == "1.23e+05"


def test_everything_becomes_json() -> None:
    values = {"t": torch.tensor([1.0, float("nan")]), "n": np.float64("inf"), 3: {None}, "o": torch.float32}
    text = json.dumps(jsonable(values), allow_nan=False)
    assert json.loads(text) == {"t": [1.0, None], "n": None, "3": [None], "o": "torch.float32"}


class TestSteps:
    @pytest.mark.parametrize(("bad", "verdict"), [(0, "pass"), (1, "pass"), (5, "caution"), (20, "fail")])
    def test_verdict(self, bad: int, verdict: str) -> None:
        check = applied_steps(np.arange(100) >= 100 - bad)
        assert check.verdict == verdict and check.details["skipped"] == bad
        assert bool(check.next_step) == (verdict != "pass")


class TestConvergence:
    def test_rising_falling_and_level(self, rng: np.random.Generator) -> None:
        noise, time = rng.normal(size=2000), np.arange(2000)
        assert levelled_off(noise, scale=0.1).verdict == "pass"
        rising, falling = (levelled_off(noise + s * time / 1000, scale=0.1) for s in (1, -1))
        assert rising.verdict == falling.verdict == "caution"
        assert "rose" in rising.reading and "more epochs" in rising.next_step
        assert "fell" in falling.reading and "falls" in falling.next_step
        assert levelled_off(noise + time / 100, scale=0.1).verdict == "fail"

    def test_a_change_that_does_not_matter_is_no_matter_how_sure(self) -> None:
        assert levelled_off(np.linspace(0, 0.01, 1000), scale=0.1).verdict == "pass"

    def test_an_elbo_that_wanders_without_trend_is_seen(self, rng: np.random.Generator) -> None:
        time = np.linspace(0, 1, 2000)
        check = levelled_off(rng.normal(size=2000) + 2 * np.cos(4 * np.pi * (time - 0.5)) * (time > 0.5), scale=0.1)
        assert check.verdict == "caution" and check.details["rhat"] > 1.1

    def test_a_constant_and_a_short_one_and_one_with_gaps(self) -> None:
        assert levelled_off(np.full(100, -3.0)).value == 0.0
        short = levelled_off(np.zeros(10))
        assert short.verdict == "caution" and "too short" in short.reading
        gaps = np.where(np.arange(1000) % 7 == 0, np.nan, 0.5)
        assert levelled_off(gaps).verdict == "pass"

    def test_warm_up_is_left_out_and_epochs_are_averaged(self) -> None:
        steps = np.concatenate([np.full(20, 99.0), np.tile([1.0, 3.0], 40)])
        weights = [0.1 * i for i in range(1, 10)] + [1.0] * 41
        history = History({"elbo": steps.tolist()}, {"kl_weight": weights}, steps_per_epoch=2)
        assert settled(history).tolist() == [99.0] + [2.0] * 40


class TestBounds:
    def test_rise_with_particles(self, rng: np.random.Generator) -> None:
        sequence = bounds(rng.normal(size=(1000, 20)))
        assert list(sequence) == [1, 10, 100, 1000]
        means = [v.mean() for v in sequence.values()]
        assert means == sorted(means)

    def test_gap_of_gaussian_weights_is_half_their_variance(self, rng: np.random.Generator) -> None:
        check = bound_gap(rng.normal(scale=0.6, size=(1000, 200)))
        assert check.value == pytest.approx(0.18, abs=4 * (check.se or 0) + 0.005)

    def test_verdicts(self, rng: np.random.Generator) -> None:
        weights = rng.normal(scale=1.5, size=(200, 100))
        assert bound_gap(weights, information=10.0).verdict == "pass"
        assert bound_gap(weights, information=2.0).verdict == "caution"
        assert bound_gap(weights / 2, information=0.1).verdict == "caution"
        assert bound_gap(4 * weights, information=1.0).verdict == "fail"
        assert bound_gap(weights[:, :1]).se is None


class TestKhat:
    def test_limit_depends_on_the_number_of_draws(self) -> None:
        assert khat_limit(200) < khat_limit(1000) < khat_limit(10**6) == 0.7

    def test_good_and_bad_weights(self, rng: np.random.Generator) -> None:
        good, bad = importance(0.3 * rng.normal(size=1000)), importance(1.2 * rng.exponential(size=1000))
        assert (good.verdict, bad.verdict) == ("pass", "caution")
        assert good.details["effective_draws"] > 800
        rows = row_importance(1.2 * rng.exponential(size=(200, 30)))
        assert rows.verdict == "caution" and rows.value > 0.8
        json.dumps(rows.to_dict(), allow_nan=False)


class TestCodes:
    def test_share_is_that_of_the_variance(self, rng: np.random.Generator) -> None:
        centre = rng.normal(size=(5000, 2)) * [1.0, 2.0]
        share, se = explained(centre + rng.normal(size=(20, 5000, 2)))
        assert np.abs(share - [0.5, 0.8]).max() < 4 * se.max()

    def test_verdicts(self, rng: np.random.Generator) -> None:
        noise = rng.normal(size=(100, 300, 4))
        active = rng.normal(size=(300, 4))
        verdicts = [used_codes(noise + active * (np.arange(4) < n)).verdict for n in (0, 1, 2, 4)]
        assert verdicts == ["fail", "caution", "pass", "pass"]
        check = used_codes(noise + active, np.full(4, 0.5))
        assert "4 of 4" in check.reading and "2 nats" in check.reading


class TestReplicates:
    def test_p_is_one_in_the_middle_and_small_outside(self) -> None:
        drawn = np.arange(99.0)[:, None]
        assert two_sided([49.0], drawn).tolist() == [1.0]
        assert two_sided([-1.0], drawn) == pytest.approx(0.02)
        assert joint_p([500.0], drawn) == pytest.approx(0.01)

    def test_statistics_that_never_vary_say_nothing(self) -> None:
        assert joint_p([1.0, 1.0], np.ones((50, 2))) == 1.0


class TestCalibration:
    def test_bins_hold_equal_numbers(self, rng: np.random.Generator) -> None:
        assert np.bincount(bins_of(rng.random(150), 15)).tolist() == [10] * 15
        assert bins_of(rng.random(3), 15).tolist() != [0, 0, 0]

    def test_ece_shapes(self, rng: np.random.Generator) -> None:
        confidence = rng.random(40)
        for batch in ((), (1,), (3, 2)):
            assert ece(confidence, rng.random((*batch, 40)) < 0.5).shape == batch

    def test_tendency_is_named(self, rng: np.random.Generator) -> None:
        p = np.stack([np.full(1000, 0.95), np.full(1000, 0.05)], 1)
        again = (rng.random((100, 1000)) > 0.95) * 1
        bold = calibration(p, rng.random(1000) > 0.6, again)
        assert bold.verdict == "fail" and "over-confident" in bold.reading and "ensemble" in bold.next_step
        shy = calibration(p, np.zeros(1000), again)
        assert shy.verdict == "caution" and "under-confident" in shy.reading

    def test_intervals_of_several_outputs(self, rng: np.random.Generator) -> None:
        y, again = rng.normal(size=(300, 2)), rng.normal(size=(200, 300, 2))
        ends = np.full((300, 2), -0.6745), np.full((300, 2), 0.6745)
        check = coverage(y, {0.5: ends}, again)
        assert check.verdict == "pass" and check.details["coverage"]["0.5"] == pytest.approx(0.5, abs=0.1)
        narrow = coverage(3 * y, {0.5: ends}, again)
        assert narrow.verdict == "fail" and "too narrow" in narrow.reading
        assert "too wide" in coverage(y / 3, {0.5: ends}, again).reading


class TestScores:
    def test_crps_of_a_normal(self, rng: np.random.Generator) -> None:
        # The CRPS of a standard normal at its mean is (sqrt(2) - 1) / sqrt(pi)
        assert crps(rng.normal(size=(20000, 1)), [0.0])[0] == pytest.approx(0.2337, abs=0.005)

    def test_brier(self) -> None:
        assert brier([[0.5, 0.5]], [1]).tolist() == [0.5]

    def test_skill(self, rng: np.random.Generator) -> None:
        base = rng.normal(size=200) + 2
        assert skill(base + 0.01 * rng.normal(size=200), base).verdict == "pass"
        assert "worse" in skill(base + 0.3 + 0.1 * rng.normal(size=200), base).reading


class TestPredictive:
    def test_a_sure_but_tiny_difference_passes(self, rng: np.random.Generator) -> None:
        drawn = {"mean": 1e-4 * rng.normal(size=200)}
        check = look_alike({"mean": np.array([0.01])}, drawn, {"mean": 1.0})
        assert check.verdict == "pass" and check.value < 0.01 and "too small" in check.reading
        assert look_alike({"mean": np.array([0.3])}, drawn, {"mean": 1.0}).verdict == "caution"

    @pytest.mark.parametrize(("name", "word"), [("residual", "noise"), ("max", "extremes"), ("mean", "prior")])
    def test_advice_is_for_what_is_odd(self, rng: np.random.Generator, name: str, word: str) -> None:
        drawn = {n: rng.normal(size=200) for n in ("residual", "max", "mean")}
        seen = {n: np.array([20.0 * (n == name)]) for n in drawn}
        assert word in look_alike(seen, drawn, dict.fromkeys(seen, 1.0)).next_step


class TestNovelty:
    def test_auroc_is_the_share_of_pairs(self, rng: np.random.Generator) -> None:
        a, b = rng.normal(size=30), rng.normal(size=40) + 0.5
        assert noticed(a, b).value == pytest.approx((b[:, None] > a).mean())

    def test_verdicts(self, rng: np.random.Generator) -> None:
        a = rng.normal(size=300)
        verdicts = [noticed(a, rng.normal(size=300) + shift).verdict for shift in (3.0, 0.5, -1.0)]
        assert verdicts == ["pass", "caution", "fail"]

    def test_se_is_that_of_repeated_samples(self, rng: np.random.Generator) -> None:
        checks = [noticed(rng.normal(size=100), rng.normal(size=100) + 1) for _ in range(300)]
        assert np.mean([c.se for c in checks]) == pytest.approx(np.std([c.value for c in checks]), rel=0.15)
