"""Programs of sequences as users write them: their lists, lengths, buckets and forecasts."""

from __future__ import annotations

import re
import warnings
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import DeepMarkovModel
from deepprob.programs.program import Program

STATE = 2


def reverse(x: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence backwards from its own end, as in Pyro's tutorial."""
    turned = torch.zeros_like(x)
    for row, length in enumerate(lengths.tolist()):
        turned[row, :length] = x[row, :length].flip(0)
    return turned


class Tutorial(nn.Module):
    """The deep Markov model of Pyro's tutorial: one site per time step, masks, and a packed recurrent network."""

    steps_seen: ClassVar[set[int]] = set()  # of the class: a fit copies what belongs to the object

    def __init__(self, features: int) -> None:
        super().__init__()
        self.emitter, self.trans = nn.Linear(STATE, features), nn.Linear(STATE, 2 * STATE)
        self.combiner = nn.Linear(STATE + 4, 2 * STATE)
        self.rnn = nn.RNN(features, 4, batch_first=True)
        self.z_0, self.z_q_0 = nn.Parameter(torch.zeros(STATE)), nn.Parameter(torch.zeros(STATE))

    def step(self, net: nn.Linear, inputs: Tensor) -> dist.TorchDistribution:
        loc, raw = net(inputs).chunk(2, -1)
        return dist.Normal(loc, nn.functional.softplus(raw) + 0.05)

    def model(self, x: Tensor, lengths: Tensor) -> None:
        pyro.module("dmm", self)
        self.steps_seen.add(x.shape[1])
        mask = torch.arange(x.shape[1]) < lengths.unsqueeze(-1)  # (B, T)
        z = self.z_0.expand(len(x), STATE)
        with pyro.plate("sequences", len(x)):
            for t in range(x.shape[1]):
                with poutine.mask(mask=mask[:, t]):
                    z = pyro.sample(f"z_{t}", self.step(self.trans, z).to_event(1))
                    pyro.sample(f"x_{t}", dist.Normal(self.emitter(z), 0.5).to_event(1), obs=x[:, t])

    def guide(self, x: Tensor, lengths: Tensor) -> None:
        pyro.module("dmm", self)
        packed = pack_padded_sequence(reverse(x, lengths), lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
        states = reverse(states, lengths)
        mask = torch.arange(x.shape[1]) < lengths.unsqueeze(-1)
        z = self.z_q_0.expand(len(x), STATE)
        with pyro.plate("sequences", len(x)):
            for t in range(x.shape[1]):
                with poutine.mask(mask=mask[:, t]):
                    z = pyro.sample(f"z_{t}", self.step(self.combiner, torch.cat([z, states[:, t]], -1)).to_event(1))


def waves(rows: int = 24, longest: int = 30, features: int = 2, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(3, 7, rows - rows // 4), *rng.integers(longest - 4, longest + 1, rows // 4)]
    phases = rng.uniform(0, 6, rows)
    return [
        np.sin(phase + 0.3 * np.arange(n)[:, None] + np.arange(features)) + rng.normal(0, 0.1, (n, features))
        for n, phase in zip(lengths, phases, strict=True)
    ]


def padded(series: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    tensors = [torch.as_tensor(x, dtype=torch.get_default_dtype()) for x in series]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True), torch.tensor([len(x) for x in tensors])


def test_lists_padded_tensors_dicts_and_packed_sequences_are_one_fit() -> None:
    series = waves(8, longest=9)
    x, lengths = padded(series)
    program = Program.of(Tutorial(2).model, Tutorial(2).guide, data_plate="sequences", variable_length=True)
    packed = pack_sequence([torch.as_tensor(s, dtype=x.dtype) for s in series], enforce_sorted=False)
    for data in (series, (x, lengths), {"x": x, "lengths": lengths}, packed, {"x": series}):
        one, two = program.accept(data)
        assert torch.equal(one, x) and torch.equal(two, lengths)
    short = program.accept([np.ones(4), np.zeros(4)])  # of one length: a program of sequences has no fields
    assert short[0].shape == (2, 4, 1) and short[1].tolist() == [4, 4]
    assert program.accept([[1.0, 2.0], [3.0]])[1].tolist() == [2, 1]


def test_a_deep_markov_model_finds_its_sequences_in_a_dict_by_name() -> None:
    x, lengths = torch.randn(6, 4, 2), torch.tensor([4, 3, 4, 2, 4, 1])
    assert DeepMarkovModel.from_data({"lengths": lengths, "x": x}).config["observed_dim"] == 2


@pytest.mark.filterwarnings("ignore:draws run one by one")  # torch reads the lengths of packed sequences
def test_the_tutorials_deep_markov_model_is_fitted_in_buckets_and_predicts_other_lengths() -> None:
    torch.manual_seed(0)
    net = Tutorial(2)
    program = Program.of(net.model, net.guide, data_plate="sequences", variable_length=True)
    posterior = svi(program, waves(longest=20), epochs=3, batch_size=6, seed=0, compile=False, progress=False)
    assert min(net.steps_seen) < 16 <= max(net.steps_seen)
    other = padded(waves(5, longest=9, seed=1))
    assert posterior.log_weights(*other, particles=3).shape == (3, 5)
    assert posterior.elbo(waves(5, longest=9, seed=1)).shape == (5,)
    mean = posterior.predict(*other, site="x_2", draws=4).mean
    assert mean.shape == (5, 2) and torch.isfinite(mean).all()


class Classifier(nn.Module):
    """An LSTM that reads the last real step, under a Bayesian readout."""

    def __init__(self, features: int = 1) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        states = self.lstm(x)[0]
        last = (lengths - 1)[:, None, None].expand(-1, 1, states.shape[-1])
        logits: Tensor = self.head(states.gather(1, last)[:, 0])
        return logits


def classes(rows: int = 64, longest: int = 40, seed: int = 0) -> tuple[list[np.ndarray], Tensor]:
    """Slow and fast waves."""
    rng = np.random.default_rng(seed)
    labels, lengths = rng.integers(0, 2, rows), rng.integers(8, longest + 1, rows)
    lengths[: rows // 2] = rng.integers(8, 12, rows // 2)
    pairs = zip(labels, lengths, strict=True)
    return [np.sin((0.4 + k) * np.arange(n) + rng.uniform(0, 6)) for k, n in pairs], torch.as_tensor(labels)


def test_an_lstm_classifier_learns_from_lists_of_unequal_series() -> None:
    torch.manual_seed(0)
    net = Classifier()

    def model(x: Tensor, lengths: Tensor, y: Tensor | None = None) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=net(x, lengths)), obs=y)

    program = Program.of(model, lambda *batch: None, data_plate="data", variable_length=True)
    series, y = classes()
    fast = Optimizer(learning_rate=2e-2)
    posterior = svi(program, (series, y), epochs=60, batch_size=16, optimizer=fast, compile=False)
    new, truth = classes(40, longest=60, seed=1)  # longer than any row of the fit
    found = posterior.predict(new, draws=1).classes
    assert (found == truth).float().mean() > 0.9


def test_tokens_without_an_axis_of_features_are_named() -> None:
    net = nn.Embedding(10, 3)

    def model(words: Tensor, n_words: Tensor, y: Tensor | None = None) -> None:
        pyro.module("net", net)
        inside = torch.arange(words.shape[1]) < n_words.unsqueeze(-1)
        total = torch.where(inside.unsqueeze(-1), net(words), 0.0).sum(1).sum(-1)
        with pyro.plate("data", len(words)):
            pyro.sample("y", dist.Normal(total, 1.0), obs=y)

    program = Program.of(model, lambda *batch: None, data_plate="data", variable_length=["words"], lengths="n_words")
    texts = [list(range(n)) for n in (3, 9, 2, 7, 4)]
    posterior = svi(program, (texts, torch.arange(5.0)), epochs=3, batch_size=2, progress=False)
    words, counts = padded([np.arange(n) for n in (12, 1)])
    assert posterior.predict(words.long() % 10, counts, draws=2).mean.shape == (2,)
    assert program.accept({"words": texts, "y": torch.arange(5.0)})[0].dtype == torch.int64


def level(x: Tensor, lengths: Tensor) -> None:
    inside = torch.arange(x.shape[1]) < lengths.unsqueeze(-1)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0).expand(x.shape).mask(inside.unsqueeze(-1)).to_event(2), obs=x)


@pytest.mark.parametrize(
    ("options", "data", "error", "message"),
    [
        ({"variable_length": "x"}, None, TypeError, r"variable_length must be True, or a list .*; got 'x'\. Write"),
        ({"variable_length": ["y"]}, None, ValueError, r"unknown argument of the model 'y'.* Choose from: lengths, x"),
        ({"variable_length": True, "lengths": "n"}, None, ValueError, r"unknown argument of the model 'n'"),
        (
            {},
            (torch.ones(2, 3, 1), torch.tensor([3, 4])),
            ValueError,
            r"lengths must be from 1 to the 3 steps of x; got",
        ),
        ({}, [np.ones((2, 1)), np.array([[np.nan]])], ValueError, r"sequence 1 of data has 1 NaN value"),
    ],
)
def test_refusals(options: dict[str, Any], data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Program.of(level, **({"variable_length": True} | options)).accept(data)


def test_lengths_may_be_left_out() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).expand(x.shape).to_event(2), obs=x)

    program = Program.of(model, lambda x: None, data_plate="data", variable_length=True)
    posterior = svi(program, torch.randn(6, 5, 2), steps=2, progress=False)
    assert posterior.predict(torch.randn(3, 9, 2), draws=2).mean.shape == (3, 9, 2)


