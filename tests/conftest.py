"""What every test shares: options, devices, data, and a watch over Pyro's global store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: its thread pool is made on import
os.environ["MPLBACKEND"] = "Agg"

import pyro
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("deepprob")
    group.addoption("--device", default="cpu", help="where tests run: cpu, cuda, cuda:1")
    group.addoption("--dtype", default="float32", choices=["float32", "float64"])
    group.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that device="auto" is the CPU on a machine with a GPU too


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if not config.getoption("--slow"):
        reasons["slow"] = "takes minutes; run with --slow"
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device here; where there is one, run with --device cuda"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The default floating type of the whole run."""
    before = torch.get_default_dtype()
    chosen: torch.dtype = getattr(torch, request.config.getoption("--dtype"))
    torch.set_default_dtype(chosen)
    yield chosen
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that tests put their tensors on."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets; the test is skipped where there is none."""
    named = os.environ.get("DEEPPROB_DATA")
    if not named:
        pytest.skip("DEEPPROB_DATA names no folder of data sets")
    folder = Path(named)
    if not folder.is_dir():
        pytest.fail(f"DEEPPROB_DATA names {named}, which is not a folder")
    return folder


@pytest.fixture(autouse=True)
def _global_store_untouched() -> Iterator[None]:
    """Parameters left in Pyro's global store would train, or be overwritten, in the next test."""
    yield
    left = sorted(pyro.get_param_store().keys())
    pyro.clear_param_store()
    if left:
        pytest.fail(f"left in Pyro's global parameter store: {', '.join(left)}")
