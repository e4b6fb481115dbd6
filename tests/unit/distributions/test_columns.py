"""Columns: the log-probability of every block, missing values, marginals, and errors."""

from __future__ import annotations

import math
import re
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.distributions import Columns
from deepprob.distributions.per_draw import put_together, take_apart

NAMES = ("age", "island=a", "smoker", "island=b", "island=c", "income", "calls")


def row(batch: tuple[int, ...] = ()) -> Columns:
    torch.manual_seed(3)
    return Columns(
        [
            (dist.OneHotCategorical(logits=torch.randn(*batch, 3)), [1, 3, 4]),
            (dist.Normal(torch.randn(*batch, 1), 2.0), [0]),
            (dist.Bernoulli(logits=torch.randn(*batch, 1)), [2]),
            (dist.LogNormal(torch.randn(*batch, 1), 0.5).to_event(1), [5]),
            (dist.NegativeBinomial(3.0, logits=torch.randn(*batch, 1)), [6]),
        ],
        NAMES,
    )


def terms(fn: Columns, x: Tensor) -> dict[str, Tensor]:
    """The log-probability of every variable by its own distribution."""
    island, normal, bernoulli, log_normal, counts = fn.parts
    return {
        "island": dist.Categorical(logits=island.logits).log_prob(x[..., [1, 3, 4]].argmax(-1)),
        "age": normal.log_prob(x[..., :1])[..., 0],
        "smoker": bernoulli.log_prob(x[..., 2:3])[..., 0],
        "income": log_normal.log_prob(x[..., 5:6])[..., 0],
        "calls": counts.log_prob(x[..., 6:])[..., 0],
    }


@pytest.mark.parametrize("batch", [(), (1,), (3, 2)])
def test_the_log_probability_is_the_sum_over_blocks(batch: tuple[int, ...]) -> None:
    fn = row(batch)
    x = fn.sample()
    assert x.shape == (*batch, 7) and fn.batch_shape == batch
    torch.testing.assert_close(fn.log_prob(x), torch.stack([*terms(fn, x).values()]).sum(0))


@pytest.mark.parametrize(
    ("missing", "left"),
    [([0], "age"), ([1], "island"), ([1, 3, 4], "island"), ([2], "smoker"), ([5], "income"), ([6], "calls")],
)
def test_a_missing_value_contributes_nothing(missing: list[int], left: str) -> None:
    fn = row((4,))
    x = fn.sample()
    found = terms(fn, x)
    x[1, missing] = math.nan
    expected = torch.stack([*found.values()]).sum(0) - found[left] * torch.tensor([0.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(fn.log_prob(x), expected)
    marked = fn.with_whole_blocks(x.isnan())
    assert marked[1].sum() == (3 if left == "island" else 1) and not marked[0].any()


@pytest.mark.parametrize("part", [dist.Beta, dist.Gamma, dist.Uniform])
def test_gradients_are_finite_where_values_are_missing(part: Any) -> None:
    a, b = torch.full((2, 1), 2.0, requires_grad=True), torch.full((2, 1), 3.0, requires_grad=True)
    fn = Columns([(part(a, b), [0]), (dist.Dirichlet(torch.ones(2)), [1, 2])])
    value = torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]) if part is not dist.Uniform else torch.full((2, 3), 2.5)
    value[:, 1:] = 0.5
    value[1, 0] = math.nan
    fn.log_prob(value).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all() and a.grad[1] == 0 and a.grad[0] != 0


def test_moments_follow_the_order_of_columns() -> None:
    fn = row()
    assert fn.mean[0] == fn.parts[1].mean and fn.variance[0] == 4
    torch.testing.assert_close(fn.mean[[1, 3, 4]], fn.parts[0].probs)
    draws = fn.sample(torch.Size([20_000]))
    error = (draws.mean(0) - fn.mean).abs() / (fn.variance / 20_000).sqrt()
    assert (error < 4.5).all()  # exceeded by chance once in 150 000 comparisons


def test_variables_and_marginals() -> None:
    fn = row((2,))
    found = {v.name: (v.kind, v.places) for v in fn.variables}
    assert found == {
        "age": ("real", (0,)),
        "island": ("classes", (1, 3, 4)),
        "smoker": ("binary", (2,)),
        "income": ("real", (5,)),
        "calls": ("count", (6,)),
    }
    x = fn.sample()
    for name, (_, places) in found.items():
        marginal = fn.marginal(name)
        value = x[..., list(places)] if len(places) > 1 else x[..., places[0]]
        assert marginal.batch_shape == (2,)
        torch.testing.assert_close(marginal.log_prob(value), terms(fn, x)[name])


def test_support_allows_missing_values_and_names_the_column() -> None:
    fn = row((3,))
    x = fn.sample()
    x[1] = math.nan
    assert fn.support.check(x).tolist() == [True] * 3 and fn.outside(x) is None
    x[2, 5] = -1.0
    assert fn.support.check(x).tolist() == [True, True, False]
    name, part, values = fn.outside(x)  # type: ignore[misc]
    assert name == "income" and isinstance(part, dist.LogNormal) and values[2] == -1
    x[2, 5], x[0, 1:5] = 1.0, 0.5
    assert fn.outside(x)[0] == "smoker" or fn.outside(x)[0].startswith("island")  # type: ignore[index]


def test_it_can_be_taken_apart_and_mapped_over_draws() -> None:
    fn = row((2,))
    x = fn.sample()
    template, tensors = take_apart(fn)
    torch.testing.assert_close(put_together(template, tensors).log_prob(x), fn.log_prob(x))
    stacked = [torch.stack([t, t + 0.1]) for t in tensors]
    mapped = torch.vmap(lambda parts: put_together(template, parts).log_prob(x))(stacked)
    torch.testing.assert_close(mapped[0], fn.log_prob(x))


@pytest.mark.parametrize(
    ("blocks", "names", "error", "message"),
    [
        ([dist.Normal(0.0, 1.0)], None, TypeError, "a block must be a pair of a distribution and its columns"),
        ([], None, ValueError, "the blocks must have the columns 0 to D - 1"),
        ([(dist.Normal(0.0, 1.0), [1])], None, ValueError, "each of them once; got [1]"),
        ([(dist.Normal(0.0, 1.0), [0, 0])], None, ValueError, "each of them once; got [0, 0]"),
        ([(dist.Normal(torch.zeros(3), 1.0), [0, 1])], None, ValueError, "over 3 columns cannot have the 2 places"),
        ([(dist.Normal(torch.zeros(1, 2), 1.0).to_event(2), [0, 1])], None, ValueError, "must have one axis"),
        ([(dist.Categorical(torch.ones(3)), [0])], None, ValueError, "Write a OneHotCategorical over one column per"),
        ([(dist.Normal(0.0, 1.0), [0])], ["a", "b"], ValueError, "names must name all 1 columns; got 2"),
    ],
)
def test_wrong_blocks_are_refused(blocks: Any, names: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Columns(blocks, names)


def test_wrong_marginals_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown column 'agee'\. Did you mean 'age'"):
        row().marginal("agee")
    mixture = dist.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(2, 2)), torch.distributions.Normal(torch.zeros(2, 2), 1.0)
    )
    fn = Columns([(mixture, [0, 1])])
    with pytest.raises(ValueError, match="of column '1' cannot be taken apart by column"):
        fn.marginal("1")
