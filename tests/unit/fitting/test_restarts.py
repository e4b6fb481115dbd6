"""Fits with restarts: several starts take every step together, and the best is kept."""

from __future__ import annotations

import math
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from uncompiled import replace_compiler

import deepprob as dp
from deepprob.fitting import starts
from deepprob.fitting.callbacks import Callback, Checkpoint, Fit
from deepprob.fitting.divergence import DivergenceError
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.restarts import RestartedFit
from deepprob.fitting.run import RunningFit
from deepprob.fitting.snapshots import Position
from deepprob.inference import svi
from deepprob.models import VAE, BayesianNeuralNetwork
from deepprob.networks import MLP
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program
from deepprob.programs.relative_guides import RelativeGuide

Y = torch.linspace(-1.0, 3.0, 20)
TIERS = ["eager", "traced", "compiled"]
FAST: dict[str, Any] = {"steps": 300, "optimizer": Optimizer(learning_rate=0.05)}


def model(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def two_modes(_: Tensor) -> Tensor:
    """A posterior with modes at -2 and 2, of which the second has three quarters of the mass."""
    z = pyro.sample("z", dist.Normal(0.0, 10.0))
    weights, centers = torch.tensor([0.25, 0.75]), torch.tensor([-2.0, 2.0])
    density = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(centers, 0.3)).log_prob(z)
    pyro.factor("density", density - dist.Normal(0.0, 10.0).log_prob(z))
    return z


def two_modes_of_two(_: Tensor) -> None:
    """The posterior of `two_modes`, and a second latent that correlates with the first."""
    pyro.sample("b", dist.Normal(two_modes(_), 0.5))


def own_guide(_: Tensor) -> None:
    """A guide that starts on either side with probability 1/2."""
    loc = pyro.param("at", lambda: 2.0 * torch.randn(()))
    pyro.sample("z", dist.Normal(loc, pyro.param("scale", torch.tensor(0.3), constraint=dist.constraints.positive)))


def fitted(program: Program | None = None, data: Any = Y, **options: Any) -> Posterior:
    settings: dict[str, Any] = {"progress": False, "compile": False, "restarts": 3, "steps": 40}
    return svi(program or Program.of(model, "normal", data_plate="data"), data, **settings | options)


