"""The length of a fit, given as steps or as epochs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from uncompiled import replace_compiler

import deepprob as dp
from deepprob.inference import svi

Y = torch.linspace(-1.0, 3.0, 20)


def model(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 20):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def fitted(**options: Any) -> dp.Posterior:
    program = dp.Program.of(model, "normal", data_plate="data")
    return svi(program, Y, **{"batch_size": 5, "progress": False} | options)


def same(one: dp.Posterior, other: dp.Posterior) -> bool:
    first, second = one.instance.tensors(), other.instance.tensors()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("compile", [False, True])
def test_steps_of_whole_epochs_equal_epochs(compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_compiler(monkeypatch)
    one, other = fitted(epochs=3, compile=compile), fitted(steps=12, compile=compile)
    assert same(one, other)
    assert one.history.steps == other.history.steps
    assert (one.config["epochs"], one.config["steps"]) == (3, 12)
    assert (other.config["epochs"], other.config["steps"]) == (None, 12)


@pytest.mark.parametrize("steps", [1, 3, 6])
@pytest.mark.parametrize("held_out", [None, Y])
def test_fit_may_end_within_an_epoch(steps: int, held_out: Tensor | None) -> None:
    posterior = fitted(steps=steps, held_out=held_out)
    assert len(posterior.history.steps["elbo"]) == steps
    epochs = math.ceil(steps / 4)  # the last one may be shorter
    assert len(posterior.history.epochs["elbo"]) == epochs
    assert len(posterior.history.epochs.get("held_out_log_likelihood", [])) == (0 if held_out is None else epochs)
    assert posterior.config["steps"] == steps
    start = fitted(steps=1, optimizer=dp.Optimizer("sgd", learning_rate=1e-30))
    assert not same(posterior, start)


def test_schedule_ends_at_the_last_step() -> None:
    rates = fitted(steps=8).history.epochs["learning_rate"]
    assert rates[-1] < 0.1 * rates[0]


def test_refuses_a_checkpoint_of_fewer_steps(tmp_path: Path) -> None:
    fitted(steps=6, callbacks=[dp.Checkpoint(tmp_path / "c", every=0.5)])
    with pytest.raises(ValueError, match=r"belongs to another fit: steps \(was 6, now 9\)"):
        fitted(steps=9, callbacks=[dp.Checkpoint(tmp_path / "c", every=0.5)])


def test_fresh_weights_are_the_default() -> None:
    one, other = fitted(steps=5), fitted(steps=5, weights="fresh")
    assert same(one, other)
    assert (one.config["weights"], other.config["weights"]) == ("auto", "fresh")
