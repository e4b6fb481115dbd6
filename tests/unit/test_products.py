"""Large products are shared out among threads, and nothing else changes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from uncompiled import as_it_is

from deepprob.compiled import lift_constants
from deepprob.inference import svi
from deepprob.looping import run_loop
from deepprob.products import SOURCE, share_products
from deepprob.program import Program
from deepprob.runtime import spare_threads, threads_for
from deepprob.toolchain import load_library

G = torch.Generator().manual_seed(0)
SMALL, LARGE = torch.randn(8, 8, generator=G), torch.randn(400, 400, generator=G)
SHARED = torch.ops.deepprob.shared_mm.default


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def traced(function: Callable[..., Any], *inputs: Tensor) -> tuple[GraphModule, int]:
    """A graph with its large products shared, and how many they are."""
    graph = share_products(make_fx(function, tracing_mode="fake")(*inputs))
    graphs = [module for module in graph.modules() if isinstance(module, GraphModule)]
    return graph, sum(node.target is SHARED for each in graphs for node in each.graph.nodes)


@pytest.mark.parametrize("transposed", [False, True])
def test_large_products_are_shared_and_right(transposed: bool) -> None:
    inputs = (LARGE, LARGE.T if transposed else LARGE, LARGE[0])

    def function(a: Tensor, b: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return a @ b, torch.addmm(bias, a, b)

    with threads_for(1):
        graph, shared = traced(function, *inputs)
        mine = graph(*inputs)
        assert (shared, torch.get_num_threads(), spare_threads()) == (2, 1, 2)
        for a, b in zip(mine, function(*inputs), strict=True):
            assert torch.allclose(a, b, atol=1e-3)


def test_products_in_a_loop_are_shared() -> None:
    def cell(state: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.tanh(x + state @ weights)
        return out, out.clone()

    steps = torch.randn(4, 30, 400, generator=G)
    body = make_fx(cell, tracing_mode="fake")(steps[0], steps[0], LARGE)
    for node in body.graph.nodes:
        node.meta.clear()  # as in a cell that was put together from parts

    def looped(state: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return run_loop(body, (state,), (x,), (weights,))

    with threads_for(1):
        graph, shared = traced(looped, steps[0], steps, LARGE)
        assert shared == 1
        for mine, expected in zip(graph(steps[0], steps, LARGE), looped(steps[0], steps, LARGE), strict=True):
            assert torch.equal(mine, expected)


def test_a_loop_that_multiplies_a_constant_matrix() -> None:
    state, step, constant = torch.randn(30, 400, generator=G), torch.zeros(1), LARGE.clone()
    body = make_fx(lambda state, _, constant: (torch.tanh(state @ constant), state.clone()))(state, step, constant)
    for node in body.graph.nodes:
        node.meta.clear()

    def looped(state: Tensor) -> tuple[Tensor, ...]:
        return run_loop(body, (state,), (torch.zeros(4, 1),), (constant,))

    with threads_for(1):
        graph = make_fx(looped, tracing_mode="fake", _allow_non_fake_inputs=True)(state)
        lift_constants(graph)
        graphs = [m for m in share_products(graph).modules() if isinstance(m, GraphModule)]
    assert sum(node.target is SHARED for each in graphs for node in each.graph.nodes) == 1


def test_small_products_and_scaled_ones_stay() -> None:
    with threads_for(1):
        assert traced(torch.mm, SMALL, SMALL)[1] == 0
        assert traced(lambda c, a, b: torch.addmm(c, a, b, alpha=2.0), LARGE, LARGE, LARGE)[1] == 0


def test_without_a_thread_to_spare_nothing_is_shared() -> None:
    assert traced(torch.mm, LARGE, LARGE)[1] == 0  # all threads work on everything
    torch.set_num_threads(1)
    with threads_for(1):
        assert traced(torch.mm, LARGE, LARGE)[1] == 0


def test_a_step_with_a_constant_matrix_shares_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    design, y = torch.randn(2048, 64, generator=G), torch.randn(2048, 300, generator=G)

    def model(y: Tensor) -> None:
        weights = pyro.sample("w", dist.Normal(torch.zeros(64, 300), 1.0).to_event(2))
        with pyro.plate("rows", 2048):
            pyro.sample("y", dist.Normal(design @ weights, 1.0).to_event(1), obs=y)

    graphs: list[GraphModule] = []

    def kept(module: Any, inputs: Any, lengths: Any) -> Any:
        graphs.append(module.body)
        return as_it_is(module, inputs)

    monkeypatch.setattr("deepprob.compiled.compile_module", kept)
    monkeypatch.setattr("deepprob.runtime._WORTH_SHARING", 2**40)
    posterior = svi(Program.of(model, "normal"), (y,), compile=True, epochs=2, progress=False, device="cpu")
    assert posterior.config["compiled"]
    assert sum(node.target is SHARED for node in graphs[0].graph.nodes) >= 2  # the product and its gradient


def test_where_the_code_for_it_does_not_compile_nothing_is_shared_and_a_warning_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "compiler").write_text("#!/bin/sh\necho no such standard >&2; exit 1\n")
    (tmp_path / "compiler").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "compiler"))
    monkeypatch.setattr("deepprob.toolchain._LIBRARIES", {})
    with threads_for(1), pytest.warns(UserWarning, match="keep to one thread: .*no such standard"):
        assert traced(torch.mm, LARGE, LARGE)[1] == 0
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with threads_for(1), warnings.catch_warnings():
        warnings.simplefilter("error")  # that there is no compiler, the fit says itself
        assert traced(torch.mm, LARGE, LARGE)[1] == 0


# -- the code for it ------------------------------------------------------------------------------------------------


@pytest.fixture
def library() -> Iterator[ctypes.CDLL]:
    """Our library, with three helpers, in a step that keeps to one thread."""
    if sys.platform != "linux":
        pytest.skip("products are shared on Linux only")
    found = load_library(SOURCE)
    with threads_for(1):
        found.deepprob_have_threads(4)
        yield found


def native(library: ctypes.CDLL, a: Tensor, b: Tensor, threads: int = 4) -> Tensor:
    """A product as native code takes it."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([a, b])
    out = ctypes.c_void_p()
    left, right = (ctypes.c_void_p(pointer(capsule, None)) for capsule in capsules)
    failed = library.aoti_torch_cpu_shared_mm(left, right, ctypes.c_int64(threads), ctypes.byref(out))
    torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules)
    if failed:
        raise RuntimeError("it failed")
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(capsule(out, None, None))


def matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


PRODUCTS = {
    "wide": (matrix(20, 600), matrix(600, 600)),
    "tall": (matrix(3000, 100), matrix(100, 88)),
    "square": (LARGE, LARGE),
    "large": (matrix(600, 2000), matrix(2000, 600)),
    "transposed": (matrix(600, 300).T, matrix(600, 600).T),
    "of slices": (matrix(300, 900)[:, 100:500], matrix(500, 700)[50:450, 300:]),
    "of many small terms": (matrix(2, 2**21), matrix(2**21, 2)),
    "of one column": (matrix(2100, 2000), matrix(2000, 1)),
    "too small": (SMALL, SMALL),
    "empty": (torch.zeros(0, 5), torch.zeros(5, 3)),
    "of no terms": (torch.zeros(5, 0), torch.zeros(0, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_of_native_code_is_right_and_the_same_every_time(
    name: str, dtype: torch.dtype, library: ctypes.CDLL
) -> None:
    a, b = (x.to(dtype) for x in PRODUCTS[name])
    expected = a.double() @ b.double()
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-4, torch.bfloat16: 1e-2}[dtype] * max(1, a.shape[1]) ** 0.5
    first = native(library, a, b)
    assert first.dtype == dtype and first.shape == expected.shape and first.is_contiguous()
    assert torch.allclose(first.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=tolerance)
    for threads in (1, 2, 3):  # of the four that there are
        again = native(library, a, b, threads)
        assert torch.allclose(again.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=tolerance)
    for pause in (0.0, 0.0, 2e-3):  # helpers are awake, or asleep
        time.sleep(pause)
        assert torch.equal(native(library, a, b), first)


def test_products_of_several_threads_at_once(library: ctypes.CDLL) -> None:
    names = ["wide", "tall", "transposed", "square"]
    expected = {name: native(library, *PRODUCTS[name]) for name in names}

    def many(name: str) -> bool:
        torch.set_num_threads(1)
        return all(torch.equal(native(library, *PRODUCTS[name]), expected[name]) for _ in range(200))

    with ThreadPoolExecutor(len(names)) as pool:
        assert all(pool.map(many, names))


FORKED = """
import os, torch
from test_products import PRODUCTS, SOURCE, load_library, native

library = load_library(SOURCE)
torch.set_num_threads(1)
library.deepprob_have_threads(4)
expected = native(library, *PRODUCTS["wide"])
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(native(library, *PRODUCTS["wide"]), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.usefixtures("library")
def test_a_forked_process_has_no_helpers_and_is_right() -> None:
    # In a process of its own: the linear algebra of a child may wait forever for threads that other tests left behind.
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60, env=os.environ | {"PYTHONPATH": paths})


def test_an_error_is_told_and_the_next_product_is_right(library: ctypes.CDLL) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="failed"):
            native(library, torch.zeros(4000, 400), torch.zeros(300, 300))
        assert torch.allclose(native(library, LARGE, LARGE), LARGE @ LARGE, atol=1e-3)
