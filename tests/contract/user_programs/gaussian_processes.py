"""Gaussian processes: a kernel matrix, its Cholesky factor, and a latent function or one that is integrated out."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal
from torch import Tensor
from torch.distributions import constraints

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise


def squared_exponential(a: Tensor, b: Tensor, variance: Any, lengthscale: Any) -> Tensor:
    """The kernel matrix of two lists of numbers."""
    return variance * torch.exp(-0.5 * ((a[:, None] - b[None, :]) / lengthscale) ** 2)


@kind("Gaussian processes with a kernel matrix")
def inducing_points(sizes: Sizes) -> UserProgram:
    x = torch.linspace(-2, 2, sizes.rows)
    z = torch.linspace(-2, 2, 5)
    y = torch.sin(2 * x) + 0.3 * noise(sizes.rows)
    kernel = squared_exponential(z, z, 1.0, 1.0) + 1e-4 * torch.eye(5)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        u = pyro.sample("u", dist.MultivariateNormal(torch.zeros(5), kernel))
        mean = squared_exponential(x, z, 1.0, 1.0) @ torch.linalg.solve(kernel, u)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.3), obs=y)

    def answer(posterior: Posterior) -> None:
        design = squared_exponential(x, z, 1.0, 1.0) @ torch.linalg.inv(kernel)
        precision = torch.linalg.inv(kernel) + design.T @ design / 0.09
        mean = torch.linalg.solve(precision, design.T @ y / 0.09)
        torch.testing.assert_close(posterior.sample(draws=2000)["u"].mean(0), mean, atol=0.05, rtol=0)
        marginal = dist.MultivariateNormal(
            torch.zeros(sizes.rows), design @ kernel @ design.T + 0.09 * torch.eye(len(x))
        )
        evidence = posterior.log_evidence(x, y, particles=2000)
        torch.testing.assert_close(evidence, marginal.log_prob(y), atol=0.1, rtol=0)

    return UserProgram(model, AutoMultivariateNormal, (x, y), rows=sizes.rows, answer=answer)


@kind("Gaussian processes with a kernel matrix")
def marginal_regression(sizes: Sizes) -> UserProgram:
    x = torch.linspace(0, 1, sizes.rows)
    y = torch.sin(6 * x) + 0.2 * noise(sizes.rows)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        variance = pyro.sample("kernel_var", dist.LogNormal(0.0, 1.0))
        length = pyro.sample("kernel_length", dist.LogNormal(-1.0, 1.0))
        sd = pyro.sample("kernel_noise", dist.LogNormal(-1.0, 1.0))
        covariance = squared_exponential(x, x, variance, length) + (sd + 1e-3) * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance_matrix=covariance), obs=y)

    return UserProgram(model, "normal", (x, y), rows=1)


@kind("Gaussian processes with a kernel matrix")
def latent_classifier(sizes: Sizes) -> UserProgram:
    x = noise(sizes.rows, 2)
    y = (x.prod(1) > 0).float()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        lengthscale = pyro.sample("lengthscale", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
        scaled = x / lengthscale
        kernel = torch.exp(-0.5 * torch.cdist(scaled, scaled) ** 2) + 1e-3 * torch.eye(len(x))
        white = pyro.sample("white", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
        f = torch.linalg.cholesky(kernel) @ white
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=f), obs=y)

    return UserProgram(model, "normal", (x, y), rows=sizes.rows)


@kind("Gaussian processes with a kernel matrix")
def log_gaussian_cox_process(sizes: Sizes) -> UserProgram:
    counts = torch.arange(sizes.rows) % 4.0

    def model(counts: Tensor | None = None) -> None:
        grid = torch.arange(float(sizes.rows))
        amplitude = pyro.sample("amplitude", dist.HalfNormal(1.0))
        length = pyro.sample("length", dist.InverseGamma(3.0, 5.0))
        distance = (grid.unsqueeze(0) - grid.unsqueeze(1)).abs()
        kernel = amplitude**2 * (1 + math.sqrt(3) * distance / length) * torch.exp(-math.sqrt(3) * distance / length)
        kernel.view(-1)[:: sizes.rows + 1] += 1e-3
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(sizes.rows), scale_tril=torch.linalg.cholesky(kernel)))
        with pyro.plate("cells", sizes.rows):
            pyro.sample("y", dist.Poisson(f.exp()), obs=counts)

    return UserProgram(model, "normal", (counts,), rows=sizes.rows)


@kind("Gaussian processes with a kernel matrix")
def pyros_regression(sizes: Sizes) -> UserProgram:
    x, y = torch.linspace(0, 5, sizes.rows), noise(sizes.rows)
    kernel = gp.kernels.RBF(input_dim=1, variance=torch.tensor(2.0), lengthscale=torch.tensor(1.5))
    process = gp.models.GPRegression(x, y, kernel, noise=torch.tensor(0.5))
    return UserProgram(process.model, process.guide, rows=1)


@kind("Gaussian processes with a kernel matrix")
def kernel_with_priors(sizes: Sizes) -> UserProgram:
    x, y = noise(sizes.rows, 2), noise(sizes.rows, seed=1)
    kernel = gp.kernels.Matern32(input_dim=2)
    kernel.lengthscale = pyro.nn.PyroSample(dist.LogNormal(0.0, 1.0))
    kernel.variance = pyro.nn.PyroSample(dist.LogNormal(0.0, 0.5))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        sd = pyro.param("sd", torch.tensor(0.5), constraint=constraints.positive)
        covariance = kernel(x) + sd**2 * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(x.new_zeros(len(x)), covariance), obs=y)

    return UserProgram(model, AutoDelta, (x, y), rows=1)


@kind("Gaussian processes with a kernel matrix")
def latent_variable_model(sizes: Sizes) -> UserProgram:
    y = noise(sizes.rows, sizes.groups)

    def model(y: Tensor | None = None) -> None:
        with pyro.plate("points", sizes.rows):
            x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        square = (x.unsqueeze(-2) - x.unsqueeze(-3)).pow(2).sum(-1)
        kernel = torch.exp(-0.5 * square) + 0.1 * torch.eye(sizes.rows)
        with pyro.plate("features", sizes.groups):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(sizes.rows), kernel), obs=None if y is None else y.T)

    return UserProgram(model, "normal", (y,), rows=sizes.groups)
