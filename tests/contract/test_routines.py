"""The contract of every registered routine."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from scenarios import ROUTINE_SETTINGS
from torch import Tensor, nn

from deepprob.fitting.callbacks import Callback
from deepprob.inference import ROUTINES
from deepprob.posteriors.from_draws import draws_posterior
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

Y = torch.linspace(-1.0, 2.0, 16)


def model(y: Tensor | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 16 if y is None else len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


class Dropped(nn.Module):
    """The same model, with a location that dropout may set to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, y: Tensor | None = None) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 16 if y is None else len(y)) as rows:
            pyro.sample("y", dist.Normal(self.drop(loc.expand(len(rows))), 1.0), obs=y)


MODELS: dict[str, Callable[[], Callable[..., None]]] = {"dropout": Dropped}  # of routines that need their own


def program(routine: str) -> Program:
    return Program.of(MODELS.get(routine, lambda: model)(), "normal", data_plate="data")


@pytest.fixture(params=sorted(ROUTINES))
def routine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(routine: str, **options: object) -> Posterior:
    return ROUTINES[routine](program(routine), Y, **ROUTINE_SETTINGS[routine] | options)


def test_signature(routine: str) -> None:
    parameters = list(inspect.signature(ROUTINES[routine]).parameters.values())
    assert [p.name for p in parameters[:2]] == ["program", "data"]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[2:])
    assert {"seed", "device", "progress", "callbacks"} <= {p.name for p in parameters}
    assert len(parameters) - 2 <= 14


def test_refuses_what_is_no_program(routine: str) -> None:
    with pytest.raises(TypeError, match=f"{routine} expects a Program; got function"):
        ROUTINES[routine](model, Y)


def test_runs_are_seeded(routine: str) -> None:
    fits = [run(routine, seed=s) for s in (0, 0, 1)]
    first, again, other = (fit.sample(draws=20)["loc"] for fit in fits)
    assert torch.equal(first, again)
    # With another seed the steps are others, though they may lead to the same mode.
    assert not torch.equal(first, other) or fits[0].history.steps != fits[2].history.steps


def test_caller_state_is_unchanged(routine: str) -> None:
    pyro.param("theirs", torch.zeros(()))
    before = torch.get_rng_state()
    run(routine)
    assert torch.equal(before, torch.get_rng_state())
    assert list(pyro.get_param_store().keys()) == ["theirs"]
    pyro.clear_param_store()


def test_posterior_has_config_seed_and_versions(routine: str) -> None:
    posterior = run(routine, seed=5)
    assert posterior.config["routine"] == routine
    assert posterior.seed == 5
    assert {"python", "torch"} <= posterior.versions.keys()
    assert posterior.sample(draws=7)["loc"].shape == (7,)


def test_save_and_load(routine: str, tmp_path: Path) -> None:
    posterior = run(routine)
    posterior.save(tmp_path / "p")
    again = Posterior.load(tmp_path / "p", program=program(routine))
    assert torch.equal(again.log_likelihood(Y), posterior.log_likelihood(Y))
    assert again.config == posterior.config


def test_to_arviz(routine: str) -> None:
    idata = run(routine).to_arviz(Y, draws=6)
    assert {"posterior", "posterior_predictive", "log_likelihood", "observed_data"} <= set(idata.groups())
    assert idata.log_likelihood["y"].shape[-1] == 16


def test_callbacks_are_called(routine: str) -> None:
    seen = []

    class Watch(Callback):
        def epoch_end(self, fit: object) -> None:
            seen.append(fit)

    run(routine, callbacks=[Watch()])
    assert seen


class Custom(Program):
    """A user's program without a guide."""

    def model(self, y: Tensor | None = None) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with self.data_plate(y):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def test_saves_draws_of_a_custom_program(tmp_path: Path) -> None:
    posterior = draws_posterior(Custom(), Y, {"loc": torch.randn(2, 4, generator=torch.Generator().manual_seed(0))})
    posterior.save(tmp_path / "p")
    again = Posterior.load(tmp_path / "p", program=Custom())
    assert torch.equal(again.log_likelihood(Y, draws=8), posterior.log_likelihood(Y, draws=8))
