"""Counts against known answers: quadrature for posteriors and evidence, simulated truths for rates and dispersions.

Seeds are fixed. A comparison with Monte Carlo allows 4 standard errors, which a correct program exceeds once in 16 000.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import LogNormal, NegativeBinomial, Normal, Poisson
from torch.nn.functional import softplus

from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import VAE, BayesianNeuralNetwork, DeepMarkovModel
from deepprob.networks.dense import MLP
from deepprob.posteriors.posterior import Posterior

FLOOR = 1e-4
FAMILIES = ["poisson", "negative_binomial"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_mean(terms: Tensor) -> Tensor:
    return terms.logsumexp(0) - math.log(len(terms))


def standard_error(weights: Tensor) -> Tensor:
    """Standard error of the log mean of each column of weights, by the delta method."""
    ratio = (weights - log_mean(weights)).exp()
    return ratio.std(0) / math.sqrt(len(weights))


# -- a Bayesian network of one weight: its posterior and evidence by quadrature ---------------------------------------


def one_rate() -> nn.Module:
    """A network whose only random parameter is its bias: y ~ Poisson(softplus(b)), b ~ N(0, 1)."""
    net = nn.Linear(1, 1)
    net.weight.requires_grad_(False).zero_()
    return net


Y = torch.tensor([3.0, 0.0, 1.0, 2.0, 4.0, 1.0, 0.0, 2.0, 6.0, 1.0])


def exact(family: str) -> tuple[Tensor, Tensor]:
    """Log evidence, and mean of the rate under the posterior, by a sum over a grid of the bias and the total count."""
    bias = torch.linspace(-6, 8, 1401, dtype=torch.float64)
    logs = torch.linspace(-6, 11, 341, dtype=torch.float64) if family == "negative_binomial" else torch.zeros(1)
    rate, total = (softplus(bias) + FLOOR)[:, None, None], logs.double().exp()[None, :, None]
    joint = Normal(0.0, 1.0).log_prob(bias)[:, None] + (bias[1] - bias[0]).log()
    if family == "poisson":
        joint = joint + Poisson(rate).log_prob(Y.double()).sum(-1)
    else:
        likelihood = NegativeBinomial(total, logits=rate.log() - total.log()).log_prob(Y.double()).sum(-1)
        joint = joint + likelihood + Normal(math.log(10), 1.5).log_prob(logs) + (logs[1] - logs[0]).log()
    evidence = joint.flatten().logsumexp(0)
    return evidence, ((joint - evidence).exp() * rate[..., 0]).sum()


@pytest.fixture(scope="module", params=FAMILIES)
def one_weight(request: pytest.FixtureRequest) -> Posterior:
    program = BayesianNeuralNetwork(one_rate(), request.param, prior="normal", standardize=False)
    return svi(
        program,
        (torch.zeros(10, 1), Y),
        epochs=1500,
        batch_size=None,
        optimizer=Optimizer(learning_rate=2e-2),
        compile=False,
        seed=0,
    )


def test_posterior_of_a_rate_matches_quadrature(one_weight: Posterior) -> None:
    evidence, rate = exact(one_weight.program.likelihood)
    x = torch.zeros(10, 1)
    weights = one_weight.log_weights(x, Y, particles=4000, seed=1)
    assert abs(float(log_mean(weights) - evidence)) < 4 * float(standard_error(weights[:, None])) + 1e-4
    bound = float(weights.mean())
    assert bound < float(evidence) and float(evidence) - bound < 0.1
    found = one_weight.predict(x, draws=4000).distribution.mean[:, 0, 0]
    # The guide is Gaussian, the posterior nearly so: allow a tenth of the rate's sd of about 0.4.
    assert abs(float(found.mean() - rate)) < 0.04


# -- regression -------------------------------------------------------------------------------------------------------


def regression(total: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    x = 4 * torch.rand(400, 1, generator=generator(1)) - 2
    rate = torch.exp(3.0 + torch.sin(2 * x))
    if total is None:
        return x, torch.poisson(rate, generator=generator(2)), rate
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return x, NegativeBinomial(total, logits=rate.log() - math.log(total)).sample(), rate


def fit_regression(family: str, x: Tensor, y: Tensor, epochs: int = 1500) -> Posterior:
    fast = Optimizer(learning_rate=2e-2, schedule="cosine")
    program = BayesianNeuralNetwork(MLP(1, 1, (20,), "tanh"), family)
    return svi(program, (x, y), epochs=epochs, batch_size=None, optimizer=fast, compile=False, seed=0)


def test_poisson_regression_recovers_the_rates() -> None:
    x, y, rate = regression()
    posterior = fit_regression("poisson", x, y)
    prediction = posterior.predict(x, draws=200)
    error, spread = (prediction.mean - rate).square().mean().sqrt(), rate.std()
    assert float(error / spread) < 0.1, (error, spread)
    truth = Poisson(rate).log_prob(y).mean()
    assert prediction.log_prob(y).mean() > truth - 0.05
    assert Poisson(y.mean()).log_prob(y).mean() < truth - 3.0  # power: one rate for all rows is far worse
    torch.testing.assert_close(prediction.aleatoric, prediction.mean.sqrt())  # a Poisson's variance is its mean
    inside = (prediction.interval(0.9)[0] <= y) & (y <= prediction.interval(0.9)[1])
    assert 0.87 < float(inside.float().mean()) < 0.97


def test_negative_binomial_regression_recovers_the_dispersion() -> None:
    x, y, rate = regression(total=3.0)
    posterior = fit_regression("negative_binomial", x, y, epochs=3000)  # after 1500 the error is 0.28 to 0.31, by seed
    total = posterior.sample(draws=200)["total_count"]
    assert abs(float(total.mean()) - 3.0) < 0.75  # its sampling error is about 0.25
    prediction = posterior.predict(x, draws=200)
    assert float((prediction.mean - rate).square().mean().sqrt() / rate.std()) < 0.3
    truth = NegativeBinomial(3.0, logits=rate.log() - math.log(3.0)).log_prob(y).mean()
    assert prediction.log_prob(y).mean() > truth - 0.05
    assert Poisson(rate).log_prob(y).mean() < truth - 1.0  # power: the true rates with a Poisson's variance


# -- a linear autoencoder ---------------------------------------------------------------------------------------------


LOADING = torch.tensor([2.0, 1.5, -1.0, -2.0, 0.5, 1.0, -0.5, 0.0])
TOTAL = 3.0


def linear_counts(family: str) -> Tensor:
    """Counts of eight columns, driven by one code."""
    z = torch.randn(1000, 1, generator=generator(3))
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return linear_truth(family, z).sample()


def linear_truth(family: str, z: Tensor) -> Poisson | NegativeBinomial:
    """Rates 10 softplus(w z + b); the negative binomial has a total count of 3."""
    rate = 10 * softplus(z * LOADING + torch.linspace(-1, 1, 8))
    return Poisson(rate) if family == "poisson" else NegativeBinomial(TOTAL, logits=rate.log() - math.log(TOTAL))


GRID = torch.linspace(-6, 6, 601)[:, None]


def integrate(density: Tensor) -> Tensor:
    """Log of the integral over a standard normal code of densities on the grid, ``(G, B)``."""
    prior = Normal(0.0, 1.0).log_prob(GRID) + math.log(float(GRID[1] - GRID[0]))
    return (density + prior).logsumexp(0)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_linear_autoencoder_of_counts_reaches_the_true_evidence(family: str) -> None:
    x = linear_counts(family)
    with torch.enable_grad():
        program = VAE((8,), latent_dim=1, hidden_dims=(), likelihood=family)
        quick = Optimizer(learning_rate=1e-2, schedule="cosine")
        posterior = svi(program, x, epochs=150, batch_size=100, optimizer=quick, compile=False, seed=0)
    fitted, few = posterior.program, x[:200]
    # The fitted model by hand: the decoder's outputs are in units of the training mean.
    rate = (fitted.centre / math.log(2) * (softplus(fitted.decoder(GRID)) + FLOOR))[:, None]
    own: Poisson | NegativeBinomial = Poisson(rate)
    if family == "negative_binomial":
        total = 1 / (softplus(fitted.raw_noise) + FLOOR)
        own = NegativeBinomial(total, logits=rate.log() - total.log())
        assert ((total > 2) & (total < 4.5)).all(), total
    exact = integrate(own.log_prob(few).sum(-1))
    torch.testing.assert_close(integrate(fitted.decode(GRID.unsqueeze(1)).log_prob(few)), exact, rtol=1e-4, atol=1e-3)
    # A linear encoder is poor for some rows and gives their weights heavy tails: most rows must agree.
    weights = posterior.log_weights(few, particles=2000, seed=1)
    error = (log_mean(weights) - exact).abs()
    assert float((error < 4 * standard_error(weights) + 1e-3).float().mean()) > 0.98 and float(error.median()) < 0.01
    bound = posterior.elbo(few, particles=200).mean()
    assert exact.mean() - 0.5 < bound < exact.mean()
    truth = integrate(linear_truth(family, GRID.unsqueeze(1)).log_prob(few).sum(-1))
    assert exact.mean() > truth.mean() - 0.1
    assert Poisson(x.mean(0)).log_prob(few).sum(-1).mean() < truth.mean() - 5.0  # power


# -- sequences --------------------------------------------------------------------------------------------------------


def series(rows: int = 150, steps: int = 20, level: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Counts of four columns whose common log-rate is a slow autoregression; sequences end anywhere."""
    noise = torch.randn(rows, steps, generator=generator(5))
    state = [noise[:, 0]]
    for t in range(1, steps):
        state.append(0.95 * state[-1] + math.sqrt(1 - 0.95**2) * noise[:, t])
    log_rate = torch.stack(state, 1)[..., None] + level + torch.tensor([0.0, 0.5, 1.0, 1.5])  # (B, T, D)
    lengths = torch.randint(2, steps + 1, (rows,), generator=generator(6))
    inside = (torch.arange(steps) < lengths[:, None])[..., None]
    return torch.poisson(log_rate.exp(), generator=generator(7)) * inside, lengths, log_rate.exp() * inside


