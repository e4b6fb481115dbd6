"""Priors of weights and the choice of layers: means, units, positive numbers, and errors."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from deepprob.networks.layer_choice import chosen_parameters
from deepprob.networks.weight_priors import PRIORS, check_prior, weight_priors


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


def names(net: nn.Module) -> list[str]:
    return [name for name, _ in net.named_parameters()]


def test_layers_are_chosen_by_name_pattern_type_or_place() -> None:
    net = network()
    assert chosen_parameters(net, None) == names(net)
    assert chosen_parameters(net, "3") == chosen_parameters(net, nn.Linear) == ["3.weight", "3.bias"]
    assert chosen_parameters(net, "last") == ["3.weight", "3.bias"]
    assert chosen_parameters(net, "*.bias") == ["0.bias", "1.bias", "3.bias"]
    assert chosen_parameters(net, ["3.bias", nn.Conv2d]) == ["0.weight", "0.bias", "3.bias"]
    net[3].requires_grad_(False)
    assert chosen_parameters(net, "last") == ["1.weight", "1.bias"]


def test_a_tied_weight_belongs_to_both_layers() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    assert chosen_parameters(net, "1") == ["0.weight", "1.bias"]


def test_a_layer_may_be_called_last() -> None:
    net = nn.Sequential()
    net.add_module("last", nn.Linear(2, 2))
    net.add_module("after", nn.Linear(2, 2))
    assert chosen_parameters(net, "last") == ["last.weight", "last.bias"]


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (
            "fc3",
            ValueError,
            r"layers names 'fc3', which has no trainable parameter in net\. Choose from its layers: 0, 1",
        ),
        (nn.LSTM, ValueError, "layers names LSTM, which has no trainable"),
        ([], ValueError, "layers is empty, so nothing is random"),
        (3, TypeError, "layers must be a name, a type of layer or a list of them; got 3"),
        ([3], TypeError, "layers must name layers by strings or types of torch.nn; got 3"),
    ],
)
def test_wrong_layers_raise(layers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        chosen_parameters(network(), layers)


@pytest.mark.parametrize("kind", PRIORS)
def test_units_follow_kind_and_fan_in(kind: str) -> None:
    net = network()
    fan, scale = 2 * 9, 0.5
    prior = weight_priors(net, names(net), kind, scale)
    weight, bias, gain = (net.get_parameter(name) for name in ("0.weight", "0.bias", "1.weight"))
    values = {"scale": torch.tensor(2.0), "input_scale": torch.tensor([0.1, 10.0])}
    loc, unit = prior["0.weight"].moments(weight, values)
    local = torch.tensor([0.1, 10.0]).reshape(1, 2, 1, 1)
    plain = 2.0 * local / math.sqrt(fan)
    expected = {
        "hierarchical": torch.tensor(2.0 / math.sqrt(fan)),
        "normal": torch.tensor(scale),
        "student_t": torch.tensor(scale / math.sqrt(fan)),
        "plain_horseshoe": plain,
        "horseshoe": (plain**-2 + scale**-2).rsqrt(),
        "pretrained": torch.tensor(scale),
    }[kind]
    torch.testing.assert_close(unit, expected.expand_as(weight))
    assert torch.equal(loc, weight.detach() if kind == "pretrained" else torch.zeros_like(weight))
    everywhere = scale if kind in ("normal", "pretrained") else 1.0
    assert (prior["0.bias"].moments(bias, {})[1] == everywhere).all()
    assert (prior["1.weight"].moments(gain, {})[0] == 1.0).all()
    assert prior["0.bias"].hypers(tuple(bias.shape)) == {}


def test_units_have_the_leading_dimensions_of_the_positive_numbers() -> None:
    net = network()
    prior = weight_priors(net, names(net), "horseshoe", 1.0)["3.weight"]
    assert prior.hypers((3, 16)) == {"scale": (), "input_scale": (16,)}
    values = {"scale": torch.rand(5, 1), "input_scale": torch.rand(5, 1, 16)}
    loc, unit = prior.moments(net[3].weight, values)
    assert loc.shape == (3, 16) and unit.shape == (5, 1, 3, 16)
    assert prior.distribution(loc, unit).batch_shape == (5, 1, 3, 16)


def test_the_prior_of_a_student_t_has_heavy_tails() -> None:
    net = nn.Linear(4, 1)
    prior = weight_priors(net, names(net), "student_t", 1.0)["weight"]
    fn = prior.distribution(*prior.moments(net.weight, {}))
    torch.testing.assert_close(
        fn.log_prob(torch.tensor(2.0)), dist.StudentT(3.0, 0.0, 0.5).log_prob(torch.tensor(2.0)).expand(1, 4)
    )


def test_a_horseshoe_shrinks_most_inputs_and_few_not_at_all() -> None:
    torch.manual_seed(0)
    net = nn.Linear(50, 1)
    drawn = {}
    for kind in ("hierarchical", "plain_horseshoe"):
        prior = weight_priors(net, names(net), kind, 1.0)["weight"]
        size = {suffix: torch.zeros(4000, 1, *shape) for suffix, shape in prior.hypers((1, 50)).items()}
        values = {suffix: prior.hyper_prior(suffix, like).sample() for suffix, like in size.items()}
        drawn[kind] = prior.distribution(*prior.moments(net.weight, values)).sample().abs() * math.sqrt(50)
    small, large = (
        {k: float(test(v).float().mean()) for k, v in drawn.items()} for test in (lambda v: v < 0.05, lambda v: v > 20)
    )
    assert small["plain_horseshoe"] > 2 * small["hierarchical"] and large["plain_horseshoe"] > 5 * large["hierarchical"]


def test_a_mapping_gives_each_layer_its_prior() -> None:
    net = network()
    chosen = check_prior({"*.bias": ("normal", 0.1), "last": "student_t", nn.Conv2d: "horseshoe"}, 2.0)
    found = weight_priors(net, names(net), chosen, 2.0)
    kinds = {name: (prior.kind, prior.scale) for name, prior in found.items()}
    assert kinds == {
        "0.weight": ("horseshoe", 2.0),
        "0.bias": ("normal", 0.1),
        "1.weight": ("hierarchical", 2.0),
        "1.bias": ("normal", 0.1),
        "3.weight": ("student_t", 2.0),
        "3.bias": ("normal", 0.1),
    }


@pytest.mark.parametrize(
    ("prior", "error", "message"),
    [
        ("norml", ValueError, "unknown prior 'norml'. Did you mean 'normal'"),
        ({"last": "norml"}, ValueError, "unknown prior 'norml'"),
        ({"last": ("normal", 0.0)}, ValueError, r"prior_scale must be a positive number; got 0\.0"),
        (3, TypeError, "prior must be a name, a pair of name and scale, or a mapping from layers to these; got 3"),
        ({"last": 3}, TypeError, "prior must be a name, a pair"),
        ({"fc3": "normal"}, ValueError, "prior names 'fc3', which has no trainable parameter"),
    ],
)
def test_wrong_priors_raise(prior: Any, error: type[Exception], message: str) -> None:
    net = network()
    with pytest.raises(error, match=message):
        weight_priors(net, names(net), check_prior(prior, 1.0), 1.0)
