"""Penalties of a program: in the loss, in no bound."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from uncompiled import replace_compiler

import deepprob as dp
from deepprob.inference import svi
from deepprob.programs import Program, penalize

Y = torch.tensor([1.0, 3.0])


def program(name: str = "size") -> Program:
    def model(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        penalize(name, loc.square() / 2)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y / 2, 0.5**0.5))

    return Program.of(model, guide, data_plate="data")


@pytest.mark.parametrize("objective", ["elbo", "iwae", dp.objectives.ELBO(particles=3)])
def test_a_fit_minimizes_bound_and_penalty_and_records_the_penalty(objective: str | dp.objectives.Objective) -> None:
    posterior = svi(program(), Y, steps=3, objective=objective, compile=False)
    size = posterior.history.steps["size"]
    assert size[0] == 0.0 < size[-1] < 1.0
    assert posterior.history.steps["elbo"][-1] < 0


def test_evidence_does_not_contain_the_penalty() -> None:
    posterior = svi(program(), Y, steps=200, optimizer=dp.Optimizer(learning_rate=0.1), compile=False)
    loc = posterior.parameters()["loc"]
    exact = dist.Normal(loc, 2**0.5).log_prob(Y)
    assert float(loc) > 0.3
    found = posterior.log_evidence(Y, particles=20_000)
    assert torch.allclose(found, exact, atol=0.05)


def test_a_traced_fit_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_compiler(monkeypatch)
    traced, eager = (svi(program(), Y, steps=20, compile=c, progress=False) for c in (True, False))
    assert traced.config["compiled"] and not eager.config["compiled"]
    assert traced.history.steps["size"] == pytest.approx(eager.history.steps["size"], abs=1e-6)


def test_a_penalty_is_one_number() -> None:
    with pytest.raises(ValueError, match=r"penalty 'size' must be a tensor of one number; got \(2,\)\. Take its mean"):
        penalize("size", torch.zeros(2))
    with pytest.raises(ValueError, match=r"got float"):
        penalize("size", 1.0)  # type: ignore[arg-type]


def test_a_penalty_has_a_name_of_its_own() -> None:
    with pytest.raises(ValueError, match=r"penalty 'elbo' has the name of a term of the objective\. Rename it\."):
        svi(program("elbo"), Y, steps=1, compile=False)
