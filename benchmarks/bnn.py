"""Bayesian networks on the standard UCI splits: every routine beside published rows.

    DEEPPROB_DATA=... python benchmarks/bnn.py [--sets yacht energy] [--routines svi laplace] [--splits 5]
    DEEPPROB_DATA=... python benchmarks/bnn.py --validate svi          # choose settings on training rows
    python benchmarks/bnn.py --markdown                                # the tables, as they stand in the README

One hidden layer of 50 rectifiers; each routine has one setting for all sets, chosen on a tenth of the training rows
(`--validate`). Scores are in the target's own units; the log-likelihood is that of the mixture over draws. The routine
named in advance, by its scores on these held-out rows, is ``sghmc``; log-likelihoods are compared split by split with
those of converged Monte Carlo dropout (Mukhoti, Stenetorp, Gal 2018). Writes ``benchmarks/results/bnn_<set>.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, shown, write_result
from torch import nn

import deepprob as dp
from deepprob.data import load_data
from deepprob.inference import ROUTINES
from deepprob.models import BayesianNeuralNetwork

SETS = {
    "yacht": "yacht",
    "energy": "energy",
    "boston": "bostonHousing",
    "concrete": "concrete",
    "wine": "wine-quality-red",
}
DROPOUT = 0.05
T = {"likelihood": "student_t"}


@dataclass(frozen=True)
class Setting:
    """The arguments of a program and of a routine."""

    program: dict[str, Any] = field(default_factory=dict)
    routine: dict[str, Any] = field(default_factory=dict)


def long_fit(epochs: int, particles: int) -> dict[str, Any]:
    """Steps on all rows, with a warm-up of the KL over the first half."""
    return {
        "epochs": epochs,
        "batch_size": None,
        "objective": dp.ELBO(particles=particles),
        "callbacks": [dp.KLWarmUp(epochs // 2)],
    }


def epochs_of(*numbers: int) -> dict[str, Callable[[], Setting]]:
    """Fits with the likelihood of Student's t, on all rows in every step."""
    return {
        f"Student's t, {epochs} epochs": lambda epochs=epochs: Setting(T, {"epochs": epochs, "batch_size": None})
        for epochs in numbers
    }


# Settings of each routine by name; the first is the one that `--validate` chose.
SETTINGS: dict[str, dict[str, Callable[[], Setting]]] = {
    "svi": {
        "Student's t, 8000 epochs, 4 draws a step, warm-up 4000": lambda: Setting(T, long_fit(8000, 4)),
        "8000 epochs, 4 draws a step, warm-up 4000": lambda: Setting({}, long_fit(8000, 4)),
        "defaults": Setting,
    },
    "sghmc": {
        "Student's t, all rows, step 0.2, warm-up 4000, every 20th": lambda: Setting(
            T, {"batch_size": None, "step_size": 0.2, "warmup": 4000, "every": 20}
        ),
        "all rows, step 0.2, warm-up 4000, every 20th": lambda: Setting(
            {}, {"batch_size": None, "step_size": 0.2, "warmup": 4000, "every": 20}
        ),
    },
    "laplace": {
        "Student's t, 2000 epochs": lambda: Setting(T, {"epochs": 2000, "batch_size": None}),
        "2000 epochs": lambda: Setting({}, {"epochs": 2000, "batch_size": None}),
        "defaults": Setting,
    },
    **{name: epochs_of(500, 2000, 8000) for name in ("ensemble", "swag", "map_estimate")},
    "dropout": epochs_of(2000, 500, 8000),
}
# Test RMSE and log-likelihood: Hernandez-Lobato, Adams 2015; Lakshminarayanan et al. 2017; Mukhoti et al. 2018.
PUBLISHED = {
    "PBP": {
        "yacht": (1.02, -1.63),
        "energy": (1.80, -2.04),
        "boston": (3.01, -2.57),
        "concrete": (5.67, -3.16),
        "wine": (0.64, -0.97),
    },
    "deep ensembles": {
        "yacht": (1.58, -1.18),
        "energy": (2.09, -1.38),
        "boston": (3.28, -2.41),
        "concrete": (6.03, -3.06),
        "wine": (0.64, -0.94),
    },
    "MC dropout, converged": {
        "yacht": (0.67, -1.25),
        "energy": (0.54, -1.21),
        "boston": (2.90, -2.40),
        "concrete": (4.82, -2.93),
        "wine": (0.62, -0.93),
    },
}


