"""Builds of native code by another process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from deepprob.engine import Loop, Noise, PerStep, StepData
from deepprob.engine.dynamic_length import DifferentGraphs
from deepprob.engine.native.background import BuildFailed, start_build
from deepprob.engine.native.build import compile_module, is_cached
from deepprob.engine.native.cache import cache_folder
from deepprob.engine.native.handover import as_text, from_text
from deepprob.engine.native.lower import Repeated
from deepprob.engine.scan.recur import recur

Tensors = tuple[Tensor, ...]

COMPILER = """#!/bin/sh
echo "$@" >> {log}
exec {command} "$@"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = cache_folder()
    assert found is not None
    return found


def use_compiler(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let another command be the compiler of processes that start from here on; returns the log of its calls."""
    log, script = tmp_path / "log", tmp_path / "compiler"
    script.write_text(COMPILER.format(log=log, command=command))
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    return log


def graph() -> tuple[GraphModule, list[Tensor]]:
    inputs = [torch.ones(3)]
    return make_fx(lambda x: (x.exp(),), tracing_mode="fake")(*inputs), inputs


def filtered(
    carry: list[Tensor], data: StepData, noise: Noise, knobs: Tensor
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """A step with a loop over time, noise and an infinite constant."""

    def cell(state: Tensors, slices: Tensors, params: Tensors) -> tuple[Tensors, Tensors]:
        h = torch.tanh(state[0] @ params[0] + slices[0])
        return (h,), (h.exp(),)

    sequences, weight = data.fixed
    x = (sequences + torch.randn(4, 1, 3)).transpose(0, 1)
    (last,), (outputs,) = recur(cell, (carry[0],), (x,), (weight,))
    last = last.clamp(max=float("inf")) * (1 + 1e-3 * knobs[0])
    return [last + outputs.mean(0)], {"size": last.abs().mean()}


def loop() -> tuple[Loop, tuple[list[Tensor], PerStep, list[Tensor], Noise]]:
    """A loop of such steps, and the arguments of a call."""
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    carry, fixed = [torch.zeros(4, 3)], [torch.randn(4, 7, 3, generator=generators[0]), 0.3 * torch.eye(3)]
    per_step = PerStep(torch.zeros(1, 1, dtype=torch.long), torch.ones(5, 1))
    made = Loop(filtered, carry, per_step, fixed, capacity=5)
    return made, (carry, per_step, fixed, Noise(*made.noise.draw(5, generators, torch.device("cpu"))))


def test_code_built_beside_gives_the_bits_of_code_built_in_the_foreground(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, given = loop()
    beside.start_build()
    assert beside.is_building
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    foreground, _ = loop()
    foreground.compile()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    beside.compile()
    assert not beside.is_building
    assert beside.is_compiled and beside.is_cached()
    (carry, record), (expected, expected_record) = beside(*given), foreground(*given)
    assert torch.equal(carry[0], expected[0])
    assert torch.equal(record["size"], expected_record["size"])
    beside.start_build()  # the cache holds the code
    assert not beside.is_building


KILLED = """
import os, signal, torch
from torch.fx.experimental.proxy_tensor import make_fx
from deepprob.engine.native.background import start_build

torch.set_num_threads(1)
inputs = [torch.ones(3)]
start_build(make_fx(lambda x: (x.exp(),), tracing_mode="fake")(*inputs), inputs)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_build_outlives_its_parent_and_serves_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = use_compiler("g++", tmp_path, monkeypatch)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", KILLED], env=environment, capture_output=True, check=False)
    assert (killed.returncode, killed.stdout, killed.stderr) == (-signal.SIGKILL, b"", b"")
    build = start_build(*graph())
    assert build is not None
    build.wait()
    assert is_cached(*graph())
    assert log.read_text().count("wrapper.cpp ") == 1
    native = compile_module(*graph())
    assert log.read_text().count("wrapper.cpp ") == 1
    assert torch.allclose(native([torch.zeros(3)])[0], torch.ones(3))


def test_a_build_has_a_session_of_its_own_and_a_low_priority(folder: Path) -> None:
    build = start_build(*graph())
    assert build is not None
    process = build._process.pid
    assert os.getsid(process) == process
    while os.getpriority(os.PRIO_PROCESS, process) < 10:
        time.sleep(0.01)
    assert list(folder.iterdir()) == []  # what the process reads and writes has no name
    assert build.is_running
    os.kill(process, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(BuildFailed, match=r"^the process that compiled ended early: exit code -9$"):
            build.wait()
    assert not build.is_running


def test_a_failing_compiler_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_compiler("false", tmp_path, monkeypatch)
    made, _ = loop()
    made.start_build()
    for _ in range(2):  # the second time nothing is tried again
        with pytest.raises(BuildFailed, match=r"^InductorError: .*No working C\+\+ compiler found"):
            made.compile()
        monkeypatch.delenv("CXX", raising=False)
    assert not made.is_compiled


def test_lengths_that_native_code_cannot_serve_are_the_same_error() -> None:
    inputs = [torch.ones(2, 91)[:, :90]]
    fixed = make_fx(lambda x: (x.reshape(2 * 90),), tracing_mode="fake")(*inputs)
    build = start_build(fixed, inputs, {0: (10, 90)})
    assert build is not None
    with pytest.raises(DifferentGraphs, match=r"shape .\[180\]. is invalid"):
        build.wait()


@pytest.mark.parametrize("mode", [0o500, 0o777])
def test_without_a_cache_of_its_own_a_process_builds_itself(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    if os.access(folder, os.W_OK) and mode == 0o500:
        pytest.skip("this user can write everywhere")
    warned = pytest.warns(UserWarning, match="compiled code is not cached") if mode == 0o777 else nullcontext()
    with warned:
        assert start_build(*graph()) is None


def test_without_another_process_a_process_builds_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    assert start_build(*graph()) is None


def test_a_module_travels_with_threads_and_dtype() -> None:
    module, inputs = graph()
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    text = as_text(Repeated(module, 1, 0), [*inputs, torch.ones(2, 3, dtype=torch.long).T], {1: (2, 3)})
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    found, given, lengths = from_text(text)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    assert (threads, dtype) == (2, torch.float64)
    assert isinstance(found, Repeated)
    assert (found.carried, found.count, lengths) == (1, 0, {1: (2, 3)})
    assert [(x.shape, x.stride(), x.dtype) for x in given] == [
        ((3,), (1,), torch.float32),
        ((3, 2), (1, 3), torch.long),
    ]
    assert torch.equal(found.body(torch.zeros(3))[0], torch.ones(3))
