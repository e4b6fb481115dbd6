"""Routines that look for modes: the scales of a network's prior stay where the weights do not shrink to zero."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from deepprob.inference import ROUTINES
from deepprob.models import BayesianNeuralNetwork, lift
from deepprob.networks.dense import MLP
from deepprob.programs.program import Program

STEPS: dict[str, dict[str, Any]] = {
    "map_estimate": {"steps": 3000},
    "ensemble": {"steps": 3000, "members": 3},
    "swag": {"steps": 3000, "members": 2},
    "dropout": {"steps": 3000},
    "sghmc": {"warmup": 2000, "draws": 100, "chains": 2},
}


def rows() -> tuple[Tensor, Tensor]:
    """Rows whose noise is large enough for the joint mode of weights and scales to be at zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator)
    y = torch.sin(x[:, :1]) + 0.5 * x[:, 1:2] * x[:, 2:3] + 0.4 * torch.randn(200, 1, generator=generator)
    return x, y


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 50), nn.ReLU(), nn.Dropout(0.05), nn.Linear(50, 1))


QUICK = [("map_estimate", "hierarchical"), ("sghmc", "hierarchical")]
CASES = [
    pytest.param(name, prior, marks=() if (name, prior) in QUICK else pytest.mark.slow)
    for name in STEPS
    for prior in ("hierarchical", "horseshoe")
]


@pytest.mark.parametrize(("name", "prior"), CASES)
def test_a_mode_explains_the_targets(name: str, prior: str) -> None:
    x, y = rows()
    program = BayesianNeuralNetwork(network(), prior=prior)
    settings = {"batch_size": None, "seed": 0, "progress": False} | STEPS[name]
    posterior = ROUTINES[name](program, (x, y), **settings)
    left = (posterior.predict(x, draws=50).mean - y).square().mean() / y.var()
    assert float(left) < 0.35  # 1 at weights of zero
    scales = posterior.sample(draws=50)["0.weight.scale"]
    if name == "sghmc":
        assert float(scales.std()) > 0.02
    else:
        torch.testing.assert_close(scales, torch.ones_like(scales))


def test_the_scales_of_a_lifted_network_stay_at_a_mode() -> None:
    x, y = rows()
    net = lift(MLP(6, 1, (50,), "relu"), name="net")

    def model(x: Tensor, y: Tensor | None = None) -> None:
        noise, mean = pyro.sample("noise", dist.LogNormal(0.0, 1.0)), net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, noise).to_event(1), obs=y)

    program = Program.of(model, data_plate="data")
    posterior = ROUTINES["map_estimate"](program, (x, y), steps=3000, batch_size=None, seed=0, progress=False)
    scale = posterior.sample(draws=2)["net.layers.0.weight.scale"]
    torch.testing.assert_close(scale, torch.ones_like(scale))
    assert float(posterior.sample(draws=2)["noise"].mean()) < 0.5  # 0.95 at weights of zero
