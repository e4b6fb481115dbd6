"""The report: text, HTML page, pictures and files."""

from __future__ import annotations

import json
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from deepprob.data import Split
from deepprob.diagnostics import Check, Diagnostic, judging, plots
from deepprob.diagnostics.advice import Uses, claims
from deepprob.diagnostics.checks import CHECKS
from deepprob.diagnostics.picture import Picture, drawn
from deepprob.diagnostics.report import Report, check
from deepprob.inference.svi import svi
from deepprob.models import VAE, DeepMarkovModel
from deepprob.programs.program import Program

CLASSES = (judging.confusion, judging.roc, judging.precision_recall, judging.class_reliability)
HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)> & co"


def a_report(title: str = "my fit") -> Report:
    picture = Picture("p", title, title, title, plots.render(plots.kl_bars([2.0, 0.1])))
    checks = (
        Check("good", 0.1234, 0.01, 0.5, "pass", "The value is small.", "", {"n": 3, "values": [1.0, float("nan")]}),
        Check(title[:20], float("nan"), None, None, "caution", title, title, {title: title}),
    )
    return Report(checks, title, {"config": {title: title}, "versions": {"torch": "2"}}, lambda: (picture,))


def test_text_starts_with_the_verdict_and_wraps_lines() -> None:
    long = Check("a", 1.0, 0.1, 0.5, "fail", "word " * 60, "word " * 40)
    text = str(Report((long, *a_report().checks), "title " * 40))
    assert text.startswith("FAIL · ")
    assert max(map(len, text.splitlines())) <= 100
    assert "Next: " in text


@pytest.mark.parametrize(
    ("verdicts", "summary"),
    [
        ((), "No check applies."),
        (("pass",), "The only check passed."),
        (("pass", "pass"), "All 2 checks passed."),
        (("pass", "caution"), "Of 2 checks, 1 raised a caution (c1)."),
        (("fail", "caution", "caution"), "Of 3 checks, 1 failed (c0) and 2 raised a caution (c1; c2)."),
    ],
)
def test_summary(verdicts: tuple[str, ...], summary: str) -> None:
    checks = tuple(Check(f"c{i}", 0.0, None, None, v, "r") for i, v in enumerate(verdicts))  # type: ignore[arg-type]
    assert Report(checks, "t").summary == summary


def test_a_check_is_looked_up_by_name() -> None:
    assert a_report()["good"].value == 0.1234
    with pytest.raises(KeyError, match=r"the report has no check 'best'\. It has: good; my fit\."):
        a_report()["best"]


def decided(**verdicts: str) -> str:
    checks = tuple(Check(a, 0.0, None, None, v, "", about=a) for a, v in verdicts.items())  # type: ignore[arg-type]
    return Report(checks, "t", uses=Uses("predictions of y", "conclusions about w")).decision


@pytest.mark.parametrize(
    ("verdicts", "sentence"),
    [
        (
            {"fit": "pass", "posterior": "pass", "predictions": "pass"},
            "This model may be used for predictions of y and conclusions about w.",
        ),
        (
            {"fit": "pass", "posterior": "fail", "predictions": "pass"},
            "This model may be used for predictions of y, but not for conclusions about w: its posterior is wrong.",
        ),
        (
            {"fit": "pass", "predictions": "pass"},
            "This model may be used for predictions of y, but not for conclusions about w: "
            "no check could examine its posterior.",
        ),
        (
            {"fit": "fail", "posterior": "pass", "predictions": "pass"},
            "Do not use this model yet for predictions of y or conclusions about w: its training has not succeeded.",
        ),
        (
            {"posterior": "pass", "predictions": "fail"},
            "This model may be used with care for conclusions about w, but not for predictions of y: "
            "its predictions do not match the data (predictions).",
        ),
        (
            {"posterior": "caution", "predictions": "pass", "data": "caution"},
            "This model may be used with care for predictions of y and conclusions about w: "
            "the data may not be a fair test and its posterior may be inaccurate.",
        ),
        (
            {"fit": "pass", "posterior": "unchecked", "predictions": "unchecked"},
            "Do not use this model for predictions of y or conclusions about w: "
            "no check could examine its predictions and no check could examine its posterior.",
        ),
        (
            {"fit": "caution", "posterior": "pass", "predictions": "fail"},
            "Do not use this model yet for predictions of y or conclusions about w: "
            "its training may not be finished and its predictions do not match the data (predictions).",
        ),
        ({}, ""),
    ],
)
def test_the_decision_follows_from_what_the_checks_support(verdicts: dict[str, str], sentence: str) -> None:
    assert decided(**verdicts) == sentence


