"""What tracing and compiling a fit cost and gain, by model: the figures behind ``compile="auto"``.

    python benchmarks/compile_time.py [--program schools dmm ...] [--markdown]

Every model is fitted in three processes: on a machine where nothing was compiled before, where other models were, and
where this one was. Seconds are those of a whole fit of one epoch, the compiler's own start included. The steps of each
tier are timed, and the constants of ``deepprob/fitting/plan.py`` that fit them all are printed: what tracing and
compiling cost, what tracing saves for each operation that Python would have dispatched, and what compiling saves for
each operation of the graph and for each number that it writes.
Writes ``benchmarks/results/compile_time.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import RESULTS, shown, write_result
from peers import pyro_programs

from deepprob.engine.random import RandomStream
from deepprob.fitting.buckets import LengthBuckets
from deepprob.fitting.compiling import CompileTask
from deepprob.fitting.objectives import ELBO
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.plan import Plan
from deepprob.fitting.state import State
from deepprob.inference import svi
from deepprob.models import VAE, BayesianNeuralNetwork, DeepMarkovModel
from deepprob.networks.dense import MLP
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program

_LARGE = 2**24  # multiplications of a step that takes most of its time for them
Made = tuple[Program, tuple[torch.Tensor, ...], int | None]


def schools() -> Made:
    """Eight schools, full batch."""
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    sd = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
    return Program.of(pyro_programs.eight_schools, "normal"), (y, sd), None


def bnn() -> Made:
    """`BayesianNeuralNetwork`, 8-50-1, batch 100."""
    x = torch.randn(1000, 8)
    return BayesianNeuralNetwork(MLP(8, 1, (50,))), (x, torch.tanh(x.sum(-1))), 100


def vae() -> Made:
    """`VAE`, 784-400-20, batch 128."""
    return VAE((28, 28), latent_dim=20, hidden_dims=(400,)), (torch.rand(1280, 28, 28),), 128


def dmm(**sizes: Any) -> Made:
    """`DeepMarkovModel` at its usual sizes, 229 sequences of 25 to 129 steps, batch 20."""
    lengths = (25 + 104 * torch.rand(229).pow(2)).round().long()
    lengths[0] = 129
    inside = torch.arange(129) < lengths.unsqueeze(-1)
    x = torch.bernoulli(torch.full((229, 129, 88), 0.05)) * inside.unsqueeze(-1)
    return DeepMarkovModel(88, **sizes), (x, lengths), 20


def dmm_large() -> Made:
    """`DeepMarkovModel` at the sizes of Pyro's example, the same sequences."""
    return dmm(latent_dim=100, hidden_dim=100, recurrent_dim=600, cell="rnn")


PROGRAMS: dict[str, Callable[[], Made]] = {
    "schools": schools,
    "bnn": bnn,
    "vae": vae,
    "dmm": dmm,
    "dmm_large": dmm_large,
}


def fit(made: Made, epochs: int, compile: bool, tier: str = "") -> tuple[float, Posterior, str]:
    """Seconds of a fit, the fit, and what it said; its steps may be taken by one tier."""
    program, data, batch_size = made
    said, began = io.StringIO(), time.perf_counter()
    plan = Plan(((tier, 0),), "a benchmark") if tier else None
    with contextlib.redirect_stderr(said), mock.patch("deepprob.fitting.starting.saved_plan", lambda callbacks: plan):
        posterior = svi(
            program, data, epochs=epochs, batch_size=batch_size, compile=compile, progress="auto", device="cpu"
        )  # fmt: skip
    return time.perf_counter() - began, posterior, said.getvalue()


