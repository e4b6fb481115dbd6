"""Counts in every model: fits, queries, files, and errors for values that are not counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepprob.data import as_split
from deepprob.inference import svi
from deepprob.models import VAE, BayesianNeuralNetwork, DeepMarkovModel
from deepprob.networks.dense import MLP
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

FAMILIES = ("poisson", "negative_binomial")
LENGTHS = torch.randint(1, 7, (24,), generator=torch.Generator().manual_seed(1))


def counts(*shape: int, rate: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.poisson(rate * torch.rand(24, *shape, generator=generator), generator=generator)


def features() -> Tensor:
    return torch.randn(24, 3, generator=torch.Generator().manual_seed(2))


PROGRAMS: dict[str, Callable[[str], Program]] = {
    "vae": lambda family: VAE((3, 2), 2, (8,), family),
    "bnn": lambda family: BayesianNeuralNetwork(MLP(3, 2, (5,), "tanh"), family),
    "dmm": lambda family: DeepMarkovModel(5, 2, 4, 4, likelihood=family),
}
DATA: dict[str, tuple[Tensor, ...]] = {
    "vae": (counts(3, 2),),
    "bnn": (features(), counts(2)),
    "dmm": (counts(6, 5), LENGTHS),
}
OBSERVED = {"vae": 0, "bnn": 1, "dmm": 0}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=sorted(PROGRAMS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def posterior(name: str, family: str) -> Posterior:
    return svi(PROGRAMS[name](family), DATA[name], epochs=3, batch_size=8, held_out=DATA[name], compile=False)


def test_every_query_has_the_right_shape(name: str, posterior: Posterior) -> None:
    data = DATA[name]
    observed = posterior.program.accept(data)[OBSERVED[name]]
    prediction = posterior.predict(*(data[:1] if name == "bnn" else data), draws=8)
    assert prediction.kind == "count" and prediction.mean.shape == observed.shape
    assert (prediction.draws == prediction.draws.round()).all() and (prediction.draws >= 0).all()
    assert prediction.log_prob(observed).isfinite().all() and (prediction.interval(0.5)[0] >= 0).all()
    assert prediction.aleatoric.shape == prediction.epistemic.shape == observed.shape
    assert posterior.log_likelihood(*data, draws=3).shape == (3, 24)
    assert posterior.elbo(*data).isfinite().all() and posterior.log_evidence(*data, particles=3).isfinite().all()
    prior = posterior.sample_prior(24, *(data[:1] if name == "bnn" else ()), draws=2)
    assert (prior["y" if name == "bnn" else "x"] >= 0).all()
    assert {"posterior_predictive", "log_likelihood"} <= set(posterior.to_arviz(*data, draws=3).groups())


def test_save_and_load(name: str, posterior: Posterior, tmp_path: Path) -> None:
    posterior.save(tmp_path / "fit")
    again = Posterior.load(tmp_path / "fit")
    assert again.program.likelihood == posterior.program.likelihood
    assert torch.equal(again.log_likelihood(*DATA[name], draws=3), posterior.log_likelihood(*DATA[name], draws=3))


def test_every_number_type_gives_the_same_likelihood(name: str, posterior: Posterior) -> None:
    plain, place = list(DATA[name]), OBSERVED[name]
    expected = posterior.log_likelihood(*plain, draws=2)
    for kind in (torch.Tensor.int, torch.Tensor.double, lambda x: x.numpy().astype(np.uint8), torch.Tensor.tolist):
        other: list[Any] = [*plain[:place], kind(plain[place]), *plain[place + 1 :]]
        assert torch.equal(posterior.log_likelihood(*other, draws=2), expected)


@pytest.mark.parametrize(("value", "said"), [(-1.0, "-1"), (0.5, "0.5"), (-0.25, "-0.25")])
def test_values_that_are_not_counts_raise(
    name: str, family: str, posterior: Posterior, value: float, said: str
) -> None:
    spoilt = [x.clone() for x in DATA[name]]
    spoilt[OBSERVED[name]][17].view(-1)[0] = value
    word = {"vae": "values", "bnn": "y", "dmm": "x"}[name]
    message = (
        f"^{word} must be whole numbers of at least 0 for likelihood='{family}'; got {said} in row 17. "
        "Give counts, or choose likelihood='normal'.$"
    )
    data = tuple(spoilt)
    for call in (
        lambda: svi(PROGRAMS[name](family), data, epochs=1, batch_size=8, compile=False),
        lambda: svi(PROGRAMS[name](family), DATA[name], held_out=data, epochs=1, batch_size=8, compile=False),
        lambda: posterior.log_likelihood(*data),
        lambda: posterior.elbo(*data),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_config_rebuilds_the_program(name: str, family: str) -> None:
    program = PROGRAMS[name](family)
    assert program.config is not None and program.config["likelihood"] == family
    twin = type(program)(**program.config)
    assert twin.config == program.config
    assert {n: x.shape for n, x in twin.state_dict().items()} == {n: x.shape for n, x in program.state_dict().items()}


def test_every_column_has_its_own_scale_and_dispersion() -> None:
    y = torch.stack([counts(rate=2.0), 1000 * counts(rate=2.0)], 1)
    found = svi(PROGRAMS["bnn"]("negative_binomial"), (features(), y), epochs=3, batch_size=None, compile=False)
    assert found.sample(draws=5)["total_count"].shape == (5, 2) and "noise" not in found.latent_sites
    start = found.program.observation.distribution(
        torch.zeros(24, 2), scale=found.program.y_scale, numbers={"total_count": torch.ones(2)}
    )
    torch.testing.assert_close(start.mean[0], y.mean(0), rtol=1e-3, atol=0.0)
    plain = svi(
        BayesianNeuralNetwork(MLP(3, 2, ()), "poisson", standardize=False),
        (features(), y),
        epochs=1,
        batch_size=None,
        compile=False,
    )
    assert (plain.program.y_scale == 1).all()


def test_all_zero_counts_can_be_fitted(name: str, family: str) -> None:
    data = list(DATA[name])
    data[OBSERVED[name]] = torch.zeros_like(data[OBSERVED[name]])
    found = svi(PROGRAMS[name](family), tuple(data), epochs=2, batch_size=8, compile=False)
    assert found.elbo(*data).isfinite().all()


# -- sequences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", [*FAMILIES, "normal"])
def test_values_beyond_the_end_have_no_influence(likelihood: str) -> None:
    program = DeepMarkovModel(5, 2, 4, 4, dropout=0.0, likelihood=likelihood)
    x = counts(6, 5)
    junk = torch.where(torch.arange(6)[:, None] < LENGTHS[:, None, None], x, torch.tensor(-3.5))  # no counts
    longer = torch.cat([junk, torch.full((24, 4, 5), torch.nan)], 1)
    values = []
    for data in (x, junk, longer):
        batch = program.validate(data, LENGTHS)
        program.adapt(*batch)
        torch.manual_seed(0)
        with program.bound(torch.arange(24), 24):
            z = program.guide(*batch)
            fn = program.emission(z, (torch.arange(z.shape[-2]) < LENGTHS[:, None])[..., None])
        log_prob = fn.log_prob(batch[0])
        program.zero_grad()
        log_prob.sum().backward()
        gradients = [p.grad.flatten() for p in program.parameters() if p.grad is not None]
        values.append(torch.cat([log_prob.detach(), *gradients, program.base_logits, program.base_scale]))
        assert values[-1].isfinite().all()
        beyond = torch.arange(data.shape[1]) >= LENGTHS[:, None]
        torch.testing.assert_close(fn.sample()[beyond], torch.zeros(int(beyond.sum()), 5))
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2], rtol=1e-4, atol=1e-5)


def test_real_sequences_are_fitted_in_their_units() -> None:
    x = 1000.0 + 50.0 * torch.randn(24, 6, 5, generator=torch.Generator().manual_seed(3))
    found = svi(DeepMarkovModel(5, 2, 4, 4, likelihood="normal"), (x, LENGTHS), epochs=40, batch_size=8, compile=False)
    prediction = found.predict(x, LENGTHS, draws=20)
    inside = torch.arange(6) < LENGTHS[:, None]
    assert prediction.kind == "real" and abs(float(prediction.mean[inside].mean()) - 1000) < 20
    assert 20 < float(prediction.sd[inside].mean()) < 100


def test_unsupported_likelihoods_of_sequences_raise() -> None:
    with pytest.raises(ValueError, match=r"unknown likelihood 'poison'\. Did you mean 'poisson'\?"):
        DeepMarkovModel(5, likelihood="poison")
    with pytest.raises(ValueError, match=r"likelihood='categorical' needs num_classes, a whole number of at least 2"):
        DeepMarkovModel(5, likelihood="categorical")


# -- kinds of user data -----------------------------------------------------------------------------------------------


def test_data_frames_of_counts_are_accepted_and_of_strings_raise() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(features().numpy(), columns=["a", "b", "c"])
    visits = pandas.Series(counts().numpy(), name="visits")
    program = BayesianNeuralNetwork(MLP(3, 1, (5,)), "poisson")
    found = svi(program, (table, visits), epochs=2, compile=False)
    assert found.predict(table, draws=3).mean.shape == (24, 1)
    with pytest.raises(TypeError, match=r"'visits' of data has columns that are not numbers: visits\. Encode"):
        svi(program, (table, visits.map(str)), epochs=1)
    with pytest.raises(ValueError, match=r"'visits' of data has 1 NaN value, the first in row 3"):
        svi(program, (table, visits.where(visits.index != 3)), epochs=1)


def test_one_hot_labels_and_empty_data_raise() -> None:
    classes = BayesianNeuralNetwork(MLP(3, 2, ()), "categorical", num_classes=2)
    one_hot = nn.functional.one_hot((features()[:, 0] > 0).long(), 2)
    with pytest.raises(ValueError, match=r"labels y must have shape \(N,\); got \(24, 2\)\. Convert one-hot rows"):
        svi(classes, (features(), one_hot), epochs=1)
    assert classes.validate(features(), features()[:, 0] > 0)[1].dtype == torch.int64
    for name, program in PROGRAMS.items():
        empty = tuple(x[:0] for x in DATA[name])
        with pytest.raises(ValueError, match="of data is empty"):
            svi(program("poisson"), empty, epochs=1)
        assert all(len(x) == 0 for x in program("poisson").validate(*empty))
    assert as_split(one_hot)["x"].shape == (24, 2)


class _Last(nn.Module):
    """The last state of a recurrent network, and a linear layer."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.cell, self.head, self.whole = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 1), whole

    def forward(self, x: Tensor) -> Any:
        states = self.cell(x)
        return states if self.whole else self.head(states[0][:, -1])


