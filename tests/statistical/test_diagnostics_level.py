"""The diagnostics keep their level on exact posteriors and have power against posteriors known to be wrong.

Seeds are fixed, so no test fails by chance. If a change of the code changes the random draws, a bound on the number
of alarms at the stated rate fails less than once in a thousand times (binomial tail).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from deepprob.data import Split
from deepprob.diagnostics.baseline import normal_baseline
from deepprob.diagnostics.checks.calibration import check_calibration, check_coverage
from deepprob.diagnostics.checks.collapse import check_active_dimensions
from deepprob.diagnostics.checks.convergence import check_convergence
from deepprob.diagnostics.checks.drift import check_drift, shifts
from deepprob.diagnostics.checks.khat import check_global_khat, check_local_khat
from deepprob.diagnostics.checks.leakage import check_leakage
from deepprob.diagnostics.checks.overfitting import check_overfitting
from deepprob.diagnostics.checks.pit import check_pit
from deepprob.diagnostics.checks.predictive import check_replicates, statistics
from deepprob.diagnostics.checks.scores import check_skill
from deepprob.diagnostics.checks.tightness import check_tightness
from deepprob.diagnostics.dependence import autocorrelation, of_columns, on_predictions
from deepprob.diagnostics.overlap import overlap_of
from deepprob.diagnostics.proper_scores import pit
from deepprob.diagnostics.report import Report, check
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from deepprob.posteriors.training_rows import TrainingRows, columns_of
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program

ALARM = ("caution", "fail")


def most_alarms(rate: float, trials: int) -> int:
    """The number of alarms that is exceeded less than once in a thousand times."""
    return int(stats.binom.ppf(0.999, trials, rate))


def alarms(run: Callable[[np.random.Generator], str], trials: int) -> int:
    return sum(run(np.random.default_rng(seed)) in ALARM for seed in range(trials))


def autoregressive(rng: np.random.Generator, steps: int, rho: float) -> np.ndarray:
    noise = rng.normal(size=steps)
    out = np.zeros(steps)
    for t in range(1, steps):
        out[t] = rho * out[t - 1] + noise[t]
    return out


# -- level of every check ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_an_elbo_that_changes_by_the_margin_seldom_passes(rho: float) -> None:
    """The test is one of equivalence: an error is a pass, of at most 5 %."""

    def passes(rng: np.random.Generator) -> str:
        rising = autoregressive(rng, 2000, rho) + np.linspace(-1.0, 1.0, 2000)  # by 0.95 between the last 20 batches
        return "caution" if check_convergence(rising, margin=0.95, level=0.05).verdict == "pass" else "pass"

    assert alarms(passes, 200) <= most_alarms(0.05, 200)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_a_stationary_elbo_passes_where_its_noise_allows(rho: float) -> None:
    margin = 0.6 / (1 - rho)
    count = alarms(lambda rng: check_convergence(autoregressive(rng, 2000, rho), margin=margin).verdict, 200)
    assert count <= most_alarms(0.05, 200)


def labels(rng: np.random.Generator, probs: np.ndarray) -> np.ndarray:
    return np.asarray((rng.random((*probs.shape[:-1], 1)) > probs.cumsum(-1)).sum(-1))


@pytest.mark.parametrize("concentration", [0.1, 1.0, 10.0])
def test_calibrated_classes_pass(concentration: float) -> None:
    def run(rng: np.random.Generator) -> str:
        p = rng.dirichlet(np.full(4, concentration), size=300)
        again = labels(rng, np.broadcast_to(p, (100, *p.shape)))
        return check_calibration(p, labels(rng, p), again, level=0.05).verdict

    assert alarms(run, 200) <= most_alarms(0.05, 200)


def replicated(rng: np.random.Generator, rows: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Data and replicates whose rows share an uncertain mean, so that a binomial test of coverage would be wrong."""
    shared = rng.normal(size=(draws + 1, 1))
    values = shared + rng.normal(size=(draws + 1, rows))
    return values[0], values[1:]


def test_calibrated_intervals_of_dependent_rows_pass() -> None:
    def run(rng: np.random.Generator) -> str:
        y, again = replicated(rng, 200, 200)
        ends = {m: tuple(np.quantile(again, [(1 - m) / 2, (1 + m) / 2], axis=0)) for m in (0.5, 0.9)}
        return check_coverage(y, ends, again, level=0.05).verdict  # type: ignore[arg-type]

    assert alarms(run, 200) <= most_alarms(0.05, 200)


