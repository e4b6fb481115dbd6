"""Every objective on a linear-Gaussian VAE, whose evidence, posterior and bounds have closed forms.

The model is z ~ N(0, I_2), x | z ~ N(W z + b, s^2 I_3). Averages are compared in standard errors: |z| < 4.5 fails by
chance once in 150 000 comparisons, and every seed is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from deepprob.engine.random import RandomStream
from deepprob.fitting.disentangling import Beta, TotalCorrelation
from deepprob.fitting.objectives import ELBO, IWAE, Objective
from deepprob.fitting.weighted_bounds import MIWAE, VIMCO, Renyi, WakeSleep
from deepprob.programs.program import Program
from deepprob.programs.run import Run

Z = 4.5
ROWS = 6


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class LinearVAE(Program):
    """A linear decoder; the guide is the exact posterior, moved by ``off`` and widened by ``wider``.

    Every copy of the data has parameters of its own, so that one call gives an independent gradient for each copy.
    """

    def __init__(self, off: float = 0.0, wider: float = 1.0, factorized: bool = True, copies: int = 1) -> None:
        super().__init__()
        first = [[1.0, 0.0], [0.0, 0.7], [0.8, 0.0]] if factorized else [[1.0, 0.3], [-0.4, 0.7], [0.5, 0.9]]
        self.noise, weight, bias = 0.8, torch.tensor(first), torch.tensor([0.2, -0.1, 0.4])
        covariance = (torch.eye(2) + weight.T @ weight / self.noise**2).inverse()
        gain = covariance @ weight.T / self.noise**2
        start = {"weight": weight, "bias": bias, "gain": gain, "shift": off - gain @ bias}
        start["log_sd"] = covariance.diagonal().sqrt().log() + math.log(wider)
        for name, value in start.items():
            self.register_parameter(name, nn.Parameter(value.repeat(copies, *[1] * value.dim())))
        self.posterior_covariance = covariance

    def times(self, x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
        """An affine map of every row by the parameters of its copy."""
        blocks = x.unflatten(-2, (len(matrix), ROWS))
        return (blocks @ matrix.mT + shift.unsqueeze(1)).flatten(-3, -2)

    def model(self, x: Tensor) -> None:
        with self.data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.times(z, self.weight, self.bias), self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with self.data_plate(x):
            sd = self.log_sd.exp().repeat_interleave(ROWS, 0)
            pyro.sample("z", dist.Normal(self.times(x, self.gain, self.shift), sd).to_event(1))

    def log_evidence(self, x: Tensor) -> Tensor:
        covariance = self.weight[0] @ self.weight[0].T + self.noise**2 * torch.eye(3)
        found: Tensor = dist.MultivariateNormal(self.bias[0], covariance).log_prob(x)
        return found

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.gain[0].T + self.shift[0], self.log_sd[0].exp()

    def elbo(self, x: Tensor, kl_weight: float = 1.0) -> Tensor:
        """The exact mean ELBO of the first copy."""
        mean, sd = self.moments(x)
        expected = dist.Normal(mean @ self.weight[0].T + self.bias[0], self.noise).log_prob(x).sum(1)
        expected = expected - (self.weight[0].square() @ sd.square()).sum() / (2 * self.noise**2)
        kl = kl_divergence(dist.Normal(mean, sd), dist.Normal(0.0, 1.0)).sum(1)
        return (expected - kl_weight * kl).mean()


def rows() -> Tensor:
    return torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(1))


def called(program: Program, objective: Objective, seed: int = 0, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    copies = len(program.get_parameter("weight"))
    x = rows().repeat(copies, 1)
    with RandomStream(seed).drawing():
        return objective(Run(program, (x,), torch.arange(len(x)), len(x)), **options)


def averages(objective: Objective, term: str, *, copies: int, calls: int = 20, **guide: Any) -> Tensor:
    """A term by call, each an average over copies of the data; of "loss", its negative."""
    found = []
    for seed in range(calls):
        loss, terms = called(LinearVAE(**guide, copies=copies), objective, seed)
        found.append(-loss.detach() if term == "loss" else terms[term])
    return torch.stack(found)


def gradients(objective: Objective, names: list[str], copies: int, *, kl_weight: float = 1.0, **guide: Any) -> Tensor:
    """Independent gradients of the loss, ``(copies, numbers)``."""
    program = LinearVAE(**guide, copies=copies)
    leaves = [program.get_parameter(name) for name in names]
    loss, _ = called(program, objective, kl_weight=kl_weight)
    parts = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return torch.cat([x.flatten(1) for x in parts], 1) * copies


def exact_gradient(value: Tensor, program: Program, names: list[str]) -> Tensor:
    parts = torch.autograd.grad(value, [program.get_parameter(name) for name in names], retain_graph=True)
    return torch.cat([x.flatten() for x in parts])


def assert_mean(draws: Tensor, exact: Tensor) -> None:
    error = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - exact).abs() <= Z * error + 1e-9).all()), (draws.mean(0), exact, error)


def assert_same_mean(ours: Tensor, theirs: Tensor) -> None:
    error = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
    assert bool(((ours.mean(0) - theirs.mean(0)).abs() <= Z * error).all()), (ours.mean(0), theirs.mean(0), error)


GUIDE, MODEL = ["gain", "shift", "log_sd"], ["weight", "bias"]
OFF: dict[str, Any] = {"off": 0.3, "wider": 0.7}

# -- bounds ---------------------------------------------------------------------------------------------------------

BOUNDS: dict[str, tuple[Objective, str]] = {
    "elbo": (ELBO(), "elbo"),
    "stl": (ELBO(gradient="stl"), "elbo"),
    "iwae": (IWAE(5), "iwae"),
    "dreg": (IWAE(5, gradient="dreg"), "iwae"),
    "miwae": (MIWAE(3, 2), "miwae"),
    "renyi": (Renyi(0.5, 5), "renyi"),
    "vimco": (VIMCO(5), "vimco"),
    "wake_sleep": (WakeSleep(5), "wake_sleep"),
    "beta": (Beta(4.0), "elbo"),
    "total_correlation": (TotalCorrelation(), "elbo"),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_with_the_exact_posterior_every_bound_is_the_log_evidence(name: str) -> None:
    objective, term = BOUNDS[name]
    exact = float(LinearVAE().log_evidence(rows()).mean().detach())
    copies = 20 if name == "total_correlation" else 2000  # it compares all pairs of rows
    bounds = averages(objective, term, copies=copies)
    if name in ("elbo", "beta"):  # the closed form of the KL leaves noise
        assert_mean(bounds, torch.tensor(exact))
    else:
        assert torch.allclose(bounds, torch.tensor(exact))
    assert abs(float(bounds.mean()) - exact) < 0.01


@pytest.mark.parametrize("name", BOUNDS)
def test_elbo_is_the_closed_form(name: str) -> None:
    wanted = LinearVAE(**OFF).elbo(rows()).detach()
    copies = 20 if name == "total_correlation" else 1000  # it compares all pairs of rows
    assert_mean(averages(BOUNDS[name][0], "elbo", copies=copies, **OFF), wanted)


def test_importance_weighted_bounds_rise_with_particles_to_the_log_evidence() -> None:
    exact = float(LinearVAE().log_evidence(rows()).mean().detach())
    copies = {1: 3000, 2: 3000, 5: 1000, 20: 300, 100: 100, 1000: 20}
    means = [float(averages(IWAE(k), "iwae", copies=n, **OFF).mean()) for k, n in copies.items()]
    assert means == sorted(means) and means[-1] - means[0] > 0.1
    assert abs(means[-1] - exact) < 0.01


def test_renyi_bounds_fall_with_alpha() -> None:
    means = [float(averages(Renyi(a, 20), "renyi", copies=300, **OFF).mean()) for a in (-1.0, 0.0, 0.5, 2.0)]
    assert means == sorted(means, reverse=True)


# -- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_stl_agrees_with_the_analytic_gradient(kl_weight: float) -> None:
    program = LinearVAE(**OFF)
    exact = exact_gradient(-program.elbo(rows(), kl_weight), program, GUIDE + MODEL)
    assert_mean(gradients(ELBO(gradient="stl"), GUIDE + MODEL, 5000, kl_weight=kl_weight, **OFF), exact)


def test_noise_of_stl_vanishes_at_the_posterior() -> None:
    at_posterior, usual = (gradients(o, GUIDE, 500) for o in (ELBO(gradient="stl"), ELBO(analytic_kl=False)))
    assert float(at_posterior.abs().max()) < 1e-10 < 1e-2 < float(usual.std(0).min())


@pytest.mark.parametrize("particles", [1, 2, 10])
def test_dreg_has_the_gradient_of_iwae(particles: int) -> None:
    """The two estimators have one expectation; for the model's parameters they are the same draw by draw."""
    guide = {**OFF, "factorized": False}
    own, usual = (gradients(IWAE(particles, gradient=g), GUIDE + MODEL, 8000, **guide) for g in ("dreg", "total"))
    assert_same_mean(own, usual)
    model = slice(-9, None)
    assert torch.allclose(own[:, model], usual[:, model])