def log_prob_of_steps(dmm: DeepMarkovModel, path: Tensor, x: Tensor) -> Tensor:
    """Log-probability of counts given states by hand, summed over features, ``(*batch, T)``."""
    mean = dmm.base_scale * (softplus(dmm.emitter(path)) + FLOOR)
    if dmm.likelihood == "poisson":
        return Poisson(mean).log_prob(x).sum(-1)
    total = 1 / (softplus(dmm.raw_noise) + FLOOR)
    return NegativeBinomial(total, logits=mean.log() - total.log()).log_prob(x).sum(-1)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_evidence_of_short_sequences_matches_quadrature(family: str) -> None:
    x, lengths, _ = series(rows=40, steps=2, level=-2.0)
    lengths[:10] = 1
    x[:10, 1] = 0
    with torch.enable_grad():
        program = DeepMarkovModel(4, latent_dim=1, hidden_dim=8, recurrent_dim=8, dropout=0.0, likelihood=family)
        posterior = svi(program, (x, lengths), epochs=150, batch_size=None, compile=False, seed=2)
    dmm, few = posterior.program, slice(0, 20)
    grid = torch.linspace(-12, 12, 601).unsqueeze(-1)  # (G, 1)
    width = float(grid[1] - grid[0])

    def move(state: Tensor) -> Tensor:
        """Log-probability of every state of the grid given some, ``(*, G)``."""
        loc, scale = dmm.transition(state)
        return Normal(loc, scale).log_prob(grid[:, 0]) + math.log(width)

    first = move(dmm.transition.start.value)  # (G,)
    second = move(grid)  # (G before, G after)
    exact = []
    for row, length in zip(x[few], lengths[few], strict=True):
        steps = log_prob_of_steps(dmm, grid.unsqueeze(1).expand(-1, 2, 1), row)  # (G, T)
        after = (second + steps[:, 1]).logsumexp(1) if int(length) == 2 else 0.0  # steps beyond the end do not count
        exact.append((first + steps[:, 0] + after).logsumexp(0))
    weights = posterior.log_weights(x[few], lengths[few], particles=10_000, seed=1)
    # The weights of a single row may have a heavy tail that its standard error misses, so compare the sum over rows.
    error, known = log_mean(weights) - torch.stack(exact), standard_error(weights)
    assert abs(float(error.sum())) < 4 * float(known.square().sum().sqrt()) and float(error.abs().max()) < 0.05


