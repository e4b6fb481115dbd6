"""Processor time of a step of four starts, which take it together, against one start.

    python benchmarks/restarts.py [--restarts 4] [--markdown]

Each figure is the median of three fits, without their first steps, the choice of the best start and the compiler.
Writes ``benchmarks/results/restarts.json``.
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
from peers import pyro_programs

from deepprob.fitting.callbacks import Callback, Fit
from deepprob.inference import svi
from deepprob.programs.program import Program

ROWS = 500
PERIODS = {"traced": 1_000, "compiled": 5_000}  # a fit has three of them, and the last two are timed


class Clock(Callback):
    """Notes the processor time after every period."""

    def __init__(self, period: int) -> None:
        self.period, self.times = period, list[float]()

    def interval(self, steps_per_epoch: int) -> int:
        return self.period

    def step_end(self, fit: Fit) -> None:
        self.times.append(time.process_time())


def programs() -> dict[str, tuple[Program, tuple[torch.Tensor, ...], int | None]]:
    """Programs by title, with their data and batch size."""
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    sd = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
    x = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))
    target = torch.tanh(x @ torch.linspace(-1, 1, 8))
    network = Program.of(pyro_programs.bayesian_network(ROWS), "normal", data_plate="data")
    return {
        "eight schools, full batch": (Program.of(pyro_programs.eight_schools, "normal"), (y, sd), None),
        "BNN 8-50-1, batch 100": (network, (x, target), 100),
    }


def step_time(program: Program, data: tuple[torch.Tensor, ...], tier: str, **options: Any) -> float:
    """Processor microseconds of a step."""
    period, found = PERIODS[tier], []
    for _ in range(3):
        clock = Clock(period)
        settings = options | {"compile": tier == "compiled", "progress": False, "callbacks": [clock]}
        posterior = svi(program, data, steps=3 * period, **settings)
        if posterior.config["plan"]["tiers"] != [[tier, 0]]:
            raise RuntimeError(f"the steps were to be {tier}; got the plan {posterior.config['plan']}")
        found.append(1e6 * (clock.times[2] - clock.times[0]) / (2 * period))
    return median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=4)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = []
    for title, (program, data, size) in programs().items():
        for tier in PERIODS:
            one, all_of = (step_time(program, data, tier, batch_size=size, restarts=n) for n in (1, options.restarts))
            found.append({"program": title, "tier": tier, "one_us": one, "all_us": all_of, "ratio": all_of / one})
    head = ["program", "tier", "one start, us", f"{options.restarts} starts, us", "ratio"]
    lines = [[r["program"], r["tier"], *(f"{r[k]:.1f}" for k in ("one_us", "all_us", "ratio"))] for r in found]
    print(shown([head, *lines], options.markdown))
    result = {"restarts": options.restarts, "steps": found}
    print("\nwritten to", write_result("restarts", result, "cpu", options.out))


if __name__ == "__main__":
    main()
