"""Every check on its own, on arrays."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from deepprob.diagnostics import CHECKS, Check
from deepprob.diagnostics.check import jsonable, number, worst
from deepprob.diagnostics.checks.calibration import check_calibration, check_coverage, ece
from deepprob.diagnostics.checks.collapse import check_active_dimensions, explained_variance
from deepprob.diagnostics.checks.convergence import check_convergence, settled
from deepprob.diagnostics.checks.khat import check_global_khat, check_local_khat
from deepprob.diagnostics.checks.ood import check_detection
from deepprob.diagnostics.checks.p_values import joint_p_value, two_sided_p_values
from deepprob.diagnostics.checks.pit import check_pit
from deepprob.diagnostics.checks.predictive import check_replicates
from deepprob.diagnostics.checks.scores import check_skill
from deepprob.diagnostics.checks.steps import check_steps
from deepprob.diagnostics.checks.tightness import bounds, check_tightness
from deepprob.diagnostics.dependence import (
    AUTOCORRELATION,
    BEND,
    COMPONENT,
    CORRELATION,
    SPREAD,
    autocorrelation,
    of_columns,
    on_predictions,
)
from deepprob.diagnostics.proper_scores import aurc, bins_of, brier, brier_parts, crps, pit, risk_coverage
from deepprob.diagnostics.remedies import AGAINST_COLLAPSE, possible
from deepprob.diagnostics.report import check
from deepprob.fitting.disentangling import Beta, TotalCorrelation
from deepprob.fitting.elbo import ELBO
from deepprob.inference import svi
from deepprob.models import BayesianNeuralNetwork
from deepprob.networks.dense import MLP
from deepprob.posteriors.history import History


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_check_refuses_an_unknown_verdict() -> None:
    with pytest.raises(ValueError, match=r"unknown verdict 'passed'\. Did you mean 'pass'"):
        Check("a", 0.0, None, None, "passed", "")  # type: ignore[arg-type]


def test_registry_keys_are_the_names_of_its_entries() -> None:
    assert all(name == diagnostic.name for name, diagnostic in CHECKS.items())
    assert all(diagnostic.question.endswith("?") for diagnostic in CHECKS.values())


def test_worst_and_number() -> None:
    assert worst(["pass", "fail", "caution"]) == "fail"
    assert number(1.5, 0.0) == "1.5"
    assert number(float("nan"), 1.0) == "nan"
    assert number(123456.0) == "1.23e+05"


def test_jsonable_converts_every_type() -> None:
    values = {"t": torch.tensor([1.0, float("nan")]), "n": np.float64("inf"), 3: {None}, "o": torch.float32}
    text = json.dumps(jsonable(values), allow_nan=False)
    assert json.loads(text) == {"t": [1.0, None], "n": None, "3": [None], "o": "torch.float32"}


class TestSteps:
    @pytest.mark.parametrize(("bad", "verdict"), [(0, "pass"), (1, "pass"), (5, "caution"), (20, "fail")])
    def test_verdict(self, bad: int, verdict: str) -> None:
        check = check_steps(np.arange(100) >= 100 - bad)
        assert check.verdict == verdict and check.details["skipped"] == bad
        assert bool(check.next_step) == (verdict != "pass")


class TestConvergence:
    def test_rising_falling_and_stationary_elbo(self, rng: np.random.Generator) -> None:
        noise, time = rng.normal(size=2000), np.arange(2000)
        assert check_convergence(noise, margin=0.5).verdict == "pass"
        rising, falling = (check_convergence(noise + s * time / 1000, margin=0.5) for s in (1, -1))
        assert rising.verdict == falling.verdict == "caution"
        assert "rose" in rising.reading and "dp.extend" in rising.next_step
        assert "fell" in falling.reading and "Lower the learning rate" in falling.next_step
        assert check_convergence(noise + time / 100, margin=0.5).verdict == "fail"

    def test_noise_that_hides_a_change_is_no_pass(self, rng: np.random.Generator) -> None:
        check = check_convergence(20 * rng.normal(size=2000), margin=0.5)
        assert check.verdict == "caution" and "too noisy to tell" in check.reading

    def test_a_significant_but_irrelevant_change_passes(self) -> None:
        assert check_convergence(np.linspace(0, 0.01, 1000), margin=0.1).verdict == "pass"

    def test_details_hold_rhat(self, rng: np.random.Generator) -> None:
        time = np.linspace(0, 1, 2000)
        wandering = rng.normal(size=2000) + 2 * np.cos(4 * np.pi * (time - 0.5)) * (time > 0.5)
        assert check_convergence(wandering, margin=0.1).details["rhat"] > 1.1

    def test_constant_short_and_incomplete_elbo(self) -> None:
        assert check_convergence(np.full(100, -3.0)).value == 0.0
        short = check_convergence(np.zeros(10))
        assert short.verdict == "caution" and "do not tell" in short.reading
        assert short.measured == short.limit == ""  # no number is shown, and no limit to compare it with
        gaps = np.where(np.arange(1000) % 7 == 0, np.nan, 0.5)
        assert check_convergence(gaps).verdict == "pass"

    def test_settled_drops_the_warm_up_and_averages_epochs(self) -> None:
        steps = np.concatenate([np.full(20, 99.0), np.tile([1.0, 3.0], 40)])
        weights = [0.1 * i for i in range(1, 10)] + [1.0] * 41
        history = History({"elbo": steps.tolist()}, {"kl_weight": weights}, steps_per_epoch=2)
        assert settled(history).tolist() == [99.0] + [2.0] * 40


class TestTightness:
    def test_bounds_rise_with_particles(self, rng: np.random.Generator) -> None:
        sequence = bounds(rng.normal(size=(1000, 20)))
        assert list(sequence) == [1, 10, 100, 1000]
        means = [v.mean() for v in sequence.values()]
        assert means == sorted(means)

    def test_gap_of_gaussian_weights_is_half_their_variance(self, rng: np.random.Generator) -> None:
        check = check_tightness(rng.normal(scale=0.6, size=(1000, 200)))
        assert check.value == pytest.approx(0.18, abs=4 * (check.se or 0) + 0.005)

    def test_the_limit_depends_on_the_number_of_latents_only(self, rng: np.random.Generator) -> None:
        weights = rng.normal(scale=1.5, size=(200, 100))  # a gap of about 1.1 nats
        assert check_tightness(weights, numbers=20).verdict == "pass"
        assert check_tightness(weights, numbers=5).verdict == "caution"
        assert check_tightness(weights, numbers=1).verdict == "fail"
        assert check_tightness(weights[:, :1]).se is None


class TestKhat:
    def test_good_and_bad_weights(self, rng: np.random.Generator) -> None:
        good, bad = check_global_khat(0.3 * rng.normal(size=1000)), check_global_khat(1.2 * rng.exponential(size=1000))
        assert good.verdict == "pass" and bad.verdict in ("caution", "fail")
        assert good.details["effective_draws"] > 800
        rows = check_local_khat(1.2 * rng.exponential(size=(200, 30)))
        assert rows.verdict == "caution" and rows.value > 0.8
        json.dumps(rows.to_dict(), allow_nan=False)

    def test_tail_of_weights_that_are_all_alike(self, rng: np.random.Generator) -> None:
        """The fifth power of a normal has a long tail; at this size no weight differs from the others."""
        weights = 5e-4 * rng.normal(size=1000) ** 5
        small, large = check_global_khat(weights), check_global_khat(100 * weights)
        assert min(small.value, large.value) > 0.7
        assert small.verdict == "pass" and large.verdict in ("caution", "fail")
        by_row = (
            check_local_khat(np.repeat(weights[:, None], 30, 1)),
            check_local_khat(np.repeat(weights[:, None], 30, 1) * 100),
        )
        assert [check.verdict for check in by_row] == ["pass", "caution"]
        assert "differ by" in small.reading


class TestActiveDimensions:
    def test_share_of_explained_variance(self, rng: np.random.Generator) -> None:
        centre = rng.normal(size=(5000, 2)) * [1.0, 2.0]
        share, se = explained_variance(centre + rng.normal(size=(20, 5000, 2)))
        assert np.abs(share - [0.5, 0.8]).max() < 4 * se.max()

    def test_verdicts(self, rng: np.random.Generator) -> None:
        noise = rng.normal(size=(100, 300, 4))
        active = rng.normal(size=(300, 4))
        verdicts = [check_active_dimensions(noise + active * (np.arange(4) < n)).verdict for n in (0, 1, 2, 4)]
        assert verdicts == ["fail", "caution", "pass", "pass"]
        check = check_active_dimensions(noise + active, np.full(4, 0.5))
        assert check_active_dimensions(noise + active, np.full(4, 0.01)).verdict == "fail"
        assert "4 of 4" in check.reading and "2 nats" in check.reading

    def test_collapse_is_named_with_what_prevents_it(self, rng: np.random.Generator) -> None:
        noise = rng.normal(size=(100, 300, 4))
        some = noise + rng.normal(size=(300, 4)) * (np.arange(4) < 1)
        none, part = check_active_dimensions(noise), check_active_dimensions(some)
        assert none.reading.endswith("the posterior has collapsed to the prior.")
        assert part.reading.endswith("the posterior of the other 3 has collapsed to the prior.")
        assert none.next_step == AGAINST_COLLAPSE
        assert AGAINST_COLLAPSE in part.next_step and "reduce latent_dim" in part.next_step

    @pytest.mark.parametrize(
        ("objective", "words"),
        [
            (ELBO(), "callbacks=[dp.KLWarmUp(epochs)]"),
            (TotalCorrelation(beta=6.0), "callbacks=[dp.KLWarmUp(epochs)]"),
            (ELBO(free_bits=0.01), "Raise free_bits, now 0.01 nats"),
            (Beta(20.0), "The KL weighs 20 times: lower beta"),
            (Beta(20.0, capacity=0.1), "Raise the capacity of the codes, now 0.1 nats"),
        ],
    )
    def test_the_remedy_of_a_collapse_is_one_that_the_fit_has_not_tried(
        self, objective: ELBO | TotalCorrelation, words: str
    ) -> None:
        step = f"{AGAINST_COLLAPSE} Or do without."
        found = possible(step, {"routine": "svi", "objective": objective.describe()}, extends=True)
        assert words in found
        assert found.endswith("Or do without.")


class TestPValues:
    def test_p_value_is_one_at_the_median_and_small_outside(self) -> None:
        drawn = np.arange(99.0)[:, None]
        assert two_sided_p_values([49.0], drawn).tolist() == [1.0]
        assert two_sided_p_values([-1.0], drawn) == pytest.approx(0.02)
        assert joint_p_value([500.0], drawn) == pytest.approx(0.01)

    def test_constant_statistics_give_p_value_one(self) -> None:
        assert joint_p_value([1.0, 1.0], np.ones((50, 2))) == 1.0


class TestCalibration:
    def test_bins_have_equal_numbers_of_rows(self, rng: np.random.Generator) -> None:
        assert np.bincount(bins_of(rng.random(150), 15)).tolist() == [10] * 15
        assert bins_of(rng.random(3), 15).tolist() != [0, 0, 0]

    def test_ece_shapes(self, rng: np.random.Generator) -> None:
        confidence = rng.random(40)
        for batch in ((), (1,), (3, 2)):
            assert ece(confidence, rng.random((*batch, 40)) < 0.5).shape == batch

    def test_reading_says_over_or_under_confident(self, rng: np.random.Generator) -> None:
        p = np.stack([np.full(1000, 0.95), np.full(1000, 0.05)], 1)
        again = (rng.random((100, 1000)) > 0.95) * 1
        over = check_calibration(p, rng.random(1000) > 0.6, again)
        assert over.verdict == "fail" and "over-confident" in over.reading and "ensemble" in over.next_step
        under = check_calibration(p, np.zeros(1000), again)
        assert under.verdict == "caution" and "under-confident" in under.reading

    def test_intervals_of_several_outputs(self, rng: np.random.Generator) -> None:
        y, again = rng.normal(size=(300, 2)), rng.normal(size=(200, 300, 2))
        ends = np.full((300, 2), -0.6745), np.full((300, 2), 0.6745)
        check = check_coverage(y, {0.5: ends}, again)
        assert check.verdict == "pass" and check.details["coverage"]["0.5"] == pytest.approx(0.5, abs=0.1)
        narrow = check_coverage(3 * y, {0.5: ends}, again)
        assert narrow.verdict == "fail" and "too narrow" in narrow.reading
        assert "too wide" in check_coverage(y / 3, {0.5: ends}, again).reading


class TestScores:
    def test_crps_of_a_normal(self, rng: np.random.Generator) -> None:
        # The CRPS of a standard normal at its mean is (sqrt(2) - 1) / sqrt(pi)
        assert crps(rng.normal(size=(20000, 1)), [0.0])[0] == pytest.approx(0.2337, abs=0.005)

    def test_brier(self) -> None:
        assert brier([[0.5, 0.5]], [1]).tolist() == [0.5]

    def test_the_parts_of_the_brier_score(self, rng: np.random.Generator) -> None:
        p = rng.dirichlet(np.ones(3), size=4000)
        y = (rng.random((4000, 1)) > p.cumsum(1)).sum(1)
        parts = brier_parts(p, y)
        assert parts.reliability - parts.resolution + parts.uncertainty + parts.within == pytest.approx(
            float(brier(p, y).mean())
        )
        assert parts.reliability < 0.01 < parts.resolution and abs(parts.within) < 0.01
        assert brier_parts(p**3 / (p**3).sum(1, keepdims=True), y).reliability > 0.02

    def test_rows_of_equal_confidence_share_a_bin_whatever_their_order(self, rng: np.random.Generator) -> None:
        y = np.repeat([0, 1], [70, 30])  # sorted, as many files are
        p, replicates = np.full((100, 2), [0.7, 0.3]), (rng.random((200, 100)) < 0.3).astype(int)
        parts = brier_parts(p, y)
        assert parts.reliability == pytest.approx(0, abs=1e-12) == parts.resolution
        found = check_calibration(p, y, replicates)
        assert found.verdict == "pass" and found.details["ece"] == pytest.approx(0, abs=1e-12)
        assert bins_of([0.5, 0.9, 0.5, 0.6], 4).tolist() == [0, 2, 0, 1]

    def test_the_risk_coverage_curve_is_that_of_its_definition(self, rng: np.random.Generator) -> None:
        confidence, wrong = rng.random(50), rng.random(50) < 0.3
        coverage, risk = risk_coverage(confidence, wrong)
        kept = np.argsort(-confidence)[:20]
        assert coverage[19] == 0.4 and risk[19] == pytest.approx(wrong[kept].mean())
        assert aurc(np.ones(50), wrong) == pytest.approx(wrong.mean())
        assert aurc(-1.0 * wrong, wrong) < aurc(np.ones(50), wrong) < aurc(1.0 * wrong, wrong)

    def test_ranks_of_calibrated_counts_are_uniform(self, rng: np.random.Generator) -> None:
        u = pit(rng.poisson(2.0, size=(500, 4000)), rng.poisson(2.0, size=4000))
        assert np.histogram(u, 10, (0, 1))[0] == pytest.approx(400, abs=100)  # 5 sd
        assert pit(rng.poisson(2.0, size=(500, 4000)), rng.poisson(3.0, size=4000)).mean() > 0.6

    def test_ranks_tell_bias_from_width(self, rng: np.random.Generator) -> None:
        draws, again = rng.normal(size=(200, 300)), rng.normal(size=(200, 300))
        ranks, y = pit(draws, again), rng.normal(size=300)
        for target, words in ((y + 1, "too low"), (y - 1, "too high"), (3 * y, "too narrow"), (y / 4, "too wide")):
            assert words in check_pit(pit(draws, target), ranks).reading
        assert check_pit(pit(draws, y), ranks).verdict == "pass"

    def test_predictions_worse_than_the_baseline_fail(self, rng: np.random.Generator) -> None:
        base = rng.normal(size=200) + 2
        assert check_skill(base + 0.01 * rng.normal(size=200), base).verdict == "caution"
        assert check_skill(base - 0.1 + 0.1 * rng.normal(size=200), base).verdict == "pass"
        assert "worse" in check_skill(base + 0.3 + 0.1 * rng.normal(size=200), base).reading

    @pytest.mark.parametrize(("hidden", "smaller"), [((200,), True), ((), False)])
    def test_a_model_larger_than_its_data_is_to_become_smaller(
        self, rng: np.random.Generator, hidden: tuple[int, ...], smaller: bool
    ) -> None:
        x, y = torch.as_tensor(rng.normal(size=(120, 2)), dtype=torch.float32), torch.arange(120) % 2
        program = BayesianNeuralNetwork(
            MLP(2, 2, hidden, "tanh"), "categorical", num_classes=2, prior="normal", prior_scale=1e-3
        )
        posterior = svi(program, (x[:60], y[:60]), steps=600, seed=0, progress=False, compile=False)
        skill = check(posterior, (x[60:], y[60:]), draws=50)["predictive skill"]
        assert skill.verdict == "caution"
        assert ("hidden_dims=(10,)" in skill.next_step) is smaller


class TestPredictive:
    def test_a_significant_but_tiny_difference_passes(self, rng: np.random.Generator) -> None:
        drawn = {"mean": 1e-4 * rng.normal(size=200)}
        check = check_replicates({"mean": np.array([0.01])}, drawn, {"mean": 1.0})
        assert check.verdict == "pass" and check.value < 0.01 and "too small" in check.reading
        assert check_replicates({"mean": np.array([0.3])}, drawn, {"mean": 1.0}).verdict == "caution"

    @pytest.mark.parametrize(
        ("name", "word"),
        [
            ("residual", "noise"),
            ("max", "extremes"),
            ("mean", "prior"),
            (AUTOCORRELATION, "season"),
            (SPREAD, "scale depend"),
            (BEND, "splines"),
            (CORRELATION, "covariance"),
            (f"{COMPONENT} 2", "latent dimensions"),
        ],
    )
    def test_advice_depends_on_the_most_extreme_statistic(self, rng: np.random.Generator, name: str, word: str) -> None:
        drawn = {n: rng.normal(size=200) for n in ("residual", "max", "mean", name)}
        seen = {n: np.array([20.0 * (n == name)]) for n in drawn}
        assert word in check_replicates(seen, drawn, dict.fromkeys(seen, 1.0)).next_step


class TestDependence:
    def test_a_missing_direction_shows_in_shares_and_correlations(self, rng: np.random.Generator) -> None:
        code, noise = rng.normal(size=(1, 300, 1)), 0.3 * rng.normal(size=(41, 300, 4))
        noise[:1, :, :2] += code
        found = of_columns(noise)
        for name in ("variance share of component 1", "largest correlation error"):
            assert found[name][0] > found[name][1:].max() + 0.3

    def test_constant_columns_and_few_rows_have_statistics(self) -> None:
        assert all(np.isfinite(x).all() for x in of_columns(np.zeros((3, 2, 5))).values())
        assert all(np.isfinite(x).all() for x in on_predictions(np.zeros((3, 2)), np.zeros(2)).values())
        assert autocorrelation(np.zeros((3, 1)))[AUTOCORRELATION].tolist() == [0.0, 0.0, 0.0]

    def test_outputs_of_a_row_do_not_count_as_neighbors(self) -> None:
        twins = np.repeat(np.resize([1.0, -1.0], 40), 2).reshape(1, 40, 2)
        assert autocorrelation(twins)[AUTOCORRELATION] == pytest.approx(-39 / 40)

    def test_spread_and_bend_are_told_apart(self, rng: np.random.Generator) -> None:
        m = rng.normal(size=2000)
        grows = on_predictions((np.exp(0.5 * m) * rng.normal(size=2000))[None], m)
        bends = on_predictions((m**2 + rng.normal(size=2000))[None], m)
        assert grows[SPREAD][0] > 0.2 > abs(grows[BEND][0])
        assert bends[BEND][0] > 0.5 > abs(bends[SPREAD][0])


class TestOutOfDistribution:
    def test_auroc_is_the_share_of_pairs(self, rng: np.random.Generator) -> None:
        a, b = rng.normal(size=30), rng.normal(size=40) + 0.5
        assert check_detection(a, b).value == pytest.approx((b[:, None] > a).mean())

    def test_verdicts(self, rng: np.random.Generator) -> None:
        a = rng.normal(size=300)
        verdicts = [check_detection(a, rng.normal(size=300) + shift).verdict for shift in (3.0, 0.5, -1.0)]
        assert verdicts == ["pass", "caution", "fail"]

    def test_standard_error_matches_repeated_samples(self, rng: np.random.Generator) -> None:
        checks = [check_detection(rng.normal(size=100), rng.normal(size=100) + 1) for _ in range(300)]
        assert np.mean([c.se for c in checks]) == pytest.approx(np.std([c.value for c in checks]), rel=0.15)
