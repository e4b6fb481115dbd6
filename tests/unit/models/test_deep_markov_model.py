from __future__ import annotations

from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.distributions import GaussianPath
from deepprob.fitting.callbacks import KLWarmUp
from deepprob.fitting.objectives import ELBO
from deepprob.inference import svi
from deepprob.models import MODELS, DeepMarkovModel
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.run import Run

SIZES = {"latent_dim": 4, "hidden_dim": 8, "recurrent_dim": 8, "dropout": 0.0}


def sequences(rows: int = 6, steps: int = 8, features: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, steps + 1, (rows,), generator=generator)
    x = (torch.rand(rows, steps, features, generator=generator) < 0.3).to(torch.get_default_dtype())
    return x * (torch.arange(steps) < lengths[:, None])[..., None], lengths


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    return svi(DeepMarkovModel(5, **SIZES), sequences(), epochs=4, batch_size=3, callbacks=[KLWarmUp(1)], seed=1)


def walk(z: Tensor) -> tuple[Tensor, Tensor]:
    return 0.5 * z + 1.0, torch.ones_like(z)


# -- the path ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (1,), (3, 2)])
def test_path_shapes(batch: tuple[int, ...]) -> None:
    path = GaussianPath(walk, torch.zeros(2), torch.full(batch, 3), 4)
    assert path.batch_shape == batch and path.event_shape == (4, 2) and path.event_dim == 2
    z = path.rsample((7,))
    assert z.shape == (7, *batch, 4, 2) and path.log_prob(z).shape == (7, *batch)
    assert (z[..., 3:, :] == 0).all() and (z[..., :3, :] != 0).all()
    wide = path.expand((5, *batch))
    assert wide.sample().shape == (5, *batch, 4, 2) and wide.batch_shape == (5, *batch)


def test_path_gradients_reach_kernel_and_start() -> None:
    start = torch.zeros(2, requires_grad=True)
    slope = torch.tensor(0.5, requires_grad=True)
    path = GaussianPath(lambda z: (slope * z, torch.ones_like(z)), start, torch.tensor([3]), 3)
    path.rsample().sum().backward()
    assert start.grad is not None and slope.grad is not None and (start.grad != 0).all() and slope.grad != 0


def test_path_caches_the_conditionals_of_its_draw() -> None:
    path = GaussianPath(walk, torch.zeros(2), torch.tensor([3, 5]), 5)
    z = path.rsample()
    assert torch.allclose(path.log_prob(z), path.log_prob(z.clone()))


def test_kl_of_a_path_to_itself_is_zero() -> None:
    path = GaussianPath(walk, torch.zeros(2), torch.tensor([3, 5]), 5)
    assert torch.allclose(torch.distributions.kl_divergence(path, path), torch.zeros(2))


# -- the model --------------------------------------------------------------------------------------------------------


def test_registered_and_rebuilt_from_its_config() -> None:
    program = DeepMarkovModel(5, **SIZES)
    assert MODELS[DeepMarkovModel.registry_name] is DeepMarkovModel
    assert DeepMarkovModel(**program.config).config == program.config
    assert program.config == {"observed_dim": 5, **SIZES, "cell": "lstm", "likelihood": "bernoulli"}


def test_cell_is_configurable() -> None:
    program = DeepMarkovModel(5, **SIZES, cell="rnn")
    assert program.config["cell"] == "rnn"
    smaller = sum(p.numel() for p in program.recurrent.parameters())
    assert 4 * smaller == sum(p.numel() for p in DeepMarkovModel(5, **SIZES).recurrent.parameters())
    with pytest.raises(ValueError, match=r"unknown kind of recurrent network 'lstn'\. Did you mean 'lstm'\?"):
        DeepMarkovModel(5, cell="lstn")


