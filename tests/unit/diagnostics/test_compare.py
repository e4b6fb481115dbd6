"""The comparison of posteriors: order, ties, words, and its page."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import deepprob as dp
from deepprob.diagnostics.compare import Comparison, Contender
from deepprob.diagnostics.report import Report
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.instance import ProgramInstance

NOISE = torch.Generator().manual_seed(0)
X = torch.randn(60, generator=NOISE)
Y = 1.5 * X + 0.5 * torch.randn(60, generator=NOISE)
FINE = dp.Check("a", 0.0, None, None, "pass", "The value is small.")
WRONG = dp.Check("b", 9.0, 0.5, None, "fail", "The value is high.", "Look at it.")


def line(x: Tensor, y: Tensor | None = None) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(b * x, 0.5), obs=y)


def flat(x: Tensor, y: Tensor | None = None) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(b + 0 * x, 1.6), obs=y)


def exact(plate: str | None = None) -> Posterior:
    """The line's posterior in closed form."""
    precision = (X @ X) / 0.25 + 1 / 9

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("b", dist.Normal((X @ Y) / 0.25 / precision, precision**-0.5))

    program = dp.Program.of(line, guide, data_plate=plate)
    return Posterior(ProgramInstance(program, program.accept((X, Y)), 60))


def constant(plate: str | None = None) -> Posterior:
    precision = 60 / 2.56 + 1 / 9

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("b", dist.Normal(Y.sum() / 2.56 / precision, precision**-0.5))

    program = dp.Program.of(flat, guide, data_plate=plate)
    return Posterior(ProgramInstance(program, program.accept((X, Y)), 60))


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return dp.compare(constant(), exact(), data=(X, Y))


def contender(name: str, pointwise: list[float], check: dp.Check = FINE, **more: object) -> Contender:
    return Contender(name, Report((check,), name), np.array(pointwise), "held-out rows", **more)  # type: ignore[arg-type]


def test_the_better_model_is_first_by_leave_one_out(comparison: Comparison) -> None:
    best, other = comparison.contenders
    assert (best.name, other.name) == ("line", "flat") and comparison.rows == 60
    assert best.method == "leave-one-out (guide corrected)"
    assert best.elpd == pytest.approx(exact().loo(X, Y).elpd)
    gap = constant().loo(X, Y).pointwise - exact().loo(X, Y).pointwise
    assert other.difference == pytest.approx(gap.sum())
    assert other.difference_se == pytest.approx(math.sqrt(60) * gap.std(ddof=1))
    assert (
        comparison.summary.startswith("line predicts best:")
        and "nats more than flat over 60 rows" in comparison.summary
    )
    assert comparison["flat"] is other and comparison.leaders == (best,)


def test_held_out_rows_are_scored_as_they_are() -> None:
    x, y = X[:20] + 0.1, 1.5 * X[:20] + 0.15
    found = dp.compare(exact("rows"), constant("rows"), data=(x, y), names=["slope", "level"])
    assert found.best.method == "held-out rows" and found.rows == 20
    b = exact().sample(X, draws=4000)["b"]
    expected = dist.Normal(b[:, None] * x, 0.5).log_prob(y).logsumexp(0) - math.log(4000)
    assert found["slope"].elpd == pytest.approx(float(expected.sum()), abs=0.1)


