"""The semi-supervised autoencoder where its bound has a closed form, and on simulated clusters."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from deepprob.engine.random import RandomStream
from deepprob.fitting.objectives import ELBO
from deepprob.inference import svi
from deepprob.models import SemiSupervisedVAE
from deepprob.programs.run import Run

LOGITS = torch.tensor([[2.0, -1.0, 0.0], [-1.5, 1.0, 0.5]])  # of pixels by class


class OfClass(nn.Module):
    """Logits of the pixels of a class, whatever the code."""

    def forward(self, z: Tensor, classes: Tensor) -> Tensor:
        return classes @ LOGITS


class Exact(nn.Module):
    """Logits of the exact posterior of the class, for centered pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([dist.Bernoulli(logits=row).log_prob(x).sum(-1) for row in LOGITS], -1)


class Standard(nn.Module):
    """A standard normal code, whatever the row."""

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        return torch.tensor([0.0, math.log(math.expm1(1.0 - 1e-4))]).expand(len(x), 2)


def test_with_exact_networks_the_elbo_is_the_log_evidence() -> None:
    """Without a label a row has the evidence p(x), with one p(x, y); the code carries nothing."""
    program = SemiSupervisedVAE((3,), 2, latent_dim=1, classifier=Exact(), encoder=Standard(), decoder=OfClass())
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    labels = torch.tensor([-1, 0, 1, -1, -1, 1, 0, 1])
    joint = torch.stack([dist.Bernoulli(logits=row).log_prob(x).sum(-1) for row in LOGITS], 1) - math.log(2)
    evidence = torch.where(labels < 0, joint.logsumexp(1), joint.gather(1, labels.clamp_min(0).unsqueeze(1))[:, 0])
    program.eval()
    with RandomStream(0).drawing():
        loss, terms = ELBO()(Run(program, (x, labels), torch.arange(8), 8))
    assert torch.allclose(terms["elbo"], evidence.mean(), atol=1e-5)
    assert torch.allclose(-loss, evidence.mean(), atol=1e-5)


def test_few_labels_name_clusters_that_the_rows_show() -> None:
    """Two clusters and one label each: the rows without a label tell where the border is.

    The clusters are 6 standard deviations apart, so that 0.1 % of rows are on the wrong side.
    """
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(1000) % 2
    x = torch.randn(1000, 2, generator=generator) + 6.0 * (y.unsqueeze(1) - 0.5) * torch.tensor([1.0, 0.0])
    labels = torch.full_like(y, -1)
    labels[:2] = y[:2]
    program = SemiSupervisedVAE((2,), 2, latent_dim=1, hidden_dims=(32,), likelihood="normal")
    posterior = svi(program, (x, labels), epochs=60, batch_size=100, seed=0, progress=False, compile=False)
    found = posterior.encode(x).mean["y"].argmax(1)  # type: ignore[index]
    assert float((found == y).double().mean()) > 0.97
