"""Where the fit of a guide by name starts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value
from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.fitting.callbacks import Checkpoint
from deepprob.fitting.divergence import DivergenceError
from deepprob.fitting.start import start_near_posterior
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import num_rows
from deepprob.programs.program import Program

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
from posteriordb import IS_HERE, PROBLEMS, WHY_NOT

GUIDES = ["normal", "multivariate_normal", "low_rank"]


def unscaled(count: int = 200) -> tuple[Tensor, Tensor]:
    """Two inputs that correlate at 0.99, one in thousands, and a target in tens of thousands."""
    g = torch.Generator().manual_seed(0)
    age = 40.0 + 10.0 * torch.randn(count, generator=g)
    income = 1000.0 * age + 1500.0 * torch.randn(count, generator=g)
    return torch.stack([age, income], 1), 300.0 * age + 0.5 * income + 2000.0 * torch.randn(count, generator=g)


def line(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 1000.0).expand([2]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((x * beta).sum(-1), 2000.0), obs=y)


def exact(count: int = 200) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the slopes."""
    x, y = (t.double() for t in unscaled(count))
    covariance = torch.linalg.inv(x.T @ x / 2000.0**2 + torch.eye(2) / 1000.0**2)
    return covariance @ (x.T @ y) / 2000.0**2, covariance


def test_unscaled_regression_ends_at_its_closed_form() -> None:
    posterior = svi(Program.of(line, "multivariate_normal"), unscaled(), steps=300, progress=False)
    draws = posterior.sample(*unscaled(), draws=8000)["beta"].double()
    mean, covariance = exact()
    sd = covariance.diagonal().sqrt()
    assert float(((draws.mean(0) - mean) / sd).abs().max()) < 0.1
    assert torch.allclose(draws.std(0), sd, rtol=0.1)
    assert torch.allclose(torch.corrcoef(draws.T)[0, 1], covariance[0, 1] / sd.prod(), atol=0.02)


def test_minibatches_of_many_unscaled_rows_start_near_the_posterior() -> None:
    """The start is found at a sample of the rows."""
    x, y = unscaled(30_000)
    program = Program.of(line, "multivariate_normal", data_plate="rows")
    posterior = svi(program, (x, y), steps=300, progress=False, compile=False)
    mean, covariance = exact(30_000)
    draws = posterior.sample(x, y, draws=4000)["beta"].double()
    assert float(((draws.mean(0) - mean) / covariance.diagonal().sqrt()).abs().max()) < 4.0  # 30 000 sds without
    assert torch.allclose(draws.std(0), covariance.diagonal().sqrt(), rtol=0.3)


@pytest.mark.parametrize("guide", GUIDES)
def test_mean_is_right_for_every_gaussian_guide(guide: str) -> None:
    posterior = svi(Program.of(line, guide), unscaled(), steps=300, progress=False, compile=False)
    mean, covariance = exact()
    found = posterior.sample(*unscaled(), draws=4000)["beta"].double().mean(0)
    assert float(((found - mean) / covariance.diagonal().sqrt()).abs().max()) < 0.2


@pytest.mark.parametrize("guide", GUIDES)
def test_parameters_are_those_of_pyros_guide(guide: str) -> None:
    posterior = svi(Program.of(line, guide), unscaled(), steps=100, progress=False, compile=False)
    found, draws = posterior.parameters(), posterior.sample(*unscaled(), draws=8000)["beta"]
    loc = (
        found["AutoNormal.locs.beta"] if guide == "normal" else next(v for n, v in found.items() if n.endswith(".loc"))
    )
    assert torch.allclose(loc, draws.mean(0), rtol=0.05)
    if guide == "multivariate_normal":
        root = found["AutoMultivariateNormal.scale"][:, None] * found["AutoMultivariateNormal.scale_tril"]
        assert torch.allclose(root @ root.T, draws.T.cov(), rtol=0.1)
        gaussian = posterior.program.current_guide.get_posterior()
        assert torch.allclose(gaussian.scale_tril, root, rtol=1e-4)
    if guide == "normal":
        assert torch.allclose(found["AutoNormal.scales.beta"], draws.std(0), rtol=0.05)


@pytest.mark.parametrize("guide", [GUIDES[0], *(pytest.param(g, marks=pytest.mark.slow) for g in GUIDES[1:])])
def test_guide_is_saved_and_resumed(guide: str, tmp_path: Path) -> None:
    program = Program.of(line, guide)

    def fit(*callbacks: Any, **options: Any) -> Posterior:
        return svi(program, unscaled(), steps=120, progress=False, compile=False, callbacks=list(callbacks), **options)

    whole = fit(Checkpoint(tmp_path / "c", every=60))
    whole.save(tmp_path / "p")
    again = Posterior.load(tmp_path / "p", program)
    x, y = unscaled()
    assert torch.equal(whole.sample(x, y, draws=5)["beta"], again.sample(x, y, draws=5)["beta"])
    assert whole.parameters().keys() == again.parameters().keys()
    for name, value in whole.parameters().items():
        assert torch.equal(value, again.parameters()[name])
    resumed = fit(Checkpoint(tmp_path / "c", every=60))
    assert torch.equal(whole.sample(x, y, draws=5)["beta"], resumed.sample(x, y, draws=5)["beta"])


