"""The `Optimizer` factory: settings, schedules, building and description."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from deepprob.fitting.optimizers import Optimizer, constant, cosine, linear, optimizer_named


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adm"}, r"unknown optimizer 'adm'\. Did you mean 'adam'\? Choose from: adagrad, adam,"),
        ({"schedule": "cosin"}, r"unknown schedule 'cosin'\. Did you mean 'cosine'\?"),
        ({"learning_rate": 0.0}, r"learning_rate must be positive; got 0\.0\."),
        ({"learning_rate": math.inf}, r"learning_rate must be positive; got inf\."),
        ({"learning_rate": math.nan}, r"learning_rate must be positive; got nan\."),
        ({"clip_norm": -1.0}, r"clip_norm must be positive, or None; got -1\.0\."),
        ({"average": 1.0}, r"average must lie between 0 and 1, or be None; got 1\.0\."),
        ({"accumulate": 2.5}, r"accumulate must be a whole number of at least 1; got 2\.5\."),
        ({"accumulate": True}, r"accumulate must be a whole number of at least 1; got True\."),
        ({"name": torch.optim.LBFGS}, r"LBFGS evaluates the loss several times per step, .* Choose adam"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Optimizer(**options)


def test_names_classes_and_factories() -> None:
    assert optimizer_named(None) == Optimizer()
    assert optimizer_named("sgd").name == "sgd"
    assert optimizer_named(torch.optim.RAdam).name is torch.optim.RAdam
    assert type(Optimizer(accumulate=np.int64(2)).accumulate) is int
    own = Optimizer(learning_rate=0.1)
    assert optimizer_named(own) is own
    built = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(TypeError, match=r"optimizer must be a name, a class of torch\.optim, or .*; got SGD\."):
        optimizer_named(built)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"an optimizer's name must be text or a class of torch\.optim; got 3\."):
        Optimizer(3)  # type: ignore[arg-type]


def test_schedules_start_at_the_peak_and_end_near_zero() -> None:
    for schedule in (cosine, linear):
        rates = [schedule(step, 100) for step in range(101)]
        assert rates[0] == 1.0
        assert rates[-1] == pytest.approx(0.01)
        assert rates == sorted(rates, reverse=True)
    assert constant(7, 10) == 1.0
    assert Optimizer(schedule=lambda step, total: 0.5).rate(0, 10, 0.2) == 0.1


def test_build_passes_options_on() -> None:
    built = Optimizer("sgd", options={"momentum": 0.9}).build([torch.zeros(1, requires_grad=True)], 0.3)
    assert isinstance(built, torch.optim.SGD)
    assert built.defaults["momentum"] == 0.9
    assert built.defaults["lr"] == 0.3


def test_describe_is_json() -> None:
    def halves(step: int, total: int) -> float:
        return 0.5**step

    text = json.dumps(Optimizer(torch.optim.RAdam, schedule=halves, options={"betas": (0.9, 0.99)}).describe())
    assert '"RAdam"' in text
    assert '"halves"' in text
