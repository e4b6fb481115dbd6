"""Masks and missing values: ``obs_mask=``, ``poutine.mask``, ``.mask()``, censoring, imputation."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor
from torch.distributions import constraints

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise


def holes(*shape: int) -> Tensor:
    """A mask with about two thirds of its entries True, the first one among them."""
    mask = noise(*shape, seed=9) > -0.4
    mask.view(-1)[0] = True
    return mask


@kind("masks and missing values")
def masked_rows(sizes: Sizes) -> UserProgram:
    """Rows whose outcome is not known count for nothing."""
    x, known = noise(sizes.rows), holes(sizes.rows)
    y = torch.where(known, 2.0 * x + 0.5 * noise(sizes.rows, seed=1), torch.zeros(()))

    def model(x: Tensor, known: Tensor, y: Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(x)), poutine.mask(mask=known):
            pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)

    def answer(posterior: Posterior) -> None:
        precision = float(1 / 9 + (x[known] ** 2).sum() / 0.25)
        slope = posterior.sample(x, known, y, draws=2000)["slope"]
        assert float(slope.mean()) == pytest.approx(float((x * y)[known].sum()) / 0.25 / precision, abs=0.02)
        assert float(slope.std()) == pytest.approx(precision**-0.5, rel=0.15)
        assert bool((posterior.log_likelihood(x, known, y, draws=3)[:, ~known] == 0).all())

    return UserProgram(model, "normal", (x, known, y), rows=sizes.rows, answer=answer)


@kind("masks and missing values")
def imputed_outcomes(sizes: Sizes) -> UserProgram:
    """``obs_mask`` makes a latent site of the outcomes that are missing."""
    known, y = holes(sizes.rows), 1.0 + noise(sizes.rows)

    def model(y: Tensor, known: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=known)

    def answer(posterior: Posterior) -> None:
        precision = 1 / 9 + int(known.sum())
        mu = posterior.sample(y, known, draws=4000)["mu"]
        assert float(mu.mean()) == pytest.approx(float(y[known].sum()) / precision, abs=0.05)
        assert float(mu.std()) == pytest.approx(precision**-0.5, rel=0.15)

    return UserProgram(
        model, AutoMultivariateNormal, (y, known), rows=sizes.rows, observed=("y_observed",), answer=answer
    )


@kind("masks and missing values")
def padded_sequences(sizes: Sizes) -> UserProgram:
    """Sequences of unequal lengths in one padded tensor, in a plate over steps inside a plate over sequences."""
    lengths = torch.arange(sizes.rows) % sizes.groups + 1
    counts = torch.poisson(torch.ones(sizes.rows, sizes.groups), generator=torch.Generator().manual_seed(0))

    def model(counts: Tensor, lengths: Tensor) -> None:
        with pyro.plate("sequences", len(counts), dim=-2):
            rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
            steps = torch.arange(counts.shape[1])
            with pyro.plate("steps", counts.shape[1], dim=-1), poutine.mask(mask=steps < lengths[:, None]):
                pyro.sample("y", dist.Poisson(rate), obs=counts)

    return UserProgram(model, "normal", (counts, lengths), rows=sizes.rows, data_plate="sequences")


@kind("masks and missing values")
def masked_loop_over_time(sizes: Sizes) -> UserProgram:
    """States that end with their sequence, in the model and in a guide by hand."""
    table = noise(sizes.rows, sizes.groups).cumsum(1)
    lengths = torch.arange(sizes.rows) % sizes.groups + 1

    def model(table: Tensor, lengths: Tensor) -> None:
        spread = pyro.sample("spread", dist.LogNormal(-1.0, 0.5))
        state: Tensor = torch.zeros(())
        with pyro.plate("rows", len(table)):
            for t in range(table.shape[1]):
                with poutine.mask(mask=t < lengths):
                    state = pyro.sample(f"state_{t}", dist.Normal(state, spread))
                    pyro.sample(f"y_{t}", dist.Normal(state, 0.5), obs=table[:, t])

    def guide(table: Tensor, lengths: Tensor) -> None:
        spread = pyro.param("spread_loc", torch.tensor(-1.0))
        pyro.sample("spread", dist.LogNormal(spread, 0.1))
        loc = pyro.param("state_loc", lambda: 0.9 * table)
        scale = pyro.param("state_scale", lambda: torch.full(table.shape, 0.3), constraint=constraints.positive)
        with pyro.plate("rows", len(table)):
            for t in range(table.shape[1]):
                with poutine.mask(mask=t < lengths):
                    pyro.sample(f"state_{t}", dist.Normal(loc[:, t], scale[:, t]))

    observed = tuple(f"y_{t}" for t in range(sizes.groups))
    return UserProgram(model, guide, (table, lengths), rows=sizes.rows, observed=observed)


@kind("masks and missing values")
def ratings_that_were_given(sizes: Sizes) -> UserProgram:
    """A table of ratings with gaps: the mask belongs to the distribution."""
    given, ratings = holes(sizes.rows, sizes.groups), noise(sizes.rows, sizes.groups)

    def model(ratings: Tensor, given: Tensor) -> None:
        with pyro.plate("items", ratings.shape[1]):
            item = pyro.sample("item", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("users", len(ratings)):
            user = pyro.sample("user", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = user @ item.transpose(-1, -2)
            pyro.sample("y", dist.Normal(mean, 1.0).mask(given).to_event(1), obs=ratings)

    return UserProgram(model, "normal", (ratings, given), rows=sizes.rows)


@kind("masks and missing values")
def censored_lifetimes(sizes: Sizes) -> UserProgram:
    """Lifetimes that ended, and lower bounds of those that did not, each under a mask of its own."""
    time, ended = noise(sizes.rows).exp(), holes(sizes.rows)

    def model(time: Tensor, ended: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        with pyro.plate("rows", len(time)):
            with poutine.mask(mask=ended):
                pyro.sample("y", dist.Exponential(rate), obs=time)
            with poutine.mask(mask=~ended):
                alive = torch.exp(-rate * time)
                pyro.sample("alive", dist.Bernoulli(alive), obs=torch.ones_like(time))

    return UserProgram(model, "normal", (time, ended), rows=sizes.rows, observed=("y", "alive"))


@kind("masks and missing values")
def imputed_covariate(sizes: Sizes) -> UserProgram:
    """Ages that are missing are latent, with a prior that the known ones inform, and are put in their places."""
    known = holes(sizes.rows)
    known[1] = False
    age, y = noise(sizes.rows), noise(sizes.rows, seed=1)

    def model(age: Tensor, known: Tensor, y: Tensor | None = None) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(age)):
            guess = pyro.sample("guess", dist.Normal(mean, 1.0))
            full = torch.where(known, age, guess)
            with poutine.mask(mask=known):
                pyro.sample("age", dist.Normal(mean, 1.0), obs=age)
            pyro.sample("y", dist.Normal(slope * full, 1.0), obs=y)

    return UserProgram(model, "normal", (age, known, y), rows=sizes.rows, observed=("age", "y"))


@kind("masks and missing values")
def switched_off_prior(sizes: Sizes) -> UserProgram:
    """``mask(False)`` makes a flat prior; a plain False around a block leaves its likelihood out."""
    y = 3.0 + noise(sizes.rows)

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0).mask(False))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
            with poutine.mask(mask=False):
                pyro.sample("ignored", dist.Normal(loc, 0.1), obs=-y)

    return UserProgram(model, "normal", (y,), rows=sizes.rows, observed=("y", "ignored"))


@kind("masks and missing values")
def gaps_that_the_model_masks(sizes: Sizes) -> UserProgram:
    """A table with NaN for what was not measured, which the model finds and masks by itself."""
    table = torch.where(holes(sizes.rows, sizes.groups), noise(sizes.rows, sizes.groups), torch.nan)

    def model(table: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(sizes.groups), 1.0).to_event(1))
        with pyro.plate("rows", len(table)):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            mean = loc.unsqueeze(-2) + level.unsqueeze(-1)
            known = ~table.isnan()
            pyro.sample("y", dist.Normal(mean, 0.5).mask(known).to_event(1), obs=table.nan_to_num())

    return UserProgram(model, "normal", (table,), rows=sizes.rows, missing="allow")


@kind("masks and missing values")
def outcomes_that_are_not_known_yet(sizes: Sizes) -> UserProgram:
    """NaN among the outcomes, under ``poutine.mask``; the posterior is that of the known rows."""
    x, known = noise(sizes.rows), holes(sizes.rows)
    y = torch.where(known, 1.0 - x + 0.5 * noise(sizes.rows, seed=1), torch.nan)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
        seen = True if y is None else ~y.isnan()
        with pyro.plate("rows", len(x)), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(1.0 + slope * x, 0.5), obs=None if y is None else y.nan_to_num())

    def answer(posterior: Posterior) -> None:
        a, b = x[known], y[known] - 1.0
        precision = float(1 / 9 + (a**2).sum() / 0.25)
        slope = posterior.sample(x, y, draws=2000)["slope"]
        assert float(slope.mean()) == pytest.approx(float((a * b).sum()) / 0.25 / precision, abs=0.02)
        assert float(slope.std()) == pytest.approx(precision**-0.5, rel=0.15)
        predicted = posterior.predict(x, draws=2000)
        assert bool(torch.isfinite(predicted.mean).all())

    return UserProgram(model, "normal", (x, y), rows=sizes.rows, missing="allow", answer=answer)
