"""Networks that were trained before, wholly or partly frozen, in models and guides."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise


def trained(network: nn.Module, *, frozen: bool = True) -> nn.Module:
    """A network with weights that a run of training might have left, in evaluation mode."""
    with torch.no_grad():
        for i, p in enumerate(network.parameters()):
            p.copy_(0.7 * noise(*p.shape, seed=20 + i))
            p.requires_grad_(not frozen)
    return network.eval()


@kind("pretrained and frozen networks")
def linear_head_on_features(sizes: Sizes) -> UserProgram:
    """A frozen network computes features; only the last layer is Bayesian, and its posterior has a closed form."""
    features = trained(nn.Sequential(nn.Linear(sizes.groups, 4), nn.Tanh()))
    x, y = noise(sizes.rows, sizes.groups), noise(sizes.rows, seed=1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("features", features)
        with torch.no_grad():
            phi = features(x)
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 2.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(phi @ w, 0.5), obs=y)

    def answer(posterior: Posterior) -> None:
        phi = features(x)
        precision = torch.eye(4) / 4 + phi.T @ phi / 0.25
        mean = torch.linalg.solve(precision, phi.T @ y / 0.25)
        w = posterior.sample(draws=4000)["w"]
        torch.testing.assert_close(w.mean(0), mean, atol=0.05, rtol=0)
        torch.testing.assert_close(w.T.cov(), torch.linalg.inv(precision), atol=0.02, rtol=0.3)
        new = noise(5, sizes.groups, seed=2)
        torch.testing.assert_close(posterior.predict(new, draws=4000).mean, features(new) @ mean, atol=0.06, rtol=0)

    return UserProgram(
        model, AutoMultivariateNormal, (x, y), rows=sizes.rows, answer=answer, steps=2000, learning_rate=0.02
    )


@kind("pretrained and frozen networks")
def frozen_decoder(sizes: Sizes) -> UserProgram:
    """The decoder came with its weights; the encoder is trained for it."""
    decoder = trained(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2 * sizes.groups)))
    torch.manual_seed(0)
    encoder = nn.Linear(2 * sizes.groups, 4)
    images = (noise(sizes.rows, 2 * sizes.groups) > 0).float()

    def model(images: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(images)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=images)

    def guide(images: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("images", len(images)):
            loc, raw = encoder(images).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw)).to_event(1))

    return UserProgram(model, guide, (images,), rows=sizes.rows)


@kind("pretrained and frozen networks")
def fine_tuned_with_a_frozen_first_layer(sizes: Sizes) -> UserProgram:
    """Training goes on from given weights in the second layer only; the noise is a latent site."""
    network = trained(nn.Sequential(nn.Linear(sizes.groups, 4), nn.ReLU(), nn.Linear(4, 1)), frozen=False)
    for p in network[0].parameters():
        p.requires_grad_(False)
    x, y = noise(sizes.rows, sizes.groups), noise(sizes.rows, seed=1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("network", network)
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(network(x).squeeze(-1), scale), obs=y)

    return UserProgram(model, "normal", (x, y), rows=sizes.rows)


@kind("pretrained and frozen networks")
def convolutions_with_running_statistics(sizes: Sizes) -> UserProgram:
    """A small image network with batch norm and dropout, in evaluation mode, under a Bayesian classifier."""
    backbone = trained(
        nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
    )
    backbone[1].running_mean.copy_(noise(3))
    images, y = noise(sizes.rows, 1, 4, 4), torch.arange(sizes.rows) % sizes.groups

    def model(images: Tensor, y: Tensor | None = None) -> None:
        with torch.no_grad():
            phi = backbone(images)
        w = pyro.sample("w", dist.Normal(torch.zeros(phi.shape[-1], sizes.groups), 0.1).to_event(2))
        with pyro.plate("images", len(images)):
            pyro.sample("y", dist.Categorical(logits=phi @ w), obs=y)

    return UserProgram(model, "normal", (images, y), rows=sizes.rows)


@kind("pretrained and frozen networks")
def blocked_parameters(sizes: Sizes) -> UserProgram:
    """``poutine.block`` hides the parameters of a network from the fit, though they could be trained."""
    network = trained(nn.Linear(sizes.groups, 2), frozen=False)
    x, y = noise(sizes.rows, sizes.groups), noise(sizes.rows, seed=1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        with poutine.block(hide_types=["param"]):
            pyro.module("network", network)
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            loc, raw = network(x).detach().unbind(-1)
            pyro.sample("y", dist.Normal(level + loc, nn.functional.softplus(raw) + 0.1), obs=y)

    return UserProgram(model, "normal", (x, y), rows=sizes.rows)


class Head(PyroModule):  # type: ignore[misc]
    """A frozen body in a PyroModule, with priors on the head's weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = trained(nn.Sequential(nn.Linear(inputs, 4), nn.Tanh()))
        self.head = PyroModule[nn.Linear](4, outputs)
        self.head.weight = PyroSample(dist.Normal(0.0, 1.0).expand([outputs, 4]).to_event(2))
        self.head.bias = PyroSample(dist.Normal(0.0, 1.0).expand([outputs]).to_event(1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = self.head(self.body(x))
        with pyro.plate("rows", x.shape[0]):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits


@kind("pretrained and frozen networks")
def module_with_a_frozen_body(sizes: Sizes) -> UserProgram:
    x, y = noise(sizes.rows, 2), torch.arange(sizes.rows) % sizes.groups
    return UserProgram(Head(2, sizes.groups), "normal", (x, y), rows=sizes.rows)


@kind("pretrained and frozen networks")
def embeddings_of_words(sizes: Sizes) -> UserProgram:
    """A table of word vectors from elsewhere, kept as a buffer and read by whole numbers."""
    table = nn.Embedding.from_pretrained(noise(sizes.groups, 3)).eval()
    words, y = torch.arange(2 * sizes.rows).reshape(sizes.rows, 2) % sizes.groups, (noise(sizes.rows) > 0).float()

    def model(words: Tensor, y: Tensor | None = None) -> None:
        pyro.module("table", table)
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("texts", len(words)):
            pyro.sample("y", dist.Bernoulli(logits=table(words).mean(1) @ w + bias), obs=y)

    return UserProgram(model, "normal", (words, y), rows=sizes.rows)
