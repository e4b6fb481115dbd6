"""Processor time of a compiled step in two checkouts of the project, and whether their fits agree.

    python benchmarks/two_checkouts.py BEFORE AFTER [--program schools ...] [--rounds 5] [--markdown]

Both checkouts run the programs of this folder, in turn and each in a fresh process with ``PYTHONPATH`` set to the
checkout; the first to run alternates from round to round. Each checkout has a cache of its own, kept over the rounds,
so that only the first round compiles. Processes have ``OMP_NUM_THREADS=1``: processor time of several threads contains
the time in which they wait for each other.

A step's time is (long fit - short fit) / (difference of their steps), the median over the pairs of a round and then
over the rounds. Also compared: the operations of the compiled graph; the parameters of a short eager fit, which should
be equal bit by bit; and those of a short compiled one.
Writes ``benchmarks/results/two_checkouts.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peers import pyro_programs
from torch import Tensor

# `common` is imported in `main` alone: all else also runs in a worker, on a checkout whose modules may lie elsewhere.
import deepprob as dp
from deepprob.inference import svi
from deepprob.models import VAE, BayesianNeuralNetwork, DeepMarkovModel
from deepprob.networks import MLP

SIDES = ("before", "after")
PAIRS = 3  # of a long and a short fit, in a round


@dataclass(frozen=True)
class Case:
    """A program, data for it, the epochs of its short fits, and how many more its long ones have."""

    program: dp.Program
    data: tuple[Tensor, ...]
    batch_size: int | None
    short: int
    more: int

    @property
    def steps_per_epoch(self) -> int:
        return 1 if self.batch_size is None else -(-len(self.data[0]) // self.batch_size)

    def fit(self, epochs: int, compile: bool = True) -> dp.Posterior:
        posterior = svi(
            self.program, self.data, epochs=epochs, batch_size=self.batch_size, compile=compile, device="cpu"
        )  # fmt: skip
        if compile and not posterior.config["compiled"]:
            raise RuntimeError("the steps ran eagerly; the warning above says why")
        return posterior


def schools() -> Case:
    """Eight schools, full batch."""
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    sd = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
    return Case(dp.Program.of(pyro_programs.eight_schools, "normal"), (y, sd), None, short=100, more=150_000)


def bnn() -> Case:
    """BayesianNeuralNetwork, 8-50-1, batch 100."""
    x = torch.randn(1000, 8)
    return Case(BayesianNeuralNetwork(MLP(8, 1, (50,))), (x, torch.tanh(x.sum(-1))), 100, short=10, more=4000)


def vae() -> Case:
    """VAE, 784-400-20, batch 128."""
    x = torch.rand(1280, 28, 28)
    return Case(VAE((28, 28), latent_dim=20, hidden_dims=(400,)), (x,), 128, short=5, more=80)


def ssvae() -> Case:
    """Semi-supervised VAE, 784-400-20, label enumerated, batch 100 + 100."""
    rows = 2000
    x, labelled = torch.bernoulli(torch.rand(10, 784).pow(3)[torch.randint(10, (2, rows))])
    networks = pyro_programs.SemiSupervisedVAE(rows)
    program = dp.Program.of(networks.model, networks.guide, data_plate="data")
    program.learning_rate = 1e-3
    return Case(program, (x, labelled, torch.randint(10, (rows,))), 100, short=2, more=5)


def dmm() -> Case:
    """DeepMarkovModel at its usual sizes, 229 sequences of 25 to 129 steps, batch 20."""
    lengths = (25 + 104 * torch.rand(229).pow(2)).round().long()
    lengths[0] = 129
    inside = torch.arange(129) < lengths.unsqueeze(-1)  # (B, T)
    x = torch.bernoulli(torch.full((229, 129, 88), 0.05)) * inside.unsqueeze(-1)  # (B, T, D)
    return Case(DeepMarkovModel(88), (x, lengths), 20, short=2, more=30)


PROGRAMS: dict[str, Callable[[], Case]] = {"schools": schools, "bnn": bnn, "vae": vae, "ssvae": ssvae, "dmm": dmm}


# -- in a worker ---------------------------------------------------------------------------------------------------


def work(name: str, folder: Path) -> dict[str, Any]:
    """One round of one program on the checkout in PYTHONPATH; parameters of the compiled fit go into the folder."""
    checkout = Path(os.environ["PYTHONPATH"])
    if not Path(dp.__file__).is_relative_to(checkout):
        raise RuntimeError(f"deepprob was imported from {dp.__file__}, not from {checkout}")
    torch.manual_seed(0)
    case = PROGRAMS[name]()
    torch.save(state_of(case.fit(case.short)), folder / f"{name}.pt")
    return {
        "compared_steps": case.short * case.steps_per_epoch,
        "digest": digest(state_of(case.fit(case.short, compile=False))),
        "seconds_per_step": per_step(case),
    }


def per_step(case: Case) -> float:
    """Processor seconds of a compiled step."""

    def seconds(epochs: int) -> float:
        began = time.process_time()
        case.fit(epochs)
        return time.process_time() - began

    pairs = [(seconds(case.short), seconds(case.short + case.more)) for _ in range(PAIRS)]
    return median(long - short for short, long in pairs) / (case.more * case.steps_per_epoch)


def state_of(posterior: dp.Posterior) -> Mapping[str, Tensor]:
    """All tensors of a fitted program by name; older checkouts call them its parameters."""
    return posterior.instance.tensors() if hasattr(posterior, "instance") else posterior.parameters()


def digest(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 of parameters, their names included."""
    found = hashlib.sha256()
    for name in sorted(parameters):
        found.update(name.encode() + b"\0" + parameters[name].contiguous().numpy().tobytes())
    return found.hexdigest()