def test_deep_markov_model_tracks_a_series_of_counts() -> None:
    x, lengths, rate = series()
    program = DeepMarkovModel(4, latent_dim=2, hidden_dim=16, recurrent_dim=16, dropout=0.0, likelihood="poisson")
    posterior = svi(program, (x, lengths), epochs=60, batch_size=25, compile=False, seed=0)
    inside = torch.arange(20) < lengths[:, None]
    followed = posterior.predict(x, lengths, draws=50).mean
    assert (followed[~inside] == 0).all()
    ratio = (followed / rate)[inside].log()
    assert float(ratio.std()) < 0.5 * float(rate[inside].log().std(0).mean())
    per_step = posterior.elbo(x, lengths, particles=20).sum() / lengths.sum()
    alone = Poisson(x[inside].mean(0)).log_prob(x[inside]).sum(-1).mean()
    truth = Poisson(rate[inside]).log_prob(x[inside]).sum(-1).mean()
    assert alone + 1.0 < per_step < truth  # the true rates are still better


def test_prior_of_the_total_count_covers_usual_dispersions() -> None:
    """The prior covers strong overdispersion (total count 1) and almost none (100)."""
    low, high = LogNormal(math.log(10), 1.5).icdf(torch.tensor([0.025, 0.975]))
    assert low < 1.0 and high > 100.0
