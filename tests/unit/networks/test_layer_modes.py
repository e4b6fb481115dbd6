"""Layers with stacked weights or in lower precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepprob.networks.layer_modes import broadcast_linear, layers_in


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_applies_one_set_of_weights_per_draw(rows: int, with_bias: bool) -> None:
    x, w, b = torch.randn(rows, 3), torch.randn(5, 1, 2, 3), torch.randn(5, 1, 2)
    with broadcast_linear():
        out = nn.functional.linear(x, w, b if with_bias else None)
    expected = torch.stack([x @ w[k, 0].T + (b[k] if with_bias else 0) for k in range(5)])
    assert torch.allclose(out, expected, atol=1e-5)


def test_stacked_inputs_pair_with_stacked_weights() -> None:
    x, w, b = torch.randn(5, 7, 3), torch.randn(5, 1, 2, 3), torch.randn(5, 1, 2)
    with broadcast_linear():
        out = nn.functional.linear(x, w, b)
    assert torch.allclose(out, torch.stack([x[k] @ w[k, 0].T + b[k] for k in range(5)]), atol=1e-5)


def test_random_bias_combines_with_fixed_weights() -> None:
    x, w, b = torch.randn(7, 3), torch.randn(2, 3), torch.randn(5, 1, 2)
    with broadcast_linear():
        out = nn.functional.linear(x, w, b)
    assert torch.allclose(out, (x @ w.T) + b, atol=1e-5)


def test_plain_layers_and_other_functions_are_unchanged() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 6, 3)
    with broadcast_linear():
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        assert torch.equal(nn.functional.relu(x), x.clamp_min(0))


def test_bfloat16_rounds_only_inputs_of_layers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    x, scale = torch.rand(6, 1, 8, 8), torch.full((5,), 1e-3, requires_grad=True)
    plain = torch.autograd.grad((net(x) * scale).sum(), [*net.parameters(), scale])
    with layers_in("bfloat16"):
        y = net(x)
        product = x.flatten(1) @ x.flatten(1).T
    assert y.dtype == torch.float32
    assert torch.equal(product, x.flatten(1) @ x.flatten(1).T)
    rounded = torch.autograd.grad((y * scale).sum(), [*net.parameters(), scale])
    for a, b in zip(plain, rounded, strict=True):
        assert b.dtype == torch.float32
        assert (
            0 < float((a - b).norm()) < 0.05 * float(a.norm())
        )  # bfloat16 has 3 digits, and rounding flips some ReLUs


def test_bfloat16_does_not_change_double_precision() -> None:
    layer, x = nn.Linear(3, 2).double(), torch.rand(4, 3, dtype=torch.float64)
    with layers_in("bfloat16"):
        assert torch.equal(layer(x), x @ layer.weight.T + layer.bias)