def readings(x: Tensor, lengths: Tensor) -> None:
    """Noisy readings of a level."""
    inside = torch.arange(x.shape[1]) < lengths.unsqueeze(-1)
    with pyro.plate("data", len(x)):
        level = pyro.sample("level", dist.Normal(0.0, 10.0))
        pyro.sample("x", dist.Normal(level[..., None], 1.0).mask(inside).to_event(1), obs=x[..., 0])


def amortized(x: Tensor, lengths: Tensor) -> None:
    """The exact posterior of the level."""
    precision = 0.01 + lengths
    pyro.param("unused", torch.zeros(1))
    with pyro.plate("data", len(x)):
        pyro.sample("level", dist.Normal(x[..., 0].sum(-1) / precision, precision.rsqrt()))


def ahead(steps: int, x: Tensor, lengths: Tensor) -> None:
    with pyro.plate("data", len(x)):
        level = pyro.sample("level", dist.Normal(0.0, 10.0))
        pyro.sample("x", dist.Normal(level[..., None].expand(*level.shape, steps), 1.0).to_event(1))


def silent(steps: int, x: Tensor, lengths: Tensor) -> None:
    """A forecast that samples nothing."""


def test_a_program_of_functions_forecasts_by_a_function() -> None:
    data = (torch.tensor([[[1.0], [3.0], [5.0]], [[7.0], [0.0], [0.0]]]), torch.tensor([3, 1]))
    program = Program.of(readings, amortized, data_plate="data", variable_length=True, forecast=ahead)
    posterior = svi(program, data, steps=1, weights="keep", progress=False)
    found = posterior.forecast(*data, steps=2, draws=4000)
    assert found.draws.shape == (4000, 2, 2)
    precision = 0.01 + data[1]
    mean, sd = data[0].sum((1, 2)) / precision, (1 + 1 / precision).sqrt()
    assert ((found.draws.mean(0) - mean[:, None]).abs() < 4 * sd[:, None] / 4000**0.5).all()
    torch.testing.assert_close(found.sd, sd[:, None].expand(2, 2), rtol=0.05, atol=0.0)


