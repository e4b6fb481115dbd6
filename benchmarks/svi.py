"""Time per step of `deepprob.inference.svi` beside Pyro, NumPyro and torch by hand, on the same programs.

    python benchmarks/svi.py [--program schools bnn ...] [--rounds 5] [--quick] [--markdown] [--device cuda]

Every program runs in a process of its own, its variants round-robin; figures are medians over the rounds. All libraries
shuffle, gather minibatches and keep the losses, on all cores. deepprob is timed through `svi` with its defaults
(non-finite check and history included), as the difference of two fits of unequal length, so that start-up drops out; it
is shown beside. The bound is the mean over the last quarter of a common number of steps, from common networks, at a
common, constant learning rate. Writes ``benchmarks/results/svi.json``.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import pyro
import torch
from common import RESULTS, shown, write_result
from peers import pyro_programs, torch_programs
from peers.loops import CudaGraphLoop, Data, Loop, NumPyroLoop, Prepare, PyroLoop, TorchLoop, batches, synchronize
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from deepprob.data import load_data
from deepprob.fitting.objectives import ELBO
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import DeepMarkovModel
from deepprob.models.deep_markov_model import GatedTransition
from deepprob.programs.program import Program

PEERS = {
    "Pyro": "Pyro, Trace_ELBO",
    "torch.compile by hand": "torch by hand, torch.compile",
    "NumPyro, a step": "NumPyro, jitted step",
    "NumPyro, scan": "NumPyro, scan",
    "CUDA graph by hand": "torch by hand, CUDA graph",
}
COMPILED = "deepprob, compiled"
OURS: dict[str, dict[str, Any]] = {
    COMPILED: {"compile": True},
    "deepprob, compiled, bf16 networks": {"compile": True, "objective": ELBO(layers="bfloat16")},
    "deepprob, eager": {"compile": False},
}


class Skipped(Exception):
    """A variant that cannot run here; the message says why."""


@dataclass(frozen=True)
class Benchmark:
    """A program in every library, and data for it.

    Attributes:
        title: What it is.
        data: All rows.
        batch_size: Rows per step; None for all of them.
        learning_rate: Of Adam, in every library.
        steps: After so many the bounds are compared, a multiple of the steps of an epoch.
        pyro: Makes the model and its guide.
        torch: Makes the hand-written module, with the method ``loss``.
        program: Makes deepprob's program.
        numpyro: Makes NumPyro's model and guide, by its module; None where there is no twin.
        prepare: What the hand-written loops do to a minibatch.
        clip_norm: Gradient clipping, in every library.
        enumerated: Whether a site is summed out.
        hand_compiled: Whether the hand-written loss can be compiled in minutes.
        bound: What the bound is called.
        loss_norm: What a peer's loss is divided by to make the bound of a unit.
        own_norm: What deepprob's ELBO per row is divided by to make the same.
        by_epoch: Whether to print seconds per epoch rather than microseconds per step.
    """

    title: str
    data: Data
    batch_size: int | None
    learning_rate: float
    steps: int
    pyro: Callable[[], tuple[Any, Any]]
    torch: Callable[[], nn.Module]
    program: Callable[[], Program]
    numpyro: Callable[[Any], tuple[Any, Any]] | None
    prepare: Prepare | None = None
    clip_norm: float | None = None
    enumerated: bool = False
    hand_compiled: bool = True
    bound: str = "ELBO per row"
    loss_norm: float = 0.0
    own_norm: float = 1.0
    by_epoch: bool = False

    @property
    def steps_per_epoch(self) -> int:
        return 1 if self.batch_size is None else -(-len(self.data[0]) // self.batch_size)

    @property
    def unit(self) -> tuple[float, str]:
        """What seconds per step are multiplied by for the table, and what they then are."""
        return (self.steps_per_epoch, "s per epoch") if self.by_epoch else (1e6, "us per step")


def schools(quick: bool) -> Benchmark:
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    sd = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
    model = pyro_programs.eight_schools
    return Benchmark(
        title="eight schools, AutoNormal, full batch",
        data=(y, sd),
        batch_size=None,
        learning_rate=1e-2,
        steps=100 if quick else 2000,
        pyro=lambda: (model, AutoNormal(model)),
        torch=torch_programs.EightSchools,
        program=lambda: Program.of(model, "normal"),
        numpyro=lambda twins: twins.eight_schools(),
    )


def bnn(quick: bool) -> Benchmark:
    rows, batch = 500 if quick else 5000, 100
    x = torch.randn(rows, 8)
    y = torch.tanh(x @ torch.linspace(-1, 1, 8)) + 0.1 * torch.randn(rows)  # every start finds it
    model = pyro_programs.bayesian_network(rows)
    return Benchmark(
        title=f"BNN 8-50-1, AutoNormal, {rows} rows, batch {batch}",
        data=(x, y),
        batch_size=batch,
        learning_rate=1e-2,
        steps=rows // batch if quick else 2000,
        pyro=lambda: (model, AutoNormal(model)),
        torch=lambda: torch_programs.BayesianNetwork(rows),
        program=lambda: Program.of(model, "normal", data_plate="data"),
        numpyro=lambda twins: twins.bayesian_network(rows),
    )


def vae(quick: bool, batch: int) -> Benchmark:
    rows = (5 if quick else 50) * batch
    (x,) = _binary_images(rows, 1)
    make = functools.partial(pyro_programs.VAE, rows)
    return Benchmark(
        title=f"VAE 784-400-20, {rows} rows, batch {batch}",
        data=(x,),
        batch_size=batch,
        learning_rate=1e-3,
        steps=rows // batch * (1 if quick else 10),
        pyro=lambda: _model_and_guide(seeded(make)),
        torch=lambda: seeded(functools.partial(torch_programs.VAE, rows)),
        program=lambda: Program.of(*_model_and_guide(seeded(make)), data_plate="data"),
        numpyro=lambda twins: twins.vae(seeded(make)),
    )


def ssvae(quick: bool) -> Benchmark:
    rows, batch = 200 if quick else 2000, 100
    x, labelled = _binary_images(rows, 2)
    make = functools.partial(pyro_programs.SemiSupervisedVAE, rows)
    return Benchmark(
        title=f"semi-supervised VAE 784-400-20, label enumerated, {rows} rows, batch {batch} + {batch}",
        data=(x, labelled, torch.randint(10, (rows,))),
        batch_size=batch,
        learning_rate=1e-3,
        steps=rows // batch * (1 if quick else 10),
        pyro=lambda: _model_and_guide(seeded(make)),
        torch=lambda: seeded(functools.partial(torch_programs.SemiSupervisedVAE, rows)),
        program=lambda: Program.of(*_model_and_guide(seeded(make)), data_plate="data"),
        numpyro=None,
        enumerated=True,
    )


def logistic(quick: bool) -> Benchmark:
    rows, features, batch = 10_000 if quick else 1_000_000, 20, 1000
    x = torch.randn(rows, features)
    y = torch.bernoulli(torch.sigmoid(x @ torch.randn(features)))
    model = pyro_programs.logistic_regression(rows)
    return Benchmark(
        title=f"logistic regression, {rows} rows of {features}, batch {batch}",
        data=(x, y),
        batch_size=batch,
        learning_rate=1e-2,
        steps=rows // batch,
        pyro=lambda: (model, AutoNormal(model)),
        torch=lambda: torch_programs.LogisticRegression(rows, features),
        program=lambda: Program.of(model, "normal", data_plate="data"),
        numpyro=lambda twins: twins.logistic_regression(rows),
    )


def dmm(quick: bool) -> Benchmark:
    """At the sizes, batch and optimizer of Pyro's own example; without its warm-up of the KL."""
    x, lengths = load_data("jsb_chorales").train.tensors
    if quick:
        x, lengths = x[:40, :20], lengths[:40].clamp(max=20)
    batch, time_steps = 20, float(lengths.sum())
    per_epoch = -(-len(x) // batch)

    def program() -> Program:
        made = DeepMarkovModel(x.shape[-1], latent_dim=100, hidden_dim=100, recurrent_dim=600, cell="rnn")
        made.transition = GatedTransition(100, 200)
        return made

    return Benchmark(
        title=f"deep Markov model on JSB chorales, {len(x)} sequences, batch {batch}, at the sizes of Pyro's example",
        data=(x.float(), lengths),
        batch_size=batch,
        learning_rate=1e-3,
        steps=per_epoch * (1 if quick else 4),
        pyro=lambda: _model_and_guide(seeded(pyro_programs.DeepMarkovModel)),
        torch=lambda: seeded(torch_programs.DeepMarkovModel),
        program=lambda: seeded(program),
        numpyro=None,
        prepare=pyro_programs.DeepMarkovModel.prepare,
        clip_norm=10.0,
        hand_compiled=False,
        bound="ELBO per time step",
        loss_norm=time_steps / per_epoch,
        own_norm=time_steps / len(x),
        by_epoch=True,
    )


PROGRAMS: dict[str, Callable[[bool], Benchmark]] = {
    "schools": schools,
    "bnn": bnn,
    "vae128": functools.partial(vae, batch=128),
    "vae256": functools.partial(vae, batch=256),
    "ssvae": ssvae,
    "logistic": logistic,
    "dmm": dmm,
}


def seeded(make: Callable[[], Any]) -> Any:
    """Whatever is made, with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def _binary_images(rows: int, sets: int) -> list[Tensor]:
    """Pixels that ten templates turn on; the time does not depend on them, the bound does."""
    templates = torch.rand(10, 784).pow(3)
    return [torch.bernoulli(templates[torch.randint(10, (rows,))]) for _ in range(sets)]


def _model_and_guide(net: Any) -> tuple[Any, Any]:
    return net.model, net.guide


# -- how a variant is timed ----------------------------------------------------------------------------------------


class Timed(Protocol):
    """One variant: started, held to its bound, calibrated, and then timed once a round."""

    def start(self) -> float:
        """Seconds until the first step is done."""

    def bounds(self) -> list[float]:
        """The bound at every one of the benchmark's steps, from the start on."""

    def calibrate(self, window: float) -> None:
        """Choose how many steps fill about ``window`` seconds."""

    def sample(self) -> tuple[float, float]:
        """Wall and processor seconds of one step."""


class Peer:
    """A loop of another library."""

    def __init__(self, benchmark: Benchmark, make: Callable[[], Loop]) -> None:
        self.benchmark, self.make = benchmark, make

    def start(self) -> float:
        began = time.perf_counter()
        self.loop = self.make()
        self.first = self.loop.run(self.loop.unit)
        return time.perf_counter() - began

    def bounds(self) -> list[float]:
        rest = max(0, self.benchmark.steps - len(self.first)) // self.loop.unit * self.loop.unit
        losses = self.first + (self.loop.run(rest) if rest else [])
        norm = self.benchmark.loss_norm or len(self.benchmark.data[0])
        return [-loss / norm for loss in losses]

    def calibrate(self, window: float) -> None:
        self.steps = self.loop.unit
        while (seconds := self._run()[0]) < 0.5 * window:
            self.steps *= min(64, max(2, int(window / max(seconds, 1e-9))))

    def _run(self) -> tuple[float, float]:
        began, began_cpu = time.perf_counter(), time.process_time()
        self.loop.run(self.steps)
        return time.perf_counter() - began, time.process_time() - began_cpu

    def sample(self) -> tuple[float, float]:
        wall, cpu = self._run()
        return wall / self.steps, cpu / self.steps


class Own:
    """`svi` itself: every sample is two whole fits of unequal length."""

    def __init__(self, benchmark: Benchmark, device: str, keywords: dict[str, Any]) -> None:
        self.benchmark, self.device = benchmark, device
        self.keywords = keywords
        self.program = benchmark.program()
        self.short = 1 if benchmark.by_epoch else -(-50 // benchmark.steps_per_epoch)

    def fit(self, epochs: int, *, schedule: str = "cosine", weights: str = "fresh") -> tuple[float, float, list[float]]:
        """Wall and processor seconds of a fit, and its bounds."""
        optimizer = Optimizer(
            learning_rate=self.benchmark.learning_rate, schedule=schedule, clip_norm=self.benchmark.clip_norm
        )
        began, began_cpu = time.perf_counter(), time.process_time()
        posterior = svi(
            self.program,
            self.benchmark.data,
            epochs=epochs,
            batch_size=self.benchmark.batch_size,
            optimizer=optimizer,
            device=self.device,
            weights=weights,
            progress=False,
            **self.keywords,
        )
        synchronize()
        wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
        if self.keywords["compile"] and not posterior.config["compiled"]:
            raise Skipped("its steps ran eagerly")  # as the warning above says why
        return wall, cpu, posterior.history.steps["elbo"]

    def start(self) -> float:
        return self.fit(self.short)[0]

    def bounds(self) -> list[float]:
        epochs = self.benchmark.steps // self.benchmark.steps_per_epoch
        elbos = self.fit(epochs, schedule="constant", weights="keep")[2]
        return [elbo / self.benchmark.own_norm for elbo in elbos]

    def calibrate(self, window: float) -> None:
        # Start-up varies from fit to fit: the difference must be well beyond it, and must come out alike twice.
        base, self.extra = min(self.fit(self.short)[0] for _ in range(2)), self.short
        seconds: list[float] = []
        while len(seconds) < 2 or max(seconds) > 1.5 * min(seconds):
            seconds = [*seconds[-1:], self.fit(self.short + self.extra)[0] - self.fit(self.short)[0]]
            start_up = base - self.short * seconds[-1] / self.extra
            target = max(window, 3 * start_up)
            if seconds[-1] < 0.5 * target:
                self.extra *= min(32, max(2, int(target / max(seconds[-1], 1e-3))))
                seconds = []

    def sample(self) -> tuple[float, float]:
        short, short_cpu, _ = self.fit(self.short)
        long, long_cpu, _ = self.fit(self.short + self.extra)
        steps = self.extra * self.benchmark.steps_per_epoch
        return (long - short) / steps, (long_cpu - short_cpu) / steps


def variants(benchmark: Benchmark, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Timed]]]:
    """Every variant by name, made when its turn comes."""
    device = torch.device(options.device)
    data = tuple(x.to(device) for x in benchmark.data)
    rate, size, clip = benchmark.learning_rate, benchmark.batch_size, benchmark.clip_norm

    def minibatches() -> Iterator[Data]:
        return batches(data, size, benchmark.prepare)

    def pyro_loop(objective: Any) -> Loop:
        model, guide = benchmark.pyro()
        if isinstance(owner := getattr(model, "__self__", None), nn.Module):
            owner.to(device)
        settings = {"lr": rate} | ({} if clip is None else {"clip_norm": clip})
        optimizer = pyro.optim.Adam(settings) if clip is None else pyro.optim.ClippedAdam(settings)
        return PyroLoop(model, guide, optimizer, objective, minibatches())

    def hand_loop(compiled: bool) -> Loop:
        return TorchLoop(benchmark.torch().to(device), rate, minibatches(), compiled=compiled, clip_norm=clip)

    def numpyro_loop(scan: bool) -> Loop:
        if benchmark.numpyro is None:
            raise Skipped("no twin of the program")
        if importlib.util.find_spec("numpyro") is None:
            raise Skipped("NumPyro is not installed: pip install 'deepprob[benchmarks]'")
        import jax
        from peers import numpyro_programs

        if (jax.default_backend() == "gpu") != (device.type == "cuda"):
            raise Skipped(f"jax works on {jax.default_backend()}, not on {device.type}")
        length = (benchmark.steps_per_epoch if size is not None else 50) if scan else 0
        return NumPyroLoop(*benchmark.numpyro(numpyro_programs), rate, data, size, scan=length)

    def cuda_graph_loop() -> Loop:
        if benchmark.prepare is not None:
            raise Skipped("minibatches of unequal lengths")
        return CudaGraphLoop(benchmark.torch().to(device), rate, minibatches())

    def peer(make: Callable[[], Loop]) -> Callable[[], Timed]:
        return lambda: Peer(benchmark, make)

    if benchmark.enumerated:
        yield "Pyro, TraceEnum_ELBO", peer(lambda: pyro_loop(TraceEnum_ELBO(max_plate_nesting=1)))
    else:
        yield "Pyro, Trace_ELBO", peer(lambda: pyro_loop(Trace_ELBO()))
        yield "Pyro, TraceMeanField_ELBO", peer(lambda: pyro_loop(TraceMeanField_ELBO()))
    yield "torch by hand, eager", peer(lambda: hand_loop(False))
    if benchmark.hand_compiled:
        yield "torch by hand, torch.compile", peer(lambda: hand_loop(True))
    if device.type == "cuda":
        yield "torch by hand, CUDA graph", peer(cuda_graph_loop)
    yield "NumPyro, jitted step", peer(lambda: numpyro_loop(False))
    yield "NumPyro, scan", peer(lambda: numpyro_loop(True))
    for name, keywords in OURS.items():
        yield name, functools.partial(Own, benchmark, options.device, keywords)


