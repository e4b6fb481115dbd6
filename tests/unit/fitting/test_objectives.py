"""The ELBO's terms, their weights, and the condition for a closed-form KL."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from uncompiled import replace_compiler

from deepprob.fitting.objectives import ELBO, IWAE, OBJECTIVES, Terms, description, objective_named
from deepprob.inference import svi
from deepprob.programs.kl import closed_form_kls
from deepprob.programs.program import Program
from deepprob.programs.run import Run, run_program


def model(y: Tensor, scale: float = 1.0) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w + z, 1.0), obs=y)


def guide(y: Tensor) -> None:
    pyro.sample("w", dist.Normal(0.5, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(y / 2, 0.5))


def terms_of(program: Program, y: Tensor, num_data: int, **options: Any) -> dict[str, Tensor]:
    with pyro.validation_enabled(False):
        return ELBO(**options)(Run(program, (y,), torch.arange(len(y)), num_data))[1]


@pytest.mark.parametrize("particles", [0, -1, 1.5])
def test_refuses_invalid_particles(particles: Any) -> None:
    with pytest.raises(ValueError, match=r"particles must be a whole number of at least 1; got"):
        ELBO(particles=particles)


def test_refuses_unknown_precision() -> None:
    with pytest.raises(ValueError, match=r"unknown precision of layers 'float16'\. .*Choose from: bfloat16, float32\."):
        ELBO(layers="float16")


def test_names_and_objects() -> None:
    assert objective_named("elbo") is OBJECTIVES["elbo"]
    own = ELBO(particles=3, analytic_kl=False)
    assert objective_named(own) is own
    settings = {"particles": 3, "analytic_kl": False, "layers": "float32", "gradient": "total", "free_bits": 0.0}
    assert own.describe() == {"name": "elbo", **settings}
    with pytest.raises(
        ValueError, match=r"unknown objective 'elb'\. Did you mean 'elbo'\? Choose from: beta, .*iwae, "
    ):
        objective_named("elb")
    message = r"objective must be a name \(elbo, stl, iwae, .*\) or a callable with a method describe, such as"
    with pytest.raises(TypeError, match=message + r" ELBO\(particles=4\); got float\."):
        objective_named(1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=message):
        objective_named(lambda run: run)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match=r"must be a name or an object; got the class ELBO\. Write ELBO\(\)\."):
        objective_named(ELBO)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [2, 10])
def test_terms_are_per_datum_for_every_batch_size(batch: int) -> None:
    terms = terms_of(Program.of(model, guide, data_plate="data"), torch.full((batch,), 1.0), 10)
    kl_w = torch.distributions.kl_divergence(dist.Normal(0.5, 0.5), dist.Normal(0.0, 1.0))
    kl_z = torch.distributions.kl_divergence(dist.Normal(0.5, 0.5), dist.Normal(0.0, 1.0))
    assert float(terms["kl_global"]) == pytest.approx(float(kl_w) / 10)
    assert float(terms["kl_local"]) == pytest.approx(float(kl_z))
    assert float(terms["elbo"]) == pytest.approx(
        float(terms["likelihood"] - terms["kl_local"] - terms["kl_global"]), rel=1e-5
    )
    assert not any(t.requires_grad for t in terms.values())


def test_every_kl_is_global_without_a_data_plate() -> None:
    terms = terms_of(Program.of(model, guide), torch.ones(10), 10)
    assert float(terms["kl_local"]) == 0.0
    assert float(terms["kl_global"]) > 0.0


def test_scale_and_mask_apply_to_the_closed_form() -> None:
    y = torch.ones(4)
    plain = terms_of(Program.of(model, guide, data_plate="data"), y, 4)
    scaled = Program.of(poutine.scale(model, 3.0), poutine.scale(guide, 3.0), data_plate="data")
    assert float(terms_of(scaled, y, 4)["kl_local"]) == pytest.approx(3 * float(plain["kl_local"]))
    masked = Program.of(poutine.mask(model, mask=False), poutine.mask(guide, mask=False), data_plate="data")
    assert float(terms_of(masked, y, 4)["elbo"]) == 0.0


def test_elbo_counts_factors_but_not_deterministic_values() -> None:
    def with_factor(y: Tensor) -> None:
        pyro.deterministic("twice", 2 * y)
        pyro.factor("bonus", torch.tensor(7.0))
        model(y)

    y = torch.ones(4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = terms_of(Program.of(model, guide), y, 4)
        torch.manual_seed(0)
        more = terms_of(Program.of(with_factor, guide), y, 4)
    assert float(more["likelihood"] - plain["likelihood"]) == pytest.approx(7.0 / 4, rel=1e-4)


def test_closed_form_needs_the_models_earlier_sites_drawn_earlier_in_the_guide() -> None:
    def chain(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    def forward(y: Tensor) -> None:
        pyro.sample("a", dist.Normal(0.0, 0.5))
        pyro.sample("b", dist.Normal(0.0, 0.5))

    def backward(y: Tensor) -> None:
        pyro.sample("b", dist.Normal(0.0, 0.5))
        pyro.sample("a", dist.Normal(0.0, 0.5))

    batch, rows = (torch.zeros(1),), torch.arange(1)
    assert set(closed_form_kls(*run_program(Run(Program.of(chain, forward), batch, rows, 1)))) == {"a", "b"}
    # b was drawn before a: averaging over b in closed form would need a of the same draw.
    assert set(closed_form_kls(*run_program(Run(Program.of(chain, backward), batch, rows, 1)))) == {"a"}


def test_kl_without_a_closed_form_is_sampled() -> None:
    def student(y: Tensor) -> None:
        pyro.sample("w", dist.StudentT(3.0, 0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    def normal(y: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))

    run = Run(Program.of(student, normal), (torch.zeros(1),), torch.arange(1), 1)
    assert closed_form_kls(*run_program(run)) == {}


def test_score_function_changes_the_gradient_but_not_the_loss() -> None:
    logit = torch.tensor(0.4, requires_grad=True)

    def coin(y: Tensor) -> None:
        pyro.sample("y", dist.Normal(2 * pyro.sample("coin", dist.Bernoulli(0.3)), 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("coin", dist.Bernoulli(logits=logit))

    loss, terms = ELBO(analytic_kl=False)(Run(Program.of(coin, guide), (torch.ones(1),), torch.arange(1), 1))
    assert float(loss.detach()) == pytest.approx(-float(terms["elbo"]))
    assert float(torch.autograd.grad(loss, logit)[0]) != 0.0


class Own:
    """A user's objective, which needs only ``__call__`` and ``describe``."""

    def __call__(self, run: Run, *, kl_weight: float | Tensor = 1.0) -> tuple[Tensor, Terms]:
        loss, terms = ELBO()(run, kl_weight=kl_weight)
        return 2 * loss, {"elbo": terms["elbo"], "twice": 2 * terms["elbo"]}

    def describe(self) -> dict[str, Any]:
        return {"name": "own"}


