"""Guides by name, class, object and callable, and the errors of a guide that does not fit its model."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGaussian,
    AutoHierarchicalNormalMessenger,
    AutoLowRankMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
    AutoStructured,
)
from pyro.infer.autoguide.gaussian import AutoGaussianDense
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from deepprob.engine.random import RandomStream
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import BayesianNeuralNetwork
from deepprob.programs.guides import GUIDES, attach_guide
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program

Y = torch.linspace(-1, 1, 12)


def model(y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", 12):
        pyro.sample("y", dist.Normal(w, s), obs=y)


def rows(y: Tensor | None = None) -> None:
    with pyro.plate("data", 12):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def fitted(model: Any, guide: Any = None, **options: Any) -> Any:
    return svi(Program.of(model, data_plate="data"), Y, guide=guide, **{"epochs": 2} | options)


@pytest.mark.parametrize("guide", [*GUIDES, AutoNormal, AutoDiagonalNormal, AutoNormal(model)])
def test_guides_by_name_class_and_object(guide: Any) -> None:
    posterior = fitted(model, guide, epochs=300 if guide == "laplace" else 2)
    assert {n: v.shape for n, v in posterior.sample(draws=4).items()} == {"w": (4,), "s": (4,)}
    assert bool((posterior.sample(draws=4)["s"] > 0).all())


def test_named_class_is_recorded_under_its_name() -> None:
    program = Program.of(model, data_plate="data")
    assert attach_guide(program, AutoNormal) == "normal"
    assert attach_guide(program, AutoDiagonalNormal) == "AutoDiagonalNormal"
    assert attach_guide(program, type("Own", (AutoDiagonalNormal,), {})) is None
    assert program.has_guide
    assert attach_guide(program, None) is None


@pytest.mark.parametrize("guide", ["multivariate_normal", "low_rank", "flow", "laplace"])
def test_joint_guides_need_all_rows_at_once(guide: str) -> None:
    with pytest.raises(ValueError, match=r"one distribution over the latents of all rows \(z\), which minibatches"):
        fitted(rows, guide, batch_size=4)
    assert fitted(rows, guide, batch_size=None, epochs=300 if guide == "laplace" else 2).latent_sites == {"z": "local"}


def test_refuses_missing_and_unknown_guides() -> None:
    with pytest.raises(
        ValueError, match=r"unknown guide 'norml'\. Did you mean 'normal'\? Choose from: flow, laplace,"
    ):
        fitted(model, "norml")
    with pytest.raises(ValueError, match=r"the program has no guide\. Name one: guide='normal'\|'multivariate_normal'"):
        fitted(model)
    with pytest.raises(TypeError, match=r"guide must be a name, an AutoGuide class or a callable; got float\."):
        fitted(model, 1.5)


def test_guide_must_cover_the_model() -> None:
    def partial(y: Tensor | None = None) -> None:
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    with pytest.raises(
        ValueError,
        match=r"the guide has no site 's' but the model samples it\. Add pyro\.sample\(\"s\", \.\.\.\) to the guide",
    ):
        fitted(model, partial)


def test_guide_must_not_draw_extra_sites() -> None:
    def more(y: Tensor | None = None) -> None:
        for name in ("w", "extra"):
            pyro.sample(name, dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
        pyro.sample("s", dist.Gamma(1.0, 1.0))

    with pytest.raises(
        ValueError, match=r"the guide samples 'extra' but the model has no such latent site\. Remove it"
    ):
        fitted(model, more)

    def helper(y: Tensor | None = None) -> None:
        u = pyro.sample("u", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), infer={"is_auxiliary": True})
        pyro.sample("w", dist.Delta(u))
        pyro.sample("s", dist.Gamma(1.0, 1.0))

    assert set(fitted(model, helper).latent_sites) == {"w", "s"}


def test_laplace_needs_a_mode() -> None:
    def saddle(y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.factor("bend", w**2)  # curves more than the prior
        with pyro.plate("data", 12):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    message = r"the Laplace approximation needs a mode, .* Fit for longer: raise epochs= or steps=\. A hierarchy"
    with pytest.raises(ValueError, match=message):
        fitted(saddle, "laplace")


def test_laplace_is_exact_for_a_gaussian() -> None:
    def gaussian(y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 12):
            pyro.sample("y", dist.Normal(w, 0.5), obs=y)

    posterior = fitted(gaussian, "laplace", epochs=300)
    draws = posterior.sample(draws=20_000)["w"]
    assert float(draws.std()) == pytest.approx((1 + 12 / 0.25) ** -0.5, rel=0.03)
    weights = posterior.log_weights(Y, particles=50)
    assert float(weights.std()) < 0.02


def test_observed_sites_of_a_guide_are_not_in_its_posterior() -> None:
    """An AutoMessenger runs the model: data recorded as its draws would cancel the likelihood."""
    messenger = Program.of(model, AutoNormalMessenger(model), data_plate="data")
    posterior = svi(messenger, Y + 3.0, epochs=200, optimizer=Optimizer(learning_rate=0.05))
    assert float(posterior.sample(draws=500)["w"].mean()) > 2.0


def names_that_clash(y: Tensor) -> None:
    pyro.sample("w.scale", dist.LogNormal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("w.scale.more", dist.Normal(0.0, 1.0))
    pyro.sample("model.w", dist.Normal(0.0, 1.0))  # an AutoGuide has an attribute of that name
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)


@pytest.mark.parametrize("guide", ["normal", "map", AutoNormal])
def test_named_guides_keep_sites_apart_whose_names_nest(guide: Any) -> None:
    fast = Optimizer(learning_rate=0.05)
    posterior = svi(
        Program.of(names_that_clash, guide), torch.full((9,), 2.0), epochs=400, optimizer=fast, progress=False
    )
    draws = posterior.sample(draws=300)
    assert set(draws) == {"w.scale", "w", "w.scale.more", "model.w"}
    assert abs(float(draws["w"].mean()) - 1.8) < 0.2 and abs(float(draws["model.w"].mean())) < 0.3
    assert (draws["w.scale"] > 0).all()


def with_lifted(net: nn.Module) -> Program:
    priors = {
        "weight": dist.Normal(torch.zeros(1, 3), 1.0).to_event(2),
        "bias": dist.Normal(torch.zeros(1), 1.0).to_event(1),
    }

    def model(x: Tensor, y: Tensor | None = None) -> None:
        lifted = poutine.lift(pyro.module, prior=priors)("net", copy.deepcopy(net), update_module_params=True)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(lifted(x).squeeze(-1), 1.0), obs=y)

    return Program.of(model)


@pytest.mark.parametrize("guide", ["normal", "map", "low_rank", AutoDiagonalNormal])
def test_lifted_networks_start_at_their_weights(guide: Any) -> None:
    net, data = nn.Linear(3, 1), (torch.randn(12, 3), Y)
    for weights, equal in (("auto", True), ("keep", True), ("fresh", False)):
        instance = ProgramInstance(with_lifted(net), data, 12, guide=guide, weights=weights)
        with instance.running(), torch.no_grad():
            starts = instance.program.current_guide.median(*data)
        assert torch.allclose(starts["net$$$weight"], net.weight, atol=1e-6) == equal
        assert not (starts["net$$$bias"] == 0).any()


def test_removed_weights_cannot_be_kept() -> None:
    class Regression(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = PyroModule[nn.Linear](3, 1)
            self.layer.weight = PyroSample(dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            mean = self.layer(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    data, program = (torch.randn(12, 3), Y), Program.of(Regression())
    with pytest.warns(UserWarning, match=r"no weights to keep for layer\.weight: Pyro removed them when they became a"):
        svi(program, data, epochs=1, guide="normal", weights="keep", progress=False)
    svi(program, data, epochs=1, guide="normal", progress=False)


@pytest.mark.parametrize("guide", [AutoGaussian, AutoStructured], ids=lambda x: x.__name__)
def test_sites_of_a_network_have_names_of_their_own(guide: Any) -> None:
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    network = BayesianNeuralNetwork(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)))
    posterior = svi(network, (x, x.sum(1)), guide=guide, steps=2, progress=False, compile=False)
    assert {"0.weight", "0.weight.scale"} <= posterior.sample(x, draws=2).keys()
    assert type(AutoGaussian(lambda: None)) is AutoGaussianDense  # Pyro's own


@pytest.mark.parametrize(
    "guide",
    [
        AutoNormalMessenger,
        AutoHierarchicalNormalMessenger,
        AutoRegressiveMessenger,
        functools.partial(AutoStructured, conditionals="normal"),
        functools.partial(AutoLowRankMultivariateNormal, rank=1),
    ],
)
def test_a_class_of_messengers_and_a_partial_class_make_guides(guide: Any) -> None:
    def model(y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(w, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.ones(3)
    with RandomStream(0).drawing():
        made = svi(Program.of(model, guide), y, steps=5, progress=False, compile=False)
        given = svi(Program.of(model), y, guide=guide, steps=5, progress=False, compile=False)
        own = svi(Program.of(model, guide(model)), y, steps=5, progress=False, compile=False)
    draws = [posterior.sample(y, draws=3)["z"] for posterior in (made, given, own)]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])
