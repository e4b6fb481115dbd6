"""Make the folders in tests/golden/saved, which later versions must still read, and the numbers beside them.

The script documents how the files were made. It is run with the version that they stand for, commit ``caa2cd9``, and is
not run again with a later one; its imports are those of that version::

    git worktree add --detach /tmp/before caa2cd9
    PYTHONPATH=/tmp/before python tests/golden/make_saved.py

``saved/expected.json`` names the producer and holds the query data and the answers for every folder.
"""

from __future__ import annotations

import json
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import deepprob
from deepprob.inference import svi
from deepprob.models import VAE, BayesianNeuralNetwork
from deepprob.networks import MLP

COMMIT = "caa2cd9"
SAVED = Path(__file__).parent / "saved"


def normal_means(y: Tensor) -> None:
    """A common mean, and a mean of every row around it; test_saved.py repeats this model."""
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        mean = pyro.sample("mean", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def fitted_vae() -> tuple[deepprob.Posterior, tuple[Tensor, ...]]:
    """A VAE of grey images of 3 x 2 pixels, and three images."""
    x = torch.rand(16, 3, 2)
    program = VAE((3, 2), latent_dim=2, hidden_dims=(8,))
    return svi(program, x, epochs=3, batch_size=8, compile=False, device="cpu", progress=False), (x[:3],)


def fitted_network() -> tuple[deepprob.Posterior, tuple[Tensor, ...]]:
    """A Bayesian network fitted to 24 rows, and five rows."""
    x = torch.randn(24, 3)
    y = (x @ torch.tensor([[1.0], [-2.0], [0.5]])).sin() + 3.0
    program = BayesianNeuralNetwork(MLP(3, 1, (5,), "tanh"))
    posterior = svi(program, (x, y), epochs=4, batch_size=8, compile=False, device="cpu", progress=False)
    return posterior, (x[:5], y[:5])


def fitted_program() -> tuple[deepprob.Posterior, tuple[Tensor, ...]]:
    """A custom Pyro model; its guide has parameters for every row, so the queries cover all six rows."""
    y = torch.tensor([0.5, -1.0, 2.0, 1.5, 0.0, 3.0])
    program = deepprob.Program.of(normal_means, "normal", data_plate="data")
    posterior = svi(program, y, epochs=20, batch_size=None, compile=False, device="cpu", progress=False)
    return posterior, (y,)


def answers(posterior: deepprob.Posterior, data: tuple[Tensor, ...]) -> dict[str, Any]:
    """The numbers that a later version must give, as JSON."""
    samples = posterior.sample(*data, draws=4, seed=0)
    return {
        "data": [x.tolist() for x in data],
        "parameter_sums": {name: float(x.double().sum()) for name, x in posterior.parameters().items()},
        "sample": {name: x.tolist() for name, x in samples.items()},
        "predicted_mean": posterior.predict(*data, draws=4, seed=0).mean.tolist(),
        "log_likelihood": posterior.log_likelihood(*data, draws=4, seed=0).tolist(),
    }


def producer() -> dict[str, str]:
    """The version that makes the files.

    Raises:
        SystemExit: If the imported deepprob is not the version that the files stand for.
    """
    home = Path(deepprob.__file__).parent
    found = subprocess.run(
        ["git", "-C", str(home), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"],
        capture_output=True,
        text=True,
        check=True,
    )
    if found.stdout.strip() != COMMIT:
        raise SystemExit(f"{home} is at {found.stdout.strip()}, not at {COMMIT}. See the docstring.")
    return {
        "deepprob": deepprob.__version__,
        "commit": COMMIT,
        "torch": torch.__version__,
        "pyro-ppl": pyro.__version__,
        "date": date.today().isoformat(),
    }


def main() -> None:
    """Fit, save and query each of the three."""
    expected: dict[str, Any] = {"producer": producer()}
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name, fit in {"vae": fitted_vae, "network": fitted_network, "program": fitted_program}.items():
        posterior, data = fit()
        posterior.save(SAVED / name)
        expected[name] = answers(posterior, data)
    (SAVED / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