def started(program: Program, data: Any, weights: str = "auto") -> ProgramInstance:
    """A program whose guide has started."""
    batch = program.accept(data)
    with RandomStream(0).drawing():
        instance = ProgramInstance(program, batch, num_rows(batch), weights=weights)
    start_near_posterior(instance, batch, torch.arange(num_rows(batch)), 1000)
    return instance


def test_start_is_seeded_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    one, two = (started(Program.of(line, "multivariate_normal"), unscaled()).tensors() for _ in range(2))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(before, torch.get_rng_state())


def branching(x: Tensor, y: Tensor) -> None:
    """The same regression, which reads a draw in Python, so that it cannot be traced."""
    beta = pyro.sample("beta", dist.Normal(0.0, 1000.0).expand([2]).to_event(1))
    mean = (x * beta).sum(-1) if float(beta.detach().sum()) > -1e9 else x[:, 0]
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(mean, 2000.0), obs=y)


def test_program_that_cannot_be_traced_starts_near_the_posterior() -> None:
    guide = started(Program.of(branching, "multivariate_normal"), unscaled()).program.current_guide
    mean, covariance = exact()
    sd, gaussian = covariance.diagonal().sqrt(), guide.get_posterior()
    assert float(((gaussian.mean.detach() - mean) / sd).abs().max()) < 0.1
    assert torch.allclose(gaussian.stddev.detach().double(), sd, rtol=0.1)


def schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def test_start_is_not_in_the_spike_of_a_hierarchy() -> None:
    """The log joint of centered schools has no limit as tau falls to 0."""
    effect = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sd = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    guide = started(Program.of(schools, "multivariate_normal"), (effect, sd)).program.current_guide
    assert guide.center is not None
    assert float(guide.median()["tau"]) > 0.5


def test_flat_priors_are_fitted() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.ImproperUniform(constraints.real, (), ()))
        sd = pyro.sample("sd", dist.ImproperUniform(constraints.positive, (), ()))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, sd), obs=y)

    y = 5000.0 + 100.0 * torch.randn(50, generator=torch.Generator().manual_seed(1))
    for guide in GUIDES:
        draws = svi(Program.of(model, guide), y, steps=300, progress=False, compile=False).sample(y, draws=2000)
        assert abs(float(draws["mean"].mean() - y.mean())) < 0.3 * float(y.std()) / 50**0.5
        assert 0.9 < float(draws["sd"].mean() / y.std()) < 1.15


# The usual start ---------------------------------------------------------------------------------------------------


def jittered(x: Tensor, y: Tensor) -> None:
    """Noise of the model's own, blocked from inference."""
    with pyro.poutine.block(), pyro.plate("jitter", len(x)):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    line(x, y + shift)


def impossible(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(beta.sum() * torch.nan, 1.0, validate_args=False), obs=y)


def line_of_weights() -> Program:
    net = torch.nn.Linear(2, 1)
    prior = {name: dist.Normal(0.0, 1.0).expand(p.shape).to_event() for name, p in net.named_parameters()}

    def model(x: Tensor, y: Tensor) -> None:
        lifted = pyro.random_module("net", net, prior)()
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(lifted(x)[..., 0], 2000.0), obs=y)

    return Program.of(model, "multivariate_normal")


@pytest.mark.parametrize(
    "program",
    [
        lambda: Program.of(jittered, "multivariate_normal"),
        lambda: Program.of(impossible, "multivariate_normal"),
        line_of_weights,
    ],
    ids=["noise of the model", "not finite", "weights of the user"],
)
@pytest.mark.filterwarnings("ignore:The `random_module` primitive is deprecated:FutureWarning")
def test_usual_start_stays(program: Callable[[], Program]) -> None:
    instance = started(program(), unscaled())
    assert instance.program.current_guide.center is None
    assert torch.allclose(instance.program.current_guide.scale, torch.tensor(0.1))


def test_guide_of_the_user_keeps_its_start() -> None:
    guide = AutoMultivariateNormal(line, init_loc_fn=init_to_value(values={"beta": torch.tensor([7.0, 8.0])}))
    instance = started(Program.of(line, guide), unscaled())
    assert instance.program.current_guide.loc.tolist() == [7.0, 8.0]


# A start that is not finite ----------------------------------------------------------------------------------------


