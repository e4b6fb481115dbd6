"""The likelihood: shapes, means, dispersions, masks, and errors for invalid data."""

from __future__ import annotations

import copy
import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from deepprob.networks.conditional import Conditional
from deepprob.networks.likelihood import LIKELIHOODS, SEQUENCE_LIKELIHOODS, Likelihood

COUNTS = ("poisson", "negative_binomial")
ZERO_INFLATED = ("zero_inflated_poisson", "zero_inflated_negative_binomial")


def likelihood(family: str, shape: tuple[int | None, ...] = (2,), **options: Any) -> Likelihood:
    return Likelihood(family, shape, num_classes=3 if family == "categorical" else None, **options)


def made(one: Likelihood, out: Tensor, **options: Any) -> Any:
    dispersion = one.bounded(one.raw_dispersion(())) if one.dispersion else None
    return one.distribution(out, **{"dispersion": dispersion} | options)


# -- distributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LIKELIHOODS)
@pytest.mark.parametrize("batch", [(), (1,), (3, 2)])
@pytest.mark.parametrize("event", [(), (4,), (2, 3)])
def test_shapes(family: str, batch: tuple[int, ...], event: tuple[int, ...]) -> None:
    one = likelihood(family, event)
    assert one.size == math.prod(event) * (3 if family == "categorical" else 2 if family in ZERO_INFLATED else 1)
    found = made(one, torch.randn(*batch, one.size))
    assert found.batch_shape == batch and found.event_shape == event
    assert found.log_prob(found.sample()).shape == batch


@pytest.mark.parametrize("family", [f for f in SEQUENCE_LIKELIHOODS if f != "categorical"])
def test_open_axis_takes_the_length_of_the_output(family: str) -> None:
    one = likelihood(family, (None, 2))
    assert made(one, torch.randn(5, 7, 2)).event_shape == (7, 2)
    with pytest.raises(ValueError, match=r"event_shape \(None, 2\) leaves the size to the network\. Give every axis"):
        _ = one.size


def test_links_equal_those_of_conditional() -> None:
    out = torch.tensor([-30.0, -1.0, 0.0, 50.0]).reshape(4, 1)
    for family in ("bernoulli", "poisson"):
        ours = likelihood(family, (1,)).distribution(out).base_dist
        theirs = Conditional(nn.Identity(), family, (1,))(out).base_dist
        assert type(ours) is type(theirs) and torch.equal(ours.mean, theirs.mean)


def test_classes_are_the_last_axis_of_the_output() -> None:
    out = torch.randn(5, 6)
    found = Likelihood("categorical", (2,), num_classes=3).distribution(out).base_dist
    assert torch.equal(found.logits, dist.Categorical(logits=out.reshape(5, 2, 3)).logits)


@pytest.mark.parametrize("family", COUNTS + ZERO_INFLATED)
def test_output_of_zero_gives_the_mean_of_the_data(family: str) -> None:
    mean = torch.tensor([1e-3, 1.0, 1e5, 0.0])
    one = likelihood(family, (4,))
    found = made(one, torch.zeros(one.size), **one.around(mean)).mean
    torch.testing.assert_close(found[:3], mean[:3], rtol=3e-4, atol=0.0)
    assert found[3] == pytest.approx(
        1.0, rel=3e-4
    )  # an all-zero column starts at a mean of 1, because a mean of 0 is invalid


def test_negative_binomial_is_overdispersed_and_approaches_poisson() -> None:
    out, x = torch.linspace(-3, 3, 7), torch.arange(7.0)
    mean = likelihood("poisson", (7,)).distribution(out).mean
    found = likelihood("negative_binomial", (7,)).distribution(out, dispersion=torch.tensor(4.0))
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.variance, mean + mean.square() / 4.0)
    near = likelihood("negative_binomial", (7,)).distribution(out.double(), dispersion=torch.tensor(1e8).double())
    torch.testing.assert_close(near.log_prob(x), likelihood("poisson", (7,)).distribution(out.double()).log_prob(x))


def test_a_learned_dispersion_stays_in_bounds() -> None:
    raw = torch.tensor([-1e4, 0.0, 1e4])
    counts, real = likelihood("negative_binomial"), likelihood("normal")
    assert counts.bounded(raw).min() > 0 and counts.bounded(raw).max() == pytest.approx(1e4)
    assert (real.bounded(raw, torch.tensor(3.0)) == 3.0 * real.bounded(raw)).all() and real.bounded(raw).min() > 0
    assert float(counts.bounded(counts.raw_dispersion(()))) == pytest.approx(10.0, rel=1e-2)
    assert (
        counts.dispersion == "total_count" and real.dispersion == "noise" and likelihood("poisson").dispersion is None
    )


