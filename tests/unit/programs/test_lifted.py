"""Lifted networks: parts of any Pyro program, whose weights are sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.func import functional_call

from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import lift
from deepprob.networks.dense import MLP
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.lifted import LiftedNetwork
from deepprob.programs.program import Program


def network(outputs: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, outputs))


def rows(count: int = 30) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    return x, x[:, 0] - 0.5 * x[:, 1]


def regression(**options: Any) -> tuple[Any, LiftedNetwork]:
    net = lift(network(), name="net", **options)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.5))
        mean = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            value: Tensor = pyro.sample("y", dist.Normal(mean, noise), obs=y)
        return value

    return model, net


def sites(fn: Any, *args: Any) -> dict[str, Any]:
    trace = poutine.trace(fn).get_trace(*args)
    return {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and type(s["fn"]).__name__ != "_Subsample"}


def test_sites_have_the_prefix_and_the_original_does_not_change() -> None:
    net = network()
    before = [p.clone() for p in net.parameters()]
    found = sites(lift(net, name="f"), torch.zeros(3, 2))
    assert list(found) == ["f.0.weight.scale", "f.2.weight.scale", "f.0.weight", "f.0.bias", "f.2.weight", "f.2.bias"]
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(before, net.parameters(), strict=True))
    plain = sites(lift(net, "normal", 0.5), torch.zeros(3, 2))
    assert list(plain) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert (plain["0.bias"]["fn"].stddev == 0.5).all()


def test_two_calls_of_one_run_share_the_weights() -> None:
    f, x = lift(network(), name="f"), rows()[0]

    def model() -> tuple[Tensor, Tensor]:
        return f(x), f(x[:5])

    trace = poutine.trace(model).get_trace()
    first, second = trace.nodes["_RETURN"]["value"]
    torch.testing.assert_close(first[:5], second)
    other = poutine.trace(model).get_trace().nodes["_RETURN"]["value"][0]
    assert not torch.allclose(first, other)
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace().nodes["_RETURN"]["value"]
    torch.testing.assert_close(replayed, (first, second))


@pytest.mark.parametrize("leading", [(), (4,), (3, 4)])
def test_outputs_follow_draws_of_weights_and_of_inputs(leading: tuple[int, ...]) -> None:
    net = network(3)
    f = lift(net, prior="normal")
    weights = {n: torch.randn(4, 1, *p.shape) for n, p in net.named_parameters()}
    x = torch.randn(*leading, 7, 2)
    out = f.run(weights, x)
    assert out.shape == (*(leading or (4,)), 7, 3)
    for index in range(4):
        one = {n: w[index, 0] for n, w in weights.items()}
        at = x if not leading else x[..., index, :, :]
        expected = functional_call(net, one, (at,))
        torch.testing.assert_close(out[..., index, :, :], expected, rtol=1e-4, atol=1e-5)
    fixed = {n: w[0, 0] for n, w in weights.items()}
    torch.testing.assert_close(f.run(fixed, x), functional_call(net, fixed, (x,)), rtol=1e-4, atol=1e-5)


def test_a_leading_plate_of_draws_surrounds_the_call() -> None:
    f, x = lift(network(), name="f"), rows()[0]
    with pyro.plate("draws", 5, dim=-2):
        out = poutine.trace(f).get_trace(x).nodes["_RETURN"]["value"]
    assert out.shape == (5, 30, 1) and not torch.allclose(out[0], out[1])


def test_a_call_inside_the_plate_over_rows_is_refused() -> None:
    f, x = lift(network(), name="f"), rows()[0]

    def model() -> None:
        with pyro.plate("data", len(x)):
            f(x)

    with pytest.raises(
        ValueError, match=r"network 'f' is called inside of plate 'data'.*weights = net\.draw\(\) before"
    ):
        model()

    def mended() -> Tensor:
        weights = f.draw()
        with pyro.plate("data", len(x)):
            return f.run(weights, x)

    assert mended().shape == (30, 1)


@pytest.mark.parametrize("guide", ["normal", "map", "multivariate_normal"])
@pytest.mark.parametrize("batch_size", [None, 10])
def test_it_works_inside_any_program(guide: str, batch_size: int | None, tmp_path: Path) -> None:
    model, net = regression()
    x, y = rows()
    program = Program.of(model, guide, data_plate="data")
    posterior = svi(
        program,
        (x, y),
        epochs=300,
        batch_size=batch_size,
        optimizer=Optimizer(learning_rate=2e-2),
        seed=0,
        progress=False,
    )
    assert set(posterior.latent_sites) == {"noise", *net.weights.sites}
    prediction = posterior.predict(x, draws=50)
    assert (prediction.mean - y).square().mean() < 0.1 * y.var()
    posterior.save(tmp_path / "saved")
    again = Posterior.load(tmp_path / "saved", Program.of(regression()[0], guide, data_plate="data"))
    torch.testing.assert_close(again.predict(x, draws=50).mean, prediction.mean)


def test_guides_by_name_start_at_the_network() -> None:
    model, _ = regression()
    posterior = svi(
        Program.of(model, "map", data_plate="data"),
        rows(),
        steps=1,
        optimizer=Optimizer(learning_rate=1e-12),
        progress=False,
    )
    torch.testing.assert_close(posterior.sample(draws=1)["net.0.weight"][0], network()[0].weight.detach())


def test_a_guide_by_hand_can_draw_the_weights() -> None:
    model, net = regression()

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        loc = pyro.param("loc", torch.tensor(-1.0))
        pyro.sample("noise", dist.LogNormal(loc, 0.1))
        net.guide()

    x, y = rows()
    program = Program.of(model, guide, data_plate="data")
    posterior = svi(
        program, (x, y), epochs=400, batch_size=None, optimizer=Optimizer(learning_rate=2e-2), seed=0, progress=False
    )
    assert (posterior.predict(x, draws=50).mean - y).square().mean() < 0.1 * y.var()
    draws = posterior.sample(draws=50)["net.0.weight"]
    assert draws.std(0).max() > 1e-3 and not torch.allclose(draws.mean(0), network()[0].weight, atol=0.05)


def test_layers_that_are_not_random_are_trained() -> None:
    model, _ = regression(layers="last")
    x, y = rows()
    program = Program.of(model, "normal", data_plate="data")
    posterior = svi(
        program, (x, y), epochs=100, batch_size=None, optimizer=Optimizer(learning_rate=2e-2), seed=0, progress=False
    )
    assert set(posterior.latent_sites) == {"noise", "net.2.weight.scale", "net.2.weight", "net.2.bias"}
    trained = {n: v for n, v in posterior.parameters().items() if n.endswith("0.weight")}
    assert len(trained) == 1 and not torch.allclose(next(iter(trained.values())), network()[0].weight, atol=1e-3)


def test_images_need_their_number_of_axes() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1))
    f = lift(net, event_dim=3)
    assert poutine.trace(f).get_trace(torch.zeros(5, 1, 4, 4)).nodes["_RETURN"]["value"].shape == (5, 1)
    with pyro.plate("draws", 6, dim=-2):
        assert f.run(f.draw(), torch.zeros(6, 5, 1, 4, 4)).shape == (6, 5, 1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: lift("net"), TypeError, r"net must be a torch\.nn\.Module; got str"),
        (lambda: lift(network(), name=3), TypeError, "name must be a string, the prefix of the sites; got 3"),
        (lambda: lift(network(), "norml"), ValueError, "unknown prior 'norml'. Did you mean 'normal'"),
        (lambda: lift(network(), prior_scale=-1.0), ValueError, "prior_scale must be a positive number"),
        (lambda: lift(nn.LazyLinear(1)), ValueError, "net has lazy layers without sizes"),
        (
            lambda: lift(MLP(2, 1), layers="head"),
            ValueError,
            "layers names 'head', .* Choose from its layers: layers.0",
        ),
    ],
)
def test_wrong_settings_raise(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
