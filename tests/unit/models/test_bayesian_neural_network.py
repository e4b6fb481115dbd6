"""The Bayesian neural network: sites, units, likelihoods, files and errors; the original network does not change."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import Tensor, nn
from torch.func import functional_call

from deepprob.data import DataSet, Split, load_data
from deepprob.data.parsers import Parts
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import MODELS, VAE, BayesianNeuralNetwork
from deepprob.networks.convolutional import ConvEncoder
from deepprob.networks.dense import MLP
from deepprob.networks.initialisation import pretrained
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.instance import ProgramInstance


def table(rows: int = 40, features: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=generator)
    return x, torch.sin(2 * x[:, :1]) + 0.1 * torch.randn(rows, 1, generator=generator)


def network(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs))


def fit(program: BayesianNeuralNetwork, data: Any, epochs: int = 3, **options: Any) -> Posterior:
    return svi(program, data, epochs=epochs, progress=False, **{"seed": 1} | options)


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    return fit(BayesianNeuralNetwork(network()), table(), epochs=200, batch_size=None)


# -- sites ------------------------------------------------------------------------------------------------------------


def test_original_network_does_not_change() -> None:
    net = network()
    before, mode = copy.deepcopy(net.state_dict()), net.training
    program = BayesianNeuralNetwork(net)
    own = copy.deepcopy(program.state_dict())
    fitted = fit(program, table())
    after = net.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    assert net.training == mode and all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, own[n]) for n, v in program.state_dict().items())
    draws = fitted.sample(draws=50)["0.weight"]
    assert not torch.allclose(draws.mean(0), before["0.weight"], atol=0.05)


def test_weights_are_global_sites_under_the_networks_names(posterior: Posterior) -> None:
    net = network()
    assert posterior.latent_sites == dict.fromkeys(
        ["0.weight.scale", "2.weight.scale", *(n for n, _ in net.named_parameters()), "noise"], "global"
    )
    draws = posterior.sample(draws=5)
    for name, weight in net.named_parameters():
        assert draws[name].shape == (5, *weight.shape)
    assert draws["0.weight.scale"].shape == (5,) and draws["2.weight.scale"].shape == (5,)
    assert draws["noise"].shape == (5, 1)


@pytest.mark.parametrize(
    ("net", "rows"),
    [
        (MLP(3, 2, (5,), layer_norm=True), torch.randn(7, 3)),
        (ConvEncoder((6, 6), 2, channels=(3,)), torch.randn(7, 6, 6)),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)), torch.randn(7, 1, 6, 6)),
        (nn.Sequential(nn.ConvTranspose1d(3, 4, 2), nn.Flatten(), nn.Linear(12, 2)), torch.randn(7, 3, 2)),
    ],
)
@pytest.mark.parametrize("leading", [(), (1, 1), (4, 1), (2, 3, 1)])
def test_every_draw_is_the_network_with_those_weights(net: nn.Module, rows: Tensor, leading: tuple[int, ...]) -> None:
    program = BayesianNeuralNetwork(net, standardize=False)
    weights = {n: torch.randn(*leading, *p.shape) for n, p in net.named_parameters()}
    out = program.outputs(weights, rows)
    assert out.shape == (*leading[:-1], 7, 2)
    flat = {n: w.reshape(-1, *p.shape) for (n, p), w in zip(net.named_parameters(), weights.values(), strict=True)}
    for k, each in enumerate(out.reshape(-1, 7, 2)):
        expected = functional_call(net, {n: w[k] for n, w in flat.items()}, (rows,))
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-4)
    program.model(rows)  # the prior's scales broadcast against weights of every rank


def test_prior_scales_with_fan_in_and_centers_gains_at_one() -> None:
    program = BayesianNeuralNetwork(MLP(3, 1, (5,), layer_norm=True), prior_scale=2.0)
    trace = pyro.poutine.trace(pyro.poutine.condition(program.model, {"layers.0.weight.scale": torch.tensor(3.0)}))
    sites = trace.get_trace(torch.zeros(4, 3)).nodes
    expected = torch.full((5, 3), 3.0) / 3**0.5
    torch.testing.assert_close(sites["layers.0.weight"]["fn"].base_dist.scale, expected)
    assert (sites["layers.1.weight"]["fn"].mean == 1).all() and (sites["layers.1.bias"]["fn"].mean == 0).all()
    torch.testing.assert_close(sites["layers.3.weight.scale"]["fn"].base_dist.loc.exp(), torch.tensor(2.0))


def test_a_normal_prior_has_no_scales() -> None:
    program = BayesianNeuralNetwork(network(), prior="normal", prior_scale=0.5, noise=0.1)
    sites = pyro.poutine.trace(program.model).get_trace(torch.zeros(4, 3)).nodes
    assert [n for n, s in sites.items() if s["type"] == "sample" and n != "data"] == [
        *(n for n, _ in network().named_parameters()),
        "y",
    ]
    assert (sites["0.weight"]["fn"].stddev == 0.5).all()


def test_frozen_parameters_are_not_random_and_not_trained() -> None:
    net = network()
    net[0].requires_grad_(False)
    found = fit(BayesianNeuralNetwork(net), table())
    assert set(found.latent_sites) == {"2.weight.scale", "2.weight", "2.bias", "noise"}
    assert torch.equal(found.parameters()["net.0.weight"], net[0].weight)
    assert BayesianNeuralNetwork(MLP(3, 1)).config is not None and found.program.config is None


def test_fit_starts_at_new_or_given_weights() -> None:
    still = Optimizer(learning_rate=1e-12)
    net = network()

    def means(posterior: Posterior) -> tuple[Tensor, Tensor]:
        # In units of the prior, whose initial scale is 1 / sqrt(fan_in).
        state = posterior.parameters()
        return state["raw_loc.0"] / 3**0.5, state["raw_loc.2"] / 8**0.5

    first, last = net[0].weight.detach(), net[2].weight.detach()
    for weights in ("auto", "keep"):
        kept = means(fit(BayesianNeuralNetwork(net), table(), epochs=1, weights=weights, optimizer=still))
        torch.testing.assert_close(kept, (first, last))
    fresh = means(fit(BayesianNeuralNetwork(net), table(), epochs=1, weights="fresh", optimizer=still))
    assert not torch.allclose(fresh[0], first)
    pretrained(net[0])
    half = means(fit(BayesianNeuralNetwork(net), table(), epochs=1, weights="fresh", optimizer=still))
    torch.testing.assert_close(half[0], first)
    assert not torch.allclose(half[1], last)


def test_lazy_layers_start_anew_where_the_fit_draws_weights() -> None:
    still = Optimizer(learning_rate=1e-12)
    first = nn.Linear(3, 8)
    for weights, equal in (("auto", True), ("fresh", False)):
        net = nn.Sequential(first, nn.Tanh(), nn.LazyLinear(1))
        state = fit(BayesianNeuralNetwork(net), table(), epochs=1, weights=weights, optimizer=still).parameters()
        assert torch.allclose(state["raw_loc.0"] / 3**0.5, first.weight) == equal
        assert state["raw_loc.2"].abs().sum() > 0


@pytest.mark.parametrize("guide", ["normal", "map", "multivariate_normal", "low_rank", "laplace", AutoDiagonalNormal])
@pytest.mark.parametrize("prior", ["normal", "hierarchical"])
def test_named_guides_start_at_the_weights(guide: Any, prior: str) -> None:
    net, still = network(), Optimizer(learning_rate=1e-12)

    def start(program: BayesianNeuralNetwork, weights: str) -> Tensor:
        instance = ProgramInstance(program, table(), 40, guide=guide, weights=weights)
        at = instance.program.current_guide
        with instance.running(), torch.no_grad():
            starts = at(*table()) if guide == "laplace" else at.median(*table())  # under the guide's own names
        found: Tensor = starts["0_weight_" if "0_weight_" in starts else "0.weight"]
        return found

    for weights, equal in (("auto", True), ("keep", True), ("fresh", False)):
        found = start(BayesianNeuralNetwork(net, prior=prior, prior_scale=0.5), weights)
        assert torch.allclose(found, net[0].weight, atol=1e-6) == equal
        assert found.abs().sum() > 0
    mine = MLP(3, 1, (8,), "tanh")  # of deepprob: drawn anew by default
    weight = mine.layers[0].weight
    drawn, kept = (
        fit(BayesianNeuralNetwork(mine), table(), 1, guide="map", weights=weights, optimizer=still).sample(draws=1)
        for weights in ("auto", "keep")
    )
    torch.testing.assert_close(kept["layers.0.weight"][0], weight.detach())
    assert not torch.allclose(drawn["layers.0.weight"][0], weight)


def test_a_flow_cannot_start_at_the_weights() -> None:
    program = BayesianNeuralNetwork(network())
    with pytest.raises(
        ValueError, match=r"cannot start guide AutoIAFNormal at the weights of 0\.weight, .*Use guide='no"
    ):
        fit(program, table(), guide="flow", weights="keep")
    assert fit(program, table(), guide="flow").predict(table()[0], draws=2).mean.shape == (40, 1)


def test_models_draw_what_they_built_and_keep_what_was_given() -> None:
    encoder, still = nn.Linear(6, 4), Optimizer(learning_rate=1e-12)
    x = torch.rand(12, 6)
    program = VAE((6,), 2, (3,), encoder=encoder)
    found = svi(program, x, epochs=1, optimizer=still, progress=False).parameters()
    torch.testing.assert_close(found["encoder.network.weight"], encoder.weight)
    assert not torch.allclose(found["decoder.layers.0.weight"], program.decoder.layers[0].weight)
    again = VAE((6,), 2, (3,), decoder=program.decoder)  # a part of another program was given as well
    found = svi(again, x, epochs=1, optimizer=still, progress=False).parameters()
    torch.testing.assert_close(found["decoder.layers.0.weight"], program.decoder.layers[0].weight)


def test_seed_determines_the_start() -> None:
    program = BayesianNeuralNetwork(network())
    generator = torch.Generator()
    record = program.draw_weights(generator.manual_seed(0))
    assert record == {f"raw_loc.{i}": "prior" for i in range(4)}
    first = copy.deepcopy(program.state_dict())
    with torch.no_grad():
        for parameter in program.parameters():
            parameter.add_(parameter.requires_grad)
    program.draw_weights(generator.manual_seed(0))
    assert all(torch.equal(v, first[n]) for n, v in program.state_dict().items())


def test_dropout_is_off_and_batch_norm_keeps_its_statistics() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 1))
    net[1].running_mean.fill_(0.3)
    found = fit(BayesianNeuralNetwork(net), table())
    assert (found.program.net[1].running_mean == 0.3).all()
    x = table()[0]
    whole, part = found.predict(x, draws=20).distribution.mean, found.predict(x[:5], draws=20).distribution.mean
    torch.testing.assert_close(whole[:, :5], part)  # rows are independent, and only the weights are random


def test_gradients_reach_every_parameter() -> None:
    program = BayesianNeuralNetwork(network())
    x, y = table()
    guide = pyro.poutine.trace(program.guide).get_trace(x, y)
    model = pyro.poutine.trace(pyro.poutine.replay(program.model, guide)).get_trace(x, y)
    (guide.log_prob_sum() - model.log_prob_sum()).backward()
    trained = [p for p in program.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() and (p.grad != 0).any() for p in trained)
    assert len(trained) == 2 * 4 + 2 * 2 + 2


# -- units ------------------------------------------------------------------------------------------------------------


def test_predictions_scale_with_the_units_of_the_data() -> None:
    x, y = table()
    scale, shift = torch.tensor([1e3, 1e-2, 5.0]), torch.tensor([1e3, 0.0, -20.0])
    plain = fit(BayesianNeuralNetwork(network()), (x, y), epochs=100)
    other = fit(BayesianNeuralNetwork(network()), (x * scale + shift, 50 * y + 1000), epochs=100)
    a, b = plain.predict(x, draws=50), other.predict(x * scale + shift, draws=50)
    torch.testing.assert_close(b.mean, 50 * a.mean + 1000, rtol=1e-3, atol=0.5)
    torch.testing.assert_close(b.sd, 50 * a.sd, rtol=1e-2, atol=0.1)
    torch.testing.assert_close(b.log_prob(50 * y + 1000), a.log_prob(y) - np.log(50.0), rtol=1e-2, atol=0.02)
    gap = plain.log_likelihood(x, y).mean() - other.log_likelihood(x * scale + shift, 50 * y + 1000).mean()
    assert abs(float(gap) - np.log(50.0)) < 0.02


def test_units_come_only_from_the_training_rows() -> None:
    x, y = table()
    found = fit(BayesianNeuralNetwork(network()), (x, y), held_out=(100 * x, 100 * y))
    units = found.instance.tensors()
    torch.testing.assert_close(units["program.x_loc"], x.mean(0))
    torch.testing.assert_close(units["program.y_scale"], y.std(0, unbiased=False))


def test_constant_column_has_scale_one() -> None:
    x, y = table()
    x[:, 1] = 0.1
    program = BayesianNeuralNetwork(network())
    program.adapt(*program.accept((x, y)))
    assert program.x_scale[1] == 1.0 and program.x_scale[0] != 1.0
    assert fit(program, (x, torch.full_like(y, 7.0)), epochs=1).predict(x).mean.isfinite().all()


def test_image_is_standardized_as_a_whole() -> None:
    images = torch.rand(9, 4, 4) * 255
    program = BayesianNeuralNetwork(ConvEncoder((4, 4), 2, channels=(3,)), "categorical", num_classes=2)
    program.adapt(*program.accept((images, torch.zeros(9, dtype=torch.long))))
    torch.testing.assert_close(program.x_loc, images.mean())
    assert program.y_scale.item() == 1.0


def test_every_column_of_y_has_its_own_noise() -> None:
    x, _ = table()
    generator = torch.Generator().manual_seed(1)
    x = torch.cat([x, torch.randn(200, 3, generator=generator)])
    fast = Optimizer(learning_rate=5e-2)
    torch.manual_seed(0)  # of the network, where the fit starts
    both = torch.cat([x[:, :1], x[:, 1:2] + 3 * torch.randn(240, 1, generator=generator)], dim=1)
    found = fit(BayesianNeuralNetwork(nn.Linear(3, 2)), (x, both), epochs=300, batch_size=None, optimizer=fast)
    noise = found.sample(draws=50)["noise"].mean(0)
    assert noise.shape == (2,) and noise[1] > 2 * noise[0]
    assert found.predict(x).mean.shape == (240, 2) and found.log_likelihood(x, both, draws=3).shape == (3, 240)


def test_known_noise_is_in_the_units_of_y() -> None:
    x, y = table()
    found = fit(BayesianNeuralNetwork(network(), noise=3.0), (x, 100 * y))
    assert "noise" not in found.latent_sites
    assert (found.predict(x).aleatoric == 3.0).all()


def test_without_standardization_units_are_zero_and_one() -> None:
    x, y = table()
    found = fit(BayesianNeuralNetwork(network(2), standardize=False), (x + 5, y.repeat(1, 2) + 5)).instance.tensors()
    assert (found["program.x_loc"] == 0).all() and (found["program.y_scale"] == 1).all()
    assert found["program.noise_loc.0"].shape == (2,)


# -- likelihoods ------------------------------------------------------------------------------------------------------


def test_classes_are_learned() -> None:
    x, _ = table(120)
    labels = (x[:, 0] > 0).long() + (x[:, 0] > 1).long()
    net = network(3)
    found = fit(BayesianNeuralNetwork(net, "categorical", num_classes=3), (x, labels), epochs=300, batch_size=None)
    predicted = found.predict(x)
    assert predicted.kind == "classes" and predicted.probs.shape == (120, 3)
    assert (predicted.probs.argmax(1) == labels).float().mean() > 0.9
    assert found.log_likelihood(x, labels, draws=7).shape == (7, 120)
    assert "noise" not in found.latent_sites and found.program.x_loc.shape == (3,)


def test_two_classes_are_learned() -> None:
    x, _ = table(120)
    found = fit(BayesianNeuralNetwork(network(), "bernoulli"), (x, x[:, 0] > 0), epochs=300, batch_size=None)
    predicted = found.predict(x)
    assert predicted.kind == "binary" and predicted.probs.shape == (120, 1)
    assert ((predicted.probs[:, 0] > 0.5) == (x[:, 0] > 0)).float().mean() > 0.9


@pytest.mark.parametrize(
    "convert", [torch.Tensor.double, torch.Tensor.long, lambda v: v > 0, lambda v: v.numpy()[::-1]]
)
def test_every_number_type_is_accepted(convert: Any) -> None:
    x, y = table()
    found = fit(BayesianNeuralNetwork(network()), (convert(3 * x), convert(3 * y)), epochs=1)
    assert found.predict(convert(3 * x)).mean.dtype == torch.get_default_dtype()


def test_targets_may_lack_and_labels_may_have_a_column_axis() -> None:
    x, y = table()
    found = fit(BayesianNeuralNetwork(network()), (x, y[:, 0]), epochs=1)
    assert found.predict(x).mean.shape == (40, 1)
    assert torch.equal(found.log_likelihood(x, y[:, 0]), found.log_likelihood(x, y))
    program = BayesianNeuralNetwork(network(2), "categorical", num_classes=2)
    assert program.accept((x, torch.ones(40, 1)))[1].shape == (40,)


@pytest.mark.parametrize("guide", ["normal", "map", "multivariate_normal", "low_rank", "flow", "laplace"])
def test_every_named_guide_fits_a_network(guide: str, tmp_path: Path) -> None:
    class Named(nn.Module):  # an AutoGuide has an attribute of that name
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.model(x)
            return out

    x, _ = table()
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(40, 1, generator=torch.Generator().manual_seed(2))
    epochs = 1500 if guide == "laplace" else 300  # a mode is needed
    found = fit(BayesianNeuralNetwork(Named()), (x, y), epochs, guide=guide, batch_size=None)
    assert set(found.latent_sites) == {"model.weight.scale", "model.weight", "model.bias", "noise"}
    assert float((found.predict(x, draws=20).mean - y).std()) < 0.7 * float(y.std())
    assert found.log_likelihood(x, y, draws=5).shape == (5, 40)
    found.save(tmp_path / "fit")
    again = Posterior.load(tmp_path / "fit", program=BayesianNeuralNetwork(Named()))
    assert torch.equal(again.sample(draws=3)["model.weight"], found.sample(draws=3)["model.weight"])


# -- files ------------------------------------------------------------------------------------------------------------

_READ = """
import json, sys, torch
import deepprob.models
from deepprob.posteriors.posterior import Posterior
posterior = Posterior.load(sys.argv[1])
x = torch.linspace(-1, 1, 12).reshape(4, 3)
print(json.dumps(posterior.log_likelihood(x, x.sum(1), draws=7, seed=3).tolist()))
"""


def test_a_fresh_process_gives_the_same_densities(tmp_path: Path) -> None:
    x, y = table()
    x[:, 2] = 4.0
    found = fit(BayesianNeuralNetwork(MLP(3, 1, (6,), activation="tanh"), prior_scale=0.7), (x, 30 * y + 7))
    found.save(tmp_path / "bnn")
    run = subprocess.run(
        [sys.executable, "-c", _READ, str(tmp_path / "bnn")], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    rows = torch.linspace(-1, 1, 12).reshape(4, 3)
    expected = found.log_likelihood(rows, rows.sum(1), draws=7, seed=3)
    torch.testing.assert_close(torch.tensor(json.loads(run.stdout)), expected, rtol=1e-6, atol=1e-6)


def test_config_rebuilds_the_program() -> None:
    program = BayesianNeuralNetwork(
        ConvEncoder((4, 4), 3, channels=(2,)), "categorical", num_classes=3, prior="normal", prior_scale=0.5
    )
    twin = MODELS["bnn"](**json.loads(json.dumps(program.config)))
    assert twin.config == program.config
    assert [(n, p.shape) for n, p in twin.named_parameters()] == [(n, p.shape) for n, p in program.named_parameters()]


def test_custom_network_must_be_given_to_load(tmp_path: Path) -> None:
    found = fit(BayesianNeuralNetwork(network()), table())
    found.save(tmp_path / "bnn")
    with pytest.raises(ValueError, match="of BayesianNeuralNetwork, which its name and settings cannot rebuild"):
        Posterior.load(tmp_path / "bnn")
    again = Posterior.load(tmp_path / "bnn", program=BayesianNeuralNetwork(network()))
    assert torch.equal(again.log_likelihood(*table()), found.log_likelihood(*table()))


@pytest.mark.parametrize(
    ("name", "likelihood", "outputs"),
    [("diabetes", "normal", 1), ("wine", "categorical", 3), ("digits", "categorical", 10)],
)
def test_data_set_determines_sizes_and_likelihood(name: str, likelihood: str, outputs: int) -> None:
    data = load_data(name)
    program = BayesianNeuralNetwork.from_data(data)
    assert program.likelihood == likelihood and program.net.out_features == outputs
    with program.bound(torch.arange(len(data.test)), len(data.test)):
        assert len(program.model(*program.accept(data.test))) == len(data.test)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"likelihood": "bernouli"}, "unknown likelihood 'bernouli'. Did you mean 'bernoulli'"),
        ({"prior": "norml"}, "unknown prior 'norml'. Did you mean 'normal'"),
        ({"prior_scale": 0.0}, "prior_scale must be a positive number; got 0.0"),
        ({"noise": -1.0}, "noise must be a positive number; got -1.0"),
        (
            {"noise": 0.1, "likelihood": "bernoulli"},
            "noise is only for likelihood='normal', .*; got likelihood='bernoulli'",
        ),
        ({"likelihood": "categorical"}, "needs num_classes, a whole number of at least 2; got None"),
        ({"likelihood": "categorical", "num_classes": 1}, "needs num_classes, a whole number of at least 2; got 1"),
        ({"num_classes": 3}, "num_classes is only for likelihood='categorical' .*; got likelihood='normal'"),
    ],
)
def test_wrong_settings_raise(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BayesianNeuralNetwork(network(), **arguments)


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Parameter(torch.zeros(1))


def test_networks_that_cannot_be_lifted_raise() -> None:
    with pytest.raises(TypeError, match=r"net must be a torch\.nn\.Module; got str"):
        BayesianNeuralNetwork("mlp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no trainable parameter, so nothing is random"):
        BayesianNeuralNetwork(nn.Tanh())
    with pytest.raises(ValueError, match="parameter named 'noise', but the program has a site of that name"):
        BayesianNeuralNetwork(_Named())
    with pytest.raises(ValueError, match=r"batch norm without running statistics \('1'\)"):
        BayesianNeuralNetwork(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(4), torch.zeros(4), r"x must be rows of features, shape \(N, D\).*x.reshape\(-1, 1\)"),
        (torch.zeros(4, 3), torch.zeros(5), "'x' has 4, 'y' has 5"),
        (torch.full((4, 3), torch.nan), torch.zeros(4), "'x' of data"),
        (torch.zeros(4, 3), torch.full((4,), torch.inf), "'y' of data"),
        (torch.zeros(0, 3), torch.zeros(0), "'x' of data is empty"),
        (torch.zeros(4, 3), torch.zeros(4, 2, 2), r"y must have shape \(N, outputs\) or \(N,\); got \(4, 2, 2\)"),
    ],
)
def test_wrong_rows_raise(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(BayesianNeuralNetwork(network()), (x, y))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 1, 3, 2]), r"labels y must be in 0..2 for num_classes=3; got 3 in row 2"),
        (torch.tensor([0, -1, 1, 2]), r"labels y must be in 0..2 for num_classes=3; got -1 in row 1"),
        (torch.tensor([0.0, 1.0, 0.5, 2.0]), "labels y must be whole numbers; got 0.5 in row 2"),
        (
            torch.eye(4)[:, :3],
            r"labels y must have shape \(N,\); got \(4, 3\). Convert one-hot rows with y.argmax\(1\)",
        ),
    ],
)
def test_wrong_labels_raise(y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(BayesianNeuralNetwork(network(3), "categorical", num_classes=3), (torch.randn(4, 3), y))


def test_wrong_binary_targets_raise() -> None:
    with pytest.raises(ValueError, match="y must be 0 or 1 for likelihood='bernoulli'; got 2 in row 2"):
        fit(BayesianNeuralNetwork(network(), "bernoulli"), (torch.randn(4, 3), torch.tensor([0, 1, 2, 1])))


def test_mismatched_networks_and_data_raise() -> None:
    x, y = table()
    with pytest.raises(ValueError, match="the network has 2 outputs, but num_classes=3"):
        fit(BayesianNeuralNetwork(network(2), "categorical", num_classes=3), (x, torch.zeros(40)))
    with pytest.raises(ValueError, match=r"the network must return \(rows, outputs\)"):
        fit(BayesianNeuralNetwork(nn.Sequential(network(), nn.Flatten(0))), (x, y))
    with pytest.raises(ValueError, match="the network has 1 outputs, but y has 2 columns"):
        fit(BayesianNeuralNetwork(network()), (x, y.repeat(1, 2)))
    with pytest.raises(ValueError, match="cannot run on rows of x"):
        fit(BayesianNeuralNetwork(network()), (x[:, :2], y))
    found = fit(BayesianNeuralNetwork(network()), (x, y), epochs=1)
    with pytest.raises(ValueError, match="x must have 3 features per row as in the fit; got 2"):
        found.predict(x[:, :2])
    with pytest.raises(ValueError, match="has no targets to predict"):
        faces = Split({"images": torch.zeros(2, 4, 4)})
        BayesianNeuralNetwork.from_data(DataSet("faces", "images", Parts(faces, None, faces)))
