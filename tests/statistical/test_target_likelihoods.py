"""Fits of Bayesian networks to simulated targets: each family recovers the truth that made them. Seeds are fixed."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import BayesianNeuralNetwork
from deepprob.posteriors.posterior import Posterior


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)  # of the networks, where fits start


def inputs(rows: int, columns: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def drawn(distribution: Any) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found: Tensor = distribution.sample()
    return found


def fit(program: BayesianNeuralNetwork, x: Tensor, y: Tensor, epochs: int = 1200) -> Posterior:
    # The noise starts far too small, so the first gradients are huge; a small beta_2 lets Adam forget them.
    fast = Optimizer(learning_rate=3e-2, schedule="cosine", options={"betas": (0.9, 0.99)})
    return svi(program, (x, y), epochs=epochs, batch_size=None, optimizer=fast, seed=0, progress=False)


def test_student_t_recovers_noise_and_degrees_of_freedom() -> None:
    x = inputs(1500, 2)
    mean = x @ torch.tensor([[2.0], [-1.0]])
    y = drawn(dist.StudentT(3.0, mean, 0.5))
    posterior = fit(BayesianNeuralNetwork(nn.Linear(2, 1), "student_t"), x, y)
    draws, prediction = posterior.sample(draws=200), posterior.predict(x, draws=200)
    assert 2.3 < float(draws["degrees_of_freedom"].mean()) < 4.0  # its sampling sd is about 0.3
    noise = draws["noise"].mean() * posterior.program.y_scale
    assert abs(float(noise) / 0.5 - 1) < 0.1
    assert (prediction.mean - mean).square().mean().sqrt() < 0.05
    low, high = prediction.interval(0.9)
    assert 0.87 < float(((low <= y) & (y <= high)).float().mean()) < 0.93
    plain = fit(BayesianNeuralNetwork(nn.Linear(2, 1)), x, y)
    assert prediction.log_prob(y).mean() > plain.predict(x, draws=200).log_prob(y).mean() + 0.1


@pytest.mark.parametrize("guide", [None, "multivariate_normal"])
def test_predictions_of_student_t_have_a_mean_under_the_heaviest_tails(guide: str | None) -> None:
    x = inputs(400, 2)
    y = drawn(dist.StudentT(0.7, x.sum(1, keepdim=True), 0.1))
    program = BayesianNeuralNetwork(nn.Linear(2, 1), "student_t")
    posterior = svi(program, (x, y), steps=1500, batch_size=None, guide=guide, seed=0, progress=False)
    draws, prediction = posterior.sample(draws=100), posterior.predict(x, draws=100)
    assert float(draws["degrees_of_freedom"].min()) > 1.0
    assert float(draws["degrees_of_freedom"].mean()) < 1.3
    assert torch.isfinite(prediction.mean).all()


def test_heteroscedastic_noise_is_recovered() -> None:
    x = inputs(1500)
    mean, sd = torch.cat([x, -2 * x], 1), torch.cat([(0.5 * x - 1).exp(), (-0.3 * x).exp()], 1)
    y = drawn(dist.Normal(mean, sd))
    posterior = fit(BayesianNeuralNetwork(nn.Linear(1, 4), "heteroscedastic_normal"), x, y)
    prediction = posterior.predict(x, draws=200)
    assert ((prediction.aleatoric / sd).log().abs() < 0.2).float().mean() > 0.98
    assert ((prediction.mean - mean) / sd).square().mean().sqrt() < 0.1
    assert "noise" not in posterior.latent_sites


def test_censored_normal_recovers_what_the_limits_hide() -> None:
    x = inputs(1500)
    y = drawn(dist.Normal(2 * x, 1.0)).clamp(0.0, 3.0)
    posterior = fit(BayesianNeuralNetwork(nn.Linear(1, 1), "censored_normal", limits=(0.0, 3.0)), x, y)
    plain = fit(BayesianNeuralNetwork(nn.Linear(1, 1)), x, y)

    def slope(one: Posterior) -> float:
        weight = one.sample(draws=200)["weight"].mean() * one.program.y_scale / one.program.x_scale
        return float(weight)

    assert abs(slope(posterior) - 2.0) < 0.15 and slope(plain) < 1.2
    noise = posterior.sample(draws=200)["noise"].mean() * posterior.program.y_scale
    assert abs(float(noise) - 1.0) < 0.1
    prediction = posterior.predict(x, draws=200)
    assert prediction.mean.min() >= 0.0 and prediction.mean.max() <= 3.0
    at_limit = (prediction.draws == 0.0).float().mean(0)
    assert abs(float(at_limit.mean() - (y == 0.0).float().mean())) < 0.03


def test_ordinal_regression_recovers_probabilities_and_cutpoints() -> None:
    x, cutpoints = inputs(2000), torch.tensor([-1.5, 0.5, 1.0])
    truth = dist.OrderedLogistic(2 * x[:, 0], cutpoints)
    y = drawn(truth)
    net = nn.Linear(1, 1, bias=False)
    posterior = fit(BayesianNeuralNetwork(net, "ordinal", num_classes=4, standardize=False), x, y)
    found = posterior.sample(draws=200)["cutpoints"]
    assert found.shape == (200, 3) and (found.diff(dim=1) > 0).all()
    assert (found.mean(0) - cutpoints).abs().max() < 0.25  # sampling sds are about 0.08
    prediction = posterior.predict(x, draws=200)
    assert prediction.kind == "classes" and (prediction.probs - truth.probs).abs().mean() < 0.02
    assert posterior.log_likelihood(x, y, draws=3).shape == (3, 2000)


def test_a_function_with_dispersion_recovers_it() -> None:
    x = inputs(1500)
    y = drawn(dist.Laplace(3 * x + 1, 0.7))
    program = BayesianNeuralNetwork(
        nn.Linear(1, 1), lambda out, dispersion: dist.Laplace(out, dispersion), prior="normal", prior_scale=3.0
    )
    posterior = fit(program, x, y.squeeze(1))
    assert abs(float(posterior.sample(draws=200)["dispersion"].mean()) - 0.7) < 0.07
    prediction = posterior.predict(x, draws=200)
    assert prediction.mean.shape == (1500, 1) and (prediction.mean - 3 * x - 1).square().mean().sqrt() < 0.1
