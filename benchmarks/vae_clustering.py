"""Clusters of MNIST digits by a mixture VAE without labels: how many test images are in the cluster of their digit?

    python benchmarks/vae_clustering.py
    python benchmarks/vae_clustering.py --rows 5000 --epochs 2 --mixture-epochs 2

Needs MNIST (a folder named by DEEPPROB_DATA, or a download). A VAE is fitted; a Gaussian mixture of its codes places
the clusters (`MixtureVAE.from_vae`); networks and clusters are then fitted together. Clusters are matched to digits by
the Hungarian method, which maximises the accuracy. One thread, so that processor time is that of the fit alone.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from common import write_result
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import deepprob as dp
from deepprob.inference import svi
from deepprob.models import VAE, MixtureVAE


def accuracy(clusters: Tensor, labels: Tensor) -> float:
    """Share of rows in the cluster of their label, under the best matching of clusters and labels."""
    counts = np.zeros((int(clusters.max()) + 1, int(labels.max()) + 1), dtype=int)
    np.add.at(counts, (clusters.numpy(), labels.numpy()), 1)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels))


def clusters(program: MixtureVAE, x: Tensor) -> Tensor:
    """The most likely cluster of the mean code of each row."""
    with torch.no_grad():
        return program.responsibilities(program.encode(x).mean).argmax(-1)


def run(arguments: Any, x: Tensor, test: tuple[Tensor, Tensor], seed: int) -> dict[str, float]:
    """Fit both models; accuracies, bounds and times of one seed."""
    shared: dict[str, Any] = {"batch_size": arguments.batch_size, "progress": False, "seed": seed}
    shared |= {"optimizer": dp.Optimizer(learning_rate=arguments.learning_rate)}
    wall, cpu = time.perf_counter(), time.process_time()
    known = svi(VAE((28, 28), arguments.latent_dim, arguments.hidden), x, epochs=arguments.epochs, **shared)
    vae_cpu = time.process_time() - cpu
    placed = MixtureVAE.from_vae(known, x, arguments.clusters, seed)
    placed_cpu = time.process_time() - cpu - vae_cpu
    fitted = svi(placed, x, epochs=arguments.mixture_epochs, weights="keep", **shared)
    found = {"seed": seed, "cpu_min": (time.process_time() - cpu) / 60, "wall_min": (time.perf_counter() - wall) / 60}
    found |= {"vae_cpu_min": vae_cpu / 60, "placing_cpu_min": placed_cpu / 60}
    found["accuracy_placed"] = accuracy(clusters(placed, test[0]), test[1])
    found["accuracy"] = accuracy(clusters(fitted.program, test[0]), test[1])  # type: ignore[arg-type]
    found["elbo_vae"] = float(known.elbo(test[0][:1000]).mean())
    found["elbo"] = float(fitted.elbo(test[0][:1000]).mean())
    return found


def main() -> None:
    """Fit, score, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=None, help="training rows; all by default")
    parser.add_argument("--clusters", type=int, default=10)
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--hidden", type=int, nargs="*", default=[500, 500])
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--mixture-epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--name", default="vae_clustering", help="name of the JSON file")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    mnist = dp.load_data("mnist")
    x, test = mnist.train.tensors[0][: arguments.rows], mnist.test.tensors[:2]
    rows = []
    for seed in arguments.seeds:
        row = run(arguments, x, test, seed)
        print({name: round(value, 4) for name, value in row.items()}, flush=True)
        rows.append(row)
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "seed"}
    print(f"{len(x)} training and {len(test[0])} test images: {means}")
    write_result(arguments.name, {**vars(arguments), **means, "seeds": rows, "rows": len(x), "test_rows": len(test[0])})


if __name__ == "__main__":
    main()
