"""Checks of observed values against the distributions that observe them."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from deepprob.inference import svi
from deepprob.programs.program import Program
from deepprob.programs.support import check_observations


def observe(fn: dist.Distribution, value: Tensor, mask: Tensor | None = None, dim: int = -1) -> None:
    def model() -> None:
        with pyro.plate("data", len(value), dim=dim), poutine.mask(mask=True if mask is None else mask):
            pyro.sample("y", fn, obs=value)

    with pyro.validation_enabled(False):
        check_observations(poutine.trace(model).get_trace())


def test_bools_and_whole_numbers_that_a_distribution_cannot_score_are_refused() -> None:
    labels = torch.tensor([True, False])
    for given, kind in ((labels, "bools"), (labels.long(), "whole numbers")):
        with pytest.raises(
            ValueError, match=rf"site 'y' observes {kind}, of which the Bernoulli .* Give floats: y.float"
        ):
            observe(dist.Bernoulli(0.5), given)
    observe(dist.Categorical(torch.ones(2)), labels)


SIMPLEX, ONE_HOT = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.0, 1.0]])


@pytest.mark.parametrize(
    ("fn", "good", "bad", "message"),
    [
        (
            dist.Bernoulli(0.5),
            [0.0, 1.0],
            [0.5, 1.0],
            r"y must be 0 or 1 for a Bernoulli likelihood; got values from 0\.5",
        ),
        (dist.Poisson(1.0), [0.0, 7.0], [-1.0], r"y must be whole numbers of at least 0 for a Poisson likelihood"),
        (dist.Gamma(1.0, 1.0), [0.5], [-0.5], r"y must be numbers of at least 0 for a Gamma likelihood"),
        (dist.LogNormal(0.0, 1.0), [0.5], [0.0], r"y must be numbers above 0 for a LogNormal likelihood"),
        (dist.Beta(1.0, 1.0), [0.5], [1.5], r"y must be numbers from 0 to 1 for a Beta likelihood"),
        (dist.Binomial(4, 0.5), [4.0], [5.0], r"y must be whole numbers from 0 to 4 for a Binomial likelihood"),
        (
            dist.Binomial(torch.tensor([4, 9]), 0.5),
            [4.0, 9.0],
            [5.0, 9.0],
            r"y must be whole numbers within the bounds of their rows",
        ),
        (dist.Normal(0.0, 1.0), [1.0], [float("nan")], "y must be real numbers for a Normal likelihood; got nan"),
    ],
)
def test_refuses_values_outside_of_the_support(
    fn: dist.Distribution, good: list[float], bad: list[float], message: str
) -> None:
    observe(fn, torch.tensor(good))
    with pytest.raises(ValueError, match=message):
        observe(fn, torch.tensor(bad))


@pytest.mark.parametrize(
    ("fn", "good", "expected"),
    [
        (dist.Dirichlet(torch.ones(2)), SIMPLEX, r"in the support \w+\(\) for a Dirichlet"),
        (dist.OneHotCategorical(torch.ones(2)), ONE_HOT, "one-hot, one 1 and otherwise 0, for a OneHotCategorical"),
    ],
)
def test_refuses_vectors_outside_of_the_support(fn: dist.Distribution, good: Tensor, expected: str) -> None:
    observe(fn, good)
    with pytest.raises(ValueError, match=f"y must be {expected} likelihood; got values from"):
        observe(fn, 2 * good)


def test_masked_values_are_not_checked() -> None:
    value, seen = torch.tensor([1.0, 9.0]), torch.tensor([True, False])
    observe(dist.Bernoulli(0.5), value, seen)
    observe(dist.Bernoulli(0.5).expand([2]).mask(seen), value)
    with pytest.raises(ValueError, match="y must be 0 or 1"):
        observe(dist.Bernoulli(0.5), value, ~seen)


@pytest.mark.parametrize(
    ("fn", "shape", "message"),
    [
        (dist.Normal(torch.zeros(4), 1.0), (4, 1), r"every row of y must have shape \(\), as .* Normal .*got \(1,\)\."),
        (dist.Normal(torch.zeros(4, 3), 1.0).to_event(1), (4, 1, 3), r"every row of y must have shape \(3,\)"),
        (
            dist.Normal(torch.zeros(4, 4), 1.0),
            (4, 4),
            r"has batch shape \(4, 4\), more dimensions than its plates\. Add",
        ),
        (dist.Normal(0.0, 1.0), (4, 4), r"every row of y must have shape \(\), .*got \(4,\)"),
    ],
)
def test_shapes(fn: dist.Distribution, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        observe(fn, torch.zeros(shape))


def test_accepts_matching_shapes() -> None:
    observe(dist.Normal(torch.zeros(4, 3), 1.0).to_event(1), torch.zeros(4, 3))
    observe(dist.Normal(0.0, 1.0), torch.zeros(4))
    observe(dist.Normal(torch.zeros(3), 1.0), torch.zeros(4, 3), dim=-2)  # a batch dimension to the right of the plate

    def without_a_plate() -> None:
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.zeros(5))

    check_observations(poutine.trace(without_a_plate).get_trace())


def test_distribution_without_a_support_is_not_checked() -> None:
    class Unknown(dist.Normal):
        @property
        def support(self) -> Any:  # type: ignore[override]
            raise NotImplementedError

    observe(Unknown(0.0, 1.0), torch.tensor([float("nan")]))


def sample_without_a_plate(fn: dist.Distribution, value: Tensor) -> None:
    with pyro.validation_enabled(False):
        check_observations(poutine.trace(lambda: pyro.sample("y", fn, obs=value)).get_trace())


@pytest.mark.parametrize(
    ("fn", "shape"),
    [
        (dist.Normal(torch.zeros(4), 1.0).to_event(1), (4, 1)),
        (dist.Normal(torch.zeros(1), 1.0).to_event(1), (4,)),
        (dist.Normal(torch.zeros(4), 1.0), (4, 1)),
        (dist.Normal(torch.zeros(4), 1.0), (1,)),
    ],
)
def test_refuses_data_that_only_broadcast_without_a_plate(fn: dist.Distribution, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"site 'y' must have shape \(\d,\), as the model's Normal distribution has"):
        sample_without_a_plate(fn, torch.zeros(shape))


def test_refuses_data_that_only_broadcast_to_the_right_of_a_plate() -> None:
    with pytest.raises(ValueError, match=r"every row of y must have shape \(1,\), as .* Normal .*got \(3,\)"):
        observe(dist.Normal(0.0, 1.0), torch.zeros(4, 3), dim=-2)


def test_refuses_a_column_that_is_repeated_along_a_plate() -> None:
    def model() -> None:
        with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.zeros(4, 1))

    with pytest.raises(ValueError, match=r"every row of y must have shape \(3,\), as .* Normal .*got \(1,\)"):
        check_observations(poutine.trace(model).get_trace())


def test_a_homogeneous_chain_has_any_number_of_steps() -> None:
    eye = torch.eye(2)
    normal = dist.MultivariateNormal(torch.zeros(2), eye)
    sample_without_a_plate(dist.GaussianHMM(normal, eye, normal, eye, normal), torch.zeros(7, 2))


def test_a_user_may_switch_the_check_of_a_support_off() -> None:
    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(p, validate_args=False), obs=y)

    grey = torch.tensor([0.2, 0.9])
    posterior = svi(Program.of(model, "normal"), grey, epochs=2, progress=False)
    assert posterior.structure.unchecked == ("y",)
    assert posterior.log_likelihood(grey, draws=3).shape == (3, 2)
