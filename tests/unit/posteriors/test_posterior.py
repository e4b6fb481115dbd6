"""Posterior: shapes of every query, both kinds, and saving and loading."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.nn import PyroParam
from torch import Tensor, nn

from deepprob.errors import StorageError
from deepprob.fitting.callbacks import Callback, Fit
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import VAE
from deepprob.posteriors.from_draws import draws_posterior
from deepprob.posteriors.posterior import Posterior
from deepprob.programs import registry
from deepprob.programs.program import Program

torch.manual_seed(0)
X = torch.randn(12, 2)
Y = X[:, 0] - X[:, 1] + 0.1 * torch.randn(12)
GUIDES = ["normal", "multivariate_normal", "low_rank", "flow", "laplace", "map"]


def regression(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        mean = pyro.deterministic("mean", (x * w).sum(-1))
        pyro.sample("y", dist.Normal(mean, noise), obs=y)


def codes(y: Tensor | None = None) -> None:
    with pyro.plate("data", 12):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def nested(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("features", 3, dim=-2):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))  # (..., 3, 1)
        assert w.shape[-2:] == (3, 1)
    b = pyro.sample("b", dist.Normal(torch.zeros(2, 4), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w.sum(-2, keepdim=True) * x[:, 0] + b.sum((-1, -2)), 1.0), obs=y)


def fitted(model: Any = regression, data: Any = (X, Y), **options: Any) -> Posterior:
    return svi(Program.of(model, "normal", data_plate="data"), data, **{"epochs": 3, "progress": False} | options)


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    return fitted()


# -- shapes -------------------------------------------------------------------------------------------------------


def test_shapes_of_global_sites(posterior: Posterior) -> None:
    assert posterior.latent_sites == {"w": "global", "noise": "global"}
    assert posterior.kind == "guide"
    shapes = {n: tuple(v.shape) for n, v in posterior.sample(draws=5).items()}
    assert shapes == {"w": (5, 2), "noise": (5,)}
    assert posterior.sample(X[:3], draws=5)["w"].shape == (5, 2)
    assert posterior.log_likelihood(X, Y, draws=5).shape == (5, 12)
    assert posterior.log_weights(X, Y, particles=5).shape == (5,)
    assert posterior.log_evidence(X, Y, particles=5).shape == ()
    assert posterior.elbo(X, Y, particles=2).shape == (12,)
    assert posterior.predict(X[:1], draws=1).mean.shape == (1,)


def test_shapes_of_local_sites() -> None:
    posterior = fitted(codes, Y)
    assert posterior.latent_sites == {"z": "local"}
    assert posterior.sample(Y, draws=5)["z"].shape == (5, 12)
    assert posterior.log_weights(Y, particles=5).shape == (5, 12)
    assert posterior.log_evidence(Y, particles=5).shape == (12,)
    assert posterior.elbo(Y).shape == (12,)
    assert posterior.sample(draws=5)["z"].shape == (5, 12), "the guide has parameters for every row of the fit"
    assert "z[11]" in posterior.summary()


def test_codes_of_an_amortized_guide_need_rows() -> None:
    posterior = svi(VAE((3,), latent_dim=2, hidden_dims=()), torch.rand(6, 3), epochs=1)
    with pytest.raises(ValueError, match=r"every latent site \(z\) is local\. Give the rows: posterior\.sample"):
        posterior.sample()
    assert "local, one value per row: call sample(*data)" in posterior.summary()


def test_a_guide_that_reads_the_data_needs_them() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(pyro.param("slope", torch.ones(())) * y.mean(), 0.2))

    posterior = svi(Program.of(model, guide), torch.ones(5), epochs=2)
    assert posterior.sample(torch.ones(5), draws=3)["mu"].shape == (3,)
    with pytest.raises(
        ValueError, match=r"guide depends on the data, and none were given\. Call posterior\.sample\(\*d"
    ):
        posterior.sample()


def masked_model(y: Tensor) -> None:
    with pyro.plate("data", len(y)), pyro.poutine.mask(mask=torch.arange(len(y)) < 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_masked_latents_add_nothing_to_the_bound() -> None:
    y = torch.linspace(-1, 1, 12)
    posterior = svi(Program.of(masked_model, "normal"), y, epochs=600, optimizer=Optimizer(learning_rate=3e-2))
    exact = float(dist.Normal(0.0, 2**0.5).log_prob(y[:8]).sum())
    assert abs(float(posterior.log_evidence(y, particles=500).sum()) - exact) < 0.05
    assert abs(posterior.history.epochs["elbo"][-1] * 12 - exact) < 2.0


def test_scale_handler_applies_to_queries() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)), pyro.poutine.scale(scale=0.1):
            pyro.sample("y", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0), obs=y)

    y = torch.linspace(-1, 1, 12)
    posterior = svi(Program.of(model, lambda y: None), y, epochs=1)
    found = posterior.log_likelihood(y, draws=1)[0]
    loc = posterior.parameters()["loc"]
    assert torch.allclose(found, 0.1 * dist.Normal(loc, 1.0).log_prob(y), atol=1e-6)


def test_amortized_guide_in_a_fixed_plate_accepts_other_rows() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", 12):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", 12):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.5)) * y, 0.5**0.5))

    y = torch.linspace(-1, 1, 12)
    posterior = svi(
        Program.of(model, guide, data_plate="data"),
        y,
        epochs=1,
        batch_size=4,
        optimizer=Optimizer(learning_rate=1e-9),
        held_out=y[:3],
    )
    exact = dist.Normal(0.0, 2**0.5).log_prob(y[:7])
    assert torch.allclose(posterior.log_evidence(y[:7], particles=4), exact, atol=1e-4)


def test_joint_guide_has_no_bound_per_row() -> None:
    posterior = fitted(codes, Y, guide="multivariate_normal")
    assert posterior.log_evidence(Y, particles=5).shape == ()
    with pytest.raises(ValueError, match=r"one distribution over the latents of all rows.*Use log_evidence"):
        posterior.elbo(Y)


def test_shapes_of_nested_plates_and_matrices() -> None:
    posterior = fitted(nested)
    draws = posterior.sample(draws=6)
    assert {n: tuple(v.shape) for n, v in draws.items()} == {"w": (6, 3), "b": (6, 2, 4)}
    assert posterior.log_likelihood(X, Y, draws=6).shape == (6, 12)
    twin = draws_posterior(Program.of(nested, data_plate="data"), (X, Y), {n: v[None] for n, v in draws.items()})
    assert torch.equal(twin.sample(draws=6)["w"], draws["w"])
    assert torch.allclose(twin.log_likelihood(X, Y, draws=6), posterior.log_likelihood(X, Y, draws=6), atol=1e-4)


def test_site_with_batch_dimensions_outside_plates() -> None:
    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0))
        pyro.sample("y", dist.Normal(w.sum((-1, -2)), 1.0), obs=y.sum())

    assert svi(Program.of(model, "normal"), Y, epochs=1).sample(draws=7)["w"].shape == (7, 3, 2)


def test_queries_are_seeded_and_keep_the_callers_random_state(posterior: Posterior) -> None:
    before = torch.get_rng_state()
    first, again, other = (posterior.sample(draws=3, seed=s)["w"] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    posterior.predict(X)
    posterior.log_evidence(X, Y)
    posterior.to_arviz(X, Y, draws=2)
    assert torch.equal(before, torch.get_rng_state())


def test_no_gradient_and_no_dropout(posterior: Posterior) -> None:
    assert not posterior.sample(draws=2)["w"].requires_grad
    assert not posterior.predict(X).mean.requires_grad
    assert not posterior.program.training


def test_parameters_have_the_names_and_values_of_the_user(tmp_path: Path) -> None:
    """Names and constrained values of Pyro's three ways to make parameters, in callbacks too; buffers are left out."""

    class Kinds(Program):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.BatchNorm1d(1)
            self.raw = nn.ParameterList([nn.Parameter(torch.zeros(()))])
            self.frozen = nn.Parameter(torch.tensor(3.0), requires_grad=False)
            self.scale = PyroParam(torch.tensor(2.0), constraint=dist.constraints.positive)

        def model(self, x: Tensor) -> None:
            chance = pyro.param("chance", torch.tensor(0.25), constraint=dist.constraints.unit_interval)
            shift = pyro.param("net.weight", torch.tensor([4.0]))
            with self.data_plate(x):
                loc = self.net(x.unsqueeze(-1)).squeeze(-1) + shift + self.raw[0] + self.frozen
                pyro.sample("x", dist.Normal(loc, self.scale + chance), obs=x)

        def guide(self, x: Tensor) -> None:
            pass

    class Seen(Callback):
        def start(self, fit: Fit) -> None:
            self.first = fit.parameters()

        def step_end(self, fit: Fit) -> None:
            self.last = fit.parameters()

    seen = Seen()
    posterior = svi(Kinds(), torch.arange(5.0), steps=3, callbacks=[seen], compile=False, progress=False)
    found = posterior.parameters()
    assert found.keys() == {"net.weight", "net.bias", "raw.0", "frozen", "scale", "chance", "store.net.weight"}
    assert seen.last.keys() == found.keys() - {"frozen"}
    assert all(torch.equal(value, found[name]) for name, value in seen.last.items())
    start = {"net.weight": 1.0, "net.bias": 0.0, "raw.0": 0.0, "scale": 2.0, "chance": 0.25, "store.net.weight": 4.0}
    assert {name: value.item() for name, value in seen.first.items()} == pytest.approx(start)
    assert torch.equal(found["scale"], posterior.program.scale.detach())
    posterior.save(tmp_path)
    loaded = Posterior.load(tmp_path, program=Kinds()).parameters()
    assert list(loaded) == list(found)
    assert all(torch.equal(value, found[name]) for name, value in loaded.items())


