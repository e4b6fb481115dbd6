"""Options and fixtures of all tests: device, dtype, data, and a check of Pyro's global store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before importing torch, which then makes its thread pool
os.environ["MPLBACKEND"] = "Agg"

import pyro
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("deepprob")
    group.addoption("--device", default="cpu", help="device of the tests: cpu, cuda, cuda:1")
    group.addoption("--dtype", default="float32", choices=["float32", "float64"])
    group.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # device="auto" then is the CPU, even on a machine with a GPU


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if not config.getoption("--slow"):
        reasons["slow"] = "takes minutes; run with --slow"
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device; run with --device cuda"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Torch's default dtype in the whole test run."""
    before = torch.get_default_dtype()
    chosen: torch.dtype = getattr(torch, request.config.getoption("--dtype"))
    torch.set_default_dtype(chosen)
    yield chosen
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of the tests' tensors."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets; the test is skipped if DEEPPROB_DATA is not set."""
    named = os.environ.get("DEEPPROB_DATA")
    if not named:
        pytest.skip("DEEPPROB_DATA is not set to a folder of data sets")
    folder = Path(named)
    if not folder.is_dir():
        pytest.fail(f"DEEPPROB_DATA is {named}, which is not a folder")
    return folder


@pytest.fixture(autouse=True)
def _no_builds_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no fit of a test build native code for the next fits."""
    monkeypatch.setattr("deepprob.fitting.compiling.CompileTask.builds_beside", lambda self: False)


@pytest.fixture(autouse=True)
def _check_global_store() -> Iterator[None]:
    """Fail a test that leaves parameters in Pyro's global store: the next test would train or overwrite them."""
    yield
    left = sorted(pyro.get_param_store().keys())
    pyro.clear_param_store()
    if left:
        pytest.fail(f"left in Pyro's global parameter store: {', '.join(left)}")
