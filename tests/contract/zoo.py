"""Small Pyro programs, each with the Pyro objective that ours must equal.

Each shows one feature of Pyro. To add a program, write it in its section and add a line to `ZOO`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions import transforms as T
from pyro.infer import (
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
    infer_discrete,
)
from pyro.infer import autoguide as auto
from pyro.infer.reparam import AutoReparam, DiscreteCosineReparam, LocScaleReparam, TransformReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from scenarios import MODEL_SCENARIOS
from torch import Tensor, nn
from torch.nn.functional import one_hot

from deepprob.engine.random import RandomStream
from deepprob.fitting.objectives import ELBO, Objective
from deepprob.programs.minibatch import Batch
from deepprob.programs.program import Program

SAMPLED = ELBO(analytic_kl=False)  # averages log q - log p, as Trace_ELBO does
FOUR = ELBO(particles=4, analytic_kl=False)

trace_of_four = partial(Trace_ELBO, num_particles=4, vectorize_particles=True)


@dataclass(frozen=True)
class Example:
    """A program, its data, and two objectives that must agree.

    Attributes:
        name: The feature that the program shows.
        program: Builds the program.
        data: Draws the program's arguments.
        objective: Our objective.
        pyro: Makes Pyro's objective; with the same noise its loss is N times ours.
        batch_size: Rows of a minibatch; None for all rows.
        eager: The reason why the program cannot be traced; empty if it can.
        stays: Whether it holds tensors outside any module, which keep it on the CPU.
    """

    name: str
    program: Callable[[], Program]
    data: Callable[[], Batch]
    objective: Objective = SAMPLED
    pyro: Callable[[], Any] = Trace_ELBO
    batch_size: int | None = None
    eager: str = ""
    stays: bool = False

    def make(self) -> tuple[Program, Batch]:
        """A fresh program and its data, equal in every call."""
        with RandomStream(0).drawing():
            data = self.data()
            return self.program(), data


# -- data -----------------------------------------------------------------------------------------------------------


def table() -> Batch:
    """Rows of three numbers, and their noisy sums."""
    x = torch.randn(32, 3)
    return x, x.sum(-1) + 0.3 * torch.randn(32)


def numbers() -> Batch:
    return (1.0 + torch.randn(24),)


def positive() -> Batch:
    return (0.1 + torch.rand(24),)


def points() -> Batch:
    return (torch.randn(24, 2),)


def angles() -> Batch:
    return (3.0 * torch.rand(24) - 1.0,)


def counts() -> Batch:
    return (torch.poisson(3.0 * torch.ones(24)),)


def classes() -> Batch:
    return (torch.randint(3, (24,)),)


def bits() -> Batch:
    return ((torch.rand(24, 6) < 0.4).float(),)


def series() -> Batch:
    return (torch.randn(20).cumsum(0),)


def sequences() -> Batch:
    """Sequences with two numbers per time step."""
    return (torch.randn(16, 5, 2),)


def walks() -> Batch:
    return (torch.randn(16, 4).cumsum(1),)


def ragged() -> Batch:
    """Sequences and their lengths."""
    return torch.randn(16, 5), torch.randint(2, 6, (16,))


def incomplete() -> Batch:
    """Numbers, and a mask of the observed ones (1 or 0)."""
    return torch.randn(24), (torch.rand(24) < 0.7).float()


def schools_data() -> Batch:
    effect = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    return effect, torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def nothing() -> Batch:
    return ()


# -- automatic guides -----------------------------------------------------------------------------------------------


def no_guide(*batch: Tensor) -> None:
    """Nothing is latent: the fit is maximum likelihood."""


def regression(x: Tensor, y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * weights).sum(-1), noise), obs=y)


def eight_schools(y: Tensor, sd: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    spread = pyro.sample("spread", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        effect = pyro.sample("effect", dist.Normal(mean, spread))
        pyro.sample("y", dist.Normal(effect, sd), obs=y)


def guided(guide: Callable[..., Any], model: Callable[..., Any] = regression, **options: Any) -> Callable[[], Program]:
    """A model with one of Pyro's automatic guides."""
    return lambda: Program.of(model, guide(model, **options))


def flow_guide(model: Callable[..., Any]) -> auto.AutoGuide:
    return auto.AutoNormalizingFlow(model, partial(T.iterated, 2, T.affine_autoregressive, hidden_dims=[8]))


def structured_guide(model: Callable[..., Any]) -> auto.AutoGuide:
    return auto.AutoStructured(
        model, conditionals={"weights": "mvn", "noise": "normal"}, dependencies={"noise": {"weights": "linear"}}
    )


def guide_list(model: Callable[..., Any]) -> auto.AutoGuide:
    """A normal guide for the weights, and a point estimate of the noise."""
    guide = auto.AutoGuideList(model)
    guide.append(auto.AutoMultivariateNormal(poutine.block(model, expose=["weights"])))
    guide.append(auto.AutoDelta(poutine.block(model, expose=["noise"])))
    return guide


# -- plates and minibatches -----------------------------------------------------------------------------------------


