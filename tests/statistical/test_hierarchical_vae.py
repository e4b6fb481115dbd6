"""An affine hierarchical VAE against its closed form: codes of all layers and rows are jointly normal.

Seeds are fixed. Means of weights allow 4.5 standard errors, which a correct program exceeds once in 150 000
comparisons.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.fitting.importance_weighted import IWAE
from deepprob.fitting.kl_schedules import KLWarmUp
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import HierarchicalVAE
from deepprob.posteriors.posterior import Posterior

INFERENCE = ("bottom_up", "top_down")
FAST = Optimizer(learning_rate=2e-2)


def data() -> Tensor:
    """Rows of four columns that share two codes, which depend on a third."""
    g = torch.Generator().manual_seed(0)
    top = torch.randn(500, 1, generator=g)
    codes = top @ torch.tensor([[1.5, -1.0]]) + torch.tensor([0.5, 1.0]) * torch.randn(500, 2, generator=g)
    loadings = torch.tensor([[1.0, 0.0, 1.0, -0.5], [0.0, 1.0, -1.0, 0.5]])
    return 2.0 + codes @ loadings + 0.5 * torch.randn(500, 4, generator=g)


def linear(inference: str) -> HierarchicalVAE:
    """A two-layer program with a known generative part: the lower code's scale does not depend on the upper code."""
    torch.manual_seed(0)
    program = HierarchicalVAE((4,), (2, 1), (), "normal", inference=inference)
    (down,) = program.downward
    with torch.no_grad():
        down.network.layers[-1].weight.copy_(torch.tensor([[1.5], [-1.0], [0.0], [0.0]]))
        program.decoder.layers[-1].weight.copy_(
            torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0], [-0.5, 0.5]])
        )  # fmt: skip
    for part in (down, program.decoder):
        part.requires_grad_(False)
    return program


@torch.no_grad()
def exact_evidence(program: Any, x: Tensor) -> Tensor:
    """Log-density of rows under a program whose scales are constant."""
    down = program.downward[0](torch.zeros(1)).base_dist
    slope = program.downward[0](torch.ones(1)).base_dist.loc - down.loc
    loadings = program.decode(torch.eye(2)).mean - program.decode(torch.zeros(2)).mean  # (2, 4)
    covariance = torch.outer(slope, slope) + down.scale.square().diag()
    noise = program.decode(torch.zeros(2)).variance.diag()
    return dist.MultivariateNormal(program.decode(down.loc).mean, loadings.T @ covariance @ loadings + noise).log_prob(
        x
    )


@pytest.fixture(scope="module", params=INFERENCE)
def posterior(request: pytest.FixtureRequest) -> Posterior:
    """The guide and the noise are fitted; the generative networks stay."""
    return svi(
        linear(request.param), data(), steps=1500, batch_size=None, weights="keep", optimizer=FAST, progress=False
    )


def test_the_evidence_is_that_of_the_closed_form(posterior: Posterior) -> None:
    x = data()
    exact = exact_evidence(posterior.program, x)
    ratios = (posterior.log_weights(x, particles=2000) - exact).exp()  # each row's mean is 1
    assert ((ratios.mean(0) - 1).abs() < 4.5 * ratios.std(0) / 2000**0.5 + 1e-4).float().mean() > 0.995
    assert abs(float((posterior.log_evidence(x, particles=2000) - exact).mean())) < 0.01


def test_the_elbo_is_below_the_evidence_by_the_gap_of_the_guide(posterior: Posterior) -> None:
    """Independent normals of the two codes do not reach the exact posterior, whose codes are correlated."""
    x = data()
    gap = float((exact_evidence(posterior.program, x) - posterior.elbo(x, particles=200)).mean())
    assert 0.0 < gap < 0.3


@pytest.mark.parametrize("inference", INFERENCE)
def test_an_importance_weighted_fit_finds_the_covariance(inference: str) -> None:
    """The fitted evidence reaches that of a normal distribution with the rows' own mean and covariance.

    Without a warm-up, a ladder may leave one of the codes unused for thousands of steps.
    """
    x = data()
    program = HierarchicalVAE((4,), (2, 1), (), "normal", inference=inference)
    options: dict[str, Any] = {"batch_size": None, "optimizer": FAST, "callbacks": [KLWarmUp(500)]}
    posterior = svi(program, x, steps=1200, objective=IWAE(5), progress=False, **options)
    best = dist.MultivariateNormal(x.mean(0), torch.cov(x.T, correction=0)).log_prob(x).mean()
    found = posterior.log_evidence(x, particles=500).mean()
    assert -0.05 < float(found - best) < 0.02  # two codes and one noise have fewer numbers than a covariance