# -- one program ---------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What was measured of one variant, in seconds."""

    start_up: float
    bound: float
    bound_error: float
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    spent: float = 0.0


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one program in this process."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    benchmark = PROGRAMS[name](options.quick)
    print(f"\n{benchmark.title}", flush=True)
    _load_compilers(options.device)
    started: dict[str, Timed] = {}
    rows: dict[str, Row] = {}
    skipped: dict[str, str] = {}
    for label, make in variants(benchmark, options):
        if options.only and not any(word.lower() in label.lower() for word in options.only):
            continue
        try:
            variant = make()
            start_up = variant.start()
            bound, error = _last_quarter(variant.bounds())
            variant.calibrate(options.window)
        except Skipped as reason:
            skipped[label] = str(reason)
            print(f"  without {label}: {reason}", flush=True)
            continue
        started[label], rows[label] = variant, Row(start_up, bound, error)
        print(f"  ready: {label}, first step after {start_up:.2f} s", flush=True)
    for _ in range(options.rounds):
        for label, variant in started.items():
            row = rows[label]
            if row.spent > options.budget:
                continue
            began = time.perf_counter()
            wall, cpu = variant.sample()
            row.wall.append(wall)
            row.cpu.append(cpu)
            row.spent += time.perf_counter() - began
    return {
        "name": name,
        "title": benchmark.title,
        "bound": benchmark.bound,
        "steps": benchmark.steps,
        "unit": benchmark.unit,
        "rows": {label: vars(row) for label, row in rows.items()},
        "skipped": skipped,
    }


