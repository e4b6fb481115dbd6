"""Native code for loops and graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from uncompiled import run_uncompiled

from deepprob.engine.native.build import compile_module
from deepprob.engine.native.lower import Repeated, lower
from deepprob.engine.scan.recur import recur

Tensors = tuple[Tensor, ...]

LENGTHS = 10, 20
PADDED = torch.randn(4, LENGTHS[1] + 1, 3, generator=torch.Generator().manual_seed(0))
SHORT, LONG = PADDED[:, :13], PADDED[:, : LENGTHS[1]]


def step(index: Tensor, total: Tensor, x: Tensor, weight: Tensor, count: Tensor) -> Tensors:
    """One iteration of a loop around a loop over time; its graph contains no length."""

    def cell(state: Tensors, slices: Tensors, params: Tensors) -> tuple[Tensors, Tensors]:
        h = torch.tanh(state[0] @ params[0] + slices[0])
        return (h,), (h.exp(),)

    (last,), (outputs,) = recur(cell, (total,), (x.transpose(0, 1),), (weight,))
    return index + 1, last + outputs.mean(0)


@pytest.mark.parametrize("release", ["known", pytest.param("unknown", marks=pytest.mark.slow)])
def test_a_loop_around_a_loop_over_time_serves_any_length(
    release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's inner functions are called for known releases of torch, documented functions for others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if release == "unknown":
        monkeypatch.setattr("deepprob.engine.native.build._TRIED", ())
    inputs = [torch.tensor(0), torch.zeros(4, 3), LONG, 0.3 * torch.eye(3), torch.tensor(3)]
    with torch.no_grad():
        body = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    module = Repeated(body, 2, 4)
    native = compile_module(module, inputs, {2: LENGTHS})
    for x in (LONG, SHORT):
        inputs[2] = x
        assert torch.allclose(native(list(inputs))[1], run_uncompiled(module, inputs)(list(inputs))[1], atol=1e-5)
    assert len(list(tmp_path.rglob("*.pt2"))) == 1


@pytest.mark.parametrize("shared", [lambda i, x, _: (i + 1, x[:]), lambda i, x, _: (x[0], x + 1)])
def test_refuses_carried_tensors_that_share_memory(shared: Callable[..., Tensors], tmp_path: Path) -> None:
    inputs = [torch.tensor(0), torch.ones(2), torch.tensor(3)]
    module = Repeated(make_fx(shared, tracing_mode="fake")(*inputs), 2, 2)
    with pytest.raises(ValueError, match="carried tensors share memory"):
        lower(module, inputs, {}, tmp_path, {})


def normalise(index: Tensor, mean: Tensor, x: Tensor, count: Tensor) -> Tensors:
    """An operation that is decomposed into a write to a copy."""
    after = mean.clone()
    normed = torch.native_batch_norm(x, None, None, after, torch.ones_like(mean), True, 0.1, 1e-5)[0]
    return index + 1, torch.where(normed.isfinite().all(), after, mean)


def update_part(index: Tensor, mean: Tensor, x: Tensor, count: Tensor) -> Tensors:
    """A write to a part of a copy, by an operation that is decomposed."""
    after = mean.clone()
    after[:2].lerp_(x.mean(0)[:2], 0.25)
    return index + 1, after + 1e-3


@pytest.mark.parametrize("step", [normalise, update_part])
def test_a_write_to_a_copy_leaves_the_original_unchanged(
    step: Callable[..., Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    inputs = [torch.tensor(0), torch.zeros(3), 1 + LONG[:, 0], torch.tensor(3)]
    module = Repeated(make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs), 2, 3)
    expected = run_uncompiled(module, inputs)(list(inputs))[1]
    assert expected.all()
    assert torch.allclose(compile_module(module, inputs)(list(inputs))[1], expected, atol=1e-6)
    assert not inputs[1].any()


def test_refuses_a_write_to_an_input(tmp_path: Path) -> None:
    inputs = [torch.ones(2)]
    graph = make_fx(lambda x: (x.add_(1) * 2,), tracing_mode="fake")(*inputs)
    with pytest.raises(ValueError, match="writes to one of its inputs"):
        lower(graph, inputs, {}, tmp_path, {})


def test_generated_code_is_right_for_all_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's compiler generates different code for sums of more than 4096 numbers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    room = torch.randn(2, 91, 100, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        graph = make_fx(lambda x: (x.exp().sum((1, 2)),), tracing_mode="symbolic")(room[:, :50])
    native = compile_module(graph, [room[:, :90]], {0: (10, 90)})
    for part in (room[:, :10], room[:, :90]):
        assert torch.allclose(native([part])[0], part.exp().sum((1, 2)), rtol=1e-5)
