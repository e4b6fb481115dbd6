"""The mixture VAE: its bound against a quadrature over codes and a sum over clusters, and the clusters that it finds.

Seeds are fixed. Means of draws allow 4.5 standard errors, which a correct program exceeds once in 150 000 comparisons.
"""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import deepprob as dp
from deepprob.inference import svi
from deepprob.models import VAE, MixtureVAE


def two_clusters(rows: int, distance: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = (torch.rand(rows, generator=g) < 0.4).long()
    return distance * (2.0 * labels[:, None] - 1) + torch.randn(rows, 3, generator=g), labels


@pytest.fixture(scope="module")
def untrained() -> dp.Posterior:
    """An affine program with one latent dimension whose clusters overlap."""
    x, _ = two_clusters(6, 1.0)
    program = MixtureVAE((3,), 3, latent_dim=1, hidden_dims=(), likelihood="normal")
    posterior = svi(program, x, steps=1, optimizer=dp.Optimizer(learning_rate=1e-8), seed=3, progress=False)
    with torch.no_grad():  # one wide guide for all rows, so that importance weights are good
        last = [m for m in posterior.program.encoder.modules() if isinstance(m, torch.nn.Linear)][-1]
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.3, 2.0]))
    posterior.program.clusters.place([0.2, 0.5, 0.3], [[-1.0], [0.3], [2.0]], [[0.5], [1.0], [0.4]])
    return posterior


def quadrature(posterior: dp.Posterior, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Evidence and bound of every row, and probabilities of clusters averaged over the guide, on a grid of codes."""
    program = posterior.program
    grid = torch.linspace(-60, 60, 24001)[:, None]
    step = float(grid[1] - grid[0])
    with torch.no_grad():
        weights, parts = (
            program.clusters.logits.log_softmax(-1),
            dist.Normal(program.clusters.loc, program.clusters.scale),
        )
        by_cluster = weights + parts.to_event(1).log_prob(grid[:, None])  # (G, K)
        prior = by_cluster.logsumexp(1)
        likelihood = program.decode(grid[:, None]).log_prob(x)  # (G, B)
        evidence = (likelihood + prior[:, None]).logsumexp(0) + math.log(step)
        log_q = program.encode(x).log_prob(grid[:, None])  # (G, B)
        q = log_q.exp() * step
        bound = (q * (likelihood + prior[:, None] - log_q)).sum(0)
        shares = torch.einsum("gb,gk->bk", q, by_cluster.softmax(1))
    return evidence, bound, shares


def test_bound_evidence_and_clusters_are_exact(untrained: dp.Posterior) -> None:
    x, _ = two_clusters(6, 1.0)
    evidence, bound, shares = quadrature(untrained, x)
    draws = torch.stack([untrained.elbo(x, particles=1000, seed=i) for i in range(20)])
    assert ((draws.mean(0) - bound).abs() <= 4.5 * draws.std(0) / math.sqrt(20) + 1e-4).all()
    assert (bound <= evidence + 1e-4).all()
    log_evidence = torch.stack([untrained.log_evidence(x, particles=5000, seed=i) for i in range(10)])
    assert ((log_evidence.mean(0) - evidence).abs() < 0.05).all()
    found = untrained.encode(x, draws=4000)
    assert isinstance(found.mean, dict) and found.classes == ("k",)
    # A share of 4000 draws has a standard error of at most 0.008.
    assert ((found.mean["k"] - shares).abs() < 4.5 * 0.008).all()
    with torch.no_grad():
        responsibilities = untrained.program.responsibilities(torch.tensor([[-1.0], [2.0]]))
    expected = [0.2 * dist.Normal(-1.0, 0.5).log_prob(torch.tensor(-1.0)).exp() / evidence_of(-1.0)]
    assert float(responsibilities[0, 0]) == pytest.approx(float(expected[0]), rel=1e-4)


def evidence_of(z: float) -> float:
    """The density of a code under the clusters of `untrained`."""
    parts = zip([0.2, 0.5, 0.3], [-1.0, 0.3, 2.0], [0.5, 1.0, 0.4], strict=True)
    return sum(w * float(dist.Normal(m, s).log_prob(torch.tensor(z)).exp()) for w, m, s in parts)


def test_clusters_that_are_far_apart_are_found_without_labels() -> None:
    x, labels = two_clusters(400, 4.0)
    program = MixtureVAE((3,), 2, latent_dim=2, hidden_dims=(16,), likelihood="normal")
    posterior = svi(program, x, steps=1500, optimizer=dp.Optimizer(learning_rate=5e-3), seed=0, progress=False)
    mean = posterior.encode(x).mean
    assert isinstance(mean, dict)
    agreement = float((mean["k"].argmax(1) == labels).float().mean())
    assert max(agreement, 1 - agreement) > 0.97


def test_a_start_at_a_vae_places_clusters_at_its_codes() -> None:
    x, labels = two_clusters(300, 3.0)
    first = svi(VAE((3,), 2, (16,), likelihood="normal"), x, steps=500, progress=False)
    program = MixtureVAE.from_vae(first, x, num_clusters=2)
    again = svi(program, x, steps=1, weights="keep", optimizer=dp.Optimizer(learning_rate=1e-8), progress=False)
    torch.testing.assert_close(again.program.encode(x).mean, first.program.encode(x).mean, rtol=1e-4, atol=1e-4)
    mean = again.encode(x).mean
    assert isinstance(mean, dict)
    agreement = float((mean["k"].argmax(1) == labels).float().mean())
    assert max(agreement, 1 - agreement) > 0.95
    # The mixture fits the codes better than the standard normal does.
    assert float(again.elbo(x, particles=20).mean()) > float(first.elbo(x, particles=20).mean())


def test_from_vae_refuses_other_programs_in_words() -> None:
    x, _ = two_clusters(20, 3.0)
    other = svi(MixtureVAE((3,), 2, 2, (4,), likelihood="normal"), x, steps=1, progress=False)
    with pytest.raises(TypeError, match=r"from_vae needs the posterior of a VAE .*; got one of MixtureVAE\. Fit VAE"):
        MixtureVAE.from_vae(other, x)
    first = svi(VAE((3,), 2, (4,), likelihood="normal"), x, steps=1, progress=False)
    with pytest.raises(ValueError, match="21 clusters need at least as many rows; got 20"):
        MixtureVAE.from_vae(first, x, num_clusters=21)
    assert np.isfinite(float(first.elbo(x).mean()))