@pytest.mark.parametrize("family", [f for f in SEQUENCE_LIKELIHOODS if f != "categorical"])
def test_values_outside_the_mask_have_no_influence(family: str) -> None:
    one, inside = likelihood(family, (None, 2)), torch.tensor([True, True, False]).unsqueeze(-1)
    out = torch.randn(5, 3, 2, requires_grad=True)
    found, short = made(one, out, inside=inside), made(one, out[:, :2])
    x = torch.cat([short.sample(), torch.zeros(5, 1, 2)], 1)
    torch.testing.assert_close(found.log_prob(x), short.log_prob(x[:, :2]), rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.log_prob(x).sum(), out)
    assert gradient.isfinite().all() and (gradient[:, 2] == 0).all() and (gradient[:, :2] != 0).all()
    torch.testing.assert_close(found.sample((20,))[..., 2, :], torch.zeros(20, 5, 2))
    torch.testing.assert_close(found.mean[:, 2], torch.zeros(5, 2))


def test_classes_outside_the_mask_have_no_influence() -> None:
    one, inside = Likelihood("categorical", (None, 2), num_classes=3), torch.tensor([True, True, False]).unsqueeze(-1)
    out, loc = torch.randn(5, 3, 2, 3, requires_grad=True), torch.randn(2, 3)
    found, short = one.distribution(out, loc=loc, inside=inside), one.distribution(out[:, :2], loc=loc)
    x = torch.cat([short.sample(), torch.zeros(5, 1, 2, dtype=torch.int64)], 1)
    torch.testing.assert_close(found.log_prob(x), short.log_prob(x[:, :2]))
    (gradient,) = torch.autograd.grad(found.log_prob(x).sum(), out)
    assert gradient.isfinite().all() and (gradient[:, 2] == 0).all() and (gradient[:, :2] != 0).all()
    assert (found.sample((20,))[..., 2, :] == 0).all()


@pytest.mark.parametrize("family", [f for f in SEQUENCE_LIKELIHOODS if f != "categorical"])
def test_missing_values_have_no_influence_and_are_still_drawn(family: str) -> None:
    one, present = likelihood(family, (None, 2)), torch.tensor([[True, True], [False, True], [True, True]])
    out = torch.randn(5, 3, 2, requires_grad=True)
    found, full = made(one, out, present=present), made(one, out)
    x = full.sample()
    torch.testing.assert_close(found.log_prob(torch.where(present, x, 0.0)), found.log_prob(torch.where(present, x, 1)))
    (gradient,) = torch.autograd.grad(found.log_prob(x).sum(), out)
    assert (gradient[:, 1, 0] == 0).all() and (gradient[:, present] != 0).all()
    torch.testing.assert_close(found.mean, full.mean)


def test_large_outputs_do_not_overflow() -> None:
    out, x = torch.tensor([-1e4, 1e4]), torch.tensor([0.0, 1e4])
    for family in COUNTS:
        assert made(likelihood(family), out).log_prob(x).isfinite()


# -- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LIKELIHOODS)
@pytest.mark.parametrize(
    "kind", [torch.Tensor.int, torch.Tensor.bool, torch.Tensor.double, torch.Tensor.half, torch.Tensor.float]
)
def test_every_number_type_converts_to_one_dtype(family: str, kind: Any) -> None:
    x = likelihood(family).validate("x", kind(torch.tensor([[0.0, 1.0], [1.0, 1.0]])))
    assert x.tolist() == [[0, 1], [1, 1]]
    assert x.dtype == (torch.int64 if family == "categorical" else torch.get_default_dtype())


@pytest.mark.parametrize("family", LIKELIHOODS)
def test_empty_data_are_valid(family: str) -> None:
    grey = {"grey": True} if family == "bernoulli" else {}
    assert likelihood(family, **grey).validate("x", torch.zeros(0, 2)).shape == (0, 2)


