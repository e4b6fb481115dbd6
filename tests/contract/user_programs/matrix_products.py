"""Regressions that multiply a matrix by a latent vector or matrix: ``x @ w``."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal
from torch import Tensor

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise


@kind("matrix products")
def linear_regression(sizes: Sizes) -> UserProgram:
    x = noise(sizes.rows, sizes.groups)
    y = x @ torch.arange(1.0, sizes.groups + 1) + 0.5 * noise(sizes.rows, seed=1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 2.0).expand([x.shape[1]]).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    def answer(posterior: Posterior) -> None:
        precision = torch.eye(x.shape[1]) / 4 + x.T @ x / 0.25
        mean = torch.linalg.solve(precision, x.T @ y / 0.25)
        w = posterior.sample(draws=2000)["w"]
        torch.testing.assert_close(w.mean(0), mean, atol=0.03, rtol=0)
        torch.testing.assert_close(w.std(0), torch.linalg.inv(precision).diagonal().sqrt(), atol=0.0, rtol=0.2)
        new = noise(5, sizes.groups, seed=2)
        predicted = posterior.predict(new, draws=2000)
        torch.testing.assert_close(predicted.mean, new @ mean, atol=0.05, rtol=0)

    return UserProgram(model, AutoMultivariateNormal, (x, y), rows=sizes.rows, answer=answer)


@kind("matrix products")
def logistic_regression(sizes: Sizes) -> UserProgram:
    x = noise(sizes.rows, sizes.groups)
    y = (x.sum(1) + noise(sizes.rows, seed=1) > 0).float()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        coefficients = pyro.sample(
            "coefficients", dist.MultivariateNormal(torch.zeros(x.shape[1]), torch.eye(x.shape[1]))
        )
        intercept = pyro.sample("intercept", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x.matmul(coefficients) + intercept), obs=y)

    return UserProgram(model, AutoDiagonalNormal, (x, y), rows=sizes.rows)


@kind("matrix products")
def softmax_regression(sizes: Sizes) -> UserProgram:
    x, y = noise(sizes.rows, 2), torch.arange(sizes.rows) % sizes.groups

    def model(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2, sizes.groups), 1.0).to_event(2))
        bias = pyro.sample("bias", dist.Normal(torch.zeros(sizes.groups), 1.0).to_event(1))
        with pyro.plate("rows", x.size(0)):
            pyro.sample("y", dist.Categorical(logits=torch.mm(x, weight) + bias), obs=y)

    return UserProgram(model, "normal", (x, y), rows=sizes.rows)


@kind("matrix products")
def multivariate_response(sizes: Sizes) -> UserProgram:
    x = noise(sizes.rows, 5)
    y = x @ noise(5, sizes.groups, seed=1) + 0.3 * noise(sizes.rows, sizes.groups, seed=2)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("outputs", sizes.groups):
            w = pyro.sample("w", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        corr = pyro.sample("corr", dist.LKJCholesky(sizes.groups, 2.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.MultivariateNormal(x @ w.T, scale_tril=0.3 * corr), obs=y)

    return UserProgram(model, "normal", (x, y), rows=sizes.rows)


@kind("matrix products")
def matrix_factorization(sizes: Sizes) -> UserProgram:
    ratings = noise(sizes.rows, sizes.groups)

    def model(ratings: Tensor | None = None) -> None:
        with pyro.plate("users", sizes.rows):
            u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("items", sizes.groups):
            v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(u @ v.t(), 0.5).to_event(2), obs=ratings)

    return UserProgram(model, "normal", (ratings,), rows=1)


@kind("matrix products")
def bayesian_layers_by_hand(sizes: Sizes) -> UserProgram:
    x = noise(sizes.rows, sizes.groups)
    y = torch.sin(x.sum(1)) + 0.1 * noise(sizes.rows, seed=1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w1 = pyro.sample("w1", dist.Normal(torch.zeros(sizes.groups, 5), 1.0).to_event(2))
        b1 = pyro.sample("b1", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        w2 = pyro.sample("w2", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        mean = torch.einsum("nh,h->n", torch.tanh(torch.addmm(b1, x, w1)), w2)
        precision = pyro.sample("precision", dist.Gamma(3.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean, precision.rsqrt()), obs=y)

    return UserProgram(model, "normal", (x, y), rows=sizes.rows)
