"""The contract of every registered objective.

Averages are compared in standard errors: z < 4.5 is exceeded by chance once in 300 000 comparisons. Seeds are fixed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from uncompiled import replace_compiler

from deepprob.engine.random import RandomStream
from deepprob.fitting.gradients import loss_and_gradients
from deepprob.fitting.objectives import OBJECTIVES, Beta, Objective, Terms, objective_named
from deepprob.inference import svi
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program
from deepprob.programs.run import Run

Z = 4.5
X = torch.linspace(-2.0, 3.0, 12)


class Codes(Program):
    """A normal code for every row; x is N(loc, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.3))
        self.slope, self.shift = nn.Parameter(torch.tensor(0.2)), nn.Parameter(torch.tensor(0.1))
        self.log_scale = nn.Parameter(torch.tensor(-0.2))

    def model(self, x: Tensor) -> None:
        with self.data_plate(x):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with self.data_plate(x):
            pyro.sample("z", dist.Normal(self.slope * x + self.shift, self.log_scale.exp()))


@pytest.fixture(params=sorted(OBJECTIVES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def objective(name: str) -> Objective:
    return objective_named(name)


@pytest.fixture
def instance(device: torch.device) -> Iterator[ProgramInstance]:
    made = ProgramInstance(Codes(), (X,), len(X), device=device)
    with made.running():
        yield made


def of_seed(
    objective: Objective, instance: ProgramInstance, seed: int, kl_weight: float | Tensor = 1.0
) -> tuple[Tensor, Terms, list[Tensor]]:
    """Loss, terms and a gradient for every parameter."""
    x, rows = X.to(instance.device), torch.arange(len(X), device=instance.device)
    with RandomStream(seed, instance.device).drawing():
        return loss_and_gradients(instance, objective, list(instance.parameters().values()), (x,), rows, kl_weight)


def test_loss_terms_and_gradients(objective: Objective, instance: ProgramInstance) -> None:
    loss, terms, gradients = of_seed(objective, instance, 0)
    assert loss.shape == () and bool(torch.isfinite(loss))
    assert "elbo" in terms
    for term in terms.values():
        assert term.shape == () and bool(torch.isfinite(term)) and not term.requires_grad
    for name, gradient in zip(instance.parameters(), gradients, strict=True):
        assert bool(torch.isfinite(gradient).all() & (gradient != 0).any()), name


def test_description_is_json(name: str, objective: Objective) -> None:
    described = objective.describe()
    assert described["name"] == name
    assert json.loads(json.dumps(described)) == described


def test_seeded_calls_are_equal(objective: Objective, instance: ProgramInstance) -> None:
    first, again, other = (of_seed(objective, instance, seed) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert all(torch.equal(value, again[1][term]) for term, value in first[1].items())
    assert all(torch.equal(*pair) for pair in zip(first[2], again[2], strict=True))


def test_loss_and_elbo_bound_the_evidence(objective: Objective, instance: ProgramInstance) -> None:
    evidence = float(dist.Normal(0.3, math.sqrt(2)).log_prob(X).mean())
    found = [of_seed(objective, instance, seed) for seed in range(200)]
    for draws in ([-loss for loss, _, _ in found], [terms["elbo"] for _, terms, _ in found]):
        bounds = torch.stack(draws)
        assert float(bounds.mean()) <= evidence + Z * float(bounds.std()) / math.sqrt(len(bounds))
    elbo = torch.stack([terms["elbo"] for _, terms, _ in found]).mean()
    q, p = dist.Normal(0.2 * X + 0.1, math.exp(-0.2)), dist.Normal(0.3, 1.0)
    likelihood = dist.Normal(q.loc, 1.0).log_prob(X) - q.scale**2 / 2
    assert float(elbo) == pytest.approx(float((likelihood - torch.distributions.kl_divergence(q, p)).mean()), abs=0.05)


def test_kl_weight_changes_the_loss_and_no_term(objective: Objective, instance: ProgramInstance) -> None:
    weights = torch.tensor([1.0, 0.5], device=instance.device)
    full, half = (of_seed(objective, instance, 0, weight) for weight in weights)
    assert float(full[0]) != float(half[0])
    assert {n: float(v) for n, v in half[1].items()} == pytest.approx({n: float(v) for n, v in full[1].items()})


def test_loss_does_not_depend_on_the_batch_size(objective: Objective) -> None:
    """With equal rows and an exact guide, the bound is the log evidence of one row for every batch size.

    The loss is the negative bound, except with another weight of the KL.
    """

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    program, evidence = Program.of(model, guide, data_plate="data"), dist.Normal(0.0, math.sqrt(2)).log_prob(X[3])
    losses = []
    for size in (400, 1200):
        with RandomStream(0).drawing():
            loss, terms = objective(Run(program, (X[3].expand(size),), torch.arange(size), 1200))
        bound = terms["elbo"] if isinstance(objective, Beta) else -loss
        assert float(bound) == pytest.approx(float(evidence), abs=0.15)  # a closed form of the KL leaves some noise
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], abs=0.3)


def test_svi_accepts_every_objective(name: str, objective: Objective) -> None:
    posterior = svi(Codes(), X, objective=name, epochs=4, batch_size=5, held_out=X, compile=False)
    steps = posterior.history.steps
    assert steps.keys() >= objective(Run(Codes(), (X,), torch.arange(12), 12))[1].keys()
    assert all(math.isfinite(value) for column in steps.values() for value in column)
    assert posterior.config["objective"] == objective.describe()


def check_compiled(name: str) -> None:
    """`svi` compares a compiled step with an eager one on the same noise, and warns of a difference."""
    compiled, eager = (
        svi(Codes(), X, objective=name, epochs=4, batch_size=5, compile=compile, progress=False)
        for compile in (True, False)
    )
    assert compiled.config["compiled"] and not eager.config["compiled"]
    assert compiled.history.steps.keys() == eager.history.steps.keys()


def test_traced_steps_equal_eager_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_compiler(monkeypatch)
    check_compiled(name)


@pytest.mark.slow
def test_compiled_steps_equal_eager_steps(name: str) -> None:
    check_compiled(name)
