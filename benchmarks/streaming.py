"""Fits whose rows are read while they run: their memory, and their speed beside a fit of rows in memory.

    python benchmarks/streaming.py [--quick] [--markdown]

Memory: a sparse file of 2 GB is fitted in a process of its own. Counted is its anonymous memory (RssAnon) beyond what
it held after the same fit of a few rows in memory; pages of the file can be dropped at any time. Speed: compiled steps
from a file and from loaders, beside those of the same rows in memory. The time of a loader is compared with the larger
of its own reading time and that of the steps.
Writes ``benchmarks/results/streaming.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import shown, write_result
from torch.utils.data import DataLoader, Dataset

from deepprob.inference import svi
from deepprob.models import VAE
from deepprob.posteriors.posterior import Posterior

COLUMNS = 256
LIMIT_MB, LIMIT_RATIO = 100.0, 1.3


class Rows(Dataset[Any]):
    """Rows of a file by code of the user's."""

    def __init__(self, path: Path) -> None:
        self.array = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.array)

    def __getitems__(self, rows: list[int]) -> list[torch.Tensor]:
        return list(torch.from_numpy(self.array[np.sort(rows)]))

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.array[row]))


def program() -> VAE:
    return VAE((COLUMNS,), latent_dim=4, hidden_dims=(64,), likelihood="normal")


def fitted(data: Any, steps: int, compile: bool = True) -> Posterior:
    return svi(program(), data, steps=steps, batch_size="auto", compile=compile, progress=False)


def rss_anon() -> float:
    """Anonymous memory of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


class Peak:
    """The most anonymous memory of this process within a context, in MB."""

    def __enter__(self) -> Peak:
        self.most, self.ended = rss_anon(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self.ended.wait(0.005):
            self.most = max(self.most, rss_anon())

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self._thread.join()
        self.most = max(self.most, rss_anon())


def memory(gigabytes: float, steps: int) -> dict[str, float]:
    """Fit a sparse file in this process."""
    rows = int(gigabytes * 1e9 / (4 * COLUMNS))
    fitted(np.zeros((2000, COLUMNS), dtype=np.float32) + np.random.default_rng(0).normal(size=COLUMNS), steps)
    before = rss_anon()
    with tempfile.TemporaryDirectory() as folder:
        array = np.lib.format.open_memmap(Path(folder) / "x.npy", "w+", np.float32, (rows, COLUMNS))
        array[:: max(1, rows // 1000)] = 1.0
        with Peak() as peak:
            began = time.perf_counter()
            fitted(array, steps)
    return {
        "file_mb": rows * COLUMNS * 4 / 1e6,
        "grown_mb": peak.most - before,
        "limit_mb": LIMIT_MB,
        "seconds": time.perf_counter() - began,
    }


def speed(rows: int, steps: int) -> dict[str, dict[str, float]]:
    """Seconds of as many steps from memory, from a file, and from loaders."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npy"
        np.save(path, np.random.default_rng(0).normal(size=(rows, COLUMNS)).astype(np.float32))
        memory, file = torch.from_numpy(np.load(path)), np.load(path, mmap_mode="r")
        resident, streamed = _per_step(memory, steps), _per_step(file, steps)
        found["rows in memory"] = {"us": 1e6 * resident}
        found["memory-mapped file"] = {"us": 1e6 * streamed, "ratio": streamed / resident, "limit": LIMIT_RATIO}
        for workers, name in ((1, "loader, one worker"), (0, "loader, no worker")):
            loader = DataLoader(Rows(path), batch_size=128, shuffle=True, num_workers=workers)
            batches = min(steps, len(loader))
            reading = min(_reading(loader, batches) for _ in range(2))
            loaded = _per_step(loader, batches)
            larger = max(reading, resident)
            found[name] = {
                "us": 1e6 * loaded,
                "reading_us": 1e6 * reading,
                "ratio": loaded / larger,
                "limit": LIMIT_RATIO,
            }
    return found


def _per_step(data: Any, steps: int) -> float:
    """Seconds of a step: of long fits less short ones, so that what happens before the first step is left out."""
    fitted(data, 200)
    differences = []
    for _ in range(3):
        seconds = []
        for count in (200, 200 + steps):
            began = time.perf_counter()
            fitted(data, count)
            seconds.append(time.perf_counter() - began)
        differences.append(seconds[1] - seconds[0])
    return sorted(differences)[1] / steps


def _reading(loader: DataLoader[Any], batches: int) -> float:
    """Seconds that a loader takes for a batch, beyond those of its first one."""
    iterator = iter(loader)
    next(iterator)
    began = time.perf_counter()
    for _ in range(batches - 1):
        next(iterator)
    return (time.perf_counter() - began) / (batches - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--memory", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    steps = 200 if options.quick else 3000
    if options.memory:
        print(json.dumps(memory(options.memory, steps)))
        return
    command = [sys.executable, __file__, "--memory", str(0.2 if options.quick else 2.0)]
    done = subprocess.run([*command, *["--quick"] * options.quick], check=True, capture_output=True, text=True)
    held = json.loads(done.stdout.splitlines()[-1])
    times = speed(20_000 if options.quick else 400_000, steps)
    lines = [["", "figure", "limit"]]
    lines.append([f"file of {held['file_mb']:.0f} MB", f"{held['grown_mb']:.0f} MB more", f"{LIMIT_MB:.0f} MB"])
    for name, found in times.items():
        ratio, limit = (f"{found['ratio']:.2f}", f"{LIMIT_RATIO}") if "ratio" in found else ("", "")
        lines.append([f"step from {name}", f"{found['us']:.0f} us {ratio}".strip(), limit])
    print(shown(lines, options.markdown))
    if not options.quick:
        write_result("streaming", {"memory": held, "speed": times})


if __name__ == "__main__":
    main()