def _load_compilers(device: str) -> None:
    """Load what every first compilation loads, so that no variant pays for the others; float32 without TF32 for all."""
    torch.backends.cudnn.allow_tf32 = False
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    torch.compile(torch.sin, fullgraph=True)(torch.zeros(8, device=device))
    torch._dynamo.reset()
    if importlib.util.find_spec("numpyro") is not None:
        import jax
        import numpyro  # noqa: F401

        jax.jit(jax.numpy.sin)(1.0).block_until_ready()


def _last_quarter(bounds: list[float]) -> tuple[float, float]:
    """Mean of the last quarter of the steps, and its standard error."""
    last = bounds[-max(2, len(bounds) // 4) :]
    return statistics.fmean(last), statistics.stdev(last) / math.sqrt(len(last))


# -- tables --------------------------------------------------------------------------------------------------------


def reference(result: dict[str, Any]) -> float:
    """Median seconds of deepprob's step: compiled where it could be."""
    rows = result["rows"]
    return next((statistics.median(rows[label]["wall"]) for label in OURS if label in rows), math.nan)


def detail(result: dict[str, Any]) -> list[list[str]]:
    """One line per variant."""
    factor, unit = result["unit"]
    ours = reference(result)
    lines = [["variant", unit, "least", "processor", "time / ours", "start-up s", result["bound"], "rounds"]]
    for label, row in result["rows"].items():
        wall = statistics.median(row["wall"])
        figures = (wall * factor, min(row["wall"]) * factor, statistics.median(row["cpu"]) * factor)
        lines.append(
            [
                label,
                *(f"{figure:.4g}" if figure < 1000 else f"{figure:.0f}" for figure in figures),
                f"{wall / ours:.3g}",
                f"{row['start_up']:.2f}",
                f"{row['bound']:.3f} +- {row['bound_error']:.3f}",
                str(len(row["wall"])),
            ]
        )
    return lines


def summary(results: list[dict[str, Any]]) -> list[list[str]]:
    """Per program, how many times longer every peer takes than deepprob."""
    lines = [["program: time of / time of deepprob", *PEERS]]
    for result in results:
        ours, cells = reference(result), []
        for label in PEERS.values():
            row = result["rows"].get(label) or result["rows"].get(label.replace("Trace_", "TraceEnum_"))
            cells.append(f"{statistics.median(row['wall']) / ours:.3g}" if row else "-")
        lines.append([result["name"], *cells])
    return lines


# -- the command ---------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument("--only", nargs="+", default=[], help="variants whose names contain one of these words")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=float, default=1.0, help="seconds of a variant in one round")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds after which a variant sits out a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="one short round on little data: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the figures; another one for a trial")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--start-again", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.window = 1, 0.02
    return options


def start_again(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds until deepprob's compiled fit has taken its first steps, in a process after the first."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    own = Own(PROGRAMS[name](options.quick), options.device, OURS[COMPILED])
    return {"start_up": own.start()}


def in_own_process(name: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """Measure one program in a fresh process, with an empty cache of compiled code, and its start in a second one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--program", name, "--json", str(path), "--device", options.device]
        for key in ("rounds", "window", "budget", "threads"):
            command += [f"--{key}", str(getattr(options, key))]
        command += ["--quick"] if options.quick else []
        command += ["--only", *options.only] if options.only else []
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "XDG_CACHE_HOME": folder}
        done = subprocess.run(command, env=environment, check=False)
        if not path.exists():
            print(f"{name} ended with status {done.returncode} and without a result", flush=True)
            return None
        result: dict[str, Any] = json.loads(path.read_text())
        if COMPILED in result["rows"]:
            subprocess.run([*command, "--start-again"], env=environment, check=True)
            result["start_up_again"] = json.loads(path.read_text())["start_up"]
        return result


def main() -> None:
    """Measure every program, print tables, write JSON."""
    options = arguments()
    if options.json:
        measured = start_again if options.start_again else run
        options.json.write_text(json.dumps(measured(options.program[0], options)))
        return
    results, failed = [], []
    for name in options.program:
        if name == "dmm" and not os.environ.get("DEEPPROB_DATA"):
            print("\nwithout dmm: DEEPPROB_DATA names no folder of data sets")
            continue
        if result := in_own_process(name, options):
            results.append(result)
            title = f"**{result['title']}**\n" if options.markdown else result["title"]
            print(f"\n{title}\n{shown(detail(result), options.markdown)}", flush=True)
            if again := result.get("start_up_again"):
                print(f"\n{COMPILED}: a second process starts up in {again:.2f} s", flush=True)
        else:
            failed.append(name)
    if results:
        print(f"\n{shown(summary(results), options.markdown)}\n")
    if results and not options.quick:
        content = {
            "options": {k: v for k, v in vars(options).items() if k not in ("json", "out", "start_again")},
            "programs": results,
        }
        print(f"written to {write_result('svi', content, options.device, options.out)}")
    if failed:
        sys.exit(f"without a result: {', '.join(failed)}")


if __name__ == "__main__":
    main()
