"""Devices."""

from __future__ import annotations

import pytest
import torch

from deepprob.engine.machine import pick_device


def test_pick_device_by_name() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device(torch.device("cpu")).type == "cpu"
    with pytest.raises(ValueError, match=r"unknown device 'gpu'\. Choose from: auto, cpu, cuda, cuda:<number>\."):
        pick_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_a_missing_gpu() -> None:
    with pytest.raises(ValueError, match=r"device 'cuda:1' needs a GPU, but torch finds none\. Use device='cpu'"):
        pick_device("cuda:1")
