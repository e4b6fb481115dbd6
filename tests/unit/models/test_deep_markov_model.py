from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.data import load_data
from deepprob.data import sequences as long_form
from deepprob.distributions import GaussianPath
from deepprob.fitting.kl_schedules import KLWarmUp
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
    rest = {"cell": "lstm", "likelihood": "bernoulli", "num_classes": None}
    assert program.config == {"observed_dim": 5, **SIZES, **rest}


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


# -- emissions and data -----------------------------------------------------------------------------------------------

SMALL = {"latent_dim": 2, "hidden_dim": 6, "recurrent_dim": 6}


def test_classes_are_fitted_predicted_and_saved(tmp_path: Path) -> None:
    x = [np.arange(n) % 3 for n in (4, 9, 6, 5)]
    program = DeepMarkovModel(1, **SMALL, likelihood="categorical", num_classes=3)
    posterior = svi(program, x, epochs=3, compile=False, progress=False)
    found = posterior.reconstruct(x, draws=5)
    assert found.kind == "classes" and found.probs.shape == (4, 9, 1, 3) and found.draws.shape == (5, 4, 9, 1)
    assert (found.probs[0, 4:, :, 0] == 1).all()  # beyond the end, class 0 is certain
    ahead = posterior.forecast(x, steps=2, draws=5)
    assert ahead.probs.shape == (4, 2, 1, 3) and ahead.draws.dtype == torch.int64
    rates = torch.softmax(posterior.program.base_logits, -1)
    assert torch.allclose(rates, torch.tensor([[9.0, 8.0, 7.0]]) / 24, atol=0.02)
    posterior.save(tmp_path / "p")
    again = Posterior.load(tmp_path / "p")
    assert torch.equal(again.forecast(x, 2, draws=5).probs, ahead.probs)
    with pytest.raises(ValueError, match="steps must be a whole number"):
        again.forecast(x)
    with pytest.raises(ValueError, match=r"x must be in 0\.\.2 for num_classes=3; got 3 in row 0"):
        posterior.elbo([np.array([3, 0]), np.array([1])])
    with pytest.raises(ValueError, match=r"x.* has 1 NaN value, the first in row 0"):
        posterior.elbo(torch.tensor([[[torch.nan]]]))


@pytest.mark.parametrize("likelihood", ["normal", "poisson", "bernoulli"])
def test_missing_values_do_not_count_and_are_imputed(likelihood: str, tmp_path: Path) -> None:
    x, lengths = sequences(rows=8, features=2)
    x[0, 0, 0] = x[3, 1, 1] = x[5, 0] = torch.nan
    program = DeepMarkovModel(2, **SMALL, likelihood=likelihood)
    posterior = svi(program, (x, lengths), epochs=3, compile=False, progress=False)
    assert torch.isfinite(posterior.elbo(x, lengths)).all()
    filled = posterior.impute(x, lengths, draws=6)
    missing = x.isnan()
    assert torch.equal(filled.mean[~missing], x[~missing]) and torch.isfinite(filled.draws).all()
    assert posterior.program.explains_gaps and not program.explains_gaps
    posterior.save(tmp_path / "p")
    again = Posterior.load(tmp_path / "p")
    assert again.program.explains_gaps and torch.equal(again.impute(x, lengths, draws=6).mean, filled.mean)


def test_a_gap_is_the_same_whatever_stood_there() -> None:
    x, lengths = sequences(rows=4, features=2)
    x[0, 0, 0] = torch.nan
    program = DeepMarkovModel(2, **SMALL, likelihood="normal", dropout=0.0)
    posterior = svi(program, (x, lengths), epochs=2, compile=False, progress=False)
    with pyro.poutine.trace() as recorded, posterior.program.bound(torch.arange(4), 4):
        posterior.program.model(x, lengths)
    fn = recorded.trace.nodes["x"]["fn"]
    values = [torch.where(x.isnan(), v, x) for v in (0.0, 7.0)]
    assert torch.equal(*(fn.log_prob(v) for v in values))


