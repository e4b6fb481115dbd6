"""Baselines of score-function sites: their state from step to step, their training, and wrong options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceGraph_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn
from uncompiled import replace_compiler

from deepprob.engine.random import RandomStream
from deepprob.fitting.callbacks import Checkpoint
from deepprob.fitting.gradients import GradientProgram
from deepprob.fitting.objectives import ELBO
from deepprob.inference import svi
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program

Y = torch.tensor([0.5, 2.0, -1.0, 1.5])
AVERAGE = {"use_decaying_avg_baseline": True, "baseline_beta": 0.8}


def model(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        coin = pyro.sample("coin", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(2.0 * coin, 1.0), obs=y)


def coins(baseline: dict[str, Any], *networks: nn.Module) -> Program:
    def guide(y: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.5))
        for net in networks:
            pyro.module("net", net)
        with pyro.plate("rows", len(y)):
            pyro.sample("coin", dist.Bernoulli(logits=slope * y), infer={"baseline": baseline})

    return Program.of(model, guide)


def test_averages_decay_as_pyros() -> None:
    objective = ELBO(analytic_kl=False)
    ours, theirs = (ProgramInstance(coins(AVERAGE), (Y,), len(Y)) for _ in range(2))
    program, elbo = GradientProgram(ours, objective), TraceGraph_ELBO()
    elbo.max_plate_nesting = 1
    for seed in range(4):
        with RandomStream(seed).drawing(), ours.running():
            _, _, (gradient,) = program((Y,), torch.arange(len(Y)), 1.0)
        with RandomStream(seed).drawing(), theirs.running(), theirs.program.bound(torch.arange(len(Y)), len(Y)):
            _, loss = elbo._loss_and_surrogate_loss(theirs.program.model, theirs.program.guide, (Y,), {})  # type: ignore
            (expected,) = torch.autograd.grad(loss, [theirs.store["params"]["slope"]])
        assert torch.allclose(len(Y) * gradient, expected, rtol=1e-5)
        theirs_average = theirs.store["params"]["__baseline_avg_downstream_cost_coin"]
        assert torch.allclose(ours.averages["coin"], theirs_average, rtol=1e-5)


def test_a_score_without_a_gradient_leaves_the_average() -> None:
    instance = ProgramInstance(coins(AVERAGE), (Y,), len(Y))
    program = GradientProgram(instance, ELBO())
    with RandomStream(0).drawing(), instance.running():
        program((Y,), torch.arange(len(Y)), 1.0)
        before = instance.averages["coin"].clone()
        program.measure((Y,), torch.arange(len(Y)))
    assert before.any()
    assert torch.equal(before, instance.averages["coin"])
    svi(coins(AVERAGE), Y, steps=3, held_out=Y[:4], progress=False)


@pytest.mark.parametrize("pyros", [False, True], ids=["registered", "PyroModule"])
def test_the_network_of_a_baseline_is_trained(pyros: bool) -> None:
    kind: Any = PyroModule[nn.Embedding] if pyros else nn.Embedding
    net = kind(4, 1)
    options = {"nn_baseline": nn.Sequential(net, nn.Flatten(0)), "nn_baseline_input": torch.arange(4)}
    if pyros:
        options["nn_baseline"] = PyroModule[nn.Sequential](net, nn.Flatten(0))
    program = coins(options) if pyros else coins(options, options["nn_baseline"])  # type: ignore[arg-type]
    with torch.no_grad():
        net.weight.fill_(50.0)
    posterior = svi(program, Y, steps=40, optimizer="adam", progress=False)
    (weight,) = (x for name, x in posterior.instance.program.named_parameters() if name.endswith("0.weight"))
    assert bool((weight < 49.9).all())
    assert bool((net.weight == 50.0).all())


def test_an_unregistered_network_is_named() -> None:
    net = nn.Sequential(nn.Embedding(4, 1), nn.Flatten(0))
    with pytest.warns(UserWarning, match=r"the weights of .* are used but not registered with Pyro"):
        svi(coins({"nn_baseline": net, "nn_baseline_input": torch.arange(4)}), Y, steps=2, progress=False)


class Stop(Checkpoint):
    """A checkpoint that ends the fit after three steps."""

    def epoch_end(self, fit: Any) -> None:
        super().epoch_end(fit)
        fit.stop = fit.step == 3


def test_a_fit_resumes_with_its_averages(tmp_path: Path) -> None:
    def fit(*callbacks: Any) -> Tensor:
        posterior = svi(coins(AVERAGE), Y, steps=6, progress=False, callbacks=callbacks)
        return posterior.instance.store["params"]["slope"]

    whole, stopped = fit(), fit(Stop(tmp_path / "c"))
    assert not torch.equal(whole, stopped)
    assert torch.equal(whole, fit(Checkpoint(tmp_path / "c")))


def test_compiled_steps_keep_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_compiler(monkeypatch)
    program = coins(AVERAGE | {"nn_baseline": nn.Flatten(0), "nn_baseline_input": Y})
    found = svi(program, Y, steps=8, compile=True, progress=False)
    assert found.config["compiled"]


def test_particles_have_baselines_of_their_own() -> None:
    instance = ProgramInstance(coins(AVERAGE), (Y,), len(Y))
    with RandomStream(0).drawing(), instance.running():
        GradientProgram(instance, ELBO(particles=3))((Y,), torch.arange(len(Y)), 1.0)
    assert instance.averages["coin"].shape == (3, len(Y))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"use_average": True},
            r"unknown baseline option of site 'coin' 'use_average'\..* Choose from: baseline_beta,",
        ),
        (
            {"nn_baseline": torch.abs, "nn_baseline_input": Y, "baseline_value": Y},
            r"site 'coin' has both nn_baseline and baseline_value\. Leave one of them out\.",
        ),
        (
            {"baseline_value": torch.tensor(1.0)},
            r"the cost of site 'coin' has shape \(4,\), but its baseline has \(\)\. Give one number for every draw",
        ),
    ],
    ids=["unknown", "both", "shape"],
)
def test_refuses_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        svi(coins(options), Y, steps=2, progress=False)


def coin_guide(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        pyro.sample("coin", dist.Bernoulli(logits=pyro.param("slope", torch.tensor(0.5)) * y))


def test_importance_weights_do_not_use_baselines() -> None:
    options: dict[str, Any] = {"steps": 2, "progress": False}
    with pytest.warns(
        UserWarning, match=r"'iwae' does not use the baselines of score-function sites, because the other"
    ):
        svi(coins(AVERAGE), (Y,), objective="iwae", **options)
    svi(Program.of(model, coin_guide), (Y,), objective="iwae", **options)