def test_a_claim_examined_in_part_needs_care() -> None:
    checks = tuple(Check(v, 0.0, None, None, v, "", about="posterior") for v in ("pass", "unchecked"))  # type: ignore[arg-type]
    assert claims(checks) == {"posterior": "caution"}
    assert "could be examined only in part" in Report(checks, "t").decision


def test_every_diagnostic_supports_a_claim() -> None:
    assert {diagnostic.about for diagnostic in CHECKS.values()} == {"fit", "posterior", "predictions", "data"}


def test_further_checks_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepprob.diagnostics.checks.sandwich._STEPS", 4)
    example = VAE.example()
    posterior = svi(example.program, example.data, steps=20, seed=0, progress=False)
    own = Diagnostic(
        "mine", "Is it mine?", lambda case: True, lambda *_: Check("mine", 1.0, None, None, "pass", ""), about="fit"
    )
    report = check(posterior, *example.data, extra=["sandwich of the evidence", own])
    assert [each.name for each in report.checks[-2:]] == ["sandwich of the evidence", "mine"]
    assert report["sandwich of the evidence"].verdict != "unchecked"
    with pytest.raises(ValueError, match=r"unknown extra check 'sandwich'.*sandwich of the evidence"):
        check(posterior, *example.data, extra=["sandwich"])


def test_a_check_on_request_that_does_not_apply_says_so() -> None:
    never = Diagnostic(
        "mine", "Is it mine?", lambda case: False, lambda *_: Check("", 0.0, None, None, "pass", ""), about="fit"
    )
    example = VAE.example()
    report = check(svi(example.program, example.data, steps=1, progress=False), *example.data, extra=[never])
    assert report["mine"].verdict == "unchecked"
    assert "does not apply" in report["mine"].reading


def test_next_steps_are_ordered_and_do_not_repeat() -> None:
    def raised(name: str, verdict: str, step: str, about: str = "predictions") -> Check:
        return Check(name, 0.0, None, None, verdict, "No data.", step, about=about)  # type: ignore[arg-type]

    report = Report(
        (
            raised("a", "unchecked", ""),
            raised("b", "caution", "Widen."),
            raised("c", "fail", "Recalibrate."),
            raised("d", "caution", "Train on.", "fit"),
            raised("e", "fail", "Widen."),
            raised("f", "pass", "Rest."),
        ),
        "t",
    )
    steps = {"Train on.": ["d"], "Recalibrate.": ["c"], "Widen.": ["e", "b"], "Not examined: No data.": ["a"]}
    assert dict(report.next_steps) == steps
    printed = [line for line in str(report).splitlines() if line.startswith("Next: ")]
    assert printed == [f"Next: {step}" for step in steps]
    page = report.to_html()
    assert [page.index(f"<li>{step}") for step in steps] == sorted(page.index(f"<li>{step}") for step in steps)


def test_checks_are_found_by_slug_and_none_is_lost() -> None:
    twins = tuple(Check(f"coverage of {site}", i, None, None, "pass", "") for i, site in enumerate(("a_b", "a.b")))
    report = Report(twins, "t")
    assert report["coverage-of-a-b-2"].value == 1
    assert [*report.to_dict()["checks"]] == ["coverage-of-a-b", "coverage-of-a-b-2"]


