"""Plates: an unnamed plate never changes the fit, and queries find the rows of any plate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import deepprob as dp
from deepprob.engine.random import RandomStream
from deepprob.fitting.objectives import ELBO, IWAE
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import num_rows
from deepprob.programs.program import Program
from deepprob.programs.run import Run

Y = 1 + torch.randn(20, generator=torch.Generator().manual_seed(0))
COLUMNS = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
EXACT = float(dist.MultivariateNormal(torch.zeros(20), torch.eye(20) + 9.0).log_prob(Y))  # of Y, with a prior of sd 3


def mean(prior: float = 3.0) -> Tensor:
    return torch.as_tensor(pyro.sample("mu", dist.Normal(0.0, prior)))


def closure() -> None:
    mu = mean()
    with pyro.plate("rows", 20) as i:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y[i])


def ignored_argument(x: Tensor) -> None:
    closure()


def second_dimension(y: Tensor) -> None:
    mu = mean()
    with pyro.plate("columns", 20) as i:
        pyro.sample("y", dist.Normal(mu, 1.0).expand([5]).to_event(1), obs=y[:, i].T)


def without_size(y: Tensor) -> None:
    mu = mean()
    with pyro.plate("rows"):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def nested(y: Tensor) -> None:
    mu = mean()
    with pyro.plate("groups", 20, dim=-1) as j, pyro.plate("members", 5, dim=-2) as i:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[i][:, j])


def crossed(y: Tensor) -> None:
    mu = mean()
    columns, members = pyro.plate("columns", 20, dim=-1), pyro.plate("members", 5, dim=-2)
    with columns:
        column = pyro.sample("column", dist.Normal(0.0, 1.0))
    with members as i, columns as j:
        pyro.sample("y", dist.Normal(mu + column, 1.0), obs=y[i][:, j])


def sequential(y: Tensor) -> None:
    mu = mean()
    for i in pyro.plate("rows", len(y)):
        pyro.sample(f"y_{i}", dist.Normal(mu, 1.0), obs=y[i])


def subsampling(y: Tensor) -> None:
    mu = mean()
    with pyro.plate("rows", len(y), subsample_size=5) as i:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[i])


def subsampling_codes(y: Tensor) -> None:
    mu = mean()
    with pyro.plate("rows", len(y), subsample_size=5) as i:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[i])


class Holder(Program):
    """A program that holds its data."""

    def model(self) -> None:
        mu = mean()
        with self.data_plate(Y):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)

    def guide(self) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("mu", dist.Normal(loc, 0.3))


CASES: dict[str, tuple[Callable[..., None], Any, int]] = {
    "closure": (closure, None, 20),
    "ignored argument": (ignored_argument, torch.zeros(3), 20),
    "second dimension": (second_dimension, COLUMNS, 20),
    "without a size": (without_size, Y, 20),
    "nested": (nested, COLUMNS, 100),
    "crossed": (crossed, COLUMNS, 100),
    "sequential": (sequential, Y, 20),
    "subsampling": (subsampling, Y, 20),
    "subsampling codes": (subsampling_codes, Y, 20),
}


def fitted(model: Callable[..., None], data: Any, **options: Any) -> Posterior:
    options = {"epochs": 5, "progress": False} | options
    return svi(Program.of(model, "normal", data_plate=options.pop("data_plate", None)), data, **options)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss_is_pyros(case: tuple[Callable[..., None], Any, int]) -> None:
    model, data, _ = case
    batch = () if data is None else (data,)
    instance = ProgramInstance(Program.of(model, AutoNormal), batch, num_rows(batch))
    run = Run(instance.program, batch, torch.arange(instance.num_data), instance.num_data)
    with instance.running(), torch.no_grad():
        with RandomStream(1).drawing():
            loss, _ = ELBO(analytic_kl=False)(run)
        with RandomStream(1).drawing():
            pyros = Trace_ELBO().loss(instance.program.model, instance.program.guide, *batch)
    assert instance.num_data * float(loss) == pytest.approx(pyros, rel=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_query_sees_all_rows(case: tuple[Callable[..., None], Any, int]) -> None:
    model, data, rows = case
    posterior, batch = fitted(model, data), () if data is None else (data,)
    assert posterior.log_likelihood(*batch, draws=3).shape == (3, rows)
    assert posterior.elbo(*batch).shape == (rows,)
    assert all(posterior.predict(*batch, draws=3, site=n).mean.numel() > 0 for n in posterior.structure.observed)
    assert bool(torch.isfinite(posterior.log_evidence(*batch)))
    assert all(len(value) == 4 for value in posterior.sample(*batch, draws=4).values())
    assert posterior.to_arviz(*batch, draws=5) is not None
    assert dp.check(posterior, data, draws=20, particles=20).verdict in ("pass", "caution", "fail")


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("closure", "without a size", "sequential")]


@pytest.mark.parametrize("name", [*SLOW, "subsampling"])
def test_evidence_is_exact_for_every_way_to_write_rows(name: str) -> None:
    model, data, _ = CASES[name]
    posterior = fitted(model, data, epochs=1000, seed=0)
    found = posterior.log_evidence(*(() if data is None else (data,)), particles=4000)
    assert float(found) == pytest.approx(EXACT, abs=0.1)


@pytest.mark.parametrize("name", ["closure", "nested", "crossed", "subsampling codes"])
def test_indices_of_unnamed_plates_are_traced(name: str) -> None:
    model, data, _ = CASES[name]
    compiled, eager = (fitted(model, data, compile=compile, epochs=300) for compile in (True, False))
    assert compiled.config["compiled"]
    a, b = (p.sample(*(() if data is None else (data,)), draws=500)["mu"].mean() for p in (compiled, eager))
    assert float(a) == pytest.approx(float(b), abs=0.1)


@pytest.mark.parametrize("name", [None, "rows"])
def test_data_in_a_closure_give_the_number_of_rows(name: str | None) -> None:
    posterior = fitted(closure, None, data_plate=name)
    assert posterior.instance.num_data == 20
    assert posterior.predict(draws=3).mean.shape == (20,)
    assert posterior.to_arviz(draws=3).log_likelihood["y"].shape == (1, 3, 20)
    assert fitted(closure, None, data_plate=name, objective=IWAE(3)).log_likelihood(draws=2).shape == (2, 20)


def test_program_that_holds_its_data() -> None:
    posterior = svi(Holder(), None, epochs=1500, seed=0)
    assert posterior.instance.num_data == 20
    exact = float(Y.sum() / (20 + 1 / 9))
    assert float(posterior.parameters()["loc"]) == pytest.approx(exact, abs=0.05)
    assert dp.check(posterior, None, draws=50).verdict in ("pass", "caution")


def test_plate_without_a_size_is_predicted_by_row() -> None:
    posterior = fitted(without_size, Y)
    assert posterior.predict(Y[:7], draws=3).mean.shape == (7,)


def test_named_plate_without_a_size_is_weighted_by_all_rows() -> None:
    instance = ProgramInstance(Program.of(without_size, AutoNormal, data_plate="rows"), (Y,), 20, full_batch=False)
    losses = []
    for rows in (torch.arange(20), torch.arange(5), torch.arange(5, 20)):
        run = Run(instance.program, (Y[rows],), rows, 20)
        with instance.running(), torch.no_grad(), RandomStream(1).drawing():
            losses.append(float(ELBO()(run)[1]["likelihood"]))
    assert losses[0] == pytest.approx((5 * losses[1] + 15 * losses[2]) / 20, rel=1e-5)


def test_named_plate_that_subsamples_takes_the_rows_of_the_routine() -> None:
    posterior = fitted(subsampling, Y, data_plate="rows", batch_size=10)
    assert posterior.log_likelihood(Y[:7], draws=3).shape == (3, 7)
    with pyro.plate("rows", 20, subsample_size=5) as i:  # Pyro's own plates are as before
        assert len(i) == 5


def test_codes_of_a_plate_that_subsamples_have_one_row_per_datum() -> None:
    posterior = fitted(subsampling_codes, Y)
    assert posterior.sample(Y, draws=3)["z"].shape == (3, 20)
    assert posterior.structure.local == ("z",)


def test_row_plate_is_the_only_one_around_all_data() -> None:
    def two(y: Tensor, x: Tensor) -> None:
        mu = mean()
        with pyro.plate("rows", 20):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        with pyro.plate("others", 20):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def found(model: Callable[..., None], *data: Tensor) -> tuple[str, int]:
        structure = ProgramInstance(Program.of(model, "normal"), data, num_rows(data)).structure
        return structure.row_plate, structure.rows

    assert found(closure) == ("rows", 20)
    assert found(subsampling, Y) == ("rows", 20)
    assert found(without_size, Y) == ("rows", 20)
    assert found(second_dimension, COLUMNS) == ("columns", 20)
    assert found(nested, COLUMNS) == found(sequential, Y) == found(two, Y, Y) == ("", 0)


def test_loop_over_some_rows_has_the_sites_of_all_rows_in_queries() -> None:
    def model(y: Tensor) -> None:
        mu = mean()
        for i in pyro.plate("rows", len(y), subsample_size=5):
            pyro.sample(f"y_{int(i)}", dist.Normal(mu, 1.0), obs=y[int(i)])

    posterior = fitted(model, Y)
    assert set(posterior.structure.observed) == {f"y_{i}" for i in range(20)}
    assert posterior.predict(Y, draws=3, site="y_7").mean.shape == ()


def two_plates(y: Tensor, x: Tensor) -> None:
    mu = mean()
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    with pyro.plate("others", len(x)):
        pyro.sample("x", dist.Normal(mu, 2.0), obs=x)


def a_total(y: Tensor, total: Tensor) -> None:
    mu = mean()
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    pyro.sample("total", dist.Normal(20 * mu, 4.5), obs=total)


def two_crossed(y: Tensor, x: Tensor) -> None:
    mu = mean()
    with pyro.plate("columns", 20, dim=-1), pyro.plate("members", 5, dim=-2):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


@pytest.mark.parametrize("plate", [None, "rows"])
@pytest.mark.parametrize(("model", "other"), [(two_plates, Y[:7]), (a_total, Y.sum())])
def test_sites_without_common_rows_are_asked_one_by_one(
    model: Callable[..., None], other: Tensor, plate: str | None
) -> None:
    posterior = fitted(model, (Y, other), data_plate=plate, held_out=(Y, other))
    for query in (posterior.log_likelihood, posterior.elbo):
        with pytest.raises(ValueError, match=r"observed without a plate around all of them.*data_plate=.*site='y'"):
            query(Y, other)
    name = posterior.structure.observed[1]
    assert posterior.log_likelihood(Y, other, draws=3, site="y").shape == (3, 20)
    assert posterior.log_likelihood(Y, other, draws=3, site=name).shape == (3, other.numel())
    assert posterior.log_evidence(Y, other, particles=3).shape == ()
    assert posterior.predict(Y, other, draws=3, site=name).draws.shape == (3, *other.shape)
    assert posterior.to_arviz(Y, other, draws=5).log_likelihood["y"].shape == (1, 5, 20)
    assert dp.check(posterior, (Y, other), draws=20, particles=20)[f"posterior predictive check of {name}"]
    with pytest.raises(ValueError, match=rf"the program observes no site 'mu'\. Choose from: y, {name}\."):
        posterior.log_likelihood(Y, other, site="mu")


def test_one_of_several_common_plates_is_to_be_named() -> None:
    data = (COLUMNS, COLUMNS)
    with pytest.raises(ValueError, match=r"y, x are observed inside of the plates .*, and any .*data_plate="):
        fitted(two_crossed, data).log_likelihood(*data)
    assert fitted(two_crossed, data, data_plate="members").log_likelihood(*data, draws=3).shape == (3, 5)


def test_rows_share_what_is_observed_outside_of_their_plate() -> None:
    def codes(y: Tensor, total: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        pyro.sample("total", dist.Normal(z.sum(-1), 4.5), obs=total)

    data = (Y, Y.sum())
    posterior = fitted(codes, data, data_plate="rows", held_out=data)
    assert posterior.log_evidence(*data, particles=3).shape == ()
    assert len(posterior.history.epochs["held_out_elbo"]) == 5


def test_sites_that_a_sum_couples_are_asked_together() -> None:
    def mixture(y: Tensor, x: Tensor) -> None:
        mu = mean()
        with pyro.plate("rows", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(mu * k, 1.0), obs=y)
            pyro.sample("x", dist.Normal(mu * k, 1.0), obs=x)

    posterior = svi(Program.of(mixture, AutoNormal(pyro.poutine.block(mixture, hide=["k"]))), (Y, Y), epochs=3)
    assert posterior.log_likelihood(Y, Y, draws=3).shape == (3, 20)
    with pytest.raises(ValueError, match=r"k is summed out, which couples the observed sites.*leave out site="):
        posterior.log_likelihood(Y, Y, site="y")
