"""Large products are shared out among threads, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from uncompiled import as_it_is

from deepprob.inference import svi
from deepprob.products import share_products
from deepprob.program import Program
from deepprob.runtime import spare_threads, threads_for

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
    return graph, sum(node.target is SHARED for node in graph.graph.nodes)


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


def test_a_shared_product_runs_on_all_threads_if_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: seen.append(torch.get_num_threads()) or mm(a, b))
    with threads_for(1):
        for x in (LARGE, SMALL):
            assert torch.allclose(SHARED(x, x), mm(x, x), atol=1e-3)
    assert seen == [2, 1]


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


def test_an_error_leaves_the_threads_as_they_were() -> None:
    with threads_for(1):
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            SHARED(torch.zeros(4000, 400), torch.zeros(300, 300))
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
