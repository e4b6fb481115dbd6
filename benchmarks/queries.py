"""Processor time of a query: stacked draws, and draws that need ``torch.vmap``.

    python benchmarks/queries.py [--draws 100] [--rounds 15] [--markdown]

Run in another checkout with ``PYTHONPATH`` set to it, the script times that checkout; programs that it refuses are left
out. Each row is a program and a query: the first call, which chooses how draws are run, and the median of the others.
Writes ``benchmarks/results/queries.json``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from common import RESULTS, shown, write_result
from pyro.infer import config_enumerate
from torch import Tensor

import deepprob as dp
from deepprob.inference import svi
from deepprob.models import VAE, BayesianNeuralNetwork

ROWS = 200
X = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1)


def regression(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 0.5), obs=y)


def product(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


@config_enumerate
def chain(y: Tensor) -> None:
    """A hidden Markov chain in a Python loop, whose tables take no leading dimension."""
    with pyro.plate("states", 3):
        moves = pyro.sample("moves", dist.Dirichlet(torch.ones(3)))
        level = pyro.sample("level", dist.Normal(0.0, 3.0))
    state: Any = 0
    for t in pyro.markov(range(len(y))):
        state = pyro.sample(f"state_{t}", dist.Categorical(moves[state]))
        pyro.sample(f"y_{t}", dist.Normal(level[state], 1.0), obs=y[t])


def fitted() -> dict[str, tuple[dp.Posterior, int, tuple[Tensor, ...]]]:
    """Posteriors by title, with the number of inputs and the data."""
    options: dict[str, Any] = {"epochs": 1, "progress": False, "compile": False}
    images = torch.rand(ROWS, 16, generator=torch.Generator().manual_seed(0))
    table = images, Y.unsqueeze(1)
    network = BayesianNeuralNetwork(dp.MLP(16, 1, [20]))
    return {
        "VAE": (svi(VAE((16,), latent_dim=2, hidden_dims=(32,)), images, **options), 1, (images,)),
        "Bayesian network": (svi(network, table, **options), 1, table),
        "regression, (x * w).sum(-1)": (svi(dp.Program.of(regression, "normal"), (X, Y), **options), 1, (X, Y)),
        "regression, x @ w": (svi(dp.Program.of(product, "normal"), (X, Y), **options), 1, (X, Y)),
        "hidden Markov chain, 8 steps": (svi(dp.Program.of(chain, "normal"), Y[:8], **options), 1, (Y[:8],)),
    }


def timed(query: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Processor milliseconds of the first call, and of the others."""
    times = []
    for _ in range(rounds + 1):
        began = time.process_time()
        query()
        times.append(1e3 * (time.process_time() - began))
    return times[0], median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = []
    for title, (posterior, inputs, data) in fitted().items():
        queries: dict[str, Callable[[], object]] = {
            "predict": lambda p=posterior, x=data[:inputs]: p.predict(*x, draws=options.draws).mean,
            "log_likelihood": lambda p=posterior, x=data: p.log_likelihood(*x, draws=options.draws),
        }
        for name, query in queries.items():
            try:
                first, later = timed(query, options.rounds)
            except ValueError:
                continue
            found.append({"program": title, "query": name, "first_ms": first, "ms": later})
    head = ["program", "query", "first call, ms", "ms"]
    lines = [[r["program"], r["query"], f"{r['first_ms']:.1f}", f"{r['ms']:.2f}"] for r in found]
    print(shown([head, *lines], options.markdown))
    print("\nwritten to", write_result("queries", {"draws": options.draws, "queries": found}, "cpu", options.out))


if __name__ == "__main__":
    main()
