"""Random streams."""

from __future__ import annotations

import threading

import pytest
import torch

from deepprob.engine.random import RandomStream


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
