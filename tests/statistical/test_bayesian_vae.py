"""The Bayesian VAE: its sites, the KL of the weights in its bound, and what few rows leave open."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from deepprob.fitting.objectives import ELBO
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import VAE, BayesianVAE
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.run import Run, run_program


def factors(rows: int) -> Tensor:
    """Rows of six columns that two factors drive."""
    generator = torch.Generator().manual_seed(3)
    loadings = torch.randn(2, 6, generator=generator)
    codes, noise = torch.randn(rows, 2, generator=generator), torch.randn(rows, 6, generator=generator)
    return codes @ loadings + 0.5 * noise + 1.0


def fit(program: VAE, x: Tensor, epochs: int = 1500) -> Posterior:
    quick = Optimizer(learning_rate=1e-2)
    return svi(program, x, batch_size=None, epochs=epochs, optimizer=quick, seed=0, progress=False)


def linear(kind: type[VAE] = BayesianVAE) -> VAE:
    return kind((6,), latent_dim=2, hidden_dims=(), likelihood="normal", posterior="multivariate_normal")


def test_weights_are_global_and_codes_local(tmp_path: Path) -> None:
    x = factors(30)
    posterior = fit(linear(), x, epochs=20)
    weights = {"decoder.layers.0.weight.scale", "decoder.layers.0.weight", "decoder.layers.0.bias"}
    assert posterior.latent_sites == dict.fromkeys(weights, "global") | {"z": "local"}
    assert posterior.reconstruct(x).mean.shape == (30, 6)
    assert posterior.decode(posterior.encode(x).mean).mean.shape == (30, 6)
    assert posterior.log_likelihood(x, draws=4).shape == (4, 30)
    posterior.save(tmp_path)
    torch.testing.assert_close(Posterior.load(tmp_path).reconstruct(x).mean, posterior.reconstruct(x).mean)


@pytest.mark.parametrize("batch", [30, 10])
def test_the_bound_holds_the_kl_of_the_weights_once(batch: int) -> None:
    x = factors(30)[:batch]
    program = fit(linear(), factors(30), epochs=20).program
    run = Run(program, (x,), torch.arange(batch), 30)
    guide, model = run_program(run)
    kls = [kl_divergence(site["fn"], model.nodes[n]["fn"]) for n, site in guide.nodes.items() if "decoder" in n]
    assert len(kls) == 3
    _, terms = ELBO()(run)  # given their scale, the KL of the weights does not depend on it
    torch.testing.assert_close(30 * terms["kl_global"], torch.stack(kls).sum(), rtol=1e-4, atol=1e-4)


def test_few_rows_leave_the_decoder_open_and_many_do_not() -> None:
    spread = {}
    for rows in (12, 1000):
        x = factors(1000)[:rows]
        bayes, plain = fit(linear(), x), fit(linear(VAE), x)
        draws = bayes.decode(torch.zeros(1, 2), draws=400).distribution.mean  # (K, 1, 6), or more dimensions
        spread[rows] = draws.std(0).mean()
        assert plain.decode(torch.zeros(1, 2), draws=400).distribution.mean.std(0).max() < 1e-6
    assert spread[1000] < 0.1 and spread[12] > 5 * spread[1000]  # sds fall with the root of the rows, 9 times


def test_a_decoder_of_ones_own_starts_at_its_weights() -> None:
    decoder = nn.Linear(2, 6)
    program = BayesianVAE((6,), 2, (), "normal", decoder=decoder)
    assert decoder.weight.requires_grad and program.config is None
    torch.testing.assert_close(program.decoder.start("decoder.weight"), decoder.weight.detach())
    still = svi(program, factors(20), steps=1, optimizer=Optimizer(learning_rate=1e-12), progress=False)
    means = still.program.decoder.start("decoder.weight")
    torch.testing.assert_close(means, decoder.weight.detach())


def test_wrong_outputs_of_the_decoder_raise() -> None:
    with pytest.raises(ValueError, match=r"decoder returns 5 outputs per row, but .* needs 6"):
        BayesianVAE((6,), 2, (), "normal", decoder=nn.Linear(2, 5))
    with pytest.raises(ValueError, match=r"decoder returns 5 outputs per row, but .* needs 6"):
        fit(BayesianVAE((6,), 2, (), "normal", decoder=nn.Sequential(nn.Linear(2, 5))), factors(20), epochs=1)