def same(one: Posterior, other: Posterior) -> bool:
    first, second = one.instance.tensors(), other.instance.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def compile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The argument for a tier; the compiler is a stand-in."""
    replace_compiler(monkeypatch)
    monkeypatch.setattr("deepprob.fitting.tiers.pays_to_trace", lambda *_: request.param == "traced")
    return bool(request.param == "compiled")


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, list[float]]]:
    """The records of all starts, once a fit has ended."""
    found: list[dict[str, list[float]]] = []
    keep = RestartedFit._keep_best

    def noted(self: RestartedFit) -> None:
        found[:] = [dict(start.steps) for start in self.starts]
        keep(self)

    monkeypatch.setattr(RestartedFit, "_keep_best", noted)
    return found


@pytest.mark.parametrize(("seed", "compile"), [(0, "eager"), (1, "traced"), (2, "compiled")], indirect=["compile"])
def test_ends_in_the_better_mode(seed: int, compile: bool) -> None:
    """A fit of one start fails with probability 1/2, one of four with 1/16; these seeds are fixed."""
    program = Program.of(two_modes, own_guide)
    posterior = fitted(program, torch.zeros(1), restarts=4, seed=seed, compile=compile, **FAST)
    assert float(posterior.sample(draws=200)["z"].mean()) == pytest.approx(2.0, abs=0.3)
    found = posterior.history.restarts
    assert posterior.config["restarts"] == 4
    assert sum(found["kept"]) == 1.0
    kept = found["kept"].index(1.0)
    assert found["bound"][kept] == max(found["bound"])
    assert found["behind"][kept] == 0.0
    assert found["distance.z"][kept] == 0.0
    other = [k for k, x in enumerate(found["distance.z"]) if x > 3]
    assert all(found["behind"][k] > 3 * found["behind_se"][k] for k in other)
    # The bound of a start in the mode of weight w is log(w).
    for k, (bound, se) in enumerate(zip(found["bound"], found["se"], strict=True)):
        assert bound == pytest.approx(math.log(0.25 if k in other else 0.75), abs=0.05 + 4 * se)


class Begin(Callback):
    """Notes where every start begins; lets a fit without restarts begin at a start that was noted."""

    def __init__(self, at: Position | None = None) -> None:
        self.at, self.starts = at, list[Position]()

    def start(self, fit: Fit) -> None:
        if isinstance(fit, RestartedFit):
            self.starts = [start.at for start in fit.starts]
            assert len(fit.state.varied) > 0
            assert [id(x) for x in fit.state.carry["buffers"]] == [id(x) for x in fit.state.varied]
        elif self.at is not None:
            assert isinstance(fit, RunningFit)
            guide = fit.state.instance.program.current_guide
            assert isinstance(guide, RelativeGuide)
            for x, value in zip(guide.gaussian(), self.at.carry["buffers"], strict=True):
                x.copy_(value)
            fit.state.assign({"packed": self.at.carry["packed"]})
            fit.noise.state = self.at.noise


@pytest.mark.parametrize("guide", ["map", "laplace"])
def test_point_estimates_at_two_modes_are_apart_in_the_units_of_the_site(guide: str) -> None:
    posterior = fitted(Program.of(two_modes, guide), torch.zeros(1), **FAST | {"restarts": 8})
    distances = posterior.history.restarts["distance.z"]
    assert distances[posterior.history.restarts["kept"].index(1.0)] == 0.0
    assert max(distances) == pytest.approx(4.0, abs=0.3)


@pytest.mark.filterwarnings("ignore:the starts take their steps in turn")  # "low_rank" does, once it is traced
@pytest.mark.parametrize("compile", TIERS, indirect=True)
@pytest.mark.parametrize("guide", ["normal", "multivariate_normal", pytest.param("low_rank", marks=pytest.mark.slow)])
def test_every_start_searches_its_own_mode(guide: str, compile: bool) -> None:
    """The search leads each start into a mode; the fit is that of the kept start alone."""
    program, begin = Program.of(two_modes_of_two, guide), Begin()
    options: dict[str, Any] = {"steps": 120, "compile": compile, "seed": 1}
    posterior = fitted(program, torch.zeros(1), restarts=5, callbacks=[begin], **options)
    found = posterior.history.restarts
    kept = found["kept"].index(1.0)
    other = [k for k, x in enumerate(found["distance.z"]) if x > 3]
    assert other
    assert max(begin.starts[k].carry["buffers"][0].min() for k in other) < -1.0  # where the search ended
    assert float(posterior.sample(draws=200)["z"].mean()) == pytest.approx(2.0, abs=0.2)
    for k in range(5):
        gap = math.log(3.0) if k in other else 0.0
        assert found["behind"][k] == pytest.approx(gap, abs=0.02 + 4 * found["behind_se"][k])

    alone = fitted(program, torch.zeros(1), restarts=1, callbacks=[Begin(begin.starts[kept])], **options)
    assert posterior.history.steps["elbo"] == pytest.approx(alone.history.steps["elbo"], rel=1e-4, abs=1e-4)
    first, second = posterior.parameters(), alone.parameters()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name], rtol=1e-3, atol=1e-4), name


def test_starts_without_a_gaussian_keep_their_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the search helps one start only, the others are relative to N(0, 1), which changes nothing."""
    search, calls = starts.search_start, [0]

    def second_only(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            search(*arguments)

    options: dict[str, Any] = {"steps": 120, "guide": "multivariate_normal", "weights": "keep"}
    alone = fitted(restarts=1, **options)
    monkeypatch.setattr(starts, "search_start", lambda *x: second_only(*x[:3], "auto", *x[4:]))
    records: list[list[float]] = []
    monkeypatch.setattr(RestartedFit, "_keep_best", lambda self: records.extend(x.steps["elbo"] for x in self.starts))
    fitted(**options)
    assert records[0] == pytest.approx(alone.history.steps["elbo"], rel=1e-4)
    assert records[2][0] > records[1][0]  # the start that searched


@pytest.mark.parametrize("compile", TIERS, indirect=True)
@pytest.mark.parametrize("batch_size", [5, None])
def test_the_first_start_is_the_fit_without_restarts(
    batch_size: int | None, compile: bool, records: list[dict[str, list[float]]]
) -> None:
    one = fitted(restarts=1, batch_size=batch_size, compile=compile)
    assert not one.history.restarts
    fitted(batch_size=batch_size, compile=compile)
    assert records[0].keys() == one.history.steps.keys()
    for name, values in one.history.steps.items():
        assert records[0][name] == pytest.approx(values, rel=1e-4, abs=1e-5)
    assert len({record["elbo"][0] for record in records}) == 3


def test_the_record_is_that_of_the_kept_start(records: list[dict[str, list[float]]]) -> None:
    posterior = fitted(batch_size=5, epochs=10, steps=None)
    kept = posterior.history.restarts["kept"].index(1.0)
    assert posterior.history.steps == records[kept]
    means = np.array(posterior.history.steps["elbo"]).reshape(10, 4).mean(1)
    assert posterior.history.epochs["elbo"] == pytest.approx(means)
    assert posterior.history.best_epoch == 10


def test_starts_of_a_named_guide_are_spread() -> None:
    found: list[float] = []

    class Look(Callback):
        def start(self, fit: Fit) -> None:
            assert isinstance(fit, RestartedFit)
            found.extend(float(start.at.carry["packed"][0][0]) for start in fit.starts)

    fitted(restarts=20, callbacks=[Look()], steps=2)
    assert len(set(found)) == 20
    assert max(map(abs, found)) < 2.0
    assert np.std(found[1:]) == pytest.approx(4 / 12**0.5, rel=0.4)  # of a uniform distribution


def test_says_that_nothing_varies() -> None:
    def guide(y: Tensor) -> None:
        pyro.sample("loc", dist.Normal(pyro.param("at", torch.tensor(0.0)), 0.2))

    with pytest.warns(UserWarning, match=r"restarts=3 has nothing to vary.*Use a guide by name"):
        fitted(Program.of(model, guide))


def test_says_that_own_networks_keep_their_weights() -> None:
    net = nn.Linear(1, 2)

    def guide(y: Tensor) -> None:
        at, scale = pyro.module("net", net)(torch.ones(1)).unbind(-1)
        pyro.sample("loc", dist.Normal(at, scale.exp()))

    program = Program.of(model, guide)
    with pytest.warns(
        UserWarning, match=r"restarts=3 .*: weights='auto' keeps the weights of your .*Write weights='fresh'\.$"
    ):
        fitted(program)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(program, weights="fresh")


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "three", True])
def test_refuses_what_is_no_count(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"restarts must be a whole number of at least 1; got"):
        fitted(restarts=wrong)


