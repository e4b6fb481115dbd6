"""A step without a compiler beside Pyro's own, for every program of the zoo of Pyro features.

    python benchmarks/eager_steps.py [--rounds 3] [--markdown] [name ...]

Each program of ``tests/contract/zoo.py`` takes steps of Adam on the same guide and rows in four ways, in turn: by
``SVI.step`` of Pyro with validation off and on, by eager steps of `svi`, and by its traced graph, which serves long
fits with ``compile=False``. Times are medians over blocks of steps, in processor time, without starting and tracing.
Writes ``benchmarks/results/eager_steps.json``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pyro
import torch
from common import RESULTS, shown, write_result
from pyro.poutine.guide import GuideMessenger

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "contract"))

import itertools

import zoo

from deepprob.engine.random import RandomStream
from deepprob.fitting.callbacks import Callback, Fit
from deepprob.fitting.plan import Plan
from deepprob.inference import svi
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import num_rows

BLOCK, BLOCKS = 20, 6  # the first block warms up
WAYS = ("Pyro", "Pyro, validating", "eager", "traced")
Marks = list[float]


class Clock(Callback):
    """Notes the processor time after every block of steps."""

    def __init__(self) -> None:
        self.marks: Marks = []

    def interval(self, steps_per_epoch: int) -> int:
        return BLOCK

    def step_end(self, fit: Fit) -> None:
        self.marks.append(time.process_time())


def per_step(marks: Marks) -> float:
    """Seconds of a step."""
    return statistics.median(b - a for a, b in itertools.pairwise(marks)) / BLOCK


def ours(example: zoo.Example, tier: str) -> float:
    """Seconds of a step of `svi`, by one tier."""
    program, data = example.make()
    clock, plan = Clock(), Plan(((tier, 0),), "a benchmark")
    with mock.patch("deepprob.fitting.starting.saved_plan", lambda callbacks: plan):
        svi(
            program, data or None, steps=BLOCK * BLOCKS, batch_size=example.batch_size, objective=example.objective,
            progress=False, callbacks=[clock], device="cpu", compile=False,
        )  # fmt: skip
    return per_step(clock.marks)


def batches(example: zoo.Example, rows: int) -> Iterator[torch.Tensor]:
    """The rows of each step."""
    generator = torch.Generator().manual_seed(0)
    while True:
        if example.batch_size is None or example.batch_size >= rows:
            yield torch.arange(rows)
        else:
            yield torch.randperm(rows, generator=generator)[: example.batch_size]


def pyros(example: zoo.Example, *, validate: bool) -> float:
    """Seconds of Pyro's step on the same program and guide."""
    program, data = example.make()
    batch = program.accept(data)
    with RandomStream(0).drawing():
        instance = ProgramInstance(program, batch, num_rows(batch), full_batch=example.batch_size is None)
        own, count = instance.program, instance.num_data
        objective = example.pyro()
        objective.max_plate_nesting = instance.structure.plates + (
            objective.vectorize_particles and objective.num_particles > 1
        )
        guide = own.current_guide if isinstance(own.current_guide, GuideMessenger) else own.guide
        marks: Marks = []
        with instance.running(), pyro.validation_enabled(validate):
            stepper = pyro.infer.SVI(own.model, guide, pyro.optim.Adam({"lr": 1e-3}), objective)
            for number, rows in zip(range(BLOCK * BLOCKS), batches(example, count), strict=False):
                with own.bound(rows, count):
                    stepper.step(*own.prepare(*(x.index_select(0, rows) for x in batch)))
                if (number + 1) % BLOCK == 0:
                    marks.append(time.process_time())
    return per_step(marks)


def measure(example: zoo.Example) -> dict[str, float]:
    """Seconds of a step in each way; without those that the program cannot take."""
    found = {}
    for way in WAYS:
        if way == "traced" and example.eager:
            continue
        tiers = way in ("eager", "traced")
        found[way] = ours(example, way) if tiers else pyros(example, validate=way != "Pyro")
    return found


def main() -> None:
    """Measure all, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="programs; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the figures; another one for a trial")
    parser.add_argument("--markdown", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results: dict[str, dict[str, float]] = {}
    for example in (e for e in zoo.ZOO if not chosen.names or e.name in chosen.names):
        try:
            rounds = [measure(example) for _ in range(chosen.rounds)]
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            print(f"{example.name} is left out: {reason}", file=sys.stderr, flush=True)
            continue
        results[example.name] = {way: statistics.median(r[way] for r in rounds) for way in rounds[0]}
    lines = [["program", *(f"{way}, ms" for way in WAYS)]]
    for name, found in results.items():
        lines.append([name, *(f"{1e3 * found[way]:.2f}" if way in found else "-" for way in WAYS)])
    print(shown(lines, chosen.markdown))
    for peer in WAYS[:2]:
        for way in WAYS[2:]:
            ratios = [found[way] / found[peer] for found in results.values() if way in found]
            print(f"{way} of {peer}: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    if not chosen.names:
        print(f"written to {write_result('eager_steps', results, 'cpu', chosen.out)}")


if __name__ == "__main__":
    main()