@pytest.mark.parametrize("compile", [False, True])
def test_fits_a_users_objective(compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_compiler(monkeypatch)
    program = Program.of(model, "normal", data_plate="data")
    posterior = svi(program, torch.ones(6), objective=Own(), epochs=3, compile=compile, progress=False)
    steps = posterior.history.steps
    assert steps["twice"] == pytest.approx([2 * value for value in steps["elbo"]])
    assert posterior.config["objective"] == {"name": "own"}
    assert posterior.config["compiled"] == compile


# -- mistakes in a user's objective, found before the first step -----------------------------------------------------


class Changed(Own):
    """`Own` with a changed result.

    Args:
        change: Makes the result from the loss and the terms.
    """

    def __init__(self, change: Callable[[Tensor, Terms], Any]) -> None:
        self.change, self.calls = change, 0

    def __call__(self, run: Run, *, kl_weight: float | Tensor = 1.0) -> Any:
        self.calls += 1
        return self.change(*super().__call__(run, kl_weight=kl_weight))


def fit_with(objective: Any, **options: Any) -> Any:
    program = Program.of(model, "normal", data_plate="data")
    return svi(
        program, torch.ones(6), objective=objective, **{"steps": 3, "compile": False, "progress": False} | options
    )


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda loss, terms: loss, r"TypeError: Own must return the loss and a dict of terms; got tensor\("),
        (lambda loss, terms: (loss, [loss]), r"TypeError: Own must return the loss and a dict of .* Write return loss"),
        (
            lambda loss, terms: (loss.item(), terms),
            r"TypeError: the loss of Own must be a tensor; got .* without \.item",
        ),
        (
            lambda loss, terms: (loss.expand(3), terms),
            r"ValueError: the loss of Own must be .*; got shape \(3,\)\. Take",
        ),
        (lambda loss, terms: (loss.detach(), terms), r"ValueError: the loss of Own has no gradient, .* \.detach\(\)\."),
        (lambda loss, terms: (loss, {"a": loss}), r"ValueError: the terms of Own must include 'elbo', .*; got a\. Add"),
        (
            lambda loss, terms: (loss, {}),
            r"ValueError: the terms of Own must include 'elbo', .*; got no term\. Add it\.",
        ),
        (
            lambda loss, terms: (loss, terms | {"a": 1.0}),
            r"TypeError: the term 'a' of Own must be a tensor; got 1\.0\.",
        ),
        (
            lambda loss, terms: (loss, terms | {"a": torch.zeros(3)}),
            r"ValueError: the term 'a' of Own must be one number, of shape \(\); got shape \(3,\)\. Take its mean",
        ),
        (
            lambda loss, terms: (loss, terms | {"skipped": loss}),
            r"ValueError: Own has a term named 'skipped', a name that every fit records itself\. Rename it\.",
        ),
        (
            lambda loss, terms: (loss, terms | {"gradient_norm": loss}),
            r"ValueError: Own has a term named 'gradient_norm', a name that every fit records itself\. Rename it\.",
        ),
    ],
)
def test_results_are_checked_before_the_first_step(
    change: Callable[[Tensor, Terms], Any], message: str, compile: bool
) -> None:
    objective = Changed(change)
    with pytest.raises((TypeError, ValueError)) as caught:
        fit_with(objective, compile=compile)
    assert re.match(message.replace("Own", "Changed"), f"{caught.type.__name__}: {caught.value}")
    assert objective.calls == 1


