"""Every benchmark runs for one short round, in a subprocess, as a user would start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> str:
    """Run a benchmark and return its output."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        timeout=1800,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_svi_and_its_peers_reach_the_same_bound() -> None:
    printed = run("svi.py", "--quick", "--program", "schools", "--threads", "1")
    assert "without a result" not in printed
    table = printed[printed.rindex("variant ") :].split("\n\n")[0].splitlines()[1:]
    bounds = {line[:30].strip(): float(line.split(" +- ")[0].split()[-1]) for line in table}
    assert {"Pyro, Trace_ELBO", "torch by hand, eager", "torch by hand, torch.compile"} <= bounds.keys()
    assert any(label.startswith("deepprob") for label in bounds)
    assert max(bounds.values()) - min(bounds.values()) < 1.0, bounds  # nats per school, after a hundred steps


@pytest.mark.slow
def test_fits_with_default_arguments_end_near_their_references(tmp_path: Path) -> None:
    printed = run("defaults.py", "--out", str(tmp_path))
    table = [line.split() for line in printed[printed.index("program ") :].splitlines()[1:] if line.strip()]
    rows = [line for line in table if line[-1] in ("yes", "no")]
    assert len(rows) >= 10
    assert [line[0] for line in rows if line[-1] == "no"] == [], printed


@pytest.mark.slow
def test_a_fit_keeps_no_copy_of_the_data() -> None:
    printed = run("memory.py", "--quick", "--scenario", "logistic")
    table = printed[printed.rindex("fit ") :].split("\n\n")[0].splitlines()[1:]
    kept = {line[:60]: (float(line.split()[-2]), float(line.split()[-1])) for line in table}
    assert any("deepprob" in label for label in kept)
    assert all(per_row < of_data for per_row, of_data in kept.values()), kept


def test_both_halves_of_the_labelled_set_hold_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from verdicts import CASES

    kinds = Counter(case.label for case in CASES)
    assert kinds["good"] >= 60
    assert kinds["wrong"] >= 60
    assert max(Counter((case.generator, case.label) for case in CASES).values()) <= 4
    assert max(Counter((case.name, case.label) for case in CASES).values()) == 1
    for half in "AB":
        assert {(c.family, c.label) for c in CASES if c.half == half} == {(c.family, c.label) for c in CASES}


@pytest.mark.slow
def test_a_part_of_the_labelled_set_is_reported_and_its_labels_hold(tmp_path: Path) -> None:
    only = (
        "--only",
        "chains of a regression, chains 4, draws 500",
        "--only",
        "few rows and a wrong width, rows 3",
        "--only",
        "faulty chains",
    )
    printed = run("trust.py", *only, "--json", str(tmp_path / "part.json"))
    found = json.loads((tmp_path / "part.json").read_text())["result"]
    assert len(found["rows"]) == 6
    assert all(row["name"] in printed and row["verdict"] in ("pass", "caution", "fail") for row in found["rows"])
    assert found["summary"]["wrong"]["cases"] == 5
    proofs = run("trust.py", *only, "--labels")
    assert "6 labels: 0 do not hold, 0 by construction" in proofs
    several = run("trust.py", "--only", "chains of a regression, chains 4, draws 500", "--seeds", "2", "--jobs", "2")
    assert "of 2 reports on good posteriors" in several


@pytest.mark.slow
def test_collapsed_codes_are_told_and_remedies_cure(tmp_path: Path) -> None:
    printed = run("vae_collapse.py", "--seeds", "2", "--out", str(tmp_path))
    found = json.loads((tmp_path / "vae_collapse.json").read_text())["result"]["rows"]
    assert len(found) == 12
    assert sum(row["right"] for row in found) >= 11, printed


def test_the_gpu_script_parses_and_needs_a_gpu() -> None:
    script = BENCHMARKS / "run_gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    hidden = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", str(script), "svi"], capture_output=True, text=True, env=hidden, timeout=120)
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
