"""The programs of the SVI benchmark in Pyro; deepprob fits the very same objects.

Every program takes its rows inside ``plate("data", num_data)``, so that a minibatch is weighed by ``N / B``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

Model = Callable[..., Any]


def eight_schools(y: Tensor, sd: Tensor) -> None:
    """Non-centred: the schools' effects around a common mean."""
    zero = y.new_zeros(())
    mean = pyro.sample("mean", dist.Normal(zero, y.new_full((), 5.0)))
    spread = pyro.sample("spread", dist.HalfCauchy(y.new_full((), 5.0)))
    with pyro.plate("schools", len(y)):
        effect = pyro.sample("effect", dist.Normal(zero, y.new_ones(())))
        pyro.sample("y", dist.Normal(mean + spread * effect, sd), obs=y)


def bayesian_network(num_data: int, hidden: int = 50) -> Model:
    """One hidden layer of tanh, unit normal weights, a noise to learn."""

    def model(x: Tensor, y: Tensor) -> None:
        shapes = {"w1": (x.shape[1], hidden), "b1": (hidden,), "w2": (hidden, 1), "b2": (1,)}
        w = {
            name: pyro.sample(name, dist.Normal(x.new_zeros(shape), x.new_ones(shape)).to_event(len(shape)))
            for name, shape in shapes.items()
        }
        noise = pyro.sample("noise", dist.LogNormal(x.new_full((), -1.0), x.new_ones(())))
        f = (torch.tanh(x @ w["w1"] + w["b1"]) @ w["w2"] + w["b2"]).squeeze(-1)  # (B,)
        with pyro.plate("data", num_data, subsample=y):
            pyro.sample("y", dist.Normal(f, noise), obs=y)

    return model


def logistic_regression(num_data: int) -> Model:
    """Unit normal weights and intercept."""

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])).to_event(1))
        b = pyro.sample("b", dist.Normal(x.new_zeros(()), x.new_ones(())))
        with pyro.plate("data", num_data, subsample=y):
            pyro.sample("y", dist.Bernoulli(logits=x @ w + b), obs=y)

    return model


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Softplus(), nn.Linear(hidden, outputs))


class VAE(nn.Module):
    """784-400-20, softplus, Bernoulli pixels."""

    def __init__(self, num_data: int, pixels: int = 784, hidden: int = 400, latent: int = 20) -> None:
        super().__init__()
        self.num_data, self.latent = num_data, latent
        self.encoder, self.decoder = _mlp(pixels, hidden, 2 * latent), _mlp(latent, hidden, pixels)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", self.num_data, subsample=x):
            zeros = x.new_zeros(len(x), self.latent)
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", self.num_data, subsample=x):
            loc, log_sd = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_sd.exp()).to_event(1))


def joined(a: Tensor, b: Tensor) -> Tensor:
    """Two tensors side by side in the last dimension, the leading ones broadcast."""
    leading = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return torch.cat([a.expand(*leading, a.shape[-1]), b.expand(*leading, b.shape[-1])], -1)


class SemiSupervisedVAE(nn.Module):
    """Kingma's M2 with its classification term; the label of an unlabelled image is summed out.

    A row is an unlabelled image and a labelled one, so that every step sees both.
    """

    classes = 10

    def __init__(self, num_data: int, pixels: int = 784, hidden: int = 400, latent: int = 20) -> None:
        super().__init__()
        self.num_data, self.latent = num_data, latent
        self.classifier = _mlp(pixels, hidden, self.classes)
        self.encoder = _mlp(pixels + self.classes, hidden, 2 * latent)
        self.decoder = _mlp(latent + self.classes, hidden, pixels)
        self.guide = config_enumerate(self._guide, "parallel")

    def model(self, x: Tensor, labelled: Tensor, label: Tensor) -> None:
        pyro.module("networks", self)
        zeros = x.new_zeros(len(x), self.latent)
        prior = dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)
        with pyro.plate("data", self.num_data, subsample=x):
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(len(x), self.classes)))
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(joined(z, y))).to_event(1), obs=x)
            z = pyro.sample("z_labelled", prior)
            y = one_hot(label, self.classes).to(x.dtype)
            pyro.sample("labelled", dist.Bernoulli(logits=self.decoder(joined(z, y))).to_event(1), obs=labelled)
            pyro.sample("label", dist.Categorical(logits=self.classifier(labelled)), obs=label)

    def _guide(self, x: Tensor, labelled: Tensor, label: Tensor) -> None:
        pyro.module("networks", self)
        with pyro.plate("data", self.num_data, subsample=x):
            y = pyro.sample("y", dist.OneHotCategorical(logits=self.classifier(x)))
            loc, log_sd = self.encoder(joined(x, y)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_sd.exp()).to_event(1))
            y = one_hot(label, self.classes).to(x.dtype)
            loc, log_sd = self.encoder(joined(labelled, y)).chunk(2, -1)
            pyro.sample("z_labelled", dist.Normal(loc, log_sd.exp()).to_event(1))


