"""VAE on MNIST, one stochastic layer, dynamic binarization: importance-weighted NLL against seconds.

    python benchmarks/vae_mnist.py --epochs 10

Needs MNIST (a folder named by DEEPPROB_DATA, or a download). Scores the first 1 000 test images, their bits drawn once
and frozen, with 500 particles.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import write_result

import deepprob as dp
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import VAE


def main() -> None:
    """Fit, score, print one line, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--hidden", type=int, nargs="*", default=[200, 200])
    parser.add_argument("--latent-dim", type=int, default=50)
    parser.add_argument("--activation", default="relu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args()

    mnist = dp.load_data("mnist")
    program = VAE(
        mnist.shape, latent_dim=arguments.latent_dim, hidden_dims=arguments.hidden, activation=arguments.activation
    )
    wall, cpu = time.perf_counter(), time.process_time()
    posterior = svi(
        program,
        mnist.train,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        optimizer=Optimizer(learning_rate=arguments.learning_rate),
        seed=arguments.seed,
        device=arguments.device,
        progress=False,
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    test = mnist.extras["test_bits"][:1000].reshape(1000, 28, 28)
    began = time.perf_counter()
    nll = -posterior.log_evidence(test, particles=500)
    elbo = posterior.elbo(test, particles=10)
    row = {
        "nll": float(nll.mean()),
        "nll_se": float(nll.std() / len(nll) ** 0.5),
        "elbo": float(elbo.mean()),
        "fit_wall_s": wall,
        "fit_cpu_s": cpu,
        "score_wall_s": time.perf_counter() - began,
        "steps": posterior.history.steps_per_epoch * arguments.epochs,
        **vars(arguments),
        "threads": torch.get_num_threads(),
    }
    print(
        f"NLL {row['nll']:.2f} +- {row['nll_se']:.2f} nats, -ELBO {-row['elbo']:.2f}; "
        f"{arguments.epochs} epochs of batch {arguments.batch_size} in {wall:.0f} s wall, {cpu:.0f} s processor time"
    )
    write_result("vae_mnist", row, arguments.device)


if __name__ == "__main__":
    main()