def test_ranks_of_dependent_rows_pass() -> None:
    def run(rng: np.random.Generator) -> str:
        y, again = replicated(rng, 200, 200)
        draws = replicated(rng, 200, 200)[1]  # that set the ranks
        return check_pit(pit(draws, y), pit(draws, again), level=0.05).verdict

    assert alarms(run, 200) <= most_alarms(0.05, 200)


def test_data_from_the_model_pass_the_posterior_predictive_check() -> None:
    def run(rng: np.random.Generator) -> str:
        y, again = replicated(rng, 50, 200)
        seen, drawn = statistics(y[None]), statistics(again)
        return check_replicates(
            seen, drawn, dict.fromkeys(seen, 1e-3), level=0.05
        ).verdict  # no difference is too small to matter

    count = alarms(run, 300)
    assert (
        stats.binom.ppf(0.001, 300, 0.05) <= count <= most_alarms(0.05, 300)
    )  # the level is exact, not only an upper bound


@pytest.mark.parametrize("rows", [4, 50])
def test_dependence_of_data_from_the_model_passes_at_the_level(rows: int) -> None:
    def run(rng: np.random.Generator) -> str:
        values = rng.normal(size=(200, rows, 1)) + rng.normal(size=(200, rows, 3)) * (1 + rng.normal(size=(200, 1, 1)))
        residual = values[..., 0]
        found = of_columns(values) | autocorrelation(residual) | on_predictions(residual, np.arange(rows) ** 0.5)
        seen, drawn = ({n: x[part] for n, x in found.items()} for part in (slice(1), slice(1, None)))
        return check_replicates(seen, drawn, dict.fromkeys(seen, 1e-3), level=0.05).verdict

    assert stats.binom.ppf(0.001, 200, 0.05) <= alarms(run, 200) <= most_alarms(0.05, 200)


