"""Networks: shapes, sequences of unequal length, configs, and initialization."""

from __future__ import annotations

import copy
import itertools
import json
import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from deepprob.networks import ACTIVATIONS, init_weights, pretrained
from deepprob.networks.convolutional import ConvDecoder, ConvEncoder
from deepprob.networks.dense import MLP
from deepprob.networks.network import Network
from deepprob.networks.recurrent import Recurrent
from deepprob.networks.registry import network_from_config

MADE: list[tuple[Network, tuple[int, ...]]] = [
    (MLP(5, 3), (5,)),
    (MLP(5, 3, hidden_dims=(), activation="tanh"), (5,)),
    (MLP(5, 3, hidden_dims=(7, 6), layer_norm=True), (5,)),
    (MLP(5, 3, hidden_dims=(7,), linear_path=True), (5,)),
    (ConvEncoder((8, 8), 3, channels=(2, 4)), (8, 8)),
    (ConvEncoder((3, 5, 7), 3, channels=(2,)), (3, 5, 7)),
    (ConvEncoder((4, 4), 3, channels=()), (4, 4)),
    (ConvDecoder(5, (8, 8), channels=(4, 2)), (5,)),
    (ConvDecoder(5, (3, 7, 9), channels=(4,), num_params=2), (5,)),
    (ConvDecoder(5, (1, 1), channels=()), (5,)),
]
BATCHES = [(), (1,), (3, 2), (0,)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("net", "row"), MADE)
def test_leading_axes_are_batch(net: Network, row: tuple[int, ...], batch: tuple[int, ...]) -> None:
    x = torch.randn(*batch, *row, generator=seeded())
    y = net(x)
    assert y.shape == (*batch, net.out_features)
    assert net.in_features == math.prod(row)
    for place in itertools.product(*map(range, batch)):
        torch.testing.assert_close(y[place], net(x[place]))


@pytest.mark.parametrize(("net", "row"), MADE)
def test_vmap_over_weights_equals_a_loop(net: Network, row: tuple[int, ...]) -> None:
    x = torch.randn(4, *row, generator=seeded())
    weights = {k: torch.stack([v, 2 * v, v + 1]) for k, v in net.state_dict().items()}
    stacked = vmap(lambda values: functional_call(net, values, x))(weights)
    for draw in range(3):
        one = functional_call(net, {key: value[draw] for key, value in weights.items()}, x)
        torch.testing.assert_close(stacked[draw], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("net", "row"), [*MADE, (Recurrent(5, 3, kind="lstm"), (2, 5))])
def test_gradients_reach_every_parameter(net: Network, row: tuple[int, ...]) -> None:
    net = copy.deepcopy(net)
    net(torch.randn(16, *row, generator=seeded())).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("net", "row"), [*MADE, (Recurrent(5, 3, bidirectional=True), (2, 5))])
def test_config_rebuilds_the_network(net: Network, row: tuple[int, ...]) -> None:
    again = network_from_config(json.loads(json.dumps(net.config)))
    assert type(again) is type(net)
    assert again.config == net.config
    again.load_state_dict(net.state_dict())
    x = torch.randn(2, *row, generator=seeded())
    torch.testing.assert_close(again(x), net(x), rtol=0, atol=0)


def test_decoder_outputs_one_image_per_parameter() -> None:
    net = ConvDecoder(2, (3, 5, 5), channels=(4,), num_params=2)
    assert net(torch.zeros(7, 2)).reshape(7, 2, 3, 5, 5).shape == (7, 2, 3, 5, 5)
    last = net.layers[-1]
    assert isinstance(last, nn.ConvTranspose2d)
    assert last.bias is not None
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.arange(6.0))
    params = net(torch.zeros(2)).reshape(2, 3, 5, 5)
    torch.testing.assert_close(params[1, 2], torch.full((5, 5), 5.0))


# Sequences ----------------------------------------------------------------------------------------

RECURRENT = [
    {"kind": kind, **way} for kind in ("gru", "lstm", "rnn") for way in ({}, {"reverse": True}, {"bidirectional": True})
]


@pytest.mark.parametrize("options", RECURRENT)
def test_padding_does_not_change_states_or_gradients(options: dict[str, Any]) -> None:
    """A sequence without its padding gives the same states."""
    net = Recurrent(3, 4, **options)
    lengths = torch.tensor([5, 1, 0, 3])
    x = torch.randn(4, 5, 3, generator=seeded())
    x[torch.arange(5) >= lengths[:, None]] = math.nan
    y = net(x, lengths)
    assert y.shape == (4, 5, net.out_features)
    for row, length in enumerate(lengths.tolist()):
        assert (y[row, length:] == 0).all()
        if length:
            alone = net(x[row, None, :length])[0]
            torch.testing.assert_close(y[row, :length], alone)
    assert not y.isnan().any()
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("kind", ["gru", "lstm", "rnn"])
def test_bidirectional_states_equal_torch_on_packed_sequences(kind: str) -> None:
    net = Recurrent(3, 4, kind=kind, bidirectional=True)
    cells = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
    theirs = cells[kind](3, 4, batch_first=True, bidirectional=True)
    forwards, backwards = net.cells["forwards"].state_dict(), net.cells["backwards"].state_dict()
    theirs.load_state_dict(forwards | {f"{key}_reverse": v for key, v in backwards.items()})
    x, lengths = torch.randn(3, 6, 3, generator=seeded()), torch.tensor([2, 6, 4])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
    expected, _ = nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True)
    torch.testing.assert_close(net(x, lengths), expected)


