"""Programs that take gradients themselves, such as the residual of a differential equation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

X = torch.linspace(0.0, 1.0, 9).unsqueeze(-1)
Y = torch.exp(-X.squeeze(-1))


def decay() -> Program:
    """The rate k of ``u' = -k u``, with a network for u."""
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("net", net)
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        x = x.requires_grad_()
        u = net(x).squeeze(-1)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(u, 0.1), obs=y)
            pyro.sample("residual", dist.Normal(slope.squeeze(-1) + rate * u, 0.1), obs=torch.zeros(len(x)))

    return Program.of(model, "normal", data_plate="data")


def matrix_of_slopes() -> Program:
    """A gradient with respect to a latent site."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(1, 1), 1.0).to_event(2)).clone()
        w = w if w.requires_grad else w.requires_grad_()
        energy = ((x @ w) ** 2).sum() / 2
        (force,) = torch.autograd.grad(energy, w, create_graph=True)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x @ w).squeeze(-1) + 0.01 * force.squeeze(), 0.1), obs=y)

    return Program.of(model, "normal")


class Potential(PyroModule):
    """A random network, whose slope is observed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = PyroModule[nn.Linear](1, 1)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(torch.tanh(self.layer(x)).sum(), x, create_graph=True)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope.squeeze(-1), 0.1), obs=y)


PROGRAMS: dict[str, Callable[[], Program]] = {
    "residual": decay,
    "latent": matrix_of_slopes,
    "module": lambda: Program.of(Potential(), "normal"),
}


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("make", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_that_takes_gradients(
    make: Callable[[], Program], compile: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from uncompiled import replace_compiler

    replace_compiler(monkeypatch)
    posterior = svi(make(), (X, Y), steps=60, batch_size=None, compile=compile, progress=False)
    assert posterior.config["compiled"] == compile
    assert not X.requires_grad
    site = "y"
    found: dict[str, Any] = dict(posterior.sample(draws=5))
    found["predict"] = posterior.predict(X[:4], draws=5, site=site).mean
    found["score"] = posterior.log_likelihood(X, Y, draws=5)
    found["evidence"] = posterior.log_evidence(X, Y, particles=5)
    for name, value in found.items():
        assert not value.requires_grad, name
        assert bool(torch.isfinite(value).all()), name
    posterior.to_arviz(X, Y, draws=5)
    posterior.save(tmp_path / "p")
    loaded = Posterior.load(tmp_path / "p", program=make())
    assert torch.equal(loaded.predict(X[:4], draws=5, site=site).mean, found["predict"])


def test_a_draw_sees_its_own_gradient() -> None:
    posterior = svi(matrix_of_slopes(), (X, Y), steps=20, progress=False)
    weights = posterior.sample(draws=7, seed=3)["w"].reshape(7)
    prediction = posterior.predict(X, draws=7, seed=3)
    force = 0.01 * (X**2).sum() * weights
    means = weights.unsqueeze(-1) * X.squeeze(-1) + force.unsqueeze(-1)
    expected = dist.Normal(means, 0.1).log_prob(Y).logsumexp(0) - torch.tensor(7.0).log()
    assert torch.allclose(prediction.log_prob(Y), expected, atol=1e-4)


def test_a_gradient_that_does_not_exist_is_explained() -> None:
    def model(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        torch.autograd.grad(y.sum(), loc)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"the program cannot run on rows of .*does not require grad"):
        svi(Program.of(model, lambda y: None), torch.tensor(1.0).expand(3), steps=2, progress=False)
