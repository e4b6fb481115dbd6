"""Bayesian networks: linear ones and last layers in closed form, point estimates, early stops."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

import deepprob as dp
from deepprob.models import BayesianNeuralNetwork
from verdicts.registry import Fitted, good, wrong
from verdicts.truths import density_posterior, fit, linear_posterior, moments, noise, plain_normal, predictive_loss

NOISE = 0.5


def centered_rows(count: int, columns: int, seed: int, kind: int) -> Tensor:
    """Inputs without any correlation, so that independent weights are exact."""
    x = torch.randn(count, columns, generator=noise(seed, kind))
    return torch.linalg.qr(x - x.mean(0))[0] * count**0.5


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1)], 1)


def linear_rows(count: int, seed: int, kind: int) -> tuple[Tensor, Tensor]:
    x = centered_rows(count, 3, seed, kind)
    return x, x.sum(1, keepdim=True) + 0.3 + NOISE * torch.randn(count, 1, generator=noise(seed, kind + 1))


@good("network", "closed form", "a linear network, whose posterior is normal", rows=(30, 300, 2000))
@wrong("network", "closed form", "{steps} steps of a linear network", rows=(300, 2000), steps=(60, 200),
       rate=(1e-2, 1e-3))  # fmt: skip
def linear_network(seed: int, rows: int, steps: int = 3000, rate: float = 2e-2) -> Fitted:
    train, fresh = linear_rows(rows, seed, 100), linear_rows(200, seed, 102)
    program = BayesianNeuralNetwork(nn.Linear(3, 1), prior="normal", noise=NOISE, standardize=False)
    exact = linear_posterior(with_ones(train[0]), train[1][:, 0], NOISE)
    posterior = fit(program, train, steps=steps, seed=seed, batch_size=None,
                    optimizer=dp.Optimizer(learning_rate=rate))  # fmt: skip
    return Fitted(posterior, fresh, train=train, truth={"weight": exact[:3], "bias": exact[3]})


def features() -> nn.Module:
    """A frozen layer and a linear one, as of a pretrained network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
        head = nn.Linear(3, 1)
    return nn.Sequential(body.requires_grad_(False), head)


@good("network", "closed form", "a Bayesian last layer under a full covariance", rows=(80, 300),
      guide=("multivariate_normal", "multivariate_normal"))  # fmt: skip
@wrong("network", "closed form", "independent weights on features that correlate", rows=(80, 500),
       guide=("normal", "normal"))  # fmt: skip
def last_layer(seed: int, rows: int, guide: str) -> Fitted:
    net = features()

    def draw(kind: int) -> tuple[Tensor, Tensor]:
        g = noise(seed, kind)
        x = torch.randn(rows, 2, generator=g)
        with torch.no_grad():
            return x, net(x) + NOISE * torch.randn(rows, 1, generator=g)

    train, fresh = draw(104), draw(105)
    with torch.no_grad():
        design = with_ones(net[0](train[0]))  # type: ignore[operator]
    exact = linear_posterior(design, train[1][:, 0], NOISE)
    program = BayesianNeuralNetwork(net, prior="normal", noise=NOISE, standardize=False)
    posterior = fit(program, train, guide, steps=4000, seed=seed, batch_size=None)
    return Fitted(posterior, fresh, train=train, truth={"1.weight": exact[:3], "1.bias": exact[3]})


