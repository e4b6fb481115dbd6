"""A loaded posterior takes data in the form of the fit, and answers what the one in memory answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoNormal,
    AutoNormalMessenger,
)
from torch import Tensor

from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

X = torch.linspace(-1.0, 1.0, 8)
N = 40
Y = torch.randn(N, generator=torch.Generator().manual_seed(0)) + 1.5


def unequal(ys: list[Tensor]) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    for i, y in enumerate(ys):
        with pyro.plate(f"rows_{i}", len(y)):
            pyro.sample(f"y_{i}", dist.Normal(mean, 1.0), obs=y)


def with_constants(y: Tensor, constants: list[Any]) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y_0", dist.Normal(mean + constants[0].mean() + constants[1]["a"].sum(), 1.0), obs=y)


def shifted(x: Tensor, y: Tensor | None = None) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(mean + x, 1.0), obs=y)


def shifted_codes(x: Tensor, y: Tensor | None = None) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 0.5))
        pyro.sample("y", dist.Normal(z + x, 1.0), obs=y)


def both(make: Callable[[], Program], data: Any, path: Path, **options: Any) -> list[Posterior]:
    fitted = svi(make(), data, progress=False, compile=False, **{"steps": 50} | options)
    fitted.save(path / "fit")
    return [fitted, Posterior.load(path / "fit", program=make())]


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (unequal, ([torch.ones(6), torch.zeros(9)],)),
        (unequal, ([torch.ones(6), torch.zeros(9), torch.ones(9)],)),
        (with_constants, (torch.ones(6), [torch.arange(3.0), {"a": torch.ones(2, 2)}])),
        (with_constants, (torch.ones(6), [torch.tensor(2.0), {"a": torch.ones(9)}])),
    ],
)
def test_nested_arguments_have_the_form_of_the_fit(model: Any, data: Any, tmp_path: Path) -> None:
    found = both(lambda: Program.of(model, "normal"), data, tmp_path)
    for given in ((data,), data):  # the same object, or its parts spread out
        queries: list[Callable[[Posterior], Tensor]] = [
            lambda p, given=given: p.sample(*given, draws=3, seed=1)["mean"],
            lambda p, given=given: p.predict(*given, draws=3, seed=1, site="y_0").draws,
            lambda p, given=given: p.log_likelihood(*given, draws=3, seed=1, site="y_0"),
        ]
        for query in queries:
            one, other = (query(posterior) for posterior in found)
            assert one.shape[0] == 3
            assert torch.equal(one, other)


@pytest.mark.parametrize("guide", [AutoNormalMessenger, AutoHierarchicalNormalMessenger])
@pytest.mark.parametrize("model", [shifted, shifted_codes])
def test_messengers_predict_data_that_are_left_out(model: Any, guide: Any, tmp_path: Path) -> None:
    found = both(lambda: Program.of(model, guide(model)), (X, X + 1.0), tmp_path, steps=300)
    draws = [posterior.predict(X, draws=400, seed=1).draws for posterior in reversed(found)]  # the loaded one first
    assert torch.equal(*draws)
    assert torch.equal(*(p.log_likelihood(X, X + 1.0, draws=3, seed=1) for p in found))
    means = found[0].sample(draws=400, seed=1)["mean"]
    # The prediction has the noise of the model, not of a guide for y.
    assert 0.8 < float(draws[0].std(0).mean()) < 1.5
    torch.testing.assert_close(draws[0].mean(), means.mean() if model is shifted else draws[1].mean(), atol=0.2, rtol=0)
    assert not any(".y" in name for name in found[0].parameters())


def of_rows(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("data", N, subsample_size=len(y)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def plates(y: Tensor) -> pyro.plate:
    return pyro.plate("data", N, subsample_size=len(y))


@pytest.mark.parametrize("create_plates", [None, plates])
def test_guide_lists_on_minibatches(create_plates: Any, tmp_path: Path) -> None:
    def make() -> Program:
        guides = AutoGuideList(of_rows, create_plates=create_plates)
        guides.append(AutoNormal(poutine.block(of_rows, expose=["mean"])))
        guides.append(AutoNormal(poutine.block(of_rows, expose=["z"])))
        return Program.of(of_rows, guides, data_plate="data")

    fast = Optimizer(learning_rate=0.02)
    found = both(make, Y, tmp_path, steps=2500, batch_size=8, optimizer=fast)
    draws = found[0].sample(Y, draws=2000, seed=1)
    mean = float(Y.sum() / 2 / (1 / 9 + N / 2))
    assert abs(float(draws["mean"].mean()) - mean) < 0.06
    assert abs(float(draws["mean"].std()) / (1 / 9 + N) ** -0.5 - 1) < 0.2  # the optimum of a mean field
    torch.testing.assert_close(draws["z"].mean(0), (mean + Y) / 2, atol=0.25, rtol=0.0)
    assert torch.equal(*(p.log_likelihood(Y, draws=3, seed=1) for p in found))


def test_a_callable_in_a_guide_list_cannot_make_its_plates() -> None:
    def amortized(y: Tensor) -> None:
        with plates(y):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.5)) * y, 0.7))

    guides = AutoGuideList(of_rows)
    guides.append(AutoNormal(poutine.block(of_rows, expose=["mean"])))
    guides.append(amortized)
    with pytest.raises(ValueError, match=r"Multiple sample sites named 'data'\. .* makes the plates of its parts"):
        svi(Program.of(of_rows, guides, data_plate="data"), Y, batch_size=8, steps=1)
