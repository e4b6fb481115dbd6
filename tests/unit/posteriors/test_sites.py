"""Sites: several observed ones, factors, computed values, a guide's own data, and programs without observations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

import deepprob as dp
from deepprob.engine.random import RandomStream
from deepprob.fitting.objectives import ELBO
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program
from deepprob.programs.run import Run, run_prior

Y = 1 + torch.randn(30, generator=torch.Generator().manual_seed(0))
COUNTS = torch.poisson(torch.full((30,), 2.7), generator=torch.Generator().manual_seed(1))


def fitted(model: Callable[..., None], data: Any, guide: Any = "normal", **options: Any) -> Posterior:
    return svi(Program.of(model, guide), data, **{"epochs": 5, "seed": 0, "progress": False, **options})


def two_sites(y: Tensor, counts: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    pyro.deterministic("rate", mu.exp())
    pyro.deterministic("twice", 2 * w)
    with pyro.plate("rows", len(y)):
        pyro.deterministic("shifted", mu + torch.arange(len(y)))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        pyro.sample("counts", dist.Poisson(mu.exp()), obs=counts)


def two_sites_one_draw_at_a_time(y: Tensor, counts: Tensor) -> None:
    two_sites(y, counts)
    w = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.deterministic("sum", (torch.eye(2) @ w).sum())  # does not broadcast over draws


@pytest.mark.parametrize("model", [two_sites, two_sites_one_draw_at_a_time])
def test_several_observed_and_deterministic_sites(model: Callable[..., None]) -> None:
    posterior = fitted(model, (Y, COUNTS))
    found = posterior.sample(Y, COUNTS, draws=7)
    assert (found["rate"].shape, found["twice"].shape, found["shifted"].shape) == ((7,), (7, 3), (7, 30))
    assert torch.allclose(found["rate"], found["mu"].exp())
    assert torch.allclose(found["twice"], 2 * found["w"])
    assert torch.allclose(found["shifted"], found["mu"].unsqueeze(1) + torch.arange(30))
    if model is not two_sites:
        assert torch.allclose(found["sum"], found["v"].sum(1))
    with pytest.raises(ValueError, match=r"the program observes y, counts\. Choose one with site='\.\.\.'"):
        posterior.predict(Y, COUNTS)
    assert posterior.predict(Y, COUNTS, site="counts", draws=4).draws.shape == (4, 30)
    rate = posterior.predict(Y, COUNTS, site="rate", draws=7)
    assert torch.allclose(rate.mean, rate.draws.mean(0))
    assert float(rate.sd) == pytest.approx(float(rate.draws.std(0, unbiased=False)), rel=1e-4)
    assert posterior.predict(Y, COUNTS, site="shifted", draws=4).mean.shape == (30,)
    exported = posterior.to_arviz(Y, COUNTS, draws=5)
    assert set(exported.log_likelihood.data_vars) == {"y", "counts"}
    assert "rate" in exported.posterior.data_vars
    both = exported.log_likelihood["y"].values[0] + exported.log_likelihood["counts"].values[0]
    assert posterior.log_likelihood(Y, COUNTS, draws=5).numpy() == pytest.approx(both, rel=1e-4)


def test_reparameterised_sites_have_their_own_names() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 2.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    posterior = fitted(poutine.reparam(model, {"z": LocScaleReparam(0.0)}), Y)
    found = posterior.sample(Y, draws=5)
    assert torch.allclose(found["z"], found["mu"].unsqueeze(1) + 2 * found["z_decentered"])
    assert posterior.structure.observed == ("y",)
    assert posterior.predict(Y, draws=3).mean.shape == (30,)
    assert posterior.log_likelihood(Y, draws=3).shape == (3, 30)


def test_factors_of_rows_are_the_likelihood_and_others_the_prior() -> None:
    def by_factor(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        pyro.factor("prior", -0.5 * mu.square())
        with pyro.plate("rows", len(y)):
            pyro.factor("likelihood", dist.Normal(mu, 1.0).log_prob(y))

    posterior = fitted(by_factor, Y, epochs=1000)
    mu = posterior.sample(Y, draws=4)["mu"]
    found = posterior.log_likelihood(Y, draws=4)
    assert torch.allclose(found, dist.Normal(mu.unsqueeze(1), 1.0).log_prob(Y), atol=1e-4)
    exact = float(Y.sum() / (30 + 1 / 9 + 1))
    assert float(posterior.sample(draws=2000)["mu"].mean()) == pytest.approx(exact, abs=0.05)
    assert dp.check(posterior, Y, draws=50).verdict in ("pass", "caution")
    assert set(posterior.to_arviz(Y, draws=5).log_likelihood.data_vars) == {"likelihood"}


def test_a_factor_outside_of_plates_is_no_likelihood_by_row() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        pyro.factor("likelihood", dist.Normal(mu, 1.0).log_prob(y).sum())

    posterior = fitted(model, Y)
    with pytest.raises(ValueError, match=r"nothing is observed by row: .* no factor inside a plate over rows"):
        posterior.log_likelihood(Y)
    assert posterior.log_evidence(Y).shape == ()


def test_a_program_that_holds_its_data_is_exported_with_them() -> None:
    def model() -> None:
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(Y)):
            pyro.sample("y", dist.Normal(0.0, scale), obs=Y)

    exported = fitted(model, None, lambda: None).to_arviz(draws=3)
    assert exported.log_likelihood["y"].shape == (1, 3, 30)
    assert exported.observed_data["y"].shape == (30,)


def test_data_observed_in_a_guide_are_scored_as_pyro_scores_them() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.2))
        with pyro.plate("rows", len(y)):
            pyro.sample("t", dist.Normal(pyro.param("other", torch.tensor(0.3)), 1.0), obs=y)

    posterior = fitted(model, Y, guide, epochs=1)
    instance = posterior.instance
    with instance.running(), torch.no_grad():
        with RandomStream(1).drawing():
            loss, _ = ELBO(analytic_kl=False)(Run(instance.program, (Y,), torch.arange(30), 30))
        with RandomStream(1).drawing():
            pyros = Trace_ELBO().loss(instance.program.model, instance.program.guide, Y)
    assert 30 * float(loss) == pytest.approx(pyros, rel=1e-5)
    assert float(posterior.parameters()["other"]) != pytest.approx(0.3)


def test_program_without_observations_is_fitted_to_its_prior() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(2.0, 0.5))

    posterior = fitted(model, None, epochs=1500)
    found = posterior.sample(draws=2000)["z"]
    assert float(found.mean()) == pytest.approx(2.0, abs=0.05)
    assert float(found.std()) == pytest.approx(0.5, abs=0.05)
    assert float(posterior.log_evidence(particles=200)) == pytest.approx(0.0, abs=0.02)
    assert dp.check(posterior, None).verdict == "pass"
    with pytest.raises(ValueError, match="nothing is observed"):
        posterior.log_likelihood()
    with pytest.raises(ValueError, match=r"the program observes no site\. There is nothing to predict: ask for sample"):
        posterior.predict()


class Unsampled(dist.TorchDistribution):
    """A normal distribution without a sample method."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.real

    def __init__(self, loc: Tensor) -> None:
        self.loc = loc
        super().__init__(loc.shape, torch.Size())

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.as_tensor(dist.Normal(self.loc, 1.0).log_prob(value))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Unsampled:
        return Unsampled(self.loc.expand(batch_shape))