@pytest.mark.parametrize(
    ("family", "value", "message"),
    [
        *((f, -1.0, "visits must be whole numbers of at least 0 .*; got -1 in row 1. Give counts") for f in COUNTS),
        *((f, 0.5, f"for likelihood='{f}'; got 0.5 in row 1. .* or choose likelihood='normal'") for f in COUNTS),
        *((f, math.nan, "got nan in row 1") for f in ("bernoulli", *COUNTS)),
        ("poisson", 2.9999998, r"got 2\.99999976\d* in row 1"),
        (
            "bernoulli",
            0.5,
            r"visits must be 0 or 1 for likelihood='bernoulli'; got 0.5 in row 1\. Write \(visits > thr",
        ),
        ("categorical", 0.5, r"visits must be whole numbers; got 0.5 in row 1\. Number the classes from 0\."),
        ("categorical", 3.0, r"visits must be in 0..2 for num_classes=3; got 3 in row 1\."),
        ("categorical", -1.0, r"visits must be in 0..2 for num_classes=3; got -1 in row 1\."),
        ("categorical", math.nan, "visits must be whole numbers; got nan in row 1"),
        ("categorical", math.inf, r"visits must be in 0..2 for num_classes=3; got inf in row 1"),
    ],
)
def test_error_names_value_and_row(family: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        likelihood(family).validate("visits", torch.tensor([[0.0, 1.0], [1.0, value], [-7.0, 1.0]]))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([0.0, 255.0], r"images must be in \[0, 1\] .*; got values from 0 to 255\. Divide by 255, or choose"),
        ([-1.0, 1.0], r"got values from -1 to 1\. Rescale with \(x - -1\) / 2, or choose likelihood='normal'\."),
        ([0.0, math.nan], r"got values from nan to nan"),
    ],
)
def test_values_that_are_not_grey_raise(x: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        likelihood("bernoulli", grey=True).validate("images", torch.tensor([x]))


def test_scalars_and_open_columns_accept_two_shapes() -> None:
    labels, columns = likelihood("categorical", ()), likelihood("poisson", (None,))
    assert labels.validate("y", torch.ones(4, 1)).shape == (4,)
    assert columns.validate("y", torch.ones(4)).shape == (4, 1) and columns.validate("y", torch.ones(4, 3)).shape == (
        4,
        3,
    )
    with pytest.raises(
        ValueError, match=r"labels must have shape \(N,\); got \(4, 3\)\. Convert one-hot rows with y.argmax"
    ):
        labels.validate("labels", torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"y must have shape \(N, outputs\) or \(N,\); got \(4, 3, 2\)\. Flatten"):
        columns.validate("y", torch.ones(4, 3, 2))


def test_prepare_redraws_grey_values_and_keeps_binary_ones() -> None:
    grey, x = likelihood("bernoulli", grey=True), torch.full((4000, 2), 0.3)
    drawn = grey.prepare(x)
    assert set(drawn.unique().tolist()) == {0.0, 1.0} and abs(float(drawn.mean()) - 0.3) < 0.03
    assert not torch.equal(drawn, grey.prepare(x)) and torch.equal(grey.prepare(drawn), drawn)
    assert likelihood("bernoulli").prepare(x) is x


def test_units_features_and_pictures() -> None:
    x = torch.tensor([[0.0, 1e6]])
    assert likelihood("poisson").units(x).tolist() == [2.0]
    torch.testing.assert_close(likelihood("poisson").features(x), torch.log(1 + x))
    assert likelihood("normal").features(x) is x
    pictures = ["binary", "classes", "curve", "counts", "counts", "curve", "curve", "curve", "counts", "counts"]
    assert [likelihood(f).picture for f in LIKELIHOODS] == pictures
    assert likelihood("poisson", (8, 8)).picture == "image" and likelihood("poisson", (None, 8)).picture == "counts"


def test_likelihoods_compare_by_value() -> None:
    one = likelihood("categorical", (2,))
    assert copy.deepcopy(one) == one != likelihood("categorical", (3,)) and "categorical" in repr(one)


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Likelihood("poison", ()), "unknown likelihood 'poison'. Did you mean 'poisson'"),
        (lambda: Likelihood("categorical", ()), "needs num_classes, a whole number of at least 2; got None. Give the"),
        (lambda: Likelihood("categorical", (), num_classes=1), "needs num_classes, .* at least 2; got 1"),
        (
            lambda: Likelihood("normal", (), num_classes=3),
            "num_classes is only for likelihood='categorical'; got .*'normal'",
        ),
        (
            lambda: Likelihood("normal", (), grey=True),
            "grey is only for likelihood='bernoulli'; got likelihood='normal'",
        ),
        (
            lambda: Likelihood("poisson", (2, 3)).distribution(torch.zeros(4, 5)),
            r"likelihood='poisson' over rows of shape \(2, 3\) needs a network with 6 outputs on its last axis; got 5",
        ),
        (lambda: Likelihood("normal", (2.5,)), r"a size in event_shape must be .* of at least 1; got 2\.5"),
        (lambda: Likelihood("normal", (-2,)), r"a size in event_shape must be .* of at least 1; got -2"),
        (
            lambda: Likelihood("negative_binomial", ()).distribution(torch.zeros(4, 1)),
            r"likelihood='negative_binomial' needs dispersion, its total_count; got None",
        ),
        (lambda: Likelihood("poisson", ()).distribution(torch.tensor(1.0)), "needs a network with 1 outputs .* got 0"),
    ],
)
def test_wrong_settings_raise(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_event_shape_must_be_a_sequence() -> None:
    with pytest.raises(TypeError, match=r"event_shape must be a tuple of sizes; got 3\. Write \(8,\) or \(\)"):
        Likelihood("normal", 3)  # type: ignore[arg-type]