def test_parameters_of_modules_and_guides_have_the_names_of_pyro() -> None:
    net = nn.Linear(1, 1)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(net(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)

    posterior = svi(Program.of(model, "normal"), torch.arange(5.0), steps=3, compile=False, progress=False)
    found = posterior.parameters()
    assert found.keys() == {"net.weight", "net.bias", "AutoNormal.locs.z", "AutoNormal.scales.z"}
    assert (found["AutoNormal.scales.z"] > 0).all()


def test_parameters_are_copies(posterior: Posterior) -> None:
    before = posterior.sample(draws=2)["w"]
    for value in posterior.parameters().values():
        value.zero_()
    assert torch.equal(posterior.sample(draws=2)["w"], before)


def test_log_likelihood_matches_the_density(posterior: Posterior) -> None:
    draws = posterior.sample(X, draws=4, seed=3)
    mean = draws["w"] @ X.T  # (4, 12)
    expected = dist.Normal(mean, draws["noise"].unsqueeze(-1)).log_prob(Y)
    assert torch.allclose(posterior.log_likelihood(X, Y, draws=4, seed=3), expected, atol=1e-4)


def test_chunks_change_nothing(posterior: Posterior, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = posterior.log_likelihood(X, Y, draws=4)
    monkeypatch.setattr("deepprob.posteriors.fitted._CHUNK", 40)
    assert torch.allclose(posterior.log_likelihood(X, Y, draws=4), whole, atol=1e-5)
    per_row = fitted(codes, Y)
    assert per_row.log_weights(Y, particles=4).shape == (4, 12)


def likelihood(name: str) -> Program:
    """A regression whose targets have some distribution."""
    made: dict[str, Callable[[Tensor], Any]] = {
        "normal": lambda eta: dist.Normal(eta, 0.5),
        "bernoulli": lambda eta: dist.Bernoulli(logits=eta),
        "categorical": lambda eta: dist.Categorical(logits=torch.stack([eta, -eta, eta.sin()], -1)),
        "gamma": lambda eta: dist.Gamma(2.0, eta.exp()),
        "lognormal": lambda eta: dist.LogNormal(eta, 0.3),
        "mixture": lambda eta: dist.MaskedMixture(eta > 0, dist.Normal(eta, 1.0), dist.Normal(-eta, 2.0)),
        "student": lambda eta: dist.StudentT(4.0, eta, 1.0),
        "multivariate": lambda eta: dist.MultivariateNormal(eta.unsqueeze(-1).expand(*eta.shape, 2), torch.eye(2)),
    }

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", made[name]((x * w).sum(-1)), obs=y)

    return Program.of(model, "normal", data_plate="data")


@pytest.mark.parametrize(
    "name", ["normal", "bernoulli", "categorical", "gamma", "lognormal", "mixture", "student", "multivariate"]
)
def test_equal_seeds_give_equal_predictions(name: str) -> None:
    program = likelihood(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        targets = poutine.trace(program.model).get_trace(X).nodes["y"]["value"]
    posterior = svi(program, (X, targets), epochs=3, progress=False)
    first, other = posterior.predict(X, draws=5, seed=1), posterior.predict(X + 0.5, draws=5, seed=2)
    again = posterior.predict(X, draws=5, seed=1)
    assert torch.equal(first.draws, again.draws)
    assert torch.equal(first.distribution.log_prob(first.draws), again.distribution.log_prob(first.draws))
    repeated = posterior.predict(X + 0.5, draws=5, seed=2)
    assert torch.equal(other.draws, repeated.draws)
    assert torch.equal(other.distribution.log_prob(other.draws), repeated.distribution.log_prob(other.draws))


def test_equal_seeds_give_equal_predictions_of_two_observed_sites() -> None:
    def model(x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(w, 1.0), obs=y)
            pyro.sample("z", dist.Normal(y, 1.0), obs=z)

    posterior = svi(Program.of(model, "normal", data_plate="data"), (X, Y, Y), epochs=3, progress=False)
    for site in ("y", "z"):
        first, again = (posterior.predict(X, site=site, seed=1) for _ in range(2))
        assert torch.equal(first.draws, again.draws)
    assert not torch.equal(posterior.predict(X, site="z", seed=1).draws, posterior.predict(X, site="z", seed=2).draws)


def test_equal_seeds_give_equal_predictions_of_both_kinds_of_posterior() -> None:
    program = Program.of(regression, data_plate="data")
    drawn = draws_posterior(program, (X, Y), {"w": torch.randn(2, 4, 2), "noise": torch.rand(2, 4) + 0.1})
    coded = svi(VAE((3,), latent_dim=2, hidden_dims=(4,)), torch.rand(12, 3), epochs=2, progress=False)
    for posterior, rows in ((drawn, X), (coded, torch.rand(5, 3))):
        first, again = (posterior.predict(rows, draws=6, seed=1) for _ in range(2))
        assert torch.equal(first.draws, again.draws)


def test_nan_row_does_not_change_the_noise_of_other_rows() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x[:, 0].sqrt() * w, 1.0, validate_args=False), obs=y)

    posterior = svi(Program.of(model, "normal", data_plate="data"), (X.abs(), Y), epochs=3, progress=False)
    holes = X.abs()
    holes[3, 0] = -1.0
    before = posterior.predict(X.abs(), draws=5, seed=1).draws
    after = posterior.predict(holes, draws=5, seed=1).draws
    others = torch.arange(12) != 3
    assert torch.equal(after[:, others], before[:, others])
    assert bool(after[:, 3].isnan().all())


def test_second_query_refuses_data_outside_the_support() -> None:
    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Exponential(rate), obs=y)

    posterior = svi(Program.of(model, "normal", data_plate="data"), Y.abs(), epochs=2, progress=False)
    posterior.log_likelihood(Y.abs(), draws=3)
    with pytest.raises(ValueError, match=r"y must be numbers of at least 0 for a Exponential likelihood; got values"):
        posterior.log_likelihood(-Y.abs(), draws=3)


