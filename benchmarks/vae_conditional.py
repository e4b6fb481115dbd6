"""MNIST quadrants: a conditional VAE predicts the rest of an image from one, two or three quadrants of it.

    OMP_NUM_THREADS=1 python benchmarks/vae_conditional.py

The quadrants are those of Pyro's example (Sohn, Lee, Yan 2015): the lower left one, the left half, all but the lower
right one. Two figures, in nats for an image, of the pixels that are not observed, with importance weights of the
first 1 000 test images:

- binary: the negative conditional log-likelihood of binary pixels, drawn once from the grey ones and frozen;
- grey: the cross-entropy of the grey pixels in the place of it, which Pyro's example reports (as a bound, without
  importance weights, of all test images). Grey pixels have no Bernoulli likelihood; the figure compares with Pyro's.

The condition is grey in both. Beside the VAE stands a network of the same widths that predicts every pixel without a
code. Both keep the parameters of their best epoch on validation images. Needs MNIST (a folder named by DEEPPROB_DATA,
or a download).
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import pyro
import torch
from common import write_result
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

import deepprob as dp
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import ConditionalVAE
from deepprob.networks.dense import MLP
from deepprob.networks.likelihood import Likelihood
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

PYRO = {1: (100.4, 71.8), 2: (61.9, 51.0), 3: (25.4, 24.2)}  # its tutorial: the network, and the VAE
Rows = tuple[Tensor, Tensor]


class Network(Program):
    """Pixels that are independent given the observed quadrants: no code.

    Args:
        quadrants: The number of observed quadrants.
        hidden_dims: Sizes of the hidden layers.
    """

    def __init__(self, quadrants: int, hidden_dims: list[int]) -> None:
        super().__init__()
        size = 196 * (4 - quadrants)
        self.observation = Likelihood("bernoulli", (size,), grey=True)
        self.net = MLP(196 * quadrants, size, hidden_dims)
        self.built = [self.net]

    def model(self, c: Tensor, x: Tensor | None = None) -> Tensor:
        """Draw pixels given quadrants."""
        with self.data_plate(c):
            value: Tensor = pyro.sample("x", self.decode(c), obs=x)
        return value

    def guide(self, c: Tensor, x: Tensor | None = None) -> None:
        """There is nothing to draw."""

    def decode(self, c: Tensor) -> Any:
        """Distribution of pixels given quadrants."""
        return self.observation.distribution(self.net(c.flatten(1)))

    def prepare(self, *batch: Tensor) -> tuple[Tensor, ...]:
        return batch[0], *(self.observation.prepare(x) for x in batch[1:])


def observed(quadrants: int) -> Tensor:
    """Mask of the observed pixels."""
    known = torch.zeros(28, 28, dtype=torch.bool)
    known[14:, :14] = True
    if quadrants > 1:
        known[:, :14] = True
    if quadrants > 2:
        known[:14] = True
    return known


def rows(images: Tensor, known: Tensor, predicted: Tensor | None = None) -> Rows:
    """Observed quadrants, (N, quadrants, 14, 14), and the other pixels."""
    return images[:, known].unflatten(1, (-1, 14, 14)), (images if predicted is None else predicted)[:, ~known]


@torch.no_grad()
def grey_bounds(program: ConditionalVAE, c: Tensor, x: Tensor, particles: int) -> Tensor:
    """Importance-weighted bound of every image, with the cross-entropy of grey pixels as likelihood."""
    posterior, prior, weights = program.encode(x, c), program.code_prior(c), []
    for _ in range(particles):
        z = posterior.sample()
        logits = program.decode(z, c).base_dist.logits
        likelihood = -cross_entropy(logits, x, reduction="none").sum(1)
        weights.append(likelihood + prior.log_prob(z) - posterior.log_prob(z))
    return torch.stack(weights).logsumexp(0) - math.log(particles)


def fit(program: Program, data: Any, known: Tensor, arguments: argparse.Namespace) -> tuple[Posterior, float]:
    """The posterior, and the processor seconds of the fit."""
    began = time.process_time()
    posterior = svi(
        program,
        rows(data.train["images"], known),
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        optimizer=Optimizer(learning_rate=arguments.learning_rate),
        held_out=rows(data.valid["images"][:2000], known),
        device=arguments.device,
        seed=arguments.seed,
        progress=False,
    )
    return posterior, time.process_time() - began


def row(quadrants: int, data: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fit both programs and score them."""
    known, count = observed(quadrants), 196 * (4 - quadrants)
    grey = data.test["images"][:1000]
    bits = data.extras["test_bits"][:1000].reshape(-1, 28, 28).to(grey.dtype)
    c, x = rows(grey, known, bits)
    program = ConditionalVAE((count,), (quadrants, 14, 14), arguments.latent_dim, arguments.hidden)
    posterior, seconds = fit(program, data, known, arguments)
    network, network_seconds = fit(Network(quadrants, arguments.hidden), data, known, arguments)
    binary = -posterior.log_evidence(c, x, particles=arguments.particles)
    pixels = network.program.decode(c).base_dist.logits.detach()
    torch.manual_seed(0)
    return {
        "quadrants": quadrants,
        "binary": float(binary.mean()),
        "binary_se": float(binary.std() / len(binary) ** 0.5),
        "binary_bound": -float(posterior.elbo(c, x, particles=10).mean()),
        "grey": -float(grey_bounds(posterior.program, c, rows(grey, known)[1], arguments.particles).mean()),
        "best_epoch": posterior.history.best_epoch,
        "fit_cpu_s": seconds,
        "network_binary": float(cross_entropy(pixels, x, reduction="none").sum(1).mean()),
        "network_grey": float(cross_entropy(pixels, rows(grey, known)[1], reduction="none").sum(1).mean()),
        "network_best_epoch": network.history.best_epoch,
        "network_cpu_s": network_seconds,
        "pyro_network_grey": PYRO[quadrants][0],
        "pyro_grey_bound": PYRO[quadrants][1],
    }


def main() -> None:
    """Fit, score, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quadrants", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--hidden", type=int, nargs="*", default=[500, 500])
    parser.add_argument("--latent-dim", type=int, default=50)
    parser.add_argument("--particles", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda")
    arguments = parser.parse_args()

    data, found = dp.load_data("mnist"), []
    print("| quadrants | binary | grey | network, binary | network, grey | processor s | Pyro, grey | its network |")
    print("|---|---|---|---|---|---|---|---|")
    for quadrants in arguments.quadrants:
        found.append(one := row(quadrants, data, arguments))
        print(
            f"| {quadrants} | {one['binary']:.2f} ± {one['binary_se']:.2f} | {one['grey']:.2f} | "
            f"{one['network_binary']:.2f} | {one['network_grey']:.2f} | {one['fit_cpu_s']:.0f} | "
            f"{one['pyro_grey_bound']} | {one['pyro_network_grey']} |",
            flush=True,
        )
    write_result("vae_conditional", {**vars(arguments), "rows": found}, arguments.device)


if __name__ == "__main__":
    main()
