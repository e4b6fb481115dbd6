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


by_name: dict[str, nn.Module] = {}
in_order: list[nn.Module] = []
made_before: dict[str, nn.Module] = {"a": nn.Linear(1, 1)}


def into_a_dict(x: Tensor, y: Tensor | None = None) -> None:
    if "a" not in by_name:
        by_name["a"] = nn.Linear(1, 1)
    observe(pyro.module("net", by_name["a"]), x, y)


def into_a_list(x: Tensor, y: Tensor | None = None) -> None:
    if not in_order:
        in_order.append(nn.Linear(1, 1))
    observe(pyro.module("net", in_order[0]), x, y)


def into_a_closed_dict() -> Callable[..., None]:
    nets: dict[str, nn.Module] = {}

    def model(x: Tensor, y: Tensor | None = None) -> None:
        if "a" not in nets:
            nets["a"] = nn.Linear(1, 1)
        observe(pyro.module("net", nets["a"]), x, y)

    return model


def from_a_dict(x: Tensor, y: Tensor | None = None) -> None:
    if "b" not in made_before:
        made_before["b"] = nn.Linear(1, 1)
    first, second = (pyro.module(name, made_before[name]) for name in ("a", "b"))
    observe(lambda x: first(x) + second(x), x, y)


@pytest.mark.parametrize(
    ("model", "name"),
    [(into_a_dict, r"by_name\['a'\]"), (into_a_list, r"in_order\[0\]"), (into_a_closed_dict(), r"nets\['a'\]")],
)
def test_refuses_networks_that_a_run_puts_into_a_container(model: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"a run of the program made the network {name}, in a list or dict that is"):
        svi(Program.of(model, no_guide), (X, Y), steps=2, progress=False)


def test_networks_in_a_global_dict_are_copied(tmp_path: Path) -> None:
    before = made_before["a"].weight.clone()  # type: ignore[operator]
    found = svi(Program.of(from_a_dict, no_guide), (X, Y), steps=100, progress=False)
    assert torch.equal(made_before["a"].weight, before)  # type: ignore[arg-type]
    assert list(made_before) == ["a"]
    assert {"a.weight", "b.weight"} <= found.parameters().keys()
    assert not torch.equal(found.parameters()["a.weight"], before)
    found.save(tmp_path / "fit")
    again = Posterior.load(tmp_path / "fit", program=Program.of(from_a_dict, no_guide))
    draws = [posterior.predict(X, draws=3, seed=1).draws for posterior in (found, again)]
    assert torch.equal(*draws)
