"""The importance-weighted bound and its gradients against quadrature, enumeration and known evidences.

Monte Carlo averages are compared in standard errors: |z| < 4.5 fails by chance once in 150 000 comparisons, and
every seed is fixed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.fitting.objectives import IWAE
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program
from deepprob.programs.run import Run

Z = 4.5
X = torch.tensor([0.8, -1.3, 2.1], dtype=torch.float64)
NOISE = 0.7
PARALLEL = {"enumerate": "parallel"}

LogWeight = Callable[[Tensor], Tensor]
"""Log weight of a particle from its latent values on the last dimension."""


@pytest.fixture(autouse=True)
def _doubles() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def normal_nodes(count: int) -> tuple[Tensor, Tensor]:
    """Quadrature points and weights for averages over a standard normal."""
    points, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(points), torch.from_numpy(weights / math.sqrt(2 * math.pi))


def expected_bound(log_weights: Tensor, log_probs: Tensor, particles: int) -> Tensor:
    """E log mean_k w_k of K particles with G possible values each, by a sum over all G^K.

    Args:
        log_weights: Of each value, ``(G,)``.
        log_probs: Of each value, ``(G,)``.
        particles: K.
    """
    every = torch.tensor(list(itertools.product(range(len(log_weights)), repeat=particles)))
    bounds = log_weights[every].logsumexp(1) - math.log(particles)
    return (log_probs[every].sum(1).exp() * bounds).sum()


def draws_of(program: Program, data: tuple[Tensor, ...], objective: IWAE, repeats: int, **options: Any) -> list[Any]:
    """Losses and their terms under many seeds."""
    rows = torch.arange(len(data[0]))
    with RandomStream(0).drawing():
        return [objective(Run(program, data, rows, len(rows)), **options) for _ in range(repeats)]


def assert_mean(draws: Tensor, exact: Tensor) -> None:
    error = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - exact).abs() <= Z * error + 1e-9).all()), (draws.mean(0), exact, error)


def assert_gradient(
    program: Program,
    data: tuple[Tensor, ...],
    leaf: Tensor,
    objective: IWAE,
    bound: Tensor,
    repeats: int = 600,
    **options: Any,
) -> None:
    """The average gradient of the loss is that of the negative bound."""
    (wanted,) = torch.autograd.grad(-bound, leaf)
    losses = [loss for loss, _ in draws_of(program, data, objective, repeats, **options)]
    assert_mean(torch.stack([torch.autograd.grad(loss, leaf)[0] for loss in losses]), wanted)


# -- normal codes ---------------------------------------------------------------------------------------------------


def codes(settings: Tensor) -> Program:
    """A code for every row and an inexact guide; settings hold the model's mean and the guide's three parameters."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(settings[0], 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(settings[1] * x + settings[2], settings[3].exp()))

    return Program.of(model, guide, data_plate="data")


def off() -> Tensor:
    return torch.tensor([0.3, 0.4, 0.2, -0.2])


def exact(settings: Tensor) -> Tensor:
    """Settings at which the guide is the exact posterior."""
    precision = torch.tensor(1 + NOISE**-2)
    return torch.stack([settings[0], 1 - 1 / precision, settings[0] / precision, -0.5 * precision.log()])


def evidence(settings: Tensor, x: Tensor) -> Tensor:
    found: Tensor = dist.Normal(settings[0], math.sqrt(1 + NOISE**2)).log_prob(x)
    return found


def quadrature(settings: Tensor, x: Tensor, particles: int, weight: float = 1.0) -> Tensor:
    """The expected bound of all rows, per datum."""
    points, masses = normal_nodes({1: 40, 2: 40, 3: 20}[particles])
    total = torch.zeros(())
    for value in x:
        q = dist.Normal(settings[1] * value + settings[2], settings[3].exp())
        z = q.loc + q.scale * points
        kl = q.log_prob(z) - dist.Normal(settings[0], 1.0).log_prob(z)
        total = total + expected_bound(dist.Normal(z, NOISE).log_prob(value) - weight * kl, masses.log(), particles)
    return total / len(x)


@pytest.mark.parametrize("particles", [1, 2, 3])
def test_average_bound_matches_quadrature(particles: int) -> None:
    found = draws_of(codes(off()), (X,), IWAE(particles=particles), 600)
    wanted = quadrature(off(), X, particles)
    assert_mean(torch.stack([terms["iwae"] for _, terms in found]), wanted)
    assert_mean(torch.stack([-loss.detach() for loss, _ in found]), wanted)
    assert_mean(torch.stack([terms["elbo"] for _, terms in found]), quadrature(off(), X, 1))


def test_bound_grows_with_particles_and_reaches_the_evidence() -> None:
    bounds = [float(quadrature(off(), X, particles)) for particles in (1, 2, 3)]
    truth = float(evidence(off(), X).mean())
    assert bounds == sorted(bounds)
    x = X.repeat(1000)
    for particles in (10, 40, 160):
        ((_, terms),) = draws_of(codes(off()), (x,), IWAE(particles=particles), 1)
        bounds.append(float(terms["iwae"]))
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(truth, abs=0.01)
    assert bounds[0] < truth - 0.2


