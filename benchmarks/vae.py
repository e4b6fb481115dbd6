"""Autoencoders beside published tables: importance-weighted test log-likelihood, processor time, active dimensions.

    python benchmarks/vae.py --rows vae iwae5 vamp --epochs 30
    python benchmarks/vae.py --rows vae --epochs 130 --name long
    python benchmarks/vae.py --data omniglot --rows vae iwae5
    python benchmarks/vae.py --data freyfaces
    python benchmarks/vae.py --full --device cuda
    python benchmarks/vae.py --markdown

Needs the data in the folder that DEEPPROB_DATA names. Grey pixels are probabilities, and every use of a training row
draws its bits anew; the bits of the test rows are drawn once. Frey faces have 256 levels and a discretized logistic
likelihood, and their figures are bits per pixel. The dense networks are those of Burda et al., except for
`--activation`. The sizes fit two CPU cores; `--full` takes the epochs of a GPU and adds 50 particles and two layers.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from common import RESULTS, card, shown, write_result
from torch import Tensor

import deepprob as dp
from deepprob.inference import svi
from deepprob.models import VAE, HierarchicalVAE
from deepprob.networks import FlowPrior, VampPrior

BURDA = "Burda et al. 2016, 1509.00519v4, table 1"


@dataclass(frozen=True)
class Row:
    """A model, an objective, and what was published about it.

    Attributes:
        title: What the table calls it.
        program: Makes the program from the rows' shape and common arguments.
        objective: The objective.
        published: Published figures by data set.
        source: Where they are from, and under which binarization.
        full: Whether it is for a GPU.
    """

    title: str
    program: Callable[..., dp.Program]
    objective: Any = "elbo"
    published: dict[str, float] = field(default_factory=dict)
    source: str = BURDA
    full: bool = False


def one_layer(shape: tuple[int, ...], **options: Any) -> VAE:
    """Burda's network of one stochastic layer."""
    return VAE(shape, latent_dim=50, hidden_dims=(200, 200), **options)


def two_layers(shape: tuple[int, ...], **options: Any) -> HierarchicalVAE:
    """Burda's network of two stochastic layers."""
    return HierarchicalVAE(shape, latent_dims=(100, 50), hidden_dims=((200, 200), (100, 100)), **options)


ROWS = {
    "vae": Row("VAE", one_layer, published={"mnist": 86.76, "omniglot": 108.11}),
    "iwae5": Row("IWAE, 5 particles", one_layer, dp.objectives.IWAE(5), {"mnist": 85.54, "omniglot": 106.12}),
    "dreg5": Row("IWAE, 5 particles, DReG", one_layer, dp.objectives.IWAE(5, gradient="dreg")),
    "miwae": Row(
        "MIWAE, 8 x 8",
        one_layer,
        dp.objectives.MIWAE(8, 8),
        {"mnist": 84.97},
        "Rainforth et al. 2018; dynamic binarization",
        full=True,
    ),
    "vamp": Row(
        "VAE, VampPrior 500",
        lambda shape, **options: one_layer(shape, prior=VampPrior(500), **options),
        published={"mnist": 85.57},
        source="Tomczak, Welling 2018; static binarization, 300-300-40 gated",
    ),
    "flow_prior": Row(
        "VAE, flow prior", lambda shape, **options: one_layer(shape, prior=FlowPrior(50, layers=4), **options)
    ),
    "flow_posterior": Row(
        "VAE, flow posterior", lambda shape, **options: one_layer(shape, posterior="flow", **options)
    ),
    "two_layers": Row("VAE, 2 layers", two_layers, published={"mnist": 85.33, "omniglot": 107.58}),
    "iwae50": Row(
        "IWAE, 50 particles", one_layer, dp.objectives.IWAE(50), {"mnist": 84.78, "omniglot": 104.67}, full=True
    ),
    "two_layers_iwae50": Row(
        "IWAE, 2 layers, 50 particles",
        two_layers,
        dp.objectives.IWAE(50),
        {"mnist": 82.90, "omniglot": 103.38},
        full=True,
    ),
}
DEFAULT = ("vae", "iwae5", "vamp", "two_layers")