def test_refuses_held_out_data() -> None:
    with pytest.raises(ValueError, match=r"restarts=3 keeps the start with the best bound.*Leave out one"):
        fitted(held_out=Y)


@pytest.mark.parametrize("compile", TIERS, indirect=True)
def test_bayesian_network(compile: bool) -> None:
    x = torch.linspace(-1, 1, 30).unsqueeze(1)
    data = (x, (3 * x[:, 0]).sin())
    posterior = fitted(BayesianNeuralNetwork(MLP(1, 1, (8,))), data, restarts=2, compile=compile)
    found = posterior.history.restarts
    distances = [values for name, values in found.items() if name.startswith("distance.")]
    assert len(distances) == len(posterior.latent_sites)
    assert all(x[found["kept"].index(0.0)] > 0.0 for x in distances)
    assert posterior.predict(x, draws=5).mean.shape == (30, 1)


def test_program_that_reads_values() -> None:
    """It cannot be traced: its starts take their steps in turn."""

    def reads(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        scale = 1.0 if float(loc.detach()) > -100 else 2.0
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, scale), obs=y)

    with pytest.warns(UserWarning, match="not compiled"):
        posterior = fitted(Program.of(reads, "normal"), compile=True, **FAST)
    assert float(posterior.sample(draws=400)["loc"].mean()) == pytest.approx(20 / 21, abs=0.15)