@pytest.mark.parametrize("particles", [1, 5])
def test_exact_posterior_gives_the_evidence_for_any_noise(particles: int) -> None:
    program = codes(exact(off()))
    for rows in (torch.arange(3), torch.tensor([2]), torch.tensor([1, 0])):
        _, terms = IWAE(particles=particles)(Run(program, (X[rows],), rows, 3))
        torch.testing.assert_close(terms["iwae"], evidence(off(), X[rows]).mean())
        torch.testing.assert_close(terms["elbo"], terms["iwae"])


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("particles", [1, 2, 3])
def test_reparameterized_gradient_matches_quadrature(particles: int, weight: float) -> None:
    settings = off().requires_grad_()
    bound = quadrature(settings, X, particles, weight)
    assert_gradient(codes(settings), (X,), settings, IWAE(particles=particles), bound, kl_weight=weight)


def test_minibatch_gradients_are_unbiased() -> None:
    """The gradients of rows, scaled by N / B, average to the gradient of all rows."""
    settings = off().requires_grad_()
    program, objective = codes(settings), IWAE(particles=2)
    (wanted,) = torch.autograd.grad(-quadrature(settings, X, 2), settings)
    with RandomStream(0).drawing():
        found = []
        for _ in range(400):
            losses = [objective(Run(program, (X[i : i + 1],), torch.tensor([i]), 3))[0] for i in range(3)]
            found.append(torch.autograd.grad(torch.stack(losses).mean(), settings)[0])
    assert_mean(torch.stack(found), wanted)


# -- score-function gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("particles", [1, 2, 4])
def test_score_function_gradient_of_coins_is_exact_on_average(particles: int, weight: float) -> None:
    logits = torch.tensor([0.4, -1.0], requires_grad=True)
    y = torch.tensor([1.2, -0.5])

    def model(y: Tensor) -> None:
        with pyro.plate("data", 2):
            b = pyro.sample("b", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(2 * b, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", 2):
            pyro.sample("b", dist.Bernoulli(logits=logits))

    bound = torch.zeros(())
    faces = torch.tensor([0.0, 1.0])
    for logit, value in zip(logits, y, strict=True):
        log_q = dist.Bernoulli(logits=logit).log_prob(faces)
        log_w = dist.Normal(2 * faces, 1.0).log_prob(value) - weight * (log_q - dist.Bernoulli(0.3).log_prob(faces))
        bound = bound + expected_bound(log_w, log_q, particles) / 2
    program = Program.of(model, guide, data_plate="data")
    assert_gradient(program, (y,), logits, IWAE(particles=particles), bound, kl_weight=weight)


def test_other_particles_are_a_baseline() -> None:
    logit, y = torch.tensor(0.4, requires_grad=True), torch.full((1,), 8.0)

    def model(y: Tensor) -> None:
        b = pyro.sample("b", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(0.1 * b, 1.0), obs=y)

    program = Program.of(model, lambda y: pyro.sample("b", dist.Bernoulli(logits=logit)))
    spread = {}
    for particles in (1, 10):
        losses = [loss for loss, _ in draws_of(program, (y,), IWAE(particles=particles), 300)]
        spread[particles] = float(torch.stack([torch.autograd.grad(loss, logit)[0] for loss in losses]).std())
    assert spread[10] < spread[1] / 10  # ten particles without a baseline would be noisier than one


@pytest.mark.parametrize("first", ["coin", "code"])
def test_gradient_of_coins_and_codes_is_exact_on_average(first: str) -> None:
    """A code that depends on a coin, or a coin whose probability depends on a code."""
    settings = torch.tensor([0.4, -1.0, 1.5], requires_grad=True)
    y, prior, width = torch.tensor([0.7]), torch.tensor(0.3), 0.6

    def coin(z: Any) -> Any:
        return dist.Bernoulli(logits=settings[0] if first == "coin" else settings[0] + settings[1] * z)

    def code(b: Any) -> Any:
        return dist.Normal(settings[1] + (settings[2] - settings[1]) * b if first == "coin" else settings[2], width)

    def model(y: Tensor) -> None:
        b = pyro.sample("b", dist.Bernoulli(prior))
        z = pyro.sample("z", dist.Normal(b, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        if first == "coin":
            pyro.sample("z", code(pyro.sample("b", coin(0.0))))
        else:
            pyro.sample("b", coin(pyro.sample("z", code(0.0))))

    points, masses = normal_nodes(20)
    faces, noise = torch.tensor([0.0, 1.0]).repeat_interleave(20), points.repeat(2)
    z = code(faces).loc + width * noise
    log_b = coin(z).log_prob(faces).expand(40)
    log_w = (
        *(dist.Normal(z, 1.0).log_prob(y), dist.Normal(faces, 1.0).log_prob(z), dist.Bernoulli(prior).log_prob(faces)),
        *(-log_b, -code(faces).log_prob(z)),
    )
    bound = expected_bound(torch.stack(log_w).sum(0), log_b + masses.log().repeat(2), 2)
    assert_gradient(Program.of(model, guide), (y,), settings, IWAE(particles=2), bound, 1500)


# -- enumerated and global sites --------------------------------------------------------------------------------------


def test_coins_are_drawn_beside_enumerated_sites() -> None:
    logits, y = torch.tensor([0.4, -1.0], requires_grad=True), torch.tensor([1.2, -0.5])

    def model(y: Tensor) -> None:
        with pyro.plate("data", 2):
            b = pyro.sample("b", dist.Bernoulli(0.3))
            k = pyro.sample("k", dist.Bernoulli(0.2 + 0.5 * b), infer=PARALLEL)
            pyro.sample("y", dist.Normal(2 * b + k, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", 2):
            pyro.sample("b", dist.Bernoulli(logits=logits))

    faces, bound = torch.tensor([0.0, 1.0]), torch.zeros(())
    for logit, value in zip(logits, y, strict=True):
        log_q = dist.Bernoulli(logits=logit).log_prob(faces)
        chance, k = dist.Bernoulli(0.2 + 0.5 * faces), torch.tensor([[0.0], [1.0]])
        by_k = chance.log_prob(k.expand(2, 2)) + dist.Normal(2 * faces + k, 1.0).log_prob(value)
        log_w = by_k.logsumexp(0) + dist.Bernoulli(0.3).log_prob(faces) - log_q
        bound = bound + expected_bound(log_w, log_q, 3) / 2
    program = Program.of(model, guide, data_plate="data")
    found = draws_of(program, (y,), IWAE(particles=3), 600)
    assert_mean(torch.stack([terms["iwae"] for _, terms in found]), bound.detach())
    assert_gradient(program, (y,), logits, IWAE(particles=3), bound)


def with_everything(kind: str) -> Program:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0)) if kind in ("global", "joint") else 0.0
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])), infer=PARALLEL) if kind == "summed" else 0
            z = pyro.sample("z", dist.Normal(Vindex(torch.tensor([0.0, 2.0]))[k] + w, 1.0))
            with pyro.plate("columns", 2, dim=-2):
                pyro.sample("x", dist.Normal(z, NOISE), obs=x.expand(2, -1))

    return Program.of(model, "multivariate_normal" if kind == "joint" else "normal", data_plate="data")


