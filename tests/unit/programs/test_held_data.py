"""Programs that hold their data, on minibatches: the indices of the data plate select the rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor

from deepprob.fitting.objectives import ELBO
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program
from deepprob.programs.run import Run

N = 40
DATA = torch.randn(N, generator=torch.Generator().manual_seed(0)) + 1.5
PRECISION = N + 1 / 9
MEAN, SD = float(DATA.sum()) / PRECISION, PRECISION**-0.5


def shared() -> Tensor:
    mean: Tensor = pyro.sample("mean", dist.Normal(0.0, 3.0))
    return mean


def from_a_global() -> None:
    mean = shared()
    with pyro.plate("data", N) as rows:
        pyro.sample("y", dist.Normal(mean, 1.0), obs=DATA[rows])


def with_pyros_rows() -> None:
    mean = shared()
    with pyro.plate("data", N, subsample_size=8):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=pyro.subsample(DATA, event_dim=0))


def from_a_closure() -> Callable[[], None]:
    y = DATA.clone()

    def model() -> None:
        mean = shared()
        with pyro.plate("data", len(y)) as rows:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y[rows])

    return model


class FromSelf(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.y = DATA

    def forward(self) -> None:
        mean = shared()
        with pyro.plate("data", N) as rows:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=self.y[rows])


class Subclass(Program):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("y", DATA.clone())

    def model(self) -> None:
        mean = shared()
        with self.data_plate(self.y) as rows:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=self.y[rows])


def of_rows() -> None:
    """A model with a latent number for every row."""
    mean = shared()
    with pyro.plate("data", N) as rows:
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=DATA[rows])


def by_row() -> None:
    """Its guide, with parameters for every row."""
    pyro.sample("mean", dist.Delta(pyro.param("at", torch.tensor(0.3))))
    with pyro.plate("data", N) as rows:
        start = pyro.param("z_at", torch.linspace(-1.0, 1.0, N))
        pyro.sample("z", dist.Delta(start[rows]))


def fitted(model: Any, guide: Any = "normal", **options: Any) -> Posterior:
    program = model if isinstance(model, Program) else Program.of(model, guide, data_plate="data")
    settings = {"batch_size": 7, "steps": 1500, "progress": False, "optimizer": Optimizer(learning_rate=0.02)}
    return svi(program, None, guide=guide, **settings | options)


@pytest.mark.parametrize(
    "model", [from_a_global, with_pyros_rows, from_a_closure(), FromSelf(), Subclass()],
    ids=["global", "pyros_rows", "closure", "self", "subclass"],
)  # fmt: skip
def test_minibatches_of_held_data_give_the_posterior_of_all_rows(model: Any) -> None:
    posterior = fitted(model, compile=False)
    draws = posterior.sample(draws=4000)["mean"]
    assert abs(float(draws.mean()) - MEAN) < 0.05
    assert abs(float(draws.std()) / SD - 1) < 0.2
    assert posterior.config["batch_size"] == 7
    assert posterior.history.steps_per_epoch == math.ceil(N / 7)
    assert posterior.log_likelihood(draws=3).shape == (3, N)
    assert posterior.predict(draws=3).mean.shape == (N,)


def test_rows_are_weighted_as_in_pyro() -> None:
    rows = torch.tensor([3, 17, 5, 39, 20])

    instance = ProgramInstance(Program.of(of_rows, by_row, data_plate="data"), (), 1)
    assert instance.num_data == N
    with instance.running():
        loss, _ = ELBO()(Run(instance.program, (), rows, N, plates=instance.structure.plates))
        ours = torch.autograd.grad(N * loss, list(instance.parameters().values()))

    def model() -> None:
        mean = shared()
        with pyro.plate("data", N, subsample=rows):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=DATA[rows])

    def guide() -> None:
        pyro.sample("mean", dist.Delta(pyro.param("at", torch.tensor(0.3))))
        with pyro.plate("data", N, subsample=rows):
            pyro.sample("z", dist.Delta(pyro.param("z_at", torch.linspace(-1.0, 1.0, N))[rows]))

    with pyro.get_param_store().scope():
        pyros_loss = Trace_ELBO().differentiable_loss(model, guide)
        theirs = torch.autograd.grad(pyros_loss, [pyro.get_param_store()._params[n] for n in ("at", "z_at")])
    torch.testing.assert_close(N * loss, pyros_loss)
    assert list(instance.parameters()) == ["store.at", "store.z_at"]
    torch.testing.assert_close(list(ours), list(theirs))


@pytest.mark.parametrize("guide", ["normal", pytest.param(by_row, marks=pytest.mark.slow)])
def test_parameters_of_rows_belong_to_the_rows(guide: Any) -> None:
    posterior = fitted(of_rows, guide, compile=False, steps=3000)
    mean = float(posterior.sample(draws=500)["mean"].mean())
    z = posterior.sample(draws=500)["z"].mean(0)
    assert z.shape == (N,)
    torch.testing.assert_close(z, (mean + DATA) / 2, atol=0.25, rtol=0.0)


def test_compiled_minibatches_of_held_data(tmp_path: Path) -> None:
    eager, compiled = (fitted(from_a_global, compile=how, steps=1500, seed=1) for how in (False, True))
    assert compiled.config["compiled"]
    for name, value in compiled.parameters().items():
        torch.testing.assert_close(value, eager.parameters()[name], atol=0.05, rtol=0.0)
    compiled.save(tmp_path / "fit")
    again = Posterior.load(tmp_path / "fit", program=Program.of(from_a_global, "normal", data_plate="data"))
    assert torch.equal(again.log_likelihood(draws=3, seed=2), compiled.log_likelihood(draws=3, seed=2))


@pytest.mark.slow
def test_pyros_own_rows_without_a_data_plate() -> None:
    posterior = svi(
        Program.of(with_pyros_rows, "normal"), None, steps=2000, progress=False,
        optimizer=Optimizer(learning_rate=0.02), compile=False,
    )  # fmt: skip
    draws = posterior.sample(draws=4000)["mean"]
    assert abs(float(draws.mean()) - MEAN) < 0.05
    assert posterior.log_likelihood(draws=3).shape == (3, N)


def whole() -> None:
    mean = shared()
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=DATA)


def without_a_size() -> None:
    mean = shared()
    with pyro.plate("data"):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=DATA)


def shifted_whole() -> None:
    mean = shared() + torch.zeros(N)
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=DATA)


def one_by_one() -> None:
    mean = shared()
    for i in pyro.plate("data", N):
        pyro.sample(f"y_{i}", dist.Normal(mean, 1.0), obs=DATA[i])


def test_refuses_programs_that_do_not_select_their_rows() -> None:
    for model in (without_a_size, whole):
        with pytest.raises(ValueError, match=r"site 'y' observes 40 rows where plate 'data' holds 7\. Select the rows"):
            fitted(model)
    with pytest.raises(ValueError, match=r"cannot run on 7 of the 40 rows that it holds: .*\. Select the rows by the"):
        fitted(shifted_whole)
    with pytest.raises(ValueError, match=r"batch_size=7 needs rows, but no plate of the program holds the rows of its"):
        fitted(one_by_one)
    with pytest.raises(
        ValueError, match=r"batch_size=7 is smaller than the data \(40 rows\), but the program names no"
    ):
        svi(Program.of(from_a_global, "normal"), None, batch_size=7)
    with pytest.raises(ValueError, match="is one distribution over the latents of all rows"):
        fitted(of_rows, "multivariate_normal")
    assert fitted(whole, batch_size=None, steps=2).config["batch_size"] == N
