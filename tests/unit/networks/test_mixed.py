"""MixedLikelihood: the parameters of every column, checks of data, and missing values."""

from __future__ import annotations

import math
import re
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.networks.mixed import MixedLikelihood

KINDS = [
    ("real", "age"),
    ("categories", "island", ["Biscoe", "Dream", "Torgersen"]),
    ("binary", "smoker"),
    ("count", "visits"),
    ("real", "height"),
    ("positive", "income"),
    ("overdispersed", "calls"),
]
NAMES = ("age", "island=Biscoe", "island=Dream", "island=Torgersen", "smoker", "visits", "height", "income", "calls")


def rows(count: int = 50, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    island = torch.nn.functional.one_hot(torch.randint(3, (count,), generator=g), 3)
    columns = [
        40 + 10 * torch.randn(count, 1, generator=g),
        island,
        torch.rand(count, 1, generator=g) < 0.3,
        torch.poisson(torch.full((count, 1), 2.5), generator=g),
        1.7 + 0.1 * torch.randn(count, 1, generator=g),
        torch.exp(7 + torch.randn(count, 1, generator=g)),
        torch.poisson(torch.full((count, 1), 12.0), generator=g),
    ]
    return torch.cat([column.to(torch.get_default_dtype()) for column in columns], 1)


@pytest.fixture
def fitted() -> MixedLikelihood:
    made = MixedLikelihood(KINDS)
    made.adapt(rows())
    return made


def test_names_and_sizes() -> None:
    made = MixedLikelihood(KINDS)
    assert made.names == NAMES and made.size == 9 and made.in_size == 18
    assert MixedLikelihood(made.kinds).kinds == made.kinds
    assert MixedLikelihood([("categories", "island", 2)]).names == ("island=0", "island=1")
    assert "island: categories" in repr(made)


def test_an_output_of_zero_gives_the_means_of_the_data(fitted: MixedLikelihood) -> None:
    x, mean = rows(), fitted(torch.zeros(9)).mean
    columns = [0, 5, 6, 8]
    torch.testing.assert_close(mean[columns], x.mean(0)[columns], rtol=1e-4, atol=1e-4)
    shares = (x[:, 1:4].sum(0) + 0.5) / (50 + 1.5)
    torch.testing.assert_close(mean[1:4], shares)
    torch.testing.assert_close(mean[4], (x[:, 4].sum() + 0.5) / 51)


def test_the_log_probability_is_the_sum_of_the_families(fitted: MixedLikelihood) -> None:
    torch.manual_seed(0)
    x, out = rows(4), torch.randn(4, 9)
    loc, scale, floor = fitted.loc, fitted.scale, 1e-4
    assert fitted.raw_dispersion is not None
    noise = torch.nn.functional.softplus(fitted.raw_dispersion) + floor

    def rate(i: int) -> Tensor:
        return scale[i] * (torch.nn.functional.softplus(out[:, i]) + floor)

    total = 1 / noise[3]
    expected = (
        dist.Normal(loc[0] + scale[0] * out[:, 0], scale[0] * noise[0]).log_prob(x[:, 0])
        + dist.Categorical(logits=loc[1:4] + out[:, 1:4]).log_prob(x[:, 1:4].argmax(1))
        + dist.Bernoulli(logits=loc[4] + out[:, 4]).log_prob(x[:, 4])
        + dist.Poisson(rate(5)).log_prob(x[:, 5])
        + dist.Normal(loc[6] + scale[6] * out[:, 6], scale[6] * noise[1]).log_prob(x[:, 6])
        + dist.LogNormal(loc[7] + scale[7] * out[:, 7], scale[7] * noise[2]).log_prob(x[:, 7])
        + dist.NegativeBinomial(total, probs=rate(8) / (rate(8) + total)).log_prob(x[:, 8])
    )
    torch.testing.assert_close(fitted(out).log_prob(x), expected)


def test_gradients_reach_outputs_and_dispersions_also_at_missing_values(fitted: MixedLikelihood) -> None:
    x, out = rows(6), torch.zeros(6, 9, requires_grad=True)
    x[0, 0] = x[1, 1:4] = x[2, 7] = x[3, 8] = math.nan
    fitted(out).log_prob(fitted.validate("x", x)).sum().backward()
    assert fitted.raw_dispersion is not None and fitted.raw_dispersion.grad is not None and out.grad is not None
    assert fitted.raw_dispersion.grad.abs().min() > 0
    assert torch.equal(out.grad == 0, x.isnan())
    assert out.grad.isfinite().all()


def test_features_are_standardized_and_mark_missing_values(fitted: MixedLikelihood) -> None:
    x = rows()
    values, missing = fitted.features(x).split(9, -1)
    torch.testing.assert_close(values.mean(0), torch.zeros(9), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std(0, unbiased=False), torch.ones(9), atol=1e-5, rtol=0)
    assert not missing.any()
    x[0, 5] = math.nan
    values, missing = fitted.features(x).split(9, -1)
    assert values[0, 5] == 0 and missing[0, 5] == 1 and missing.sum() == 1
    assert fitted.units(x).tolist() == [6.0] + [7.0] * 49


def test_a_block_of_categories_is_missing_as_a_whole() -> None:
    x = rows(4)
    x[1, 2], x[2, 1:4] = math.nan, 0.0
    assert MixedLikelihood(KINDS).validate("x", x).isnan().sum(1).tolist() == [0, 3, 3, 0]


def test_statistics_leave_out_missing_values() -> None:
    made, x = MixedLikelihood([("real", "a"), ("binary", "b")]), torch.tensor([[1.0, 1.0], [3.0, 0.0], [2.0, 1.0]])
    made.adapt(torch.cat([x, torch.tensor([[math.nan, 1.0], [2.0, math.nan]])]))
    assert made.loc[0] == 2 and not made.complete
    torch.testing.assert_close(made(torch.zeros(2)).mean[1], torch.tensor(3.5 / 5))


def test_an_indicator_of_missing_values_blanks_its_column() -> None:
    made = MixedLikelihood([("real", "age"), ("categories", "c", 2), ("missing", "c"), ("missing", "age")])
    x = torch.tensor([[40.0, 1.0, 0.0, 0.0, 1.0], [30.0, 0.0, 1.0, 1.0, 0.0]])
    seen = made.validate("x", x)
    assert made.names == ("age", "c=0", "c=1", "c=missing", "age=missing")
    expected = [[True, False, False, False, False], [False, True, True, False, False]]
    assert seen.isnan().tolist() == expected
    assert torch.equal(made.validate("x", seen).isnan(), seen.isnan())


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, math.inf, "column 'age' of x must be a finite number; got inf in row 2. Write NaN"),
        (2, 1.0, "column 'island' of x must be one-hot: one 1 and otherwise 0; got ["),
        (4, 0.5, "column 'smoker' of x must be 0 or 1; got 0.5 in row 2. Write 1 for yes"),
        (5, -1.0, "column 'visits' of x must be a whole number of at least 0; got -1 in row 2. Give counts"),
        (7, 0.0, "column 'income' of x must be above 0; got 0 in row 2. Use the kind 'real'."),
        (8, 2.5, "column 'calls' of x must be a whole number of at least 0; got 2.5 in row 2"),
    ],
)
def test_a_wrong_value_is_named(column: int, value: float, message: str) -> None:
    x = rows(5)
    x[2, 1:4] = torch.tensor([1.0, 0.0, 0.0])
    x[2, column] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        MixedLikelihood(KINDS).validate("x", x)


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x must have 2 columns \(a, b\); got rows of shape \(3,\)"):
        MixedLikelihood([("real", "a"), ("real", "b")]).validate("x", torch.zeros(4, 3))
    with pytest.raises(ValueError, match="needs a network with 2 outputs on its last axis"):
        MixedLikelihood([("real", "a"), ("real", "b")])(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="column 'b' has no value, all are missing"):
        MixedLikelihood([("real", "a"), ("real", "b")]).adapt(torch.tensor([[1.0, math.nan]]))