def test_evidence_of_an_exact_guide_is_exact() -> None:
    def model(y: Tensor | None = None) -> None:
        with pyro.plate("data", 12):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Tensor | None = None) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", 12):
            pyro.sample("z", dist.Normal(y / 2 + 0 * loc, math.sqrt(0.5)))

    posterior = svi(Program.of(model, guide, data_plate="data"), Y, epochs=1, optimizer=Optimizer(learning_rate=1e-9))
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(Y)
    assert torch.allclose(posterior.log_evidence(Y, particles=3), exact, atol=1e-4)
    assert torch.allclose(posterior.elbo(Y, particles=2000), exact, atol=0.05)


# -- wrong arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_refuses_counts_that_are_not_whole_numbers(posterior: Posterior, count: Any) -> None:
    for query in (
        lambda: posterior.sample(draws=count),
        lambda: posterior.predict(X, draws=count),
        lambda: posterior.log_likelihood(X, Y, draws=count),
        lambda: posterior.trace(X, Y, draws=count),
        lambda: posterior.sample_prior(3, X, draws=count),
        lambda: posterior.to_arviz(draws=count),
    ):
        with pytest.raises(ValueError, match=rf"^draws must be a whole number of at least 1; got {count}\.$"):
            query()
    for query in (
        lambda: posterior.log_weights(X, Y, particles=count),
        lambda: posterior.log_evidence(X, Y, particles=count),
        lambda: posterior.elbo(X, Y, particles=count),
    ):
        with pytest.raises(ValueError, match=rf"^particles must be a whole number of at least 1; got {count}\.$"):
            query()