def test_hidden_markov_chain_of_any_length_has_replicates_as_long_as_its_data() -> None:
    def model(y: Tensor | None = None) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        transition = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
        pyro.sample("y", dist.DiscreteHMM(torch.zeros(2), transition, dist.Normal(loc, 1.0)), obs=y)

    posterior = fitted(model, Y)
    assert posterior.log_likelihood(Y, draws=4).shape == (4, 1)
    assert "log_likelihood" in posterior.to_arviz(Y, draws=4)
    trace = posterior.trace(Y, draws=4, predict=True)[1]
    assert trace.nodes["y"]["value"].shape[-1] == len(Y)
    assert dp.check(posterior, Y, draws=20)["posterior predictive check"].verdict != "unchecked"
    with pytest.raises(ValueError, match=r"site 'y' cannot be predicted: .*left out\. Give it its duration="):
        posterior.predict()


def test_independent_hidden_markov_chains_of_any_length_have_replicates() -> None:
    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        start = dist.Normal(torch.zeros(3, 1), 1.0).to_event(1)
        one, step = torch.ones(3, 1, 1, 1), dist.Normal(torch.zeros(3, 1, 1), scale).to_event(1)
        chains = dist.LinearHMM(start, one, step, one, step)
        pyro.sample("y", dist.IndependentHMM(chains), obs=y)

    run = Run(Program.of(model, "normal"), (torch.zeros(5, 3),), torch.arange(5), 5)
    assert run_prior(run).nodes["y"]["value"].shape == (5, 3)


def test_distribution_without_sample_is_asked_what_it_can_answer() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", Unsampled(mu), obs=y)

    posterior = fitted(model, Y, epochs=800)
    assert posterior.log_likelihood(Y, draws=3).shape == (3, 30)
    assert posterior.to_arviz(Y, draws=4) is not None
    assert dp.check(posterior, Y, draws=20).verdict in ("pass", "caution")
    with pytest.raises(
        ValueError, match=r"site 'y' cannot be predicted: its distribution has no sample method\. Write"
    ):
        posterior.predict(Y)