def test_dreg_with_one_row_agrees_with_the_gradient_by_quadrature() -> None:
    """With a code of one dimension and two particles the exact gradient is a double sum."""
    copies, numbers = 20_000, torch.tensor([0.4, 0.2, -0.2], requires_grad=True)  # slope, shift, log sd
    settings = numbers.detach().repeat(copies, 1).requires_grad_()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(settings[:, 0] * x + settings[:, 1], settings[:, 2].exp()))

    points = torch.linspace(-8.0, 8.0, 801)
    mass = dist.Normal(0.0, 1.0).log_prob(points).exp()
    mass = mass / mass.sum()
    q = dist.Normal(numbers[0] * 0.8 + numbers[1], numbers[2].exp())
    z = q.loc + q.scale * points
    log_w = dist.Normal(z, 0.7).log_prob(torch.tensor(0.8)) + dist.Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)
    bound = (mass[:, None] * mass * (torch.logaddexp(log_w[:, None], log_w) - math.log(2))).sum()
    (exact,) = torch.autograd.grad(-bound, numbers)
    program, x = Program.of(model, guide, data_plate="data"), torch.full((copies,), 0.8)
    with RandomStream(0).drawing():
        loss, _ = IWAE(2, gradient="dreg")(Run(program, (x,), torch.arange(copies), copies))
    assert_mean(torch.autograd.grad(loss, settings)[0] * copies, exact)