def line_through(y: Tensor, x: Tensor) -> Report:
    """The report of a line with one noise scale, fitted to points."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w[..., 0] + w[..., 1] * x, sigma), obs=y)

    program = Program.of(model, "multivariate_normal", data_plate="data")
    posterior = svi(program, (x, y), steps=1500, seed=0, progress=False, compile=False)
    return check(posterior, (x, y), draws=100)


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        (lambda x, noise: x + 0.3 * noise, ""),
        (lambda x, noise: x + 0.4 * x**2 + 0.3 * noise, "correlation of residuals with squared predictions"),
        (lambda x, noise: x + 0.3 * x.exp() * noise, "correlation of squared residuals with predictions"),
        (lambda x, noise: x + 0.3 * noise + torch.arange(len(x)).sin(), "autocorrelation of residuals"),
    ],
)
def test_a_line_for_other_points_is_found(shape: Callable[[Tensor, Tensor], Tensor], name: str) -> None:
    g = torch.Generator().manual_seed(3)
    x, noise = torch.randn(2, 200, generator=g)
    found = line_through(shape(x, noise), x)["posterior predictive check"]
    assert (found.verdict in ALARM) == bool(name)
    if name:
        shown = found.details["statistics"][name]
        assert shown["p"] < 0.05 and shown["effect"] > 0.1


@pytest.mark.parametrize("rows", [2, 3, 5, 20, 200])
@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_true_predictions_are_not_worse_than_the_baseline(rows: int, slope: float) -> None:
    """The baseline is fitted to 50 training targets, the predictions are true: at the level, a fail is chance."""

    def run(rng: np.random.Generator) -> str:
        x = rng.normal(size=50 + rows)
        y = slope * x + rng.normal(size=50 + rows)
        kept = TrainingRows.of((torch.from_numpy(y[:50]),))
        assert kept is not None
        base, loc = normal_baseline(y[50:], kept.summaries[0]), slope * x[50:]

        def loss(targets: np.ndarray) -> np.ndarray:
            return np.stack([-stats.norm.logpdf(t, loc) - base(t) for t in targets])

        again = loss(loc + rng.normal(size=(60, rows))).mean(1)
        return check_skill(loss(y[None, 50:])[0] + base(y[50:]), base(y[50:]), again, level=0.05).verdict

    assert sum(run(np.random.default_rng(seed)) == "fail" for seed in range(300)) <= most_alarms(0.05, 300)


def test_a_baseline_of_other_rows_holds_its_level_from_three_rows_on() -> None:
    def run(rng: np.random.Generator) -> str:
        y, drawn = rng.normal(size=3), rng.normal(size=(60, 3))
        base = normal_baseline(y, None)
        again = np.array([(-stats.norm.logpdf(t) - base(t)).mean() for t in drawn])
        return check_skill(-stats.norm.logpdf(y), base(y), again, level=0.05).verdict

    assert sum(run(np.random.default_rng(seed)) == "fail" for seed in range(300)) <= most_alarms(0.05, 300)


def test_useless_inputs_are_a_caution_once_there_are_rows_enough_to_see_it() -> None:
    def run(rng: np.random.Generator, rows: int) -> str:
        x, y = rng.normal(size=(2, rows))
        return check_skill(-stats.norm.logpdf(y, 0.005 * x), -stats.norm.logpdf(y), level=0.05).verdict

    many, few = ([run(np.random.default_rng(seed), rows) for seed in range(100)] for rows in (2000, 10))
    assert many.count("caution") >= 100 - most_alarms(0.1, 100) and few.count("caution") == 0


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_importance_weights_of_good_guides_pass(noise: float) -> None:
    def run(rng: np.random.Generator) -> str:
        return max(
            check_global_khat(noise * rng.normal(size=1000)).verdict,
            check_local_khat(noise * rng.normal(size=(200, 50))).verdict,
            check_tightness(noise * rng.normal(size=(200, 50)), numbers=1).verdict,
            key=("pass", "caution", "fail").index,
        )

    assert alarms(run, 40) == 0


@pytest.mark.parametrize("rows", [2, 10, 200])
def test_inputs_of_the_training_distribution_do_not_drift(rows: int) -> None:
    def run(rng: np.random.Generator) -> str:
        x = torch.from_numpy(np.stack([rng.normal(size=100 + rows), rng.integers(0, 3, 100 + rows)], 1))
        kept = TrainingRows.of((x[:100],))
        assert kept is not None and kept.summaries[0] is not None
        return check_drift(shifts("x", columns_of(x[100:]), kept.summaries[0]), level=0.05).verdict

    assert alarms(run, 300) <= most_alarms(0.05, 300)


@pytest.mark.parametrize(("columns", "rows"), [(2, 2), (6, 50), (10, 400), (30, 400)])
def test_new_rows_of_a_binary_table_are_no_leak(columns: int, rows: int) -> None:
    def run(rng: np.random.Generator) -> str:
        x = torch.from_numpy(rng.integers(0, 2, (200 + rows, columns)))
        return check_leakage(overlap_of(TrainingRows.of((x[:200],)), (x[200:],), rows)).verdict

    assert alarms(run, 300) <= most_alarms(0.001, 300)


@pytest.mark.parametrize("rows", [2, 10, 200])
def test_rows_of_the_same_mean_are_not_overfitted(rows: int) -> None:
    def run(rng: np.random.Generator) -> str:
        train, held_out = (-0.5 * rng.normal(size=size) ** 2 for size in (100, rows))
        return check_overfitting(float(train.mean()), held_out, 100, level=0.05).verdict

    assert alarms(run, 300) <= most_alarms(0.05, 300)


# -- power of every check ------------------------------------------------------------------------------------


def test_unconverged_overconfident_and_collapsed_fits_are_detected() -> None:
    def rising(rng: np.random.Generator) -> str:
        return check_convergence(autoregressive(rng, 2000, 0.5) + np.arange(2000) / 500, margin=0.1, level=0.01).verdict

    def overconfident(rng: np.random.Generator) -> str:
        logits = rng.normal(size=(500, 4))
        true, said = (np.exp(t * logits) / np.exp(t * logits).sum(-1, keepdims=True) for t in (1, 3))
        again = labels(rng, np.broadcast_to(said, (200, *said.shape)))
        return check_calibration(said, labels(rng, true), again, level=0.01).verdict

    def narrow(rng: np.random.Generator) -> str:
        y, again = 2 * rng.normal(size=200), rng.normal(size=(200, 200))
        ends = {m: tuple(np.quantile(again, [(1 - m) / 2, (1 + m) / 2], axis=0)) for m in (0.5, 0.9)}
        return check_coverage(y, ends, again, level=0.01).verdict  # type: ignore[arg-type]

    def shifted(rng: np.random.Generator) -> str:
        draws, again = rng.normal(size=(200, 200)), rng.normal(size=(200, 200))
        return check_pit(pit(draws, 0.5 + rng.normal(size=200)), pit(draws, again), level=0.01).verdict

    def collapsed(rng: np.random.Generator) -> str:
        return check_active_dimensions(rng.normal(size=(200, 100, 8))).verdict

    for run in (rising, overconfident, narrow, shifted, collapsed):
        assert alarms(run, 20) == 20


def test_khat_detects_half_the_standard_deviation() -> None:
    def run(rng: np.random.Generator) -> str:
        z = 0.5 * rng.normal(size=(200, 200, 5))  # q = N(0, 1/4), p = N(0, 1), five dimensions
        return check_local_khat((stats.norm.logpdf(z) - stats.norm.logpdf(z, scale=0.5)).sum(-1)).verdict

    assert alarms(run, 10) == 10


# -- whole reports on closed-form posteriors ------------------------------------------------------------------------


class Factors(Program):
    """x = W z + noise. The guide is exact; ``spread`` multiplies its standard deviation, ``follow`` its mean."""

    def __init__(self, weight: Tensor, noise: float, spread: float = 1.0, follow: float = 1.0) -> None:
        super().__init__()
        self.weight, self.noise = weight, noise
        self.latent = weight.shape[1]
        precision = torch.eye(self.latent) + weight.T @ weight / noise**2
        covariance = torch.linalg.inv(precision)
        self.gain = follow * covariance @ weight.T / noise**2
        self.scale = spread * torch.linalg.cholesky(covariance)

    def model(self, x: Tensor | None = None) -> None:
        with self.data_plate(*(() if x is None else (x,))):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent), 1.0).to_event(1))
            mean = (z.unsqueeze(-2) * self.weight).sum(-1)
            pyro.sample("x", dist.Normal(mean, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with self.data_plate(x):
            pyro.sample("z", dist.MultivariateNormal(x @ self.gain.T, scale_tril=self.scale))


class Line(Program):
    """y = x w + noise with a standard normal prior on w; the guide is a normal with a given mean and scale."""

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.mean, self.scale = mean, scale

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(self.mean.shape[0]), 1.0).to_event(1))
        with self.data_plate(x):
            pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("w", dist.MultivariateNormal(self.mean, scale_tril=self.scale))


def factors_report(seed: int, **wrong: float) -> Report:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 2, generator=generator)
    x = torch.randn(150, 2, generator=generator) @ weight.T + 0.5 * torch.randn(150, 6, generator=generator)
    posterior = Posterior(ProgramInstance(Factors(weight, 0.5, **wrong), (x,), len(x)))
    return check(posterior, Split({"x": x}), draws=100, particles=100, seed=seed)


def line_posterior(x: Tensor, y: Tensor) -> Posterior:
    """The exact posterior of a regression, which knows its training rows."""
    covariance = torch.linalg.inv(torch.eye(x.shape[1]) + x.T @ x)
    program = Line(covariance @ x.T @ y, torch.linalg.cholesky(covariance))
    return Posterior(ProgramInstance(program, (x, y), len(x)), training_rows=TrainingRows.of((x, y)))


def known_rows_report(seed: int, train: int, test: int = 0, features: int = 4, noise: float = 1.0) -> Report:
    """The report of an exact posterior on new rows, or on its training rows; the model takes the noise for 1."""
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(train + test, features, generator=generator), torch.randn(features, generator=generator)
    y = x @ w + noise * torch.randn(train + test, generator=generator)
    rows = slice(train, None) if test else slice(train)
    return check(line_posterior(x[:train], y[:train]), (x[rows], y[rows]), particles=100, seed=seed)


class Groups(Program):
    """Labels with a share for every group, under a uniform prior; the guide is the exact posterior."""

    def __init__(self, ones: Tensor, zeros: Tensor) -> None:
        super().__init__()
        self.ones, self.zeros = ones, zeros

    def model(self, group: Tensor, y: Tensor | None = None) -> None:
        share = pyro.sample("share", dist.Beta(torch.ones(len(self.ones)), 1.0).to_event(1))
        with self.data_plate(group):
            pyro.sample("y", dist.Bernoulli(share[..., group]), obs=y)

    def guide(self, group: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("share", dist.Beta(1 + self.ones, 1 + self.zeros).to_event(1))


def groups_report(seed: int, rows: int = 60, groups: int = 4) -> Report:
    """The report of the exact posterior of a classifier on its training rows, many of them twins."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(rows) % groups
    y = (torch.rand(rows, generator=generator) < torch.rand(groups, generator=generator)[group]).float()
    ones, zeros = (torch.zeros(groups).index_add(0, group, value) for value in (y, 1 - y))
    instance = ProgramInstance(Groups(ones, zeros), (group, y), rows)
    posterior = Posterior(instance, training_rows=TrainingRows.of((group, y)))
    return check(posterior, (group, y), particles=100, seed=seed)