def test_queries_need_rows_and_observed_values(posterior: Posterior) -> None:
    with pytest.raises(ValueError, match=r"the program needs rows of x, y; got none\. Give them as in the fit"):
        posterior.predict()
    for query in (posterior.log_likelihood, posterior.elbo, posterior.log_evidence):
        with pytest.raises(ValueError, match=r"nothing is observed: give the observed arguments too"):
            query(X)


def test_predict_needs_a_site_if_several_are_observed() -> None:
    def two(x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(w, 1.0), obs=a)
            pyro.sample("b", dist.Poisson(w.exp()), obs=b)

    posterior = fitted(two, (X, Y, torch.ones(12)))
    with pytest.raises(ValueError, match=r"the program observes a, b\. Choose one with site='\.\.\.'\."):
        posterior.predict(X)
    with pytest.raises(ValueError, match=r"the program observes no site 'c'\. Choose from: a, b\."):
        posterior.predict(X, site="c")
    assert posterior.predict(X, site="b").kind == "count"


def test_deterministic_sites_and_factors_are_not_exported() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            mean = pyro.deterministic("mean", w * x[:, 0])
            pyro.factor("extra", torch.zeros(len(x)))
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    posterior = fitted(model)
    assert posterior.predict(X, draws=4).draws.shape == (4, 12)
    idata = posterior.to_arviz(X, Y, draws=4)
    assert list(idata.log_likelihood.data_vars) == ["y"]
    assert list(idata.posterior_predictive.data_vars) == ["y"]


