"""The importance-weighted bound: settings, refusals, and agreement with the ELBO."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from uncompiled import replace_compiler

from deepprob.engine.random import RandomStream
from deepprob.fitting.objectives import ELBO, IWAE, Objective
from deepprob.inference import svi
from deepprob.programs.program import Program
from deepprob.programs.run import Run

Y = torch.tensor([0.8, -1.3, 2.1, 0.4])
PARALLEL = {"enumerate": "parallel"}


def codes(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def guide(y: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.2))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(loc * y, 0.8))


def coins(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        b = pyro.sample("b", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(2 * b, 1.0), obs=y)


def coin_guide(y: Tensor) -> None:
    slope = pyro.param("slope", torch.tensor(0.2))
    with pyro.plate("data", len(y)):
        pyro.sample("b", dist.Bernoulli(logits=slope * y))


def shared(y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)


def mixture(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.4), infer=PARALLEL)
        pyro.sample("y", dist.Normal(z + k, 1.0), obs=y)


def program(model: Callable[..., Any] = codes, its_guide: Any = guide) -> Program:
    return Program.of(model, its_guide, data_plate="data")


def call(objective: Objective, run: Run, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and terms under one seed; parameters go to a store that is thrown away."""
    with RandomStream(0).drawing(), pyro.get_param_store().scope():
        loss, terms = objective(run, **options)
        return loss.detach(), terms


def full(fitted: Program) -> Run:
    return Run(fitted, (Y,), torch.arange(4), 4)


@pytest.mark.parametrize("particles", [0, -1, 1.5, True])
def test_refuses_invalid_particles(particles: Any) -> None:
    with pytest.raises(ValueError, match=rf"particles must be a whole number of at least 1; got {particles}\."):
        IWAE(particles=particles)


def test_refuses_unknown_precision() -> None:
    with pytest.raises(ValueError, match=r"unknown precision of layers 'float16'\. .*Choose from: bfloat16, float32\."):
        IWAE(layers="float16")


def test_describes_its_settings() -> None:
    assert IWAE(particles=5).describe() == {"name": "iwae", "particles": 5, "layers": "float32", "gradient": "total"}
    assert json.loads(json.dumps(IWAE(particles=np.int64(5)).describe())) == IWAE(particles=5).describe()


def test_one_particle_gives_the_elbo() -> None:
    loss, terms = call(IWAE(particles=1), full(program()))
    same, expected = call(ELBO(analytic_kl=False), full(program()))
    assert float(loss) == pytest.approx(float(same))
    assert {name: float(terms[name]) for name in expected} == pytest.approx({n: float(v) for n, v in expected.items()})
    assert float(terms["iwae"]) == pytest.approx(float(terms["elbo"]))


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_kl_weight_applies_inside_the_logarithm(weight: float) -> None:
    """Loss and terms equal a computation by hand from the same noise."""
    run = replace(full(program()), draws=6)
    loss, terms = call(IWAE(particles=6), run, kl_weight=weight)
    with RandomStream(0).drawing():
        z = 0.2 * Y + 0.8 * torch.randn(6, 4)
    kl = dist.Normal(0.2 * Y, 0.8).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)
    likelihood = dist.Normal(z, 1.0).log_prob(Y)
    bound = (likelihood - weight * kl).exp().mean(0).log().mean()
    assert float(loss) == pytest.approx(-float(bound), rel=1e-5)
    assert float(terms["iwae"]) == pytest.approx(float((likelihood - kl).exp().mean(0).log().mean()), rel=1e-5)
    assert float(terms["kl_local"]) == pytest.approx(float(kl.mean()), rel=1e-4)
    assert float(terms["likelihood"]) == pytest.approx(float(likelihood.mean()), rel=1e-5)


def test_users_scale_applies_inside_the_weights_and_the_plates_outside() -> None:
    scaled = program(poutine.scale(codes, 3.0), poutine.scale(guide, 3.0))
    whole, _ = call(IWAE(particles=6), full(scaled))
    with RandomStream(0).drawing():
        z = 0.2 * Y + 0.8 * torch.randn(6, 4)
    kl = dist.Normal(0.2 * Y, 0.8).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)
    weights = dist.Normal(z, 1.0).log_prob(Y) - kl
    assert float(whole) == pytest.approx(-float((3 * weights).exp().mean(0).log().mean()), rel=1e-5)
    # A batch of a quarter of the data has the same noise, because it has the same number of rows.
    alike, _ = call(IWAE(particles=6), Run(scaled, (Y,), torch.arange(4), 16))
    assert float(alike) == pytest.approx(float(whole))


