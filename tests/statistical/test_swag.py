"""SWAG against its own iterates, and against the stationary distribution of gradient descent."""

from __future__ import annotations

from typing import Any

import torch
from linear_regression import COLUMNS, ROWS, SIGMA, LinearRegression, exact, regression_data

from deepprob.fitting.callbacks import Callback, Fit
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import swag


class Watch(Callback):
    """Notes the parameters at every step."""

    def __init__(self) -> None:
        self.points: list[torch.Tensor] = []

    def step_end(self, fit: Fit) -> None:
        self.points.append(next(value for name, value in fit.parameters().items() if name.endswith(".w")).clone())


def covariance(posterior: Any) -> torch.Tensor:
    found: torch.Tensor = posterior.program.current_guide.get_posterior().covariance_matrix.detach()
    return found


def test_gaussian_has_the_moments_of_the_iterates() -> None:
    x, y = regression_data()
    watch = Watch()
    posterior = swag(
        LinearRegression(),
        (x, y),
        steps=60,
        batch_size=20,
        iterates=12,
        max_rank=5,
        every=3,
        callbacks=[watch],
        progress=False,
    )
    visited = torch.stack(watch.points)[62::3]
    assert len(visited) == 12
    last = visited[-5:] - visited.mean(0)
    expected = 0.5 * torch.diag(visited.var(0)) + last.T @ last / (2 * 4)
    assert torch.allclose(covariance(posterior), expected, rtol=1e-3, atol=1e-9)
    assert torch.allclose(posterior.program.current_guide.get_posterior().loc, visited.mean(0), atol=1e-5)


def test_mean_is_near_the_mode_and_the_spread_is_that_of_gradient_descent() -> None:
    """The covariance solves A S + S A = rate C / B; 400 iterates far apart tell a variance to about 7 %.

    A pass over shuffled rows is long here, so that its noise is forgotten before it cancels.
    """
    x, y = regression_data()
    rate, size = 0.02, 2
    posterior = swag(
        LinearRegression(),
        (x, y),
        steps=2000,
        batch_size=size,
        optimizer=Optimizer("sgd", learning_rate=0.05),
        learning_rate=rate,
        iterates=400,
        max_rank=400,
        every=30,
        progress=False,
    )
    mode, _ = exact(x, y)
    hessian = (torch.eye(COLUMNS) + x.T @ x / SIGMA**2) / ROWS
    rows = x * (y - x @ mode.float())[:, None] / SIGMA**2
    noise = rows.T.cov() * (1.0 - size / ROWS)  # without replacement
    sums = torch.kron(hessian, torch.eye(COLUMNS)) + torch.kron(torch.eye(COLUMNS), hessian)
    stationary = torch.linalg.solve(sums, (rate * noise / size).reshape(-1)).reshape(COLUMNS, COLUMNS)
    found = covariance(posterior).diagonal()
    assert ((found / stationary.diagonal() - 1.0).abs() < 0.3).all(), found / stationary.diagonal()
    off = posterior.program.current_guide.get_posterior().loc.detach().double() - mode
    assert (off.abs() < 4.0 * (stationary.diagonal() / 100.0).sqrt() + 1e-3).all()


def test_members_are_chains() -> None:
    x, y = regression_data()
    fast = Optimizer(learning_rate=0.05)
    posterior = swag(LinearRegression(), (x, y), members=3, steps=600, batch_size=20, optimizer=fast, progress=False)
    mode, _ = exact(x, y)
    assert posterior.chains is not None
    assert posterior.chains["w"].shape == (3, 30, COLUMNS)
    assert torch.allclose(posterior.chains["w"].mean((0, 1)).double(), mode, atol=0.05)