class Tags(HTMLParser):
    """All tags of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_page_is_self_contained_and_runs_no_script() -> None:
    tags = Tags(a_report(HOSTILE).to_html()).found
    assert not {"script", "link", "iframe", "object", "a"} & {tag for tag, _ in tags}
    assert not [name for _, attrs in tags for name in attrs if name.startswith("on") or name == "href"]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert {"http-equiv": "Content-Security-Policy", "content": policy} in [attrs for _, attrs in tags]
    images = [attrs for tag, attrs in tags if tag == "img"]
    assert len(images) == 1
    assert str(images[0]["src"]).startswith("data:image/png;base64,") and images[0]["alt"] == HOSTILE


def test_a_notebook_shows_the_report_in_a_sandboxed_frame() -> None:
    frame = a_report(HOSTILE)._repr_html_()
    assert frame.startswith("<iframe sandbox srcdoc=") and frame.count("<") == 2


def test_json_contains_every_number(tmp_path: Path) -> None:
    path = a_report().save(tmp_path / "deep" / "report.json")
    data = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert data["verdict"] == "caution" and data["schema"] == 2
    assert data["checks"]["good"]["details"] == {"n": 3, "values": [1.0, None]}
    assert data["checks"]["my-fit"]["value"] is None
    assert data["versions"] == {"torch": "2"}


def test_file_format_follows_the_suffix(tmp_path: Path) -> None:
    assert a_report().save(str(tmp_path / "a.HTML")).read_text().startswith("<!doctype html>")
    with pytest.raises(ValueError, match=r"path must end in .html or .json; got 'a.pdf'"):
        a_report().save(tmp_path / "a.pdf")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_report().save(tmp_path / "a.json")
    before = path.read_text()

    def disk_full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match="no space left"):
        a_report("other").save(path)
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_plots_accept_unusual_data(recwarn: pytest.WarningsRecorder) -> None:
    rng = np.random.default_rng(0)
    steps = np.where(np.arange(300) % 50 == 0, np.nan, -np.exp(-np.arange(300) / 30))
    figures = [
        plots.training_curve(steps, [-1.0, np.nan, -0.5], steps_per_epoch=100),
        plots.training_curve([-1.0]),
        plots.training_curve(np.full(10, np.nan)),
        plots.image_rows({"a": rng.random((3, 4, 4)), "b": rng.random((12, 3, 4, 4)), "c": np.zeros((2, 4, 4, 1))}),
        plots.latent_scatter(rng.normal(size=(20, 1))),
        plots.latent_scatter(rng.normal(size=(20, 2)), rng.integers(0, 3, 20)),
        plots.latent_scatter(rng.normal(size=(40, 5)), np.arange(40)),
        plots.kl_bars([0.0]),
        plots.reliability(rng.dirichlet(np.ones(3), 7), rng.integers(0, 3, 7)),
        plots.predicted_against_observed(*rng.normal(size=(2, 400, 1)), np.full(400, -3), np.full(400, 3)),
        plots.predictive_band(*rng.normal(size=(3, 30)), (-np.ones(30), np.ones(30)), (-np.ones(30), np.ones(30))),
    ]
    assert all(plots.render(f).startswith(b"\x89PNG") for f in figures)
    assert not recwarn.list


def test_images_are_evenly_spaced_below_a_long_label() -> None:
    figure = plots.image_rows({"a label that is wider than its first two images": np.zeros((12, 4, 4))}, columns=12)
    plots.render(figure)
    steps = np.diff([axes.get_position().x0 for axes in figure.axes])
    assert len(steps) == 11 and float(np.ptp(steps)) < 1e-3


def test_plots_that_judge_predictions_accept_unusual_data(recwarn: pytest.WarningsRecorder) -> None:
    rng = np.random.default_rng(0)
    few, many = rng.dirichlet(np.ones(2), 9), rng.dirichlet(np.ones(20), 50)
    figures = [
        judging.residuals(np.ones((3, 2)), np.ones((3, 2))),
        judging.residuals(*rng.normal(size=(2, 5000))),
        judging.quantile_calibration(rng.poisson(1.0, (50, 8, 1)), rng.poisson(1.0, (8, 1))),
        judging.quantile_calibration(rng.normal(size=(5, 9000)), rng.normal(size=9000)),
        judging.replicated(np.ones(3), np.ones((4, 3))),
        judging.replicated(np.ones(50), np.ones((4, 50))),
        judging.replicated(rng.normal(size=(60, 2)), rng.normal(size=(9, 60, 2))),
        judging.rolls({"data": np.zeros((5, 6)), "again": np.zeros((5, 6))}),
        judging.fan(*rng.normal(size=(4, 6, 1))),
        judging.fan(*rng.normal(size=(4, 6, 5)), start=3),
        *(plot(few, np.arange(9) % 2) for plot in CLASSES),
        *(plot(few, np.ones(9)) for plot in CLASSES),
        *(plot(many, np.arange(50) % 20) for plot in CLASSES),
    ]
    assert all(drawn(f).startswith(b"\x89PNG") for f in figures)
    assert not recwarn.list


def test_calibration_curve_of_calibrated_counts_is_the_diagonal() -> None:
    rng = np.random.default_rng(0)
    axes = judging.quantile_calibration(rng.poisson(1.0, (500, 4000)), rng.poisson(1.0, 4000)).axes[0]
    levels, share = axes.lines[0].get_data()
    assert np.abs(np.asarray(share) - np.asarray(levels)).max() < 0.03


def test_plots_leave_no_global_state() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    thread = threading.Thread(target=lambda: plots.render(plots.kl_bars([1.0, 2.0])))
    thread.start()
    thread.join()
    assert dict(matplotlib.rcParams) == before


# -- on fits --------------------------------------------------------------------------------------------------------


def picture_names(report: Report) -> list[str]:
    images = [attrs for tag, attrs in Tags(report.to_html()).found if tag == "img"]
    assert all(attrs["alt"] for attrs in images)
    return [picture.name for picture in report.draw()]


def test_report_of_an_image_model() -> None:
    x = (torch.rand(120, 4, 4) < 0.3).float()
    data = Split({"x": x, "kind": x[:, 0, 0].long()})
    posterior = svi(VAE((4, 4), latent_dim=3), data, epochs=2, seed=0, progress=False)
    report = check(posterior, data, ood=1 - x, draws=30, particles=30)
    names = {"ELBO convergence", "tightness of the bound", "active latent dimensions", "out-of-distribution detection"}
    assert names < {c.name for c in report.checks}
    assert picture_names(report) == ["reconstructions", "traversal", "codes", "information", "training"]
    json.dumps(report.to_dict(), allow_nan=False)
    assert "simulations of data like these" in report.decision


@pytest.mark.parametrize("columns", [1, 3])
def test_report_of_a_regression(columns: int) -> None:
    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(columns), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)

    x = torch.randn(60, columns, generator=torch.Generator().manual_seed(0))
    data = Split({"x": x, "y": x.sum(1)})
    posterior = svi(Program.of(model, "normal", data_plate="data"), data, epochs=60, seed=0, progress=False)
    report = check(posterior, data, train=data, draws=60, particles=60)
    assert {"Pareto k-hat, global latents", "interval coverage", "predictive skill"} < {c.name for c in report.checks}
    assert picture_names(report) == ["predictions", "residuals", "quantiles", "latents", "training"]
    found = {score.name: score.value for score in report.scores["y"]}
    assert found["R2"] == pytest.approx(1 - (found["RMSE"] / float(data["y"].std(correction=0))) ** 2)
    assert [*report.latents] == [f"w[{i}]" for i in range(columns)]
    assert report.facts["judged on"]["shapes"] == f"x 60 × {columns} (float32); y 60 (float32)"


@pytest.mark.parametrize("classes", [2, 3])
def test_report_of_a_classifier(classes: int) -> None:
    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, classes), 1.0).to_event(2))
        logits = (x.unsqueeze(-1) * w).sum(-2)
        with pyro.plate("data", len(x)):
            if classes == 2:
                pyro.sample("y", dist.Bernoulli(logits=logits[..., 0]), obs=None if y is None else y.float())
            else:
                pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    x = torch.randn(80, 2, generator=torch.Generator().manual_seed(0))
    data = Split({"x": x, "y": (x[:, 0] > 0).long()})
    posterior = svi(Program.of(model, "normal", data_plate="data"), data, epochs=60, seed=0, progress=False)
    report = check(posterior, data, draws=60)
    assert {"calibration of probabilities", "predictive skill"} < {c.name for c in report.checks}
    classes_only = ["reliability"] if classes > 2 else []
    names = ["confusion", "roc", "precision-recall", "class-reliability", *classes_only, "latents", "training"]
    assert picture_names(report) == names
    found = {score.name: score.value for score in report.scores["y"]}
    assert found["base rate"] == pytest.approx(max(data["y"].float().mean(), 1 - data["y"].float().mean()))
    assert found["gain over the base rate"] == pytest.approx(found["accuracy"] - found["base rate"])
    assert ("AUROC" in found) == (classes == 2)


def test_reports_of_sequences_and_of_programs_without_a_data_plate() -> None:
    notes = Split({"notes": (torch.rand(12, 6, 5) < 0.4).float(), "lengths": torch.arange(1, 13).clamp(max=6)})
    sequences = svi(DeepMarkovModel(5, latent_dim=2), notes, epochs=2, seed=0, progress=False)
    report = check(sequences, notes, draws=30, particles=30)
    assert report["posterior predictive check"].verdict != "unchecked"
    assert picture_names(report)[:2] == ["sequence", "forecast"]

    def schools(y: torch.Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("schools", 8):
            theta = pyro.sample("theta", dist.Normal(mu, 2.0))
            pyro.sample("y", dist.Normal(theta, 10.0), obs=y)

    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    whole = svi(Program.of(schools, "normal"), y, epochs=60, seed=0, progress=False)
    report = check(whole, y, draws=60, particles=60)
    assert {"posterior means, global latents", "posterior predictive check"} < {c.name for c in report.checks}
    assert picture_names(report) == ["replicates", "latents", "training"] and len(report.latents) == 9
