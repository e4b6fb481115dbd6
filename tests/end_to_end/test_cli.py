"""The command `deepprob`: most tests run it in this process, the last ones in a subprocess."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

import deepprob.diagnostics.report
from deepprob.cli.commands import app
from deepprob.cli.fit import Heading
from deepprob.data import DataSet, load_data
from deepprob.diagnostics import Check
from deepprob.diagnostics.report import Report
from deepprob.fitting.divergence import DivergenceError
from deepprob.inference import ROUTINES, svi
from deepprob.models import MODELS, VAE
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program
from deepprob.storage import write

TINY = ["--epochs", "2", "--latent-dim", "2", "--hidden", "16"]


def deepprob_(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def error_of(result: Result) -> str:
    """The single line that a failed command prints."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    result = deepprob_("fit", "vae", "digits", *TINY, "--out", str(folder))
    assert result.exit_code in (0, 1), result.output
    (folder / "said.txt").write_text(result.stdout)
    return folder


def test_fit_prints_the_verdict_and_the_paths(fitted: Path) -> None:
    said = (fitted / "said.txt").read_text()
    assert re.search(r"^VAE on digits: rows of shape \(8, 8\), 1078 train / 360 valid / 359 test$", said, re.M)
    assert re.search(r"^(PASS|CAUTION|FAIL) +VAE on digits, 359 test rows$", said, re.M)
    for line in (f"posterior  {fitted}", f"report     {fitted}/report.html", f"deepprob check {fitted}"):
        assert line in said
    page = (fitted / "report.html").read_text()
    assert page.count("<img") >= 3 and "<script" not in page
    assert json.loads((fitted / "report.json").read_text())["verdict"] in ("pass", "caution", "fail")
    assert not (fitted / "checkpoint").exists()


def test_fit_stores_its_data_set_and_equals_the_python_call(fitted: Path) -> None:
    posterior = Posterior.load(fitted)
    assert posterior.config["data"] == {"name": "digits", "split": 0}
    digits = load_data("digits")
    program = VAE(digits.shape, latent_dim=2, hidden_dims=(16,))
    twin = svi(program, digits.train, epochs=2, held_out=digits.valid, progress=False)
    here, there = posterior.instance.tensors(), twin.instance.tensors()
    assert all(bool((here[name] == there[name]).all()) for name in there)


def test_fit_writes_the_scores_of_every_epoch() -> None:
    result = deepprob_("fit", "vae", "digits", *TINY, "--csv", "logs/fit.csv")
    assert result.exit_code in (0, 1), result.output
    header, *rows = Path("logs", "fit.csv").read_text().splitlines()
    assert header.startswith("epoch,elbo,held_out_elbo")
    assert [row.partition(",")[0] for row in rows] == ["1", "2"]


def test_missing_tensorboard_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    error = error_of(deepprob_("fit", "vae", "digits", *TINY, "--tensorboard", "board"))
    assert error.startswith("error: TensorBoard needs the package tensorboard, which is not installed.")


def test_check_prints_the_report_of_the_fit(fitted: Path) -> None:
    result = deepprob_("check", str(fitted))
    verdict = json.loads((fitted / "report.json").read_text())["verdict"]
    assert result.exit_code == (1 if verdict == "fail" else 0)
    assert result.stdout.startswith(verdict.upper())
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert "\x1b" not in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(("verdict", "code"), [("pass", 0), ("caution", 0), ("fail", 1)])
def test_exit_code_of_check_follows_the_verdict(
    fitted: Path, monkeypatch: pytest.MonkeyPatch, verdict: Any, code: int
) -> None:
    found = Report((Check("a check", 0.4, 0.1, 0.5, verdict, "The value is high.", "Look."),), "a fit")
    monkeypatch.setattr(deepprob.diagnostics.report, "check", lambda *args, **named: found)
    result = deepprob_("check", str(fitted))
    assert result.exit_code == code
    assert re.search(rf"^{verdict} +a check +0.40 ± 0.10 +<= 0.5$", result.stdout, re.M)
    assert ("Next: Look." in result.stdout) == (verdict != "pass")


