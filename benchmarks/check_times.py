"""Seconds of `dp.check` on fitted posteriors: a VAE on MNIST, and a regression of 1 000 rows.

    python benchmarks/check_times.py [--epochs 5] [--markdown]

Each posterior is checked twice in the running process, on new rows; a page is written from the first report.
Needs MNIST (a folder named by DEEPPROB_DATA, or a download). Writes ``benchmarks/results/check_times.json``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from common import shown, write_result
from torch import Tensor

import deepprob as dp
from deepprob.inference import svi
from deepprob.models import VAE, BayesianNeuralNetwork


def mnist_vae(epochs: int) -> tuple[dp.Posterior, Any]:
    data = dp.load_data("mnist")
    program = VAE(data.shape, latent_dim=50, hidden_dims=[200, 200], activation="relu")
    posterior = svi(program, data.train, epochs=epochs, batch_size=128, progress=False)
    return posterior, data.extras["test_bits"].reshape(-1, *data.shape)


def table(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=noise)
    return x, x.sum(1) + 0.5 * torch.randn(rows, generator=noise)


def line(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, scale), obs=y)


def linear_regression() -> tuple[dp.Posterior, Any]:
    program = dp.Program.of(line, "multivariate_normal")
    return svi(program, table(1000, 0), steps=3000, progress=False), table(1000, 1)


def network_regression() -> tuple[dp.Posterior, Any]:
    (x, y), (fresh, target) = table(1000, 0), table(1000, 1)
    program = BayesianNeuralNetwork(dp.MLP(5, 1, [50]))
    return svi(program, (x, y[:, None]), steps=3000, progress=False), (fresh, target[:, None])


def timed(ask: Callable[[], Any]) -> tuple[Any, float, float]:
    """The answer, and the seconds of the wall and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    answer = ask()
    return answer, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="of the VAE")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    makers = {
        "VAE 784-200-200-50, 10 000 images": lambda: mnist_vae(options.epochs),
        "linear regression, 1 000 rows": linear_regression,
        "Bayesian network 5-50-1, 1 000 rows": network_regression,
    }
    found = []
    for title, make in makers.items():
        posterior, fresh = make()
        report, wall, cpu = timed(lambda p=posterior, data=fresh: dp.check(p, data))
        _, again, _ = timed(lambda p=posterior, data=fresh: dp.check(p, data))
        _, page, _ = timed(report.to_html)
        row = {"posterior": title, "verdict": report.verdict, "wall_s": wall, "cpu_s": cpu, "again_s": again}
        found.append(row | {"page_s": page})
        print(title, report.verdict, f"{wall:.1f} s", flush=True)
    head = ["posterior", "seconds", "processor seconds", "again", "page"]
    lines = [[r["posterior"], *(f"{r[k]:.1f}" for k in ("wall_s", "cpu_s", "again_s", "page_s"))] for r in found]
    print("\n" + shown([head, *lines], options.markdown))
    content = {"threads": torch.get_num_threads(), "epochs": options.epochs, "checks": found}
    print("written to", write_result("check_times", content, "cpu"))


if __name__ == "__main__":
    main()