# -- draws --------------------------------------------------------------------------------------------------------


def drawn() -> Posterior:
    generator = torch.Generator().manual_seed(1)
    chains = {"w": torch.randn(2, 5, 2, generator=generator), "noise": torch.rand(2, 5, generator=generator) + 0.5}
    return draws_posterior(Program.of(regression, data_plate="data"), (X, Y), chains)


def test_stored_draws_answer_queries() -> None:
    posterior = drawn()
    before = torch.get_rng_state()
    assert posterior.kind == "draws"
    assert posterior.sample(draws=10)["w"].shape == (10, 2)
    assert posterior.sample(draws=25)["noise"].shape == (25,)
    assert posterior.predict(X, draws=10).mean.shape == (12,)
    w, noise = posterior.sample(draws=10).values()
    expected = dist.Normal(w @ X.T, noise.unsqueeze(-1)).log_prob(Y)
    assert torch.allclose(posterior.log_likelihood(X, Y, draws=10), expected, atol=1e-4)
    with pytest.raises(ValueError, match=r"importance weights need a guide's density; this posterior holds draws"):
        posterior.log_weights(X, Y)
    idata = posterior.to_arviz(X, Y)
    assert idata.posterior["w"].shape == (2, 5, 2)
    assert idata.log_likelihood["y"].shape == (2, 5, 12)
    assert torch.equal(before, torch.get_rng_state())


