"""Processor time of a compiled step of an ensemble, whose members take it together, against one member.

    python benchmarks/ensemble.py [--members 5] [--markdown]

Each figure is the median of three fits, of which the last two thirds of the steps are timed, without the compiler.
Writes ``benchmarks/results/ensemble.json``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS, shown, write_result

from deepprob.fitting.callbacks import Callback, Fit
from deepprob.inference import ensemble
from deepprob.models import BayesianNeuralNetwork
from deepprob.networks import MLP

ROWS, COLUMNS, HIDDEN = 500, 8, 50
PERIOD = 3_000  # steps; a fit has three of them, and the last two are timed
SHAPES = (("relu", 32), ("relu", 100), ("tanh", 32), ("tanh", 100))  # activation and rows of a step


class Clock(Callback):
    """Notes the processor time after every period."""

    def __init__(self) -> None:
        self.times = list[float]()

    def interval(self, steps_per_epoch: int) -> int:
        return PERIOD

    def step_end(self, fit: Fit) -> None:
        self.times.append(time.process_time())


def step_time(activation: str, rows: int, members: int) -> float:
    """Processor microseconds of a step of all members."""
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    y, found = torch.tanh(x @ torch.linspace(-1, 1, COLUMNS))[:, None], []
    for _ in range(3):
        clock = Clock()
        settings: dict[str, Any] = {"compile": True, "progress": False, "callbacks": [clock]}
        program = BayesianNeuralNetwork(MLP(COLUMNS, 1, (HIDDEN,), activation), prior="normal")
        posterior = ensemble(program, (x, y), members=members, steps=3 * PERIOD, batch_size=rows, **settings)
        if posterior.config["plan"]["tiers"] != [["compiled", 0]]:
            raise RuntimeError(f"the steps were to be compiled; got the plan {posterior.config['plan']}")
        found.append(1e6 * (clock.times[2] - clock.times[0]) / (2 * PERIOD))
    return median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = []
    for activation, rows in SHAPES:
        one, all_of = (step_time(activation, rows, count) for count in (1, options.members))
        title = f"BNN {COLUMNS}-{HIDDEN}-1, {activation}, batch {rows}"
        found.append({"program": title, "one_us": one, "all_us": all_of, "ratio": all_of / one})
    head = ["program", "one member, us", f"{options.members} members, us", "ratio"]
    lines = [[r["program"], *(f"{r[k]:.1f}" for k in ("one_us", "all_us", "ratio"))] for r in found]
    print(shown([head, *lines], options.markdown))
    result = {"members": options.members, "steps": found}
    print("\nwritten to", write_result("ensemble", result, "cpu", options.out))


if __name__ == "__main__":
    main()