def test_masked_rows_have_no_weight() -> None:
    seen = torch.tensor([True, False, True, False])
    loss, terms = call(IWAE(particles=6), full(program(poutine.mask(codes, mask=seen))))
    with RandomStream(0).drawing():
        z = 0.2 * Y + 0.8 * torch.randn(6, 4)
    kl = dist.Normal(0.2 * Y, 0.8).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)
    rows = (dist.Normal(z, 1.0).log_prob(Y) - kl).exp().mean(0).log()
    assert float(loss) == pytest.approx(-float(rows[seen].sum() / 4), rel=1e-5)
    assert float(terms["kl_local"]) == pytest.approx(float(kl[:, seen].sum() / 24), rel=1e-4)


def test_layers_run_in_the_given_precision() -> None:
    class Net(Program):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def model(self, y: Tensor) -> None:
            codes(y)

        def guide(self, y: Tensor) -> None:
            with self.data_plate(y):
                pyro.sample("z", dist.Normal(self.layer(y.unsqueeze(-1)).squeeze(-1), 1.0))

    net = Net()
    exact, rough = (call(IWAE(particles=3, layers=layers), full(net))[0] for layers in ("float32", "bfloat16"))
    assert float(rough) != float(exact)
    assert float(rough) == pytest.approx(float(exact), rel=0.02)


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("its_guide", ["normal", "map", "multivariate_normal"])
def test_bound_of_global_latents_needs_all_rows(its_guide: str) -> None:
    message = r"site 'w' is not inside the data plate, .* needs all 4 rows; got a batch of 2\. Use batch_size=None"
    with pytest.raises(ValueError, match=message):
        svi(program(shared, its_guide), Y, objective="iwae", batch_size=2, epochs=1)
    posterior = svi(program(shared, its_guide), Y, objective="iwae", batch_size=None, epochs=2)
    assert len(posterior.history.steps["iwae"]) == 2


def test_factor_outside_of_the_plate_needs_all_rows() -> None:
    def together(y: Tensor) -> None:
        codes(y)
        pyro.factor("sum", -(y.sum() ** 2))

    run = Run(program(together), (Y[:2],), torch.arange(2), 4)
    with pytest.raises(ValueError, match=r"site 'sum' is not inside the data plate, .* got a batch of 2\."):
        call(IWAE(), run)


def one_coin(y: Tensor) -> None:
    b = pyro.sample("b", dist.Bernoulli(0.3))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(2 * b, 1.0), obs=y)


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_refuses_sites_that_the_guide_enumerates(kind: str) -> None:
    def enumerating(y: Tensor) -> None:
        pyro.sample("b", dist.Bernoulli(0.5), infer={"enumerate": kind})

    message = r"site 'b' is marked for enumeration in the guide, .* Leave the site out of the guide .* or remove the ma"
    with pytest.raises(ValueError, match=message):
        call(IWAE(), full(Program.of(one_coin, enumerating)))


def test_error_names_a_site_that_the_first_run_did_not_have() -> None:
    fitted = program(codes, lambda y: None)
    fitted.enumerates = False
    with pytest.raises(ValueError, match=r"site 'z' is neither in the guide nor marked for enumeration in the fi"):
        call(IWAE(), full(fitted))


# -- traced ---------------------------------------------------------------------------------------------------------


MADE = {"codes": (codes, guide), "coins": (coins, coin_guide), "global": (shared, "normal"), "sum": (mixture, guide)}


@pytest.mark.parametrize("kind", MADE)
def test_traced_steps_equal_eager_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fit itself compares traced steps with eager ones, and warns if they differ."""
    replace_compiler(monkeypatch)
    posterior = svi(program(*MADE[kind]), Y, objective=IWAE(particles=3), epochs=5, compile=True, progress=False)
    assert posterior.config["compiled"]
    assert posterior.config["objective"]["particles"] == 3
    assert posterior.history.steps.keys() >= {"iwae", "elbo", "likelihood", "kl_local", "kl_global"}
