"""Latent tables read by an index: ``a[group]``."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise


@kind("tables by index")
def varying_intercepts(sizes: Sizes) -> UserProgram:
    group = torch.arange(sizes.rows) % sizes.groups
    y = group - 1.0 + 0.5 * noise(sizes.rows)

    def model(group: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("groups", sizes.groups):
            a = pyro.sample("a", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(group)):
            pyro.sample("y", dist.Normal(a[group], 0.5), obs=y)

    def answer(posterior: Posterior) -> None:
        precision = 1 / 9 + torch.bincount(group).double() / 0.25
        mean = torch.zeros(sizes.groups).index_add(0, group, y).double() / 0.25 / precision
        new = torch.tensor([2, 0, 1, 1])
        predicted = posterior.predict(new, draws=2000)
        torch.testing.assert_close(predicted.mean.double(), mean[new], atol=0.05, rtol=0)
        torch.testing.assert_close(predicted.sd.double(), (0.25 + 1 / precision[new]).sqrt(), atol=0.0, rtol=0.1)

    return UserProgram(model, "normal", (group, y), rows=sizes.rows, answer=answer)


@kind("tables by index")
def radon(sizes: Sizes) -> UserProgram:
    county, floor = torch.arange(sizes.rows) % sizes.groups, (noise(sizes.rows) > 0).float()
    y = county - floor + 0.5 * noise(sizes.rows, seed=1)

    def model(county: Tensor, floor: Tensor, y: Tensor | None = None) -> None:
        mu_a = pyro.sample("mu_a", dist.Normal(0.0, 1.0))
        sigma_a = pyro.sample("sigma_a", dist.HalfCauchy(1.0))
        mu_b = pyro.sample("mu_b", dist.Normal(0.0, 1.0))
        sigma_b = pyro.sample("sigma_b", dist.HalfNormal(1.0))
        with pyro.plate("counties", sizes.groups):
            a = pyro.sample("a", dist.Normal(mu_a, sigma_a))
            b = pyro.sample("b", dist.Normal(mu_b, sigma_b))
        sigma = pyro.sample("sigma", dist.Exponential(1.0))
        with pyro.plate("obs", len(county)):
            pyro.sample("y", dist.Normal(a[county] + b[county] * floor, sigma), obs=y)

    return UserProgram(model, "normal", (county, floor, y), rows=sizes.rows)


@kind("tables by index")
def item_response(sizes: Sizes) -> UserProgram:
    student, item = torch.arange(sizes.rows) % 5, torch.arange(sizes.rows) % sizes.groups
    y = (noise(sizes.rows) > 0).float()

    def model(student: Tensor, item: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("students", 5):
            ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with pyro.plate("items", sizes.groups):
            difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
            discrimination = pyro.sample("discrimination", dist.LogNormal(0.0, 0.5))
        with pyro.plate("answers", len(item)):
            logits = discrimination[item] * (ability[student] - difficulty[item])
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    return UserProgram(model, "normal", (student, item, y), rows=sizes.rows)


@kind("tables by index")
def two_way_table(sizes: Sizes) -> UserProgram:
    i, j = torch.arange(sizes.rows) % sizes.groups, torch.arange(sizes.rows) % 2
    y = i + 2.0 * j + noise(sizes.rows)

    def model(i: Tensor, j: Tensor, y: Tensor | None = None) -> None:
        cell = pyro.sample("cell", dist.Normal(torch.zeros(sizes.groups, 2), 3.0).to_event(2))
        with pyro.plate("rows", len(i)):
            pyro.sample("y", dist.Normal(cell[i, j], 1.0), obs=y)

    return UserProgram(model, "normal", (i, j, y), rows=sizes.rows)


@kind("tables by index")
def embedding_of_words(sizes: Sizes) -> UserProgram:
    word = torch.arange(2 * sizes.rows).reshape(sizes.rows, 2) % sizes.groups
    y = noise(sizes.rows)

    def model(word: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("words", sizes.groups):
            vector = pyro.sample("vector", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        mean = vector.index_select(0, word.flatten()).reshape(*word.shape, 5).sum((1, 2))
        with pyro.plate("rows", len(word)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return UserProgram(model, "normal", (word, y), rows=sizes.rows)


@kind("tables by index")
def gathered_scales(sizes: Sizes) -> UserProgram:
    group, y = torch.arange(sizes.rows) % sizes.groups, noise(sizes.rows)

    def model(group: Tensor, y: Tensor | None = None) -> None:
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(sizes.groups), 0.5).to_event(1))
        with pyro.plate("rows", len(group)):
            pyro.sample("y", dist.Normal(0.0, torch.gather(scale, 0, group)), obs=y)

    return UserProgram(model, "normal", (group, y), rows=sizes.rows)
