"""Fits against closed-form answers. Seeds are fixed, and thresholds are wide."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from linear_regression import SIGMA, LinearRegression, regression_data
from torch import Tensor

from deepprob.fitting.objectives import ELBO
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import VAE


@pytest.mark.parametrize("batch_size", [20, 200, None])
def test_mean_field_sd_is_the_optimum_at_every_batch_size(batch_size: int | None) -> None:
    x, y = regression_data()
    epochs = 150 if batch_size == 20 else 1500
    posterior = svi(
        LinearRegression(),
        (x, y),
        guide="normal",
        batch_size=batch_size,
        epochs=epochs,
        objective=ELBO(particles=20),
        optimizer=Optimizer(learning_rate=2e-2),
        seed=1,
    )
    fitted = next(v for n, v in posterior.parameters().items() if "scales" in n)
    optimum = (1 + (x**2).sum(0) / SIGMA**2).rsqrt()  # the diagonal of the precision determines a mean-field Gaussian
    assert ((fitted / optimum - 1).abs() < 0.03).all(), fitted / optimum


def test_full_covariance_guide_reaches_the_evidence() -> None:
    x, y = regression_data()
    posterior = svi(
        LinearRegression(),
        (x, y),
        guide="multivariate_normal",
        batch_size=None,
        epochs=1500,
        optimizer=Optimizer(learning_rate=2e-2),
        seed=1,
    )
    covariance = x @ x.T + SIGMA**2 * torch.eye(200)
    exact = dist.MultivariateNormal(torch.zeros(200), covariance).log_prob(y)
    assert abs(float(posterior.log_evidence(x, y, particles=200) - exact)) < 0.05


def ppca_evidence(x: Tensor, latent_dim: int) -> float:
    """Log marginal likelihood per row at the optimum (Tipping and Bishop 1999, equations 8 and 12)."""
    n, d = x.shape
    centred = x - x.mean(0)
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred / n).flip(0).double()
    noise = eigenvalues[latent_dim:].mean()
    log_det = eigenvalues[:latent_dim].log().sum() + (d - latent_dim) * noise.log()
    return float(-0.5 * (d * math.log(2 * math.pi) + log_det + d))


def test_linear_vae_is_probabilistic_pca() -> None:
    generator = torch.Generator().manual_seed(3)
    loadings = torch.randn(2, 6, generator=generator)
    codes, noise = torch.randn(500, 2, generator=generator), torch.randn(500, 6, generator=generator)
    x = codes @ loadings + 0.5 * noise + 1.0
    program = VAE((6,), latent_dim=2, hidden_dims=(), likelihood="normal", posterior="multivariate_normal")
    posterior = svi(program, x, batch_size=None, epochs=1500, optimizer=Optimizer(learning_rate=2e-2), seed=0)
    exact = ppca_evidence(x, latent_dim=2)
    assert abs(float(posterior.elbo(x, particles=100).mean()) - exact) < 0.02
    assert abs(float(posterior.log_evidence(x, particles=100).mean()) - exact) < 0.02
