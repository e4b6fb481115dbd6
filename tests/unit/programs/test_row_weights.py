"""Weights of rows: a row of weight 2 counts like two equal rows, in every objective, step and program."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import deepprob as dp
from deepprob.fitting import ELBO, IWAE
from deepprob.inference import svi
from deepprob.inference.svi import init, step
from deepprob.models import BayesianNeuralNetwork
from deepprob.posteriors.posterior import Posterior

RNG = np.random.default_rng(0)
N = 24
COUNTS = RNG.integers(0, 4, N)
FRAME = pd.DataFrame({"a": RNG.normal(size=N), "w": COUNTS.astype(float)})
FRAME["y"] = 2 * FRAME["a"] + RNG.normal(size=N)
WEIGHTED = dp.table(FRAME, "y", weights="w")
X, Y = WEIGHTED["x"], WEIGHTED["y"]
TWICE = WEIGHTED.rows(np.repeat(np.arange(N), COUNTS))
REPEATED = dp.Split({"x": TWICE["x"], "y": TWICE["y"]})


def line(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x[:, 0], 1.0), obs=y)


def exact_guide(x: Tensor, y: Tensor | None = None) -> None:
    """The posterior of the weighted data."""
    precision = 1.0 + (WEIGHTED.weights * X[:, 0] ** 2).sum()
    mean = (WEIGHTED.weights * X[:, 0] * Y).sum() / precision + pyro.param("shift", torch.tensor(0.0))
    pyro.sample("slope", dist.Normal(mean, precision**-0.5))


def narrow(x: Tensor, y: Tensor | None = None) -> None:
    """Draws that are all alike, so that steps differ in their rows alone."""
    pyro.sample("slope", dist.Normal(pyro.param("m", torch.tensor(0.5)), 1e-7))


def codes(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x[:, 0], 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def encoder(x: Tensor, y: Tensor | None = None) -> None:
    loc = pyro.param("loc", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, 0] + loc, 0.8))


def switch(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(slope * x[:, 0] + k, 1.0), obs=y)


def first_elbo(model: Any, guide: Any, data: Any, objective: Any, **options: Any) -> dict[str, Tensor]:
    """The terms of the first step, summed over rows."""
    state = init(dp.Program.of(model, guide, data_plate="data"), data, objective=objective, seed=1, **options)
    num_data = state.instance.num_data
    _, terms = step(state)
    return {name: value * num_data for name, value in terms.items() if name in ("elbo", "iwae", "likelihood")}


@pytest.mark.parametrize("objective", [ELBO(), ELBO(particles=3), IWAE(particles=3)])
@pytest.mark.parametrize("model", [line, switch])
def test_a_weighted_step_equals_one_on_repeated_rows(model: Any, objective: Any) -> None:
    weighted = first_elbo(model, narrow, WEIGHTED, objective, batch_size=None)
    repeated = first_elbo(model, narrow, REPEATED, objective, batch_size=None)
    names = weighted if model is line else ["likelihood"]  # a site that is summed out changes the noise of the guide
    for name in names:
        torch.testing.assert_close(weighted[name], repeated[name], rtol=1e-4, atol=1e-3)


def test_local_latents_are_weighted_with_their_rows() -> None:
    """With a closed-form KL and many particles the bounds agree, up to their Monte Carlo error."""
    for objective in (ELBO(particles=4000), IWAE(particles=4000)):
        found = [first_elbo(codes, encoder, data, objective, batch_size=None) for data in (WEIGHTED, REPEATED)]
        assert float(found[0]["elbo"] - found[1]["elbo"]) == pytest.approx(0.0, abs=1.0)
        unweighted = first_elbo(codes, encoder, dp.Split({"x": X, "y": Y}), objective, batch_size=None)
        assert abs(float(found[0]["elbo"] - unweighted["elbo"])) > 5.0


def test_minibatches_are_unbiased() -> None:
    program = dp.Program.of(line, narrow, data_plate="data")
    state = init(program, WEIGHTED, batch_size=6, seed=0)
    parts = [float(step(state, rows, learning_rate=0.0)[1]["likelihood"]) for rows in torch.arange(N).reshape(4, 6)]
    whole = init(program, WEIGHTED, batch_size=None, seed=0)
    assert np.mean(parts) == pytest.approx(float(step(whole)[1]["likelihood"]), rel=1e-4)


def test_the_fit_is_that_of_repeated_rows_and_exact() -> None:
    precision = float(1.0 + (WEIGHTED.weights * X[:, 0] ** 2).sum())
    mean = float((WEIGHTED.weights * X[:, 0] * Y).sum()) / precision
    for data in (WEIGHTED, REPEATED):
        program = dp.Program.of(line, "normal", data_plate="data")
        posterior = svi(program, data, steps=300, progress=False, compile=False, seed=0)
        slope = posterior.sample(draws=4000)["slope"]
        assert float(slope.mean()) == pytest.approx(mean, abs=0.03)
        assert float(slope.std()) == pytest.approx(precision**-0.5, rel=0.1)


def test_an_exact_guide_has_equal_importance_weights_on_weighted_rows() -> None:
    program, still = dp.Program.of(line, exact_guide, data_plate="data"), dp.Optimizer("sgd", learning_rate=1e-12)
    posterior = svi(program, WEIGHTED, steps=1, optimizer=still, progress=False, compile=False)
    assert float(posterior.log_weights(WEIGHTED, particles=50).std()) < 1e-3
    assert float(posterior.log_weights(X, Y, particles=50).std()) < 1e-3  # the rows of the fit
    again = svi(program, REPEATED, steps=1, optimizer=still, progress=False, compile=False)
    expected = float(again.log_evidence(REPEATED, particles=10))
    assert float(posterior.log_evidence(WEIGHTED, particles=10)) == pytest.approx(expected, abs=1e-2)


def test_queries_by_row_are_not_weighted() -> None:
    posterior = svi(dp.Program.of(line, "normal", data_plate="data"), WEIGHTED, steps=2, progress=False, compile=False)
    weighted, plain = (posterior.log_likelihood(data, draws=3) for data in (WEIGHTED, (X, Y)))
    assert torch.equal(weighted, plain)


def test_compiled_steps_are_weighted() -> None:
    options = {"steps": 40, "progress": False, "batch_size": 8, "seed": 0}
    fits = [
        svi(dp.Program.of(line, "normal", data_plate="data"), WEIGHTED, compile=compile, **options)
        for compile in (False, True)
    ]
    parameters = [fit.parameters() for fit in fits]
    for name, value in parameters[0].items():
        torch.testing.assert_close(value, parameters[1][name], rtol=1e-3, atol=1e-4)


def test_a_network_takes_class_weights() -> None:
    frame = FRAME.assign(kind=np.where(FRAME["a"] > 1.2, "rare", "common")).drop(columns=["w", "y"])
    made = dp.table(frame, "kind", class_weights={"rare": 1000.0, "common": 0.0})
    program = BayesianNeuralNetwork.from_data(made, hidden_dims=())
    posterior: Posterior = svi(program, made, steps=200, progress=False, compile=False)
    assert {*posterior.predict(frame).classes} == {"rare"}


def outside(x: Tensor, y: Tensor | None = None) -> None:
    line(x, y)
    pyro.sample("total", dist.Normal(0.0, 1.0), obs=x.sum())


def shared(x: Tensor, y: Tensor | None = None) -> None:
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(k + 0 * x[:, 0], 1.0), obs=y)


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        (dp.Program.of(line, "normal"), {}, r"need the name of the plate over rows.*data_plate="),
        (dp.Program.of(outside, "normal", data_plate="data"), {"batch_size": None}, "observes values outside of plate"),
        (dp.Program.of(codes, "multivariate_normal", data_plate="data"), {"batch_size": None}, "one distribution over"),
        (dp.Program.of(shared, lambda x, y=None: None, data_plate="data"), {"batch_size": None}, "weights|scale"),
    ],
    ids=["no plate", "outside", "joint guide", "shared enumeration"],
)
def test_programs_without_weighable_rows_are_refused(
    program: dp.Program, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        svi(program, WEIGHTED, steps=1, progress=False, compile=False, **options)


def test_extend_compares_the_weights() -> None:
    program = dp.Program.of(line, "normal", data_plate="data")
    posterior = svi(program, WEIGHTED, steps=5, progress=False, compile=False)
    dp.extend(posterior, WEIGHTED, steps=1, progress=False, compile=False)
    with pytest.raises(ValueError, match="extend needs the data of the fit"):
        dp.extend(posterior, WEIGHTED.encoding.encode(FRAME.assign(w=1.0)), steps=1, progress=False, compile=False)


def test_a_row_is_left_out_with_its_weight() -> None:
    x, y, w = X[:, 0].double(), Y.double(), WEIGHTED.weights.double()
    posterior = svi(
        dp.Program.of(line, exact_guide, data_plate="data"), WEIGHTED, steps=1, compile=False, progress=False
    )
    precision = 1 + (w * x**2).sum() - w * x**2  # of the posterior without a row
    mean = ((w * x * y).sum() - w * x * y) / precision
    exact = dist.Normal(mean * x, (1 + x**2 / precision).sqrt()).log_prob(y)
    for corrected in (True, False):
        found = posterior.loo(WEIGHTED, draws=30_000, corrected=corrected)
        np.testing.assert_allclose(found.pointwise, exact.numpy(), atol=0.05)
        assert found.elpd == pytest.approx(float((w * exact).sum()), abs=0.3)
        assert found.se == pytest.approx(N**0.5 * float((w * exact).std()), rel=0.05)
    assert posterior.loo(X, Y, draws=100).weights is not None  # those of the fit
