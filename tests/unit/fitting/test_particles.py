"""Objectives with several particles, on programs that do not broadcast over a leading axis of particles."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.fitting.elbo import ELBO
from deepprob.fitting.importance_weighted import IWAE
from deepprob.fitting.objectives import Objective
from deepprob.inference import svi
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program
from deepprob.programs.run import Run

G = torch.Generator().manual_seed(0)
X = torch.randn(40, 3, generator=G)
Y = X @ torch.tensor([1.0, -2.0, 0.5]) + 0.5 * torch.randn(40, generator=G)
WORDS = "the particles run one by one"


def program_with(mean: Callable[[Tensor, Tensor], Tensor]) -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean(x, w), 0.5), obs=y)

    return Program.of(model, "normal", data_plate="data")


def broadcasting(x: Tensor, w: Tensor) -> Tensor:
    return (x * w.unsqueeze(-2)).sum(-1) if w.dim() > 1 and w.shape[-2] != 1 else (x * w).sum(-1)


@pytest.mark.parametrize("objective", [ELBO(particles=5), IWAE(particles=5)])
@pytest.mark.parametrize("mean", [lambda x, w: x @ w, lambda x, w: (x * w.sum()).sum(-1)])
def test_particles_run_one_by_one_if_the_program_does_not_broadcast(objective: Objective, mean: Any) -> None:
    """A sum over all weights broadcasts without an error, to another model."""
    with pytest.warns(UserWarning, match=WORDS):
        found = svi(program_with(mean), (X, Y), objective=objective, steps=800, progress=False)
    usual = svi(program_with(mean), (X, Y), steps=800, progress=False)
    one, other = (p.sample(X, Y, draws=4000)["w"] for p in (found, usual))
    if isinstance(objective, ELBO):
        assert torch.allclose(one.std(0), other.std(0), rtol=0.1)
    assert torch.allclose(one.mean(0), other.mean(0), atol=0.05)


@pytest.mark.parametrize("objective", [ELBO(particles=5), IWAE(particles=5)])
def test_a_program_that_broadcasts_runs_all_particles_at_once(objective: Objective) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = svi(program_with(broadcasting), (X, Y), objective=objective, steps=3, progress=False, compile=False)
    assert found.instance.stacks


def rough(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Poisson(2.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def rough_guide(y: Tensor) -> None:
    rate = pyro.param("rate", torch.tensor(1.5), constraint=dist.constraints.positive)
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Poisson(rate))


@pytest.mark.parametrize("objective", [ELBO(particles=4), IWAE(particles=4)])
@pytest.mark.parametrize(
    ("program", "data"),
    [(program_with(broadcasting), (X, Y)), (Program.of(rough, rough_guide, data_plate="data"), (Y.abs(),))],
)
def test_loss_and_gradient_have_the_same_mean_either_way(
    objective: Objective, program: Program, data: tuple[Tensor, ...]
) -> None:
    """Means of 400 evaluations; fails by chance once in 1000 seeds, and the seed is fixed."""
    with RandomStream(0).drawing():
        instance = ProgramInstance(program, data, 40)
    params = list(instance.parameters().values())
    found: dict[bool, Tensor] = {}
    for stacks in (True, False):
        values = []
        with instance.running(), RandomStream(1).drawing():
            for _ in range(400):
                run = Run(instance.program, data, torch.arange(40), 40, stacks=stacks)
                loss, terms = objective(run)
                gradients = torch.autograd.grad(loss, params)
                values.append(torch.cat([loss.detach()[None], terms["elbo"][None], *(g.flatten() for g in gradients)]))
        found[stacks] = torch.stack(values)
    error = (found[True].var(0) / 400 + found[False].var(0) / 400).sqrt()
    assert ((found[True].mean(0) - found[False].mean(0)).abs() <= 3.9 * error + 1e-6).all()
    assert torch.allclose(found[True].std(0), found[False].std(0), rtol=0.3, atol=1e-5)