def draws_its_own_rows(x: Tensor, y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("rows", len(x), subsample_size=16) as rows:
        pyro.sample("y", dist.Normal((x[rows] * weights).sum(-1), 0.5), obs=y[rows])


def pyros_subsample(x: Tensor, y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("rows", len(x), subsample_size=8):
        x, y = pyro.subsample(x, event_dim=1), pyro.subsample(y, event_dim=0)
        pyro.sample("y", dist.Normal((x * weights).sum(-1), 0.5), obs=y)


def effect_of_each_row(y: Tensor) -> None:
    """A latent number per row, whose guide has parameters per row."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 24):
        effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(effect, 0.5), obs=y)


def parameter_of_each_row(y: Tensor) -> None:
    pyro.sample("mean", dist.Normal(pyro.param("centre", torch.tensor(0.2)), 0.5))
    with pyro.plate("data", 24):
        loc = pyro.param("loc", torch.linspace(-1.0, 1.0, 24), event_dim=0)
        pyro.sample("effect", dist.Normal(loc, 0.3))


def factor_analysis() -> Program:
    """A code per row, with an encoder network as guide."""
    encoder, decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, raw = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return Program.of(model, guide, data_plate="data")


def groups_and_members(x: Tensor) -> None:
    """Six members in each of 24 groups."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 24, dim=-2):
        group = pyro.sample("group", dist.Normal(mean, 1.0))
        with pyro.plate("members", 6, dim=-1):
            member = pyro.sample("member", dist.Normal(group, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=member), obs=x)


def item_response(x: Tensor) -> None:
    """Two crossed plates: 24 pupils answer six questions."""
    pupils, questions = pyro.plate("pupils", 24, dim=-2), pyro.plate("questions", 6, dim=-1)
    with pupils:
        skill = pyro.sample("skill", dist.Normal(0.0, 1.0))
    with questions:
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
    with pupils, questions:
        pyro.sample("x", dist.Bernoulli(logits=skill - difficulty), obs=x)


def plate_as_a_loop() -> Program:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        for row in pyro.plate("rows", 6):
            effect = pyro.sample(f"effect_{row}", dist.Normal(mean, 1.0))
            pyro.sample(f"y_{row}", dist.Normal(effect, 1.0), obs=y[row])

    def guide(y: Tensor) -> None:
        normal_mean(y)
        for row in pyro.plate("rows", 6):
            pyro.sample(f"effect_{row}", dist.Normal(pyro.param(f"loc_{row}", torch.tensor(0.1 * row)), 0.5))

    return Program.of(model, guide)


# -- handlers -------------------------------------------------------------------------------------------------------


def scaled_likelihood(x: Tensor, y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with poutine.scale(scale=0.25), pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((x * weights).sum(-1), 0.5), obs=y)


def annealed() -> Program:
    """A prior that is scaled down, unlike its guide, so that the KL has no closed form."""

    def model(y: Tensor) -> None:
        with poutine.scale(scale=0.3):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return Program.of(model, normal_mean)


def normal_mean(*batch: Tensor) -> None:
    """The guide N(loc, sd) of a site named mean."""
    sd = pyro.param("sd", torch.tensor(0.5), constraint=constraints.positive)
    pyro.sample("mean", dist.Normal(pyro.param("loc", torch.tensor(0.3)), sd))


def masked_likelihood(y: Tensor, seen: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)), poutine.mask(mask=seen > 0):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def missing_values() -> Program:
    """Unobserved values are latent; the guide masks its draws of the observed ones."""

    def model(y: Tensor, seen: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y, obs_mask=seen > 0)

    def guide(y: Tensor, seen: Tensor) -> None:
        normal_mean(y)
        with pyro.plate("rows", len(y)), poutine.mask(mask=seen == 0):
            pyro.sample("y_unobserved", dist.Normal(pyro.param("missing", torch.tensor(0.2)), 0.9))

    return Program.of(model, guide)


def padded_walks() -> Program:
    """Random walks of unequal length in a markov loop, masked after their ends in model and guide."""

    def model(y: Tensor, lengths: Tensor) -> None:
        state = torch.zeros(())
        with pyro.plate("walks", len(y)):
            for t in pyro.markov(range(y.shape[-1])):
                with poutine.mask(mask=t < lengths):
                    state = pyro.sample(f"state_{t}", dist.Normal(state, 1.0))
                    pyro.sample(f"y_{t}", dist.Normal(state, 0.5), obs=y[:, t])

    def guide(y: Tensor, lengths: Tensor) -> None:
        trust = pyro.param("trust", torch.tensor(0.6), constraint=constraints.unit_interval)
        with pyro.plate("walks", len(y)):
            for t in pyro.markov(range(y.shape[-1])):
                with poutine.mask(mask=t < lengths):
                    pyro.sample(f"state_{t}", dist.Normal(trust * y[:, t], 0.4))

    return Program.of(model, guide)


def jittered_inputs(x: Tensor, y: Tensor) -> None:
    """Noise that augments the data, blocked from inference."""
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("rows", len(x)):
        with poutine.block():
            jitter = pyro.sample("jitter", dist.Normal(0.0, 0.1).expand([3]).to_event(1))
        pyro.sample("y", dist.Normal(((x + jitter) * weights).sum(-1), 0.5), obs=y)


def known_noise() -> Program:
    model = pyro.condition(regression, data={"noise": torch.tensor(0.5)})
    return Program.of(model, auto.AutoNormal(model))


def lifted_parameters() -> Program:
    """A maximum likelihood program whose parameters get priors."""

    def model(x: Tensor, y: Tensor) -> None:
        weights = pyro.param("weights", torch.zeros(3))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ weights, 0.5), obs=y)

    lifted = poutine.lift(model, prior={"weights": dist.Normal(0.0, 1.0).expand([3]).to_event(1)})
    return Program.of(lifted, auto.AutoNormal(lifted))


