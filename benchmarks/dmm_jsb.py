"""The deep Markov model on the Bach chorales: bound per time step, and how long it took.

    DEEPPROB_DATA=... python benchmarks/dmm_jsb.py [--epochs 200] [--threads 1] [--seed 0]

Prints a table and writes ``benchmarks/results/dmm_jsb.json``. Nats per time step are over all steps of a split,
sum(-elbo) / sum(lengths); lower is better. Krishnan, Shalit and Sontag (2017, table 3) report 6.926 for the bound and
6.388 by importance sampling, after training to convergence.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, card

from deepprob.data import Split, load_data
from deepprob.fitting.callbacks import Log
from deepprob.fitting.kl_schedules import KLWarmUp
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import DeepMarkovModel
from deepprob.posteriors.posterior import Posterior

BATCH = 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The deep Markov model on the Bach chorales.")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--warm-up", type=float, default=20, help="epochs until the KL has its full weight")
    parser.add_argument("--learning-rate", type=float, default=DeepMarkovModel.learning_rate)
    parser.add_argument("--latent-dim", type=int, default=32)
    parser.add_argument("--hidden-dim", type=int, default=100)
    parser.add_argument("--recurrent-dim", type=int, default=100)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--particles", type=int, default=100, help="of the importance-weighted bound")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def per_step(posterior: Posterior, split: Split, particles: int) -> dict[str, float]:
    """Bound and importance-weighted bound of a split, in nats per time step; lower is better."""
    steps = float(split["lengths"].sum())
    return {
        "bound": -float(posterior.elbo(split, particles=5).sum()) / steps,
        "importance_weighted": -float(posterior.log_evidence(split, particles=particles).sum()) / steps,
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    data = load_data("jsb_chorales")
    program = DeepMarkovModel.from_data(
        data,
        latent_dim=options.latent_dim,
        hidden_dim=options.hidden_dim,
        recurrent_dim=options.recurrent_dim,
        dropout=options.dropout,
    )
    began, began_cpu = time.perf_counter(), time.process_time()
    posterior = svi(
        program,
        data.train,
        held_out=data.valid,
        epochs=options.epochs,
        batch_size=BATCH,
        optimizer=Optimizer(learning_rate=options.learning_rate, clip_norm=10.0),
        callbacks=[KLWarmUp(options.warm_up), Log(max(1, options.epochs // 20))],
        seed=options.seed,
        device=options.device,
    )
    fit_seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    epochs = posterior.history.epochs
    return {
        "options": {n: v for n, v in vars(options).items() if n != "out"},
        "machine": {"platform": platform.platform(), "torch": torch.__version__, "threads": options.threads},
        "parameters": sum(p.numel() for p in program.parameters()),
        "best_epoch": posterior.history.best_epoch,
        "fit_seconds": fit_seconds,
        "fit_cpu_seconds": cpu_seconds,
        "median_seconds_per_epoch": float(np.median(epochs["seconds"])),
        "nats_per_step": {
            "valid": per_step(posterior, data.valid, options.particles),
            "test": per_step(posterior, data.test, options.particles),
        },
    }


def show(result: dict[str, Any]) -> None:
    print(f"\n{'split':8s} {'elbo per step (higher)':>24s} {'bound (lower)':>15s} {'importance-weighted':>21s}")
    for name, row in result["nats_per_step"].items():
        print(f"{name:8s} {-row['bound']:24.4f} {row['bound']:15.4f} {row['importance_weighted']:21.4f}")
    print(
        f"\nfit: {result['fit_seconds']:.0f} s wall, {result['fit_cpu_seconds']:.0f} s CPU, "
        f"{result['median_seconds_per_epoch']:.2f} s per epoch, best epoch {result['best_epoch']}, "
        f"{result['parameters']} parameters"
    )


def main() -> None:
    options = arguments()
    result = run(options)
    show(result)
    out = options.out or RESULTS / f"dmm_jsb{card(options.device)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
