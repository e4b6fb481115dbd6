"""Posterior prediction of a Bayesian network beside Pyro's Predictive: 100 draws, 256 rows, 8-50-1.

    python benchmarks/bnn_predict.py

Prints medians of the wall and CPU time of a call, one thread each, and writes ``benchmarks/results/bnn_predict.json``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from common import write_result
from peers.loops import synchronize
from pyro.infer import Predictive

from deepprob.engine.machine import pick_device
from deepprob.inference import svi
from deepprob.models import BayesianNeuralNetwork
from deepprob.networks.dense import MLP


def timed(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median and fastest milliseconds of a call."""
    wall, cpu = [], []
    call()
    for _ in range(repeats):
        began, began_cpu = time.perf_counter(), time.process_time()
        call()
        synchronize()
        wall.append(1e3 * (time.perf_counter() - began))
        cpu.append(1e3 * (time.process_time() - began_cpu))
    return {"median_ms": statistics.median(wall), "fastest_ms": min(wall), "median_cpu_ms": statistics.median(cpu)}


def main() -> None:
    """Fit for a moment, predict many times, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(arguments.rows, 8).to(pick_device(arguments.device))
    program = BayesianNeuralNetwork(MLP(8, 1, (50,)))
    posterior = svi(program, (x, x[:, :1].sin()), epochs=5, device=x.device, progress=False)
    own = posterior.program
    loop = Predictive(own.model, guide=own.guide, num_samples=arguments.draws)
    with torch.no_grad(), pyro.get_param_store().scope():
        rows = {
            "deepprob predict": timed(lambda: posterior.predict(x, draws=arguments.draws), arguments.repeats),
            "deepprob predict, mean and sd": timed(
                lambda: (p := posterior.predict(x, draws=arguments.draws)) and (p.mean, p.sd), arguments.repeats
            ),
            "Pyro Predictive, same program": timed(lambda: loop(x), max(3, arguments.repeats // 10)),
        }
    print(f"{arguments.draws} draws, {arguments.rows} rows, 8-50-1, one thread")
    print(f"{'':32s} {'median ms':>10s} {'fastest ms':>11s} {'median CPU ms':>14s}")
    for name, row in rows.items():
        print(f"{name:32s} {row['median_ms']:10.1f} {row['fastest_ms']:11.1f} {row['median_cpu_ms']:14.1f}")
    print(f"written to {write_result('bnn_predict', {'arguments': vars(arguments), 'rows': rows}, arguments.device)}")


if __name__ == "__main__":
    main()
