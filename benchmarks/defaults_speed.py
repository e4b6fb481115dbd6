"""Processor seconds of fits with default settings, by the state of the cache, beside the same fits without a compiler.

    python benchmarks/defaults_speed.py [--fit readme mnist] [--rounds 3] [--markdown]

Every fit runs in a fresh process: by Python alone (``eager``), with ``compile=False``, with defaults on an empty cache
(``cold``), again while the code may still be built (``next``), and with the code in the cache (``warm``). Seconds are
user and system time of `svi`, in its process and in the compilers that it waited for, what tracing and compiling import
included. Those of a process that builds code for the next fits are in the file (``build``). MNIST needs DEEPPROB_DATA.
Writes ``benchmarks/results/defaults_speed.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF
from typing import Any
from unittest import mock

import torch
from common import RESULTS, shown, write_result
from first_compile import processor_seconds

import deepprob as dp
from deepprob.engine.native.background import _STARTED
from deepprob.fitting.plan import Plan
from deepprob.inference import svi
from deepprob.models import VAE

SITUATIONS = "eager", "compile=False", "cold", "next", "warm"


def readme() -> tuple[VAE, dict[str, Any]]:
    """The fit of the README."""
    digits = dp.load_data("digits")
    return VAE(digits.shape, latent_dim=8), {"data": digits.train, "epochs": 300, "held_out": digits.valid}


def mnist() -> tuple[VAE, dict[str, Any]]:
    """A VAE on MNIST, 784-200-200-50, 13 epochs."""
    data = dp.load_data("mnist")
    return VAE(data.shape, latent_dim=50, hidden_dims=(200, 200)), {"data": data.train, "epochs": 13}


FITS = {"readme": readme, "mnist": mnist}


def measure(name: str, situation: str) -> dict[str, Any]:
    """One fit in this process."""
    program, options = FITS[name]()
    if situation in ("eager", "compile=False"):
        options["compile"] = False
    plan = Plan((("eager", 0),), "a benchmark") if situation == "eager" else None
    wall, before = time.perf_counter(), processor_seconds(RUSAGE_SELF, RUSAGE_CHILDREN)
    with mock.patch("deepprob.fitting.starting.saved_plan", lambda callbacks: plan):
        posterior = svi(program, **options, seed=0, progress=False)
    used, wall = processor_seconds(RUSAGE_SELF, RUSAGE_CHILDREN) - before, time.perf_counter() - wall
    ended = processor_seconds(RUSAGE_CHILDREN)
    if situation == "next":  # so that the fit with a warm cache finds the code
        for process in _STARTED:
            process.wait()
    return {
        "seconds": used,
        "wall": wall,
        "build": processor_seconds(RUSAGE_CHILDREN) - ended,
        "plan": posterior.config["plan"],
        "elbo": posterior.history.epochs["elbo"][-1],
    }


def in_fresh_process(name: str, situation: str, cache: str) -> dict[str, Any]:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        environment = os.environ | {"XDG_CACHE_HOME": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        command = [sys.executable, __file__, "--fit", name, "--situation", situation, "--json", str(path)]
        subprocess.run(command, env=environment, check=True)
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def table(name: str, rounds: list[dict[str, dict[str, Any]]]) -> list[list[str]]:
    """Medians of one fit, one line a situation."""
    lines = [[name, "processor s", "of compile=False", "of eager", "wall s", "tiers"]]

    def median(situation: str, key: str = "seconds") -> float:
        return statistics.median(each[situation][key] for each in rounds)

    for situation in rounds[0]:
        tiers = ", ".join(f"{tier} from {first}" for tier, first in rounds[-1][situation]["plan"]["tiers"])
        ratios = [f"{median(situation) / median(other):.2f}" for other in ("compile=False", "eager")]
        seconds, wall = f"{median(situation):.1f}", f"{median(situation, 'wall'):.1f}"
        lines.append([situation, seconds, *ratios, wall, tiers])
    return lines


def main() -> None:
    """Measure all, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", nargs="+", choices=list(FITS), default=list(FITS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the figures; another one for a trial")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--situation", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.json:
        torch.set_num_threads(1)
        options.json.write_text(json.dumps(measure(options.fit[0], options.situation)))
        return
    results = {}
    for name in options.fit:
        rounds = []
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as cache:
                rounds.append({situation: in_fresh_process(name, situation, cache) for situation in SITUATIONS})
        results[name] = rounds
        print(f"\n{shown(table(name, rounds), options.markdown)}", flush=True)
    print(f"\nwritten to {write_result('defaults_speed', results, 'cpu', options.out)}")


if __name__ == "__main__":
    main()