def reparameterised(model: Callable[..., Any], config: Callable[[], Any]) -> Callable[[], Program]:
    """A reparameterized model, with a normal guide for its new latent sites."""

    def program() -> Program:
        rewritten = poutine.reparam(model, config=config())
        return Program.of(rewritten, auto.AutoNormal(rewritten))

    return program


def scaled_walk(y: Tensor) -> None:
    """Latent numbers that are transforms of standard normal ones."""
    scale = pyro.sample("scale", dist.TransformedDistribution(dist.Normal(0.0, 1.0), [T.ExpTransform()]))
    with pyro.plate("rows", len(y)):
        step = dist.TransformedDistribution(dist.Normal(torch.zeros(()), 1.0), [T.AffineTransform(0.0, scale)])
        pyro.sample("y", dist.Normal(pyro.sample("step", step), 1.0), obs=y)


def smooth_path(y: Tensor) -> None:
    """A random walk with highly correlated neighbors."""
    steps = pyro.sample("steps", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
    pyro.sample("y", dist.Normal(steps.cumsum(-1), 0.5).to_event(1), obs=y)


def energy_based(y: Tensor) -> None:
    """A factor, which adds a log-density without a site's value."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.factor("wells", -((mean**2 - 1.0) ** 2))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def derived_quantity(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    sd = pyro.deterministic("sd", 1.0 + mean**2)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, sd), obs=y)


# -- families -------------------------------------------------------------------------------------------------------


def number(prior: Callable[[], Any], posterior: Callable[[Tensor, Tensor], Any]) -> Callable[[], Program]:
    """The unknown mean of rows, with a guide of two positive parameters."""

    def model(y: Tensor) -> None:
        z = pyro.sample("z", prior())
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        a = pyro.param("a", torch.tensor(1.5), constraint=constraints.positive)
        b = pyro.param("b", torch.tensor(0.8), constraint=constraints.positive)
        pyro.sample("z", posterior(a, b))

    return lambda: Program.of(model, guide)


def proportions() -> Program:
    """A latent simplex."""

    def model(y: Tensor) -> None:
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Categorical(share), obs=y)

    def guide(y: Tensor) -> None:
        concentration = pyro.param("concentration", torch.tensor([2.0, 3.0, 4.0]), constraint=constraints.positive)
        pyro.sample("share", dist.Dirichlet(concentration))

    return Program.of(model, guide)


def plane(model_prior: Callable[[], Any], posterior: Callable[[], Any]) -> Program:
    """The latent center of points in the plane."""

    def model(x: Tensor) -> None:
        centre = pyro.sample("centre", model_prior())
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(centre, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("centre", posterior())

    return Program.of(model, guide)


def standard(size: int = 2) -> Any:
    return dist.Normal(0.0, 1.0).expand([size]).to_event(1)


def correlated_posterior() -> Program:
    def posterior() -> Any:
        loc = pyro.param("loc", torch.tensor([0.2, -0.1]))
        root = pyro.param("root", torch.tensor([[0.5, 0.0], [0.2, 0.4]]), constraint=constraints.lower_cholesky)
        return dist.MultivariateNormal(loc, scale_tril=root)

    return plane(lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), posterior)


def flow_posterior() -> Program:
    flow = T.planar(2)

    def posterior() -> Any:
        pyro.module("flow", flow)
        return dist.TransformedDistribution(standard(), [flow])

    return plane(standard, posterior)


def flow_likelihood() -> Program:
    """A normalizing flow as the density of the data."""
    flow = T.affine_coupling(2, hidden_dims=[8])

    def model(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.TransformedDistribution(standard(), [flow]), obs=x)

    return Program.of(model, no_guide)


def spline_likelihood() -> Program:
    spline = T.Spline(2, count_bins=4)

    def model(x: Tensor) -> None:
        pyro.module("spline", spline)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.TransformedDistribution(standard(), [spline]), obs=x)

    return Program.of(model, no_guide)


def correlated_numbers(x: Tensor) -> None:
    """A latent correlation matrix: its unconstrained form has one dimension, its value two."""
    sd = pyro.sample("sd", dist.HalfNormal(1.0).expand([2]).to_event(1))
    root = pyro.sample("root", dist.LKJCholesky(2, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=sd.unsqueeze(-1) * root), obs=x)


def directions(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    concentration = pyro.sample("concentration", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.VonMises(mean, concentration), obs=y)


def improper_prior(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def too_many_zeros(y: Tensor) -> None:
    gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=gate), obs=y)


def mixture_likelihood(y: Tensor) -> None:
    """A mixture whose distribution sums out its components."""
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(share), dist.Normal(loc, 1.0)), obs=y)


# -- draws without a derivative -------------------------------------------------------------------------------------


def coins(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        coin = pyro.sample("coin", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(2.0 * coin, 1.0), obs=y)


def seen_coins(y: Tensor) -> None:
    slope = pyro.param("slope", torch.tensor(0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("coin", dist.Bernoulli(logits=slope * y))


def one_coin() -> Program:
    def model(y: Tensor) -> None:
        coin = pyro.sample("coin", dist.Bernoulli(0.3))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(2.0 * coin, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("coin", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.4))))

    return Program.of(model, guide)


def regimes() -> Program:
    """A discrete latent per row and a continuous global one: score-function and pathwise gradients at once."""

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("rows", len(y)):
            regime = pyro.sample("regime", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            pyro.sample("y", dist.Normal(loc[regime], 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("loc", dist.Normal(pyro.param("centres", torch.tensor([-1.0, 0.0, 1.0])), 0.5).to_event(1))
        logits = pyro.param("logits", torch.tensor([0.1, 0.0, -0.1]))
        with pyro.plate("rows", len(y)):
            pyro.sample("regime", dist.Categorical(logits=logits))

    return Program.of(model, guide)


def hidden_counts() -> Program:
    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            events = pyro.sample("events", dist.Poisson(2.0))
            pyro.sample("y", dist.Normal(events, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        rate = pyro.param("rate", torch.tensor(1.5), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            pyro.sample("events", dist.Poisson(rate))

    return Program.of(model, guide)


def straight_through() -> Program:
    """A one-hot draw with the gradient of a relaxed one."""

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            kind = pyro.sample("kind", dist.OneHotCategorical(torch.ones(3) / 3))
            pyro.sample("y", dist.Normal((kind * torch.tensor([-1.0, 0.0, 1.0])).sum(-1), 1.0), obs=y)

    def guide(y: Tensor) -> None:
        logits = pyro.param("logits", torch.tensor([0.1, 0.0, -0.1]))
        with pyro.plate("rows", len(y)):
            heat = torch.tensor(0.5)
            pyro.sample("kind", dist.RelaxedOneHotCategoricalStraightThrough(heat, logits=logits))

    return Program.of(model, guide)


# -- baselines ------------------------------------------------------------------------------------------------------


def with_baselines(
    baseline: Callable[[Tensor, Any], dict[str, Any]],
    network: Callable[[], Any] = lambda: None,
    plate: str | None = None,
) -> Callable[[], Program]:
    """Coins in a plate, whose score-function gradient has a baseline."""

    def make() -> Program:
        net = network()

        def guide(y: Tensor) -> None:
            slope = pyro.param("slope", torch.tensor(0.5))
            if net is not None:
                pyro.module("net", net)
            with pyro.plate("data", len(y)):
                pyro.sample("coin", dist.Bernoulli(logits=slope * y), infer={"baseline": baseline(y, net)})

        return Program.of(coins, guide, data_plate=plate)

    return make


def decaying_average(y: Tensor, _: Any) -> dict[str, Any]:
    return {"use_decaying_avg_baseline": True, "baseline_beta": 0.8}


def network_of_data(y: Tensor, net: Any) -> dict[str, Any]:
    return {"nn_baseline": net, "nn_baseline_input": y}


def average_and_network(y: Tensor, net: Any) -> dict[str, Any]:
    return {**decaying_average(y, net), **network_of_data(y, net)}


def learned_value(y: Tensor, _: Any) -> dict[str, Any]:
    return {"baseline_value": pyro.param("level", torch.tensor(-1.0)).expand(y.shape)}


class OneNumber(nn.Module):
    """A network from one number to one number, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, y: Tensor) -> Tensor:
        out: Tensor = self.layer(y.unsqueeze(-1)).squeeze(-1)
        return out