def rows_of(name: str) -> tuple[Tensor, Tensor, dict[str, Any], float]:
    """Training rows, test rows, arguments of the model, and the unit of the figures in nats."""
    data = dp.load_data(name)
    train, test = data.train.tensors[0], data.test.tensors[0]
    if name == "freyfaces":
        # The middle of each of 256 levels.
        middle = [(torch.as_tensor(x) * 255).round() / 256 + 0.5 / 256 for x in (train, test)]
        options = {"likelihood": "discretized_logistic"}
        return middle[0], middle[1], options, math.log(2) * math.prod(train.shape[1:])
    if name == "mnist":
        return train, data.extras["test_bits"].float(), {}, 1.0
    frozen = torch.rand(test.shape, generator=torch.Generator().manual_seed(20150901))
    return train, (frozen < test).float(), {}, 1.0


def fit(
    row: Row, train: Tensor, test: Tensor, options: dict[str, Any], arguments: Any
) -> tuple[Tensor, dict[str, Any]]:
    """Fit and score: the test log-likelihood by row, and the figures."""
    program = row.program(tuple(train.shape[1:]), activation=arguments.activation, **options)
    wall, cpu = time.perf_counter(), time.process_time()
    posterior = svi(
        program,
        train,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        objective=row.objective,
        optimizer=dp.Optimizer(learning_rate=arguments.learning_rate),
        seed=arguments.seed,
        device=arguments.device,
        progress=False,
    )
    found = {"cpu_min": (time.process_time() - cpu) / 60, "wall_min": (time.perf_counter() - wall) / 60}
    evidence = posterior.log_evidence(test, particles=arguments.particles, seed=0).double().cpu()
    elbo = posterior.elbo(test, particles=10).double().cpu()
    found |= {"nll": -float(evidence.mean()), "se": float(evidence.std()) / len(evidence) ** 0.5}
    found |= {"elbo": float(elbo.mean()), "compiled": bool(posterior.config["compiled"]), "epochs": arguments.epochs}
    return evidence, found


def table(name: str, found: dict[str, Any], unit: float) -> list[list[str]]:
    """The rows of the table: figures of the fits, their difference from the VAE's, and the published ones."""
    lines = [["model", "epochs", "CPU min", "-ELBO", "NLL", "NLL minus the VAE's", "published", "source"]]
    for key, row in found.items():
        known = ROWS[key.removesuffix("_long")]
        better = (
            "" if "difference" not in row else f"{row['difference'] / unit:+.3f} ± {row['difference_se'] / unit:.3f}"
        )
        published = f"{known.published[name]:.2f}" if name in known.published else ""
        figures = [f"{-row['elbo'] / unit:.2f}", f"{row['nll'] / unit:.2f} ± {row['se'] / unit:.2f}"]
        source = known.source if published else ""
        lines.append([known.title, str(row["epochs"]), f"{row['cpu_min']:.1f}", *figures, better, published, source])
    return lines


def main() -> None:
    """Fit the rows, score them, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["mnist", "omniglot", "freyfaces"], default="mnist")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=None)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--name", default="", help="ending of the rows' names in the file, such as long")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--activation", default="relu")
    parser.add_argument("--images", type=int, default=1000, help="test rows")
    parser.add_argument("--particles", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--full", action="store_true", help="the epochs and rows of a GPU")
    parser.add_argument("--markdown", action="store_true", help="print the table of the file, without a fit")
    arguments = parser.parse_args()
    if arguments.full:
        arguments.epochs, arguments.batch_size, arguments.images = 300, 200, 10_000

    path = RESULTS / f"vae_{arguments.data}{card(arguments.device)}.json"
    found: dict[str, Any] = json.loads(path.read_text())["result"] if path.exists() else {}
    unit = 1.0
    if not arguments.markdown:
        torch.set_num_threads(arguments.threads)
        train, test, options, unit = rows_of(arguments.data)
        test, evidence = test[: arguments.images], {}
        chosen = arguments.rows or [n for n, row in ROWS.items() if (n in DEFAULT or (arguments.full and row.full))]
        for name in chosen:
            key = f"{name}_{arguments.name}" if arguments.name else name
            evidence[name], found[key] = fit(ROWS[name], train, test, options, arguments)
            found[key] |= {"unit": unit, "images": len(test), "particles": arguments.particles}
            if name != "vae" and "vae" in evidence:
                difference = evidence["vae"] - evidence[name]
                found[key]["difference"] = float(difference.mean())
                found[key]["difference_se"] = float(difference.std()) / len(difference) ** 0.5
            print({n: round(x, 3) if isinstance(x, float) else x for n, x in found[key].items()}, flush=True)
            write_result(f"vae_{arguments.data}", found, arguments.device)
    unit = next(iter(found.values()))["unit"]
    print(shown(table(arguments.data, found, unit), arguments.markdown))


if __name__ == "__main__":
    main()
