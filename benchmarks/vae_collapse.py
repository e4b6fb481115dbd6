"""Posterior collapse of autoencoders of the bundled digits: does the check of active dimensions tell, and does the
remedy that it names cure?

    python benchmarks/vae_collapse.py [--seeds 10] [--epochs 20] [--threads 1] [--markdown]

Two kinds of fits collapse. The autoregressive decoder predicts each pixel from those before it and models the rows
without the code as soon as the KL weighs twice. The ordinary decoder needs the code, but the KL weighs 20 times. Below
each are fits with the remedies that the check names. Columns: fits by verdict, means of the share of active
dimensions and of their KL, and processor seconds of a fit. "right" are cautions and fails whose reading names collapse
for fits that should collapse, and passes for the others. Writes ``benchmarks/results/vae_collapse.json``.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from common import RESULTS, shown, write_result
from torch import Tensor, nn
from torch.nn.functional import linear

import deepprob as dp
from deepprob.diagnostics.case import Case
from deepprob.diagnostics.checks.collapse import active_dimensions
from deepprob.diagnostics.remedies import possible
from deepprob.inference import svi
from deepprob.models import VAE

LATENT_DIM, HIDDEN = 8, (100,)
LEVEL = 0.05


class OrdinaryVAE(VAE):
    """A VAE of binary images."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape, LATENT_DIM, HIDDEN)


class AutoregressiveVAE(OrdinaryVAE):
    """A VAE of binary images whose decoder also reads the pixels before each one, by a masked hidden layer."""

    def __init__(self, shape: tuple[int, ...], width: int = 8) -> None:
        super().__init__(shape)
        pixels = self.shape[0] * self.shape[1]
        self.first, self.last = nn.Linear(pixels, width * pixels), nn.Linear(width * pixels, pixels)
        self.built += [self.first, self.last]
        before = torch.ones(pixels, pixels).tril(-1)
        self.register_buffer("reads", before.repeat_interleave(width, 0))  # hidden units of a pixel read those before
        self.register_buffer("is_read", torch.eye(pixels).repeat_interleave(width, 1))

    def model(self, x: Tensor) -> None:  # type: ignore[override]
        """Draw codes from the prior; pixels given those before them and the code are observed."""
        with self.data_plate(x):
            z = pyro.sample("z", self.code_prior())  # (..., B, Z)
            pixels = x.flatten(-2)
            hidden = linear(pixels, self.first.weight * self.reads, self.first.bias).relu()
            logits = linear(hidden, self.last.weight * self.is_read, self.last.bias) + self.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits.unflatten(-1, self.shape)).to_event(2), obs=x)


Row = dict[str, Any]
beta, elbo = dp.objectives.Beta, dp.objectives.ELBO
FITS: dict[str, tuple[bool, type[VAE], Any]] = {
    "ordinary": (False, OrdinaryVAE, elbo()),
    "ordinary, KL weight 20": (True, OrdinaryVAE, beta(20.0)),
    "... a capacity of 8 nats": (False, OrdinaryVAE, beta(20.0, capacity=8.0)),
    "autoregressive, KL weight 2": (True, AutoregressiveVAE, beta(2.0)),
    "... a KL weight of 1": (False, AutoregressiveVAE, elbo()),
    "... free bits, 0.5 nats": (False, AutoregressiveVAE, beta(2.0, free_bits=0.5)),
}
"""By name: whether the codes collapse, the program and the objective."""


def fitted(name: str, seed: int, epochs: int) -> Row:
    """The check of one fit."""
    collapses, program, objective = FITS[name]
    digits = dp.load_data("digits")
    torch.manual_seed(seed)
    start = time.process_time()
    posterior = svi(
        program(digits.shape),
        digits.train,
        epochs=epochs,
        optimizer=dp.Optimizer(learning_rate=3e-3),
        objective=objective,
        seed=seed,
        progress=False,
        compile=False,
    )
    seconds = time.process_time() - start
    found = active_dimensions.answer(Case(posterior, digits.test, seed=seed), LEVEL)
    told = found.verdict in ("caution", "fail") and "collapse" in found.reading
    return {
        "fit": name,
        "seed": seed,
        "verdict": found.verdict,
        "active": found.value,
        "kl": sum(found.details["kl"]),
        "right": told if collapses else found.verdict == "pass",
        "reading": found.reading,
        "next_step": possible(found.next_step, posterior.config, extends=posterior.training is not None),
        "cpu_s": seconds,
    }


def line(name: str, rows: list[Row]) -> list[str]:
    """A line of the table, of all seeds of a fit."""
    verdicts = Counter(row["verdict"] for row in rows)
    counts = [str(verdicts[verdict]) for verdict in ("pass", "caution", "fail")]
    means = [f"{mean(row[key] for row in rows):.2f}" for key in ("active", "kl", "cpu_s")]
    right = f"{sum(row['right'] for row in rows)} of {len(rows)}"
    return [name, "collapse" if FITS[name][0] else "pass", *counts, right, *means]


def main() -> None:
    """Fit under every seed, ask the check, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    lines = [["fit", "should", "pass", "caution", "fail", "right", "active share", "KL, nats", "processor s"]]
    for name in FITS:
        found = [fitted(name, seed, options.epochs) for seed in range(options.seeds)]
        rows += found
        lines.append(line(name, found))
        print(*lines[-1], flush=True)
    print("\n" + shown(lines, options.markdown))
    content = {"seeds": options.seeds, "epochs": options.epochs, "threads": options.threads, "rows": rows}
    print("written to", write_result("vae_collapse", content, "cpu", options.out))


if __name__ == "__main__":
    main()
