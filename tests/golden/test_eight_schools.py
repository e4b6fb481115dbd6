"""Reference numbers from other software, stored with producer, version and date."""

from __future__ import annotations

import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

GOLDEN = json.loads((Path(__file__).parent / "eight_schools.json").read_text())["summary"]
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


def schools(sigma: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    return svi(Program.of(schools, "multivariate_normal"), (SIGMA, Y), epochs=3000, seed=0)


def quantities(draws: dict[str, Tensor]) -> dict[str, Tensor]:
    theta = draws["mu"][:, None] + draws["tau"][:, None] * draws["z"]
    return {"mu": draws["mu"], "tau": draws["tau"], "theta[1]": theta[:, 0], "theta[8]": theta[:, 7]}


def test_guide_is_near_the_reference(posterior: Posterior) -> None:
    for name, value in quantities(posterior.sample(SIGMA, Y, draws=20_000, seed=1)).items():
        mean, sd = GOLDEN[name]["mean"], GOLDEN[name]["sd"]
        assert abs(float(value.mean()) - mean) < 0.2 * sd, name
        assert 0.7 < float(value.std()) / sd < 1.1, name


def test_importance_weights_reach_the_reference(posterior: Posterior) -> None:
    # The same seed draws the same latents for both queries.
    weights = posterior.log_weights(SIGMA, Y, particles=100_000, seed=1).softmax(0)
    for name, value in quantities(posterior.sample(SIGMA, Y, draws=100_000, seed=1)).items():
        mean = (weights * value).sum()
        error = (weights**2 * (value - mean) ** 2).sum().sqrt()
        allowed = 4 * float(error**2 + GOLDEN[name]["mcse_mean"] ** 2) ** 0.5
        assert abs(float(mean) - GOLDEN[name]["mean"]) < allowed < 0.5, name
