"""A VAE of a table of mixed columns: the exact bound by quadrature, and the dependence of columns that it learns.

Seeds are fixed. Means of draws allow 4.5 standard errors, which a correct program exceeds once in 150 000 comparisons.
"""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import VAE
from deepprob.posteriors.posterior import Posterior

KINDS = [("real", "age"), ("binary", "smoker"), ("categories", "island", ["A", "B", "C"]), ("count", "visits")]
SHARES = torch.tensor([0.2, 0.3, 0.5])
AGES, SMOKERS, VISITS = torch.tensor([20.0, 40.0, 60.0]), torch.tensor([0.9, 0.5, 0.1]), torch.tensor([1.0, 3.0, 9.0])


def table(rows: int, seed: int, gaps: float = 0.0) -> Tensor:
    """Rows whose columns are independent given the island; some of the ages and islands are missing."""
    g = torch.Generator().manual_seed(seed)
    island = torch.multinomial(SHARES, rows, True, generator=g)
    age = AGES[island] + 5 * torch.randn(rows, generator=g)
    smoker = (torch.rand(rows, generator=g) < SMOKERS[island]).to(age.dtype)
    visits = torch.poisson(VISITS[island], generator=g)
    one_hot = torch.nn.functional.one_hot(island, 3).to(age.dtype)
    gone = torch.rand(rows, 2, generator=g) < gaps
    age, one_hot = torch.where(gone[:, 0], math.nan, age), torch.where(gone[:, 1:], math.nan, one_hot)
    return torch.cat([torch.stack([age, smoker], 1), one_hot, visits[:, None]], 1)


@pytest.fixture(scope="module", params=[0.0, 0.2], ids=["complete", "gaps"])
def posterior(request: pytest.FixtureRequest) -> Posterior:
    x = table(1000, seed=0, gaps=request.param)
    program = VAE((6,), latent_dim=2, hidden_dims=(32,), likelihood=KINDS)
    return svi(program, x, epochs=250, batch_size=100, optimizer=Optimizer(learning_rate=1e-2), seed=0, progress=False)


@pytest.mark.parametrize("gaps", [False, True])
def test_the_bound_is_exact(gaps: bool) -> None:
    """An affine VAE of a real and a binary column: bound and evidence by Gauss-Hermite quadrature."""
    torch.manual_seed(0)
    x = torch.tensor([[0.3, 1.0], [-1.2, 0.0], [2.0, 1.0]])
    if gaps:
        x[0, 0], x[1, 1], x[2] = math.nan, math.nan, math.nan
    program = VAE((2,), latent_dim=1, hidden_dims=(), likelihood=[("real", "a"), ("binary", "b")])
    posterior = svi(program, x, steps=1, optimizer=Optimizer(learning_rate=1e-8), seed=3, progress=False)
    model = posterior.program
    points, weights = np.polynomial.hermite_e.hermegauss(80)
    z = torch.as_tensor(points, dtype=x.dtype)  # of a standard normal
    mass = torch.as_tensor(weights / weights.sum(), dtype=x.dtype)

    def log_likelihood(codes: Tensor) -> Tensor:
        """By the densities of the two columns, (points, rows)."""
        fn, known = model.decode(codes.unsqueeze(-1)), ~x.isnan()
        real, binary = (part for part, _ in zip(fn.parts, fn.places, strict=True))
        terms = [real.log_prob(x[:, :1].nan_to_num())[..., 0], binary.log_prob(x[:, 1:].nan_to_num())[..., 0]]
        return torch.where(known[:, 0], terms[0], 0.0) + torch.where(known[:, 1], terms[1], 0.0)

    with torch.no_grad():
        code = model.encode(x)
        loc, scale = code.base_dist.loc[:, 0], code.base_dist.scale[:, 0]
        inner = log_likelihood(loc + scale * z[:, None])
        kl = torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(0.0, 1.0))
        bound = (mass[:, None] * inner).sum(0) - kl
        evidence = (mass.log()[:, None] + log_likelihood(z[:, None].expand(-1, 3))).logsumexp(0)
    draws = torch.stack([posterior.elbo(x, particles=2000, seed=i) for i in range(20)])
    assert ((draws.mean(0) - bound).abs() <= 4.5 * draws.std(0) / math.sqrt(20) + 1e-5).all()
    assert (bound <= evidence + 1e-5).all()
    if gaps:
        assert abs(float(evidence[2])) < 1e-5  # a row of missing values has probability one


def test_prior_samples_have_the_dependence_of_the_columns(posterior: Posterior) -> None:
    drawn = posterior.predict_prior(20_000, draws=1, seed=1).draws[0]
    for k in range(3):
        rows = drawn[drawn[:, 2 + k] == 1]
        assert abs(len(rows) / len(drawn) - float(SHARES[k])) < 0.04
        assert abs(float(rows[:, 0].mean() - AGES[k])) < 3.0
        assert abs(float(rows[:, 1].mean() - SMOKERS[k])) < 0.08
        assert abs(float(rows[:, 5].mean() - VISITS[k])) < 0.8
    assert drawn[:, 2:5].sum(1).eq(1).all() and not drawn.isnan().any()


def test_missing_categories_are_drawn_given_the_other_columns(posterior: Posterior) -> None:
    """The posterior of the island given the other columns has a closed form."""
    x = table(200, seed=5)
    known, x[:, 2:5] = x.clone(), math.nan
    log_prob = (
        SHARES.log()
        + dist.Normal(AGES, 5.0).log_prob(known[:, :1])
        + dist.Bernoulli(SMOKERS).log_prob(known[:, 1:2])
        + dist.Poisson(VISITS).log_prob(known[:, 5:])
    )
    exact = log_prob.softmax(1)
    filled = posterior.impute(x, draws=200, sweeps=20, seed=0)
    assert torch.equal(filled.draws[..., [0, 1, 5]], known[:, [0, 1, 5]].expand(200, -1, -1))
    assert filled.draws[..., 2:5].sum(-1).eq(1).all()
    assert float((filled.mean[:, 2:5] - exact).abs().mean()) < 0.05
    # The posterior is closer than the shares of the islands alone.
    assert float((SHARES - exact).abs().mean()) > 0.2
