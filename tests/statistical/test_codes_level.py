"""Information of the codes and aggregate posterior: level and power on closed forms."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from deepprob.diagnostics.case import Case
from deepprob.diagnostics.check import Check
from deepprob.diagnostics.checks.aggregate import aggregate_posterior
from deepprob.diagnostics.checks.information import code_information
from deepprob.diagnostics.report import check
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program

LATENT = 2


class Readings(Program):
    """Noisy readings of codes: ``z ~ N(0, 1)``, ``x ~ N(z, noise)``. Without options the guide is exact."""

    def __init__(self, noise: float, *, gain: float | None = None, sd: float | None = None) -> None:
        super().__init__()
        self.noise = noise
        self.gain = 1 / (1 + noise**2) if gain is None else gain
        self.sd = noise / math.sqrt(1 + noise**2) if sd is None else sd

    def model(self, x: Tensor) -> None:
        with self.data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with self.data_plate(x):
            pyro.sample("z", dist.Normal(self.gain * x, self.sd).to_event(1))


def case_of(program: Program, *data: Tensor) -> Case:
    return Case(Posterior(ProgramInstance(program, data, len(data[0]))), data)


def readings(seed: int, rows: int, noise: float) -> Tensor:
    return math.sqrt(1 + noise**2) * torch.randn(rows, LATENT, generator=torch.Generator().manual_seed(seed))


def answers(case: Case) -> tuple[Check, Check]:
    return code_information.answer(case, 0.05), aggregate_posterior.answer(case, 0.05)


@pytest.mark.parametrize(("rows", "noise"), [(10, 1.0), (60, 0.3), (256, 0.02), (256, 2.0)])
def test_exact_posteriors_pass(rows: int, noise: float) -> None:
    for seed in range(20):
        found = answers(case_of(Readings(noise), readings(seed, rows, noise)))
        assert [each.verdict for each in found] == ["pass", "pass"]


def test_the_lower_bound_is_below_zero_where_the_codes_fill_the_prior() -> None:
    """A density of codes has at most the prior's mean log-density; 20 means of 60 rows, one tail of 0.001."""
    found = [
        aggregate_posterior.answer(case_of(Readings(0.3), readings(seed, 60, 0.3)), 0.05).details["lower"]
        for seed in range(20)
    ]
    mean, se = stats.describe(found).mean, stats.sem(found)
    assert mean < stats.norm.isf(0.001) * se


@pytest.mark.parametrize("noise", [1.0, 2.0])
def test_the_information_is_that_of_the_closed_form(noise: float) -> None:
    exact = LATENT / 2 * math.log1p(noise**-2)
    found = code_information.answer(case_of(Readings(noise), readings(0, 256, noise)), 0.05)
    assert found.se is not None
    # The estimate is biased by less than half an effective row's share of the codes.
    assert abs(found.value - exact) < 3.3 * found.se + 0.02


def test_the_ceiling_is_told_where_it_binds() -> None:
    found = code_information.answer(case_of(Readings(1e-3), readings(0, 50, 1e-3)), 0.05)
    assert found.value == pytest.approx(math.log(50), abs=0.05)
    assert found.details["ceiling binds"]
    assert "near the most that 50 rows can show, log 50" in found.reading


def test_codes_that_tell_nothing_are_a_caution() -> None:
    for seed in range(20):
        found, filled = answers(case_of(Readings(1.0, gain=0.05, sd=1.0), readings(seed, 100, 1.0)))
        assert found.verdict == "caution"
        assert "collapsed" in found.reading and "free_bits" in found.next_step
        assert filled.verdict == "pass"


@pytest.mark.parametrize("kind", ["wide", "holes"])
def test_codes_that_leave_the_prior_or_parts_of_it_empty_are_a_caution(kind: str) -> None:
    for seed in range(20):
        x = readings(seed, 200, 0.05)
        x = 3 * x if kind == "wide" else x.sign()  # holes: mean and variance are those of the prior
        found = aggregate_posterior.answer(case_of(Readings(0.05), x), 0.05)
        assert found.verdict == "caution"
        assert 1 < found.value < found.details["upper"]
        assert "prior='mixture'" in found.next_step


def test_a_report_has_them_on_request() -> None:
    posterior = Posterior(ProgramInstance(Readings(0.5), (x := readings(0, 100, 0.5),), 100))
    names = ["information of the codes", "aggregate posterior"]
    report = check(posterior, x, draws=50, particles=50, extra=names)
    assert [each.name for each in report.checks[-2:]] == names
    assert report.verdict == "pass"


class OwnPrior(Readings):
    """The prior of a row's code depends on the row."""

    def model(self, x: Tensor) -> None:
        with self.data_plate(x):
            z = pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, self.noise).to_event(1), obs=x)


class Auxiliary(Readings):
    """The guide draws a site that the model does not have."""

    def guide(self, x: Tensor) -> None:
        with self.data_plate(x):
            u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(self.gain * x + u.unsqueeze(-1), self.sd).to_event(1))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(OwnPrior, "The prior of z differs from row to row"), (Auxiliary, "The guide draws other sites beside z")],
)
def test_codes_without_one_density_are_not_judged(kind: type[Readings], reason: str) -> None:
    case = case_of(kind(1.0), readings(0, 20, 1.0))
    assert code_information.applies(case)
    with pytest.raises(ValueError, match=reason):
        code_information.answer(case, 0.05)