def test_forecasts_start_at_each_rows_own_end(posterior: Posterior) -> None:
    x, lengths = sequences()
    both = posterior.forecast(x, lengths, steps=3, draws=400)
    assert both.draws.shape == (400, 6, 3, 5) and both.kind == "binary"
    end = int(lengths[0])
    junk = torch.cat([x[:1, :end], torch.ones(1, 4, 5)], 1)  # what follows the end has no influence
    alone = [posterior.forecast(v, lengths[:1], steps=3, draws=4000, seed=2).mean for v in (junk, x[:1, :end])]
    assert torch.allclose(*alone, atol=0.02) and torch.allclose(alone[0][0], both.mean[0], atol=0.05)
    with pytest.raises(ValueError, match=r"steps must be a whole number of at least 1; got 0"):
        posterior.forecast(x, lengths, steps=0)
    with pytest.raises(ValueError, match=r"unknown site of the forecast 'y'.* Choose from: x, z_ahead"):
        posterior.forecast(x, lengths, steps=1, site="y")
    assert posterior.forecast(x, lengths, steps=2, draws=3, site="z_ahead").draws.shape == (3, 6, 2, 4)


RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("data", "likelihood", "features"),
    [
        ([RNG.normal(size=n) for n in (5, 3, 8)], "normal", 1),
        ([RNG.normal(size=(5, 2))] * 2, "normal", 2),  # of one length: sequences all the same
        ([RNG.poisson(3, n) for n in (50, 30)], "poisson", 1),
        ([RNG.negative_binomial(1, 0.1, n) for n in (50, 30)], "negative_binomial", 1),
        (torch.rand(4, 6, 3).round(), "bernoulli", 3),
        ((torch.randn(4, 6, 3), torch.tensor([6, 2, 3, 1])), "normal", 3),
        ({"x": torch.randn(4, 6, 3), "lengths": torch.tensor([6, 2, 3, 1])}, "normal", 3),
        ([[1.0, float("nan"), 0.0], [1.0]], "bernoulli", 1),
    ],
)
def test_from_data_chooses_likelihood_and_sizes(data: Any, likelihood: str, features: int) -> None:
    program = DeepMarkovModel.from_data(data)
    assert program.likelihood == likelihood and program.observed_dim == features
    assert program.config["latent_dim"] == max(4, 2 * features) and program.config["hidden_dim"] <= 100
    posterior = svi(program, data, steps=2, progress=False, compile=False)
    assert posterior.forecast(data, steps=2, draws=3).draws.shape[2:] == (2, features)


def test_from_data_keeps_options_and_reads_frames_as_sequences() -> None:
    long = pd.DataFrame({"id": [1, 1, 2], "day": [1, 2, 1], "mood": [0, 2, 1]})
    data = long_form(long, id="id", time="day")
    program = DeepMarkovModel.from_data(data, num_classes=3, latent_dim=7)
    assert program.likelihood == "categorical" and program.config["latent_dim"] == 7
    posterior = svi(program, data, steps=2, progress=False, compile=False)
    ahead = data.to_frame(posterior.forecast(data, steps=2, draws=3).classes, ahead=True)
    assert ahead.loc[1].index.tolist() == [3, 4]
    with pytest.raises(ValueError, match=r"does not tell which lines are one sequence\. Write .*sequences\(frame"):
        DeepMarkovModel.from_data(long)
    with pytest.raises(ValueError, match=r"data must be sequences of shape \(rows, steps, features\); got \(3, 4\)"):
        DeepMarkovModel.from_data(torch.zeros(3, 4))


@pytest.mark.parametrize("name", ["jsb_chorales", "fsdd"])
def test_from_data_reads_data_sets(name: str) -> None:
    try:
        data = load_data(name)
    except (FileNotFoundError, ConnectionError):
        pytest.skip(f"data set {name} is not on this machine")
    program = DeepMarkovModel.from_data(data)
    assert program.config["latent_dim"] == 32 and program.config["hidden_dim"] == 100
    assert program.likelihood == {"jsb_chorales": "bernoulli", "fsdd": "normal"}[name]