def test_reversed_states_depend_only_on_the_future() -> None:
    net = Recurrent(2, 3, reverse=True)
    x = torch.randn(1, 6, 2, generator=seeded(), requires_grad=True)
    net(x, torch.tensor([4]))[0, 2].sum().backward()
    assert x.grad is not None
    assert (x.grad[0].abs().sum(-1) > 0).tolist() == [False, False, True, True, False, False]


def test_sequences_of_any_batch_shape() -> None:
    net = Recurrent(2, 3, reverse=True)
    x = torch.randn(3, 2, 5, 2, generator=seeded())
    lengths = torch.tensor([[5, 2], [1, 4], [3, 3]])
    y = net(x, lengths)
    assert y.shape == (3, 2, 5, 3)
    torch.testing.assert_close(y[1, 1], net(x[1, 1], lengths[1, 1]))


# Initialization -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "silu", "elu", "tanh"])
def test_signals_neither_vanish_nor_explode(activation: str) -> None:
    net = MLP(256, 256, hidden_dims=(256,) * 6, activation=activation)
    init_weights(net, seeded())
    power = net(torch.randn(64, 256, generator=seeded(1))).square().mean()
    assert 0.03 < power < 10


def test_transposed_convolutions_keep_the_scale() -> None:
    net = ConvDecoder(64, (32, 32), channels=(64, 64, 64))
    init_weights(net, seeded())
    power = net(torch.randn(16, 64, generator=seeded(1))).square().mean()
    assert 0.1 < power < 3


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_the_record_names_every_parameter_and_scheme(name: str) -> None:
    net = MLP(3, 1, hidden_dims=(4,), activation=name, layer_norm=True)
    record = init_weights(net, seeded())
    assert record.keys() == dict(net.named_parameters()).keys()
    scheme = "glorot" if name in ("sigmoid", "tanh") else "kaiming"
    assert record["layers.0.weight"] == f"{scheme}_uniform({name})"
    assert record["layers.3.weight"] == "glorot_uniform(linear)"


def test_dropout_follows_every_hidden_layer_and_keeps_the_weights() -> None:
    nets = [MLP(5, 3, hidden_dims=(7, 6), dropout=rate) for rate in (0.0, 0.5)]
    again = network_from_config(json.loads(json.dumps(nets[1].config)))
    assert [layer.p for layer in again.modules() if isinstance(layer, nn.Dropout)] == [0.5, 0.5]
    records = [net.draw_weights(seeded()) for net in nets]
    assert [*records[0].values()] == [*records[1].values()]
    x, (plain, dropped) = torch.randn(4, 5, generator=seeded()), [net.eval() for net in nets]
    torch.testing.assert_close(dropped(x), plain(x), rtol=0, atol=0)
    assert (dropped.train()(x) != plain(x)).all()


def test_a_linear_path_adds_a_map_of_the_input() -> None:
    net, x = MLP(5, 3, hidden_dims=(7,), linear_path=True), torch.randn(4, 5, generator=seeded())
    assert net.path is not None
    torch.testing.assert_close(net(x), net.layers(x) + x @ net.path.weight.T)
    record = init_weights(net, seeded())
    assert record["path.weight"] == "glorot_uniform(linear)" and record.keys() == dict(net.named_parameters()).keys()


@pytest.mark.parametrize(
    "net",
    [net for net, _ in MADE]
    + [Recurrent(3, 4, kind=kind, bidirectional=True) for kind in ("gru", "lstm", "rnn")]
    + [nn.Sequential(MLP(2, 2), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))],
)
def test_seed_determines_the_initial_weights(net: nn.Module) -> None:
    net, before = copy.deepcopy(net), torch.get_rng_state()
    record = init_weights(net, seeded())
    first = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(7)
    init_weights(net, seeded())
    assert torch.equal(before, torch.get_rng_state())
    assert record.keys() == dict(net.named_parameters()).keys()
    assert all(torch.equal(first[name], value) for name, value in net.state_dict().items())
    init_weights(net, seeded(1))
    assert not all(torch.equal(first[name], value) for name, value in net.state_dict().items())