def per_step(made: Made, tier: str) -> float:
    """Seconds of a step of one tier, as the median over the epochs of a fit of about two seconds."""
    epochs, seconds = 2, 0.0
    while seconds < 2.0:
        posterior = fit(made, epochs, compile=True, tier=tier)[1]
        seconds = sum(posterior.history.epochs["seconds"])
        epochs *= min(64, max(2, int(2.5 / max(seconds, 1e-3))))
    last = sorted(posterior.history.epochs["seconds"])
    return last[len(last) // 2] / posterior.history.steps_per_epoch


def task_of(made: Made) -> CompileTask:
    """The steps of a fit, measured."""
    program, data, batch_size = made
    size, batch, optimizer = batch_size or len(data[0]), program.accept(data), Optimizer()
    with RandomStream(0).drawing():
        instance = ProgramInstance(program, batch, len(data[0]), full_batch=batch_size is None)
    state = State.start(instance, optimizer, 1e-3)
    task = CompileTask(state, ELBO(), optimizer, LengthBuckets(batch, None, size), size, announce=False)
    task.measure()
    return task


def size_of(made: Made) -> dict[str, Any]:
    """The size of a step and of its graph."""
    task = task_of(made)
    task.trace()
    return {
        "dispatched": task.sizes[-1].operations,
        "graph_operations": task.work.operations,
        "numbers": task.work.numbers,
        "multiplications": task.work.multiplications,
    }


def fitted(columns: list[Any], values: Any) -> list[float]:
    """The coefficients of columns whose sum is near to values, by least squares of relative errors."""
    table = np.array(columns, dtype=float).T / np.array(values)[:, None]
    found: list[float] = np.linalg.lstsq(table, np.ones(len(table)), rcond=None)[0].tolist()
    return found


def constants(results: list[dict[str, Any]]) -> list[str]:
    """The constants of the plan."""
    r = {key: np.array([x[key] for x in results]) for key in results[0] if key not in ("title", "announced")}
    ones, python = np.ones(len(results)), (r["eager"] - r["traced"]) / r["dispatched"]
    dispatch, memory = fitted([r["graph_operations"], r["numbers"]], r["traced"] - r["step"])
    trace, trace_each = fitted([ones, r["dispatched"]], r["second_process"] - r["steps"] * r["step"])
    compiling, fixed = r["first_step"] - r["second_process"], ~r["any_length"]
    start, each = fitted([ones[fixed], r["graph_operations"][fixed]], compiling[fixed])
    factor = np.median((compiling / (start + each * r["graph_operations"]))[~fixed]) if not fixed.all() else 1.0
    large = r["multiplications"] > _LARGE
    return [
        f"tracing costs {trace:.2g} s and {1e3 * trace_each:.2g} ms an operation of Python",
        f"compiling costs {start:.2g} s and {1e3 * each:.2g} ms an operation, {factor:.2g} times that for any length",
        f"tracing saves {1e6 * np.median(python):.2g} us an operation of Python",
        f"compiling saves {1e6 * dispatch:.2g} us an operation of the graph and {1e9 * memory:.2g} ns a number",
        f"a multiplication takes {1e9 * np.median((r['step'] / r['multiplications'])[large]):.2g} ns",
    ]


def measure(name: str, only: str | None) -> dict[str, Any]:
    """One model in this process: all of its figures, or only the seconds of its first fit, under a name."""
    torch.manual_seed(0)
    made = PROGRAMS[name]()
    first, posterior, said = fit(made, 1, compile=True)
    if only:
        return {only: first}
    line = re.search(r"\((.*) operations\), about (\d+) s", said)
    assert line is not None, said
    eager, traced, compiled = (per_step(made, tier) for tier in ("eager", "traced", "compiled"))
    return {
        "title": (PROGRAMS[name].__doc__ or "").replace("`", ""),
        "graphs": posterior.history.compiled_graphs,
        "compiled": posterior.config["compiled"],
        "operations": line[1],
        "announced": int(line[2]),
        "first_step": first,
        "first_step_eager": fit(made, 1, compile=False)[0],
        **size_of(made),
        "steps": posterior.history.steps_per_epoch,
        "any_length": len(posterior.config["lengths"]) > 1,
        "eager": eager,
        "traced": traced,
        "step": compiled,
    }


def table(results: list[dict[str, Any]]) -> list[list[str]]:
    """One line per model."""
    lines = [
        ["model", "operations", "announced s", "new machine s", "first epoch s", "second process s", "eager step ms",
         "traced step ms", "compiled step ms"]
    ]  # fmt: skip
    for r in results:
        lines.append(
            [r["title"].rstrip("."), r["operations"], str(r["announced"]), f"{r['new_machine']:.1f}",
             f"{r['first_step']:.1f}", f"{r['second_process']:.2f}", f"{1e3 * r['eager']:.3g}",
             f"{1e3 * r['traced']:.3g}", f"{1e3 * r['step']:.3g}"]
        )  # fmt: skip
    return lines


def in_own_process(name: str) -> dict[str, Any]:
    """Measure a model in a fresh process, its start on a new machine before, and in a second process after."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        environment = os.environ | {"TMPDIR": folder, "XDG_CACHE_HOME": folder}
        environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
        for more in (["--only", "new_machine"], [], ["--only", "second_process"]):
            command = [sys.executable, __file__, "--program", name, "--json", str(path), *more]
            subprocess.run(command, env=environment, check=True)
            found |= json.loads(path.read_text())
            if more[-1:] == ["new_machine"]:
                for compiled in Path(folder).glob("deepprob/compiled/*.pt2"):
                    compiled.unlink()
    return found


def main() -> None:
    """Measure every model, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the figures; another one for a trial")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.json:
        options.json.write_text(json.dumps(measure(options.program[0], options.only)))
        return
    results = []
    for name in options.program:
        results.append(in_own_process(name))
        after = [f"{results[-1][key]:.1f}" for key in ("new_machine", "first_step", "second_process")]
        print(f"{name}: first epoch after {after[0]} s on a new machine, {after[1]} s, {after[2]} s", flush=True)
    print(f"\n{shown(table(results), options.markdown)}\n")
    print("\n".join(constants(results)))
    print(f"written to {write_result('compile_time', results, 'cpu', options.out)}")


if __name__ == "__main__":
    main()
