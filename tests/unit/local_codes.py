"""A program with one latent code for every row."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from deepprob.programs.program import Program


class Codes(Program):
    """One local code per row, so that the score of held-out rows is a bound."""

    def __init__(self) -> None:
        super().__init__()
        self.loading, self.slope = nn.Parameter(torch.tensor([0.1, 0.2, 0.3])), nn.Parameter(torch.zeros(3))

    def model(self, x: Tensor) -> None:
        with self.data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) * self.loading, 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with self.data_plate(x):
            pyro.sample("z", dist.Normal(x @ self.slope, 0.3))
