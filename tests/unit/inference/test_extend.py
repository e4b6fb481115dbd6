"""Fits that are extended equal one long fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from uncompiled import replace_compiler

import deepprob as dp
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.inference.svi import init, step
from deepprob.models import VAE
from deepprob.programs.program import Program

X = torch.rand(70, 6, generator=torch.Generator().manual_seed(0))
Y = torch.linspace(-1.0, 3.0, 20)
CONSTANT = Optimizer(schedule="constant", learning_rate=0.02)


def of(guide: Any = "normal") -> Program:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    return Program.of(model, guide, data_plate="data")


def fitted(**options: Any) -> dp.Posterior:
    return svi(of(), Y, **{"batch_size": 8, "optimizer": CONSTANT, "progress": False} | options)


def assert_same(one: dp.Posterior, other: dp.Posterior) -> None:
    first, second = one.instance.tensors(), other.instance.tensors()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert one.history.steps == other.history.steps
    for name in one.history.epochs.keys() - {"seconds"}:
        assert one.history.epochs[name] == other.history.epochs[name], name


@pytest.mark.parametrize("first", [6, 7])
@pytest.mark.parametrize("compile", [False, True])
def test_equals_one_long_fit(first: int, compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_compiler(monkeypatch)
    short = fitted(steps=first, compile=compile)
    before = {name: x.clone() for name, x in short.instance.tensors().items()}
    found = dp.extend(short, Y, steps=20 - first, compile=compile, progress=False)
    assert_same(found, fitted(steps=20, compile=compile))
    assert found.config["steps"] == 20
    assert all(torch.equal(x, before[name]) for name, x in short.instance.tensors().items())
    assert len(short.history.steps["elbo"]) == first


def test_twice_and_from_a_file(tmp_path: Path) -> None:
    once = dp.extend(fitted(epochs=2), Y, epochs=1, progress=False)
    once.save(tmp_path / "p")
    loaded = dp.Posterior.load(tmp_path / "p", of())
    twice = dp.extend(loaded, Y, epochs=2, progress=False)
    assert_same(twice, fitted(epochs=5))
    assert twice.config["epochs"] == 5


@pytest.mark.parametrize(
    "optimizer",
    [
        Optimizer("rmsprop", schedule="constant"),
        Optimizer("adamw", schedule="constant", average=0.9, clip_norm=1.0, accumulate=2),
    ],
    ids=["torch", "everything"],
)
def test_other_optimizers(optimizer: Optimizer) -> None:
    short = fitted(steps=5, optimizer=optimizer)
    assert_same(dp.extend(short, Y, steps=6, progress=False), fitted(steps=11, optimizer=optimizer))


def test_best_state_and_held_out_scores_go_on(tmp_path: Path) -> None:
    def fit(epochs: int) -> dp.Posterior:
        program = VAE((6,), latent_dim=2, hidden_dims=(8,))
        return svi(program, X, epochs=epochs, batch_size=20, held_out=X[:9], optimizer=CONSTANT, progress=False)

    fit(4).save(tmp_path / "p")
    short = dp.Posterior.load(tmp_path / "p")
    assert_same(dp.extend(short, X, epochs=6, held_out=X[:9], progress=False), fit(10))


def test_cosine_continues_as_in_a_fit_of_the_whole_length() -> None:
    short = fitted(epochs=2, optimizer=Optimizer(learning_rate=0.02))
    rates = dp.extend(short, Y, epochs=2, progress=False).history.epochs["learning_rate"]
    assert rates[2:] == fitted(epochs=4, optimizer=Optimizer(learning_rate=0.02)).history.epochs["learning_rate"][2:]


def test_without_a_length_it_goes_on_until_the_bound_has_levelled() -> None:
    found = dp.extend(fitted(steps=30), Y, progress=False)
    assert found.history.levels["level"][-1] == 1.0
    assert found.history.levels["step"][0] == 30 + 500
    draws = found.sample(draws=4000)["loc"]
    assert float(draws.std()) == pytest.approx(21**-0.5, rel=0.2)


def test_own_networks_and_guides() -> None:
    net = nn.Linear(1, 1)

    def model(y: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(net(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=y)

    def guide(y: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.1))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(slope * y, 0.5))

    program = Program.of(model, guide, data_plate="data")

    def fit(steps: int) -> dp.Posterior:
        return svi(program, Y, steps=steps, batch_size=8, optimizer=CONSTANT, progress=False)

    assert_same(dp.extend(fit(5), Y, steps=7, progress=False), fit(12))


def test_refuses_other_data() -> None:
    with pytest.raises(
        ValueError, match=r"extend needs the data of the fit \(20 rows\); got other values or weights \(20 rows\)"
    ):
        dp.extend(fitted(steps=3), Y + 1.0, steps=2)


def test_refuses_what_it_cannot_continue() -> None:
    with pytest.raises(TypeError, match=r"extend expects a Posterior; got FunctionProgram\. Fit one: svi\("):
        dp.extend(of(), Y, steps=2)  # type: ignore[arg-type]
    mode = svi(of("laplace"), Y, steps=400, progress=False)
    with pytest.raises(ValueError, match=r"cannot be extended: guide='laplace' has turned the mode into a Gaussian"):
        dp.extend(mode, Y, steps=2)
    draws = dp.draws_posterior(of(), Y, {"loc": torch.zeros(1, 5)})
    with pytest.raises(ValueError, match=r"cannot be extended: it holds draws"):
        dp.extend(draws, Y, steps=2)
    old = fitted(steps=3)
    old.training = None
    with pytest.raises(ValueError, match=r"cannot be extended: it ended in a step that was cut off or not finite"):
        dp.extend(old, Y, steps=2)
    state, _ = step(init(of(), Y))
    with pytest.raises(
        ValueError, match=r"extended: it is from a loop by hand.*\. Take more steps, step\(state\), before"
    ):
        dp.extend(state.posterior(), Y, steps=2)
    other = fitted(steps=3)
    other.config["routine"] = "mine"
    with pytest.raises(ValueError, match=r"cannot be extended: only fits by svi can be, and this one is by mine"):
        dp.extend(other, Y, steps=2)
    with pytest.raises(ValueError, match=r"give epochs or steps, not both; got epochs=1 and steps=2"):
        dp.extend(fitted(steps=3), Y, epochs=1, steps=2)


def test_refuses_an_optimizer_with_another_memory() -> None:
    short = fitted(steps=3)
    with pytest.raises(ValueError, match=r"the optimizer's name must be that of the fit, 'adam', whose memory"):
        dp.extend(short, Y, steps=2, optimizer="sgd")
    with pytest.raises(ValueError, match=r"the optimizer's average must be that of the fit, None, which it continues"):
        dp.extend(short, Y, steps=2, optimizer=Optimizer(average=0.9))
    slower = dp.extend(short, Y, steps=2, optimizer=Optimizer(learning_rate=1e-3, schedule="constant"), progress=False)
    assert slower.history.epochs["learning_rate"][-1] == 1e-3


def test_settings_that_cannot_be_described_must_be_given() -> None:
    halving = Optimizer(learning_rate=0.02, schedule=lambda step, total: 0.5)
    short = fitted(steps=3, optimizer=halving)
    with pytest.raises(ValueError, match=r"cannot be built from its description \(unknown schedule '<lambda>'"):
        dp.extend(short, Y, steps=2)
    assert_same(dp.extend(short, Y, steps=2, optimizer=halving, progress=False), fitted(steps=5, optimizer=halving))

    class Mine(dp.ELBO):
        def describe(self) -> dict[str, Any]:
            return {"name": "mine"}

    short = fitted(steps=3, objective=Mine())
    with pytest.raises(ValueError, match=r"the objective of this fit, \{'name': 'mine'\}, is not one of deepprob's"):
        dp.extend(short, Y, steps=2)
    assert_same(dp.extend(short, Y, steps=2, objective=Mine(), progress=False), fitted(steps=5, objective=Mine()))


@pytest.mark.parametrize("guide", ["normal", "multivariate_normal", "low_rank"])
def test_guides_relative_to_their_start(guide: str, tmp_path: Path) -> None:
    """They are relative to a Gaussian that the search for a start has found, and that a longer fit finds, too."""
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 100.0, 0.01])
    y = x @ torch.tensor([1.0, 0.02, 30.0])

    def regression(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 100.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)

    def fit(steps: int) -> dp.Posterior:
        return svi(Program.of(regression, guide), (x, y), steps=steps, optimizer=CONSTANT, progress=False)

    fit(150).save(tmp_path / "p")
    short = dp.Posterior.load(tmp_path / "p", Program.of(regression, guide))
    assert_same(dp.extend(short, (x, y), steps=20, progress=False), fit(170))


def coded(epochs: int, **options: Any) -> dp.Posterior:
    program = VAE((6,), latent_dim=2, hidden_dims=(8,))
    return svi(program, X, epochs=epochs, batch_size=20, optimizer=CONSTANT, progress=False, **options)


@pytest.mark.parametrize("name", ["rmsprop", "nadam", "adagrad", torch.optim.Adamax])
def test_the_given_posterior_can_be_extended_twice(name: Any) -> None:
    """The optimizers of torch work on their memory in place."""
    short = fitted(steps=6, optimizer=Optimizer(name, learning_rate=0.02, schedule="constant"))
    one, two = (dp.extend(short, Y, steps=9, progress=False) for _ in range(2))
    assert_same(one, two)


def test_a_search_for_a_start_does_not_depend_on_the_length() -> None:
    short = fitted(steps=100, batch_size=None)
    assert_same(dp.extend(short, Y, steps=1200, progress=False), fitted(steps=1300, batch_size=None))


def test_a_class_of_torch_goes_on() -> None:
    rprop = Optimizer(torch.optim.Rprop, learning_rate=0.02, schedule="constant")
    found = dp.extend(fitted(steps=6, optimizer=rprop), Y, steps=9, progress=False)
    assert_same(found, fitted(steps=15, optimizer=rprop))


class Adam(torch.optim.SGD):
    """A class of the user under a name of torch."""


def test_a_class_of_the_user_must_be_given() -> None:
    own = Optimizer(Adam, learning_rate=0.02, schedule="constant")
    short = fitted(steps=6, optimizer=own)
    with pytest.raises(ValueError, match=r"cannot be built from its description \(unknown optimizer '.*Adam'"):
        dp.extend(short, Y, steps=9, progress=False)
    assert_same(dp.extend(short, Y, steps=9, progress=False, optimizer=own), fitted(steps=15, optimizer=own))


def test_windows_begin_after_a_warm_up_that_is_not_over() -> None:
    warming = [dp.KLWarmUp(100)]  # 300 steps
    short = fitted(steps=6, callbacks=[])
    found = dp.extend(short, Y, progress=False, callbacks=warming, compile=False)
    assert found.history.levels["step"][0] == 300 + 200 + 300


def test_held_out_rows_that_come_later_choose_among_later_epochs(tmp_path: Path) -> None:
    short = coded(3)
    found = dp.extend(short, X, epochs=4, held_out=X[:9], progress=False, callbacks=[dp.CSVLogger(tmp_path / "e.csv")])
    assert found.history.best_epoch > 3
    assert any(not torch.equal(x, short.instance.tensors()[n]) for n, x in found.instance.tensors().items())
    scores = found.history.epochs["held_out_elbo"]
    assert [math.isnan(x) for x in scores] == [True] * 3 + [False] * 4


def test_early_stopping_looks_at_the_scores_of_its_own_fit(tmp_path: Path) -> None:
    stopping = dp.EarlyStopping(3)
    short = coded(4, held_out=X[:9], callbacks=[stopping])
    found = dp.extend(short, X, epochs=20, callbacks=[stopping, dp.CSVLogger(tmp_path / "e.csv")], progress=False)
    assert len(found.history.epochs["elbo"]) > 4 + 3
    assert {len(column) for column in found.history.epochs.values()} == {len(found.history.epochs["elbo"])}