def chain_of_coins() -> Program:
    """Three coins, of which only some matter to each site; two have baselines, a continuous latent has none."""

    def model(y: Tensor) -> None:
        first = pyro.sample("first", dist.Bernoulli(0.3))
        second = pyro.sample("second", dist.Bernoulli(0.2 + 0.6 * first))
        third = pyro.sample("third", dist.Bernoulli(0.4))
        loc = pyro.sample("loc", dist.Normal(third, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(2.0 * second + loc, 1.0), obs=y)
        pyro.sample("extra", dist.Normal(third, 1.0), obs=y[0])

    def guide(y: Tensor) -> None:
        logits = pyro.param("logits", torch.tensor([0.1, -0.2, 0.3]))
        pyro.sample("first", dist.Bernoulli(logits=logits[0]), infer={"baseline": decaying_average(y, None)})
        pyro.sample("second", dist.Bernoulli(logits=logits[1]))
        infer = {"baseline": {"baseline_value": pyro.param("level", torch.tensor(-20.0))}}
        pyro.sample("third", dist.Bernoulli(logits=logits[2]), infer=infer)
        pyro.sample("loc", dist.Normal(pyro.param("centre", torch.tensor(0.5)), 0.3))

    return Program.of(model, guide)


# -- enumeration ----------------------------------------------------------------------------------------------------


@config_enumerate
def mixture(y: Tensor) -> None:
    """A mixture whose components are summed out in the model."""
    share = pyro.param("share", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    with pyro.plate("data", len(y)):
        component = pyro.sample("component", dist.Categorical(share))
        pyro.sample("y", dist.Normal(loc[component], 0.5), obs=y)


def one_hot_inputs(label: Tensor) -> None:
    """Classes as inputs of ``one_hot``, which reads their values."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", 24, subsample=label):
        code = pyro.sample("code", dist.Normal((one_hot(label, 3).float() * w).sum(-1), 1.0))
        pyro.sample("label", dist.Categorical(logits=code.unsqueeze(-1) * w), obs=label)


def summed_mixture() -> Program:
    return Program.of(mixture, auto.AutoNormal(poutine.block(mixture, hide=["component"])), data_plate="data")


def guessed_mixture() -> Program:
    """Pyro's guide for discrete latents, which enumerates them."""
    guide = auto.AutoGuideList(mixture)
    guide.append(auto.AutoNormal(poutine.block(mixture, expose=["loc"])))
    guide.append(auto.AutoDiscreteParallel(poutine.block(mixture, expose=["component"])))
    return Program.of(mixture, guide)


@config_enumerate
def hidden_markov_chain(y: Tensor) -> None:
    move = pyro.param("move", 0.5 * torch.eye(2) + 0.25, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    state = 0
    for t in pyro.markov(range(len(y))):
        state = pyro.sample(f"state_{t}", dist.Categorical(move[state]))
        pyro.sample(f"y_{t}", dist.Normal(loc[state], 1.0), obs=y[t])


@config_enumerate
def many_markov_chains(y: Tensor) -> None:
    """One chain per sequence, in a plate."""
    move = pyro.param("move", 0.5 * torch.eye(3) + 1 / 6, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([-1.0, 0.0, 1.0]))
    with pyro.plate("chains", len(y)):
        state = 0
        for t in pyro.markov(range(y.shape[1])):
            state = pyro.sample(f"state_{t}", dist.Categorical(move[state]))
            pyro.sample(f"y_{t}", dist.Normal(loc[state], 1.0), obs=y[:, t])


def summed_coins() -> Program:
    """The guide sums over its discrete site instead of drawing it."""
    return Program.of(coins, config_enumerate(seen_coins), data_plate="data")


def coins_one_by_one() -> Program:
    """Sequential enumeration: one run of the program per outcome of three coins."""

    def model(y: Tensor) -> None:
        heads = torch.zeros(())
        for i in pyro.plate("tosses", 3):
            heads = heads + pyro.sample(f"coin_{i}", dist.Bernoulli(0.3))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(heads, 1.0), obs=y)

    @config_enumerate(default="sequential")
    def guide(y: Tensor) -> None:
        for i in pyro.plate("tosses", 3):
            pyro.sample(f"coin_{i}", dist.Bernoulli(logits=pyro.param(f"logit_{i}", torch.tensor(0.2 * i))))

    return Program.of(model, guide)


def semi_supervised() -> Program:
    """A label that the guide sums over, beside a continuous code."""
    encoder, labeller, decoder = nn.Linear(6 + 3, 4), nn.Linear(6, 3), nn.Linear(2 + 3, 6)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            label = pyro.sample("label", dist.OneHotCategorical(torch.ones(3) / 3))
            z = pyro.sample("z", standard())
            pyro.sample("x", dist.Bernoulli(logits=decoder(torch.cat([z, label], -1))).to_event(1), obs=x)

    @config_enumerate(expand=True)
    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        pyro.module("labeller", labeller)
        with pyro.plate("data", len(x)):
            label = pyro.sample("label", dist.OneHotCategorical(logits=labeller(x)))
            both = torch.cat([x.expand(*label.shape[:-1], 6), label], -1)
            loc, raw = encoder(both).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return Program.of(model, guide, data_plate="data")


def monte_carlo_em() -> Program:
    """Components drawn from their exact posterior by infer_discrete at every step."""

    def model(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        with pyro.plate("rows", len(y)):
            component = pyro.sample("component", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("y", dist.Normal(loc[component], 0.5), obs=y)

    exact = infer_discrete(config_enumerate(model), first_available_dim=-2)

    def guide(y: Tensor) -> None:
        with poutine.block(), torch.no_grad():
            component = poutine.trace(exact).get_trace(y).nodes["component"]["value"]
        with pyro.plate("rows", len(y)):
            pyro.sample("component", dist.Delta(component))

    return Program.of(model, guide)


# -- networks and parameters ----------------------------------------------------------------------------------------


def norm_and_dropout() -> Program:
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1), 1.0), obs=y)

    return Program.of(model, no_guide)


def lazy_layer() -> Program:
    """A layer that takes its size from its first input."""
    net = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 1))

    def model(x: Tensor, y: Tensor) -> None:
        mean = net(x).squeeze(-1)
        pyro.module("net", net)  # before its first run the parameters do not exist
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return Program.of(model, no_guide)