@good("network", "reference draws", "a network without hidden layers, for two classes", rows=(200, 1500))
def logistic_network(seed: int, rows: int) -> Fitted:
    def draw(kind: int) -> tuple[Tensor, Tensor]:
        g = noise(seed, kind)
        x = torch.randn(rows, 2, generator=g)
        return x, (torch.rand(rows, 1, generator=g) < torch.sigmoid(x.sum(1, keepdim=True))).float()

    train, fresh = draw(106), draw(107)
    design, y = with_ones(train[0]).double(), train[1][:, 0].double()

    def joint(w: Tensor) -> Tensor:
        fits = dist.Bernoulli(logits=w @ design.T, validate_args=False).log_prob(y).sum(1)
        return fits + dist.Normal(0.0, 1.0).log_prob(w).sum(1)

    w = density_posterior(joint, torch.zeros(3))
    program = BayesianNeuralNetwork(nn.Linear(2, 1), "bernoulli", prior="normal", standardize=False)
    posterior = fit(program, train, "multivariate_normal", steps=2000, seed=seed, batch_size=None)
    return Fitted(posterior, fresh, train=train, truth={"weight": moments(w[:, :2]), "bias": moments(w[:, 2])})


@wrong("network", "constructed", "a point estimate of a wide network from {rows} rows is over-confident",
       rows=(50, 100))  # fmt: skip
def overconfident_classifier(seed: int, rows: int) -> Fitted:
    def draw(count: int, kind: int) -> tuple[Tensor, Tensor, Tensor]:
        g = noise(seed, kind)
        x = torch.randn(count, 8, generator=g)
        logits = x[:, :1]
        return x, (torch.rand(count, 1, generator=g) < torch.sigmoid(logits)).float(), logits

    (x, y, _), (fx, fy, logits) = draw(rows, 108), draw(300, 109)
    program = BayesianNeuralNetwork(dp.MLP(8, 1, (50,), "tanh"), "bernoulli", prior="normal", prior_scale=3.0)
    posterior = fit(program, (x, y), "map", steps=800, seed=seed)
    true = dist.Bernoulli(logits=logits).log_prob(fy)[:, 0]
    even = torch.full_like(true, 0.5).log()
    return Fitted(posterior, (fx, fy), train=(x, y), nats=lambda: predictive_loss(posterior, (fx, fy), true, even))


@wrong("network", "constructed", "a point estimate follows the noise of {rows} rows", rows=(40,))
def overconfident_regression(seed: int, rows: int) -> Fitted:
    def draw(count: int, kind: int) -> tuple[Tensor, Tensor, Tensor]:
        g = noise(seed, kind)
        x = torch.randn(count, 4, generator=g)
        mean = torch.sin(x[:, :1])
        return x, mean + NOISE * torch.randn(count, 1, generator=g), mean

    (x, y, _), (fx, fy, mean) = draw(rows, 110), draw(300, 111)
    program = BayesianNeuralNetwork(dp.MLP(4, 1, (50,), "tanh"), prior="normal", prior_scale=3.0)
    posterior = fit(program, (x, y), "map", steps=1500, seed=seed)
    true, plain = dist.Normal(mean, NOISE).log_prob(fy)[:, 0], plain_normal(y[:, 0], fy[:, 0])
    return Fitted(posterior, (fx, fy), train=(x, y), nats=lambda: predictive_loss(posterior, (fx, fy), true, plain))


@wrong("network", "constructed", "{epochs} epochs of a network that needs hundreds", epochs=(5, 25))
def network_stopped_early(seed: int, epochs: int) -> Fitted:
    def draw(kind: int) -> tuple[Tensor, Tensor, Tensor]:
        g = noise(seed, kind)
        x = 2 * torch.randn(400, 1, generator=g)
        mean = torch.sin(2 * x)
        return x, mean + 0.2 * torch.randn(400, 1, generator=g), mean

    (x, y, _), (fx, fy, mean) = draw(112), draw(113)
    posterior = fit(BayesianNeuralNetwork(dp.MLP(1, 1, (30,), "tanh")), (x, y), epochs=epochs, seed=seed)
    true, plain = dist.Normal(mean, 0.2).log_prob(fy)[:, 0], plain_normal(y[:, 0], fy[:, 0])
    return Fitted(posterior, (fx, fy), train=(x, y), nats=lambda: predictive_loss(posterior, (fx, fy), true, plain))
