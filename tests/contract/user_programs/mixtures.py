"""Mixtures and other models with discrete sites that are summed out."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta
from pyro.ops.indexing import Vindex
from torch import Tensor, nn
from torch.distributions import constraints

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise


@kind("mixtures and other enumerated sites")
def mixture_with_known_components(sizes: Sizes) -> UserProgram:
    locs = 3.0 * torch.arange(sizes.groups)
    y = locs[torch.arange(sizes.rows) ** 2 % sizes.groups] + noise(sizes.rows)

    @config_enumerate
    def model(y: Tensor | None = None) -> None:
        weights = pyro.param("weights", torch.ones(sizes.groups) / sizes.groups, constraint=constraints.simplex)
        with pyro.plate("rows", sizes.rows):
            component = pyro.sample("component", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(locs[component], 1.0), obs=y)

    def answer(posterior: Posterior) -> None:
        weights = torch.ones(sizes.groups) / sizes.groups
        density = dist.Normal(locs, 1.0).log_prob(y[:, None])
        for _ in range(500):  # expectation maximization
            share = (density + weights.log()).softmax(1)
            weights = share.mean(0)
        torch.testing.assert_close(posterior.parameters()["weights"], weights, atol=5e-3, rtol=0)
        evidence = (density + weights.log()).logsumexp(1)
        torch.testing.assert_close(posterior.log_evidence(y, particles=2), evidence, atol=1e-2, rtol=0)
        drawn = nn.functional.one_hot(posterior.sample(y, draws=2000)["component"], sizes.groups).float()
        torch.testing.assert_close(drawn.mean(0), share, atol=0.06, rtol=0)

    return UserProgram(model, lambda y=None: None, (y,), rows=sizes.rows, pyro=TraceEnum_ELBO, answer=answer)


@kind("mixtures and other enumerated sites")
def gaussian_mixture(sizes: Sizes) -> UserProgram:
    data = 4.0 * (torch.arange(sizes.rows) % sizes.groups) + noise(sizes.rows)

    @config_enumerate
    def model(data: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(sizes.groups)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("components", sizes.groups):
            locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(data)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(locs[assignment], scale), obs=data)

    return UserProgram(model, "normal", (data,), rows=sizes.rows, pyro=TraceEnum_ELBO)


@kind("mixtures and other enumerated sites")
def zero_inflated_counts(sizes: Sizes) -> UserProgram:
    x, y = noise(sizes.rows), torch.arange(sizes.rows) % 3.0

    def model(x: Tensor, y: Tensor | None = None) -> None:
        gate = pyro.sample("gate", dist.Beta(2.0, 2.0))
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 0.5))
        with pyro.plate("rows", len(x)):
            absent = pyro.sample("absent", dist.Bernoulli(gate), infer={"enumerate": "parallel"})
            rate = torch.where(absent == 1, torch.tensor(1e-6), (a + b * x).exp())
            pyro.sample("y", dist.Poisson(rate), obs=y)

    return UserProgram(model, "normal", (x, y), rows=sizes.rows, pyro=TraceEnum_ELBO)


@kind("mixtures and other enumerated sites")
def latent_classes(sizes: Sizes) -> UserProgram:
    answers = (noise(sizes.rows, 5) > 0).float()

    def model(answers: Tensor | None = None) -> None:
        prevalence = pyro.sample("prevalence", dist.Dirichlet(torch.ones(sizes.groups)))
        items = pyro.plate("items", 5, dim=-1)
        with pyro.plate("classes", sizes.groups, dim=-2), items:
            positive = pyro.sample("positive", dist.Beta(1.0, 1.0))
        with pyro.plate("people", sizes.rows, dim=-2):
            z = pyro.sample("z", dist.Categorical(prevalence), infer={"enumerate": "parallel"})
            with items:
                probability = Vindex(positive)[..., z, torch.arange(5)]
                pyro.sample("y", dist.Bernoulli(probability), obs=answers)

    return UserProgram(model, AutoDelta, (answers,), rows=sizes.rows, pyro=TraceEnum_ELBO, data_plate="people")


@kind("mixtures and other enumerated sites")
def topics(sizes: Sizes) -> UserProgram:
    words = torch.arange(5 * sizes.rows).reshape(sizes.rows, 5) ** 2 % 6

    @config_enumerate
    def model(words: Tensor | None = None) -> None:
        with pyro.plate("topics", sizes.groups):
            vocabulary = pyro.sample("vocabulary", dist.Dirichlet(torch.ones(6)))
        with pyro.plate("documents", sizes.rows, dim=-2):
            shares = pyro.sample("shares", dist.Dirichlet(torch.ones(sizes.groups)))
            with pyro.plate("words", 5, dim=-1):
                topic = pyro.sample("topic", dist.Categorical(shares))
                pyro.sample("y", dist.Categorical(vocabulary[topic]), obs=words)

    return UserProgram(model, "normal", (words,), rows=sizes.rows, pyro=TraceEnum_ELBO, data_plate="documents")


@kind("mixtures and other enumerated sites")
def classes_in_the_guide(sizes: Sizes) -> UserProgram:
    x = noise(sizes.rows, 2)
    classifier, decoder = nn.Linear(2, sizes.groups), nn.Linear(sizes.groups + 1, 2)

    def model(x: Tensor | None = None) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("rows", sizes.rows):
            k = pyro.sample("k", dist.OneHotCategorical(torch.ones(sizes.groups) / sizes.groups))
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            shape = torch.broadcast_shapes(k.shape[:-1], z.shape[:-1])
            code = torch.cat([k.expand(*shape, -1), z.expand(*shape, -1)], -1)
            pyro.sample("y", dist.Normal(decoder(code), 0.5).to_event(1), obs=x)

    @config_enumerate
    def guide(x: Tensor) -> None:
        pyro.module("classifier", classifier)
        slope = pyro.param("slope", torch.tensor([0.1, -0.1]))
        with pyro.plate("rows", len(x)):
            pyro.sample("k", dist.OneHotCategorical(logits=classifier(x)))
            pyro.sample("z", dist.Normal((x @ slope).unsqueeze(-1), 0.5).to_event(1))

    return UserProgram(model, guide, (x,), rows=sizes.rows, pyro=TraceEnum_ELBO)


@kind("mixtures and other enumerated sites")
def change_point(sizes: Sizes) -> UserProgram:
    counts = torch.cat([torch.ones(sizes.rows // 2), 4 * torch.ones(sizes.rows - sizes.rows // 2)])

    def model(counts: Tensor | None = None) -> None:
        early = pyro.sample("early", dist.Exponential(0.5))
        late = pyro.sample("late", dist.Exponential(0.5))
        tau = pyro.sample("tau", dist.Categorical(torch.ones(sizes.rows)), infer={"enumerate": "parallel"})
        day = torch.arange(sizes.rows)
        rate = torch.where(day < tau.unsqueeze(-1), early.unsqueeze(-1), late.unsqueeze(-1))
        pyro.sample("y", dist.Poisson(rate).to_event(1), obs=counts)

    return UserProgram(model, "normal", (counts,), rows=1, pyro=TraceEnum_ELBO)
