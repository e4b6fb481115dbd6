"""Plates over another dimension than the last: series in columns, rows to the left, images, panels."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import Tensor
from torch.distributions import constraints

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise


@kind("plates over another dimension")
def sensors_in_columns(sizes: Sizes) -> UserProgram:
    """Readings by hour in rows and by sensor in columns; the plate is over the sensors."""
    readings = 2.0 + noise(5, sizes.rows)

    def model(readings: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 3.0))
        with pyro.plate("sensors", readings.shape[1]):
            pyro.sample("y", dist.Normal(level, 1.0).expand([5]).to_event(1), obs=readings.T)

    def answer(posterior: Posterior) -> None:
        precision = 1 / 9 + readings.numel()
        level = posterior.sample(draws=2000)["level"]
        assert float(level.mean()) == pytest.approx(float(readings.sum()) / precision, abs=0.02)
        assert float(level.std()) == pytest.approx(precision**-0.5, rel=0.15)
        count = readings.numel()
        exact = dist.MultivariateNormal(torch.zeros(count), torch.eye(count) + 9.0).log_prob(readings.flatten())
        assert float(posterior.log_evidence(readings, particles=4000)) == pytest.approx(float(exact), abs=0.1)

    return UserProgram(model, "normal", (readings,), rows=sizes.rows, answer=answer)


@kind("plates over another dimension")
def rows_to_the_left_of_features(sizes: Sizes) -> UserProgram:
    """Features lie in the last dimension without being an event: the rows' plate has ``dim=-2``."""
    y = torch.arange(sizes.groups) + 0.5 * noise(sizes.rows, sizes.groups)

    def model(y: Tensor) -> None:
        features = pyro.plate("features", y.shape[1], dim=-1)
        with features:
            loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(y), dim=-2):
            pyro.sample("y", dist.Normal(loc, scale), obs=y)

    return UserProgram(model, AutoDiagonalNormal, (y,), rows=sizes.rows)


@kind("plates over another dimension")
def pixels_of_images(sizes: Sizes) -> UserProgram:
    """Every pixel has its own probability; images are the third dimension from the right."""
    images = (noise(sizes.rows, 2, sizes.groups) > 0).float()

    def model(images: Tensor) -> None:
        height, width = pyro.plate("height", 2, dim=-2), pyro.plate("width", sizes.groups, dim=-1)
        with height, width:
            p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("images", len(images), dim=-3):
            pyro.sample("y", dist.Bernoulli(p), obs=images)

    return UserProgram(model, "normal", (images,), rows=sizes.rows)


@kind("plates over another dimension")
def random_walks_side_by_side(sizes: Sizes) -> UserProgram:
    """A loop over the rows of a table whose columns are the series."""
    table = noise(sizes.groups, sizes.rows).cumsum(0)

    def model(table: Tensor) -> None:
        drift = pyro.sample("drift", dist.Normal(0.0, 0.5))
        series, state = pyro.plate("series", table.shape[1], dim=-1), torch.tensor(0.0)
        for t in range(len(table)):
            with series:
                state = pyro.sample(f"state_{t}", dist.Normal(state + drift, 1.0))
                pyro.sample(f"y_{t}", dist.Normal(state, 0.5), obs=table[t])

    observed = tuple(f"y_{t}" for t in range(sizes.groups))
    return UserProgram(model, "normal", (table,), rows=sizes.rows, observed=observed)


@kind("plates over another dimension")
def one_factor_of_items(sizes: Sizes) -> UserProgram:
    """Respondents to the left, items to the right, both in plates; the respondents are named as the rows."""
    answers = noise(sizes.rows, 1) * noise(sizes.groups, seed=1) + 0.3 * noise(sizes.rows, sizes.groups, seed=2)

    def model(answers: Tensor) -> None:
        respondents = pyro.plate("respondents", len(answers), dim=-2)
        items = pyro.plate("items", answers.shape[-1], dim=-1)
        with items:
            loading = pyro.sample("loading", dist.Normal(0.0, 1.0))
            spread = pyro.sample("spread", dist.HalfNormal(1.0))
        with respondents:
            factor = pyro.sample("factor", dist.Normal(0.0, 1.0))
        with respondents, items:
            pyro.sample("y", dist.Normal(factor * loading, spread), obs=answers)

    return UserProgram(model, "normal", (answers,), rows=sizes.rows, data_plate="respondents")


@kind("plates over another dimension")
def smooth_paths_by_hand(sizes: Sizes) -> UserProgram:
    """Latent random walks, one a column, with a mean-field guide written by hand."""
    table = noise(5, sizes.rows).cumsum(0)

    def model(table: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.5))
        with pyro.plate("columns", table.shape[1], dim=-1):
            walk = scale[..., None, None] * torch.ones(5, 5).tril()
            path = pyro.sample("path", dist.MultivariateNormal(torch.zeros(5), scale_tril=walk))
            pyro.sample("y", dist.Normal(path, 0.5).to_event(1), obs=table.transpose(0, 1))

    def guide(table: Tensor) -> None:
        loc = pyro.param("scale_loc", torch.tensor(-1.0))
        pyro.sample("scale", dist.LogNormal(loc, 0.1))
        path = pyro.param("path_loc", lambda: torch.zeros(table.shape[1], 5))
        sd = pyro.param("path_scale", lambda: torch.full((table.shape[1], 5), 0.3), constraint=constraints.positive)
        with pyro.plate("columns", table.shape[1], dim=-1):
            pyro.sample("path", dist.Normal(path, sd).to_event(1))

    return UserProgram(model, guide, (table,), rows=sizes.rows)