class DeepMarkovModel(nn.Module):
    """As Pyro's own example: a recurrent network reads backwards, and every time step is two sites."""

    def __init__(self, notes: int = 88, latent: int = 100, emission: int = 100, transition: int = 200) -> None:
        super().__init__()
        recurrent = 600
        self.emitter = nn.Sequential(
            *(nn.Linear(latent, emission), nn.ReLU()),
            *(nn.Linear(emission, emission), nn.ReLU()),
            nn.Linear(emission, notes),
        )
        self.gate = nn.Sequential(nn.Linear(latent, transition), nn.ReLU(), nn.Linear(transition, latent), nn.Sigmoid())
        self.proposal = nn.Sequential(nn.Linear(latent, transition), nn.ReLU(), nn.Linear(transition, latent))
        self.linear, self.scale = nn.Linear(latent, latent), nn.Linear(latent, latent)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.recurrent = nn.RNN(notes, recurrent, nonlinearity="relu", batch_first=True)
        self.before = nn.Linear(latent, recurrent)
        self.loc, self.raw_sd = nn.Linear(recurrent, latent), nn.Linear(recurrent, latent)
        self.start, self.start_guide = nn.Parameter(torch.zeros(latent)), nn.Parameter(torch.zeros(latent))
        self.start_recurrent = nn.Parameter(torch.zeros(1, 1, recurrent))

    @staticmethod
    def prepare(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A minibatch of its own length, longest first: notes, notes backwards, mask, lengths (on the CPU)."""
        lengths, order = lengths.sort(descending=True)
        steps = torch.arange(int(lengths[0]), device=x.device)
        x = x[order, : len(steps)]  # (B, T, D)
        mask = steps < lengths[:, None]  # (B, T)
        backwards = torch.where(mask, lengths[:, None] - 1 - steps, steps)  # (B, T)
        return x, x.gather(1, backwards[..., None].expand_as(x)), mask, lengths.cpu()

    def transit(self, z: Tensor) -> tuple[Tensor, Tensor]:
        gate, proposal = self.gate(z), self.proposal(z)
        return (1 - gate) * self.linear(z) + gate * proposal, softplus(self.scale(torch.relu(proposal)))

    def combine(self, z: Tensor, summary: Tensor) -> tuple[Tensor, Tensor]:
        hidden = 0.5 * (torch.tanh(self.before(z)) + summary)
        return self.loc(hidden), softplus(self.raw_sd(hidden))

    def summarise(self, backwards: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        """The recurrent network's states in the order of time, (B, T, H)."""
        packed = nn.utils.rnn.pack_padded_sequence(backwards, lengths, batch_first=True)
        start = self.start_recurrent.expand(1, len(backwards), -1).contiguous()
        states, _ = nn.utils.rnn.pad_packed_sequence(self.recurrent(packed, start)[0], batch_first=True)
        steps, ends = torch.arange(mask.shape[1], device=mask.device), mask.sum(1, keepdim=True)
        forwards = torch.where(mask, ends - 1 - steps, steps)  # (B, T)
        return states.gather(1, forwards[..., None].expand_as(states))

    def model(self, x: Tensor, backwards: Tensor, mask: Tensor, lengths: Tensor) -> None:
        pyro.module("dmm", self)
        z = self.start.expand(len(x), -1)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                loc, sd = self.transit(z)
                with poutine.mask(mask=mask[:, t]):
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, sd).to_event(1))
                    pyro.sample(f"x_{t}", dist.Bernoulli(logits=self.emitter(z)).to_event(1), obs=x[:, t])

    def guide(self, x: Tensor, backwards: Tensor, mask: Tensor, lengths: Tensor) -> None:
        pyro.module("dmm", self)
        summary = self.summarise(backwards, mask, lengths)
        z = self.start_guide.expand(len(x), -1)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                loc, sd = self.combine(z, summary[:, t])
                with poutine.mask(mask=mask[:, t]):
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, sd).to_event(1))
