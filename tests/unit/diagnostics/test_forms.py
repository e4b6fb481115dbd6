"""Checks of every form of arguments, of several observed sites, and of questions that have no answer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import deepprob as dp
from deepprob.diagnostics import Case, Check
from deepprob.inference import svi
from deepprob.models import VAE
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

NOISE = torch.Generator().manual_seed(0)
X = torch.randn(30, generator=NOISE)
Y = 2 * X + 0.5 * torch.randn(30, generator=NOISE)
COUNTS = torch.poisson(torch.full((17,), 3.0), generator=NOISE)
LABELS = (X + 0.3 * torch.randn(30, generator=NOISE) > 0).float()
PACKED = pack_sequence([torch.randn(length, generator=NOISE) for length in (5, 4, 2)])


def slope() -> Tensor:
    return torch.as_tensor(pyro.sample("b", dist.Normal(0.0, 3.0)))


def line(x: Tensor, y: Tensor | None, scale: float = 0.5) -> None:
    b = slope()
    with pyro.plate("rows", len(x)):
        pyro.sample("obs", dist.Normal(b * x, scale), obs=y)


def by_keyword(*, x: Tensor, y: Tensor | None = None) -> None:
    line(x, y)


def one_dict(data: dict[str, Tensor]) -> None:
    line(data["x"], data.get("y"))


def nested(x: Tensor, rest: tuple[Tensor, str]) -> None:
    line(x, rest[0], 0.5 if rest[1] == "sure" else 5.0)


def with_flags(x: Tensor, y: Tensor | None = None, flag: bool = True, nothing: None = None, word: str = "a") -> None:
    line(x, y)


def target_first(y: Tensor | None = None, x: Tensor = X) -> None:
    line(x, y)


def with_scales(x: Tensor, scales: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, scales).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("obs", dist.Normal(w.sum(-1, keepdim=True) * x, 0.5), obs=y)


def required(y: Tensor) -> None:
    line(X, y)


def closure() -> None:
    line(X, Y)


def labels(data: dict[str, Tensor]) -> None:
    b = slope()
    with pyro.plate("rows", len(data["x"])):
        pyro.sample("obs", dist.Bernoulli(logits=b * data["x"]), obs=data["labels"])


def packed(rows: PackedSequence) -> None:
    x, lengths = pad_packed_sequence(rows, batch_first=True)
    b = slope()
    seen = torch.arange(x.shape[1]) < lengths.unsqueeze(1)
    with pyro.plate("steps", x.shape[1], dim=-1), pyro.plate("rows", x.shape[0], dim=-2), pyro.poutine.mask(mask=seen):
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def fitted(model: Callable[..., Any], data: Any, guide: Any = "normal", **options: Any) -> Posterior:
    return svi(Program.of(model, guide, **options), data, epochs=300, progress=False, compile=False, seed=0)


def checks(model: Callable[..., Any], data: Any, **options: Any) -> dict[str, Check]:
    report = dp.check(fitted(model, data), data, draws=60, particles=60, **options)
    assert report.to_html() and str(report)
    return {check.name: check for check in report.checks}


EVERY = {"weight of the likelihood", "posterior predictive check"}  # asked for every observed site
RUN = {"finite steps", "ELBO convergence", "Pareto k-hat, global latents", *EVERY}
TARGETS = {"interval coverage", "probability integral transform", "predictive skill"}
PREDICTIONS = {*TARGETS, "calibration of probabilities"}  # of a target, asked for every observed site too


@pytest.mark.parametrize(
    ("model", "data", "more"),
    [
        (by_keyword, {"x": X, "y": Y}, TARGETS),
        (one_dict, {"x": X, "y": Y}, TARGETS),
        (one_dict, ({"y": Y, "x": X},), TARGETS),
        (nested, (X, (Y, "sure")), TARGETS),
        (with_flags, (X, Y, False, None, "b"), TARGETS),
        (target_first, (Y, X), TARGETS),
        (with_scales, (X, torch.ones(3), Y), TARGETS),
        (functools.partial(by_keyword, x=X), {"y": Y}, set()),
        (labels, {"labels": LABELS, "x": X}, {"calibration of probabilities", "predictive skill"}),
        (packed, PACKED, set()),
        (required, Y, set()),
        (closure, None, set()),
    ],
)
def test_checks_of_every_form_of_arguments(model: Callable[..., Any], data: Any, more: set[str]) -> None:
    found = checks(model, data)
    assert found.keys() >= RUN and found.keys() & PREDICTIONS == more
    assert all(check.verdict != "unchecked" for check in found.values())


@pytest.mark.parametrize("plate", [None, "rows"])
def test_other_forms_give_the_numbers_of_positional_arguments(plate: str | None) -> None:
    forms = {with_flags: (X, Y), by_keyword: {"y": Y, "x": X}, one_dict: {"x": X, "y": Y}, target_first: (Y, X)}
    cases = [Case(fitted(model, data, data_plate=plate), data, max_rows=20) for model, data in forms.items()]
    assert {len(case.target) for case in cases} == {30 if plate is None else 20}
    for case in cases[1:]:
        assert case.by_site()[0].replicates == pytest.approx(cases[0].by_site()[0].replicates, abs=1e-4)
        assert (case.target == cases[0].target).all() and case.supervised


def test_the_target_is_what_the_site_reads() -> None:
    def model(x: Tensor, y: Tensor | None = None, weights: Tensor | None = None) -> None:
        line(x, y)

    (case,) = Case(fitted(model, (X, Y, X.abs())), (X, Y, X.abs())).by_site()
    assert torch.as_tensor(case.target).float().equal(Y) and len(case.inputs) == 2


def two_plates(y: Tensor, counts: Tensor) -> None:
    b = slope()
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b, 2.0), obs=y)
    with pyro.plate("others", len(counts)):
        pyro.sample("counts", dist.Poisson(b.exp()), obs=counts)


def two_targets(x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> None:
    b = slope()
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(b * x, 0.5), obs=y)
        pyro.sample("z", dist.Normal(b * x, 0.5), obs=z)


def sites_asked(found: dict[str, Check]) -> set[str]:
    """The checks that are named by a site."""
    return {name for name in found if name.endswith((" of y", " of z", " of counts"))}


def test_predictions_are_checked_for_every_observed_site() -> None:
    found = checks(two_plates, (Y, COUNTS))
    assert sites_asked(found) == {f"{name} of {site}" for name in EVERY for site in ("y", "counts")}
    assert found["posterior predictive check of counts"].details["statistics"]["mean"]["observed"] == COUNTS.mean()
    found = checks(two_targets, (X, Y, Y + 20))
    assert sites_asked(found) == {f"{name} of {site}" for name in (*TARGETS, *EVERY) for site in "yz"}
    assert found["posterior predictive check of z"].value < 1 / 120  # more replicates than the 60 draws
    seen = [found[f"posterior predictive check of {site}"].details["statistics"]["mean"]["observed"] for site in "yz"]
    assert seen == pytest.approx([float(Y.mean()), 20 + float(Y.mean())])


def test_one_site_is_chosen() -> None:
    found = checks(two_targets, (X, Y, Y.flip(0)), site="y")
    assert found.keys() >= RUN | TARGETS and not sites_asked(found)
    with pytest.raises(ValueError, match=r"the program observes no site 'a'\. Choose from: y, z\."):
        dp.check(fitted(two_targets, (X, Y, Y)), (X, Y, Y), site="a")


def test_sites_of_a_loop_are_checked_together() -> None:
    def loop(y: Tensor) -> None:
        b = slope()
        for i in range(len(y)):
            pyro.sample(f"y_{i}", dist.Normal(b, 2.0), obs=y[i])

    found = checks(loop, Y)
    assert found.keys() >= RUN and not found.keys() & PREDICTIONS
    shown = found["posterior predictive check"].details["statistics"]
    assert shown["max"]["observed"] == pytest.approx(float(Y.max()))


def test_masked_values_are_left_out() -> None:
    def model(seen: Tensor, y: Tensor) -> None:
        b = slope()
        with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(b, 2.0), obs=y)

    seen = torch.arange(30) > 9
    found = checks(model, (seen, torch.where(seen, Y, 100.0)))
    assert found["posterior predictive check"].verdict == "pass"
    assert "posterior predictive check" not in checks(model, (torch.zeros(30) > 0, Y))


def test_a_check_that_cannot_look_says_so() -> None:
    posterior = fitted(one_dict, {"x": X, "y": Y}, data_plate="rows")
    posterior.accuracy = None  # as of a fit that was interrupted
    report = dp.check(posterior, {"x": X + 0.1, "y": Y}, draws=60)
    unchecked = report["Pareto k-hat, global latents"]
    assert unchecked.verdict == "unchecked" and math.isnan(unchecked.value) and unchecked.measured == ""
    assert "Pass train=" in unchecked.reading
    assert "could not look" in report.summary and unchecked.name in report.summary.replace("\n", " ")
    assert "unchecked Pareto k-hat, global latents" in str(report)
    assert (
        dp.check(posterior, {"x": X, "y": Y}, train={"x": X, "y": Y}, draws=60)[unchecked.name].verdict != "unchecked"
    )


def factor(y: Tensor) -> None:
    b = slope()
    with pyro.plate("rows", len(y)):
        pyro.factor("likelihood", dist.Normal(b, 2.0).log_prob(y))


def wide(y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(101), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(w.sum(-1), 2.0), obs=y)


def process(x: Tensor, y: Tensor | None = None) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    kernel = (-((x.unsqueeze(1) - x) ** 2)).exp() * scale + 0.3 * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), kernel), obs=y)


def pairs(x: Tensor, y: Tensor | None = None) -> None:
    b = slope()
    with pyro.plate("rows", len(x)):
        logits = torch.stack([b * x, 0 * x], -1)
        pyro.sample("y", dist.Categorical(logits=torch.stack([logits, logits], -2)).to_event(1), obs=y)


def needs_its_target(x: Tensor, y: Tensor | None = None) -> None:
    b = slope()
    with pyro.plate("rows", len(y)):  # type: ignore[arg-type]
        pyro.sample("y", dist.Normal(b * x, 0.5), obs=y)


class Spread(Program):
    """A program of any number of arguments."""

    def model(self, *batch: Tensor) -> None:
        with self.data_plate(*batch):
            pyro.sample("y", dist.Normal(batch[0] * pyro.param("slope", torch.tensor(1.0)), 0.5), obs=batch[1])

    def guide(self, *batch: Tensor) -> None:
        pass


def test_checks_of_a_program_of_any_arguments() -> None:
    posterior = svi(Spread(), (X, Y), epochs=300, progress=False, compile=False)
    names = {check.name for check in dp.check(posterior, (X, Y), draws=30).checks}
    assert names >= {"finite steps", "ELBO convergence", *EVERY, *TARGETS}


@pytest.mark.parametrize(
    ("model", "data", "name", "reason"),
    [
        (needs_its_target, (X, Y), "posterior predictive check", "The program cannot run in this way: object of type"),
    ],
)
def test_reasons(model: Callable[..., Any], data: Any, name: str, reason: str) -> None:
    found = checks(model, data)[name]
    assert found.verdict == "unchecked" and reason in found.reading


def test_khat_is_not_asked_in_many_dimensions() -> None:
    assert RUN - checks(wide, Y).keys() == {"Pareto k-hat, global latents"}


@pytest.mark.parametrize(
    ("model", "data", "name", "asked"),
    [
        (factor, Y, "posterior predictive check", False),
        (process, (X, Y), "predictive skill", False),
        (process, (X, Y), "posterior predictive check", True),
        (pairs, (X, (X > 0).long().unsqueeze(1).expand(30, 2)), "posterior predictive check", True),
    ],
)
def test_a_question_without_meaning_is_not_asked(model: Callable[..., Any], data: Any, name: str, asked: bool) -> None:
    found = checks(model, data)
    assert (name in found) == asked
    assert all(check.verdict != "unchecked" for check in found.values()), found


def test_codes_of_all_rows_have_no_bound_by_row_but_checks() -> None:
    def codes(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 2.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    posterior = fitted(codes, Y, "multivariate_normal")
    assert "ELBO convergence" in {check.name for check in dp.check(posterior, Y, draws=30, particles=30).checks}


def test_a_network_that_counts_its_calls_leaves_one_question_open() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, z: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(z)

    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    program = VAE((3,), 2, (4,), likelihood="normal", decoder=Counting(2, 3))
    report = dp.check(svi(program, rows, steps=5, progress=False), rows)
    found = report["amortization gap"]
    assert found.verdict == "unchecked" and "changes 'calls' in Python" in found.reading
    assert [check.name for check in report.checks if check.verdict == "unchecked"] == [found.name]


def test_bad_data_are_refused_and_not_unchecked() -> None:
    posterior = fitted(labels, {"x": X, "labels": LABELS})
    with pytest.raises(ValueError, match="obs must be 0 or 1 for a Bernoulli likelihood"):
        dp.check(posterior, {"x": X, "labels": LABELS + 0.5})


@pytest.mark.parametrize(("scale", "weight"), [(1.0, 0.05), (20.0, 1.0)])
@pytest.mark.parametrize("given", [Y, Y[:7]])
def test_rows_that_the_program_draws_itself_have_a_weight(scale: float, weight: float, given: Tensor) -> None:
    rows = torch.cat([Y, Y])[:40]

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        chosen = y[torch.randint(len(y), (2,))]
        with pyro.plate("chosen", 2), pyro.poutine.scale(scale=scale):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=chosen)

    found = dp.check(fitted(model, rows), given)["weight of the likelihood"]
    assert found.value == pytest.approx(weight)


@pytest.mark.parametrize("plates", [1, 2])
@pytest.mark.parametrize("given", [Y, Y[:7]])
def test_values_that_the_program_draws_anew_have_a_weight_of_one(plates: int, given: Tensor) -> None:
    """As where a VAE draws black and white pixels from grey ones."""

    def model(y: Tensor) -> None:
        logit = pyro.sample("logit", dist.Normal(torch.zeros(3), 3.0).to_event(1))
        pixels = torch.bernoulli(y.sigmoid().unsqueeze(-1).expand(-1, 3))
        if plates == 1:
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Bernoulli(logits=logit).to_event(1), obs=pixels)
            return
        with pyro.plate("pixels", 3, dim=-2), pyro.plate("rows", len(y), dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=logit.unsqueeze(-1)), obs=pixels.T)

    found = dp.check(fitted(model, Y, data_plate="rows"), given, draws=30)["weight of the likelihood"]
    assert (found.verdict, found.value) == ("pass", 1.0)


@pytest.mark.parametrize("plate", [None, "rows"])
@pytest.mark.parametrize("guide", ["multivariate_normal", "low_rank"])
def test_a_guide_of_all_rows_together_is_asked_what_it_can_answer(guide: str, plate: str | None) -> None:
    def codes(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 2.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    report = dp.check(fitted(codes, Y, guide, data_plate=plate), Y)
    assert report.verdict in ("pass", "caution") and report.to_html()
    assert {check.name for check in report.checks} >= {f"posterior {x}, global latents" for x in ("means", "widths")}
    assert all(check.verdict != "unchecked" for check in report.checks)