def test_check_accepts_other_data(fitted: Path) -> None:
    result = deepprob_("check", str(fitted), "digits", "--draws", "30")
    assert "VAE on digits, 359 test rows" in result.stdout
    assert "rows must have shape (8, 8)" in error_of(deepprob_("check", str(fitted), "wine"))


def test_report_writes_page_and_json(fitted: Path, tmp_path: Path) -> None:
    result = deepprob_("report", str(fitted), "--out", "pages/mine.html", "--draws", "30", "--seed", "3")
    assert result.exit_code in (0, 1), result.output
    assert "mine.html" in result.stdout and "mine.json" in result.stdout
    assert (tmp_path / "pages/mine.html").exists()
    assert json.loads((tmp_path / "pages/mine.json").read_text())["judged on"]["seed"] == 3


def test_compare_ranks_runs_and_writes_page_and_json(fitted: Path, tmp_path: Path) -> None:
    other = deepprob_("fit", "vae", "digits", *TINY, "--latent-dim", "3", "--seed", "1", "--out", "other")
    assert other.exit_code in (0, 1), other.output
    result = deepprob_("compare", str(fitted), "other", "--draws", "50", "--out", "pages/both.html")
    assert result.exit_code in (0, 1), result.output
    summary, table, _ = result.stdout.split("\n\n")
    assert re.match(r"Tie: (digits and other|other and digits)|(digits|other) predicts best: ", summary)
    header, *rows = table.splitlines()
    assert header.split() == ["verdict", "elpd", "difference", "method"]
    assert {row.split()[0] for row in rows} == {"digits", "other"} and "held-out rows" in rows[0]
    saved = json.loads((tmp_path / "pages/both.json").read_text())
    assert saved["rows"] == 359 and saved["models"].keys() == {"digits", "other"}
    assert "both.html" in result.stdout and (tmp_path / "pages/both.html").exists()


def test_compare_refuses_runs_on_different_data(fitted: Path) -> None:
    posterior = Posterior.load(fitted)
    posterior.config["data"] = {"name": "wine", "split": 0}
    posterior.save("wine")
    assert "compare needs at least two posteriors; got 1" in error_of(deepprob_("compare", str(fitted)))
    assert "a folder is named twice" in error_of(deepprob_("compare", str(fitted), str(fitted)))
    message = error_of(deepprob_("compare", str(fitted), "wine"))
    assert "fitted to different data: digits split 0, wine split 0. Name the data to use: --data DATA" in message


def test_sample_writes_arrays_and_a_picture(fitted: Path, tmp_path: Path) -> None:
    results = [deepprob_("sample", str(fitted), "--draws", "12", "--out", f"{name}.npz") for name in "ab"]
    assert all(r.exit_code == 0 for r in results), results[0].output
    with np.load("a.npz", allow_pickle=False) as a, np.load("b.npz", allow_pickle=False) as b:
        assert (a["x"].shape, a["z"].shape) == ((12, 8, 8), (12, 2))
        assert set(np.unique(a["x"])) <= {0.0, 1.0}
        assert (a["x"] == b["x"]).all()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_lists_are_complete() -> None:
    for what, names in (
        ("models", MODELS),
        ("data", ["digits", "uci/yacht"]),
        ("routines", ["svi"]),
        ("objectives", ["elbo", "renyi"]),
    ):
        result = deepprob_("list", what)
        assert result.exit_code == 0
        assert set(names) <= {line.split()[0] for line in result.stdout.splitlines()}


def test_version_and_help() -> None:
    assert deepprob_("--version").stdout == f"deepprob {metadata.version('deepprob')}\n"
    assert all(name in deepprob_("--help").stdout for name in ("fit", "check", "report", "compare", "sample", "list"))


