"""Devices."""

from __future__ import annotations

import pytest
import torch

from deepprob.engine.machine import multiplies_bfloat16, pick_device


def test_pick_device_by_name() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device(torch.device("cpu")).type == "cpu"
    with pytest.raises(ValueError, match=r"unknown device 'gpu'\. Choose from: auto, cpu, cuda, cuda:<number>\."):
        pick_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_a_missing_gpu() -> None:
    with pytest.raises(ValueError, match=r"device 'cuda:1' needs a GPU, but torch finds none\. Use device='cpu'"):
        pick_device("cuda:1")


@pytest.mark.parametrize(
    ("found", "native"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True}, False),
    ],
)
def test_processors_with_instructions_for_bfloat16(
    found: dict[str, bool], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert multiplies_bfloat16(torch.device("cpu")) is native


def test_older_releases_of_torch_know_avx512_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        assert multiplies_bfloat16(torch.device("cpu")) is native
