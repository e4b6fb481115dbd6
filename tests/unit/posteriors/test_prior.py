"""Draws from the prior, before a fit."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import deepprob as dp
from deepprob.models import VAE, BayesianNeuralNetwork
from deepprob.programs import Program

DRAWS = 20_000
X = torch.tensor([0.0, 1.0, 2.0])


def model(x: Tensor, y: Tensor | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(1.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.sample("y", dist.Normal(z + x, 0.5), obs=y)


@pytest.mark.parametrize("data", [X, (X, torch.zeros(3)), {"x": X}], ids=["inputs", "all", "by name"])
def test_all_sites_are_drawn_from_the_prior(data: Any) -> None:
    found = dp.sample_prior(Program.of(model), data, draws=DRAWS, seed=1)
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "loc": (DRAWS,),
        "z": (DRAWS, 3),
        "twice": (DRAWS, 3),
        "y": (DRAWS, 3),
    }
    assert torch.equal(found["twice"], 2 * found["z"])
    sd = (4.0 + 1.0 + 0.25) ** 0.5
    assert (found["y"].mean(0) - (1.0 + X)).abs().max() < 5 * sd / DRAWS**0.5
    assert (found["y"].std(0) - sd).abs().max() < 5 * sd / (2 * DRAWS) ** 0.5
    # Rows share loc.
    assert abs(float(torch.corrcoef(found["y"].T)[0, 1]) - 4.0 / 5.25) < 0.02


def test_a_prior_is_seeded_and_leaves_the_caller_alone() -> None:
    program, state = Program.of(model, "normal", data_plate="data"), torch.random.get_rng_state()
    first, second = (dp.sample_prior(program, X, draws=4, seed=3) for _ in range(2))
    other = dp.sample_prior(program, X, draws=4, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not pyro.get_param_store()
    assert torch.equal(first["y"], second["y"])
    assert not torch.equal(first["y"], other["y"])


def test_a_program_without_arguments_has_a_prior() -> None:
    data = torch.zeros(4)

    def closed() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=data)

    found = dp.sample_prior(Program.of(closed), draws=5)
    assert found["y"].shape == (5, 4)
    assert bool((found["y"] != 0.0).all())


def test_marked_sites_are_drawn() -> None:
    def mixture(y: Tensor | None = None) -> None:
        with pyro.plate("data", 3):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.25, 0.75])), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(10.0 * k, 1.0), obs=y)

    found = dp.sample_prior(Program.of(mixture), torch.zeros(3), draws=4000)
    assert abs(float(found["k"].double().mean()) - 0.75) < 0.03
    assert torch.equal((found["y"] > 5.0).long(), found["k"])


def test_a_program_that_does_not_stack_is_drawn_by_runs() -> None:
    def products(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(torch.mv(x, w), 0.1), obs=y)

    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    found = dp.sample_prior(Program.of(products), x, draws=4000)
    assert found["w"].shape == (4000, 2)
    assert (found["y"] - found["w"] @ x.T).std() < 0.11
    assert (found["y"].std(0) - torch.tensor([1.0, 2.0, 2.0**0.5])).abs().max() < 0.15


def test_models_of_the_package_have_a_prior() -> None:
    images = torch.rand(5, 4)
    found = dp.sample_prior(VAE((4,), latent_dim=2, hidden_dims=(3,)), images, draws=6)
    assert found["z"].shape == (6, 5, 2)
    x = torch.randn(5, 2)
    network = dp.sample_prior(BayesianNeuralNetwork(nn.Linear(2, 1)), x, draws=6)
    assert network["y"].shape == (6, 5, 1)
    assert network["weight"].shape == (6, 1, 2)


def test_wrong_arguments_of_a_prior_are_refused() -> None:
    with pytest.raises(TypeError, match=r"sample_prior expects a Program; got function\. Wrap a Pyro model"):
        dp.sample_prior(model, X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="draws must be"):
        dp.sample_prior(Program.of(model), X, draws=0)