WRONG = {
    "unknown model 'vea'. Did you mean 'vae'?": ["fit", "vea", "digits"],
    "unknown data set 'digit'. Did you mean 'digits'?": ["fit", "vae", "digit"],
    "unknown option of VAE 'likelihod'. Did you mean 'likelihood'?": ["fit", "vae", "digits", "--set", "likelihod=x"],
    "unknown likelihood 'norml'. Did you mean 'normal'?": ["fit", "vae", "digits", "--set", "likelihood=norml"],
    "--set needs NAME=VALUE; got 'normal'": ["fit", "vae", "digits", "--set", "normal"],
    "--hidden needs whole numbers, such as 200,100; got 'wide'": ["fit", "vae", "digits", "--hidden", "wide"],
    "model 'dmm' is for sequences; data set 'digits' is for images.*jsb_chorales": ["fit", "dmm", "digits"],
    "images must be in .0, 1. for a Bernoulli likelihood": ["fit", "vae", "wine", "--set", "likelihood=bernoulli"],
    "epochs must be a whole number of at least 1; got 0": ["fit", "vae", "digits", "--epochs", "0"],
    "batch_size must be a whole number of at least 1; got 0": ["fit", "vae", "digits", "--batch-size", "0"],
    "unknown routine 'laplce'. Did you mean 'laplace'?": ["fit", "bnn", "iris", "--routine", "laplce"],
    "routine 'laplace' takes no --guide. It takes: .*subset": [
        "fit",
        "bnn",
        "iris",
        "--routine",
        "laplace",
        "--guide",
        "normal",
    ],
    "unknown guide 'norml'. Did you mean 'normal'?": ["fit", "vae", "digits", "--guide", "norml"],
    "learning_rate must be": ["fit", "vae", "digits", "--learning-rate", "-1"],
    "data set 'digits' has 1 standard split": ["fit", "vae", "digits", "--split", "2"],
    "a posterior is saved as a folder, but '.*' is a file": ["fit", "vae", "digits", "--out", __file__],
    "no posterior at 'nowhere': there is no such folder": ["check", "nowhere"],
    "no posterior at 'nowhere'": ["sample", "nowhere"],
    "--out must end in .html; got 'page.txt'": ["report", "nowhere", "--out", "page.txt"],
    "--out must end in .html; got 'both.txt'": ["compare", "nowhere", "there", "--out", "both.txt"],
    "--out must end in .npz or .csv or .png; got 'draws.txt'": ["sample", "nowhere", "--out", "draws.txt"],
    "--out must end in .csv or .tsv; got 'p.png'": ["predict", "nowhere", "--out", "p.png"],
    "'.*x.html' cannot be written: '.*test_cli.py' is a file": [
        "report",
        "nowhere",
        "--out",
        f"{__file__}/x.html/y.html",
    ],
    "there is no file or folder 'my.csv'. Check the path.": ["fit", "bnn", "my.csv", "--target", "y"],
    "there is no file or folder './digits'": ["fit", "vae", "./digits"],
    "unknown data set 'digit'.*There is no file or folder of this name either.": ["fit", "vae", "digit"],
    "target does not apply to 'digits', which is a data set with fixed columns": [
        "fit",
        "bnn",
        "digits",
        "--target",
        "y",
    ],
    "unknown list 'model'. Did you mean 'models'?": ["list", "model"],
    "No such command 'fitt'. Did you mean 'fit'?": ["fitt"],
    "No such option: --epoch": ["fit", "vae", "digits", "--epoch", "3"],
    "Invalid value for '--epochs'": ["fit", "vae", "digits", "--epochs", "many"],
    "Invalid value for '--draws'": ["sample", "nowhere", "--draws", "0"],
    "Missing argument 'DATA'. See: .*fit --help": ["fit", "vae"],
}


