"""Members of an ensemble are modes: of the data, or of resampled rows."""

from __future__ import annotations

from typing import Any

import torch
from linear_regression import ROWS, LinearRegression, exact, regression_data

from deepprob.fitting.members import resampled
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.starts import seed_of
from deepprob.inference import ensemble, map_estimate
from deepprob.models import BayesianNeuralNetwork
from deepprob.networks import MLP

SETTINGS: dict[str, Any] = {
    "batch_size": None,
    "steps": 1000,
    "optimizer": Optimizer(learning_rate=0.05),
    "progress": False,
}


def test_members_of_a_convex_problem_agree() -> None:
    x, y = regression_data()
    posterior = ensemble(LinearRegression(), (x, y), members=3, **SETTINGS)
    mode, _ = exact(x, y)
    assert posterior.chains is not None
    assert posterior.chains["w"].shape == (3, 1, 5)
    assert torch.allclose(posterior.chains["w"][:, 0].double(), mode.expand(3, 5), atol=1e-3)


def test_bootstrapped_members_are_the_modes_of_their_rows() -> None:
    x, y = regression_data()
    posterior = ensemble(LinearRegression(), (x, y), members=6, bootstrap=True, seed=3, **SETTINGS)
    assert posterior.chains is not None
    found = posterior.chains["w"][:, 0].double()
    modes = [exact(x, y, resampled(ROWS, seed_of(3, k)))[0] for k in range(6)]
    assert torch.allclose(found, torch.stack(modes), atol=1e-3)
    assert posterior.program.bound_rows.weights is None


def test_a_member_alone_is_a_map_fit() -> None:
    """The first member takes the steps of a MAP fit with the same seed, beside others or alone."""
    x, y = regression_data()
    options = {"steps": 50, "batch_size": 20, "progress": False, "weights": "fresh", "seed": 5}
    net = BayesianNeuralNetwork(MLP(5, 1, (8,), "tanh"), prior="normal")
    alone = map_estimate(net, (x, y[:, None]), **options).sample(draws=1)
    beside = ensemble(net, (x, y[:, None]), members=3, **options).chains
    assert beside is not None
    assert all(torch.allclose(beside[name][0], value, atol=1e-5) for name, value in alone.items())
    assert not torch.allclose(beside["layers.0.weight"][0], beside["layers.0.weight"][1], atol=0.1)


def test_spread_grows_away_from_the_data() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(100, 1, generator=generator) * 2.0 - 1.0
    y = torch.sin(3.0 * x) + 0.1 * torch.randn(100, 1, generator=generator)
    net = BayesianNeuralNetwork(MLP(1, 1, (30,), "tanh"), prior="normal")
    posterior = ensemble(
        net, (x, y), members=5, steps=1500, batch_size=None, optimizer=Optimizer(learning_rate=0.02), progress=False
    )
    near, far = (float(posterior.predict(at, draws=5).epistemic) for at in (torch.zeros(1, 1), torch.full((1, 1), 4.0)))
    assert far > 10.0 * near