def small_scale(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    scale = torch.where(torch.arange(len(x)) == 17, 0.0, 1.0)
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(beta * x[:, 0], scale, validate_args=False), obs=y)


def outside(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(beta * x[:, 0], torch.where(y == y[3], 1e-30, 1e5)), obs=y)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (small_scale, r"not finite at the first step: site 'y', row 17: scale reached 0\. Bound the scale away from 0"),
        (outside, r"first step: site 'y', row 3: its log-probability is not finite\. Standardize the data, or start"),
    ],
)
@pytest.mark.parametrize("guide", ["normal", "multivariate_normal"])
def test_first_step_that_is_not_finite_names_the_row(model: Any, message: str, guide: str) -> None:
    with pytest.raises(ValueError, match=message):
        svi(Program.of(model, guide), unscaled(), steps=5, progress=False)


def no_gradient(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(beta + (beta * 0.0).sqrt(), 1.0), obs=y)


def own_guide(x: Tensor, y: Tensor) -> None:
    width = pyro.param("width", torch.zeros(()))
    pyro.sample("beta", dist.Normal(pyro.param("at", torch.zeros(())), 1.0 + width.abs().sqrt()))


@pytest.mark.parametrize(
    ("guide", "where"),
    [
        ("normal", r"site 'y': .* respect to AutoNormal\.locs\.beta, AutoNormal\.scales\.beta is not"),
        (own_guide, r"site 'beta' of the guide: .* respect to width is not"),
    ],
)
def test_first_gradient_that_is_not_finite_names_site_and_parameters(guide: Any, where: str) -> None:
    message = rf"^the gradient is not finite at the first step: {where}\. Look for a square root or a division at 0"
    with pytest.raises(DivergenceError, match=message):
        svi(Program.of(no_gradient, guide), unscaled(), steps=30, progress=False)


@pytest.mark.parametrize("data_plate", [None, "rows"])
def test_data_outside_of_an_unchecked_support_name_the_row(data_plate: str | None) -> None:
    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.LogNormal(a, 1.0, validate_args=False), obs=y)

    y = torch.ones(20)
    y[7] = -1.0
    message = r"first step: site 'y', row 7: .* as its value is outside of the support\. Change the values, or choose"
    with pytest.raises(ValueError, match=message):
        svi(Program.of(model, "normal", data_plate=data_plate), y, steps=5, progress=False)


def test_draws_of_a_guide_outside_of_the_support_name_the_site() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("groups", 3):
            scale = pyro.sample("scale", dist.HalfNormal(torch.ones(())))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(0.0, scale.abs().sum()), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("groups", 3):
            pyro.sample("scale", dist.Normal(pyro.param("at", torch.tensor(-9.0)), 1.0))

    message = r"site 'scale': its log-probability is not finite, as its value is outside of the support\. Change"
    with pytest.raises(ValueError, match=message):
        svi(Program.of(model, guide), torch.ones(4), steps=5, progress=False)


def factor(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    pyro.factor("total", y.log().sum() * beta)


def factor_by_row(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.factor("each", (5.5 - torch.arange(len(x))).log() * beta)


def scale_of_a_logarithm(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(beta, (6.5 - torch.arange(len(x))).log()), obs=y)


@pytest.mark.parametrize(
    ("model", "where"),
    [
        (factor, r"site 'total': log_factor is nan"),
        (factor_by_row, r"site 'each', row 6: log_factor is nan"),
        (scale_of_a_logarithm, r"site 'y', row 7: scale is nan"),
    ],
)
def test_a_first_run_that_is_not_finite_names_the_site(model: Any, where: str) -> None:
    x, y = unscaled()
    with pytest.raises(ValueError, match=rf"^the program cannot run on the data: {where}\. Check the values that it"):
        svi(Program.of(model, "normal"), (x, y - y.max()), steps=5, progress=False)


def test_a_start_that_is_finite_for_some_draws_is_fitted() -> None:
    def sometimes(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(torch.where(z > 0.05, z, torch.inf), 1.0, validate_args=False), obs=y)

    with pytest.warns(UserWarning, match="of 40 steps were not finite and were skipped"):
        svi(Program.of(sometimes, "normal"), torch.ones(4), steps=40, progress=False)


# Reference posteriors ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not IS_HERE, reason=WHY_NOT)
@pytest.mark.parametrize("name", [pytest.param("kilpisjarvi", marks=pytest.mark.slow), "kidiq"])
def test_posteriordb(name: str) -> None:
    problem = PROBLEMS[name]
    posterior = svi(problem.program(), problem.data(), steps=500, progress=False, compile=False)
    for parameter, (error, width) in problem.errors(posterior.sample(*problem.data(), draws=4000)).items():
        assert abs(error) < 0.3, parameter
        assert 0.8 < width < 1.2, parameter