def test_fit_by_dropout_makes_a_network_with_dropout() -> None:
    command = ["fit", "bnn", "iris", "--routine", "dropout", "--hidden", "5", "--epochs", "2", "--out", "run"]
    result = deepprob_(*command)
    assert result.exit_code in (0, 1) and "routine dropout, 2 epochs" in result.output
    posterior = Posterior.load("run")
    assert posterior.program.config["net"]["dropout"] == 0.1  # type: ignore[index]
    result = deepprob_(*command[:-1], "other", "--set", "dropout=2")
    assert result.exit_code == 2 and "dropout must be a rate of at least 0 and below 1; got 2" in result.output


def test_fit_by_another_routine() -> None:
    command = ["fit", "bnn", "iris", "--routine", "ensemble", "--set", "members=2", "--epochs", "2", "--out", "run"]
    result = deepprob_(*command)
    assert result.exit_code in (0, 1), result.output
    assert result.output.count("routine ensemble, 2 epochs") == 1
    posterior = Posterior.load("run")
    assert posterior.config["routine"] == "ensemble" and len(posterior.chains["layers.0.bias"]) == 2  # type: ignore[index]


@pytest.mark.parametrize("message", WRONG)
def test_errors_are_one_line_and_come_before_training(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Heading, "start", lambda self, fit: pytest.fail("training began"))
    assert re.match(f"error: .*{message}", error_of(deepprob_(*WRONG[message])))


def test_check_needs_data_if_the_posterior_names_none(tmp_path: Path) -> None:
    digits = load_data("digits")
    svi(VAE((8, 8), 2, (8,)), digits.train, epochs=1, progress=False).save(tmp_path / "own")
    assert re.match("error: .*own does not name its data set.*check .*own DATA", error_of(deepprob_("check", "own")))


def test_fit_does_not_overwrite_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "other", {}, {}, kind="checkpoint")
    said = error_of(deepprob_("fit", "vae", "digits", "--out", "other"))
    assert re.match("error: a posterior cannot replace the checkpoint in", said)


def test_a_program_without_from_data_raises_an_error() -> None:
    with pytest.raises(TypeError, match=r"Program has no from_data\. Write it, or call the constructor"):
        Program.from_data(load_data("iris"))


def test_a_bug_has_exit_code_three_and_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    @functools.wraps(svi)
    def broken(*args: Any, **named: Any) -> None:
        raise RuntimeError("wheels came off")

    monkeypatch.setitem(ROUTINES, "svi", broken)  # type: ignore[arg-type]
    result = deepprob_("fit", "vae", "digits")
    assert result.exit_code == 3
    assert re.match(r"error: RuntimeError: wheels came off \(a bug in deepprob; --debug", result.stderr)
    assert "in broken" in deepprob_("fit", "vae", "digits", "--debug").stderr


def test_a_diverged_fit_saves_the_last_good_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    good = svi(VAE((8, 8), 2, (8,)), load_data("digits").train, epochs=1, progress=False)

    @functools.wraps(svi)
    def diverges(*args: Any, **named: Any) -> None:
        raise DivergenceError("elbo became nan at epoch 2.", good)

    monkeypatch.setitem(ROUTINES, "svi", diverges)  # type: ignore[arg-type]
    assert re.match(
        r"error: elbo became nan at epoch 2\. The kept posterior is in kept\.",
        error_of(deepprob_("fit", "vae", "digits", "--out", "kept")),
    )
    assert Posterior.load("kept").config["data"]["name"] == "digits"


def test_ctrl_c_saves_the_best_posterior_and_resume_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    step_end = Heading.step_end

    def interrupt(self: Heading, fit: Any) -> None:
        step_end(self, fit)
        if fit.step == 30:
            signal.raise_signal(signal.SIGINT)

    fit = ["fit", "vae", "digits", *TINY[2:], "--epochs", "5", "--out", "stopped"]
    with monkeypatch.context() as patch:
        patch.setattr(Heading, "step_end", interrupt)
        result = deepprob_(*fit)
    assert result.exit_code == 130, result.output
    assert "note: interrupted after 30 of 45 steps. The best posterior so far is in stopped." in result.stderr
    assert re.search("resume with .*--resume", result.stdout)
    assert Posterior.load("stopped").history.interrupted

    resumed = deepprob_(*fit, "--resume")
    assert resumed.exit_code in (0, 1), resumed.output
    assert resumed.stderr == ""
    assert deepprob_(*fit[:-1], "whole").exit_code in (0, 1)
    a, b = Posterior.load("stopped").instance.tensors(), Posterior.load("whole").instance.tensors()
    assert all(bool((a[name] == b[name]).all()) for name in b)


