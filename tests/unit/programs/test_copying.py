"""Copies of callables have their own copy of every network, shared as in the originals."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import affine_coupling
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from deepprob.programs.copying import captured_modules, copy_with_modules, forget_values

NET = nn.Linear(2, 2)
UNUSED = nn.Linear(1, 1)


def through_a_global(x: Tensor) -> Tensor:
    return NET(x)


def through_a_helper(x: Tensor) -> Tensor:
    return through_a_global(x)


def mentions_an_attribute(x: Any) -> Any:
    return x.UNUSED


def nested(x: Tensor) -> list[Tensor]:
    return [through_a_global(row) for row in x]


def make(net: nn.Module) -> Callable[[Tensor], Tensor]:
    def model(x: Tensor) -> Tensor:
        return net(x)

    return model


class Holder:
    def __init__(self) -> None:
        self.net = nn.Linear(2, 2)
        self.lock = None

    def model(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("fn", [through_a_global, through_a_helper, nested])
def test_globals_are_followed_and_copied(fn: Callable[..., Any]) -> None:
    assert captured_modules(fn) == [NET]
    (copied,) = captured_modules(copy_with_modules(fn))
    assert copied is not NET
    with torch.no_grad():
        copied.weight.zero_()
    assert bool((copy_with_modules(fn)(torch.ones(1, 2))[0] != 0).any())


def test_attribute_names_are_not_taken_for_globals() -> None:
    assert captured_modules(mentions_an_attribute) == []
    assert copy_with_modules(mentions_an_attribute) is mentions_an_attribute


def test_copies_containers_methods_partials_and_handlers() -> None:
    net, holder = nn.Linear(2, 2), Holder()
    models = {"a": [make(net)]}

    def through_a_container(x: Tensor) -> Tensor:
        return models["a"][0](x)

    forms = [
        (through_a_container, net),
        (holder.model, holder.net),
        (functools.partial(make(net), torch.ones(1, 2)), net),
        (functools.partial(lambda net, x: net(x), net), net),
        (poutine.mask(make(net), mask=True), net),
    ]
    for form, original in forms:
        (copied,) = captured_modules(copy_with_modules(form))
        assert captured_modules(form) == [original]
        assert copied is not original


def test_copied_handlers_pass_arguments_once() -> None:
    wrapped = poutine.mask(make(nn.Linear(2, 2)), mask=True)
    assert copy_with_modules(copy_with_modules(wrapped))(torch.ones(3, 2)).shape == (3, 2)


def test_copies_share_modules_as_the_originals_do() -> None:
    net = nn.Linear(2, 2)
    model, guide = copy_with_modules((make(net), make(net)))
    assert captured_modules(model) == captured_modules(guide)
    assert captured_modules(model) != [net]


def test_copied_autoguide_keeps_its_copied_model() -> None:
    model = make(nn.Linear(2, 2))
    guide = AutoNormal(model)
    twin_model, twin = copy_with_modules((model, guide))
    assert guide.model is not None
    assert captured_modules(twin)[0] is twin
    assert captured_modules(twin_model)[0] in captured_modules(twin)


def test_copies_recursive_functions_and_unbound_names() -> None:
    net = nn.Linear(2, 2)

    def countdown(x: Tensor, n: int) -> Tensor:
        return net(x) if n == 0 else countdown(x, n - 1)

    copied = copy_with_modules(countdown)
    assert copied(torch.ones(1, 2), 3).shape == (1, 2)
    (inner,) = captured_modules(copied)
    assert inner is not net

    def early() -> Any:
        return late, net

    assert captured_modules(copy_with_modules(early)) != [net]
    late = 3
    assert early()[0] == late


def test_keeps_objects_that_cannot_be_copied_unless_they_hold_modules() -> None:
    holder = Holder()
    holder.lock = threading.Lock()  # type: ignore[assignment]
    lock, net = threading.Lock(), nn.Linear(2, 2)

    def model(x: Tensor) -> Tensor:
        with lock:
            return net(x)

    assert copy_with_modules(model)(torch.ones(1, 2)).shape == (1, 2)
    with pytest.raises(TypeError, match="cannot pickle"):
        copy_with_modules(holder.model)


def test_order_of_modules_is_the_same_in_every_process() -> None:
    program = (
        "from torch import nn\nfrom deepprob.programs.copying import captured_modules\n"
        + "".join(f"n{i} = nn.Linear({i + 1}, 1)\n" for i in range(8))
        + "def f():\n    return n5, n1, n7, n0, n3, n2, n6, n4\n"
        + "print([m.in_features for m in captured_modules(f)])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        for seed in ("1", "2")
    ]
    assert [r.stdout for r in runs] == ["[6, 2, 8, 1, 4, 3, 7, 5]\n"] * 2


def test_cleared_flow_maps_the_same_data_with_its_new_parameters() -> None:
    flow = affine_coupling(2, hidden_dims=[4])
    x, base = torch.randn(3, 2), dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    dist.TransformedDistribution(base, [flow]).log_prob(x).sum().backward()
    twin = copy_with_modules(flow)
    with torch.no_grad():
        before = dist.TransformedDistribution(base, [twin]).log_prob(x)
        for p in twin.parameters():
            p.add_(0.5)
        forget_values(twin)
        now = dist.TransformedDistribution(base, [twin]).log_prob(x)
        assert torch.equal(now, dist.TransformedDistribution(base, [twin]).log_prob(x.clone()))
        assert not torch.equal(now, before)