def line_report(seed: int, spread: float = 1.0, shift: float = 0.0) -> Report:
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(90, 4, generator=generator), torch.randn(4, generator=generator)
    y = x @ w + torch.randn(90, generator=generator)
    train, test = Split({"x": x[:30], "y": y[:30]}), Split({"x": x[30:], "y": y[30:]})
    covariance = torch.linalg.inv(torch.eye(4) + x[:30].T @ x[:30])
    mean = covariance @ x[:30].T @ y[:30] + shift
    posterior = Posterior(ProgramInstance(Line(mean, spread * torch.linalg.cholesky(covariance)), train.tensors, 30))
    return check(posterior, test, train=train, draws=200, particles=100, seed=seed)


@pytest.mark.parametrize("report", [factors_report, pytest.param(line_report, marks=pytest.mark.slow)])
def test_a_report_on_an_exact_posterior_passes_nineteen_times_in_twenty(report: Callable[[int], Report]) -> None:
    verdicts = [report(seed).verdict for seed in range(40)]
    assert sum(v in ALARM for v in verdicts) <= most_alarms(0.05, 40)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"train": 30, "test": 2},
        {"train": 30, "test": 5},
        {"train": 30, "test": 60},
        {"train": 10, "test": 20, "features": 8},
        {"train": 3, "features": 1},
        {"train": 30},
        {"train": 20, "features": 10},
        {"train": 200, "features": 10},
    ],
)
def test_a_report_that_knows_the_training_rows_holds_its_level(options: dict[str, int]) -> None:
    """On held-out rows and, leaving each row out, on the training rows."""
    verdicts = [known_rows_report(seed, **options).checks for seed in range(100)]
    assert sum(any(c.verdict in ALARM for c in checks) for checks in verdicts) <= most_alarms(0.05, 100)


