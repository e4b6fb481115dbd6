"""Faults that users met in verdicts: fits that must not pass `dp.check`, exact ones that must, and who says it.

The guides have fixed parameters at a known distance from the posterior, and a parameter without effect to train.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from torch import Tensor

import deepprob as dp
from deepprob.inference import svi
from deepprob.models import VAE
from deepprob.posteriors.posterior import Posterior

Data = tuple[Tensor, ...]
ASKED = ("posterior means", "posterior widths", "Pareto k-hat", "tightness of the bound")
MEANS, WIDTHS, KHAT, TIGHTNESS = (f"{name}, global latents" for name in ASKED)


def fitted(
    model: Any, guide: Any, data: Any, steps: int = 100, plate: str | None = None, rate: float = 0.01, **options: Any
) -> Posterior:
    program, optimizer = dp.Program.of(model, guide, data_plate=plate), dp.Optimizer(learning_rate=rate)
    return svi(program, data, steps=steps, optimizer=optimizer, seed=0, progress=False, compile=False, **options)


def fixed() -> Tensor:
    return 0 * torch.as_tensor(pyro.param("trained", torch.tensor(0.0)))


def alarms(report: dp.Report) -> set[str]:
    return {check.name for check in report.checks if check.verdict in ("caution", "fail")}


class Line:
    """y = x w + noise with a standard normal prior on w; data from the model, with columns correlated by pairs."""

    def __init__(self, numbers: int, rows: int, correlation: float = 0.0) -> None:
        g = torch.Generator().manual_seed(0)
        w, noise = torch.randn(numbers, generator=g), torch.randn(rows + 100, generator=g)
        self.x, shared = torch.randn(2, rows + 100, numbers, generator=g)
        if correlation:
            half = shared[:, : numbers // 2]
            self.x = (1 - correlation) ** 0.5 * self.x + correlation**0.5 * torch.cat([half, -half], 1)
        self.y = self.x @ w + noise
        self.train, self.test = (self.x[:rows], self.y[:rows]), (self.x[rows:], self.y[rows:])
        x, y = (part.double() for part in self.train)
        covariance = torch.linalg.inv(x.T @ x + torch.eye(numbers))
        self.mean, self.covariance = (covariance @ x.T @ y).float(), covariance.float()

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(len(self.mean)), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)

    def off(self, width: float = 1.0, shift: float = 0.0) -> Callable[..., None]:
        def guide(x: Tensor, y: Tensor | None = None) -> None:
            loc = self.mean + shift * self.covariance.diagonal().sqrt() + fixed()
            pyro.sample("w", dist.MultivariateNormal(loc, scale_tril=width * torch.linalg.cholesky(self.covariance)))

        return guide

    def mean_field(self, x: Tensor, y: Tensor | None = None) -> None:
        """The best normal with independent numbers, which has the widths given the other numbers."""
        sd = torch.linalg.inv(self.covariance).diagonal() ** -0.5
        pyro.sample("w", dist.Normal(self.mean + fixed(), sd).to_event(1))


SMALL = Line(3, 100)


# -- global latents are judged whatever the plate, the data and their number ------------------------------------------


@pytest.mark.parametrize("plate", [None, "data"])
@pytest.mark.parametrize("given", [SMALL.train, SMALL.test], ids=["train", "test"])
@pytest.mark.parametrize(
    ("width", "shift", "said"),
    [(1.0, 0.0, ""), (0.1, 0.0, WIDTHS), (5.0, 0.0, WIDTHS), (1.0, 2.0, MEANS), (1.0, -2.0, MEANS)],
)
def test_a_guide_off_the_posterior(plate: str | None, given: Data, width: float, shift: float, said: str) -> None:
    report = dp.check(fitted(SMALL.model, SMALL.off(width, shift), SMALL.train, plate=plate), given)
    assert report.verdict == ("fail" if said else "pass") and (not said or said in alarms(report))
    if not said:  # k-hat is that of the training data, whichever are given: 0 for an exact guide
        assert report[KHAT].value == 0


@pytest.mark.parametrize("numbers", [101, 400])
@pytest.mark.parametrize(
    ("width", "shift", "said"), [(1.0, 0.0, ""), (0.1, 0.0, WIDTHS), (5.0, 0.0, WIDTHS), (1.0, 2.0, MEANS)]
)
def test_more_than_a_hundred_numbers_are_judged(numbers: int, width: float, shift: float, said: str) -> None:
    line = Line(numbers, 3 * numbers)
    report = dp.check(fitted(line.model, line.off(width, shift), line.train, plate="data"), line.test)
    assert report.verdict == ("fail" if said else "pass") and (not said or said in alarms(report))


@pytest.mark.parametrize("numbers", [2, 120])
def test_independent_numbers_for_correlated_ones(numbers: int) -> None:
    line = Line(numbers, 2 * numbers + 60, correlation=0.98)
    correlation = line.covariance[0, numbers // 2] * line.covariance.diagonal()[[0, numbers // 2]].prod() ** -0.5
    assert correlation > 0.95
    report = dp.check(fitted(line.model, line.mean_field, line.train, plate="data"), line.test)
    assert report[WIDTHS].verdict == "fail" and "too narrow" in report[WIDTHS].reading


def test_correlations_of_numbers_that_are_judged_one_by_one() -> None:
    line = Line(400, 800, correlation=0.98)
    report = dp.check(fitted(line.model, line.mean_field, line.train, plate="data"), line.test)
    assert all("given the others" in report[name].reading for name in (MEANS, WIDTHS))
    assert report[TIGHTNESS].verdict == "caution" and report[TIGHTNESS].unit == "nats per number"
    exact = dp.check(fitted(line.model, line.off(), line.train, plate="data"), line.test)
    assert exact.verdict == "pass" and abs(exact[TIGHTNESS].value) < 0.02


def test_a_fit_that_was_not_judged_is_no_pass_on_other_rows() -> None:
    report = dp.check(fitted(SMALL.model, SMALL.off(), SMALL.train, steps=50), SMALL.test)
    assert report.verdict == "caution" and report[WIDTHS].verdict == "unchecked"


# -- too wide ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "rows", "width", "shift"), [(5, 100, 2.0, 0.0), (1, 100, 4.0, 0.0), (8, 3020, 7.0, 1.2)]
)
def test_a_guide_that_is_too_wide(numbers: int, rows: int, width: float, shift: float) -> None:
    line = Line(numbers, rows)
    report = dp.check(fitted(line.model, line.off(width, shift), line.train), line.test)
    assert report.verdict == "fail" and report[WIDTHS].value == pytest.approx(width, rel=0.1)
    assert "too wide" in report[WIDTHS].reading and (not shift or MEANS in alarms(report))
    readings = " ".join(check.reading for check in report.checks)
    assert "correct" not in readings and "misses" not in readings
    assert report[KHAT].verdict == "pass" or "the guide is so wide" in report[KHAT].reading


# -- the end of the optimization --------------------------------------------------------------------------------------

Y = 7 + torch.randn(2000, generator=torch.Generator().manual_seed(0))


def location(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def starting_at(start: float, sd: float) -> Callable[[Tensor], None]:
    def guide(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(start)), sd))

    return guide


@pytest.mark.parametrize(
    ("rows", "start", "steps", "rate", "words"),
    [
        (100, 0.0, 60, 1e-4, "not level"),  # 70 sds off, and hardly a step towards the posterior
        (100, 0.0, 600, 1e-5, "it would rise"),
        (2000, 7.12, 200, 3e-5, "it would rise"),  # 16 nats of 2 000 rows
        (100, 6.5, 60, 1e-5, "not level"),  # rises by 8.6 with an error of 4.8
    ],
)
@pytest.mark.parametrize("plate", [None, "data"])
def test_a_rise_that_has_not_ended(
    plate: str | None, rows: int, start: float, steps: int, rate: float, words: str
) -> None:
    y, sd = Y[:rows], rows**-0.5
    report = dp.check(fitted(location, starting_at(start, sd), y, steps, plate, rate), y)
    assert report["ELBO convergence"].verdict != "pass" and words in report["ELBO convergence"].reading
    margin = 0.1 if steps < 100 else 0.2  # half of a fit may change the bound by twice 0.1 nats, of all rows together
    assert report[MEANS].verdict == "fail" and report["ELBO convergence"].threshold == margin


def test_noise_that_hides_a_change_is_no_pass() -> None:
    report = dp.check(fitted(location, starting_at(7.0, 0.4), Y[:100], 60, rate=0.3), Y[:100])
    found = report["ELBO convergence"]
    assert found.verdict == "caution" and "too noisy to tell" in found.reading


@pytest.mark.parametrize("epochs", [5, 20, 40])
def test_a_network_that_needs_more_epochs(epochs: int) -> None:
    images = dp.load_data("digits").train.tensors[0]
    posterior = svi(
        VAE(images.shape[1:], latent_dim=8),
        images[:500],
        epochs=epochs,
        batch_size=100,
        seed=0,
        progress=False,
        compile=False,
    )
    report = dp.check(posterior, images[500:600], draws=50, particles=50)
    assert {"ELBO convergence", "tightness of the bound", "amortization gap"} <= alarms(report)


# -- several data sites, and guides of all rows together --------------------------------------------------------------


@pytest.mark.parametrize("plates", [1, 2])
@pytest.mark.parametrize("name", [None, "data"])
def test_several_data_sites(plates: int, name: str | None) -> None:
    y, z = Y[:100] - 6, Y[100 : 200 if plates == 1 else 180] - 6

    def model(y: Tensor, z: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        rows = pyro.plate("data", len(y))
        with rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        with rows if plates == 1 else pyro.plate("others", len(z)):
            pyro.sample("z", dist.Normal(mu, 1.0), obs=z)

    def guide(y: Tensor, z: Tensor) -> None:
        pyro.sample("mu", dist.Normal(7.0 + fixed(), 0.07))

    report = dp.check(fitted(model, guide, (y, z), plate=name), (y, z))
    wrong = {f"posterior predictive check of {site}" for site in "yz"}
    assert report.verdict == "fail" and {MEANS, *wrong} <= alarms(report) and report[MEANS].value > 60


def test_a_joint_guide_over_latents_of_rows() -> None:
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])

    def schools(sigma: Tensor, y: Tensor | None = None) -> None:
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)

    report = dp.check(fitted(schools, "multivariate_normal", (sigma, y), steps=1500, rate=0.02), (sigma, y))
    assert report.verdict in ("pass", "caution") and report[MEANS].verdict == report[WIDTHS].verdict == "pass"
    assert all(check.verdict != "unchecked" for check in report.checks)


# -- encoders and codes -----------------------------------------------------------------------------------------------


class Factors:
    """x = W z + noise, with the exact posterior of z as guide, times a width."""

    def __init__(self, weight: Tensor, noise: float | Tensor) -> None:
        self.weight, self.noise, self.codes = weight, noise, weight.shape[1]
        self.covariance = torch.linalg.inv(torch.eye(self.codes) + weight.T @ weight / noise**2)
        self.gain = self.covariance @ weight.T / noise**2

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.codes), 1.0).to_event(1))
            mean = (z.unsqueeze(-2) * self.weight).sum(-1)
            pyro.sample("x", dist.Normal(mean, self.noise).to_event(1), obs=x)

    def guide(self, width: float = 1.0) -> Callable[[Tensor], None]:
        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                root = width * self.covariance.diagonal().sqrt()
                pyro.sample("z", dist.Normal(x @ self.gain.T + fixed(), root).to_event(1))

        return guide

    def rows(self, count: int) -> Tensor:
        g = torch.Generator().manual_seed(6)
        z, noise = torch.randn(count, self.codes, generator=g), torch.randn(count, len(self.weight), generator=g)
        return z @ self.weight.T + self.noise * noise


AXES = torch.linalg.qr(torch.randn(8, 3, generator=torch.Generator().manual_seed(6)))[0]


@pytest.mark.parametrize("width", [1.0, 0.3, 0.1, 0.03])
def test_the_limit_of_the_bound_does_not_grow_with_a_narrow_encoder(width: float) -> None:
    factors = Factors(2 * AXES[:, :2], 0.5)
    x = factors.rows(300)
    report = dp.check(fitted(factors.model, factors.guide(width), x[:200], plate="data"), x[200:])
    assert report["tightness of the bound"].limit == "<= 0.2"
    gap = width**2 - 1 - 2 * math.log(width)  # of two codes
    assert report["amortization gap"].value == pytest.approx(gap, abs=0.1)
    asked = {"tightness of the bound", "amortization gap", "posterior widths, local latents"}
    assert report.verdict == ("pass" if width == 1 else "fail") and alarms(report) & asked == (
        set() if width == 1 else asked
    )


def test_codes_that_carry_almost_nothing() -> None:
    scale = math.sqrt(math.expm1(2 * 0.036))  # of one code: a KL of 0.036 nats per row
    factors = Factors(torch.tensor([[scale], *[[0.0]] * 5]), 1.0)
    x = factors.rows(900)
    active = dp.check(fitted(factors.model, factors.guide(), x[:600], plate="data"), x[600:])
    assert active["active latent dimensions"].verdict == "fail" and active.verdict == "fail"
    assert active["active latent dimensions"].details["kl"] == pytest.approx([0.036], abs=0.005)


@pytest.mark.parametrize(("codes", "verdict"), [(3, "pass"), (2, "caution")])
def test_one_code_too_few(codes: int, verdict: str) -> None:
    """Probabilistic PCA of data with three codes; two lose 0.65 nats of a row."""
    x = Factors(AXES * torch.tensor([2.0, 1.5, 1.0]), 0.5).rows(1200)
    variances, axes = (part.flip(-1) for part in torch.linalg.eigh(torch.cov(x[:800].T, correction=0)))
    rest = variances[codes:].mean()
    factors = Factors(axes[:, :codes] * (variances[:codes] - rest).sqrt(), rest.sqrt())
    report = dp.check(fitted(factors.model, factors.guide(), x[:800], plate="data"), x[800:])
    assert report.verdict == report["posterior predictive check"].verdict == verdict


# -- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 3])
def test_exact_predictions_of_few_rows_are_seldom_called_worse_than_the_baseline(rows: int) -> None:
    posterior, root = fitted(SMALL.model, SMALL.off(), SMALL.train), torch.linalg.cholesky(SMALL.covariance)
    failed = 0
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        x, w = torch.randn(rows, 3, generator=g), SMALL.mean + root @ torch.randn(3, generator=g)
        report = dp.check(posterior, (x, x @ w + torch.randn(rows, generator=g)))
        failed += report["predictive skill"].verdict == "fail"
    assert failed <= 3


@pytest.mark.parametrize("draws", [10, 50, 200])
def test_few_draws_switch_no_test_off(draws: int) -> None:
    x = SMALL.test[0]
    noise = 2.9 * torch.randn(100, generator=torch.Generator().manual_seed(1))
    report = dp.check(fitted(SMALL.model, SMALL.off(), SMALL.train), (x, x @ SMALL.mean + noise), draws=draws)
    coverage = report["interval coverage"]
    assert coverage.details["coverage"]["0.9"] < 0.55
    assert coverage.verdict == report["posterior predictive check"].verdict == "fail"
    assert coverage.details["p"] <= coverage.details["level"]


def test_moments_of_ordered_classes_and_of_angles() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100, generator=g)
    y = (x + 0.5 * torch.randn(100, generator=g) > 0).long() + (x > 1).long()

    def ordered(x: Tensor, y: Tensor | None = None) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.OrderedLogistic(b * x, torch.tensor([0.0, 2.0])), obs=y)

    def angle(x: Tensor, y: Tensor | None = None) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.VonMises(m + 0 * x, 1.5), obs=y)

    classes = fitted(ordered, "normal", (x, y), rate=0.1).predict(x, draws=100)
    assert bool(classes.mean.isfinite().all() and classes.sd.isfinite().all())
    assert classes.probs.sum(-1).tolist() == pytest.approx([1.0] * 100, abs=1e-5)
    angles = fitted(angle, "normal", (x, 0.8 * x.clamp(-3, 3)), rate=0.1).predict(x, draws=2000)
    assert (angles.sd - angles.draws.std(0)).abs().max() < 0.05


# -- modes, tails and k-hat -------------------------------------------------------------------------------------------


def test_a_lost_mode_is_found_and_no_sentence_denies_it() -> None:
    def two(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu.abs(), 1.0), obs=y)

    def guide(y: Tensor) -> None:
        precision = len(y) + 0.01
        pyro.sample("mu", dist.Normal(y.sum() / precision + fixed(), precision**-0.5))

    report = dp.check(fitted(two, guide, Y[:20], steps=1000), Y[:20])
    assert report["other modes"].verdict == "caution" and report["other modes"].value == pytest.approx(0.5, abs=0.05)
    assert "correct" not in report[KHAT].reading


def test_entries_that_can_change_places() -> None:
    y = torch.cat([torch.linspace(-5.0, -3.0, 20), torch.linspace(3.0, 5.0, 20)])

    @config_enumerate
    def mixture(y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("parts", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", len(y)):
            part = pyro.sample("part", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(loc[part], 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("weights", dist.Dirichlet(torch.full((2,), 21.0) + fixed()))
        with pyro.plate("parts", 2):
            pyro.sample("loc", dist.Normal(torch.tensor([-4.0, 4.0]), 0.22))

    report = dp.check(fitted(mixture, guide, y), y)
    assert report.verdict == "caution" and alarms(report) == {"label switching"}


def test_a_log_normal_guide_of_a_scale_is_no_caution() -> None:
    def scale(y: Tensor) -> None:
        s = pyro.sample("s", dist.HalfNormal(3.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(0.0, s), obs=y)

    report = dp.check(fitted(scale, "normal", Y[:30] - 7, steps=1000, rate=0.05), Y[:30] - 7)
    assert report.verdict == report[KHAT].verdict == "pass" and report[KHAT].value > 0.7


def test_khat_can_fail() -> None:
    report = dp.check(fitted(SMALL.model, SMALL.off(0.1), SMALL.train), SMALL.train)
    assert report[KHAT].verdict == "fail"


@pytest.mark.parametrize(("weight", "word"), [(10.0, "narrow"), (0.1, "wide")])
def test_a_likelihood_that_counts_rows_too_often(weight: float, word: str) -> None:
    def scaled(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)), pyro.poutine.scale(scale=weight):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        precision = weight * len(y) + 0.01
        pyro.sample("mu", dist.Normal(weight * y.sum() / precision + fixed(), precision**-0.5))

    report = dp.check(fitted(scaled, guide, Y[:100]), Y[:100])
    assert report.verdict == "fail" and word in report["weight of the likelihood"].reading
