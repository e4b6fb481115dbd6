"""Peak memory of a fit through `deepprob.inference.svi` beside a hand-written torch loop.

    python benchmarks/memory.py [--quick] [--markdown] [--device cuda]

Every fit runs in a process of its own, for the second time: what is loaded and compiled once is there. Counted is what
the process held at most beyond what it held before the fit, the data included in the latter. A fit of as many steps on
a tenth of the rows is measured too: the difference per row is what a fit keeps for every row of the data. A copy of the
data would be as large as a row itself. On a GPU the data are moved there by the fit, and count.
Writes ``benchmarks/results/memory.json``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, shown, write_result
from peers import pyro_programs, torch_programs
from peers.loops import Data, TorchLoop, batches
from torch import Tensor, nn

from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.programs.program import Program

MEGABYTE = 2**20
EPOCHS = 3
VARIANTS = {
    "torch by hand, eager": None,
    "deepprob, compiled": {"compile": True},
    "deepprob, eager": {"compile": False},
}


@dataclass(frozen=True)
class Scenario:
    """A program, and data of any number of rows.

    Attributes:
        title: What it is.
        rows: Rows of the large fit; the small one has a tenth.
        batch_size: Rows per step.
        data: Makes so many rows.
        torch: Makes the hand-written module for so many rows.
        program: Makes deepprob's program for so many rows.
    """

    title: str
    rows: int
    batch_size: int
    data: Callable[[int], Data]
    torch: Callable[[int], nn.Module]
    program: Callable[[int], Program]


def _linear_rows(rows: int) -> Data:
    x = torch.empty(rows, 20).normal_()
    return x, (x[:, 0] > 0).float()


def _images(rows: int) -> Data:
    return (torch.empty(rows, 784).bernoulli_(0.2),)


def _vae(rows: int) -> Program:
    net = pyro_programs.VAE(rows)
    return Program.of(net.model, net.guide, data_plate="data")


SCENARIOS = {
    "logistic": Scenario(
        "logistic regression, rows of 20, batch 1000",
        1_000_000,
        1000,
        _linear_rows,
        lambda rows: torch_programs.LogisticRegression(rows, 20),
        lambda rows: Program.of(pyro_programs.logistic_regression(rows), "normal", data_plate="data"),
    ),
    "vae": Scenario("VAE 784-400-20, batch 128", 25_600, 128, _images, torch_programs.VAE, _vae),
}


def fit(scenario: Scenario, label: str, data: Data, epochs: int, device: str) -> None:
    """One fit."""
    rows, keywords = len(data[0]), VARIANTS[label]
    if keywords is None:
        on_device = tuple(x.to(device) for x in data)
        loop = TorchLoop(scenario.torch(rows).to(device), 1e-3, batches(on_device, scenario.batch_size))
        loop.run(epochs * rows // scenario.batch_size)
        return
    optimizer = Optimizer(learning_rate=1e-3)
    options: dict[str, Any] = {"batch_size": scenario.batch_size, "device": device, "progress": False, **keywords}
    posterior = svi(scenario.program(rows), data, epochs=epochs, optimizer=optimizer, **options)
    if posterior.config["compiled"] != bool(keywords["compile"]):
        raise RuntimeError(f"{label}: the fit ran in another way")


def measure(scenario: Scenario, label: str, rows: int, epochs: int, device: str) -> float:
    """Bytes at the peak of a fit beyond those before it."""
    data: tuple[Tensor, ...] = scenario.data(rows)
    fit(scenario, label, data, epochs, device)
    if device == "cuda":
        gc.collect()  # the first fit's graphs
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fit(scenario, label, data, epochs, device)
        return torch.cuda.max_memory_allocated() - before
    before = _reset_peak()
    fit(scenario, label, data, epochs, device)
    return _peak() - before


def _status(key: str) -> float | None:
    """A number of bytes that Linux keeps about this process."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def _peak() -> float:
    # Linux's own counter can be reset; ru_maxrss also remembers the process that started this one.
    known = _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return known if known is not None else float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _reset_peak() -> float:
    """Give back what is free, and forget the peak so far, where that can be done; returns what the peak starts from."""
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: 0)(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return _status("VmRSS") or _peak()


def in_own_process(name: str, label: str, rows: int, epochs: int, options: argparse.Namespace) -> float:
    """`measure` in a fresh process, the median of the rounds."""
    command = [sys.executable, __file__, "--measure", name, label, str(rows), str(epochs), "--device", options.device]
    values = []
    for _ in range(options.rounds):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        values.append(float(json.loads(done.stdout.splitlines()[-1])))
    return statistics.median(values)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="one round, a twentieth of the rows: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the figures; another one for a trial")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    return options


def main() -> None:
    """Measure every scenario and variant, print a table, write JSON."""
    options = arguments()
    if options.measure:
        name, label, rows, epochs = options.measure
        print(json.dumps(measure(SCENARIOS[name], label, int(rows), int(epochs), options.device)))
        return
    results = []
    lines = [["fit", "rows", "data MB", "peak MB", "peak MB, a tenth", "bytes kept per row", "bytes of a row"]]
    for name, label in itertools.product(options.scenario, VARIANTS):
        scenario = SCENARIOS[name]
        rows = scenario.rows // (20 if options.quick else 1)
        large = in_own_process(name, label, rows, EPOCHS, options)
        small = in_own_process(name, label, rows // 10, 10 * EPOCHS, options)
        row_bytes = sum(x[0].numel() * x.element_size() for x in scenario.data(1))
        per_row = (large - small) / (rows - rows // 10)
        results.append(
            {"scenario": name, "variant": label, "rows": rows, "bytes_per_row_of_data": row_bytes}
            | {"peak_bytes": large, "peak_bytes_of_a_tenth": small, "bytes_kept_per_row": per_row}
        )
        figures = [f"{value / MEGABYTE:.1f}" for value in (rows * row_bytes, large, small)]
        lines.append([f"{scenario.title}: {label}", str(rows), *figures, f"{per_row:.1f}", str(row_bytes)])
        print(f"{lines[-1][0]}: {figures[1]} MB", flush=True)
    print(f"\n{shown(lines, options.markdown)}\n")
    if not options.quick:
        print(f"written to {write_result('memory', {'epochs': EPOCHS, 'rows': results}, options.device, options.out)}")


if __name__ == "__main__":
    main()
