"""Checks of predictions in every form of target: a required argument, masked values, and counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import deepprob as dp
from deepprob.diagnostics import Case
from deepprob.diagnostics.baseline import count_baseline
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior

SEEDS = range(4)
COVERAGE, CALIBRATION, SKILL, REPLICATES = (
    "interval coverage",
    "calibration of probabilities",
    "predictive skill",
    "posterior predictive check",
)
Data = tuple[Tensor, ...]
Model = Callable[..., None]


def weights() -> Tensor:
    return torch.as_tensor(pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1)))


def times(w: Tensor, x: Tensor) -> Tensor:
    return (x * w).sum(-1)


def required(x: Tensor, y: Tensor) -> None:
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(times(w, x), 0.5), obs=y)


def fitted(model: Model, data: Data, seed: int = 0, **options: Any) -> Posterior:
    program = dp.Program.of(model, "multivariate_normal", **options)
    return svi(
        program, data, steps=500, optimizer=dp.Optimizer(learning_rate=0.03), seed=seed, progress=False, compile=False
    )


def rows(count: int, seed: int, noise: float = 0.5) -> Data:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, generator=g)
    return x, x @ torch.tensor([1.0, -1.0]) + noise * torch.randn(count, generator=g)


def shuffled(data: Data) -> Data:
    *inputs, y = data
    return (*inputs, y[torch.randperm(len(y), generator=torch.Generator().manual_seed(9))])


def found(model: Model, train: Data, given: Data | None = None, **options: Any) -> dict[str, dp.Check]:
    report = dp.check(fitted(model, train, **options), train if given is None else given)
    assert report.scores
    return {check.name: check for check in report.checks}


# -- a required target ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact() -> Posterior:
    return fitted(required, rows(200, 0))


def test_exact_predictions_of_a_required_target_pass(exact: Posterior) -> None:
    for seed in SEEDS:
        report = dp.check(exact, rows(200, 10 + seed))
        assert {report[name].verdict for name in (COVERAGE, SKILL, REPLICATES)} == {"pass"}
    for seed in SEEDS:
        checks = found(required, rows(60, 20 + seed))
        assert "leave-one-out" in checks[COVERAGE].reading
        assert {checks[name].verdict for name in (COVERAGE, SKILL, REPLICATES)} == {"pass"}


@pytest.mark.parametrize("kind", ["held-out", "training"])
def test_wrong_predictions_of_a_required_target_are_no_pass(exact: Posterior, kind: str) -> None:
    def half(x: Tensor, y: Tensor) -> None:
        w = weights()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(times(w, x), 0.25), obs=y)

    narrow = found(half, rows(200, 0), None if kind == "training" else rows(200, 1))
    assert narrow[COVERAGE].verdict != "pass" and "too narrow" in narrow[COVERAGE].reading
    mixed = shuffled(rows(200, 1))
    lost = found(required, mixed)[SKILL] if kind == "training" else dp.check(exact, mixed)[SKILL]
    assert lost.verdict in ("caution", "fail")


def test_a_required_target_has_the_predictions_of_an_optional_one(exact: Posterior) -> None:
    def optional(x: Tensor, y: Tensor | None = None) -> None:
        required(x, y)  # type: ignore[arg-type]

    cases = [Case(p, rows(50, 3)).by_site()[0] for p in (exact, fitted(optional, rows(200, 0)))]
    assert all(case.supervised and len(case.predictors) == 1 for case in cases)
    assert cases[0].replicates == pytest.approx(cases[1].replicates, abs=1e-4)


def test_an_over_confident_classifier_of_a_required_target() -> None:
    def certain(x: Tensor, y: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=shift + 6 * x[:, 0]), obs=y)

    def fair(x: Tensor, y: Tensor) -> None:
        w = weights()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=times(w, x)), obs=y)

    def labels(count: int, seed: int) -> Data:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 2, generator=g)
        return x, torch.bernoulli((x[:, 0]).sigmoid(), generator=g)

    narrow, exact = fitted(certain, labels(300, 0)), fitted(fair, labels(300, 0))
    for given in (labels(300, 0), labels(300, 1)):
        check = dp.check(narrow, given)[CALIBRATION]
        assert check.verdict != "pass" and "over-confident" in check.reading
        report = dp.check(exact, given)
        assert {report[name].verdict for name in (CALIBRATION, SKILL, REPLICATES)} == {"pass"}
    assert dp.check(exact, shuffled(labels(300, 1)))[SKILL].verdict == "fail"


def autoregression(x: Tensor, y: Tensor) -> None:
    phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
    before = torch.cat([torch.zeros_like(y[..., :1]), y[..., :-1]], -1)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(phi * before + x, 1.0), obs=y)


def test_predictions_that_have_seen_their_values_are_not_judged() -> None:
    data = torch.randn(60, generator=torch.Generator().manual_seed(0)), torch.randn(60)
    posterior = fitted(autoregression, data)
    assert not {COVERAGE, SKILL} & {check.name for check in dp.check(posterior, data).checks}
    exact = fitted(required, rows(40, 0))
    constant = rows(40, 1)[0], torch.ones(40)
    (case,) = Case(exact, constant).by_site()
    assert not case.supervised


# -- masked targets ---------------------------------------------------------------------------------------------------


def by_handler(seen: Tensor, x: Tensor, y: Tensor | None = None) -> None:
    w = weights()
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=seen > 0):
        pyro.sample("y", dist.Normal(times(w, x), 0.5), obs=y)


def by_distribution(seen: Tensor, x: Tensor, y: Tensor) -> None:
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(times(w, x), 0.5).mask(seen), obs=y)


def by_nan(x: Tensor, y: Tensor) -> None:
    w = weights()
    known = ~y.isnan()
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=known):
        pyro.sample("y", dist.Normal(times(w, x), 0.5), obs=y.nan_to_num())


def optional_by_nan(x: Tensor, y: Tensor | None = None) -> None:
    by_nan(x, y)  # type: ignore[arg-type]


def with_gaps(model: Model, count: int, seed: int, noise: float = 0.5) -> Data:
    x, y = rows(count, seed, noise)
    seen = torch.rand(count, generator=torch.Generator().manual_seed(seed)) > 0.3
    if model in (by_nan, optional_by_nan):
        return x, torch.where(seen, y, torch.nan)
    return (seen.float() if model is by_handler else seen), x, torch.where(seen, y, 100.0)


@pytest.mark.parametrize("model", [by_handler, by_distribution, by_nan, optional_by_nan])
def test_the_known_targets_are_judged(model: Model) -> None:
    options: dict[str, Any] = {"missing": "allow"} if model in (by_nan, optional_by_nan) else {}
    train = with_gaps(model, 200, 0)
    posterior = fitted(model, train, **options)
    for given in (train, *(with_gaps(model, 150, 30 + seed) for seed in SEEDS)):
        report = dp.check(posterior, given)
        assert {report[name].verdict for name in (COVERAGE, SKILL, REPLICATES)} == {"pass"}
        assert report.scores["y"][0].value < 0.7
    report = dp.check(posterior, with_gaps(model, 200, 1, noise=1.0))
    assert report.to_html() and report[COVERAGE].verdict != "pass" and report.verdict != "pass"
    noisy = with_gaps(model, 200, 2, noise=1.0)
    assert found(model, noisy, **options)[COVERAGE].verdict != "pass"


def table(x: Tensor, y: Tensor) -> None:
    w = weights()
    with pyro.plate("data", len(x)):
        mean = torch.stack([times(w, x), -times(w, x), 0 * times(w, x)], -1)
        pyro.sample("y", dist.Normal(mean, 0.5).mask(~y.isnan()).to_event(1), obs=y.nan_to_num())


def test_the_known_values_of_a_table_are_judged() -> None:
    def values(count: int, seed: int, noise: float) -> Data:
        g = torch.Generator().manual_seed(seed)
        x, mean = rows(count, seed, 0.0)
        y = torch.stack([mean, -mean, 0 * mean], -1) + noise * torch.randn(count, 3, generator=g)
        return x, torch.where(torch.rand(count, 3, generator=g) > 0.3, y, torch.nan)

    posterior = fitted(table, values(100, 0, 0.5), missing="allow")
    for data in (values(100, 0, 0.5), values(100, 1, 0.5), values(100, 2, 0.5)):
        report = dp.check(posterior, data)
        assert {report[name].verdict for name in (COVERAGE, SKILL, REPLICATES)} == {"pass"}
    report = dp.check(posterior, values(100, 3, 1.0))
    assert {report[name].verdict for name in (COVERAGE, REPLICATES)} == {"fail"}


# -- counts -----------------------------------------------------------------------------------------------------------


def poisson(x: Tensor, y: Tensor | None = None) -> None:
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson(times(w, x).exp()), obs=y)


def counts(count: int, seed: int, dispersion: float = 0.0) -> Data:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, generator=g)
    mean = (x @ torch.tensor([0.7, -0.5]) + dispersion * torch.randn(count, generator=g)).exp()
    return x, torch.poisson(mean, generator=g)


@pytest.mark.parametrize("count", [20, *(pytest.param(n, marks=pytest.mark.slow) for n in (100, 500))])
def test_exact_predictions_of_counts_pass(count: int) -> None:
    for seed in SEEDS:
        train = counts(count, 100 + seed)
        posterior = fitted(poisson, train)
        for given in (train, counts(count, 200 + seed)):
            report = dp.check(posterior, given)
            assert {report[name].verdict for name in (COVERAGE, SKILL, REPLICATES)} == {"pass"}, (seed, str(report))


def test_wrong_predictions_of_counts_are_no_pass() -> None:
    posterior = fitted(poisson, counts(200, 0))
    assert dp.check(posterior, shuffled(counts(200, 1)))[SKILL].verdict == "fail"
    report = dp.check(posterior, counts(300, 2, dispersion=1.2))
    assert report[COVERAGE].verdict != "pass" and "too narrow" in report[COVERAGE].reading


def test_the_baseline_of_counts() -> None:
    train, (x, y) = counts(200, 0), counts(50, 1)
    skill = dp.check(fitted(poisson, train), (x, y))[SKILL]
    mean, variance = float(train[1].mean()), float(train[1].var())
    number = mean**2 / (variance - mean)
    base = dist.NegativeBinomial(number, mean / (number + mean)).log_prob(y).mean()
    assert skill.details["baseline"] == pytest.approx(-float(base), abs=1e-3)
    zeros = count_baseline(torch.zeros(9).numpy(), None)
    assert 0 < float(zeros(torch.ones(9).numpy())[0]) < 5
