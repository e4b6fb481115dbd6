"""A linear Bayesian neural network against its known posterior. Seeds are fixed, and thresholds are wide."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import softplus

from deepprob.fitting.kl_schedules import KLWarmUp
from deepprob.fitting.objectives import ELBO
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import BayesianNeuralNetwork
from deepprob.networks.dense import MLP
from deepprob.posteriors.posterior import Posterior

SIGMA = 0.5


def linear_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator)
    weights = torch.randn(5, generator=generator)
    return x, (x @ weights + 0.3 + SIGMA * torch.randn(200, generator=generator)).unsqueeze(1)


def fit_linear(batch_size: int | None, steps: int) -> Posterior:
    program = BayesianNeuralNetwork(nn.Linear(5, 1), prior="normal", noise=SIGMA, standardize=False)
    per_epoch = 1 if batch_size is None else 200 // batch_size
    return svi(
        program,
        linear_data(),
        batch_size=batch_size,
        epochs=steps // per_epoch,
        objective=ELBO(particles=16),
        optimizer=Optimizer(learning_rate=1.5e-2),
        weights="fresh",
        seed=1,
        progress=False,
    )


@pytest.mark.parametrize("batch_size", [20, pytest.param(200, marks=pytest.mark.slow), None])
def test_the_guide_is_the_mean_field_optimum_at_every_batch_size(batch_size: int | None) -> None:
    x, y = linear_data()
    parameters = fit_linear(batch_size, steps=2000 if batch_size == 20 else 1000).parameters()
    x = torch.cat([x, torch.ones(200, 1)], dim=1)  # the bias is a weight of 1
    precision = torch.eye(6) + x.T @ x / SIGMA**2
    fitted = torch.cat([softplus(parameters[f"raw_sd.{i}"]).flatten() for i in (0, 1)])
    ratio = fitted / precision.diagonal().rsqrt()  # the optimum of a mean-field Gaussian
    assert ((ratio - 1).abs() < 0.03).all(), ratio
    mean = torch.linalg.solve(precision, x.T @ y / SIGMA**2).flatten()
    found = torch.cat([parameters[f"raw_loc.{i}"].flatten() for i in (0, 1)])
    assert ((found - mean).abs() < 0.2 * fitted).all()


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [20, 200])
@pytest.mark.parametrize(("guide", "steps"), [("multivariate_normal", 3000), ("low_rank", 12_000), ("flow", 12_000)])
def test_a_guide_with_correlations_has_the_sds_of_the_posterior(guide: str, steps: int, batch_size: int) -> None:
    # One pair of weights is correlated, so that the best member of each family has the sds of the posterior.
    x, y = linear_data()
    x[:, 1] = 0.8 * x[:, 0] + 0.6 * x[:, 1]
    program = BayesianNeuralNetwork(nn.Linear(5, 1, bias=False), prior="normal", noise=SIGMA, standardize=False)
    posterior = svi(
        program,
        (x, y),
        guide=guide,
        batch_size=batch_size,
        steps=steps,
        objective=ELBO(particles=50),
        optimizer=Optimizer(learning_rate=1e-2, schedule="cosine", average=0.995),
        seed=1,
        progress=False,
    )
    precision = (torch.eye(5) + x.T @ x / SIGMA**2).double()
    exact = precision.inverse().diagonal().sqrt()
    ratio = posterior.sample(draws=40_000)["weight"].reshape(-1, 5).double().std(0) / exact
    assert ((ratio - 1).abs() < 0.03).all(), ratio
    assert (precision.diagonal().rsqrt() / exact).min() < 0.75  # power: independent weights fail


def test_elbo_is_below_the_evidence_and_importance_weights_reach_it() -> None:
    x, y = linear_data()
    posterior = fit_linear(None, steps=800)
    features = torch.cat([x, torch.ones(200, 1)], dim=1)
    covariance = features @ features.T + SIGMA**2 * torch.eye(200)
    exact = torch.distributions.MultivariateNormal(torch.zeros(200), covariance).log_prob(y.flatten())
    bound = posterior.log_weights(x, y, particles=2000).mean()
    assert bound < exact and exact - bound < 1.0
    assert abs(float(posterior.log_evidence(x, y, particles=2000) - exact)) < 0.1


def test_noise_is_learned() -> None:
    x, y = linear_data()
    # The noise starts far too small, so the first gradients are huge; a small beta_2 lets Adam forget them.
    fast = Optimizer(learning_rate=3e-2, options={"betas": (0.9, 0.99)})
    program = BayesianNeuralNetwork(nn.Linear(5, 1))
    posterior = svi(program, (x, 10 * y), epochs=1500, batch_size=None, optimizer=fast, seed=0, progress=False)
    features = torch.cat([x, torch.ones(200, 1)], dim=1)
    residuals = y - features @ torch.linalg.lstsq(features, y).solution
    unbiased = residuals.square().sum().div(200 - 6).sqrt()
    assert abs(float(posterior.predict(x).aleatoric.mean() / (10 * unbiased)) - 1) < 0.1


def test_uncertainty_grows_away_from_the_data() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(100, 1, generator=generator) * 2 - 1
    y = torch.sin(3 * x) + 0.1 * torch.randn(100, 1, generator=generator)
    posterior = svi(
        BayesianNeuralNetwork(MLP(1, 1, (20,))),
        (x, y),
        epochs=2500,
        batch_size=None,
        callbacks=[KLWarmUp(1000)],
        seed=0,
        progress=False,
    )
    seen, unseen = posterior.predict(x), posterior.predict(torch.tensor([[-4.0], [4.0]]))
    assert unseen.epistemic.min() > 3 * seen.epistemic.mean()
    assert seen.log_prob(y).mean() > 0.5  # at most log(1 / 0.1) - 1.42 = 0.88


def small_table(rows: int) -> tuple[Tensor, Tensor]:
    """Twelve features of which five matter a little, and two classes."""
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(rows, 12, generator=generator), torch.zeros(12)
    weights[:5] = 0.5 * torch.randn(5, generator=generator)
    return x, (torch.rand(rows, generator=generator) < torch.sigmoid(x @ weights + 0.2)).long()


def test_the_default_network_is_as_good_as_logistic_regression_on_a_small_noisy_table() -> None:
    x, y = small_table(1350)
    train, test = (x[:350], y[:350]), (x[350:], y[350:])
    expected = LogisticRegression().fit(*train).predict_log_proba(test[0])[range(1000), test[1]].mean()
    posterior = svi(BayesianNeuralNetwork.from_data(train), train, steps=2500, seed=0, progress=False)
    found = float(posterior.predict(test[0], draws=200).log_prob(test[1]).mean())
    assert found > expected - 0.02, (found, expected)
    share = train[1].float().mean()
    base = float(torch.where(test[1] == 1, share.log(), (1 - share).log()).mean())
    assert expected > base + 0.03  # power: a network that predicts the base rate fails


def test_the_default_network_learns_what_is_not_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(300, 2, generator=generator) * 4 - 2
    y = torch.sin(2 * x[:, :1]) * x[:, 1:] + 0.1 * torch.randn(300, 1, generator=generator)
    posterior = svi(BayesianNeuralNetwork.from_data((x, y)), (x, y), steps=4000, batch_size=None, progress=False)
    residual = (posterior.predict(x, draws=100).mean - y).square().mean() / y.var()
    assert residual < 0.05  # a linear map leaves nearly all
