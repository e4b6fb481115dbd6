"""The skeletons in docs: they run, give right answers, and pass the contract tests."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.data import load_data
from deepprob.inference import ROUTINES, svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Load a file as a module, by its path."""

    def read(path: str, name: str = "") -> ModuleType:
        file = ROOT / path
        spec = importlib.util.spec_from_file_location(name or f"skeleton_{file.stem}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return read


@pytest.fixture
def model(load: Callable[..., ModuleType]) -> ModuleType:
    return load("docs/skeletons/model.py")


@pytest.fixture
def routine(load: Callable[..., ModuleType]) -> ModuleType:
    return load("docs/skeletons/routine.py")


@pytest.mark.parametrize("name", ["model", "routine"])
def test_docstring_examples_pass(name: str, load: Callable[..., ModuleType]) -> None:
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, tried = doctest.testmod(load(f"docs/skeletons/{name}.py"), optionflags=flags)
    assert (failed, tried > 0) == (0, True)


def test_model_is_fitted_queried_and_saved(model: ModuleType, tmp_path: Path) -> None:
    example = model.FactorAnalysis.example()
    posterior = svi(example.program, example.data, steps=20, batch_size=8)
    assert posterior.sample(*example.data, draws=3)["z"].shape == (3, 24, 2)
    assert posterior.predict(*example.data[: example.inputs], draws=3).mean.shape == (24, 4)
    posterior.save(tmp_path / "fit")
    again = Posterior.load(tmp_path / "fit")
    assert type(again.program) is model.FactorAnalysis
    assert torch.equal(again.log_likelihood(*example.data), posterior.log_likelihood(*example.data))


def test_bound_of_the_model_reaches_the_exact_evidence(model: ModuleType) -> None:
    example = model.FactorAnalysis.example()
    posterior = svi(example.program, example.data, steps=800, batch_size=None)
    program = posterior.program
    weights, offset = program.loadings.weight, program.loadings.bias
    covariance = weights @ weights.T + torch.diag(program.noise**2)
    with torch.no_grad():
        exact = dist.MultivariateNormal(offset, covariance).log_prob(*example.data)
        gap = exact - posterior.elbo(*example.data, particles=500)
    assert -0.05 < float(gap.mean()) < 0.2, float(gap.mean())


def test_model_takes_its_size_from_a_data_set(model: ModuleType) -> None:
    assert model.FactorAnalysis.from_data(load_data("iris"), latent_dim=1).config == {
        "num_features": 4,
        "latent_dim": 1,
    }


def test_model_error_names_the_wrong_size(model: ModuleType) -> None:
    with pytest.raises(ValueError, match="latent_dim must be a whole number of at least 1; got 0"):
        model.FactorAnalysis(4, latent_dim=0)


X = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
Y = torch.tensor([1.0, 2.0, 2.0, 4.0])


def regression(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 0.5), obs=y)


def test_routine_finds_the_mode_of_a_conjugate_model(routine: ModuleType) -> None:
    posterior = routine.map_estimate(Program.of(regression), (X, Y), steps=400, learning_rate=0.1)
    mode = torch.linalg.solve(X.T @ X / 0.25 + torch.eye(2), X.T @ Y / 0.25)
    torch.testing.assert_close(posterior.sample(draws=1)["w"][0], mode, atol=1e-3, rtol=0)


def test_steps_of_the_routine_can_be_taken_one_by_one(routine: ModuleType) -> None:
    instance = ProgramInstance(Program.of(regression), (X, Y), 4, guide="map")
    state, elbos = routine.init(instance, 0.05), []
    with instance.running():
        for _ in range(50):
            state, terms = routine.step(state, (X, Y), torch.arange(4), routine.Knobs(0.05))
            elbos.append(float(terms["elbo"]))
    assert elbos[-1] > elbos[0] + 1.0


def test_routine_skips_a_step_that_is_not_finite(routine: ModuleType) -> None:
    instance = ProgramInstance(Program.of(regression), (X, Y), 4, guide="map")
    state = routine.init(instance, 0.05)
    before = {name: p.detach().clone() for name, p in state.params.items()}
    with instance.running():
        _, terms = routine.step(state, (X, Y * float("inf")), torch.arange(4), routine.Knobs(0.05))
    assert float(terms["skipped"]) == 1
    assert all(torch.equal(p, before[name]) for name, p in state.params.items())


def test_routine_refuses_invalid_programs(routine: ModuleType) -> None:
    with pytest.raises(TypeError, match=r"map_estimate expects a Program; got function\. Make one"):
        routine.map_estimate(regression, (X, Y))

    def known(y: Tensor) -> None:
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    with pytest.raises(ValueError, match="nothing to train"):
        routine.map_estimate(Program.of(known), Y)


@pytest.fixture
def contract(
    routine: ModuleType, load: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """The contract tests of routines, with the skeleton registered."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "contract"))
    tests = load("tests/contract/test_routines.py", "contract_of_routines")
    monkeypatch.setitem(ROUTINES, "map_estimate", routine.map_estimate)
    monkeypatch.setitem(tests.ROUTINE_SETTINGS, "map_estimate", routine.QUICK)
    yield tests


def test_routine_passes_the_contract_tests(contract: ModuleType, tmp_path: Path) -> None:
    given: dict[str, Any] = {"routine": "map_estimate", "tmp_path": tmp_path}
    held = 0
    for name, test in inspect.getmembers(contract, inspect.isfunction):
        wanted = inspect.signature(test).parameters.keys()
        if name.startswith("test_") and "routine" in wanted:
            test(**{key: given[key] for key in wanted})
            held += 1
    assert held >= 7
