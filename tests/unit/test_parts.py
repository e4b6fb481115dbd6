"""Distributions taken apart: every family comes back as it was, with the tensors that it is given."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from torch import Tensor

from deepprob.parts import parts_of, with_parts

LOC, SCALE = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.full((2, 3), 0.5)
FAMILIES = {
    "normal": dist.Normal(LOC, SCALE).to_event(1),
    "expanded": dist.Normal(LOC, SCALE).expand([4, 2, 3]),
    "masked": dist.Normal(LOC, SCALE).mask(LOC > 0),
    "uniform": dist.Uniform(LOC, LOC + SCALE, validate_args=False),
    "categorical": dist.Categorical(logits=LOC),
    "lognormal": dist.LogNormal(LOC, SCALE),
    "affine": dist.TransformedDistribution(dist.Normal(LOC, SCALE), [T.AffineTransform(LOC, SCALE)]),
    "multivariate": dist.MultivariateNormal(LOC, scale_tril=torch.eye(3)),
    "mixture": dist.MixtureSameFamily(dist.Categorical(logits=LOC), dist.Normal(LOC, SCALE)),
    "delta": dist.Delta(LOC, event_dim=1),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_distribution_comes_back_with_other_tensors(name: str) -> None:
    like = FAMILIES[name]
    parts = parts_of(like)
    assert parts
    same = with_parts(like, parts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = like.sample()
        torch.manual_seed(0)
        assert torch.equal(same.sample(), drawn)
    assert torch.equal(same.log_prob(drawn), like.log_prob(drawn))
    parts = parts_of(like)  # a family may have kept what it was asked for
    moved = with_parts(like, [1.25 * x if x.is_floating_point() else x for x in parts])
    assert all(torch.equal(a, b) for a, b in zip(parts_of(like), parts, strict=True))  # the example is left alone
    assert not torch.equal(moved.log_prob(drawn), like.log_prob(drawn))


def test_what_may_hide_tensors_is_refused() -> None:
    hiding = dist.Normal(LOC, SCALE)
    hiding.secret = object()
    with pytest.raises(TypeError, match="a object may hold tensors that are not seen"):
        parts_of(hiding)


def test_a_function_that_holds_something_is_refused() -> None:
    def keep(scale: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: scale * x

    hiding = dist.Normal(LOC, SCALE)
    hiding.kernel = keep(SCALE)
    with pytest.raises(TypeError, match="a function may hold tensors"):
        parts_of(hiding)
    hiding.kernel = torch.sin
    assert len(parts_of(hiding)) == 2


def test_networks_of_the_program_stay_and_others_are_refused() -> None:
    flow = T.affine_autoregressive(3, hidden_dims=[4])
    made = dist.TransformedDistribution(dist.Normal(LOC, SCALE).to_event(1), [flow])
    assert with_parts(made, parts_of(made, [flow]), [flow]).transforms[0] is flow
    with pytest.raises(TypeError, match="a AffineAutoregressive may hold tensors"):
        parts_of(made)


def test_too_few_tensors_are_refused() -> None:
    with pytest.raises(StopIteration):
        with_parts(FAMILIES["normal"], [LOC])