def test_ctrl_c_during_the_report_keeps_the_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepprob.diagnostics.report, "check", lambda *args, **named: signal.raise_signal(signal.SIGINT))
    result = deepprob_("fit", "vae", "digits", *TINY, "--out", "kept")
    assert result.exit_code == 130
    assert result.stderr == "note: interrupted before the report was written. The posterior is in kept.\n"
    assert Posterior.load("kept").seed == 0


def test_resume_without_a_checkpoint_prints_a_note() -> None:
    result = deepprob_("fit", "vae", "digits", *TINY, "--out", "new", "--resume", "--warm-up", "100")
    assert result.exit_code in (0, 1), result.output
    first, second = result.stderr.splitlines()
    assert first == "note: there is no interrupted fit in new; the fit starts from the beginning."
    assert re.match(r"note: KLWarmUp\(epochs=100.0\) is longer than the fit", second)


class Line(Program):
    """A small supervised program with the option ``scale``."""

    registry_name = "line"
    tasks = ("regression",)

    def __init__(self, features: int, scale: float = 100.0) -> None:
        super().__init__()
        self.config = {"features": features, "scale": scale}
        self.features, self.scale = features, scale

    @classmethod
    def from_data(cls, data: DataSet, *, scale: float = 100.0) -> Line:
        return cls(data.shape[0], scale)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        prior = dist.Normal(torch.zeros(self.features), 1.0).to_event(1)
        w = pyro.sample("w", prior)
        with self.data_plate(x):
            mean = 150.0 + self.scale * (x * w).sum(-1, keepdim=True)  # (..., B, 1)
            pyro.sample("y", dist.Normal(mean, 70.0).to_event(1), obs=y)


def test_a_supervised_model_predicts_the_test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "line", Line)
    fit = ["fit", "line", "diabetes", "--guide", "normal", "--set", "scale=50.0", "--epochs", "20"]
    result = deepprob_(*fit)
    assert result.exit_code in (0, 1), result.output
    assert "20 epochs of 3 steps" in result.stdout
    assert "Pareto k-hat, global latents" in result.stdout
    assert Posterior.load("runs/line-diabetes").program.config == {"features": 10, "scale": 50.0}
    assert deepprob_("sample", "runs/line-diabetes", "--draws", "7").exit_code == 0
    with np.load("runs/line-diabetes/samples.npz", allow_pickle=False) as found:
        assert {n: found[n].shape for n in found} == {"y": (7, 88, 1), "mean": (88, 1), "sd": (88, 1)}
    assert not Path("runs/line-diabetes/samples.png").exists()
    assert "unknown option of Line 'latent_dim'" in error_of(deepprob_(*fit, "--latent-dim", "3"))
    assert "Choose from: diabetes" in error_of(deepprob_("fit", "line", "digits"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "deepprob", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=settings)


def test_fit_in_a_subprocess() -> None:
    done = run("fit", "vae", "digits", *TINY)
    assert done.returncode in (0, 1), done.stderr
    assert done.stderr == ""  # no progress bar without a terminal
    assert "posterior  runs/vae-digits" in done.stdout and "\x1b" not in done.stdout
    assert Path("runs/vae-digits/report.html").exists()


def test_an_error_in_a_subprocess_is_one_line() -> None:
    done = run("check", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no posterior at 'nowhere': there is no such folder. Check the path.\n"