def test_stored_draws_are_saved_and_loaded(tmp_path: Path) -> None:
    posterior = drawn()
    posterior.save(tmp_path / "p")
    again = Posterior.load(tmp_path / "p", program=Program.of(regression, data_plate="data"))
    assert again.kind == "draws"
    assert torch.equal(again.log_likelihood(X, Y), posterior.log_likelihood(X, Y))


def test_stored_draws_of_local_sites() -> None:
    values = torch.arange(24.0).reshape(1, 2, 12)
    posterior = draws_posterior(Program.of(codes, data_plate="data"), Y, {"z": values})
    assert torch.equal(posterior.sample(Y, draws=2)["z"], values[0])
    assert posterior.log_likelihood(Y, draws=2).shape == (2, 12)


def test_refuses_draws_of_wrong_shape() -> None:
    program = Program.of(regression)
    for chains in (
        {"w": torch.zeros(2, 5, 2), "noise": torch.ones(2, 4)},
        {"w": torch.zeros(5), "noise": torch.ones(5)},
        {},
    ):
        with pytest.raises(ValueError, match=r"all sites must have the same chains and draws, shape \(chains, draws"):
            draws_posterior(program, (X, Y), chains)
    with pytest.raises(ValueError, match=r"guide has no site 'noise' but the model samples it"):
        draws_posterior(program, (X, Y), {"w": torch.zeros(2, 5, 2)})


# -- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", GUIDES)
def test_every_guide_is_saved_and_loaded(guide: str, tmp_path: Path) -> None:
    posterior = fitted(guide=guide, epochs=400 if guide == "laplace" else 3, optimizer=Optimizer(learning_rate=0.05))
    posterior.save(tmp_path / "p")
    before = torch.get_rng_state()
    again = Posterior.load(tmp_path / "p", program=Program.of(regression, data_plate="data"))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(again.log_likelihood(X, Y), posterior.log_likelihood(X, Y))
    assert again.history == posterior.history
    assert (again.config, again.seed, again.versions) == (posterior.config, posterior.seed, posterior.versions)
    assert repr(again) == repr(posterior)


def test_guide_class_is_loaded_with_its_program(tmp_path: Path) -> None:
    posterior = fitted(guide=AutoDiagonalNormal)
    posterior.save(tmp_path / "p")
    for guide in (AutoDiagonalNormal, None):  # the save names a class of Pyro's
        program = Program.of(regression, guide, data_plate="data")
        again = Posterior.load(tmp_path / "p", program=program)
        assert torch.equal(again.log_likelihood(X, Y), posterior.log_likelihood(X, Y))


def test_own_guide_is_loaded_with_its_program(tmp_path: Path) -> None:
    class Own(AutoDiagonalNormal):
        """A class that no save names."""

    fitted(guide=Own).save(tmp_path / "p")
    assert Posterior.load(tmp_path / "p", program=Program.of(regression, Own, data_plate="data")).sample(draws=2)
    with pytest.raises(StorageError, match=r"fitted with a guide of the user, which no file can hold"):
        Posterior.load(tmp_path / "p", program=Program.of(regression, data_plate="data"))