def test_dreg_has_less_noise_than_iwae_and_gains_with_particles() -> None:
    """The signal-to-noise ratio of the guide's gradient falls with K as 1 / sqrt(K); that of DReG rises as sqrt(K).

    The theory asks for weights of finite variance, and so for a guide that is wide enough.
    """
    ratios = {}
    for particles in (4, 64):
        guides = {"off": 0.3, "wider": 1.3}
        found = {g: gradients(IWAE(particles, gradient=g), GUIDE, 4000, **guides) for g in ("total", "dreg")}
        assert float(found["dreg"].var(0).sum()) < 0.7 * float(found["total"].var(0).sum())
        for kind, draws in found.items():
            ratios[kind, particles] = float((draws.mean(0).abs() / draws.std(0)).mean())
    assert ratios["dreg", 64] > 2 * ratios["dreg", 4]
    assert ratios["total", 64] < ratios["total", 4]


def test_vimco_has_the_gradient_of_iwae() -> None:
    assert_same_mean(
        gradients(VIMCO(3), GUIDE + MODEL, 40_000, **OFF), gradients(IWAE(3), GUIDE + MODEL, 10_000, **OFF)
    )


def test_wake_sleep_follows_the_inclusive_divergence() -> None:
    """With many particles the guide's gradient is that of KL(p || q), and the model's that of the evidence."""
    guide = {"off": 0.3, "wider": 1.3}
    found = gradients(WakeSleep(5000), GUIDE + MODEL, 40, **guide)
    program, x = LinearVAE(**guide), rows()
    covariance, (mean, sd) = program.posterior_covariance, program.moments(x)
    true = (x - program.bias[0].detach()) @ program.weight[0].detach() @ covariance / program.noise**2
    square = (mean - true).square() + covariance.diagonal()
    inclusive = (square / (2 * sd.square())).sum(1).mean() + sd.log().sum()
    exact = torch.cat(
        [
            exact_gradient(inclusive, program, GUIDE),
            exact_gradient(-program.log_evidence(x).mean(), program, MODEL),
        ]
    )
    assert float((found.mean(0) - exact).abs().max()) < 0.01
    assert float(exact.abs().max()) > 0.1


@pytest.mark.parametrize(("capacity", "kl_weight"), [(None, 1.0), (None, 0.5), (1.0, 1.0), (5.0, 0.5)])
def test_beta_has_the_gradient_of_its_formula(capacity: float | None, kl_weight: float) -> None:
    program, x = LinearVAE(**OFF), rows()
    kl = program.elbo(x, 0.0) - program.elbo(x, 1.0)
    weighted = 4.0 * (kl_weight * kl if capacity is None else (kl - kl_weight * capacity).abs())
    exact = exact_gradient(weighted - program.elbo(x, 0.0), program, GUIDE + MODEL)
    assert_mean(gradients(Beta(4.0, capacity), GUIDE + MODEL, 5000, kl_weight=kl_weight, **OFF), exact)