def test_rows_of_local_latents_are_scored_by_their_evidence() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def encoder(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    program = dp.Program.of(model, encoder, data_plate="data")
    posterior = Posterior(ProgramInstance(program, program.accept(X), 60))
    found = dp.compare(posterior, posterior, data=Y)
    assert found.best.elpd == pytest.approx(float(dist.Normal(0.0, 2**0.5).log_prob(Y).sum()), abs=1e-3)
    assert [x.name for x in found.contenders] == ["model 1", "model 2"]
    assert found.summary == "Tie: model 1 and model 2 cannot be told apart over 60 rows; they do not differ."


def test_differences_within_two_standard_errors_are_ties() -> None:
    a, b = contender("a", [-1.0, -1.0, -1.0]), contender("b", [-2.0, -0.5, -1.5], difference=-1.0, difference_se=1.3)
    found = Comparison((a, b))
    assert b.tied and found.leaders == (a, b)
    assert found.summary == (
        "Tie: a and b cannot be told apart over 3 rows; b has 1.0 ± 1.3 nats less, within two standard errors."
    )
    worse = contender("c", [-9.0, -9.0, -9.0], difference=-24.0, difference_se=0.1)
    assert worse.gap == "24.00 ± 0.10 nats less, beyond two standard errors"
    assert not worse.tied
    single = contender("d", [-9.0], difference=-8.0, difference_se=math.nan)
    assert single.tied and single.gap == "8 nats less, but one row cannot tell"


def test_a_leader_that_failed_is_named() -> None:
    a = contender("a", [-1.0, -1.0], WRONG)
    b = contender("b", [-5.0, -5.0], difference=-8.0, difference_se=0.5)
    assert Comparison((a, b)).summary.endswith("But the verdict of a is fail: do not use it yet.")


def test_unreliable_densities_are_said_with_the_remedy() -> None:
    a = contender("a", [-1.0, -1.0], unreliable=1)
    b = contender("b", [-5.0, -5.0], difference=-8.0, difference_se=0.5)
    summary = Comparison((a, b)).summary
    assert summary.endswith("The densities of a are unreliable in many rows: compare on held-out rows.")


def test_a_guide_without_a_mean_of_its_weights_is_scored_as_it_is() -> None:
    def many(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([100]).to_event(1))
        line(x, y)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("w", dist.Normal(0.0, 0.5).expand([100]).to_event(1))
        pyro.sample("b", dist.Normal(1.5, 0.06))

    program = dp.Program.of(many, guide)
    narrow = Posterior(ProgramInstance(program, program.accept((X, Y)), 60))
    found = dp.compare(exact(), narrow, data=(X, Y))
    assert found["many"].method == "leave-one-out (guide as it is)"
    assert found["line"].method == "leave-one-out (guide corrected)"


def test_text_and_json(comparison: Comparison, tmp_path: Path) -> None:
    lines = str(comparison).splitlines()
    assert lines[2].split() == ["verdict", "elpd", "difference", "method"]
    assert lines[3].startswith("line") and " best " in lines[3] and lines[4].startswith("flat")
    saved = json.loads(comparison.save(tmp_path / "new" / "compare.json").read_text())
    assert saved["best"] == "line" and saved["models"]["flat"]["tied"] is False
    assert len(saved["models"]["line"]["pointwise"]) == 60
    assert saved["models"]["line"]["report"]["verdict"] == comparison.best.report.verdict


def test_the_page_is_self_contained_and_escapes_names(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    a = contender(name, [-1.0, -1.0])
    b = contender("b", [-5.0, -4.0], WRONG, difference=-7.0, difference_se=0.7, unreliable=2)
    found = Comparison((a, b))
    page = found.save(tmp_path / "compare.html").read_text()
    assert "<script" not in page and html.escape(name) in page and "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page
    assert page.count('role="img"') == 2 and "2 rows unreliable" in page
    assert found.checks == [("a", [("pass", "0"), ("", "")]), ("b", [("", ""), ("fail", "9.00 ± 0.50")])]
    frame = found._repr_html_()
    assert frame.startswith("<iframe sandbox srcdoc=") and "<script" not in frame


def test_names_of_programs_are_made_distinct() -> None:
    found = dp.compare(exact(), exact(), constant(), data=(X, Y), draws=50)
    assert {x.name for x in found.contenders} == {"line 1", "line 2", "flat"}


def test_errors(comparison: Comparison, tmp_path: Path) -> None:
    a, b = exact(), constant()
    with pytest.raises(TypeError, match=r"compare expects posteriors; got tuple in place 3\. Give the data by name"):
        dp.compare(a, b, (X, Y))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"compare needs at least two posteriors; got 1\. Use check for one"):
        dp.compare(a, data=(X, Y))
    for names in (["one"], ["one", "one"], "ab"):
        with pytest.raises(ValueError, match="names must be 2 different names, one a posterior; got"):
            dp.compare(a, b, data=(X, Y), names=names)
    with pytest.raises(KeyError, match=r"there is no posterior 'c'\. Choose from: line and flat"):
        comparison["c"]
    with pytest.raises(ValueError, match=r"path must end in \.html or \.json; got 'compare\.pdf'"):
        comparison.save(tmp_path / "compare.pdf")


def fitted(model: object, data: tuple[Tensor, ...]) -> Posterior:
    return svi(dp.Program.of(model, "normal"), data, steps=3, progress=False, compile=False)  # type: ignore[arg-type]


def test_densities_of_different_values_are_refused() -> None:
    def scaled(x: Tensor, y: Tensor | None = None) -> None:
        line(x, None if y is None else y / 10)

    with pytest.raises(ValueError, match=r"line observes other values than scaled, .* have different units"):
        dp.compare(exact(), fitted(scaled, (X, Y)), data=(X, Y))

    def counts(x: Tensor, y: Tensor | None = None) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Poisson((0 * x + b).exp()), obs=y)

    whole = (X, Y.abs().round())
    with pytest.raises(ValueError, match=r"line gives densities and counts gives probabilities .* not comparable"):
        dp.compare(fitted(line, whole), fitted(counts, whole), data=whole)


def test_other_rows_and_rows_without_a_density_are_refused() -> None:
    def whole(x: Tensor, y: Tensor | None = None) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        pyro.sample("y", dist.Normal(b * x, 0.5).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"must split the data into the same rows; line has 60, whole has 1"):
        dp.compare(exact(), fitted(whole, (X, Y)), data=(X, Y))

    def narrow(x: Tensor, y: Tensor | None = None) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(x)):
            scale = torch.where(torch.arange(len(x)) == 7, torch.inf, 1.0)
            pyro.sample("y", dist.Normal(b * x, scale, validate_args=False), obs=y)

    with pytest.raises(ValueError, match=r"row 7 has no finite density under narrow, and so 1 of 60 rows"):
        values = {"b": torch.randn(1, 100, generator=NOISE)}
        dp.compare(exact(), dp.draws_posterior(dp.Program.of(narrow), (X, Y), values), data=(X, Y))


@pytest.mark.parametrize("data", [(X[:50], Y[:50]), (torch.cat([X, X + 9]), torch.cat([Y, Y]))])
def test_rows_of_which_only_some_are_those_of_the_fit_are_refused(data: tuple[Tensor, Tensor]) -> None:
    def fitted(model: object) -> Posterior:
        return svi(dp.Program.of(model, "normal"), (X, Y), steps=20, progress=False, compile=False)

    with pytest.raises(ValueError, match="rows of data are rows of the fit of line, but not all of its rows"):
        dp.compare(fitted(line), fitted(flat), data=data)