def test_load_needs_the_program_if_it_is_not_registered(tmp_path: Path, posterior: Posterior) -> None:
    posterior.save(tmp_path / "p")
    with pytest.raises(
        StorageError, match=r"of FunctionProgram, which its name and settings cannot rebuild\. Give the program"
    ):
        Posterior.load(tmp_path / "p")

    def wider(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w.sum(-1) * x[:, 0], noise), obs=y)

    again = Posterior.load(tmp_path / "p", program=Program.of(wider, data_plate="data"))  # the program has not run yet
    with pytest.raises(StorageError, match=r"has shape \(3,\) in this program but \(2,\) in the file\. Give the prog"):
        again.predict(X)
    again = Posterior.load(tmp_path / "p", program=Program.of(nested, data_plate="data"))
    with pytest.raises(StorageError, match=r"site 'w' has shape \(3, 1\) in this program but \(2,\) in the file"):
        again.predict(X)


def test_load_names_an_unregistered_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = svi(VAE((4,), latent_dim=1, hidden_dims=(3,)), torch.rand(6, 4), epochs=1)
    posterior.save(tmp_path / "p")
    assert Posterior.load(tmp_path / "p").latent_sites == {"z": "local"}
    monkeypatch.delitem(registry._PROGRAMS, "vae")
    with pytest.raises(StorageError, match=r"holds a posterior of 'vae', which is not registered\. Import the module"):
        Posterior.load(tmp_path / "p")


def test_manifest_is_json_without_code(tmp_path: Path, posterior: Posterior) -> None:
    posterior.save(tmp_path / "p")
    files = sorted(f.name.split("-")[0] for f in (tmp_path / "p").iterdir())
    assert files == ["manifest.json", "tensors"]
    text = json.dumps(json.loads((tmp_path / "p" / "manifest.json").read_text()))
    assert "__main__" not in text
    assert "test_posterior" not in text


def test_summary_and_repr(posterior: Posterior) -> None:
    lines = posterior.summary(draws=50).splitlines()
    assert [line.split()[0] for line in lines] == ["site", "w[0]", "w[1]", "noise"]
    assert repr(posterior) == "Posterior of FunctionProgram (guide): w (global), noise (global)"


def test_prior_samples() -> None:
    posterior = fitted()
    drawn = posterior.sample_prior(5, X, draws=3)
    assert {n: tuple(v.shape) for n, v in drawn.items()} == {"w": (3, 2), "noise": (3,), "y": (3, 12)}


def test_columns_of_different_meaning_are_loaded(tmp_path: Path) -> None:
    """The rows that stand for the data at loading need not be valid: here a scale of -3."""
    schools = torch.tensor([[28.0, 15.0], [8.0, 10.0], [-3.0, 16.0], [7.0, 11.0]])

    def model(data: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(data)):
            pyro.sample("y", dist.Normal(mu, data[:, 1]), obs=data[:, 0])

    program = Program.of(model, "normal")
    saved = svi(program, schools, steps=20, progress=False)
    saved.save(tmp_path / "p")
    loaded = Posterior.load(tmp_path / "p", program)
    assert torch.equal(loaded.sample(draws=5)["mu"], saved.sample(draws=5)["mu"])
    assert torch.equal(loaded.log_likelihood(schools, draws=5), saved.log_likelihood(schools, draws=5))


def test_float64_as_the_default_type(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        saved = svi(Program.of(regression, "normal"), (X.double(), Y.double()), steps=20, progress=False)
        assert "w[0]" in saved.summary(draws=20)
        assert saved.predict(X.double(), draws=5).mean.dtype == torch.float64
        saved.save(tmp_path / "p")
        loaded = Posterior.load(tmp_path / "p", Program.of(regression, "normal"))
        assert torch.equal(loaded.sample(draws=5)["w"], saved.sample(draws=5)["w"])
    finally:
        torch.set_default_dtype(torch.float32)