def test_without_a_generator_torch_seeds_the_draw() -> None:
    net = nn.Sequential(MLP(2, 2), nn.Linear(2, 2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        init_weights(net)
        first = copy.deepcopy(net.state_dict())
        torch.manual_seed(0)
        init_weights(net)
    assert all(torch.equal(first[name], value) for name, value in net.state_dict().items())


def test_state_weights_are_orthogonal_and_forget_bias_is_one() -> None:
    net = Recurrent(3, 4, kind="lstm")
    record = init_weights(net, seeded())
    cell = net.cells["forwards"]
    for gate in cell.get_parameter("weight_hh_l0").detach().split(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(4))
    bias = (cell.get_parameter("bias_ih_l0") + cell.get_parameter("bias_hh_l0")).detach()
    torch.testing.assert_close(bias.reshape(4, 4)[:, 0], torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert record["cells.forwards.weight_hh_l0"] == "orthogonal"


def test_pretrained_and_custom_parameters_stay_unchanged() -> None:
    class Prior(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(5.0))

    net = nn.ModuleDict({"a": pretrained(MLP(2, 2)), "b": MLP(2, 2), "c": Recurrent(2, 2)})
    net["prior"] = Prior()
    pretrained(net["b"].get_submodule("layers.0"))
    pretrained(net["c"].get_submodule("cells.forwards"))
    before = copy.deepcopy(net).state_dict()
    record = init_weights(net, seeded())
    same = {name for name, value in net.state_dict().items() if torch.equal(before[name], value)}
    kept = {name for name in before if name.startswith(("a.", "b.layers.0", "c.", "prior"))}
    assert kept <= same
    assert record.keys() == before.keys() - kept
    assert "b.layers.2.weight" not in same
    assert copy.deepcopy(net["a"])._deepprob_pretrained


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: MLP(cast("int", 5.0), 2),
            ValueError,
            r"in_features must be a whole number of at least 1; got 5\.0\.",
        ),
        (lambda: MLP(True, 2), ValueError, r"in_features must be a whole number of at least 1; got True\."),
        (lambda: MLP(5, 0), ValueError, "out_features must be a whole number of at least 1; got 0"),
        (
            lambda: MLP(5, 2, hidden_dims=cast("Any", 5)),
            TypeError,
            "hidden_dims must be a sequence .*; got 5",
        ),
        (
            lambda: MLP(5, 2, hidden_dims=(5, -1)),
            ValueError,
            r"every size in hidden_dims must be a whole number of at least 1; got -1\.",
        ),
        (
            lambda: MLP(5, 2, (), "rleu"),
            ValueError,
            "unknown activation 'rleu'. Did you mean 'relu'",
        ),
        (lambda: ConvEncoder((8,), 2), ValueError, r"image_shape must be .*; got \(8,\)\. Reshape"),
        (
            lambda: ConvDecoder(2, (8, 8), num_params=0),
            ValueError,
            "num_params must be a whole number of at least 1; got 0",
        ),
        (lambda: Recurrent(2, 3, "gur"), ValueError, "unknown kind of recurrent network 'gur'"),
        (
            lambda: Recurrent(2, 3, reverse=True, bidirectional=True),
            ValueError,
            "reverse and bidirectional are both set.* Choose one",
        ),
        (lambda: network_from_config({"network": "mpl"}), ValueError, "unknown network 'mpl'"),
        (lambda: network_from_config({}), ValueError, "unknown network None"),
        (
            lambda: network_from_config({"network": "mlp", "hiden_dims": []}),
            ValueError,
            "unknown argument of network 'mlp' 'hiden_dims'. Did you mean 'hidden_dims'",
        ),
        (
            lambda: MLP(5, 2)(torch.zeros(3, 4)),
            ValueError,
            r"MLP expects inputs of shape \(\*batch, 5\); got \(3, 4\)\. Reshape",
        ),
        (lambda: MLP(5, 2)(torch.tensor(1.0)), ValueError, r"\(\*batch, 5\); got \(\)"),
        (
            lambda: ConvEncoder((8, 8), 2)(torch.zeros(3, 64)),
            ValueError,
            r"ConvEncoder expects inputs of shape \(\*batch, 8, 8\); got \(3, 64\)",
        ),
        (lambda: ConvDecoder(2, (8, 8))(torch.zeros(3)), ValueError, "ConvDecoder expects inputs"),
        (lambda: Recurrent(2, 3)(torch.zeros(2)), ValueError, r"\(\*batch, T, 2\); got \(2,\)"),
        (
            lambda: Recurrent(2, 3)(torch.zeros(4, 5, 2), torch.ones(5)),
            ValueError,
            r"lengths must hold one number per sequence, shape \(4,\); got shape \(5,\)",
        ),
    ],
)
def test_wrong_arguments_raise(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_network_must_define_draw_weights() -> None:
    with pytest.raises(NotImplementedError, match="draw_weights"):
        Network().draw_weights()


def test_recurrent_network_preserves_float64() -> None:
    net = Recurrent(2, 3, reverse=True).double()
    init_weights(net, seeded())
    x: Tensor = torch.zeros(2, 4, 2, dtype=torch.float64)
    assert net(x, torch.tensor([4, 2])).dtype == torch.float64
