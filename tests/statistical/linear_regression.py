"""Bayesian linear regression with a closed form, for the tests of routines."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from deepprob.programs.program import Program

SIGMA = 0.5
ROWS, COLUMNS = 200, 5


def regression_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, COLUMNS, generator=generator)
    weights = torch.randn(COLUMNS, generator=generator)
    return x, x @ weights + SIGMA * torch.randn(ROWS, generator=generator)


class LinearRegression(Program):
    """y ~ N(x w, sigma), w ~ N(0, I)."""

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", dist.Normal(torch.zeros(COLUMNS), 1.0).to_event(1))  # (..., 5)
        with self.data_plate(x):
            mean = (x * w).sum(-1)
            return pyro.sample("y", dist.Normal(mean, SIGMA), obs=y)


def exact(x: Tensor, y: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the posterior, in float64; with weights of the rows."""
    x, y = x.double(), y.double()
    scaled = x if weights is None else x * weights.double()[:, None]
    precision = torch.eye(COLUMNS, dtype=torch.float64) + scaled.T @ x / SIGMA**2
    covariance = torch.linalg.inv(precision)
    return covariance @ (scaled.T @ y) / SIGMA**2, covariance
