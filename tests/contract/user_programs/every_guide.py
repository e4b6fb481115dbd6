"""Every AutoGuide and every messenger of Pyro, for programs with global and local latents."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.transforms import affine_autoregressive, iterated
from pyro.infer import TraceEnum_ELBO, autoguide
from pyro.infer.autoguide import initialization
from torch import Tensor

from deepprob.posteriors.posterior import Posterior
from user_programs import Sizes, UserProgram, kind, noise

EVERY_GUIDE = kind("every AutoGuide and messenger")
TWO_LEVELS_SD = 0.5


def two_levels(y: Tensor) -> None:
    """A mean, effects of rows, and data: all normal, so that the posterior is known."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(effect, TWO_LEVELS_SD), obs=y)


def posterior_of_two_levels(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the latents of `two_levels`: the mean first, then the effects."""
    n = len(y)
    precision = torch.eye(n + 1, dtype=torch.float64) * (1 + TWO_LEVELS_SD**-2)
    precision[0, 0] = 1 / 4 + n
    precision[0, 1:] = precision[1:, 0] = -1.0
    covariance = torch.linalg.inv(precision)
    return covariance @ torch.cat([torch.zeros(1), y / TWO_LEVELS_SD**2]).double(), covariance


def exact_answer(y: Tensor, *, sd: bool = True) -> Callable[[Posterior], None]:
    """Compares the mean of the posterior, and its standard deviations if the guide can have them."""

    def answer(posterior: Posterior) -> None:
        mean, covariance = posterior_of_two_levels(y)
        draws = posterior.sample(y, draws=4000)
        found = torch.cat([draws["mean"][:, None], draws["effect"]], 1).double()
        torch.testing.assert_close(found.mean(0), mean, atol=0.08, rtol=0)
        if sd:
            torch.testing.assert_close(found.std(0), covariance.diagonal().sqrt(), atol=0, rtol=0.2)

    return answer


def table(y: Tensor, group: Tensor, groups: int) -> None:
    """Scales, group effects and a code for every row; positive, simplex and real supports."""
    spread = pyro.sample("spread", dist.LogNormal(-0.5, 0.3))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("groups", groups):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        code = pyro.sample("code", dist.Normal(effect[..., group], spread))
        pyro.sample("y", dist.Normal(share[..., 0] * code, 0.5), obs=y)


def of_two_levels(sizes: Sizes, guide: Any, **options: Any) -> UserProgram:
    return UserProgram(two_levels, guide, (1.0 + noise(sizes.rows),), rows=sizes.rows, **options)


def of_table(sizes: Sizes, make: Callable[[Callable[..., None]], Any]) -> UserProgram:
    group, y, groups = torch.arange(sizes.rows) % sizes.groups, noise(sizes.rows), sizes.groups

    def model(y: Tensor, group: Tensor) -> None:
        table(y, group, groups)

    return UserProgram(model, make(model), (y, group), rows=sizes.rows)


@EVERY_GUIDE
def auto_normal(sizes: Sizes) -> UserProgram:
    return of_table(sizes, lambda model: autoguide.AutoNormal)


@EVERY_GUIDE
def auto_multivariate_normal(sizes: Sizes) -> UserProgram:
    answer = exact_answer(1.0 + noise(sizes.rows))
    return of_two_levels(sizes, autoguide.AutoMultivariateNormal, answer=answer, steps=3000, learning_rate=0.01)


@EVERY_GUIDE
def auto_normal_made_by_the_user(sizes: Sizes) -> UserProgram:
    return of_table(
        sizes, lambda model: autoguide.AutoNormal(model, init_loc_fn=initialization.init_to_sample, init_scale=0.05)
    )


@EVERY_GUIDE
def auto_diagonal_normal(sizes: Sizes) -> UserProgram:
    return of_table(sizes, lambda model: autoguide.AutoDiagonalNormal(model, init_scale=0.2))


@EVERY_GUIDE
def auto_low_rank(sizes: Sizes) -> UserProgram:
    return of_table(sizes, lambda model: autoguide.AutoLowRankMultivariateNormal(model, rank=2))


@EVERY_GUIDE
def auto_iaf_normal(sizes: Sizes) -> UserProgram:
    return of_table(sizes, lambda model: autoguide.AutoIAFNormal(model, hidden_dim=[16], num_transforms=2))


@EVERY_GUIDE
def auto_normalizing_flow(sizes: Sizes) -> UserProgram:
    return of_two_levels(
        sizes, autoguide.AutoNormalizingFlow(two_levels, functools.partial(iterated, 2, affine_autoregressive))
    )


@EVERY_GUIDE
def auto_structured(sizes: Sizes) -> UserProgram:
    """Each site has the form that suits it, and the codes depend on the scale."""
    return of_table(
        sizes,
        lambda model: autoguide.AutoStructured(
            model,
            conditionals={"spread": "normal", "share": "delta", "effect": "mvn", "code": "normal"},
            dependencies={"code": {"spread": "linear"}},
        ),
    )


@EVERY_GUIDE
def auto_gaussian(sizes: Sizes) -> UserProgram:
    answer = exact_answer(1.0 + noise(sizes.rows))
    return of_two_levels(sizes, autoguide.AutoGaussian, answer=answer, steps=3000, learning_rate=0.01)


@EVERY_GUIDE
def auto_gaussian_of_a_table(sizes: Sizes) -> UserProgram:
    return of_table(sizes, autoguide.AutoGaussian)


@EVERY_GUIDE
def auto_delta(sizes: Sizes) -> UserProgram:
    return of_table(sizes, lambda model: autoguide.AutoDelta)


@EVERY_GUIDE
def auto_delta_of_two_levels(sizes: Sizes) -> UserProgram:
    return of_two_levels(sizes, "map", answer=exact_answer(1.0 + noise(sizes.rows), sd=False))


@EVERY_GUIDE
def auto_laplace_approximation(sizes: Sizes) -> UserProgram:
    return of_two_levels(sizes, autoguide.AutoLaplaceApproximation, answer=exact_answer(1.0 + noise(sizes.rows)))


@EVERY_GUIDE
def auto_guide_list(sizes: Sizes) -> UserProgram:
    """A joint normal for the global sites and independent ones for the rows."""

    def make(model: Callable[..., None]) -> autoguide.AutoGuideList:
        guides = autoguide.AutoGuideList(model)
        guides.append(autoguide.AutoMultivariateNormal(poutine.block(model, expose=["spread", "effect"])))
        guides.append(autoguide.AutoDelta(poutine.block(model, expose=["share"])))
        guides.append(autoguide.AutoNormal(poutine.block(model, hide=["spread", "effect", "share"])))
        return guides

    return of_table(sizes, make)


@EVERY_GUIDE
def auto_guide_list_with_a_function(sizes: Sizes) -> UserProgram:
    """An AutoGuide for one site, and a function for the other."""

    def mean(y: Tensor) -> None:
        loc = pyro.param("mean_loc", torch.tensor(0.0))
        pyro.sample("mean", dist.Normal(loc, 0.4))

    guides = autoguide.AutoGuideList(two_levels)
    guides.append(mean)
    guides.append(autoguide.AutoNormal(poutine.block(two_levels, expose=["effect"])))
    return of_two_levels(sizes, guides)


@EVERY_GUIDE
def auto_discrete_parallel(sizes: Sizes) -> UserProgram:
    """Discrete sites of all rows beside continuous ones."""
    y = torch.where(noise(sizes.rows) > 0, 2.0, -2.0) + 0.5 * noise(sizes.rows, seed=1)

    def model(y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("components", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(loc[k], 0.5), obs=y)

    guides = autoguide.AutoGuideList(model)
    guides.append(autoguide.AutoDiscreteParallel(poutine.block(model, expose=["k"])))
    guides.append(autoguide.AutoNormal(poutine.block(model, hide=["k"])))
    return UserProgram(model, guides, (y,), rows=sizes.rows, pyro=TraceEnum_ELBO)


@EVERY_GUIDE
def auto_normal_messenger(sizes: Sizes) -> UserProgram:
    return of_table(sizes, autoguide.AutoNormalMessenger)


@EVERY_GUIDE
def auto_hierarchical_normal_messenger(sizes: Sizes) -> UserProgram:
    return of_table(
        sizes, lambda model: autoguide.AutoHierarchicalNormalMessenger(model, hierarchical_sites=["effect", "code"])
    )


@EVERY_GUIDE
def auto_regressive_messenger(sizes: Sizes) -> UserProgram:
    return of_two_levels(sizes, autoguide.AutoRegressiveMessenger(two_levels, init_scale=0.3))


class Amortized(autoguide.AutoMessenger):
    """Effects of rows by a linear map of the data and the mean; other sites as in the prior."""

    def get_posterior(self, name: str, prior: Any) -> Any:
        if name == "mean":
            return dist.Normal(pyro.param("mean_loc", torch.tensor(0.0)), 0.5)
        (y,) = self.args_kwargs[0]
        weight = pyro.param("weight", torch.tensor(0.5))
        return dist.Normal((1 - weight) * prior.mean + weight * y, 0.4)


@EVERY_GUIDE
def own_messenger(sizes: Sizes) -> UserProgram:
    return of_two_levels(sizes, Amortized(two_levels))
