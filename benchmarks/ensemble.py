"""Processor time of a step of an ensemble, whose members take it together, against one member.

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

ROWS, COLUMNS = 500, 8
PERIODS = {"traced": 1_000, "compiled": 4_000}  # a fit has three of them, and the last two are timed


class Clock(Callback):
    """Notes the processor time after every period."""

    def __init__(self, period: int) -> None:
        self.period, self.times = period, list[float]()

    def interval(self, steps_per_epoch: int) -> int:
        return self.period

    def step_end(self, fit: Fit) -> None:
        self.times.append(time.process_time())


def step_time(hidden: int, members: int, tier: str) -> float:
    """Processor microseconds of a step of all members."""
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    y = torch.tanh(x @ torch.linspace(-1, 1, COLUMNS))[:, None]
    period, found = PERIODS[tier], []
    for _ in range(3):
        clock = Clock(period)
        settings: dict[str, Any] = {"compile": tier == "compiled", "progress": False, "callbacks": [clock]}
        program = BayesianNeuralNetwork(MLP(COLUMNS, 1, (hidden,), "tanh"), prior="normal")
        posterior = ensemble(program, (x, y), members=members, steps=3 * period, batch_size=100, **settings)
        if posterior.config["plan"]["tiers"] != [[tier, 0]]:
            raise RuntimeError(f"the steps were to be {tier}; got the plan {posterior.config['plan']}")
        found.append(1e6 * (clock.times[2] - clock.times[0]) / (2 * period))
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
    for hidden in (50, 200):
        for tier in PERIODS:
            one, all_of = (step_time(hidden, count, tier) for count in (1, options.members))
            title = f"BNN {COLUMNS}-{hidden}-1, batch 100"
            found.append({"program": title, "tier": tier, "one_us": one, "all_us": all_of, "ratio": all_of / one})
    head = ["program", "tier", "one member, us", f"{options.members} members, us", "ratio"]
    lines = [[r["program"], r["tier"], *(f"{r[k]:.1f}" for k in ("one_us", "all_us", "ratio"))] for r in found]
    print(shown([head, *lines], options.markdown))
    result = {"members": options.members, "steps": found}
    print("\nwritten to", write_result("ensemble", result, "cpu", options.out))


if __name__ == "__main__":
    main()
