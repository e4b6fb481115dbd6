"""The benchmarks run: one short round, in their own process, as a reader would start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> str:
    """What a benchmark prints."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_svi_is_timed_beside_its_peers_and_all_reach_one_bound() -> None:
    printed = run("svi.py", "--quick", "--program", "schools", "--threads", "1")
    assert "without a result" not in printed
    table = printed[printed.rindex("variant ") :].split("\n\n")[0].splitlines()[1:]
    bounds = {line[:30].strip(): float(line.split(" +- ")[0].split()[-1]) for line in table}
    assert {"Pyro, Trace_ELBO", "torch by hand, eager", "torch by hand, torch.compile"} <= bounds.keys()
    assert any(label.startswith("deepprob") for label in bounds)
    assert max(bounds.values()) - min(bounds.values()) < 1.0, bounds  # nats per school, after a hundred steps


@pytest.mark.slow
def test_memory_of_a_fit_is_measured_and_no_copy_of_the_data() -> None:
    printed = run("memory.py", "--quick", "--scenario", "logistic")
    table = printed[printed.rindex("fit ") :].split("\n\n")[0].splitlines()[1:]
    kept = {line[:60]: (float(line.split()[-2]), float(line.split()[-1])) for line in table}
    assert any("deepprob" in label for label in kept)
    assert all(per_row < of_data for per_row, of_data in kept.values()), kept


def test_the_gpu_script_parses_and_refuses_a_machine_without_a_gpu() -> None:
    script = BENCHMARKS / "run_gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    hidden = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", str(script), "svi"], capture_output=True, text=True, env=hidden, timeout=120)
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
