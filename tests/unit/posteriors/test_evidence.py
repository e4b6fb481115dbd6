"""`Posterior.evidence`: its error, its parts of particles, its data, and its line."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.inference import svi
from deepprob.models import VAE
from deepprob.posteriors.evidence import Evidence
from deepprob.posteriors.from_draws import draws_posterior
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    return svi(VAE((3,), 2, hidden_dims=(4,), likelihood="normal"), X, steps=20, seed=0, progress=False)


def shared(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def test_the_error_is_that_of_repeated_estimates() -> None:
    noise = torch.randn(400, 300, generator=torch.Generator().manual_seed(1))  # particles, repeated estimates
    sd = 0.7
    found = Evidence.of_weights((sd * noise - sd**2 / 2).split(150))  # log-normal weights of mean 1
    exact = ((math.exp(sd**2) - 1) / 400) ** 0.5
    # 300 estimates know their spread to 4 %.
    assert float(found.value.std()) == pytest.approx(exact, rel=0.15)
    assert float(found.se.mean()) == pytest.approx(exact, rel=0.05)
    assert float(found.ess.mean()) == pytest.approx(400 / math.exp(sd**2), rel=0.05)
    assert found.mean_mc_se == pytest.approx(exact / 300**0.5, rel=0.05)
    assert found.mean_se == pytest.approx(float(found.value.std()) / 300**0.5)
    assert abs(found.mean) < 4 * found.mean_mc_se + exact**2 / 2


def test_it_is_the_mean_weight(posterior: Posterior) -> None:
    weights, found = posterior.log_weights(X, particles=30, seed=4), posterior.evidence(X, particles=30, seed=4)
    assert torch.allclose(found.value.float(), weights.logsumexp(0) - math.log(30), atol=1e-5)
    assert torch.equal(found.value.float(), posterior.log_evidence(X, particles=30, seed=4))
    normalised = weights.double().softmax(0)
    assert torch.allclose(found.ess, normalised.square().sum(0).reciprocal(), rtol=1e-5)
    assert torch.allclose(found.se, (30 / 29 * (normalised - 1 / 30).square().sum(0)).sqrt(), rtol=1e-5)


def test_particles_in_parts_are_the_same_estimate(posterior: Posterior, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = posterior.evidence(X, particles=4000)
    monkeypatch.setattr("deepprob.posteriors.evidence._CACHED", 3 * 700)  # a row at a time, its particles in 6 parts
    parts = posterior.evidence(X, particles=4000)
    assert parts.particles == 4000
    assert parts.value.shape == (12,)
    assert bool(((parts.value - whole.value).abs() < 5 * (parts.se.square() + whole.se.square()).sqrt()).all())
    assert not torch.equal(parts.value, whole.value)
    assert posterior.log_weights(X, particles=4000).shape == (4000, 12)


def test_binary_pixels_are_drawn_once_for_all_particles(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = torch.full((1, 30), 0.5)
    posterior = svi(VAE((30,), 1, hidden_dims=(2,)), torch.rand(20, 30), steps=1, progress=False)
    monkeypatch.setattr("deepprob.posteriors.evidence._CACHED", 30)  # one particle at a time
    weights = posterior.log_weights(grey, particles=8)
    bits = [posterior.log_weights(b, particles=8) for b in (grey > 2, grey > 0)]
    spread = max(float(b.std()) for b in bits)
    assert float(weights.std()) < 2 * spread + 0.5, "the particles saw different images"


def test_one_number_for_latents_that_rows_share() -> None:
    posterior = svi(Program.of(shared, "normal"), X[:, 0], steps=300, progress=False)
    found = posterior.evidence(X[:, 0], particles=400)
    assert found.value.shape == ()
    assert found.mean_se == float(found.se) == found.mean_mc_se
    assert "nats for all rows together (400 particles; effective sample size" in repr(found)


def test_the_line_says_rows_particles_and_errors(posterior: Posterior) -> None:
    found = posterior.evidence(X, particles=100)
    assert repr(found).startswith(f"Evidence: {found.mean:.2f} ± {found.mean_se:.2f} nats per row on average (12 rows,")
    assert f"100 particles each, ± {found.mean_mc_se:.3f} from the particles; effective sample sizes" in repr(found)


def test_one_particle_has_no_error(posterior: Posterior) -> None:
    found = posterior.evidence(X, particles=1)
    assert bool(found.se.isnan().all())
    assert found.ess.tolist() == pytest.approx([1.0] * 12)
    assert "nan" not in repr(found)


def test_weights_of_zero_give_no_evidence() -> None:
    found = Evidence.of_weights([torch.tensor([-math.inf, -math.inf])])
    assert float(found.value) == -math.inf
    assert math.isnan(float(found.se))


def test_draws_have_no_weights() -> None:
    posterior = draws_posterior(Program.of(shared, "normal"), X[:, 0], {"mean": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match="importance weights need a guide's density"):
        posterior.evidence(X[:, 0])