# -- the comparison ------------------------------------------------------------------------------------------------


def run_worker(name: str, checkout: Path, folder: Path) -> dict[str, Any]:
    """`work` in a fresh process; the folder holds its cache and whatever else it writes."""
    path = folder / "result.json"
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    environment |= {"XDG_CACHE_HOME": str(folder), "TMPDIR": str(folder)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    command = [sys.executable, __file__, str(checkout), str(checkout), "--program", name, "--worker", str(path)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(done.stderr)
    done.check_returncode()
    counts = re.search(r"\(([\d + ]+) operations\)", done.stderr)  # said before a fit is compiled
    found: dict[str, Any] = json.loads(path.read_text()) | {"operations": counts[1] if counts else None}
    return found


def compare(name: str, checkouts: Mapping[str, Path], folders: Mapping[str, Path], rounds: int) -> dict[str, Any]:
    """One program in both checkouts, over all rounds."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for i in range(rounds):
        for side in SIDES if i % 2 == 0 else reversed(SIDES):
            found[side].append(run_worker(name, checkouts[side], folders[side]))
            if found[side][0]["operations"] is None:
                raise RuntimeError(f"{checkouts[side]} did not say how many operations it compiles for {name}")
        seconds = ", ".join(f"{side} {1e6 * found[side][-1]['seconds_per_step']:.4g} us" for side in SIDES)
        print(f"{name}, round {i + 1}: {seconds}", flush=True)
    before, after = (found[side] for side in SIDES)
    samples = {side: [one["seconds_per_step"] for one in found[side]] for side in SIDES}
    return {
        "title": (PROGRAMS[name].__doc__ or "").rstrip("."),
        "seconds_per_step": {side: median(samples[side]) for side in SIDES},
        "rounds": samples,
        "operations": {side: found[side][0]["operations"] for side in SIDES},
        "eager_equal": len({one["digest"] for one in before + after}) == 1,
        "compared_steps": before[0]["compared_steps"],
        "compiled_difference": difference(*(torch.load(folders[side] / f"{name}.pt") for side in SIDES)),
    }


def difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """The largest difference of two fits' parameters, each relative to the largest entry of its tensor."""
    if first.keys() != second.keys():
        raise ValueError(f"the checkouts differ in the parameters {sorted(first.keys() ^ second.keys())}")
    pairs = [(x.double(), second[name].double()) for name, x in first.items() if x.numel()]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs)


def table(results: list[dict[str, Any]]) -> list[list[str]]:
    """One line per program."""
    lines = [
        ["program", "us before", "us after", "after / before", "operations before", "after", "after / before",
         "steps compared", "eager fits", "compiled fits differ by"]
    ]  # fmt: skip
    for r in results:
        seconds, operations = ([r[key][side] for side in SIDES] for key in ("seconds_per_step", "operations"))
        before, after = (sum(map(int, text.split(" + "))) for text in operations)
        lines.append(
            [r["title"], *(f"{1e6 * s:.4g}" for s in seconds), f"{seconds[1] / seconds[0]:.3f}", *operations,
             f"{after / before:.3f}", str(r["compared_steps"]), "equal" if r["eager_equal"] else "not equal",
             f"{r['compiled_difference']:.1e}"]
        )  # fmt: skip
    return lines


def commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def main() -> None:
    """Compare every program, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="folder of a checkout")
    parser.add_argument("after", type=Path, help="folder of another one")
    parser.add_argument("--program", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder of the figures, if not results/; another one for a trial")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        options.worker.write_text(json.dumps(work(options.program[0], options.worker.parent)))
        return
    from common import RESULTS, shown, write_result

    checkouts = {side: getattr(options, side).resolve() for side in SIDES}
    commits = {side: commit(checkout) for side, checkout in checkouts.items()}
    with contextlib.ExitStack() as stack:
        folders = {side: Path(stack.enter_context(tempfile.TemporaryDirectory())) for side in SIDES}
        results = [compare(name, checkouts, folders, options.rounds) for name in options.program]
    print(f"\nbefore: {commits['before']}, after: {commits['after']}\n\n{shown(table(results), options.markdown)}\n")
    content = {"commits": commits, "programs": results}
    print(f"written to {write_result('two_checkouts', content, 'cpu', options.out or RESULTS)}")


if __name__ == "__main__":
    main()
