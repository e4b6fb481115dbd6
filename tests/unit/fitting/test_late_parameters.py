"""Parameters and networks that only a later run of a program shows: they join the fit, and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import transform_to
from torch.distributions.transforms import ExpTransform

from deepprob.fitting.callbacks import Checkpoint
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import extend, svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

Y = torch.tensor([0.5, 2.0, -1.0, 1.5])
LATE = r"the first run of the program did not register 'scale'; a later run did, so the fit trains it from there"


def late_scale(first: int = 5, constraint: Any = constraints.positive) -> Program:
    """A program that registers the parameter ``scale`` from some run on."""
    runs = [0]
    start = torch.tensor(1.0)

    def model(y: Tensor) -> None:
        runs[0] += 1
        loc, scale = pyro.param("loc", torch.tensor(0.0)), torch.tensor(1.0)
        if runs[0] >= first:
            scale = pyro.param("scale", start, constraint=constraint)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, scale), obs=y)

    return Program.of(model, lambda y: None)


class Late(nn.Module):
    """A model with a parameter in training mode only, in which the first run is not."""

    def forward(self, y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0)) if self.training else torch.tensor(0.0)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, scale.exp()), obs=y)


@pytest.mark.parametrize("optimizer", ["adam", "adagrad", Optimizer(learning_rate=0.1, average=0.9, accumulate=2)])
def test_a_late_parameter_is_trained(optimizer: Any) -> None:
    optimizer = optimizer if isinstance(optimizer, Optimizer) else Optimizer(optimizer, learning_rate=0.1)
    with pytest.warns(UserWarning, match=LATE):
        posterior = svi(late_scale(), Y, steps=300, optimizer=optimizer, progress=False)
    found = posterior.parameters()
    assert float(found["loc"]) == pytest.approx(float(Y.mean()), abs=0.1)
    assert float(found["scale"]) == pytest.approx(float(Y.std(correction=0)), abs=0.1)


def test_a_parameter_that_joins_while_compiling_makes_the_fit_eager() -> None:
    with pytest.warns(UserWarning, match=LATE):
        posterior = svi(Program.of(Late(), lambda y: None), Y, steps=20, compile=True, progress=False)
    assert not posterior.config["compiled"]
    assert float(posterior.parameters()["scale"]) != 1.0


@pytest.mark.filterwarnings("ignore:the first run of the program")
@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_a_fit_resumes_after_a_parameter_joined(tmp_path: Path, optimizer: str) -> None:
    class Stop(Checkpoint):
        def epoch_end(self, fit: Any) -> None:
            super().epoch_end(fit)
            fit.stop = fit.step == 6

    def fit(*callbacks: Any) -> dict[str, Tensor]:
        options: dict[str, Any] = {"steps": 12, "optimizer": optimizer, "callbacks": callbacks}
        return svi(Program.of(Late(), lambda y: None), Y, progress=False, **options).instance.tensors()

    whole, _ = fit(), fit(Stop(tmp_path / "c"))
    resumed = fit(Checkpoint(tmp_path / "c"))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], x) for name, x in whole.items())


@pytest.mark.filterwarnings("ignore:the first run of the program")
def test_a_late_parameter_is_saved(tmp_path: Path) -> None:
    posterior = svi(late_scale(), Y, steps=20, progress=False)
    posterior.save(tmp_path / "p")
    loaded = Posterior.load(tmp_path / "p", program=late_scale())
    assert {n: float(x) for n, x in loaded.parameters().items()} == {
        n: float(x) for n, x in posterior.parameters().items()
    }
    loaded.save(tmp_path / "q")


@pytest.mark.filterwarnings("ignore:the first run of the program")
def test_a_late_network_is_trained_and_saved(tmp_path: Path) -> None:
    net = nn.Linear(1, 1)

    def program() -> Program:
        runs = [0]

        def model(y: Tensor) -> None:
            runs[0] += 1
            loc = pyro.param("loc", torch.tensor(0.0))
            if runs[0] >= 5:
                loc = loc + pyro.module("net", net)(y.unsqueeze(-1)).squeeze(-1)
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

        return Program.of(model, lambda y: None)

    before = net.weight.clone()
    posterior = svi(program(), Y, steps=20, progress=False)
    assert torch.equal(net.weight, before)
    assert not torch.equal(posterior.parameters()["net.weight"], before)
    posterior.save(tmp_path / "p")
    loaded = Posterior.load(tmp_path / "p", program=program())
    assert torch.equal(loaded.parameters()["net.weight"], posterior.parameters()["net.weight"])


class OwnPositive(constraints.Constraint):
    """A constraint of the user's own."""

    def check(self, value: Tensor) -> Tensor:
        return value > 0


transform_to.register(OwnPositive, lambda constraint: ExpTransform())


@pytest.mark.filterwarnings("ignore:the first run of the program")
def test_a_checkpoint_refuses_a_constraint_without_a_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parameter 'scale', which the first run did not register, cannot be saved"):
        svi(late_scale(constraint=OwnPositive()), Y, steps=20, progress=False, callbacks=[Checkpoint(tmp_path / "c")])


@pytest.mark.filterwarnings("ignore:the first run of the program")
def test_a_network_that_a_later_run_made_is_not_saved(tmp_path: Path) -> None:
    def program() -> Program:
        runs, net = [0], None

        def model(y: Tensor) -> None:
            nonlocal net
            runs[0] += 1
            loc = pyro.param("loc", torch.tensor(0.0))
            if runs[0] >= 5:
                net = net or nn.Linear(1, 1)
                loc = loc + pyro.module("net", net)(y.unsqueeze(-1)).squeeze(-1)
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

        return Program.of(model, lambda y: None)

    posterior = svi(program(), Y, steps=20, progress=False)
    with pytest.raises(ValueError, match="cannot be extended: a later run than the first made a network"):
        extend(posterior, Y, steps=2)
    assert "net.weight" in posterior.parameters()
    message = r"'net.weight', 'net.bias' cannot be saved: a later run than the first made their network"
    with pytest.raises(ValueError, match=message):
        posterior.save(tmp_path / "p")
    with pytest.raises(ValueError, match=message):
        svi(program(), Y, steps=20, progress=False, callbacks=[Checkpoint(tmp_path / "c")])
