"""Objectives that refuse a program or a setting, and schedules of the weight of the KL."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import deepprob as dp
from deepprob.fitting.kl_schedules import KLCycles, KLWarmUp
from deepprob.fitting.objectives import Objective
from deepprob.inference import svi
from deepprob.models import VAE, SemiSupervisedVAE
from deepprob.programs import Program

objectives = dp.objectives
X = torch.rand(24, 6, generator=torch.Generator().manual_seed(0))


def fitted(program: Program, objective: str | Objective, **options: object) -> dp.Posterior:
    settings = {"epochs": 2, "batch_size": 8, "compile": False, "progress": False, **options}
    return svi(program, X, objective=objective, **settings)  # type: ignore[arg-type]


def vae(**options: object) -> VAE:
    return VAE((6,), 2, (8,), **options)  # type: ignore[arg-type]


def coin(enumerate: str | None = None) -> Program:
    """A mixture of two normals, whose component the guide draws."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)), infer={"enumerate": enumerate})
            pyro.sample("x", dist.Normal(k, 1.0), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        logit = pyro.param("logit", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            if enumerate is None:
                pyro.sample("k", dist.Bernoulli(logits=logit.expand(len(x))))

    return Program.of(model, guide, data_plate="data")


@pytest.mark.parametrize("name", ["stl", "dreg"])
def test_path_gradients_need_reparameterized_draws(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"'{name}' needs draws with a reparameterized gradient, but site 'k' is drawn"
    ):
        fitted(coin(), name)


@pytest.mark.parametrize("name", ["iwae", "vimco", "wake_sleep", "renyi", "miwae"])
def test_discrete_sites_of_the_guide_are_fitted(name: str) -> None:
    posterior = fitted(coin(), name)
    assert posterior.parameters()["logit"].item() != pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize("name", ["stl", "dreg", "iwae", "vimco", "wake_sleep"])
def test_sites_that_the_model_sums_out_are_summed_out(name: str) -> None:
    """Beside a continuous code, a class is summed out; its evidence is in the terms."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x[:, 0], 0.8))

    posterior = fitted(Program.of(model, guide, data_plate="data"), name, epochs=5)
    assert posterior.parameters()["slope"].item() != pytest.approx(0.1, abs=1e-3)
    assert all(value == 0 for value in posterior.history.steps["skipped"])


def test_total_correlation_needs_independent_dimensions() -> None:
    message = (
        r"'total_correlation' needs codes whose dimensions the guide draws independently for every row; 'z' is not"
    )
    with pytest.raises(ValueError, match=message):
        fitted(vae(posterior="multivariate_normal"), "total_correlation")
    with pytest.raises(ValueError, match=r"needs codes that the guide draws; this program sums sites out"):
        svi(SemiSupervisedVAE((6,), 2, 2, (8,)), X, objective="total_correlation", epochs=1, compile=False)


def test_free_bits_need_drawn_sites() -> None:
    with pytest.raises(ValueError, match=r"free_bits needs latent sites that the guide draws"):
        svi(
            SemiSupervisedVAE((6,), 2, 2, (8,)),
            X,
            objective=objectives.ELBO(free_bits=0.1),
            epochs=1,
            compile=False,
        )


@pytest.mark.parametrize("posterior", ["normal", "multivariate_normal"])
def test_free_bits_keep_the_kl_of_a_code_that_collapses(posterior: str) -> None:
    """A decoder that cannot see its code loses the KL without a minimum, and keeps it with one."""
    found = {}
    for bits in (0.0, 0.5):
        program = vae(posterior=posterior, decoder=torch.nn.Sequential(torch.nn.Linear(2, 6), Blind()))
        objective = objectives.ELBO(free_bits=bits)
        end = fitted(program, objective, epochs=150, optimizer=dp.Optimizer(learning_rate=0.03))
        found[bits] = (
            end.history.epochs["kl_local"][-1]
            if "kl_local" in end.history.epochs
            else end.history.steps["kl_local"][-1]
        )
    assert found[0.0] < 0.05 and found[0.5] > 0.3


class Blind(torch.nn.Module):
    """Outputs that do not depend on the inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.0 * x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: objectives.Renyi(alpha=1.0), r"alpha must not be 1, where the bound is the ELBO"),
        (lambda: objectives.Renyi(alpha=float("inf")), r"alpha must be a finite number"),
        (lambda: objectives.VIMCO(particles=1), r"particles must be a whole number of at least 2"),
        (lambda: objectives.WakeSleep(particles=1), r"particles must be a whole number of at least 2"),
        (lambda: objectives.MIWAE(groups=0), r"groups must be a whole number of at least 1"),
        (lambda: objectives.Beta(-1.0), r"beta must be a positive number or 0; got -1"),
        (lambda: objectives.Beta(4.0, -1.0), r"capacity must be a positive number or 0"),
        (lambda: objectives.TotalCorrelation(gamma=-1.0), r"gamma must be a positive number or 0"),
        (lambda: objectives.ELBO(free_bits=-0.1), r"free_bits must be a positive number or 0"),
        (lambda: objectives.ELBO(gradient="dreg"), r"unknown gradient 'dreg'\. .*stl, total"),
        (lambda: objectives.IWAE(gradient="stl"), r"unknown gradient 'stl'\. .*dreg, total"),
        (lambda: KLCycles(epochs=0), r"KLCycles's epochs must be a positive number"),
        (lambda: KLCycles(epochs=4, cycles=0), r"KLCycles's cycles must be a whole number of at least 1"),
        (lambda: KLCycles(epochs=4, rise=0.0), r"KLCycles's rise must lie in \(0, 1\]; got 0"),
    ],
)
def test_wrong_settings_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_the_first_argument_of_beta_is_the_weight() -> None:
    assert objectives.Beta(6.0).beta == 6.0 and objectives.Beta(6.0).particles == 1


def test_cycles_raise_the_weight_of_the_kl_in_a_fit() -> None:
    posterior = fitted(vae(), "elbo", epochs=5, callbacks=[KLCycles(epochs=4, cycles=2, rise=1.0)])
    weights = posterior.history.epochs["kl_weight"]  # at the last of the three steps of an epoch
    assert weights == pytest.approx([1 / 3, 5 / 6, 1 / 3, 5 / 6, 1.0])


def test_a_schedule_longer_than_the_fit_is_named() -> None:
    with pytest.warns(UserWarning, match=r"KLCycles\(epochs=8\.0\) is longer than the fit \(2 epochs\): the fit ends"):
        fitted(vae(), "elbo", callbacks=[KLCycles(epochs=8)])


def test_a_warm_up_raises_the_capacity() -> None:
    """With a capacity the weight of a warm-up belongs to the capacity, and codes hold as many nats as it allows."""
    posterior = fitted(
        vae(likelihood="normal"),
        objectives.Beta(20.0, capacity=1.0),
        epochs=200,
        callbacks=[KLWarmUp(epochs=50)],
        optimizer=dp.Optimizer(learning_rate=1e-2),
    )
    assert posterior.history.steps["kl_local"][-1] == pytest.approx(1.0, abs=0.2)


def test_an_objective_with_settings_is_extended() -> None:
    posterior = fitted(vae(), objectives.Renyi(0.3, particles=4))
    assert posterior.config["objective"] == {"name": "renyi", "alpha": 0.3, "particles": 4, "layers": "float32"}
    longer = dp.extend(posterior, X, epochs=1, compile=False, progress=False)
    assert longer.config["objective"] == posterior.config["objective"]