def test_a_program_without_a_forecast_says_how_to_write_one() -> None:
    data = (torch.zeros(2, 3, 1), torch.tensor([3, 1]))
    program = Program.of(readings, amortized, data_plate="data", variable_length=True)
    posterior = svi(program, data, steps=1, progress=False)
    with pytest.raises(TypeError, match=r"FunctionProgram has no forecast\. Write forecast\(self, steps, \*batch\)"):
        posterior.forecast(*data, steps=2)
    program = Program.of(readings, amortized, data_plate="data", variable_length=True, forecast=silent)
    with pytest.raises(ValueError, match=r"forecast samples no site besides the latent ones .* Sample the next values"):
        svi(program, data, steps=1, progress=False).forecast(*data, steps=2)
    with pytest.raises(TypeError, match=r"forecast must be a callable Pyro program; got int"):
        Program.of(readings, forecast=3)


def summed(x: Tensor, lengths: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x.sum((1, 2)) / lengths, 1.0), obs=y)


def packed_loader(**options: Any) -> DataLoader[Any]:
    rows = [(torch.full((n, 1), n / 9), torch.tensor(float(n))) for n in (3, 9, 5, 2, 7, 4)]

    def collate(batch: Any) -> Any:
        x, y = zip(*batch, strict=True)
        packed = pack_sequence(x, enforce_sorted=False)
        return (packed, torch.stack(y)) if options.get("labels", True) else packed

    return DataLoader(rows, batch_size=2, collate_fn=collate)  # type: ignore[arg-type]


