"""Annealed numbers of a program: every step has its value, eagerly and compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from uncompiled import replace_compiler

from deepprob.diagnostics.checks.convergence import settled
from deepprob.fitting.callbacks import Anneal, Callback, Checkpoint, EarlyStopping, Fit
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

STEPS = 12


class Heated(Program):
    """A program with the ELBO ``-temperature * (loc - 1)^2``, without noise."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.tensor(3.0))

    def model(self) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.factor("energy", -self.temperature * (loc - 1) ** 2)

    def guide(self) -> None:
        pass


class Relaxed(Program):
    """A relaxed coin per row, whose temperature is a buffer of a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.BatchNorm1d(1)  # changes its own buffers
        self.part.register_buffer("temperature", torch.tensor(1.0))

    def model(self, x: Tensor) -> None:
        shift = self.part(x)
        with self.data_plate(x):
            z = pyro.sample("z", dist.RelaxedBernoulli(self.part.temperature, probs=torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(shift + z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        q = pyro.param("q", torch.tensor(0.5), constraint=constraints.unit_interval)
        with self.data_plate(x):
            pyro.sample("z", dist.RelaxedBernoulli(self.part.temperature, probs=q))


def fitted(program: Program | None = None, data: Any = None, **options: Any) -> Posterior:
    settings: dict[str, Any] = {
        "epochs": STEPS,
        "optimizer": Optimizer("sgd", learning_rate=1e-9, schedule="constant"),
        "callbacks": [Anneal("temperature", 2.0, 0.5, epochs=8)],
        "progress": False,
    }
    return svi(program or Heated(), data, **settings | options)


@pytest.fixture(params=["eager", "traced"])
def compile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether steps are compiled."""
    replace_compiler(monkeypatch)
    return bool(request.param == "traced")


def test_every_step_has_its_annealed_value(compile: bool) -> None:
    posterior = fitted(compile=compile)
    expected = [2.0 * 0.25 ** (min(step, 7) / 7) for step in range(STEPS)]
    assert posterior.history.steps["elbo"] == pytest.approx([-x for x in expected], rel=1e-5)
    assert posterior.history.epochs["annealed.temperature"] == pytest.approx(expected)
    assert posterior.history.compiled_graphs == int(compile)


@pytest.mark.slow
def test_native_code_anneals() -> None:
    taken = fitted(compile=True).history
    assert taken.compiled_graphs == 1
    assert taken.steps["elbo"] == pytest.approx(fitted(compile=False).history.steps["elbo"], rel=1e-5)


def test_posterior_holds_the_last_annealed_value(compile: bool, tmp_path: Path) -> None:
    program = Heated()
    posterior = fitted(program, compile=compile)
    assert float(program.temperature) == 3.0
    assert float(posterior.program.temperature) == pytest.approx(0.5)
    posterior.save(tmp_path / "fit")
    assert float(Posterior.load(tmp_path / "fit", program=Heated()).program.temperature) == pytest.approx(0.5)


def test_callbacks_see_the_annealed_value(compile: bool) -> None:
    seen: list[float] = []

    class Watch(Callback):
        def interval(self, steps_per_epoch: int) -> int:
            return 3

        def step_end(self, fit: Fit) -> None:
            seen.append(float(fit.state.instance.program.temperature))  # type: ignore[attr-defined]

    fitted(compile=compile, callbacks=[Anneal("temperature", 4.0, 0.0, epochs=12, shape="linear"), Watch()])
    assert seen == pytest.approx([4 - 4 * step / 11 for step in (2, 5, 8, 11)])


def test_anneals_a_submodule_buffer_beside_buffers_that_the_program_changes(compile: bool) -> None:
    x = torch.randn(20, 1, generator=torch.Generator().manual_seed(0))
    posterior = fitted(Relaxed(), x, batch_size=5, compile=compile)
    assert posterior.history.compiled_graphs == int(compile)
    ((name, value),) = [
        (name, x) for name, x in posterior.program.named_buffers() if name.endswith("temperature")
    ]  # fmt: skip
    assert name == "part.temperature"
    assert float(value) == pytest.approx(0.5)
    assert all(math.isfinite(x) for x in posterior.history.steps["elbo"])


