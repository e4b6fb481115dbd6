"""The log evidence of MNIST images under one VAE: `Posterior.evidence` beside pythae's `get_nll`.

    python benchmarks/vae_evidence.py [--images 1000] [--particles 100 5000] [--rounds 3] [--threads 2] [--markdown]

Both sides have the weights of one fit, so that their numbers agree, and take turns within a round. Columns: seconds of
the wall and of the processor, medians over rounds, and the mean log evidence. Needs MNIST (a folder named by
DEEPPROB_DATA, or a download); pythae is a peer of this benchmark alone (``pip install --no-deps pythae==0.1.2``, with
cloudpickle, imageio and pydantic), and is left out where it is not installed. Writes
``benchmarks/results/vae_evidence.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import shown, write_result
from torch import Tensor, nn

import deepprob as dp
from deepprob.inference import svi
from deepprob.models import VAE

Scorer = Callable[[Tensor, int], float]
"""From images and a number of particles to the mean log evidence."""


def fitted(hidden: list[int], latent_dim: int, epochs: int) -> tuple[dp.Posterior, Tensor]:
    """A posterior, and test images whose bits are drawn once."""
    mnist = dp.load_data("mnist")
    program = VAE(mnist.shape, latent_dim=latent_dim, hidden_dims=hidden)
    posterior = svi(program, mnist.train, epochs=epochs, batch_size=128, seed=0, progress=False)
    return posterior, mnist.extras["test_bits"].reshape(-1, *mnist.shape)


def pythae_scorer(program: VAE) -> Scorer:
    """`get_nll` of a pythae VAE with the networks of a fitted program; it returns log evidence, despite its name."""
    from pythae.models import VAE as Peer
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    network, centre = program.encoder.network, program.centre

    class Encoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network: nn.Module = network

        def forward(self, x: Tensor) -> Any:
            loc, raw = self.network(x.reshape(-1, *centre.shape) - centre).chunk(2, -1)
            scale = program.encoder.distribution(torch.cat([loc, raw], -1)).base_dist.scale
            return ModelOutput(embedding=loc, log_covariance=2 * scale.log())

    class Decoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network: nn.Module = program.decoder

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.network(z).sigmoid())

    config = VAEConfig(input_dim=(1, *program.shape), latent_dim=program.latent_dim, reconstruction_loss="bce")
    peer = Peer(config, encoder=Encoder(), decoder=Decoder()).eval()

    def score(x: Tensor, particles: int) -> float:
        with torch.no_grad():
            return float(peer.get_nll(x.unsqueeze(1), n_samples=particles, batch_size=100))

    return score


def measured(scorers: dict[str, Scorer], x: Tensor, particles: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds and the mean log evidence of each side, which take turns."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in scorers}
    for score in scorers.values():
        score(x[:2], particles)  # the first call makes what later ones keep
    for _ in range(rounds):
        for name, score in scorers.items():
            wall, cpu = time.perf_counter(), time.process_time()
            value = score(x, particles)
            found[name].append((time.perf_counter() - wall, time.process_time() - cpu, value))
    columns = {name: [median(column) for column in zip(*runs, strict=True)] for name, runs in found.items()}
    return [
        {"side": name, "images": len(x), "particles": particles, "wall_s": wall, "cpu_s": cpu, "log_evidence": value}
        for name, (wall, cpu, value) in columns.items()
    ]


def main() -> None:
    """Fit, score by both sides, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--particles", type=int, nargs="+", default=[100, 5000])
    parser.add_argument("--hidden", type=int, nargs="*", default=[400, 400])
    parser.add_argument("--latent-dim", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    posterior, images = fitted(options.hidden, options.latent_dim, options.epochs)
    scorers: dict[str, Scorer] = {"deepprob": lambda x, k: posterior.evidence(x, particles=k).mean}
    if importlib.util.find_spec("pythae") is not None:
        program = posterior.program
        assert isinstance(program, VAE)
        scorers["pythae 0.1.2"] = pythae_scorer(program)
    rows = []
    for particles in options.particles:
        rows += measured(scorers, images[: options.images], particles, options.rounds)
        print(*rows[-len(scorers) :], sep="\n", flush=True)
    head = ["side", "images", "particles", "wall s", "processor s", "log evidence"]
    numbers = {"wall_s": 2, "cpu_s": 2, "log_evidence": 3}
    lines = [
        [
            r["side"],
            str(r["images"]),
            str(r["particles"]),
            *(f"{r[name]:.{digits}f}" for name, digits in numbers.items()),
        ]
        for r in rows
    ]
    print("\n" + shown([head, *lines], options.markdown))
    print("written to", write_result("vae_evidence", {**vars(options), "rows": rows}, "cpu"))


if __name__ == "__main__":
    main()