@pytest.mark.parametrize("particles", [1, 3])
def test_gradient_reaches_every_parameter(particles: int) -> None:
    program = DeepMarkovModel(5, **SIZES)
    loss, terms = ELBO(particles=particles)(Run(program, sequences(), torch.arange(6), 6))
    loss.backward()
    silent = [n for n, p in program.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert not silent and torch.isfinite(terms["elbo"])


@pytest.mark.parametrize("analytic", [True, False])
def test_padding_does_not_change_loss_or_gradients(analytic: bool) -> None:
    x, lengths = sequences(rows=8, steps=8)
    program = DeepMarkovModel(5, **SIZES)
    junk = torch.ones(8, 6, 5)
    long = program.validate(torch.cat([x, junk.to(x.dtype)], 1), lengths)
    values = []
    for batch in ((x, lengths), long):
        torch.manual_seed(0)
        loss, _ = ELBO(analytic_kl=analytic)(Run(program, batch, torch.arange(8), 8))
        program.zero_grad()
        loss.backward()
        values.append(torch.cat([loss.reshape(1), *(p.grad.flatten() for p in program.parameters())]))
    assert torch.allclose(*values, atol=1e-6, rtol=1e-6)


def test_validate_removes_nan_from_padding() -> None:
    x, lengths = torch.zeros(2, 4, 5), torch.tensor([2, 3])
    x[0, 2:] = torch.nan
    program = DeepMarkovModel(5, **SIZES)
    assert torch.isfinite(program.validate(x, lengths)[0]).all()


def test_every_query_has_the_right_shape(posterior: Posterior) -> None:
    x, lengths = sequences()
    assert posterior.latent_sites == {"z": "local"}
    assert posterior.sample(x, lengths, draws=3)["z"].shape == (3, 6, 8, 4)
    assert posterior.log_weights(x, lengths, particles=7).shape == (7, 6)
    assert posterior.log_likelihood(x, lengths, draws=7).shape == (7, 6)
    prediction = posterior.predict(x, lengths, draws=3)
    assert prediction.kind == "binary" and prediction.draws.shape == (3, 6, 8, 5)
    outside = torch.arange(8) >= lengths[:, None]
    assert (prediction.mean[outside] == 0).all() and (prediction.draws[:, outside] == 0).all()
    # A query may have other rows and fewer steps than the fit.
    assert posterior.elbo(x[:2, :6], lengths[:2].clamp(max=6)).shape == (2,)
    assert set(posterior.to_arviz(x, lengths, draws=4).posterior.data_vars) == {"z"}


def test_prior_draws_are_as_long_as_the_longest_sequence(posterior: Posterior) -> None:
    _, lengths = sequences()
    drawn = posterior.sample_prior(3, draws=2)
    assert drawn["z"].shape == (2, 3, int(lengths.max()), 4) and drawn["x"].shape == (2, 3, int(lengths.max()), 5)
    assert (drawn["z"] != 0).all() and ((drawn["x"] == 0) | (drawn["x"] == 1)).all()


def test_save_and_load(posterior: Posterior, tmp_path: Path) -> None:
    x, lengths = sequences()
    posterior.save(tmp_path / "p")
    again = Posterior.load(tmp_path / "p")
    assert torch.equal(again.log_weights(x, lengths, particles=5), posterior.log_weights(x, lengths, particles=5))


def test_emitter_starts_at_the_log_odds_of_the_data(posterior: Posterior) -> None:
    x, lengths = sequences()
    rate = x.sum((0, 1)) / lengths.sum()
    assert torch.allclose(posterior.program.base_logits, torch.logit(rate), atol=0.2)


def test_program_accepts_sequence_lists_and_padded_blocks() -> None:
    program = DeepMarkovModel(5, **SIZES)
    x, lengths = program.accept([np.ones((3, 5), dtype=bool), np.zeros((2, 5), dtype=bool)])
    assert lengths.tolist() == [3, 2] and x.shape == (2, 3, 5)
    _, full = program.accept(torch.ones(2, 4, 5))
    assert full.tolist() == [4, 4]
    assert program.accept((torch.ones(2, 4, 5), torch.tensor([4.0, 1.0])))[1].dtype == torch.int64
    assert program.units(x, lengths).tolist() == [3.0, 2.0]


@pytest.mark.parametrize(
    ("x", "lengths", "message"),
    [
        (torch.ones(4, 5), None, r"x must be sequences of shape \(rows, steps, 5\); got \(4, 5\). Write x\[None\]"),
        (torch.ones(2, 4, 6), None, r"got \(2, 4, 6\). Give 5 features per step."),
        (2 * torch.ones(2, 4, 5), None, r"x must be 0 or 1 for likelihood='bernoulli'; got 2 in row 0\."),
        (torch.ones(2, 4, 5), torch.tensor([4, 5]), r"lengths must be from 1 to the 4 steps of x; got 5 in row 1"),
        (torch.ones(2, 4, 5), torch.tensor([0, 4]), r"lengths must be from 1 to the 4 steps of x; got 0 in row 0"),
        (torch.ones(2, 4, 5), torch.tensor([1.5, 4]), r"lengths must be whole numbers; got 1.5 in row 0"),
        (torch.ones(2, 4, 5), torch.tensor([4, 4, 4]), r"lengths must hold one number per row of x, shape \(2,\)"),
        (torch.ones(2, 4, 5), torch.ones(2, 4), r"lengths must hold one number per row of x, .*got \(2, 4\)"),
    ],
)
def test_bad_data_raise(x: Tensor, lengths: Tensor | None, message: str) -> None:
    batch = (x,) if lengths is None else (x, lengths)
    with pytest.raises(ValueError, match=message):
        DeepMarkovModel(5, **SIZES).validate(*batch)


def test_unequal_rows_and_wrong_width_raise(posterior: Posterior) -> None:
    with pytest.raises(ValueError, match=r"lengths|rows"):
        svi(DeepMarkovModel(5, **SIZES), (torch.ones(2, 4, 5), torch.tensor([4])))
    with pytest.raises(ValueError, match="Give 5 features per step"):
        posterior.elbo(torch.ones(2, 8, 3), torch.tensor([8, 8]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
        ({"latent_dim": 0}, r"latent_dim must be a whole number of at least 1; got 0\."),
        ({"hidden_dim": 2.5}, r"hidden_dim must be a whole number of at least 1; got 2\.5\."),
    ],
)
def test_bad_options_raise(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepMarkovModel(5, **options)


def test_path_is_scored_like_independent_steps() -> None:
    z = torch.randn(3, 4, 2)
    before = torch.cat([torch.zeros(3, 1, 2), z[:, :-1]], 1)
    steps = dist.Normal(0.5 * before + 1.0, 1.0).to_event(1).log_prob(z)  # (3, 4)
    lengths = torch.tensor([4, 1, 2])
    expected = (steps * (torch.arange(4) < lengths[:, None])).sum(1)
    assert torch.allclose(GaussianPath(walk, torch.zeros(2), lengths, 4).log_prob(z), expected)