def lazy_parameters(x: Tensor, y: Tensor) -> None:
    """Parameters with a function as initial value."""
    weights = pyro.param("weights", lambda: torch.zeros(x.shape[1]))
    noise = pyro.param("noise", lambda: torch.ones(()), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ weights, noise), obs=y)


def constrained_parameters(x: Tensor) -> None:
    sd = pyro.param("sd", torch.tensor([1.0, 2.0]), constraint=constraints.positive)
    root = pyro.param("root", torch.eye(2), constraint=constraints.corr_cholesky)
    share = pyro.param("share", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
    shift = pyro.param("shift", torch.tensor(0.5), constraint=constraints.interval(-2.0, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.MultivariateNormal(shift + share, scale_tril=sd.unsqueeze(-1) * root), obs=x)


class Trend(PyroModule):
    """A line whose slope is a positive parameter of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = PyroParam(torch.tensor(0.5), constraint=constraints.positive)
        self.offset = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(self.slope * x.sum(-1) + self.offset, 1.0), obs=y)


class RandomLayer(PyroModule):
    """A torch layer whose weights have priors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = PyroModule[nn.Linear](3, 1)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.layer(x).squeeze(-1)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def random_layer() -> Program:
    layer = RandomLayer()
    return Program.of(layer, auto.AutoNormal(layer))


class Survival(Program):
    """A `Program` class with a data plate."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = PyroParam(torch.tensor([2.0, 1.0]), constraint=constraints.positive)

    def model(self, y: Tensor) -> None:
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with self.data_plate(y):
            pyro.sample("y", dist.Weibull(scale, 1.5), obs=y)

    def guide(self, y: Tensor) -> None:
        pyro.sample("scale", dist.Gamma(self.rate[0], self.rate[1]))


# -- sequences and processes ----------------------------------------------------------------------------------------


def random_walk(y: Tensor) -> None:
    """A continuous latent state per time step."""
    drift = pyro.sample("drift", dist.Normal(0.0, 0.1))
    state = torch.zeros(())
    for t in pyro.markov(range(8)):
        state = pyro.sample(f"state_{t}", dist.Normal(state + drift, 1.0))
        pyro.sample(f"y_{t}", dist.Normal(state, 0.5), obs=y[t])


def kalman_filter(y: Tensor) -> None:
    """A linear-Gaussian chain, marginalized by its distribution."""
    noise = pyro.param("noise", torch.tensor([0.5, 0.8]), constraint=constraints.positive)
    matrix = pyro.param("matrix", torch.tensor([[0.9, 0.1], [0.0, 0.8]]))
    start = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    step = dist.MultivariateNormal(torch.zeros(2), scale_tril=noise[0] * torch.eye(2))
    look = dist.MultivariateNormal(torch.zeros(2), scale_tril=noise[1] * torch.eye(2))
    with pyro.plate("rows", len(y)):
        chain = dist.GaussianHMM(start, matrix, step, torch.eye(2), look, duration=5)
        pyro.sample("y", chain, obs=y)


def forward_algorithm(y: Tensor) -> None:
    """A discrete chain, marginalized by its distribution."""
    start = pyro.param("start", torch.tensor([0.1, -0.1]))
    move = pyro.param("move", torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    loc = pyro.param("loc", torch.tensor([[-1.0, 0.0], [1.0, 0.5]]))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.DiscreteHMM(start, move, dist.Normal(loc, 1.0).to_event(1), duration=5), obs=y)


def sparse_gaussian_process() -> Program:
    """A module that holds its data and takes no arguments."""
    x = torch.linspace(-2.0, 2.0, 24)
    kernel, likelihood = gp.kernels.RBF(1), gp.likelihoods.Gaussian()
    process = gp.models.VariationalSparseGP(x, x.sin(), kernel, x[::4].clone(), likelihood, whiten=True)
    return Program.of(process.model, process.guide)


def length_scale_with_prior() -> Program:
    """A Gaussian process, marginalized by the likelihood, with a latent length scale."""

    def model(x: Tensor, y: Tensor) -> None:
        length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
        distance = (x.unsqueeze(0) - x.unsqueeze(1)).square().sum(-1)
        cover = (-0.5 * distance / length**2).exp() + 0.1 * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), cover), obs=y)

    return Program.of(model, auto.AutoNormal(model))


# -- untraceable programs -------------------------------------------------------------------------------------------


def branch_on_a_draw(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    if mean > 0:
        mean = 2 * mean
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def draw_as_a_number(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    width = 1.0 + abs(mean.item())
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, width), obs=y)


def wind(y: Tensor) -> None:
    """A latent direction."""
    direction = pyro.sample("direction", dist.VonMises(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.VonMises(direction, 3.0), obs=y)


def turning_guide() -> Program:
    """A guide with rejection sampling."""

    def guide(y: Tensor) -> None:
        concentration = pyro.param("concentration", torch.tensor(3.0), constraint=constraints.positive)
        pyro.sample("direction", dist.VonMises(pyro.param("loc", torch.tensor(0.2)), concentration))

    return Program.of(wind, guide)


def summed(
    name: str, program: Callable[[], Program], data: Callable[[], Batch], batch_size: int | None = None
) -> Example:
    """A program with sites that are summed out."""
    return Example(name, program, data, pyro=TraceEnum_ELBO, batch_size=batch_size)


def with_graph(name: str, program: Callable[[], Program], batch_size: int | None = None) -> Example:
    """A program with baselines, which only one of Pyro's objectives reads."""
    return Example(name, program, numbers, SAMPLED, TraceGraph_ELBO, batch_size)


SUMMED_OUT = ("mixture_vae", "semi_supervised_vae")  # models of the package with marked sites

ZOO: list[Example] = [
    Example("AutoNormal", guided(auto.AutoNormal), table),
    Example("AutoDiagonalNormal", guided(auto.AutoDiagonalNormal), table),
    Example("AutoMultivariateNormal", guided(auto.AutoMultivariateNormal), table),
    Example("AutoLowRankMultivariateNormal", guided(auto.AutoLowRankMultivariateNormal, rank=2), table),
    Example("AutoIAFNormal", guided(auto.AutoIAFNormal, hidden_dim=[8]), table),
    Example("AutoNormalizingFlow", guided(flow_guide), table),
    Example("AutoStructured", guided(structured_guide), table),
    Example("AutoGaussian", guided(auto.AutoGaussian), table),
    Example("AutoDelta", guided(auto.AutoDelta), table),
    Example("AutoLaplaceApproximation", guided(auto.AutoLaplaceApproximation), table),
    Example("AutoGuideList", guided(guide_list), table),
    Example("AutoNormalMessenger", guided(auto.AutoNormalMessenger), table),
    Example("AutoHierarchicalNormalMessenger", guided(auto.AutoHierarchicalNormalMessenger), table),
    Example("AutoRegressiveMessenger", guided(auto.AutoRegressiveMessenger), table),
    Example("eight-schools", guided(auto.AutoNormal, eight_schools), schools_data),
    Example("several-particles", guided(auto.AutoNormal), table, FOUR, trace_of_four),
    # Pyro draws the particles of a loop in turn; for a single number that is the same noise.
    Example(
        "particles-in-a-loop",
        lambda: Program.of(derived_quantity, normal_mean),
        numbers,
        FOUR,
        partial(Trace_ELBO, num_particles=4),
    ),
    Example("particles-of-coins", one_coin, numbers, FOUR, trace_of_four),
    Example("particles-of-codes", factor_analysis, bits, FOUR, trace_of_four, batch_size=8),
    Example("minibatches", lambda: Program.of(regression, auto.AutoNormal, data_plate="data"), table, batch_size=8),
    Example("minibatches-of-codes", factor_analysis, bits, batch_size=8),
    Example("closed-form-of-codes", factor_analysis, bits, ELBO(), TraceMeanField_ELBO, batch_size=8),
    Example(
        "minibatches-of-effects",
        lambda: Program.of(effect_of_each_row, auto.AutoNormal, data_plate="data"),
        numbers,
        batch_size=8,
    ),
    Example(
        "parameter-of-each-row",
        lambda: Program.of(effect_of_each_row, parameter_of_each_row, data_plate="data"),
        numbers,
        batch_size=8,
    ),
    Example("plate-draws-its-rows", guided(auto.AutoNormal, draws_its_own_rows), table),
    Example("pyro-subsample", guided(auto.AutoNormal, pyros_subsample), table),
    Example("nested-plates", guided(auto.AutoNormal, groups_and_members), bits),
    Example("nested-plates-hierarchical", guided(auto.AutoHierarchicalNormalMessenger, groups_and_members), bits),
    Example("crossed-plates", guided(auto.AutoDiagonalNormal, item_response), bits),
    Example("plate-as-a-loop", plate_as_a_loop, numbers),
    Example("scale", guided(auto.AutoNormal, scaled_likelihood), table),
    Example("scale-of-a-prior", annealed, numbers),
    Example("mask", guided(auto.AutoNormal, masked_likelihood), incomplete),
    Example("observation-mask", missing_values, incomplete),
    Example("masked-sequences", padded_walks, ragged),
    Example("block", guided(auto.AutoNormal, jittered_inputs), table),
    Example("condition", known_noise, table, stays=True),
    Example("lift", lifted_parameters, table),
    Example(
        "LocScaleReparam",
        reparameterised(eight_schools, lambda: {"effect": LocScaleReparam()}),
        schools_data,
    ),
    Example(
        "TransformReparam",
        reparameterised(scaled_walk, lambda: {"scale": TransformReparam(), "step": TransformReparam()}),
        numbers,
    ),
    Example("DiscreteCosineReparam", reparameterised(smooth_path, lambda: {"steps": DiscreteCosineReparam()}), series),
    Example("AutoReparam", reparameterised(eight_schools, AutoReparam), schools_data),
    Example("factor", lambda: Program.of(energy_based, normal_mean), numbers),
    Example("deterministic", lambda: Program.of(derived_quantity, normal_mean), numbers),
    Example("closed-form", lambda: Program.of(derived_quantity, normal_mean), numbers, ELBO(), TraceMeanField_ELBO),
    Example(
        "closed-form-of-particles",
        lambda: Program.of(derived_quantity, normal_mean),
        numbers,
        ELBO(particles=4),
        partial(TraceMeanField_ELBO, num_particles=4, vectorize_particles=True),
    ),
    Example("trace-graph", lambda: Program.of(derived_quantity, normal_mean), numbers, SAMPLED, TraceGraph_ELBO),
    Example("gamma", number(lambda: dist.Gamma(2.0, 1.0), dist.Gamma), numbers),
    Example(
        "gamma-closed-form", number(lambda: dist.Gamma(2.0, 1.0), dist.Gamma), numbers, ELBO(), TraceMeanField_ELBO
    ),
    Example("beta", number(lambda: dist.Beta(2.0, 1.0), dist.Beta), numbers),
    Example("log-normal", number(lambda: dist.LogNormal(0.0, 1.0), dist.LogNormal), numbers),
    Example("inverse-gamma", number(lambda: dist.InverseGamma(3.0, 1.0), dist.InverseGamma), numbers),
    Example("weibull", number(lambda: dist.Gamma(2.0, 1.0), dist.Weibull), numbers),
    Example("student-t", number(lambda: dist.StudentT(4.0), lambda a, b: dist.StudentT(5.0, a, b)), numbers),
    Example("dirichlet", proportions, classes),
    Example("dirichlet-closed-form", proportions, classes, ELBO(), TraceMeanField_ELBO),
    Example("multivariate-normal", correlated_posterior, points),
    Example("flow-in-the-guide", flow_posterior, points),
    Example("flow-in-the-model", flow_likelihood, points),
    Example("spline-in-the-model", spline_likelihood, points),
    Example("lkj-cholesky", guided(auto.AutoNormal, correlated_numbers), points),
    Example("von-mises", guided(auto.AutoNormal, directions), angles),
    Example("improper-prior", lambda: Program.of(improper_prior, normal_mean), numbers),
    Example("zero-inflated", guided(auto.AutoNormal, too_many_zeros), counts),
    Example("mixture-distribution", guided(auto.AutoMultivariateNormal, mixture_likelihood), numbers),
    Example("score-of-a-bernoulli", one_coin, numbers),
    Example("score-in-trace-graph", one_coin, numbers, SAMPLED, TraceGraph_ELBO),
    Example("score-of-rows", lambda: Program.of(coins, seen_coins, data_plate="data"), numbers, batch_size=8),
    Example("score-of-a-categorical", regimes, numbers),
    Example("score-of-a-poisson", hidden_counts, numbers),
    with_graph("baseline-average", with_baselines(decaying_average)),
    with_graph("baseline-network", with_baselines(network_of_data, OneNumber)),
    with_graph("baseline-average-and-network", with_baselines(average_and_network, OneNumber)),
    with_graph("baseline-value", with_baselines(learned_value)),
    with_graph("baseline-of-rows", with_baselines(average_and_network, OneNumber, plate="data"), batch_size=8),
    with_graph("baselines-of-a-chain", chain_of_coins),
    Example("straight-through", straight_through, numbers),
    Example("infer-discrete", monte_carlo_em, numbers),
    Example("batch-norm-and-dropout", norm_and_dropout, table),
    Example("lazy-layer", lazy_layer, table),
    Example("lazy-parameters", lambda: Program.of(lazy_parameters, no_guide), table),
    Example("constrained-parameters", lambda: Program.of(constrained_parameters, no_guide), points),
    Example("pyro-module", lambda: Program.of(Trend(), no_guide), table),
    Example("random-layer", random_layer, table),
    Example("program-class", Survival, positive, batch_size=8),
    Example("one-hot-inputs", guided(auto.AutoNormal, one_hot_inputs), classes),
    Example("markov-loop", guided(auto.AutoNormal, random_walk), series),
    Example("gaussian-hmm", lambda: Program.of(kalman_filter, no_guide), sequences),
    Example("discrete-hmm", lambda: Program.of(forward_algorithm, no_guide), sequences),
    Example("sparse-gaussian-process", sparse_gaussian_process, nothing, stays=True),
    Example("gaussian-process", length_scale_with_prior, table),
    summed("mixture-summed", summed_mixture, numbers, batch_size=8),
    summed("AutoDiscreteParallel", guessed_mixture, numbers),
    summed("hidden-markov-chain", lambda: Program.of(hidden_markov_chain, no_guide), series),
    summed("hidden-markov-chains", lambda: Program.of(many_markov_chains, no_guide), walks),
    summed("guide-summed", summed_coins, numbers, batch_size=8),
    summed("guide-summed-in-turn", coins_one_by_one, numbers),
    summed("semi-supervised", semi_supervised, bits, batch_size=8),
    Example("branch-on-a-draw", lambda: Program.of(branch_on_a_draw, normal_mean), numbers, eager="if of a draw"),
    Example("number-of-a-draw", lambda: Program.of(draw_as_a_number, normal_mean), numbers, eager=".item() of a draw"),
    Example("rejection-sampling", turning_guide, angles, eager="VonMises draws until one is accepted"),
    *(
        Example(
            f"package-{name}",
            scenario.make,
            lambda scenario=scenario: scenario.data,
            pyro=TraceEnum_ELBO if name in SUMMED_OUT else Trace_ELBO,
            batch_size=8,
        )
        for name, scenario in MODEL_SCENARIOS.items()
    ),
]

# `make test` compiles the steps of these; the slow tests compile all others.
COMPILED: tuple[str, ...] = (
    "AutoMultivariateNormal",
    "minibatches-of-codes",
    "gamma",
    "batch-norm-and-dropout",
    "mixture-summed",
)
