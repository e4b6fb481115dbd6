"""Networks of all kinds: lifted in a Bayesian network, and as encoders and decoders of an autoencoder.

Under K draws, a lifted network must equal the network itself with each draw's weights, one draw at a time. The
networks of an autoencoder must see ``(rows, ...)`` only, whatever the number of draws.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepprob.inference import svi
from deepprob.models import VAE, BayesianNeuralNetwork
from deepprob.networks.recurrent import Recurrent
from deepprob.posteriors.posterior import Posterior

ROWS = 6


class Net(nn.Module):
    """Parts, and a function of the parts and the inputs."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Two(Net):
    def forward(self, ids: Tensor, x: Tensor) -> Any:
        return self.run(self, ids, x)


def _series(rows: int) -> Tensor:
    return torch.randn(rows, 5, 4)


def _table(rows: int) -> Tensor:
    return torch.randn(rows, 4)


def _ids(rows: int) -> Tensor:
    return torch.randint(0, 9, (rows, 5))


def _images(rows: int) -> Tensor:
    return torch.randn(rows, 2, 6, 6)


@dataclass(frozen=True)
class Lifted:
    """A network with one output, and its inputs."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any] = _table
    traced: bool = field(default=True, kw_only=True)

    def data(self, rows: int) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        inputs = self.inputs(rows)
        return inputs if isinstance(inputs, tuple) else (inputs,)


def _last(layer: nn.Module, width: int = 6) -> nn.Module:
    return Net(lambda net, x: net.out(net.layer(x)[0][:, -1]), layer=layer, out=nn.Linear(width, 1))


def _cell(cell: nn.Module) -> nn.Module:
    def run(net: Any, x: Tensor) -> Any:
        state = None
        for step in x.unbind(1):
            state = net.cell(step, state)
        return net.out(state[0] if isinstance(state, tuple) else state)

    return Net(run, cell=cell, out=nn.Linear(6, 1))


def _own(kind: str, **options: Any) -> nn.Module:
    layer = Recurrent(4, 3 if options else 6, kind, **options)
    return Net(lambda net, x: net.out(net.layer(x)[:, -1]), layer=layer, out=nn.Linear(6, 1))


def _clip(net: Any, x: Tensor) -> Tensor:
    h = net.first(x).clone()
    h[h < 0] = 0.0
    return net.last(h)


def _select(net: Any, x: Tensor) -> Tensor:
    h = net.first(x)
    return net.last(h) + h[h > 0].mean()


def _branch(net: Any, x: Tensor) -> Tensor:
    h = net.first(x)
    return net.last(h) if h.mean() > 0 else -net.last(h.square())


def _write(net: Any, x: Tensor) -> Tensor:
    x += net.shift.weight[0]
    return net.last(net.first(x))


def _remember(net: Any, x: Tensor) -> Tensor:
    net.seen = net.first(x)
    net.calls = getattr(net, "calls", 0) + 1
    return net.last(net.seen) / net.calls


def _masked_encoder() -> nn.Module:
    layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1)
    return Net(
        lambda net, x: net.out(net.layer(x, src_key_padding_mask=x[..., 0] > 1).nan_to_num().mean(1)),
        layer=layer,
        out=nn.Linear(4, 1),
    )


def _dense(run: Callable[..., Any], **parts: nn.Module) -> nn.Module:
    return Net(run, first=nn.Linear(4, 3), last=nn.Linear(3, 1), **parts)


LIFTED = [
    Lifted("lstm", lambda: _last(nn.LSTM(4, 6, batch_first=True)), _series),
    Lifted("two-way lstm", lambda: _last(nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True)), _series),
    Lifted("gru", lambda: _last(nn.GRU(4, 6, batch_first=True)), _series),
    Lifted("rnn", lambda: _last(nn.RNN(4, 6, batch_first=True)), _series),
    Lifted("lstm cell", lambda: _cell(nn.LSTMCell(4, 6)), _series),
    Lifted("gru cell", lambda: _cell(nn.GRUCell(4, 6)), _series),
    Lifted("rnn cell", lambda: _cell(nn.RNNCell(4, 6)), _series),
    Lifted("own lstm", lambda: _own("lstm"), _series),
    Lifted("own two-way gru", lambda: _own("gru", bidirectional=True), _series),
    Lifted(
        "attention",
        lambda: Net(
            lambda net, x: net.out(net.layer(x, x, x)[0].mean(1)),
            layer=nn.MultiheadAttention(4, 2, batch_first=True),
            out=nn.Linear(4, 1),
        ),
        _series,
    ),
    Lifted(
        "transformer",
        lambda: Net(
            lambda net, x: net.out(net.layer(x).mean(1)),
            layer=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
            out=nn.Linear(4, 1),
        ),
        _series,
    ),
    Lifted("masked transformer", _masked_encoder, _series, traced=False),
    Lifted(
        "embedding",
        lambda: Net(lambda net, x: net.out(net.layer(x).mean(1)), layer=nn.Embedding(9, 4), out=nn.Linear(4, 1)),
        _ids,
    ),
    Lifted(
        "embedding bag",
        lambda: Net(lambda net, x: net.out(net.layer(x)), layer=nn.EmbeddingBag(9, 4), out=nn.Linear(4, 1)),
        _ids,
        traced=False,
    ),
    Lifted(
        "one id a row",
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 1)),
        lambda rows: torch.arange(rows) % 9,
    ),
    Lifted(
        "ids and numbers",
        lambda: Two(lambda net, i, x: net.out(net.e(i) + x), e=nn.Embedding(9, 4), out=nn.Linear(4, 1)),
        lambda rows: (torch.arange(rows) % 9, _table(rows)),
    ),
    Lifted("two tables", lambda: nn.Bilinear(4, 3, 1), lambda rows: (_table(rows), torch.randn(rows, 3))),
    Lifted("masked write", lambda: _dense(_clip)),
    Lifted("masked read", lambda: _dense(_select), traced=False),
    Lifted("branch", lambda: _dense(_branch), traced=False),
    Lifted("writes to its input", lambda: _dense(_write, shift=nn.Linear(4, 1))),
    Lifted("remembers", lambda: _dense(_remember)),
    Lifted("whole numbers into a dense layer", lambda: nn.Linear(5, 1), _ids),
    Lifted("lazy", lambda: nn.Sequential(nn.LazyConv2d(3, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(1)), _images),
    Lifted(
        "convolutions",
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 1)),
        _images,
    ),
    Lifted("weight norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 1))),
]
SAMPLE = {"lstm", "transformer", "ids and numbers", "branch", "writes to its input"}


def _cases(cases: list[Any], sample: set[str]) -> list[Any]:
    slow = pytest.mark.slow
    return [pytest.param(c, id=c.name, marks=() if c.name in sample else slow) for c in cases]


@pytest.fixture(params=_cases(LIFTED, SAMPLE))
def lifted(request: pytest.FixtureRequest) -> Lifted:
    found: Lifted = request.param
    return found


def _fit(case: Lifted, rows: int, **options: Any) -> tuple[Posterior, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    data = case.data(rows)
    y = torch.randn(rows, 1)
    before = [x.clone() for x in data]
    program = BayesianNeuralNetwork(case.make())
    posterior = svi(program, (*data, y), **{"steps": 3, "progress": False, "compile": False} | options)
    assert all(torch.equal(x, was) for x, was in zip(data, before, strict=True))
    return posterior, (*data, y)


@pytest.mark.parametrize("draws", [3, ROWS])
def test_every_draw_is_the_network_with_its_weights(lifted: Lifted, draws: int) -> None:
    program = _fit(lifted, ROWS)[0].program
    data = program.validate(*lifted.data(ROWS))
    weights = {name: torch.randn(draws, 1, *shape) for name, shape in program.shapes.items()}
    out = program.outputs(weights, *data)
    assert out.shape == (draws, ROWS, 1)
    units = ["x", "x1"][: len(data)]
    rows = [
        (x - getattr(program, f"{u}_loc")) / getattr(program, f"{u}_scale") if x.is_floating_point() else x
        for u, x in zip(units, data, strict=True)
    ]
    for k in range(draws):
        alone = copy.deepcopy(program.net)
        with torch.no_grad():
            for name, parameter in alone.named_parameters():
                parameter.copy_(weights[name][k, 0])
            expected = alone(*(x.clone() for x in rows))
        torch.testing.assert_close(out[k], expected, rtol=1e-4, atol=1e-4)


def test_a_lifted_network_is_fitted_asked_and_saved(lifted: Lifted, tmp_path: Path) -> None:
    posterior, data = _fit(lifted, 9, batch_size=4)
    inputs = data[:-1]
    found = posterior.predict(*inputs, draws=4, seed=1)
    assert found.mean.shape == (9, 1) and found.mean.isfinite().all()
    likelihoods = posterior.log_likelihood(*data, draws=4, seed=1)
    assert likelihoods.shape == (4, 9) and likelihoods.isfinite().all()
    posterior.save(tmp_path / "fit")
    again = Posterior.load(tmp_path / "fit", program=BayesianNeuralNetwork(lifted.make()))
    torch.testing.assert_close(again.predict(*inputs, draws=4, seed=1).mean, found.mean)


def test_a_lifted_network_compiles_unless_values_steer_it(lifted: Lifted) -> None:
    posterior, _ = _fit(lifted, ROWS, compile="auto" if not lifted.traced else True)
    assert posterior.config["compiled"] or not lifted.traced


def test_whole_numbers_stay_whole_where_the_network_takes_them() -> None:
    case = {c.name: c for c in LIFTED}
    ids = case["embedding"].data(ROWS)[0]
    assert BayesianNeuralNetwork(case["embedding"].make()).validate(ids)[0].dtype == torch.int64
    dense = BayesianNeuralNetwork(case["whole numbers into a dense layer"].make())
    assert dense.validate(ids)[0].dtype == torch.get_default_dtype()
    both = BayesianNeuralNetwork(case["ids and numbers"].make())
    assert both.argument_names == ["ids", "x", "y"] and both.num_required == 2


# -- refused -----------------------------------------------------------------------------------------------------------


def test_networks_that_cannot_run_lifted_are_refused() -> None:
    x, y = torch.randn(ROWS, 5, 4), torch.randn(ROWS, 1)
    options: dict[str, Any] = {"steps": 1, "progress": False}
    with pytest.raises(ValueError, match=r"got tuple\. Wrap LSTM in a module that returns only the output tensor"):
        svi(BayesianNeuralNetwork(nn.LSTM(4, 1)), (x, y), **options)
    with pytest.warns(DeprecationWarning):
        scripted = torch.jit.script(nn.Linear(4, 1))
    with pytest.raises(ValueError, match=r"net has a scripted module \('1'\), whose weights can be neither"):
        BayesianNeuralNetwork(nn.Sequential(nn.Flatten(), scripted))
    lazy = nn.Sequential(nn.LazyConv2d(2, 3), nn.Flatten(), nn.LazyLinear(1))
    with pytest.raises(ValueError, match=r"net has lazy layers, which get their sizes from rows of x \(5, 4, 1, 1\)"):
        svi(BayesianNeuralNetwork(lazy), (x[..., None, None], y), **options)
    with pytest.raises(ValueError, match=r"net has lazy layers without sizes\. Fit the program first"):
        BayesianNeuralNetwork(nn.LazyLinear(1)).model(torch.zeros(3, 2))


# -- autoencoders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coded:
    """A custom encoder and decoder of codes of two numbers."""

    name: str
    shape: tuple[int, ...]
    encoder: Callable[[], nn.Module | None] = lambda: None
    decoder: Callable[[], nn.Module | None] = lambda: None
    options: dict[str, Any] = field(default_factory=dict)

    def make(self) -> VAE:
        torch.manual_seed(0)
        return VAE(self.shape, 2, (8,), encoder=self.encoder(), decoder=self.decoder(), **self.options)


def _up() -> nn.Module:
    return nn.Sequential(
        nn.Linear(2, 16), nn.Unflatten(1, (4, 2, 2)), nn.ConvTranspose2d(4, 4, 2, 2), nn.ReLU(), nn.Conv2d(4, 1, 1)
    )


def _down() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))


def _sequence_encoder() -> nn.Module:
    return Net(
        lambda net, x: net.out(net.layer(x)[0][:, -1]), layer=nn.LSTM(3, 6, batch_first=True), out=nn.Linear(6, 4)
    )


def _sequence_decoder() -> nn.Module:
    def run(net: Any, z: Tensor) -> Tensor:
        return net.out(net.layer(z.unsqueeze(1).repeat(1, 5, 1))[0])

    return Net(run, layer=nn.GRU(2, 6, batch_first=True), out=nn.Linear(6, 3))


CODED = [
    Coded("convolutional decoder", (1, 4, 4), decoder=_up),
    Coded("convolutions", (1, 4, 4), _down, _up),
    Coded(
        "batch norm",
        (6,),
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)),
        lambda: nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6)),
    ),
    Coded("dropout", (6,), decoder=lambda: nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 6))),
    Coded("flatten", (2, 3), lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 4))),
    Coded("unflatten", (2, 3), decoder=lambda: nn.Sequential(nn.Linear(2, 6), nn.Unflatten(1, (2, 3)))),
    Coded("lstm encoder", (5, 3), _sequence_encoder),
    Coded("recurrent", (5, 3), _sequence_encoder, _sequence_decoder),
    Coded(
        "transformer decoder",
        (5, 3),
        decoder=lambda: nn.Sequential(
            nn.Linear(2, 20),
            nn.Unflatten(1, (5, 4)),
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
            nn.Linear(4, 3),
        ),
    ),
    Coded(
        "embedded classes",
        (5,),
        lambda: nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(15, 4)),
        lambda: nn.Sequential(nn.Linear(2, 20), nn.Unflatten(1, (5, 4))),
        {"likelihood": "categorical", "num_classes": 4},
    ),
    Coded(
        "counts",
        (6,),
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (4, 1))),
        lambda: nn.Sequential(nn.Linear(2, 6)),
        {"likelihood": "poisson"},
    ),
]


@pytest.fixture(params=_cases(CODED, {"convolutions", "batch norm", "recurrent", "embedded classes"}))
def coded(request: pytest.FixtureRequest) -> Coded:
    found: Coded = request.param
    return found


@pytest.mark.parametrize("draws", [4, 9])
def test_networks_of_an_autoencoder_see_rows_only(coded: Coded, draws: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    high = coded.options.get("num_classes", 2)
    x = torch.randint(0, high, (24, *coded.shape)).to(torch.int64 if high > 2 else torch.get_default_dtype())
    posterior = svi(coded.make(), x, steps=3, batch_size=8, progress=False, compile=False)
    seen: list[tuple[int, ...]] = []
    program: Any = posterior.program
    for net, rank in ((program.encoder.network, len(coded.shape)), (program.decoder, 1)):
        net.register_forward_pre_hook(lambda _, given, rank=rank: seen.append(given[0].dim() - rank))
    found = posterior.predict(x[:9], draws=draws, seed=1)
    probs = (high,) if high > 2 else ()
    assert found.mean.shape == (9, *coded.shape, *probs) and found.mean.isfinite().all()
    assert posterior.sample(x[:9], draws=draws)["z"].shape == (draws, 9, 2)
    assert posterior.log_likelihood(x[:9], draws=draws).shape == (draws, 9)
    assert posterior.log_evidence(x[:9], particles=draws).isfinite().all()
    assert posterior.sample_prior(7)["x"].shape[-len(coded.shape) :] == coded.shape
    assert seen and set(seen) == {1}
    posterior.save(tmp_path / "fit")
    again = Posterior.load(tmp_path / "fit", program=coded.make())
    torch.testing.assert_close(again.predict(x[:9], draws=draws, seed=1).mean, found.mean)


def test_every_draw_is_decoded_by_itself() -> None:
    program = next(c for c in CODED if c.name == "recurrent").make().eval()
    z = torch.randn(3, 7, 2)
    stacked = program.decode(z).mean
    torch.testing.assert_close(stacked, torch.stack([program.decode(each).mean for each in z]))


def test_a_network_of_the_wrong_size_is_named() -> None:
    x = torch.rand(8, 8, 8)
    options: dict[str, Any] = {"steps": 1, "progress": False}
    small, flat = nn.Sequential(nn.Linear(2, 60)), nn.Sequential(nn.Linear(2, 64), nn.Flatten(0))
    with pytest.raises(
        ValueError, match=r"decoder returns 60 outputs per row, .* over rows of shape \(8, 8\) needs 64"
    ):
        svi(VAE((8, 8), 2, decoder=small), x, **options)
    with pytest.raises(ValueError, match=r"decoder must return one tensor with a row of outputs for each of 8 rows"):
        svi(VAE((8, 8), 2, decoder=flat), x, **options)
    with pytest.raises(ValueError, match=r"encoder returns 5 outputs per row, but posterior='normal' .* needs 4"):
        svi(VAE((8, 8), 2, encoder=nn.Sequential(nn.Flatten(), nn.Linear(64, 5))), x, **options)
    with pytest.raises(ValueError, match="encoder returns 5 outputs per row"):
        VAE((8,), 2, encoder=nn.Linear(8, 5))
