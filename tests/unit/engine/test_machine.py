"""Private stores, random streams, devices and threads."""

from __future__ import annotations

import threading

import pyro
import pytest
import torch

from deepprob.engine.machine import pick_device
from deepprob.engine.random import RandomStream
from deepprob.programs.store import empty_store, private_store


def test_a_private_store_is_closed_after_an_error() -> None:
    mine = empty_store()
    with pytest.raises(RuntimeError, match="on purpose"), private_store(mine):
        pyro.param("loc", torch.zeros(()))
        raise RuntimeError("on purpose")
    assert "loc" not in pyro.get_param_store()


def test_the_callers_store_is_restored() -> None:
    pyro.param("theirs", torch.ones(()))
    with private_store(empty_store()):
        assert "theirs" not in pyro.get_param_store()
    assert pyro.param("theirs").item() == 1.0
    pyro.clear_param_store()


def test_validation_is_set_and_restored() -> None:
    before = pyro.settings.get("validate_distributions_pyro")
    for asked in (True, False):
        with private_store(empty_store(), validate=asked):
            assert pyro.settings.get("validate_distributions_pyro") is asked
    assert pyro.settings.get("validate_distributions_pyro") == before


def test_a_stream_continues_and_can_be_reset() -> None:
    stream, outside = RandomStream(3), torch.get_rng_state()
    with stream.drawing():
        first = torch.randn(4)
    position = {n: t.clone() for n, t in stream.state.items()}
    with stream.drawing():
        second = torch.randn(4)
    stream.state = position
    with stream.drawing():
        again = torch.randn(4)
    assert torch.equal(second, again)
    assert not torch.equal(first, second)
    assert torch.equal(outside, torch.get_rng_state())


def test_nested_streams_are_independent() -> None:
    outer, inner = RandomStream(0), RandomStream(1)
    with outer.drawing():
        a = torch.randn(2)
        with inner.drawing():
            torch.randn(100)
        b = torch.randn(2)
    with RandomStream(0).drawing():
        assert torch.equal(torch.cat([a, b]), torch.randn(4))


def test_an_error_inside_a_stream_restores_the_callers_state() -> None:
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="on purpose"), RandomStream(0).drawing():
        torch.randn(3)
        raise RuntimeError("on purpose")
    assert torch.equal(before, torch.get_rng_state())


def test_streams_of_two_threads_do_not_interleave() -> None:
    expected = {}
    for seed in (0, 1):
        with RandomStream(seed).drawing():
            expected[seed] = torch.randn(200, 10)
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def work(seed: int) -> None:
        stream = RandomStream(seed)
        for _ in range(200):
            with stream.drawing():
                found[seed].append(torch.randn(10))

    before = torch.get_rng_state()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(before, torch.get_rng_state())
    # randn fills small tensors number by number and large ones in blocks, so compare with a loop of small draws.
    for seed in (0, 1):
        stream = RandomStream(seed)
        for value in found[seed]:
            with stream.drawing():
                assert torch.equal(value, torch.randn(10))


def test_pick_device_by_name() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device(torch.device("cpu")).type == "cpu"
    with pytest.raises(ValueError, match=r"unknown device 'gpu'\. Choose from: auto, cpu, cuda, cuda:<number>\."):
        pick_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_a_missing_gpu() -> None:
    with pytest.raises(ValueError, match=r"device 'cuda:1' needs a GPU, but torch finds none\. Use device='cpu'"):
        pick_device("cuda:1")
