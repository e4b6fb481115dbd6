"""Conditional: shapes, links, extremes, and families by name, class and function."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any, cast

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from deepprob.networks.conditional import FAMILIES, Conditional
from deepprob.networks.convolutional import ConvDecoder, ConvEncoder
from deepprob.networks.dense import MLP
from deepprob.networks.recurrent import Recurrent

BATCHES = [(), (1,), (3, 2)]
VECTORS = ("dirichlet", "low_rank", "multivariate_normal", "multivariate_student_t", "one_hot_categorical")

# Densities that fall like exp(-exp(1e4)), or (geometric) that torch computes from probabilities of 0.
UNBOUNDED = {"geometric", "gumbel", "weibull"}


def options(family: str) -> dict[str, Any]:
    return {"num_classes": 4} if family == "categorical" else {}


def straight(family: Any, event_shape: tuple[int, ...], **settings: Any) -> Conditional:
    """A conditional whose context holds the raw parameters."""
    return Conditional(nn.Identity(), family, event_shape, **settings)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("family", "event_shape"),
    [
        (family, event_shape)
        for family in FAMILIES
        for event_shape in ((), (1,), (3,), (2, 3))
        if event_shape or family not in VECTORS
    ],
)
def test_shapes_are_those_of_context_and_event(
    family: str, event_shape: tuple[int, ...], batch: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    size = Conditional.size(family, event_shape, **options(family))
    conditional = Conditional(MLP(2, size), family, event_shape, **options(family))
    made = conditional(torch.zeros(*batch, 2))
    assert made.batch_shape == batch
    assert made.event_shape == event_shape
    draws = made.sample((5,))
    assert draws.shape == (5, *batch, *event_shape)
    assert made.log_prob(draws).shape == (5, *batch)
    assert made.log_prob(draws).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_do_not_mix(family: str) -> None:
    conditional = straight(family, (2, 3), **options(family))
    raw = torch.randn(4, conditional.in_size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    draws = conditional(raw).sample()
    together = conditional(raw).log_prob(draws)
    alone = torch.stack([conditional(row).log_prob(draw) for row, draw in zip(raw, draws, strict=True)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - UNBOUNDED))
def test_extreme_outputs_give_finite_densities_and_gradients(family: str) -> None:
    """Every combination of -1e4 and 1e4 for a pair of events, in float32, at values drawn near 0."""
    conditional = straight(family, (2,), **options(family))
    torch.manual_seed(0)
    values = conditional(torch.zeros(conditional.in_size)).sample((3,)).unsqueeze(1)  # (3, 1, 2)
    signs = torch.tensor(list(itertools.product([-1e4, 1e4], repeat=conditional.in_size)))  # (S, size)
    raw = signs.requires_grad_()
    log_prob = conditional(raw).log_prob(values)
    assert log_prob.isfinite().all()
    log_prob.sum().backward()
    assert raw.grad is not None
    assert raw.grad.isfinite().all()


@pytest.mark.parametrize("family", ["multivariate_normal", "low_rank"])
@pytest.mark.parametrize("dim", [3, 8])
def test_extreme_covariances_can_be_factorized(family: str, dim: int) -> None:
    conditional = straight(family, (dim,))
    generator = torch.Generator().manual_seed(0)
    raw = 1e4 * torch.randn(100, conditional.in_size, generator=generator).sign()
    raw = torch.cat([raw, torch.full_like(raw[:2], 1e4), torch.full_like(raw[:2], -1e4)])
    made = conditional(raw)
    assert made.log_prob(torch.zeros(dim)).isfinite().all()
    assert made.rsample().isfinite().all()


def test_low_rank_covariance_of_many_dimensions_can_be_factorized() -> None:
    conditional = straight("low_rank", (256,), rank=8)
    assert conditional(torch.full((conditional.in_size,), 1e4)).log_prob(torch.zeros(256)).isfinite()


def test_floor_bounds_the_scale() -> None:
    raw = torch.tensor([2.0, -1e4])
    assert straight("normal", (), floor=0.5)(raw).scale == 0.5
    assert straight("normal", ())(raw).scale == torch.tensor(1e-4)
    assert straight("normal", ())(raw).loc == 2.0


def test_output_concatenates_parameters() -> None:
    made = straight("normal", (2, 3))(torch.arange(12.0)).base_dist
    torch.testing.assert_close(made.loc, torch.arange(6.0).reshape(2, 3))
    expected = nn.functional.softplus(torch.arange(6.0, 12.0)).reshape(2, 3) + 1e-4
    torch.testing.assert_close(made.scale, expected)


def test_output_concatenates_classes() -> None:
    logits = torch.randn(5, 2, 3)  # (classes, *event)
    made = straight("categorical", (2, 3), num_classes=5)(logits.flatten()).base_dist
    torch.testing.assert_close(made.probs, logits.softmax(0).movedim(0, -1))


def test_convolutional_networks_fit_a_normal_image() -> None:
    decoder = Conditional(ConvDecoder(4, (3, 7, 5), num_params=2), "normal", (3, 7, 5))
    assert decoder(torch.zeros(6, 2, 4)).batch_shape == (6, 2)
    assert decoder(torch.zeros(4)).event_shape == (3, 7, 5)
    encoder = Conditional(ConvEncoder((7, 5), 8), "normal", (4,))
    assert encoder(torch.zeros(6, 2, 7, 5)).batch_shape == (6, 2)


def test_network_takes_several_contexts() -> None:
    conditional = Conditional(Recurrent(3, 4), "normal", (2,))
    made = conditional(torch.zeros(5, 6, 3), torch.full((5,), 6))
    assert (made.batch_shape, made.event_shape) == ((5, 6), (2,))


def test_full_covariance_equals_its_formula() -> None:
    """The triangle L = diag(s) (I + U) written out for two dimensions, and its density."""
    raw = torch.tensor([1.0, -1.0, 0.3, 0.7, -0.2])  # loc, then L's rows: s_1; u_21, s_2
    made = straight("multivariate_normal", (2,))(raw)
    s1, s2 = (nn.functional.softplus(torch.tensor(value)) + 1e-4 for value in (0.3, -0.2))
    u21 = 30 * math.tanh(0.7 / 30)
    expected = torch.stack([torch.stack([s1, torch.tensor(0.0)]), torch.stack([s2 * u21, s2])])
    torch.testing.assert_close(made.scale_tril, expected)
    theirs = dist.MultivariateNormal(raw[:2], scale_tril=expected)
    value = torch.tensor([0.5, 2.0])
    torch.testing.assert_close(made.log_prob(value), theirs.log_prob(value))


def test_low_rank_covariance_equals_its_formula() -> None:
    raw = torch.randn(6 * 4, generator=torch.Generator().manual_seed(0))
    made = straight("low_rank", (6,), rank=2)(raw)
    scale = (nn.functional.softplus(raw[18:]) + 1e-4).diag()
    w = 30 * torch.tanh(raw[6:18].reshape(2, 6) / 30).T
    torch.testing.assert_close(made.covariance_matrix, scale @ (torch.eye(6) + w @ w.T) @ scale)
    assert Conditional.size("low_rank", (6,)) == 6 * 4  # the rank is the rounded root of 6


@pytest.mark.parametrize("spelling", ["student_t", "StudentT", dist.StudentT])
def test_families_by_name_and_class(spelling: Any) -> None:
    made = straight(spelling, (2,))(torch.zeros(6)).base_dist
    assert isinstance(made, dist.StudentT)
    torch.testing.assert_close(made.df, made.scale)


def test_function_of_real_parameters_is_a_family() -> None:
    def binomial(logits: Tensor, total: int = 10) -> Any:
        return dist.Binomial(total, logits=logits)

    assert Conditional.size(binomial, (3,)) == 3
    made = straight(binomial, (3,))(torch.zeros(2, 3))
    assert (made.batch_shape, made.event_shape) == ((2,), (3,))
    torch.testing.assert_close(made.mean, torch.full((2, 3), 5.0))
    two = straight(lambda loc, log_scale: dist.Normal(loc, log_scale.exp()), ())(torch.tensor([3.0, 0.0]))
    assert (two.loc, two.scale) == (3.0, 1.0)


def test_gradients_reach_the_network() -> None:
    net = MLP(2, Conditional.size("multivariate_normal", (3,)))
    conditional = Conditional(net, "multivariate_normal", (3,))
    conditional(torch.ones(8, 2)).rsample().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in conditional.parameters())


def test_num_classes_is_inferred_from_the_network() -> None:
    conditional = Conditional(MLP(2, 10), "categorical", ())
    assert conditional(torch.zeros(3, 2)).probs.shape == (3, 10)


def test_conditional_can_be_copied_pickled_and_cast() -> None:
    conditional = Conditional(MLP(2, 5), "multivariate_normal", (2,))
    context = torch.randn(3, 2)
    for again in (copy.deepcopy(conditional), pickle.loads(pickle.dumps(conditional))):
        torch.testing.assert_close(again(context).scale_tril, conditional(context).scale_tril)
    assert conditional.double()(context.double()).rsample().dtype == torch.float64
    assert "'multivariate_normal', event_shape=(2,)" in repr(conditional)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: straight("bernouli", ()), ValueError, "unknown family 'bernouli'. Did you mean 'bernoulli'"),
        (lambda: straight("torch_distribution_mixin_", ()), ValueError, "unknown family"),
        (lambda: straight(torch.distributions.Normal, ()), TypeError, "must come from pyro.distributions; got torch"),
        (lambda: straight(3, ()), TypeError, "family must be a name, .*; got 3"),
        (
            lambda: straight("normal", cast("Any", 3)),
            TypeError,
            r"event_shape must be a tuple of sizes; got 3\. Write \(\)",
        ),
        (lambda: straight("normal", (0,)), ValueError, r"every size in event_shape must be .* of at least 1; got 0\."),
        (
            lambda: straight("normal", cast("Any", (2.0,))),
            ValueError,
            r"every size in event_shape must be .*; got 2\.0\.",
        ),
        (lambda: straight("normal", (), floor=0.0), ValueError, "floor must be positive.*; got 0.0"),
        (
            lambda: straight("normal", (), num_classes=3),
            ValueError,
            "num_classes is only for family 'categorical'; got 'normal'",
        ),
        (lambda: straight("normal", (), rank=3), ValueError, "rank is only for family 'low_rank'; got 'normal'"),
        (lambda: straight("low_rank", (3,), rank=0), ValueError, "rank must be a whole number of at least 1; got 0"),
        (lambda: straight("categorical", ()), ValueError, "'categorical' needs num_classes"),
        (lambda: straight("multivariate_normal", ()), ValueError, r"an event_shape with 1 or more axes; got \(\)"),
        (lambda: straight("low_rank", ()), ValueError, r"'low_rank' needs an event_shape with 1 or more axes"),
        (lambda: straight("relaxed_bernoulli", ()), ValueError, "its argument 'temperature' is not a real tensor"),
        (lambda: straight("ordered_logistic", ()), ValueError, "its argument 'cutpoints' is not a real tensor"),
        (lambda: straight("uniform", ()), ValueError, "the shapes of its parameters are unknown"),
        (
            lambda: Conditional("net", "normal", ()),  # type: ignore[arg-type]
            TypeError,
            "network must be a torch.nn.Module; got str",
        ),
        (
            lambda: Conditional(MLP(2, 3), "normal", (2,)),
            ValueError,
            r"'normal' over event_shape \(2,\) needs a network with 4 outputs on its last axis; got 3",
        ),
        (
            lambda: Conditional(nn.Sequential(nn.Linear(2, 3)), "normal", (2,))(torch.zeros(2)),
            ValueError,
            "needs a network with 4 outputs on its last axis; got 3",
        ),
        (lambda: straight("normal", ())(torch.tensor(1.0)), ValueError, "outputs on its last axis; got 0"),
        (
            lambda: straight(lambda loc: dist.Normal(loc.sum(-1), 1.0), (2,))(torch.zeros(4, 2)),
            ValueError,
            r"must return a pyro distribution of batch and event shape \(4, 2\); got shape \(4,\)",
        ),
        (lambda: straight(lambda loc: loc, (2,))(torch.zeros(4, 2)), ValueError, "got Tensor"),
    ],
)
def test_wrong_arguments_raise(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
