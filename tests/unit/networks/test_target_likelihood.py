"""Targets of a regression: log-probabilities against scipy, gradients, checks of data and settings."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor

from deepprob.networks.likelihood import SEQUENCE_LIKELIHOODS, Likelihood
from deepprob.networks.target_likelihood import TARGET_LIKELIHOODS, TargetLikelihood

OPTIONS: dict[str, dict[str, Any]] = {
    "categorical": {"num_classes": 4},
    "ordinal": {"num_classes": 4},
    "censored_normal": {"limits": (-0.5, None)},
}
NUMBERS = {
    "noise": torch.tensor([0.5, 2.0]),
    "total_count": torch.tensor([3.0, 9.0]),
    "degrees_of_freedom": torch.tensor([3.0, 30.0]),
    "cutpoints": torch.tensor([-1.0, 0.5, 0.6]),
}
LOC, SCALE = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.1])


def likelihood(family: str) -> TargetLikelihood:
    return TargetLikelihood(family, **OPTIONS.get(family, {}))


def numbers(one: TargetLikelihood) -> dict[str, Tensor]:
    return {shared.name: NUMBERS[shared.name] for shared in one.shared}


# -- distributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in SEQUENCE_LIKELIHOODS if f != "categorical"])
def test_families_of_other_models_are_the_same(family: str) -> None:
    one, out, y = likelihood(family), torch.randn(7, 2), torch.randint(0, 2, (7, 2)).float()
    dispersion = next(iter(numbers(one).values()), None)
    same = Likelihood(family, (None,)).distribution(out, loc=LOC, scale=SCALE, dispersion=dispersion)
    found = one.distribution(out, loc=LOC, scale=SCALE, numbers=numbers(one))
    torch.testing.assert_close(found.log_prob(y), same.log_prob(y))


def test_student_t_is_that_of_scipy() -> None:
    one, out, y = likelihood("student_t"), torch.randn(7, 2), torch.randn(7, 2)
    found = one.distribution(out, loc=LOC, scale=SCALE, numbers=numbers(one))
    exact = scipy.stats.t.logpdf(y, NUMBERS["degrees_of_freedom"], LOC + SCALE * out, NUMBERS["noise"])
    torch.testing.assert_close(found.log_prob(y), torch.as_tensor(exact).sum(1).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mean, LOC + SCALE * out)


def test_heteroscedastic_normal_has_means_and_log_scales() -> None:
    one, out, y = likelihood("heteroscedastic_normal"), torch.randn(7, 4), torch.randn(7, 2)
    found = one.distribution(out, loc=LOC, scale=SCALE)
    exact = scipy.stats.norm.logpdf(y, LOC + SCALE * out[:, :2], SCALE * out[:, 2:].exp())
    torch.testing.assert_close(found.log_prob(y), torch.as_tensor(exact).sum(1).float(), rtol=1e-4, atol=1e-4)


def test_ordinal_is_a_difference_of_sigmoids() -> None:
    one, out = likelihood("ordinal"), torch.tensor([[-2.0], [0.0], [3.0]]).double()
    found = one.distribution(out, numbers=numbers(one))
    below = scipy.stats.logistic.cdf(NUMBERS["cutpoints"] - out)
    ends = torch.zeros(3, 1), torch.as_tensor(below), torch.ones(3, 1)
    torch.testing.assert_close(found.probs, torch.cat(ends, 1).diff(dim=1), rtol=1e-5, atol=1e-7)
    assert found.batch_shape == (3,) and found.event_shape == ()


@pytest.mark.parametrize("family", TARGET_LIKELIHOODS)
@pytest.mark.parametrize("size", [0.0, 80.0])
def test_gradients_are_finite_for_large_outputs(family: str, size: float) -> None:
    one = likelihood(family)
    out = (size * torch.tensor([[-1.0], [1.0]]) * torch.ones(2, one.size(1))).requires_grad_()
    shared = {n: v[:1].clone() if n != "cutpoints" else v.clone() for n, v in numbers(one).items()}
    leaves = [out, *(v.requires_grad_() for v in shared.values())]
    y = torch.tensor([1, 3]) if family in ("categorical", "ordinal") else torch.tensor([[0.0], [1.0]])
    value = one.distribution(out, numbers=shared).log_prob(y)
    assert value.shape == (2,) and value.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), leaves))


@pytest.mark.parametrize("family", TARGET_LIKELIHOODS)
def test_leading_draws_of_the_shared_numbers_broadcast(family: str) -> None:
    one = likelihood(family)
    columns = 1 if family in ("categorical", "ordinal") else 2
    shared = {n: v.expand(5, 1, -1) for n, v in numbers(one).items()}
    found = one.distribution(torch.randn(5, 7, one.size(columns)), numbers=shared)
    assert found.batch_shape == (5, 7) and found.sample().shape[:2] == (5, 7)


def test_a_function_makes_any_distribution() -> None:
    out = torch.randn(5, 7, 2)
    laplace = TargetLikelihood(lambda out, dispersion: dist.Laplace(out, dispersion))
    assert [one.name for one in laplace.shared] == ["dispersion"]
    found = laplace.distribution(out, numbers={"dispersion": torch.ones(5, 1, 2)})
    assert found.batch_shape == (5, 7) and found.event_shape == (2,)
    joint = TargetLikelihood(lambda out: dist.MultivariateNormal(out, torch.eye(2)))
    assert joint.shared == () and joint.distribution(out).event_shape == (2,)
    scalar = TargetLikelihood(lambda out: dist.Normal(out[..., 0], out[..., 1].exp()))
    assert scalar.distribution(out).event_shape == ()


# -- data -------------------------------------------------------------------------------------------------------------


def test_targets_of_a_function_keep_their_kind() -> None:
    one = TargetLikelihood(lambda out: dist.Binomial(10, logits=out))
    assert one.validate(torch.tensor([1, 2])).dtype == torch.int64
    assert one.validate(torch.tensor([1.0, 2.0]).double()).dtype == torch.get_default_dtype()
    fn = one.distribution(torch.zeros(2, 1))
    assert one.as_events(torch.tensor([1, 2]), fn).shape == (2, 1)


@pytest.mark.parametrize(
    ("family", "y", "message"),
    [
        ("censored_normal", [[0.0], [-0.6]], r"y must be between the limits \(-0\.5, None\) .*; got -0\.6 in row 1"),
        ("ordinal", [0.0, 4.0], r"labels y must be in 0\.\.3 for num_classes=4; got 4 in row 1"),
        ("student_t", [[[0.0]]], r"y must have shape \(N, outputs\) or \(N,\); got \(1, 1, 1\)"),
    ],
)
def test_values_outside_the_support_raise(family: str, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        likelihood(family).validate(torch.tensor(y))


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: TargetLikelihood("students_t"),
            ValueError,
            "unknown likelihood 'students_t'. Did you mean 'student_t",
        ),
        (
            lambda: TargetLikelihood(3),
            TypeError,
            "likelihood must be a name or a function of the network's outputs; got 3",
        ),
        (lambda: TargetLikelihood("ordinal"), ValueError, "likelihood='ordinal' needs num_classes, .*; got None"),
        (
            lambda: TargetLikelihood("student_t", num_classes=3),
            ValueError,
            "num_classes is only for likelihood='categorical' and 'ordinal'; got likelihood='student_t'",
        ),
        (lambda: TargetLikelihood("censored_normal"), ValueError, "needs limits, the values at which y is censored"),
        (
            lambda: TargetLikelihood("normal", limits=(0, 1)),
            ValueError,
            "limits is only for .*; got likelihood='normal'",
        ),
        (lambda: TargetLikelihood("censored_normal", limits=0.0), TypeError, r"limits must be a pair .*; got 0\.0"),
        (lambda: TargetLikelihood("censored_normal", limits=(1, 0)), ValueError, r"low < high; got \(1, 0\)"),
        (
            lambda: TargetLikelihood("censored_normal", limits=(None, math.inf)),
            ValueError,
            "Without limits use likelihood='normal'",
        ),
        (
            lambda: TargetLikelihood(lambda: 0),
            TypeError,
            "must be a function of the network's outputs, or of outputs and",
        ),
        (
            lambda: TargetLikelihood(dist.Normal),
            TypeError,
            "must be a function of the network's outputs, .*; got Normal",
        ),
        (
            lambda: TargetLikelihood(lambda out: out).distribution(torch.zeros(3, 1)),
            ValueError,
            r"must return a distribution .* a row for every row of outputs \(3, 1\); got Tensor",
        ),
        (
            lambda: TargetLikelihood(lambda out: dist.Normal(out.sum(), 1.0)).distribution(torch.zeros(3, 1)),
            ValueError,
            r"got batch shape \(\)",
        ),
        (
            lambda: likelihood("student_t").distribution(torch.zeros(3, 1), numbers={"noise": torch.ones(1)}),
            ValueError,
            "needs numbers with 'degrees_of_freedom'; got ",
        ),
        (
            lambda: likelihood("ordinal").check_outputs(4, 1, exactly=False),
            ValueError,
            "the network has 4 outputs, but likelihood='ordinal' needs one, whatever the number of classes",
        ),
        (
            lambda: likelihood("heteroscedastic_normal").check_outputs(2, 2, exactly=True),
            ValueError,
            "a mean and a log-scale for every column of y. Give its last layer 4 outputs",
        ),
    ],
)
def test_wrong_settings_raise(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
