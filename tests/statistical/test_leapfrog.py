"""A leapfrog step with a Metropolis test, which no fit uses, compiled by the engine's loop."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.engine import Loop, Noise, PerStep, Step, StepData
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program
from deepprob.programs.tracing import LogDensity, log_density

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "eight_schools.json").read_text())["summary"]
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
CHAINS, LEAPFROGS = 64, 3

Density = Callable[[Tensor, Any], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "compiled"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield


def hamiltonian_step(density: Density) -> Step:
    """New momenta, several leapfrogs and a Metropolis test for all chains; the knob is the step size."""

    def step(carry: dict[str, Tensor], data: StepData, _: Noise, knobs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        q, value, gradient = carry["q"], carry["value"], carry["gradient"]
        p = momentum = torch.randn_like(q)  # the loop lifts draws to inputs
        new, value_new, gradient_new = q, value, gradient
        for _ in range(LEAPFROGS):
            p = p + 0.5 * knobs[0] * gradient_new
            new = new + knobs[0] * p
            value_new, gradient_new = density(new, data.fixed)
            p = p + 0.5 * knobs[0] * gradient_new
        gain = value_new - value - 0.5 * (p.square().sum(1) - momentum.square().sum(1))
        taken = torch.rand(len(q)).log() < gain
        carry = {
            "q": torch.where(taken.unsqueeze(1), new, q),
            "value": torch.where(taken, value_new, value),
            "gradient": torch.where(taken.unsqueeze(1), gradient_new, gradient),
        }
        return carry, {"q": carry["q"], "accepted": taken.to(q.dtype).mean()}

    return step


def sampled(density: Density, fixed: Any, dim: int, size: float, steps: int) -> tuple[Tensor, Loop]:
    """Positions ``(steps, C, D)`` by native code, from standard normal starts, without the first half."""
    q = torch.randn(CHAINS, dim, generator=torch.Generator().manual_seed(0))
    value, gradient = density(q, fixed)
    carry = {"q": q, "value": value, "gradient": gradient}
    per_step = PerStep(torch.zeros(1, 1, dtype=torch.long), torch.full((steps, 1), size))
    loop = Loop(hamiltonian_step(density), carry, per_step, fixed, capacity=steps)
    loop.compile()
    assert loop.is_compiled
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    noise = Noise(*loop.noise.draw(steps, generators, q.device))
    last, record = loop(carry, per_step, fixed, noise)
    assert torch.equal(last["q"], record["q"][-1])
    assert 0.6 < float(record["accepted"].mean()) < 0.995
    return record["q"][steps // 2 :].clone(), loop


def of_program(program: Program, data: tuple[Tensor, ...]) -> tuple[Density, Any, LogDensity]:
    instance = ProgramInstance(program, data, len(data[0]))
    found = log_density(instance, data, chains=CHAINS)
    return lambda q, fixed: found.function(q, *fixed), (found.tensors, found.batch), found


def near(draws: Tensor, mean: float, sd: float, allowed: float = 0.0) -> bool:
    """Whether the mean of draws ``(steps, C)`` is within 4.5 standard errors, from the spread of the chains' means.

    A correct sampler fails once in 100 000.
    """
    error = float(draws.mean(0).std()) / CHAINS**0.5
    return abs(float(draws.mean()) - mean) < 4.5 * (error**2 + allowed**2) ** 0.5 < 0.3 * sd


def by_autograd(log_p: Callable[[Tensor], Tensor]) -> Density:
    """A density written by hand, with its gradient."""

    def density(q: Tensor, fixed: Any) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            q = q.detach().requires_grad_()
            value = log_p(q)
            (gradient,) = torch.autograd.grad(value.sum(), q)
        return value.detach(), gradient

    return density


def test_native_code_samples_a_gaussian() -> None:
    """A conjugate posterior, N(sum(y) / 5, 1 / 5), and a correlated prior on two more coordinates."""
    tril = torch.tensor([[1.0, 0.0], [0.8, 0.6]])

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("pair", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    y = torch.tensor([1.0, 2.0, 0.5, 3.0])
    density, fixed, found = of_program(Program.of(model, "normal"), (y,))
    draws, loop = sampled(density, fixed, found.size, 0.35, 1000)
    assert near(draws[..., 0], float(y.sum()) / 5, 0.2**0.5)
    assert near((draws[..., 0] - float(y.sum()) / 5).square(), 0.2, 0.3)
    assert near(draws[..., 1] * draws[..., 2], 0.8, 1.3)
    assert loop.operations > 0


@pytest.mark.slow
def test_native_code_samples_eight_schools_with_few_operations(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def model(sigma: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)

    def by_hand(q: Tensor) -> Tensor:
        mu, log_tau, z = q[:, 0], q[:, 1], q[:, 2:]
        tau = log_tau.exp()
        priors = -0.5 * (mu / 5).square() - torch.log1p((tau / 5).square()) + log_tau - 0.5 * z.square().sum(1)
        return priors - 0.5 * ((Y - mu.unsqueeze(1) - tau.unsqueeze(1) * z) / SIGMA).square().sum(1)

    density, fixed, found = of_program(Program.of(model, "normal"), (SIGMA, Y))
    draws, loop = sampled(density, fixed, found.size, 0.25, 3000)
    values = [found.values(q) for q in draws[::25]]
    for name in ("mu", "tau"):
        golden = GOLDEN[name]
        assert near(torch.stack([v[name] for v in values]), golden["mean"], golden["sd"], golden["mcse_mean"]), name
    q = torch.randn(CHAINS, 10)
    hand = by_autograd(by_hand)
    difference = density(q, fixed)[0] - hand(q, None)[0]
    assert float(difference.std()) < 1e-4  # the density by hand omits a constant
    assert torch.allclose(density(q, fixed)[1], hand(q, None)[1], atol=1e-4)
    carry = {"q": q, "value": difference, "gradient": q}
    per_step = PerStep(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))
    by_hands = Loop(hamiltonian_step(hand), carry, per_step, (), capacity=4).operations
    with capsys.disabled():
        print(f"\noperations of a step of {LEAPFROGS} leapfrogs: {loop.operations}, by hand {by_hands}")
    assert loop.operations < 3 * by_hands