@pytest.mark.parametrize("kind", ["local", "global", "joint", "summed"])
def test_bound_equals_the_evidence_estimate_of_the_posterior(kind: str) -> None:
    """The objective and the posterior compute the same weights from the same noise."""
    instance = ProgramInstance(with_everything(kind), (X,), 3)
    posterior = Posterior(instance)
    with instance.running(), RandomStream(7).drawing():
        run = Run(instance.program, (X,), torch.arange(3), 3, plates=instance.structure.plates)
        _, terms = IWAE(particles=6)(run)
    wanted = posterior.log_evidence(X, particles=6, seed=7)
    torch.testing.assert_close(3 * terms["iwae"], wanted.sum())
    torch.testing.assert_close(terms["elbo"], terms["likelihood"] - terms["kl_local"] - terms["kl_global"])
    assert (float(terms["kl_global"]) != 0) == (kind in ("global", "joint"))


def test_the_exact_posterior_of_a_global_latent_gives_the_evidence() -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(x.sum() / 4, 0.5))

    _, terms = IWAE(particles=4)(Run(Program.of(model, guide, data_plate="data"), (X,), torch.arange(3), 3))
    wanted = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(X)
    torch.testing.assert_close(3 * terms["iwae"], wanted)


# -- fits -------------------------------------------------------------------------------------------------------------


class Codes(Program):
    """`codes` with settings to fit, and a guide that cannot be exact."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = torch.nn.Parameter(torch.zeros(3))

    def model(self, x: Tensor) -> None:
        with self.data_plate(x):
            z = pyro.sample("z", dist.Normal(self.settings[0], 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    def guide(self, x: Tensor) -> None:
        with self.data_plate(x):
            pyro.sample("z", dist.Normal(self.settings[1] * x + self.settings[2], 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 20])
def test_a_compiled_fit_reaches_the_evidence(batch_size: int | None) -> None:
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = 1.5 + math.sqrt(1 + NOISE**2) * torch.randn(200, generator=generator)
    fits = {
        particles: svi(
            Codes(), x, objective=IWAE(particles=particles), batch_size=batch_size, steps=3000, compile=True,
            optimizer=Optimizer(learning_rate=0.02), progress=False,
        )
        for particles in (1, 50)
    }  # fmt: skip
    best = float(dist.Normal(x.mean(), math.sqrt(1 + NOISE**2)).log_prob(x).mean())
    for particles, posterior in fits.items():
        assert posterior.config["compiled"]
        last = float(np.mean(posterior.history.steps["iwae"][-500:]))
        assert last <= best + 0.02
        assert (last > best - 0.02) == (particles == 50)
        assert float(posterior.log_evidence(x, particles=2000).mean()) == pytest.approx(best, abs=0.02)