def test_network_that_returns_a_tuple_raises() -> None:
    x = torch.randn(24, 5, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"the network must return one tensor, \(rows, outputs\); got tuple\."):
        svi(BayesianNeuralNetwork(_Last(whole=True), "poisson"), (x, counts()), epochs=1)


def test_a_recurrent_network_can_be_bayesian() -> None:
    x = torch.randn(24, 5, 2, generator=torch.Generator().manual_seed(0))
    found = svi(BayesianNeuralNetwork(_Last(), "poisson"), (x, counts()), epochs=2, compile=False)
    first = found.predict(x, draws=3)
    assert first.mean.shape == (24, 1) and found.elbo(x, counts()).isfinite().all()
    assert (first.distribution.mean.std(0) > 0).any()  # every draw is a separate network
    assert torch.equal(found.predict(x, draws=3).draws, first.draws)
    assert found.log_likelihood(x, counts(), draws=3).shape == (3, 24)


@pytest.mark.parametrize("family", [*FAMILIES, "bernoulli", "normal"])
def test_decoder_of_the_wrong_size_raises(family: str) -> None:
    with pytest.raises(
        ValueError, match=r"decoder returns 12 outputs per row, but .* over rows of shape \(3, 2\) needs 6\."
    ):
        svi(VAE((3, 2), 2, (4,), family, decoder=MLP(2, 12, ())), (counts(3, 2) > 0).float(), epochs=1)
    image = nn.Sequential(MLP(2, 6, ()), nn.Unflatten(-1, (3, 2)))
    assert VAE((3, 2), 2, (4,), family, decoder=image).decode(torch.zeros(5, 2)).event_shape == (3, 2)
