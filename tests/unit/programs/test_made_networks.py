"""Networks that a program makes in its first run: they are the fit's own, trained, saved and asked as in Pyro."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

X = torch.linspace(-1.0, 1.0, 12).unsqueeze(-1)
Y = 2.0 * X.squeeze(-1) + 1.0

net: Any = None


def observe(network: Any, x: Tensor, y: Tensor | None) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(network(x).squeeze(-1), 0.1), obs=y)


def no_guide(x: Tensor, y: Tensor | None = None) -> None:
    """Draws nothing."""


def global_network(x: Tensor, y: Tensor | None = None) -> None:
    global net
    if net is None:
        net = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.0))
    observe(pyro.module("net", net), x, y)


def made_elsewhere() -> Any:
    global net
    net = net or nn.Linear(1, 1)
    return net


def helped_network(x: Tensor, y: Tensor | None = None) -> None:
    observe(pyro.module("net", made_elsewhere()), x, y)


def closed_network() -> Callable[..., None]:
    inner: Any = None

    def model(x: Tensor, y: Tensor | None = None) -> None:
        nonlocal inner
        if inner is None:
            inner = nn.Linear(1, 1)
        observe(pyro.module("net", inner), x, y)

    return model


class Plain:
    """An object with a model."""

    net: Any = None

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        if self.net is None:
            self.net = nn.Linear(x.shape[1], 1)
        observe(pyro.module("net", self.net), x, y)


class Module(PyroModule):
    """A module that is a model."""

    net: Any

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        if not hasattr(self, "net"):
            self.net = PyroModule[nn.Linear](x.shape[1], 1)
        observe(self.net, x, y)


class Own(Program):
    """A program that makes its network."""

    net: Any

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        if not hasattr(self, "net"):
            self.net = nn.Linear(x.shape[1], 1)
        with self.data_plate(x):
            pyro.sample("y", dist.Normal(self.net(x).squeeze(-1), 0.1), obs=y)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """Draws nothing."""


MODELS: dict[str, Callable[[], Program]] = {
    "global": lambda: Program.of(global_network, no_guide),
    "helper": lambda: Program.of(helped_network, no_guide),
    "closure": lambda: Program.of(closed_network(), no_guide),
    "self": lambda: Program.of(Plain().model, no_guide),
    "module": lambda: Program.of(Module(), no_guide),
    "program": Own,
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_network_made_in_the_first_run(make: Callable[[], Program], tmp_path: Path) -> None:
    program = make()
    posterior, again = (
        svi(program, (X, Y), steps=400, batch_size=None, optimizer="adam", progress=False) for _ in "ab"
    )
    assert net is None
    (weight,) = (x for name, x in posterior.parameters().items() if name.endswith("weight"))
    assert 0.5 < float(weight) < 4.0
    for name, x in posterior.parameters().items():
        assert torch.equal(x, again.parameters()[name])
    posterior.save(tmp_path / "p")
    loaded = Posterior.load(tmp_path / "p", program=make())
    new = X[:5] + 0.5
    assert torch.equal(loaded.predict(new, draws=3).mean, posterior.predict(new, draws=3).mean)
    assert net is None