@pytest.mark.parametrize(
    ("kinds", "error", "message"),
    [
        ("real", TypeError, "kinds must be a list of columns; got 'real'"),
        ([], TypeError, "kinds must be a list of columns"),
        (["real"], TypeError, "a column must be a tuple of its kind and its name; got 'real'"),
        ([("reel", "a")], ValueError, "unknown kind of column 'reel'. Did you mean 'real'"),
        ([("real", "a"), ("binary", "a")], ValueError, "every column must have a name of its own; got 'a' twice"),
        ([("real", "a", 2)], ValueError, "column 'a' of kind 'real' takes no more than a name"),
        ([("categories", "a")], ValueError, "categories 'a' need their number or different names, at least 2"),
        ([("categories", "a", 1)], ValueError, "at least 2; got 1"),
        ([("categories", "a", ["x", "x"])], ValueError, "different names"),
        ([("real", "age"), ("missing", "aeg")], ValueError, "unknown column of kind 'missing' 'aeg'"),
    ],
)
def test_wrong_kinds_are_refused(kinds: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        MixedLikelihood(kinds)


def test_complete_rows_are_required_where_the_fit_had_no_others(fitted: MixedLikelihood) -> None:
    x = rows()
    fitted.check_complete(x)
    x[3, 6] = math.nan
    with pytest.raises(ValueError, match=r"x has 1 missing value \(NaN\), the first in column 'height'"):
        fitted.check_complete(x)
