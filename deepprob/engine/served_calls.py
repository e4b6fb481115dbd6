"""Serve noise to Python's calls of random functions, at no cost to all other calls."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deepprob.engine.machine import ONE_AT_A_TIME
from deepprob.engine.noise import LiftedNoise

_LAYERS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
_IN_PLACE = ("normal_", "uniform_", "bernoulli_", "exponential_", "cauchy_")
_FUNCTIONS: list[tuple[Any, str]] = [
    *((torch, name) for name in ("normal", "randn", "randn_like", "rand", "rand_like", "bernoulli", "multinomial")),
    *((module, f"{name}{end}") for module in (torch, torch._VF) for name in _LAYERS for end in ("", "_")),
    *((Tensor, name) for name in (*_IN_PLACE, "bernoulli", "multinomial")),
    (nn.functional, "scaled_dot_product_attention"),
]
_serving = threading.local()  # the noise of each thread
_replaced: list[tuple[Any, str, Any]] = []  # owner, name, and the owner's attribute before
_users = 0


@contextmanager
def replaced_calls() -> Iterator[None]:
    """A context in which torch's random functions are replaced, so that `served` can serve them.

    A `LiftedNoise` around a whole run sees every operation, which doubles the time of a small step. With replaced
    functions only random ones run inside of a `LiftedNoise`. Replacing them makes Python look up a tensor's methods
    anew, so it is done once for many steps. Random operations inside of torch's own layers (dropout between the layers
    of an LSTM) are not served.
    """
    global _users
    with ONE_AT_A_TIME:
        _users += 1
        if _users == 1:
            for owner, name in _FUNCTIONS:
                _replaced.append((owner, name, vars(owner).get(name)))
                setattr(owner, name, _replacement(getattr(owner, name)))
    try:
        yield
    finally:
        with ONE_AT_A_TIME:
            _users -= 1
            while not _users and _replaced:
                owner, name, before = _replaced.pop()
                if before is None:
                    delattr(owner, name)  # it was inherited
                else:
                    setattr(owner, name, before)


@contextmanager
def served(noise: LiftedNoise) -> Iterator[None]:
    """A context in which this thread's calls of torch's random functions take their numbers from a noise.

    Args:
        noise: The noise. Other threads' calls draw from torch's generator.

    Examples:
        >>> with replaced_calls(), served(LiftedNoise(torch.arange(16.0), torch.zeros(0))):
        ...     torch.randn(2), torch.zeros(2).normal_()
        (tensor([0., 1.]), tensor([2., 3.]))
    """
    before, _serving.noise = getattr(_serving, "noise", None), noise
    try:
        yield
    finally:
        _serving.noise = before


def _replacement(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        noise = getattr(_serving, "noise", None)
        if noise is None:
            return function(*args, **kwargs)
        with noise:
            return function(*args, **kwargs)

    return call
