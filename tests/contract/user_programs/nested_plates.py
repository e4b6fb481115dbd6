"""Nested and crossed plates: pupils in schools, students by items, words in documents, axes of an image."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise


@kind("nested and crossed plates")
def pupils_in_schools(sizes: Sizes) -> UserProgram:
    """Balanced classes: pupils to the left, schools to the right."""
    marks = torch.arange(sizes.groups) - 1.0 + noise(sizes.rows, sizes.groups)

    def model(marks: Tensor) -> None:
        with pyro.plate("schools", marks.shape[1], dim=-1):
            school = pyro.sample("school", dist.Normal(0.0, 2.0))
            with pyro.plate("pupils", marks.shape[0], dim=-2):
                pyro.sample("y", dist.Normal(school, 1.0), obs=marks)

    def answer(posterior: Posterior) -> None:
        precision = 1 / 4 + len(marks)
        school = posterior.sample(draws=2000)["school"]
        torch.testing.assert_close(school.mean(0), marks.sum(0) / precision, atol=0.03, rtol=0)
        torch.testing.assert_close(school.std(0), torch.full((sizes.groups,), precision**-0.5), atol=0.0, rtol=0.15)

    return UserProgram(model, "normal", (marks,), rows=sizes.rows, data_plate="pupils", answer=answer)


@kind("nested and crossed plates")
def students_by_items(sizes: Sizes) -> UserProgram:
    """A Rasch model of a complete table; neither plate is the plate over rows, so every answer counts as one."""
    right = (noise(sizes.rows, sizes.groups) > 0).float()

    def model(right: Tensor) -> None:
        students = pyro.plate("students", right.shape[0], dim=-2)
        items = pyro.plate("items", right.shape[1], dim=-1)
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        with students:
            ability = pyro.sample("ability", dist.Normal(0.0, spread))
        with items:
            difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
        with students, items:
            pyro.sample("y", dist.Bernoulli(logits=ability - difficulty), obs=right)

    return UserProgram(model, "normal", (right,), rows=right.numel())


@kind("nested and crossed plates")
def topics_of_documents(sizes: Sizes) -> UserProgram:
    """Latent Dirichlet allocation with words in the first dimension of the table, and every word's topic summed out."""
    words = torch.arange(sizes.rows * sizes.groups).reshape(sizes.rows, sizes.groups) % 5

    @config_enumerate
    def model(words: Tensor) -> None:
        with pyro.plate("topics", 2):
            topic = pyro.sample("topic", dist.Dirichlet(torch.ones(5)))
        with pyro.plate("documents", words.shape[1], dim=-1):
            mixture = pyro.sample("mixture", dist.Dirichlet(torch.ones(2)))
            with pyro.plate("words", words.shape[0], dim=-2):
                z = pyro.sample("z", dist.Categorical(mixture))
                pyro.sample("y", dist.Categorical(Vindex(topic)[..., z, :]), obs=words)

    def guide(words: Tensor) -> None:
        topics = pyro.param("topic_counts", lambda: torch.rand(2, 5) + 0.5, constraint=constraints.positive)
        mixtures = pyro.param("mixtures", lambda: torch.rand(words.shape[1], 2) + 0.5, constraint=constraints.positive)
        with pyro.plate("topics", 2):
            pyro.sample("topic", dist.Dirichlet(topics))
        with pyro.plate("documents", words.shape[1], dim=-1):
            pyro.sample("mixture", dist.Dirichlet(mixtures))

    return UserProgram(model, guide, (words,), rows=1, pyro=TraceEnum_ELBO)


@kind("nested and crossed plates")
def districts_schools_and_classes(sizes: Sizes) -> UserProgram:
    """Three levels, each inside the one before."""
    marks = noise(sizes.rows, 2, sizes.groups)

    def model(marks: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("districts", sizes.groups, dim=-1):
            district = pyro.sample("district", dist.Normal(mean, 1.0))
            with pyro.plate("schools", 2, dim=-2):
                school = pyro.sample("school", dist.Normal(district, 0.5))
                noise_scale = pyro.sample("noise_scale", dist.Gamma(2.0, 2.0))
                with pyro.plate("classes", len(marks), dim=-3):
                    pyro.sample("y", dist.Normal(school, noise_scale), obs=marks)

    return UserProgram(model, AutoNormal, (marks,), rows=sizes.rows, data_plate="classes")


@kind("nested and crossed plates")
def axes_of_an_image(sizes: Sizes) -> UserProgram:
    """Two independent axes with effects of their own, and a part that belongs to each pixel."""
    image = noise(sizes.rows, 1) + noise(sizes.groups, seed=1) + 0.1 * noise(sizes.rows, sizes.groups, seed=2)

    def model(image: Tensor) -> None:
        x_axis = pyro.plate("x_axis", image.shape[0], dim=-2)
        y_axis = pyro.plate("y_axis", image.shape[1], dim=-1)
        with x_axis:
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with y_axis:
            y = pyro.sample("y", dist.Normal(0.0, 1.0))
        with x_axis as i, y_axis as j:
            z = pyro.sample("z", dist.Normal(x + y, 0.5))
            pyro.sample("pixel", dist.Normal(z, 0.1), obs=image[i][:, j])

    return UserProgram(model, "normal", (image,), rows=image.numel(), observed=("pixel",))


@kind("nested and crossed plates")
def groups_of_unequal_sizes(sizes: Sizes) -> UserProgram:
    """A plate in a loop: group by group, with rows of their own, and a guide by hand."""
    group, y = torch.arange(2 * sizes.rows) % sizes.groups, noise(2 * sizes.rows)
    sizes_of_groups = torch.bincount(group).tolist()

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        parts = y.split(sizes_of_groups)
        for g in pyro.plate("groups", len(parts)):
            effect = pyro.sample(f"effect_{g}", dist.Normal(mean, 1.0))
            with pyro.plate(f"rows_{g}", len(parts[g])):
                pyro.sample(f"y_{g}", dist.Normal(effect, 0.5), obs=parts[g])

    def guide(y: Tensor) -> None:
        loc, scale = pyro.param("loc", torch.tensor(0.0)), pyro.param("scale", torch.tensor(0.5))
        pyro.sample("mean", dist.Normal(loc, scale.exp()))
        effects = pyro.param("effects", torch.zeros(sizes.groups))
        for g in pyro.plate("groups", sizes.groups):
            pyro.sample(f"effect_{g}", dist.Normal(effects[g], 0.3))

    return UserProgram(model, guide, (y,), observed=tuple(f"y_{g}" for g in range(sizes.groups)))


@kind("nested and crossed plates")
def judges_and_wines(sizes: Sizes) -> UserProgram:
    """Crossed effects in a long table, with nested plates over the pairs in the prior."""
    judge, wine = torch.arange(sizes.rows) % 2, torch.arange(sizes.rows) % sizes.groups
    score = judge + wine + noise(sizes.rows)

    def model(judge: Tensor, wine: Tensor, score: Tensor | None = None) -> None:
        judges, wines = pyro.plate("judges", 2, dim=-2), pyro.plate("wines", sizes.groups, dim=-1)
        with judges:
            bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with wines:
            quality = pyro.sample("quality", dist.Normal(0.0, 2.0))
        with judges, wines:
            taste = pyro.sample("taste", dist.Normal(bias + quality, 0.5))
        with pyro.plate("scores", len(judge)):
            pyro.sample("y", dist.Normal(taste[..., judge, wine], 1.0), obs=score)

    return UserProgram(model, "normal", (judge, wine, score), rows=sizes.rows)
