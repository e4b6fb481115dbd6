"""The priors and posteriors of a VAE's code: fits, saves, queries, and the weights that a fit keeps."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import deepprob as dp
from deepprob.inference import svi
from deepprob.models import VAE, BayesianVAE
from deepprob.networks import Conditional, FlowPrior, MixturePrior, VampPrior

X = torch.rand(24, 3, 2, generator=torch.Generator().manual_seed(0))


class Numbers(nn.Module):
    """A network without input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(size))

    def forward(self) -> Tensor:
        return self.value


PRIORS: dict[str, Any] = {
    "mixture": lambda: MixturePrior(2, 3),
    "vamp": lambda: VampPrior(5, learned_weights=True),
    "flow": lambda: FlowPrior(2, 2, (8,)),
    "own": lambda: Conditional(Numbers(Conditional.size("multivariate_normal", (2,))), "multivariate_normal", (2,)),
}


def fitted(steps: int = 5, **options: Any) -> dp.Posterior:
    return svi(VAE((3, 2), 2, (8,), **options), X, steps=steps, progress=False)


def furthest(loc: Tensor) -> float:
    return float((loc.detach() - 5.0).abs().max())


@pytest.mark.parametrize("posterior", ["normal", "flow"])
@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior_fits_and_answers(prior: str, posterior: str, tmp_path: Path) -> None:
    own = PRIORS[prior]()
    found = fitted(prior=own, posterior=posterior)
    pairs = zip(own.parameters(), found.program.prior.parameters(), strict=True)
    assert prior == "vamp" or not all(torch.equal(before, after) for before, after in pairs)
    assert found.log_evidence(X, particles=3).isfinite().all()
    assert found.encode(X).mean.shape == (24, 2)
    assert found.predict(X, draws=4).mean.shape == found.reconstruct(X, draws=4).mean.shape == (24, 3, 2)
    assert found.decode(found.encode(X).mean).mean.shape == (24, 3, 2)
    found.save(tmp_path / "fit")
    given = VAE((3, 2), 2, (8,), prior=PRIORS[prior](), posterior=posterior) if prior == "own" else None
    again = dp.Posterior.load(tmp_path / "fit", program=given)
    torch.testing.assert_close(again.log_likelihood(X, draws=3), found.log_likelihood(X, draws=3))


@pytest.mark.parametrize("posterior, prior", [("normal", VampPrior(4)), ("flow", FlowPrior(2, 2, (8,)))])
def test_a_compiled_step_equals_an_eager_one(posterior: str, prior: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a difference is a warning
        program = VAE((3, 2), 2, (8,), prior=prior, posterior=posterior)
        eager, compiled = (svi(program, X, steps=3, compile=c, progress=False) for c in (False, True))
    for name, value in eager.instance.tensors().items():
        torch.testing.assert_close(compiled.instance.tensors()[name], value, rtol=1e-4, atol=1e-5)


def test_a_prior_of_the_user_keeps_its_weights_and_one_by_name_starts_anew() -> None:
    own = MixturePrior(2, 3)
    own.loc.data.fill_(5.0)
    kept = fitted(steps=1, prior=own).program
    assert furthest(kept.prior.loc) < 0.1 and kept.prior not in kept.built
    named = VAE((3, 2), 2, (8,), prior="mixture")
    named.prior.loc.data.fill_(5.0)
    assert furthest(svi(named, X, steps=1, progress=False).program.prior.loc) > 0.1


def test_pseudo_inputs_of_tables_and_counts_live_where_the_encoder_reads() -> None:
    kinds = [("real", "a"), ("categories", "b", 2)]
    rows = torch.tensor([[0.1, 1.0, 0.0], [torch.nan, 0.0, 1.0], [2.0, 1.0, 0.0], [0.3, 0.0, 1.0]])
    table = svi(VAE((3,), 2, (4,), likelihood=kinds, prior=VampPrior(3)), rows, steps=2, progress=False).program
    assert table.prior.pseudo_inputs.shape == (3, 6) and bool(table.prior.pseudo_inputs.isfinite().all())
    counts = torch.poisson(torch.full((20, 4), 50.0), generator=torch.Generator().manual_seed(0))
    program = svi(VAE((4,), 2, (4,), likelihood="poisson", prior="vamp"), counts, steps=1, progress=False).program
    assert program.prior.pseudo_inputs.shape == (500, 4) and float(program.prior.pseudo_inputs.detach().abs().max()) < 2


def test_pseudo_inputs_that_are_whole_numbers_are_refused() -> None:
    encoder = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(1), nn.Linear(12, 4))
    program = VAE((3,), 2, (4,), likelihood="categorical", num_classes=5, encoder=encoder, prior="vamp")
    with pytest.raises(ValueError, match=r"prior='vamp' learns inputs of the encoder, which cannot be whole numbers"):
        svi(program, torch.randint(0, 5, (10, 3)), steps=1, progress=False)