def test_resumed_fit_equals_the_undisturbed_one(compile: bool, tmp_path: Path) -> None:
    x = torch.randn(20, 1, generator=torch.Generator().manual_seed(0))

    class Killed(BaseException):
        pass

    class Kill(Callback):
        def epoch_end(self, fit: Fit) -> None:
            if fit.epoch == 5:
                raise Killed

    options: dict[str, Any] = {"batch_size": 5, "compile": compile, "optimizer": Optimizer(learning_rate=0.05)}
    anneal = Anneal("temperature", 2.0, 0.5, epochs=8)
    whole = fitted(Relaxed(), x, callbacks=[anneal, Checkpoint(tmp_path / "a")], **options)
    with pytest.raises(Killed):
        fitted(Relaxed(), x, callbacks=[anneal, Checkpoint(tmp_path / "b"), Kill()], **options)
    resumed = fitted(Relaxed(), x, callbacks=[anneal, Checkpoint(tmp_path / "b")], **options)
    assert resumed.history.steps == whole.history.steps
    for other in ([], [Anneal("temperature", 2.0, 0.4, epochs=8)]):
        with pytest.raises(ValueError, match="belongs to another fit: callbacks"):
            fitted(Relaxed(), x, callbacks=[*other, Checkpoint(tmp_path / "b")], **options)


