"""Priors, chosen layers and likelihoods of targets in the Bayesian neural network: sites, gradients, files, fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from deepprob.data.opening import open_data
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import BayesianNeuralNetwork
from deepprob.networks.dense import MLP
from deepprob.networks.weight_priors import PRIORS
from deepprob.posteriors.posterior import Posterior

LIKELIHOODS: dict[str, tuple[int, dict[str, Any]]] = {
    "student_t": (1, {}),
    "heteroscedastic_normal": (2, {}),
    "censored_normal": (1, {"limits": (-0.5, 0.5)}),
    "ordinal": (1, {"num_classes": 3}),
}


def table(rows: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, generator=generator)
    return x, x[:, :1] + 0.1 * torch.randn(rows, 1, generator=generator)


def targets(likelihood: str) -> Tensor:
    y = table()[1]
    if likelihood == "ordinal":
        return (y[:, 0] > -0.5).long() + (y[:, 0] > 0.5).long()
    return y.clamp(-0.5, 0.5) if likelihood == "censored_normal" else y


def network(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs))


def fit(program: BayesianNeuralNetwork, data: Any, epochs: int = 3, **options: Any) -> Posterior:
    return svi(program, data, epochs=epochs, batch_size=None, seed=1, progress=False, **options)


def gradients(program: BayesianNeuralNetwork, *data: Tensor) -> list[Tensor | None]:
    """The gradient of ``log q - log p`` in every trained parameter."""
    guide = pyro.poutine.trace(program.guide).get_trace(*data)
    model = pyro.poutine.trace(pyro.poutine.replay(program.model, guide)).get_trace(*data)
    (guide.log_prob_sum() - model.log_prob_sum()).backward()
    return [p.grad for p in program.parameters() if p.requires_grad]


# -- priors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior_trains_every_parameter_and_returns_from_a_file(prior: str, tmp_path: Path) -> None:
    x, y = table()
    found = gradients(BayesianNeuralNetwork(network(), prior=prior), x, y)
    assert all(g is not None and g.isfinite().all() and (g != 0).any() for g in found)
    posterior = fit(BayesianNeuralNetwork(MLP(3, 1, (5,), "tanh"), prior=prior), (x, y), epochs=30)
    posterior.save(tmp_path)
    again = Posterior.load(tmp_path).predict(x, draws=20)
    torch.testing.assert_close(again.mean, posterior.predict(x, draws=20).mean)


@pytest.mark.parametrize("guide", ["normal", "map"])
def test_a_horseshoe_takes_guides_by_name(guide: str) -> None:
    found = fit(BayesianNeuralNetwork(network(), prior="horseshoe"), table(), guide=guide)
    assert found.sample(draws=4)["0.weight.input_scale"].shape == (4, 3)


def test_a_horseshoe_turns_irrelevant_inputs_off() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 30, generator=generator)
    y = 2 * x[:, :1] + 0.5 * torch.randn(120, 1, generator=generator)
    fast, size = Optimizer(learning_rate=3e-2, options={"betas": (0.9, 0.99)}), {}
    for prior in ("hierarchical", "horseshoe"):
        torch.manual_seed(0)
        found = fit(BayesianNeuralNetwork(nn.Linear(30, 1), prior=prior), (x, y), epochs=1500, optimizer=fast)
        weights = found.sample(draws=100)["weight"].mean(0)[0]
        size[prior] = weights[1:].abs().mean()
        assert weights[0] * found.program.y_scale / found.program.x_scale[0] == pytest.approx(2.0, abs=0.15)
    assert size["horseshoe"] < 0.7 * size["hierarchical"]


def test_a_pretrained_prior_stays_near_the_given_weights() -> None:
    net = MLP(3, 1, (5,), "tanh")
    program = BayesianNeuralNetwork(net, prior="pretrained", prior_scale=1e-3)
    assert program.config is not None
    found = fit(program, table(), epochs=200)
    for name, weight in net.named_parameters():
        assert (found.sample(draws=20)[name] - weight).abs().max() < 0.02
    free = fit(BayesianNeuralNetwork(net, prior="pretrained"), table(), epochs=200).sample(draws=20)
    assert (free["layers.2.bias"] - net.layers[2].bias).abs().max() > 0.05


def test_a_mapping_of_priors_and_the_chosen_layers_return_from_a_file(tmp_path: Path) -> None:
    prior = {"*.bias": ("normal", 0.3), "layers.0": "student_t"}
    program = BayesianNeuralNetwork(MLP(3, 1, (5,), "tanh"), prior=prior, layers=["layers.0", "layers.2.bias"])
    config = json.loads(json.dumps(program.config))
    assert config["prior"] == {
        "layers.0.weight": ["student_t", 1.0],
        "layers.0.bias": ["normal", 0.3],
        "layers.2.bias": ["normal", 0.3],
    }
    posterior = fit(program, table(), epochs=30)
    assert set(posterior.latent_sites) == {*config["prior"], "noise"}
    posterior.save(tmp_path)
    again = Posterior.load(tmp_path).predict(table()[0], draws=20)
    torch.testing.assert_close(again.mean, posterior.predict(table()[0], draws=20).mean)


# -- layers -----------------------------------------------------------------------------------------------------------


def test_other_layers_are_trained_and_frozen_ones_are_not() -> None:
    found = fit(BayesianNeuralNetwork(network(), layers="last"), table(), epochs=20)
    assert set(found.latent_sites) == {"2.weight.scale", "2.weight", "2.bias", "noise"}
    assert not torch.allclose(found.parameters()["net.0.weight"], network()[0].weight, atol=1e-3)  # type: ignore[index]
    net = network()
    net[0].bias.requires_grad_(False)  # type: ignore[index]
    found = fit(BayesianNeuralNetwork(net, layers="last"), table(), epochs=20)
    assert torch.equal(found.parameters()["net.0.bias"], net[0].bias)  # type: ignore[index]


def test_trained_layers_of_our_networks_start_anew_with_the_seed() -> None:
    still, net = Optimizer(learning_rate=1e-12), MLP(3, 1, (5,), "tanh")

    def start(weights: str, seed: int) -> Tensor:
        program = BayesianNeuralNetwork(net, layers="last")
        options: dict[str, Any] = {"steps": 1, "optimizer": still, "progress": False}
        found = svi(program, table(), seed=seed, weights=weights, **options)
        return found.parameters()["net.layers.0.weight"]

    assert torch.equal(start("auto", 0), start("auto", 0)) and not torch.equal(start("auto", 0), start("auto", 1))
    torch.testing.assert_close(start("keep", 0), net.layers[0].weight.detach())


# -- likelihoods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood_trains_every_parameter_and_returns_from_a_file(likelihood: str, tmp_path: Path) -> None:
    outputs, options = LIKELIHOODS[likelihood]
    x, y = table()[0], targets(likelihood)
    found = gradients(BayesianNeuralNetwork(network(outputs), likelihood, **options), x, y)
    assert all(g is not None and g.isfinite().all() and (g != 0).any() for g in found)
    posterior = fit(BayesianNeuralNetwork(MLP(3, outputs, (5,)), likelihood, **options), (x, y), epochs=50)
    posterior.save(tmp_path)
    again = Posterior.load(tmp_path)
    torch.testing.assert_close(again.predict(x, draws=20).mean, posterior.predict(x, draws=20).mean)
    assert posterior.log_likelihood(x, y, draws=4).shape == (4, 40)
    assert posterior.to_arviz(x, y) is not None


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_from_data_gives_the_network_its_outputs(likelihood: str) -> None:
    outputs, options = LIKELIHOODS[likelihood]
    program = BayesianNeuralNetwork.from_data((table()[0], targets(likelihood)), likelihood=likelihood, **options)
    assert program.net.out_features == outputs
    fit(program, (table()[0], targets(likelihood)), epochs=1)


def test_ordinal_targets_of_a_frame_need_an_order() -> None:
    sizes = np.array(["small", "middle", "large"])[targets("ordinal")]
    frame = pd.DataFrame({"a": table()[0][:, 0], "size": sizes})
    with pytest.raises(ValueError, match=r"needs classes in an order, but the target 'size' holds text.*ordered=True"):
        BayesianNeuralNetwork.from_data(frame, target="size", likelihood="ordinal")
    order = ["small", "middle", "large"]
    frame["size"] = pd.Categorical(frame["size"], categories=order, ordered=True)
    program = BayesianNeuralNetwork.from_data(frame, target="size", likelihood="ordinal")
    assert program.num_classes == 3 and "classes=('small', 'middle', 'large')" in program.extra_repr()
    assert fit(program, frame, epochs=1).predict(frame, draws=3).class_names == tuple(order)


def test_ordinal_targets_of_a_file_need_an_order(tmp_path: Path) -> None:
    numbers = targets("ordinal").numpy()
    frame = pd.DataFrame({"a": table()[0][:, 0], "size": np.array(["small", "middle", "large"])[numbers]})
    frame.to_csv(tmp_path / "text.csv", index=False)
    frame.assign(size=numbers).to_csv(tmp_path / "numbers.csv", index=False)
    with pytest.raises(ValueError, match=r"the target 'size' holds text.*in a file, number the classes from 0"):
        BayesianNeuralNetwork.from_data(open_data(str(tmp_path / "text.csv"), target="size"), likelihood="ordinal")
    data = open_data(str(tmp_path / "numbers.csv"), target="size")
    assert BayesianNeuralNetwork.from_data(data, likelihood="ordinal").num_classes == 3


def test_a_function_takes_whole_numbers_and_several_columns() -> None:
    x, _ = table()
    counts = torch.randint(0, 11, (40,), generator=torch.Generator().manual_seed(1))
    binomial = BayesianNeuralNetwork(network(), lambda out: dist.Binomial(10, logits=out))
    assert fit(binomial, (x, counts)).predict(x, draws=5).kind == "count"
    both = torch.randn(40, 2, generator=torch.Generator().manual_seed(2))
    laplace = BayesianNeuralNetwork(network(2), lambda out, dispersion: dist.Laplace(out, dispersion))
    found = fit(laplace, (x, both))
    assert found.sample(draws=5)["dispersion"].shape == (5, 2) and found.predict(x, draws=5).mean.shape == (40, 2)
    assert found.log_likelihood(x, both, draws=3).shape == (3, 40)


def test_wrong_targets_and_networks_raise() -> None:
    x, y = table()
    with pytest.raises(ValueError, match="likelihood='ordinal' needs one, whatever the number of classes"):
        fit(BayesianNeuralNetwork(network(3), "ordinal", num_classes=3), (x, targets("ordinal")))
    with pytest.raises(
        ValueError, match=r"a mean and a log-scale for every column of y\. Give its last layer 2 outputs"
    ):
        fit(BayesianNeuralNetwork(network(1), "heteroscedastic_normal"), (x, y))
    with pytest.raises(ValueError, match=r"y must be between the limits \(0\.0, None\)"):
        fit(BayesianNeuralNetwork(network(), "censored_normal", limits=(0.0, None)), (x, y))