def run(routine: str, setting: Setting, rows: Any, seed: int, draws: int, device: str) -> dict[str, float]:
    """Fit some rows and score others."""
    train, test = rows
    x, y = train
    outputs = y.shape[1]
    wall, cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(seed)
    net: nn.Module = dp.MLP(x.shape[1], outputs, (50,), "relu")
    if routine == "dropout":
        net = nn.Sequential(nn.Linear(x.shape[1], 50), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(50, outputs))
    program = BayesianNeuralNetwork(net, **setting.program)
    posterior = ROUTINES[routine](program, train, seed=seed, progress=False, device=device, **setting.routine)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    prediction = posterior.predict(test[0], draws=draws)
    return {
        "rmse": float((prediction.mean.cpu() - test[1]).square().mean().sqrt()),
        "log_likelihood": float(prediction.log_prob(test[1]).mean()),
        "wall_s": wall,
        "cpu_s": cpu,
    }


def parts_of(name: str, split: int, validate: bool) -> tuple[Any, Any]:
    """Training and test rows of a split; for validation nine tenths and one tenth of its training rows."""
    data = load_data(f"uci/{SETS[name]}", split=split)
    train, test = (data.train.split(0.9, seed=split)) if validate else (data.train, data.test)
    return train.tensors, test.tensors


def dropout_scores(name: str) -> np.ndarray:
    """The log-likelihoods of converged Monte Carlo dropout by split."""
    return np.loadtxt(Path(os.environ["DEEPPROB_DATA"]) / "uci" / SETS[name] / "ref_mcdropout_test_ll.txt")


def rows_of(found: Mapping[str, Any]) -> Iterator[list[str]]:
    """The lines of a table for one set."""
    name, reference = found["set"], np.array(found["mc_dropout_log_likelihood"])
    for routine, scores in found["routines"].items():
        rmse, ll = ([row[key] for row in scores] for key in ("rmse", "log_likelihood"))
        gain = np.array(ll) - reference[: len(ll)]
        paired = (
            f"{gain.mean():+.3f} ± {gain.std(ddof=1) / len(gain) ** 0.5:.3f}" if len(gain) > 1 else f"{gain[0]:+.3f}"
        )
        cells = [f"{statistics.fmean(x):.3f} ± {_se(x):.3f}" for x in (rmse, ll)]
        yield [name, routine, *cells, paired, f"{statistics.fmean(row['cpu_s'] for row in scores):.0f}"]
    for source, scores in PUBLISHED.items():
        yield [name, f"*{source}*", *(f"{x:.2f}" for x in scores[name]), "", ""]


def _se(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


HEAD = ["set", "routine", "RMSE", "log-likelihood", "log-likelihood beyond MC dropout, paired", "processor s"]


def tables(markdown: bool) -> str:
    """The tables of all results."""
    files = [RESULTS / f"bnn_{name}.json" for name in SETS]
    lines = [
        HEAD,
        *(line for file in files if file.exists() for line in rows_of(json.loads(file.read_text())["result"])),
    ]
    return shown(lines, markdown)


def validate(routine: str, options: argparse.Namespace) -> None:
    """Print the scores of every setting of a routine on held-out training rows."""
    for label, make in SETTINGS[routine].items():
        for name in options.sets:
            scores = []
            for split in range(options.splits):
                rows = parts_of(name, split, validate=True)
                scores.append(run(routine, make(), rows, split, options.draws, options.device))
            rmse, ll = ([row[key] for row in scores] for key in ("rmse", "log_likelihood"))
            cpu = statistics.fmean(row["cpu_s"] for row in scores)
            print(
                f"{routine} {label}: {name} {statistics.fmean(rmse):.3f} {statistics.fmean(ll):.3f} {cpu:.0f} s",
                flush=True,
            )


def main() -> None:
    """Fit every split by every routine, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--routines", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--validate", choices=list(SETTINGS))
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.markdown:
        print(tables(True))
        return
    if options.validate:
        validate(options.validate, options)
        return
    for name in options.sets:
        file = RESULTS / f"bnn_{name}.json"
        known = json.loads(file.read_text())["result"]["routines"] if file.exists() else {}
        for routine in options.routines:
            known[routine] = []
            for split in range(options.splits):
                setting, rows = next(iter(SETTINGS[routine].values()))(), parts_of(name, split, validate=False)
                row = run(routine, setting, rows, split, options.draws, options.device) | {"split": split}
                known[routine].append(row)
                print(f"{name} {routine} {row}", flush=True)
        content = {
            "set": name,
            "mc_dropout_log_likelihood": dropout_scores(name)[: options.splits].tolist(),
            "settings": {r: next(iter(SETTINGS[r])) for r in known},
            "routines": known,
        }
        write_result(f"bnn_{name}", content, options.device)
    print(tables(False))


if __name__ == "__main__":
    main()
