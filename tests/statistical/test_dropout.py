"""Monte Carlo dropout of inputs in linear regression has a closed form."""

from __future__ import annotations

import torch
from linear_regression import COLUMNS, SIGMA, regression_data
from torch import nn

from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import dropout
from deepprob.models import BayesianNeuralNetwork

RATE = 0.2


def test_dropout_of_inputs_is_a_ridge_of_each_column() -> None:
    """The mean over masks adds p / (1 - p) w_j^2 |x_j|^2 to the squared error, and to the variance of predictions."""
    x, y = regression_data()
    net = nn.Sequential(nn.Dropout(RATE), nn.Linear(COLUMNS, 1, bias=False))
    program = BayesianNeuralNetwork(net, prior="normal", noise=SIGMA, standardize=False)
    steady = Optimizer(learning_rate=0.02, average=0.995)
    posterior = dropout(program, (x, y[:, None]), steps=4000, batch_size=None, optimizer=steady, progress=False)
    odds = RATE / (1.0 - RATE)
    gram = x.T @ x
    best = torch.linalg.solve(gram + odds * torch.diag(gram.diagonal()) + SIGMA**2 * torch.eye(COLUMNS), x.T @ y)
    weights = posterior.sample(draws=1)["1.weight"][0, 0]
    assert torch.allclose(weights, best, atol=0.02)
    epistemic = posterior.predict(x[:20], draws=4000).epistemic.squeeze()
    expected = (odds * (x[:20] ** 2 @ weights**2)).sqrt()
    assert torch.allclose(epistemic, expected, rtol=0.1)
