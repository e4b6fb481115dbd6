"""An affine conditional VAE against its closed form: x given c is normal.

Seeds are fixed. Means of draws allow 4.5 standard errors, which a correct program exceeds once in 150 000 comparisons.
"""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.fitting.importance_weighted import IWAE
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import ConditionalVAE
from deepprob.posteriors.posterior import Posterior

ROWS = 1000


def data(gaps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Conditions, rows whose columns share a code given the condition, and the log-density of the complete rows."""
    g = torch.Generator().manual_seed(0)
    c, z = torch.randn(ROWS, 2, generator=g), torch.randn(ROWS, 1, generator=g)
    loadings, slopes = torch.tensor([[1.0, -1.0, 2.0]]), torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 0.5]])
    x = 3.0 + c @ slopes + z @ loadings + 0.5 * torch.randn(ROWS, 3, generator=g)
    covariance = loadings.T @ loadings + 0.25 * torch.eye(3)
    truth = dist.MultivariateNormal(3.0 + c @ slopes, covariance).log_prob(x)
    return c, torch.where(torch.rand(ROWS, 3, generator=g) < gaps, torch.nan, x), truth


@pytest.fixture(scope="module", params=[0.0, 0.3], ids=["complete", "gaps"])
def posterior(request: pytest.FixtureRequest) -> Posterior:
    c, x, _ = data(request.param)
    program = ConditionalVAE((3,), (2,), 1, (), "normal", missing="allow" if request.param else "refuse")
    # With missing values the affine encoder is not the exact posterior, so its ELBO has another optimum.
    objective = IWAE(particles=10) if request.param else "elbo"
    rate = Optimizer(learning_rate=2e-2)
    return svi(program, (c, x), epochs=1200, batch_size=None, objective=objective, optimizer=rate, progress=False)


def exact(posterior: Posterior, c: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of rows given their conditions, under the fitted parameters."""
    program = posterior.program
    with torch.no_grad():
        prior, origin = program.code_prior(c), torch.zeros(len(c), 1)
        at_zero, at_one = program.decode(origin, c).mean, program.decode(origin + 1, c).mean
        loadings, noise = (at_one - at_zero)[0], program.decode(origin, c).variance[0]
    mean = at_zero + prior.mean * loadings
    return mean, prior.variance.unsqueeze(-1) * torch.outer(loadings, loadings) + torch.diag(noise)


def exact_evidence(mean: Tensor, covariance: Tensor, x: Tensor) -> Tensor:
    """Log-density of the known values of every row; a missing one has a term of its own that is taken away."""
    known = ~x.isnan()
    both = known.unsqueeze(1) & known.unsqueeze(2)
    covariance = torch.where(both, covariance, torch.eye(x.shape[1]))
    values = torch.where(known, x, mean)
    absent = (~known).sum(1) * dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0))
    return dist.MultivariateNormal(mean, covariance).log_prob(values) - absent


def test_the_evidence_is_that_of_the_closed_form(posterior: Posterior) -> None:
    c, x, _ = data(0.3 if posterior.program.gaps else 0.0)
    found = posterior.log_weights(c, x, particles=2000)
    truth = exact_evidence(*exact(posterior, c), x)
    ratios = (found - truth).exp()  # each row's mean is 1
    assert ((ratios.mean(0) - 1).abs() < 4.5 * ratios.std(0) / 2000**0.5 + 1e-4).float().mean() > 0.998
    assert abs(float((posterior.log_evidence(c, x, particles=2000) - truth).mean())) < 0.01


def test_the_fit_reaches_the_truth(posterior: Posterior) -> None:
    """The exact density of the fitted model of complete rows, in nats per row; the code is chosen by the fit."""
    c, x, truth = data(0.0)
    found = exact_evidence(*exact(posterior, c), x)
    assert -0.02 < float((found - truth).mean()) < 0.02  # 10 parameters of 1 000 rows: 0.005 nats


def test_predictions_follow_the_prior_network(posterior: Posterior) -> None:
    c, _, _ = data(0.0)
    c, draws = c[:50], 4000
    mean, covariance = exact(posterior, c)
    found = posterior.predict(c, draws=draws).draws
    sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((found.mean(0) - mean).abs() < 4.5 * sd / draws**0.5).all()
    assert ((found.std(0) / sd - 1).abs() < 4.5 / (2 * draws) ** 0.5).all()