class WithoutWeight(Own):
    def __call__(self, run: Run) -> Any:  # type: ignore[override]
        return super().__call__(run)


class WithLayers(Own):
    def __init__(self, layers: Any) -> None:
        self.layers = layers


def test_signature_and_layers_are_checked_before_the_first_step() -> None:
    message = (
        r"WithoutWeight must be callable as objective\(run, kl_weight=1\.0\), but .*'kl_weight'\. Write def __call__"
    )
    with pytest.raises(TypeError, match=message):
        fit_with(WithoutWeight())
    with pytest.raises(
        TypeError, match=r"WithLayers has an attribute layers, .* Decorate the class with @dataclass, or"
    ):
        fit_with(WithLayers("bfloat16"))
    with pytest.raises(ValueError, match=r"unknown precision of layers 3\. Choose from: bfloat16, float32\."):
        fit_with(WithLayers(3))


@pytest.mark.parametrize("native", [True, False])
def test_layers_are_in_float32_where_bfloat16_is_slow(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepprob.fitting.objectives.multiplies_bfloat16", lambda _: native)
    message = r"layers multiply in float32: cpu has no instructions for bfloat16.* Leave layers='bfloat16' out\."
    with nullcontext() if native else pytest.warns(UserWarning, match=message):
        found = fit_with(IWAE(particles=2, layers="bfloat16"))
    layers = "bfloat16" if native else "float32"
    assert found.config["objective"] == IWAE(particles=2, layers=layers).describe()


class Described(Own):
    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def describe(self) -> Any:
        return self.settings


def test_description_is_checked_before_the_first_step() -> None:
    for value in (np.float32(0.5), torch.zeros(2)):
        message = (
            r"Described\.describe\(\) must return a dict that can be written as JSON; got .* is not JSON serializable"
        )
        with pytest.raises(TypeError, match=message):
            fit_with(Described({"name": "own", "temperature": value}))
    with pytest.raises(TypeError, match=r"Described\.describe\(\) must return a dict; got 'own'\. Return \{'name'"):
        fit_with(Described("own"))


def test_description_is_equal_after_it_was_saved() -> None:
    """Tuples become lists, so that a checkpoint's settings equal those of the fit that resumes from it."""
    assert description(Described({"dims": (2, 3), "scale": np.float64(0.5)})) == {"dims": [2, 3], "scale": 0.5}
    for own in OBJECTIVES.values():
        assert description(own) == own.describe()


def test_check_of_an_objective_leaves_the_fit_as_it_is() -> None:
    """A subclass is checked and `ELBO` is not; the statistics of the batch norm and all draws are equal."""

    @dataclass(frozen=True)
    class Same(ELBO):
        pass

    class Normed(Program):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(1)
            self.loc = torch.nn.Parameter(torch.zeros(()))

        def model(self, x: Tensor) -> None:
            with self.data_plate(x):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(self.norm(x.unsqueeze(-1)).squeeze(-1) + z, 1.0), obs=x)

        def guide(self, x: Tensor) -> None:
            with self.data_plate(x):
                pyro.sample("z", dist.Normal(self.loc, 1.0))

    x = torch.arange(6.0)
    options: dict[str, Any] = {"batch_size": 3, "epochs": 2, "compile": False, "progress": False}
    plain, checked = (svi(Normed(), x, objective=own, **options) for own in (ELBO(), Same()))
    assert plain.history.steps == checked.history.steps
    first, second = plain.instance.tensors(), checked.instance.tensors()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