@pytest.mark.parametrize("compile", ["traced"], indirect=True)
@pytest.mark.parametrize(
    ("replaced", "reason"),
    [
        ("deepprob.fitting.step_loop.stacked_step", r"its graph cannot be batched \(no rule"),
        ("deepprob.fitting.compiling.difference", r"no rule"),
    ],
)
def test_in_turn_where_not_together(
    compile: bool, replaced: str, reason: str, monkeypatch: pytest.MonkeyPatch, records: list[dict[str, list[float]]]
) -> None:
    fitted(compile=compile)
    together, calls = [dict(record) for record in records], [0]

    def fail(*arguments: Any, **options: Any) -> str:
        calls[0] += 1
        if replaced.endswith("difference"):
            return "no rule" if calls[0] == 1 else ""
        raise RuntimeError("no rule")

    monkeypatch.setattr(replaced, fail)
    with pytest.warns(UserWarning, match=rf"the starts take their steps in turn, which is slower: {reason}"):
        fitted(compile=compile)
    for one, other in zip(together, records, strict=True):
        assert one["elbo"] == pytest.approx(other["elbo"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("compile", ["traced"], indirect=True)
def test_optimizers_of_torch_take_starts_in_turn(compile: bool) -> None:
    with pytest.warns(UserWarning, match="which is slower: rmsprop is torch's own optimizer"):
        fitted(compile=compile, optimizer="rmsprop")


@pytest.mark.parametrize(
    ("compile", "optimizer"),
    [
        ("eager", None),
        ("eager", "rmsprop"),
        ("traced", Optimizer("sgd", average=0.9, accumulate=2)),
        ("compiled", None),
    ],
    indirect=["compile"],
)
def test_resumes_bit_for_bit(compile: bool, optimizer: Any, tmp_path: Path) -> None:
    class Killed(Callback):
        def epoch_end(self, fit: Fit) -> None:
            if fit.epoch == 6:
                raise RuntimeError("killed")

    def run(*callbacks: Callback) -> Posterior:
        options: dict[str, Any] = {"batch_size": 5, "epochs": 10, "steps": None, "optimizer": optimizer}
        return fitted(**options, compile=compile, callbacks=callbacks)

    whole = run(Checkpoint(tmp_path / "a", every=2))
    with pytest.raises(RuntimeError, match="killed"):
        run(Checkpoint(tmp_path / "b", every=2), Killed())
    resumed = run(Checkpoint(tmp_path / "b", every=2))
    assert same(whole, resumed)
    assert whole.history.steps == resumed.history.steps
    assert whole.history.restarts == resumed.history.restarts
    with pytest.raises(ValueError, match=r"restarts \(was 3, now 2\)"):
        fitted(
            restarts=2,
            batch_size=5,
            epochs=10,
            steps=None,
            optimizer=optimizer,
            callbacks=[Checkpoint(tmp_path / "b", every=2)],
        )


@pytest.mark.parametrize("compile", ["compiled"], indirect=True)
def test_levels(compile: bool, records: list[dict[str, list[float]]]) -> None:
    posterior = fitted(steps=None, batch_size=5, compile=compile)
    assert posterior.history.levels["level"][-1] == 1.0
    assert {len(record["elbo"]) for record in records} == {len(posterior.history.steps["elbo"])}
    assert max(posterior.history.restarts["behind"]) < 0.2


@pytest.mark.parametrize("steps", [40, 120])  # the guide of the longer fit is relative to a Gaussian
def test_saved_and_extended(steps: int, tmp_path: Path) -> None:
    posterior = fitted(seed=1, steps=steps)
    posterior.save(tmp_path / "p")
    loaded = Posterior.load(tmp_path / "p", program=Program.of(model, data_plate="data"))
    assert loaded.history.restarts == posterior.history.restarts
    assert loaded.config["restarts"] == 3
    longer = dp.extend(loaded, Y, steps=10, compile=False, progress=False)
    assert longer.history.steps["elbo"][:steps] == posterior.history.steps["elbo"]
    assert len(longer.history.steps["elbo"]) == steps + 10
    assert longer.history.restarts == posterior.history.restarts
    assert longer.config["restarts"] == 3


def test_interrupted() -> None:
    def stop(fit: Fit) -> None:
        if fit.epoch == 20:
            signal.raise_signal(signal.SIGINT)

    with pytest.warns(UserWarning, match="interrupted after 20 of 40 steps"):
        posterior = fitted(callbacks=[stop])
    assert len(posterior.history.steps["elbo"]) == 20
    assert sum(posterior.history.restarts["kept"]) == 1.0


def broken(y: Tensor) -> None:
    """The bound is not a number where the latent is negative."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc.log().sqrt().square().exp(), 1.0, validate_args=False), obs=y)


def far_guide(y: Tensor) -> None:
    at = pyro.param("at", lambda: torch.where(torch.rand(()) < 0.5, 4.0, -4.0))
    pyro.sample("loc", dist.Normal(at, 0.1))


@pytest.mark.parametrize("compile", TIERS, indirect=True)
def test_a_start_that_is_never_finite_is_out(compile: bool) -> None:
    with pytest.warns(UserWarning, match=r"start \d of 4 \(counted from 0\) is out: 20 steps in a row up to step"):
        posterior = fitted(Program.of(broken, far_guide), restarts=4, seed=3, compile=compile)
    found = posterior.history.restarts
    out = [k for k, x in enumerate(found["skipped"]) if x]
    assert 0 < len(out) < 4
    assert min(found["skipped"][k] for k in out) >= 20.0
    assert all(math.isnan(found["bound"][k]) for k in out)
    assert math.isfinite(found["bound"][found["kept"].index(1.0)])
    assert len(posterior.history.steps["elbo"]) == 40


def test_diverges_only_if_all_starts_do() -> None:
    def guide(y: Tensor) -> None:
        pyro.sample("loc", dist.Normal(pyro.param("at", lambda: 4.0 + torch.rand(())), 0.1))

    with pytest.raises(DivergenceError, match="elbo became nan") as caught:
        fitted(Program.of(broken, guide), optimizer=Optimizer(learning_rate=10.0))  # the first step leads out
    assert caught.value.posterior is not None


def test_laplace_at_the_mode_of_the_best_start() -> None:
    posterior = fitted(Program.of(two_modes), torch.zeros(1), guide="laplace", restarts=6, seed=1, **FAST)
    draws = posterior.sample(draws=500)["z"]
    assert float(draws.mean()) == pytest.approx(2.0, abs=0.1)
    assert float(draws.std()) == pytest.approx(0.3, rel=0.15)


@pytest.mark.parametrize("compile", ["compiled"], indirect=True)
def test_local_latents_and_buffers(compile: bool) -> None:
    x = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
    encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    program = VAE((6,), latent_dim=2, hidden_dims=(8,), encoder=encoder)
    posterior = fitted(program, x, restarts=2, batch_size=10, compile=compile, weights="fresh")
    assert not [name for name in posterior.history.restarts if name.startswith("distance")]
    assert posterior.log_evidence(x, particles=3).shape == (40,)


def test_late_parameters() -> None:
    calls = [0]

    def guide(y: Tensor) -> None:
        calls[0] += 1
        shift = pyro.param("late", torch.zeros(())) if calls[0] > 12 else 0.0
        pyro.sample("loc", dist.Normal(pyro.param("at", lambda: torch.randn(())) + shift, 0.1))

    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"restarts=2 needs every parameter before the first step.*use restarts=1"),
    ):
        fitted(Program.of(model, guide), restarts=2)
