"""Semi-supervised VAE on MNIST: test accuracy with few labels, beside a classifier of the same size on these labels.

    python benchmarks/vae_semi_supervised.py --labels 100 --draws 3
    python benchmarks/vae_semi_supervised.py --model m1+m2

Needs MNIST (a folder named by DEEPPROB_DATA, or a download). The labels are drawn evenly from all classes. One thread,
so that processor time is that of the fit alone. The classifier is scikit-learn's with its default settings.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from common import write_result
from sklearn.neural_network import MLPClassifier
from torch import Tensor

import deepprob as dp
from deepprob.inference import svi
from deepprob.models import VAE, SemiSupervisedVAE
from deepprob.posteriors.posterior import Posterior


def few_labels(y: Tensor, count: int, seed: int) -> Tensor:
    """Labels of which ``count`` remain, evenly drawn from all classes, and the others are -1."""
    generator, kept = torch.Generator().manual_seed(seed), torch.full_like(y, -1)
    classes = int(y.max()) + 1
    for label in range(classes):
        rows = (y == label).nonzero().flatten()
        chosen = rows[torch.randperm(len(rows), generator=generator)[: count // classes]]
        kept[chosen] = label
    return kept


def accuracy(posterior: Posterior, x: Tensor, y: Tensor) -> float:
    """Share of rows whose most likely class is theirs."""
    parts = [posterior.encode(rows, draws=2).mean["y"].argmax(1) for rows in x.split(1000)]  # type: ignore[index]
    return float((torch.cat(parts) == y).double().mean())


def fit(arguments: Any, x: Tensor, y: Tensor, seed: int) -> Posterior:
    """Fit M2, or M1 and then M2 on its codes."""
    options = {"latent_dim": arguments.latent_dim, "label_weight": arguments.label_weight}
    options |= {"hidden_dims": arguments.hidden, "activation": arguments.activation}
    shared = {"batch_size": arguments.batch_size, "progress": False, "seed": seed}
    shared |= {"optimizer": dp.Optimizer(learning_rate=arguments.learning_rate)}
    if arguments.warm_up:
        shared["callbacks"] = [dp.KLWarmUp(arguments.warm_up)]
    if arguments.model == "m2":
        return svi(SemiSupervisedVAE((28, 28), 10, **options), (x, y), epochs=arguments.epochs, **shared)
    rows = svi(VAE((28, 28), 50, hidden_dims=(500,)), x, epochs=arguments.m1_epochs, **shared)
    return svi(SemiSupervisedVAE.on_codes(rows, 10, **options), (x, y), epochs=arguments.epochs, **shared)


def main() -> None:
    """Fit, score, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["m2", "m1+m2"], default="m2")
    parser.add_argument("--labels", type=int, default=100)
    parser.add_argument("--draws", type=int, default=3, help="draws of the labels")
    parser.add_argument("--first", type=int, default=0, help="seed of the first draw")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--m1-epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--label-weight", type=float, default=10.0)
    parser.add_argument("--warm-up", type=float, default=0.0, help="epochs of a warm-up of the KL")
    parser.add_argument("--latent-dim", type=int, default=50)
    parser.add_argument("--hidden", type=int, nargs="*", default=[500])
    parser.add_argument("--activation", default="relu")
    parser.add_argument("--rows", type=int, default=None, help="training rows; all by default")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    mnist = dp.load_data("mnist")
    x, y = (field[: arguments.rows] for field in mnist.train.tensors[:2])
    test_x, test_y = mnist.test.tensors[:2]
    rows = []
    for draw in range(arguments.first, arguments.first + arguments.draws):
        few = few_labels(y, arguments.labels, draw)
        wall, cpu = time.perf_counter(), time.process_time()
        posterior = fit(arguments, x, few, draw)
        row = {"draw": draw, "cpu_min": (time.process_time() - cpu) / 60, "wall_min": (time.perf_counter() - wall) / 60}
        row["accuracy"] = accuracy(posterior, test_x, test_y)
        known = few >= 0
        plain = MLPClassifier(tuple(arguments.hidden), max_iter=1000, random_state=draw)
        plain.fit(x[known].flatten(1).numpy(), few[known].numpy())
        row["classifier"] = float(plain.score(test_x.flatten(1).numpy(), test_y.numpy()))
        print({name: round(value, 4) for name, value in row.items()}, flush=True)
        rows.append(row)
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("accuracy", "classifier", "cpu_min")}
    print(f"{arguments.model}, {arguments.labels} labels: {means}")
    write_result(f"vae_semi_supervised_{arguments.model.replace('+', '_')}", {**means, "rows": rows, **vars(arguments)})


if __name__ == "__main__":
    main()