def test_batches_of_packed_sequences_of_a_loader_are_all_of_its_rows() -> None:
    program = Program.of(summed, "normal", data_plate="data", variable_length=True)
    posterior = svi(program, packed_loader(), epochs=2, held_out=packed_loader(), compile=False, progress=False)
    assert len(posterior.history.steps["elbo"]) == 6
    x, lengths, y = posterior.program.accept(packed_loader())
    assert x.shape == (6, 9, 1) and lengths.tolist() == y.tolist() == [3, 9, 5, 2, 7, 4]
    assert posterior.predict(packed_loader(labels=False), draws=2).mean.shape == (6,)
    torch.testing.assert_close(
        posterior.log_likelihood(packed_loader(), draws=3), posterior.log_likelihood(x, lengths, y, draws=3)
    )
    model = DeepMarkovModel.from_data(packed_loader(labels=False), latent_dim=2)
    assert model.accept(packed_loader(labels=False))[0].shape == (6, 9, 1)


def test_a_program_that_takes_packed_sequences_whole_refuses_a_loader() -> None:
    def whole(x: PackedSequence, y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("mean", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    with pytest.raises(ValueError, match=r"takes the PackedSequence of data whole, .* variable_length=True"):
        svi(Program.of(whole, "normal", data_plate="data"), packed_loader(), steps=2, progress=False)


with torch.random.fork_rng():
    torch.manual_seed(0)  # with some weights the end of the padding has hardly any influence
    READER, HEAD = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 1)


def at_the_last_step(x: Tensor, n: Tensor, y: Tensor | None = None) -> None:
    own(x, y, READER(x)[0][:, -1])


def at_its_own_end(x: Tensor, n: Tensor, y: Tensor | None = None) -> None:
    own(x, y, READER(x)[0][torch.arange(len(x)), n - 1])


def own(x: Tensor, y: Tensor | None, state: Tensor) -> None:
    pyro.module("reader", READER)
    pyro.module("head", HEAD)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(HEAD(state)[:, 0], 1.0), obs=y)


def same_level(x: Tensor, n: Tensor) -> None:
    inside = torch.arange(x.shape[1]) < n[:, None]
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 9.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).mask(inside).to_event(1), obs=x[..., 0])


def mean_of(divide: Any) -> Any:
    def guide(x: Tensor, n: Tensor) -> None:
        spread = pyro.param("spread", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[..., 0].sum(-1) / divide(x, n), spread))

    return guide


def nothing(x: Tensor, n: Tensor, y: Tensor | None = None) -> None:
    """The guide of a model without latent sites."""


SERIES = [torch.linspace(0.0, 1.0, n) for n in (3, 30, 5, 22, 9)]


@pytest.mark.parametrize(
    ("model", "guide", "site"),
    [
        (at_the_last_step, nothing, "y"),
        (at_its_own_end, nothing, None),
        (same_level, mean_of(lambda x, n: x.shape[1]), "z"),
        (same_level, mean_of(lambda x, n: n), None),
        (same_level, "normal", None),
    ],
)
def test_a_program_that_depends_on_the_padding_is_told_to_use_the_lengths(model: Any, guide: Any, site: Any) -> None:
    data = (SERIES, torch.arange(5.0)) if guide is nothing else (SERIES,)
    program = Program.of(model, guide, data_plate="data", variable_length=True, lengths="n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        svi(program, data, steps=1, compile=False, progress=False)
    if site is None:
        assert caught == []
        return
    (warning,) = caught
    expected = rf"site '{site}' depends on the padding: .* a row's n must have no influence.*, n - 1\], not at"
    assert re.search(expected, str(warning.message))


def _mean_of_series(x: Tensor, lengths: Tensor, y: Tensor | None = None) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(b * x.sum((1, 2)) / lengths, 0.1), obs=y)


_LENGTHS = torch.tensor([3, 1, 4, 2])
_SERIES = [torch.arange(float(n))[:, None] for n in _LENGTHS]
_MEANS = torch.stack([x.mean() for x in _SERIES])


@pytest.mark.parametrize(
    "data", [{"x": _SERIES, "lengths": _LENGTHS, "y": _MEANS}, (_SERIES, _LENGTHS, _MEANS), (_SERIES, _MEANS)]
)
def test_series_may_come_with_their_lengths(data: Any) -> None:
    program = Program.of(_mean_of_series, "normal", data_plate="data", variable_length=True, lengths="lengths")
    x, lengths, y = program.accept(data)
    assert x.shape == (4, 4, 1) and torch.equal(lengths, _LENGTHS) and torch.equal(y, _MEANS)
    with pytest.raises(
        ValueError, match=r"lengths are not the lengths of the series in x; got \[4, .* Leave lengths out"
    ):
        program.accept({"x": _SERIES, "lengths": _LENGTHS + 1, "y": _MEANS})
