"""Arguments that are keyword-only, dicts, nested tuples, flags, numbers, None, or of unequal lengths."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise


@kind("keyword-only, dict and nested arguments")
def keyword_only_regression(sizes: Sizes) -> UserProgram:
    x = noise(sizes.rows)
    y = 1.0 - 2.0 * x + 0.5 * noise(sizes.rows, seed=1)

    def model(*, y: Tensor | None = None, x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(a + b * x, 0.5), obs=y)

    def answer(posterior: Posterior) -> None:
        design = torch.stack([torch.ones_like(x), x], 1)
        precision = torch.eye(2) / 9 + design.T @ design / 0.25
        mean = torch.linalg.solve(precision, design.T @ y / 0.25)
        draws = posterior.sample({"x": x, "y": y}, draws=2000)
        found = torch.stack([draws["a"], draws["b"]], 1)
        torch.testing.assert_close(found.mean(0), mean, atol=0.02, rtol=0)
        torch.testing.assert_close(found.T.cov(), torch.linalg.inv(precision), atol=5e-4, rtol=0.2)
        new = torch.tensor([-1.0, 0.0, 2.0])
        predicted = posterior.predict({"x": new}, draws=2000)
        torch.testing.assert_close(predicted.mean, mean[0] + mean[1] * new, atol=0.06, rtol=0)

    return UserProgram(model, AutoMultivariateNormal, kwargs={"x": x, "y": y}, rows=sizes.rows, answer=answer)


@kind("keyword-only, dict and nested arguments")
def batch_in_a_dict(sizes: Sizes) -> UserProgram:
    """One argument, a dict with features, groups and target."""
    batch = {
        "features": noise(sizes.rows, 2),
        "group": torch.arange(sizes.rows) % sizes.groups,
        "target": (noise(sizes.rows, seed=1) > 0).float(),
    }

    def model(batch: dict[str, Tensor]) -> None:
        with pyro.plate("groups", sizes.groups):
            intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        logits = intercept[batch["group"]] + batch["features"] @ slope
        with pyro.plate("rows", len(batch["features"])):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=batch.get("target"))

    return UserProgram(model, "normal", (batch,), rows=sizes.rows)


@kind("keyword-only, dict and nested arguments")
def nested_pairs(sizes: Sizes) -> UserProgram:
    """A pair of inputs, one of which is a pair again, and the targets."""
    inputs = (noise(sizes.rows), (torch.arange(sizes.rows) % 2 == 0, noise(sizes.rows, sizes.groups, seed=1)))
    y = noise(sizes.rows, seed=2)

    def model(inputs: tuple[Tensor, tuple[Tensor, Tensor]], y: Tensor | None = None) -> None:
        time, (treated, covariates) = inputs
        trend = pyro.sample("trend", dist.Normal(0.0, 1.0))
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(sizes.groups), 1.0).to_event(1))
        mean = trend * time + torch.where(treated, effect, torch.zeros(())) + covariates @ w
        with pyro.plate("rows", time.shape[0]):
            pyro.sample("y", dist.StudentT(4.0, mean, 1.0), obs=y)

    return UserProgram(model, "normal", (inputs, y), rows=sizes.rows)


@kind("keyword-only, dict and nested arguments")
def flags_numbers_and_none(sizes: Sizes) -> UserProgram:
    """Settings of the model among its arguments: a number, a text, a flag, and an offset that is left at None."""
    x, y = noise(sizes.rows), torch.arange(sizes.rows) % 5

    def model(
        x: Tensor, y: Tensor | None, width: float, family: str, centered: bool, offset: Tensor | None = None
    ) -> None:
        inputs = x - 0.5 if centered else x
        slope = pyro.sample("slope", dist.Normal(0.0, width))
        log_rate = slope * inputs + (0.0 if offset is None else offset)
        with pyro.plate("rows", len(x)):
            if family == "poisson":
                pyro.sample("y", dist.Poisson(log_rate.exp()), obs=y)
            else:
                pyro.sample("y", dist.Geometric(logits=-log_rate), obs=y)

    return UserProgram(model, "normal", (x, y, 2.0, "poisson", True, None), rows=sizes.rows)


class Panel(NamedTuple):
    """A named tuple of columns."""

    person: Tensor
    income: Tensor


@kind("keyword-only, dict and nested arguments")
def named_tuple_and_table(sizes: Sizes) -> UserProgram:
    """A named tuple with rows, and a table of another length that every row may read."""
    panel = Panel(torch.arange(sizes.rows) % 2, noise(sizes.rows))
    ages = torch.tensor([[1.0, 0.2], [-0.5, 0.1]])

    def model(panel: Panel, *, ages: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = (ages @ w)[..., panel.person]
        scale = pyro.sample("scale", dist.HalfNormal(2.0))
        with pyro.plate("rows", len(panel.person)):
            pyro.sample("y", dist.Normal(mean, scale), obs=panel.income)

    return UserProgram(model, "normal", kwargs={"panel": panel, "ages": ages}, rows=sizes.rows)


@kind("keyword-only, dict and nested arguments")
def list_of_groups(sizes: Sizes) -> UserProgram:
    """A list of tensors of unequal lengths, each with a plate of its own."""
    groups = [noise(sizes.rows + i, seed=i) for i in range(sizes.groups)]

    def model(groups: list[Tensor]) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        for i, values in enumerate(groups):
            effect = pyro.sample(f"effect_{i}", dist.Normal(mean, 1.0))
            with pyro.plate(f"rows_{i}", len(values)):
                pyro.sample(f"y_{i}", dist.Normal(effect, scale), obs=values)

    return UserProgram(model, "normal", (groups,), observed=tuple(f"y_{i}" for i in range(sizes.groups)))


@kind("keyword-only, dict and nested arguments")
def packed_sequences(sizes: Sizes) -> UserProgram:
    """Sequences of unequal lengths in one PackedSequence; each has a level of its own."""
    lengths = torch.arange(sizes.rows) % 3 + 1
    packed = pack_padded_sequence(noise(sizes.rows, 3), lengths, batch_first=True, enforce_sorted=False)

    def model(packed: PackedSequence) -> None:
        values, lengths = pad_packed_sequence(packed, batch_first=True)
        mask = torch.arange(values.shape[1]) < lengths[:, None]
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("sequences", len(lengths)):
            level = pyro.sample("level", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(level[..., None], 1.0).mask(mask).to_event(1), obs=values)

    return UserProgram(model, "normal", (packed,), rows=sizes.rows)


@kind("keyword-only, dict and nested arguments")
def partial_of_a_model(sizes: Sizes) -> UserProgram:
    """``functools.partial`` fixes the prior's settings by name, and the model takes the rest as it comes."""
    x, y = noise(sizes.rows, sizes.groups), noise(sizes.rows, seed=1)

    def general(x: Tensor, y: Tensor | None = None, *, prior: Any, robust: bool) -> None:
        with pyro.plate("features", x.shape[1]):
            w = pyro.sample("w", prior)
        mean = (x * w.unsqueeze(-2)).sum(-1)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Cauchy(mean, 1.0) if robust else dist.Normal(mean, 1.0), obs=y)

    model = functools.partial(general, prior=dist.Laplace(0.0, 1.0), robust=False)
    return UserProgram(model, "normal", (x, y), rows=sizes.rows)


@kind("keyword-only, dict and nested arguments")
def any_keywords(sizes: Sizes) -> UserProgram:
    """Covariates under names that the model does not list: each gets a coefficient of its own."""
    columns = {"age": noise(sizes.rows), "height": noise(sizes.rows, seed=1), "y": noise(sizes.rows, seed=2)}

    def model(y: Tensor | None = None, **covariates: Tensor) -> None:
        mean = pyro.sample("intercept", dist.Normal(0.0, 1.0))
        for name, values in covariates.items():
            mean = mean + pyro.sample(f"slope_{name}", dist.Normal(0.0, 1.0)) * values
        with pyro.plate("rows"):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return UserProgram(model, "normal", kwargs=columns, rows=sizes.rows)
