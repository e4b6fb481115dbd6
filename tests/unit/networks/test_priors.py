"""Learned priors of codes: densities, starts, and messages."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from deepprob.networks import Conditional, FlowPrior, MixturePrior, VampPrior, init_weights
from deepprob.networks.priors import prior_named


def test_a_mixture_has_the_density_of_its_components() -> None:
    prior = MixturePrior(2, num_components=3)
    torch.manual_seed(0)
    for parameter in prior.parameters():
        parameter.data.normal_()
    z = torch.randn(5, 4, 2)
    parts = dist.Normal(prior.loc, prior.scale).to_event(1)
    by_hand = dist.MixtureSameFamily(dist.Categorical(logits=prior.logits), parts)
    torch.testing.assert_close(prior().log_prob(z), by_hand.log_prob(z))
    torch.testing.assert_close(prior().mean, by_hand.mean)
    torch.testing.assert_close(prior().variance, by_hand.variance)


@pytest.mark.parametrize("learned", [False, True])
def test_a_vamp_prior_is_the_average_posterior_of_its_pseudo_inputs(learned: bool) -> None:
    encoder = Conditional(nn.Linear(3, 4), "normal", (2,))
    prior = VampPrior(6, learned_weights=learned)
    prior.attach((3,))
    rows = torch.randn(10, 3)
    prior.adapt(10, lambda chosen: rows[chosen])
    assert torch.cdist(prior.pseudo_inputs, rows).min(1).values.max() < 0.1
    z = torch.randn(7, 2)
    found = prior(encoder.network, encoder.distribution)
    expected = encoder(prior.pseudo_inputs).log_prob(z[:, None]).logsumexp(1) - torch.tensor(6.0).log()
    torch.testing.assert_close(found.log_prob(z), expected)
    assert found.sample(torch.Size([9])).shape == (9, 2)
    assert sum(p.numel() for p in prior.parameters()) == 18 + 6 * learned


def test_pseudo_inputs_start_once() -> None:
    prior = VampPrior(4)
    prior.attach((2,))
    prior.adapt(3, lambda chosen: torch.zeros(len(chosen), 2))
    assert len(prior.pseudo_inputs.unique(dim=0)) == 4  # more pseudo-inputs than rows
    before = prior.pseudo_inputs.clone()
    prior.adapt(3, lambda chosen: torch.ones(len(chosen), 2))
    assert torch.equal(before, prior.pseudo_inputs)
    init_weights(prior)
    prior.adapt(3, lambda chosen: torch.ones(len(chosen), 2))
    assert float(prior.pseudo_inputs.detach().mean()) > 0.9
    with pytest.raises(ValueError, match=r"belongs to rows of shape \(2,\); got rows of shape \(3,\)\. Make a new one"):
        prior.attach((3,))


def test_a_new_start_draws_the_weights_of_a_prior_anew() -> None:
    for prior in (MixturePrior(2, 3), FlowPrior(2, 2)):
        for parameter in prior.parameters():
            parameter.data.fill_(7.0)
        init_weights(prior)
        assert all(bool((p != 7.0).all()) for p in prior.parameters())


@pytest.mark.parametrize("name", ["mixture", "vamp", "flow"])
def test_a_name_takes_the_defaults_and_its_config_rebuilds_it(name: str) -> None:
    prior: Any = prior_named(name, 3)
    twin: Any = prior_named(prior.config, 3)
    assert twin.config == prior.config and type(twin) is type(prior)
    assert prior_named(prior, 3) is prior


class Without(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return dist.Normal(x, 1.0)


class Apart(nn.Module):
    def forward(self) -> Any:
        return dist.Normal(torch.zeros(3), 1.0)


class Plain(nn.Module):
    def forward(self) -> Any:
        return torch.distributions.Normal(torch.zeros(3), 1.0)


def test_messages() -> None:
    assert prior_named("standard", 3) is None
    with pytest.raises(
        ValueError, match=r"unknown prior 'vanp'\. Did you mean 'vamp'\? Choose from: flow, mixture, st"
    ):
        prior_named("vanp", 3)
    with pytest.raises(ValueError, match=r"unknown prior None\. Choose from: flow, mixture, vamp"):
        prior_named({}, 3)
    with pytest.raises(TypeError, match=r"prior must be 'standard', .* or a torch\.nn\.Module; got .*Normal"):
        prior_named(dist.Normal(0.0, 1.0), 3)
    with pytest.raises(TypeError, match=r"called without arguments, but Without failed: .*Write forward\(self\)"):
        prior_named(Without(), 3)
    with pytest.raises(TypeError, match=r"must return a distribution of pyro\.distributions; Plain returned Normal"):
        prior_named(Plain(), 3)
    with pytest.raises(
        ValueError, match=r"event shape \(3,\) .* got event shape \(\) and batch shape \(3,\)\. Numbers"
    ):
        prior_named(Apart(), 3)
    with pytest.raises(
        ValueError, match=r"event shape \(3,\) and no batch shape for latent_dim=3; got event shape \(2"
    ):
        prior_named(MixturePrior(2), 3)