@pytest.mark.slow
def test_a_report_of_a_classifier_on_its_training_rows_holds_its_level() -> None:
    reports = [groups_report(seed) for seed in range(100)]
    assert "leave-one-out" in reports[0]["calibration of probabilities"].reading
    asked = [[c for c in report.checks if c.name != "predictive skill"] for report in reports]
    assert sum(any(c.verdict in ALARM for c in checks) for checks in asked) <= most_alarms(0.05, 100)
    # Shares of the groups that are nearly the same leave no gain over the base rate, which is a caution.
    assert sum(report["predictive skill"].verdict == "fail" for report in reports) <= most_alarms(0.05, 100)


def test_noise_that_is_twice_as_large_fails_on_the_training_rows_too() -> None:
    for options in ({"train": 40}, {"train": 40, "test": 40}):
        failed = [known_rows_report(seed, noise=2.5, **options)["interval coverage"].verdict for seed in range(10)]
        assert failed.count("fail") >= 9


def test_reports_run_the_checks_that_apply() -> None:
    """The only list of all checks of a report, one for each kind of model."""
    names = [c.name for c in factors_report(0).checks]
    assert names == [
        "weight of the likelihood",
        "tightness of the bound",
        "posterior means, local latents",
        "posterior widths, local latents",
        "Pareto k-hat, local latents",
        "amortization gap",
        "active latent dimensions",
        "posterior predictive check",
    ]
    names = [c.name for c in line_report(0).checks]
    assert names == [
        "weight of the likelihood",
        "tightness of the bound, global latents",
        "posterior means, global latents",
        "posterior widths, global latents",
        "Pareto k-hat, global latents",
        "label switching",
        "other modes",
        "interval coverage",
        "probability integral transform",
        "predictive skill",
        "posterior predictive check",
        "influential rows",
    ]


def test_an_exact_posterior_has_equal_importance_weights() -> None:
    report = factors_report(3)
    assert report["tightness of the bound"].value == pytest.approx(0.0, abs=1e-4)
    assert report["Pareto k-hat, local latents"].value == 0.0


def test_wrong_posteriors_are_detected() -> None:
    for seed in range(5):
        assert factors_report(seed, spread=0.5)["Pareto k-hat, local latents"].verdict == "caution"
        assert factors_report(seed, spread=3.0)["tightness of the bound"].verdict in ALARM
        assert factors_report(seed, follow=0.0)["tightness of the bound"].verdict == "fail"
        assert line_report(seed, spread=0.3)["Pareto k-hat, global latents"].verdict == "caution"
        assert line_report(seed, shift=1.5).verdict == "fail"


def test_the_same_seed_gives_the_same_report() -> None:
    assert line_report(1).to_dict() == line_report(1).to_dict()