def test_free_bits_stop_the_gradient_of_a_kl_below_the_minimum() -> None:
    program = LinearVAE(**OFF)
    kls = kl_divergence(dist.Normal(*program.moments(rows())), dist.Normal(0.0, 1.0)).mean(0)  # by dimension
    low, high = kls.detach().sort().values.tolist()
    between = (low + high) / 2
    for minimum, wanted in ((low / 2, kls.sum()), (between, kls.max()), (2 * high, 0.0 * kls.sum())):
        exact = exact_gradient(wanted - program.elbo(rows(), 0.0), program, GUIDE)
        assert_mean(gradients(ELBO(free_bits=minimum), GUIDE, 5000, **OFF), exact)
    losses = averages(ELBO(free_bits=between), "loss", copies=500, **OFF)
    assert_mean(losses, (program.elbo(rows(), 0.0) - kls.max() - between).detach())


def test_total_correlation_with_equal_weights_is_the_elbo() -> None:
    loss, terms = called(LinearVAE(off=0.3, copies=5), TotalCorrelation(1.0, 1.0, 1.0))
    assert float(-loss.detach()) == pytest.approx(float(terms["elbo"]))


def test_total_correlation_of_equal_codes_has_its_closed_form() -> None:
    class Copies(Program):
        """Both dimensions of a code have the mean of the first column, 3 x, and the sd 0.3."""

        def __init__(self, columns: list[int]) -> None:
            super().__init__()
            self.columns, self.unused = columns, nn.Parameter(torch.zeros(()))

        def model(self, x: Tensor) -> None:
            with self.data_plate(x):
                z = pyro.sample("z", dist.Normal(self.unused.expand(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x[:, :1])

        def guide(self, x: Tensor) -> None:
            with self.data_plate(x):
                pyro.sample("z", dist.Normal(3.0 * x[:, self.columns], 0.3).to_event(1))

    with RandomStream(0).drawing():
        x = torch.randn(2000, 3)
        runs = [Run(made, (x,), torch.arange(2000), 2000) for made in (Copies([0, 1]), Copies([0, 0]))]
        apart, together = (TotalCorrelation()(run)[1] for run in runs)
    # q(z) of the copies is nearly N(0, 9) with correlation 1 - 0.01; its total correlation is -log(1 - r^2) / 2.
    variance = 9.0 + 0.09
    exact = -0.5 * math.log(1 - (9.0 / variance) ** 2)
    assert float(together["total_correlation"]) == pytest.approx(exact, abs=0.15)
    assert abs(float(apart["total_correlation"])) < 0.1


# -- guides of several sites ----------------------------------------------------------------------------------------


class TwoLayers(Program):
    """Two scalar codes; the guide of the second depends on the draw of the first. Every row has its own parameters."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor([0.3, -0.3, 0.4, -0.1]).repeat(copies, 1))

    def model(self, x: Tensor) -> None:
        with self.data_plate(x):
            top = pyro.sample("top", dist.Normal(torch.zeros(()), 1.0))
            low = pyro.sample("low", dist.Normal(top, 0.8))
            pyro.sample("x", dist.Normal(low, 0.7), obs=x)

    def guide(self, x: Tensor) -> None:
        a, b, c, d = self.numbers.unbind(1)
        with self.data_plate(x):
            low = pyro.sample("low", dist.Normal(a * x, b.exp()))
            pyro.sample("top", dist.Normal(c * low, d.exp()))


@pytest.mark.parametrize(
    ("own", "usual"),
    [
        (ELBO(gradient="stl"), ELBO(analytic_kl=False)),
        (IWAE(4, gradient="dreg"), IWAE(4)),
        (VIMCO(4), IWAE(4)),
    ],
    ids=["stl", "dreg", "vimco"],
)
def test_estimators_have_one_expectation_where_a_site_depends_on_another(own: Objective, usual: Objective) -> None:
    copies, found = 40_000, []
    x = torch.full((copies,), 1.7)
    for objective in (own, usual):
        program = TwoLayers(copies)
        with RandomStream(0).drawing():
            loss, _ = objective(Run(program, (x,), torch.arange(copies), copies))
        found.append(torch.autograd.grad(loss, program.numbers)[0] * copies)
    assert_same_mean(*found)