class Scaled(Program):
    """A normal with an annealed scale and no latent site."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.0))
        self.loc = nn.Parameter(torch.tensor(0.0))

    def model(self, x: Tensor) -> None:
        with self.data_plate(x):
            pyro.sample("x", dist.Normal(self.loc, 0.5 + self.scale), obs=x)

    def guide(self, x: Tensor) -> None:
        pass


@pytest.mark.parametrize("optimizer", [Optimizer(average=0.9), Optimizer("rmsprop"), Optimizer(accumulate=2)], ids=repr)
def test_compiled_steps_equal_eager_steps(optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_compiler(monkeypatch)
    x = torch.randn(20, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"batch_size": 5, "optimizer": optimizer, "callbacks": [Anneal("scale", 0.1, 0.5, 8)]}
    eager, compiled = (fitted(Scaled(), x, compile=compile, **options).history for compile in (False, True))
    assert compiled.compiled_graphs == 1
    assert compiled.steps["elbo"] == pytest.approx(eager.steps["elbo"], rel=1e-5)
    assert compiled.steps["gradient_norm"] == pytest.approx(eager.steps["gradient_norm"], rel=1e-5)


@pytest.mark.parametrize("steps_per_epoch", [1, 4])
def test_best_state_waits_for_the_end_of_annealing(compile: bool, steps_per_epoch: int) -> None:
    """At the start the scale is that of the data. Later epochs score worse, and are kept all the same."""
    x = torch.randn(20, generator=torch.Generator().manual_seed(0))
    posterior = fitted(
        Scaled(), x, batch_size=20 // steps_per_epoch, compile=compile, held_out=x,
        callbacks=[Anneal("scale", 0.5, 3.0, epochs=3), EarlyStopping(patience=2)],
    )  # fmt: skip
    held_out = posterior.history.epochs["held_out_elbo"]
    assert max(held_out) == held_out[0]
    assert posterior.history.best_epoch >= 3
    assert float(posterior.program.scale) == pytest.approx(3.0)


def test_convergence_check_ignores_annealed_epochs() -> None:
    history = fitted(compile=False).history
    assert settled(history).tolist() == pytest.approx([-0.5] * 5)


def test_warns_of_annealing_longer_than_the_fit() -> None:
    with pytest.warns(UserWarning, match=r"Anneal\(epochs=13\) is longer than the fit \(12 epochs\): temp"):
        fitted(callbacks=[Anneal("temperature", 2.0, 0.5, epochs=13)], compile=False)


def test_refuses_two_anneals_of_one_buffer() -> None:
    callbacks = [Anneal("part.temperature", 2.0, 1.0, 3), Anneal("temperature", 9.0, 5.0, 3)]
    with pytest.raises(
        ValueError, match=r"several callbacks anneal the same buffer \(part\.temperature, temperature\)"
    ):
        fitted(Relaxed(), torch.zeros(4, 1), callbacks=callbacks)


def test_anneals_a_shared_buffer_under_any_of_its_names() -> None:
    program = Heated()
    program.part = nn.Module()
    program.part.register_buffer("heat", program.temperature)
    posterior = fitted(program, callbacks=[Anneal("heat", 2.0, 0.5, epochs=8)], compile=False)
    assert float(posterior.program.temperature) == pytest.approx(0.5)


class Writes(Heated):
    """A program that writes to its annealed buffer."""

    def model(self) -> None:
        super().model()
        self.temperature.mul_(0.5)


@pytest.mark.usefixtures("compile")
def test_refuses_to_compile_if_the_program_writes_to_an_annealed_buffer() -> None:
    with pytest.warns(UserWarning, match="not compiled: the program writes to a buffer that a callback anneals"):
        fitted(Writes(), compile=True)


def test_shapes() -> None:
    assert Anneal("t", 1.0, 4.0, epochs=3).value(1, 1) == pytest.approx(2.0)
    assert Anneal("t", 1.0, 4.0, epochs=3, shape="linear").value(1, 1) == pytest.approx(2.5)
    assert Anneal("t", 1.0, 4.0, epochs=0.5).value(1, 4) == pytest.approx(4.0)
    assert Anneal("t", 1.0, 4.0, epochs=1).value(0, 1) == pytest.approx(4.0)  # one step has one value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Anneal("t", 1.0, 0.5, epochs=0), r"Anneal's epochs must be positive and finite; got 0\."),
        (lambda: Anneal("t", 1.0, 0.5, epochs=math.inf), r"must be positive and finite; got inf\."),
        (lambda: Anneal("t", 1.0, math.nan, epochs=1), r"start and end must be finite; got 1\.0 and nan\."),
        (
            lambda: Anneal("t", 1.0, 0.0, epochs=1),
            r"must be positive; got 1\.0 and 0\.0\. To reach 0, write shape='lin",
        ),
        (lambda: Anneal("t", 1.0, 0.5, 1, "cubic"), r"unknown shape 'cubic'.*geometric, linear"),  # type: ignore[arg-type]
    ],
)
def test_settings_out_of_range(make: Callable[[], Anneal], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def observed(y: Tensor) -> None:
    pyro.sample("y", dist.Normal(pyro.sample("loc", dist.Normal(0.0, 1.0)), 1.0).expand([4, 1]).to_event(2), obs=y)


def two_parts() -> Program:
    program = Relaxed()
    program.other = nn.Module()
    program.other.register_buffer("temperature", torch.tensor(1.0))
    return program


def of_shape(value: Tensor, persistent: bool = True) -> Program:
    program = Heated()
    program.register_buffer("temperature", value, persistent)
    return program


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (Program.of(observed, "normal"), r"no buffer 'temperature', only none at all\. Register it: self\.reg"),
        (of_shape(torch.tensor(1.0), persistent=False), r"the program has no buffer 'temperature'"),
        (two_parts(), r"'temperature' may be any of part\.temperature, other\.temperature\. Give the whole name"),
        (of_shape(torch.ones(2)), r"must be one real number; got shape \(2,\), torch\.float32"),
        (of_shape(torch.tensor(1)), r"must be one real number; got shape \(\), torch\.int64"),
    ],
)
def test_refuses_buffers_that_cannot_be_annealed(program: Program, message: str) -> None:
    data = None if isinstance(program, Heated) else torch.zeros(4, 1)
    with pytest.raises(ValueError, match=message):
        fitted(program, data)
