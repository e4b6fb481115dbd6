"""The contract of every registered routine on networks: fit, save, load, equal predictions, ArviZ."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import ROUTINE_SETTINGS
from torch import Tensor, nn

from deepprob.inference import ROUTINES
from deepprob.models import BayesianNeuralNetwork
from deepprob.posteriors.posterior import Posterior

ROWS = 24
OWN_SETTINGS: dict[str, dict[str, Any]] = {}  # of a routine, where those of the other contract tests do not suit
NETWORK_SETTINGS: dict[tuple[str, str], dict[str, Any]] = {}  # of a routine on one of the networks


class Recurrent(nn.Module):
    """An LSTM of two layers with dropout between them, whose last state makes the output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 4, num_layers=2, dropout=0.1, batch_first=True)
        self.out = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    """A batch norm, dropout, and two layers that share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(3, 3), nn.Linear(3, 3)
        self.again.weight = self.first.weight
        self.norm, self.drop, self.out = nn.BatchNorm1d(3), nn.Dropout(0.1), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(torch.tanh(self.again(torch.tanh(self.norm(self.first(x)))))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.1), nn.Linear(5, 1))


def cnn() -> nn.Module:
    flat = nn.Sequential(nn.ReLU(), nn.Dropout2d(0.1), nn.Flatten(), nn.Linear(3 * 4 * 4, 3))
    return nn.Sequential(nn.Conv2d(1, 3, 3, stride=2, padding=1), *flat)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor, dict[str, Any]]] = {
    "MLP": (mlp, random(ROWS, 3), random(ROWS, 3).sum(1, keepdim=True), {}),
    "CNN": (cnn, random(ROWS, 1, 8, 8), torch.arange(ROWS) % 3, {"likelihood": "categorical", "num_classes": 3}),
    "LSTM": (Recurrent, random(ROWS, 5, 2), random(ROWS, 5, 2).sum((1, 2))[:, None], {}),
    "tied": (Tied, random(ROWS, 3), random(ROWS, 3).prod(1, keepdim=True), {}),
}


def program(network: str) -> BayesianNeuralNetwork:
    make, _, _, options = NETWORKS[network]
    torch.manual_seed(0)
    return BayesianNeuralNetwork(make(), prior="normal", **options)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("routine", sorted(ROUTINES))
def test_fits_saves_loads_and_exports(routine: str, network: str, tmp_path: Path) -> None:
    _, x, y, _ = NETWORKS[network]
    settings = ROUTINE_SETTINGS[routine] | OWN_SETTINGS.get(routine, {}) | NETWORK_SETTINGS.get((routine, network), {})
    settings |= {"compile": False} if "compile" in inspect.signature(ROUTINES[routine]).parameters else {}
    posterior = ROUTINES[routine](program(network), (x, y), progress=False, **settings)
    draws = posterior.sample(draws=4)
    assert all(value.isfinite().all() for value in draws.values())
    posterior.save(tmp_path / "posterior")
    again = Posterior.load(tmp_path / "posterior", program(network))
    assert again.config == posterior.config
    assert all(torch.equal(value, draws[name]) for name, value in again.sample(draws=4).items())
    mine, other = (p.predict(x, draws=6, seed=1) for p in (posterior, again))
    assert torch.equal(mine.mean, other.mean)
    assert mine.mean.isfinite().all()
    assert torch.equal(posterior.log_likelihood(x, y, draws=6), again.log_likelihood(x, y, draws=6))
    idata = again.to_arviz(x, y, draws=6)
    assert {"posterior", "posterior_predictive", "log_likelihood", "observed_data"} <= set(idata.groups())
    assert idata.log_likelihood["y"].shape[-1] == ROWS
