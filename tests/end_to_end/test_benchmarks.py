"""Every benchmark runs for one short round, in a subprocess, as a user would start it."""

from __future__ import annotations

import os
import subprocess
import sys
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


def test_the_gpu_script_parses_and_needs_a_gpu() -> None:
    script = BENCHMARKS / "run_gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    hidden = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", str(script), "svi"], capture_output=True, text=True, env=hidden, timeout=120)
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