def test_one_latent_dimension_has_no_flow() -> None:
    for options in ({"prior": "flow"}, {"posterior": "flow"}):
        with pytest.raises(ValueError, match="a flow needs at least 2 latent dimensions"):
            VAE((3, 2), 1, **options)
    for prior in ("mixture", "vamp"):
        found = svi(VAE((3, 2), 1, (4,), prior=prior), X, steps=2, progress=False)
        assert found.encode(X).mean.shape == (24, 1)


def test_a_bayesian_decoder_takes_them_too() -> None:
    program = BayesianVAE((3, 2), 2, (8,), code_prior="mixture", posterior="flow")
    assert program.config is not None and program.config["code_prior"]["prior"] == "mixture"
    twin = BayesianVAE(**program.config)
    assert twin.config == program.config
    assert svi(program, X, steps=2, progress=False).elbo(X).isfinite().all()


def test_a_flow_reaches_a_higher_bound_where_the_posterior_is_awkward() -> None:
    """x = |z|^2 + noise: the posterior is a ring, which no normal resembles."""

    class Ring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("unit", torch.ones(()))

        def forward(self, z: Tensor) -> Tensor:
            return z.square().sum(-1, keepdim=True) * self.unit

    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 2, generator=g).square().sum(1, keepdim=True) + 0.3 * torch.randn(500, 1, generator=g)
    found = {}
    for posterior in ("normal", "flow"):
        program = VAE((1,), 2, (32,), likelihood="normal", posterior=posterior, decoder=Ring())
        fit = svi(program, x - x.mean(), steps=1500, seed=0, optimizer=dp.Optimizer(learning_rate=3e-3), progress=False)
        found[posterior] = float(fit.elbo(x - x.mean(), particles=20).mean())
    assert found["flow"] > found["normal"] + 0.35, found


def test_a_mixture_follows_codes_that_are_two_clusters() -> None:
    """Two clusters of rows: a learned prior saves nats. Measured 0.8 and 0.9."""
    g = torch.Generator().manual_seed(0)
    x = torch.where(torch.rand(400, 1, generator=g) < 0.5, -3.0, 3.0) + 0.3 * torch.randn(400, 2, generator=g)
    bounds = {}
    for prior in ("standard", MixturePrior(2), VampPrior(20)):
        program = VAE((2,), 2, (16,), likelihood="normal", prior=prior)
        fit = svi(program, x, steps=600, seed=0, optimizer=dp.Optimizer(learning_rate=1e-2), progress=False)
        bounds[type(prior).__name__] = float(fit.log_evidence(x, particles=50).mean())
    assert min(bounds["MixturePrior"], bounds["VampPrior"]) > bounds["str"] + 0.4, bounds


def test_a_flow_prior_learns_a_curve() -> None:
    """z_2 = z_1^2 + noise: the log-likelihood of the flow comes within 0.1 nats of the truth."""
    g = torch.Generator().manual_seed(0)
    first, noise = torch.randn(2000, generator=g), torch.randn(2000, generator=g)
    z = torch.stack([first, first.square() + 0.3 * noise], 1)
    truth = dist.Normal(0.0, 1.0).log_prob(first) + dist.Normal(first.square(), 0.3).log_prob(z[:, 1])
    torch.manual_seed(0)
    prior = FlowPrior(2)
    optimizer = torch.optim.Adam(prior.parameters(), 5e-3)
    for _ in range(400):
        optimizer.zero_grad()
        loss = -prior().log_prob(z).mean()
        loss.backward()
        optimizer.step()
    assert abs(float(truth.mean()) + float(loss.detach())) < 0.1
