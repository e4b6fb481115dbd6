"""The mode of linear regression is known."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from linear_regression import LinearRegression, exact, regression_data

from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import map_estimate
from deepprob.programs.program import Program


def test_mode_of_linear_regression() -> None:
    x, y = regression_data()
    posterior = map_estimate(LinearRegression(), (x, y), batch_size=None, steps=1500, progress=False)
    mode, _ = exact(x, y)
    assert torch.allclose(posterior.sample(draws=1)["w"][0].double(), mode, atol=1e-3)


def test_restarts_keep_the_better_mode() -> None:
    """Of the modes at -1 and 2 the second is higher; a start is on either side with probability 1/2."""

    def model() -> None:
        z = pyro.sample("z", dist.Uniform(-4.0, 4.0))
        pyro.factor("modes", torch.logaddexp(-((z + 1.0) ** 2) / 0.1, 5.0 - (z - 2.0) ** 2 / 0.1))

    best = Optimizer(learning_rate=0.05)
    posterior = map_estimate(Program.of(model), restarts=8, steps=400, optimizer=best, progress=False, seed=1)
    assert abs(float(posterior.sample(draws=1)["z"]) - 2.0) < 0.01
