"""Laplace approximations against closed-form posteriors, and their curvature against whole Jacobians."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from deepprob.fitting.at_mode import AtMode
from deepprob.fitting.curvature import STRUCTURES, Curvature
from deepprob.fitting.precision import KroneckerPart
from deepprob.inference import laplace
from deepprob.inference.laplace import init
from deepprob.models import BayesianNeuralNetwork
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

SIGMA = 0.5
OFF: dict[str, Any] = {"progress": False}


def regression_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator)
    weights = torch.randn(5, generator=generator)
    return x, x @ weights + SIGMA * torch.randn(200, generator=generator)


def exact(x: Tensor, y: Tensor, scale: float = 1.0, noise: float = SIGMA) -> tuple[Tensor, Tensor, float]:
    """Mean, covariance and log evidence of Bayesian linear regression."""
    x, y = x.double(), y.double()
    covariance = (x.T @ x / noise**2 + torch.eye(x.shape[1]) / scale**2).inverse()
    marginal = scale**2 * x @ x.T + noise**2 * torch.eye(len(x))
    evidence = dist.MultivariateNormal(torch.zeros(len(x)).double(), marginal).log_prob(y)
    return covariance @ x.T @ y / noise**2, covariance, float(evidence)


def with_intercept(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def linear(**options: Any) -> BayesianNeuralNetwork:
    settings: dict[str, Any] = {"prior": "normal", "prior_scale": 1.0, "noise": SIGMA, "standardize": False}
    return BayesianNeuralNetwork(nn.Linear(5, 1), **settings | options)


def covariance_of(posterior: Posterior) -> Tensor:
    """The covariance of the guide's vector."""
    guide = posterior.program.current_guide
    found = torch.zeros(guide.latent_dim, guide.latent_dim)
    for block in guide.blocks:
        root = block.deviation(torch.eye(block.index.numel())).T
        found[block.index.flatten()[:, None], block.index.flatten()] = root @ root.T
    return found


@pytest.mark.parametrize("structure", ["full", "kronecker", "low_rank"])
@pytest.mark.parametrize("batch_size", [20, None])
def test_a_linear_network_has_its_exact_posterior(structure: str, batch_size: int | None) -> None:
    x, y = regression_data()
    mean, covariance, evidence = exact(with_intercept(x), y)
    posterior = laplace(linear(), (x, y), structure=structure, steps=300, batch_size=batch_size, **OFF)
    loc = posterior.program.current_guide.loc.detach().double()
    torch.testing.assert_close(loc, mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(covariance_of(posterior).double(), covariance, rtol=1e-3, atol=1e-6)
    assert abs(posterior.config["log_marginal_likelihood"] - evidence) < 1e-2
    assert abs(float(posterior.log_evidence(x, y, particles=5)) - evidence) < 1e-2


def test_diagonal_has_the_variances_given_the_other_weights() -> None:
    x, y = regression_data()
    posterior = laplace(linear(), (x, y), structure="diagonal", steps=300, **OFF)
    precision = exact(with_intercept(x), y)[1].inverse()
    found = posterior.program.current_guide.get_posterior().variance.double()
    torch.testing.assert_close(found, precision.diagonal().reciprocal(), rtol=1e-4, atol=0.0)


def test_linearised_predictions_of_a_linear_network_are_exact() -> None:
    x, y = regression_data()
    mean, covariance, _ = exact(with_intercept(x), y)
    posterior = laplace(linear(), (x, y), steps=300, **OFF)
    found = posterior.predict(x[:7], draws=20_000)
    rows = with_intercept(x[:7]).double()
    sd = ((rows @ covariance * rows).sum(1) + SIGMA**2).sqrt()
    torch.testing.assert_close(found.mean[:, 0].double(), rows @ mean, rtol=0.0, atol=4e-3)
    torch.testing.assert_close(found.sd[:, 0].double(), sd, rtol=1e-2, atol=0.0)


class LinearRegression(Program):
    """y ~ N(x w, sigma), w ~ N(0, I)."""

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", dist.Normal(torch.zeros(5), 1.0).to_event(1))  # (..., 5)
        with self.data_plate(x):
            return pyro.sample("y", dist.Normal((x * w).sum(-1), SIGMA), obs=y)


@pytest.mark.parametrize("batch_size", [20, 200, None])
@pytest.mark.parametrize("structure", ["full", "diagonal"])
def test_sd_ratios_of_linear_regression(structure: str, batch_size: int | None) -> None:
    x, y = regression_data()
    mean, covariance, evidence = exact(x, y)
    posterior = laplace(LinearRegression(), (x, y), structure=structure, batch_size=batch_size, steps=500, **OFF)
    optimum = covariance.diagonal() if structure == "full" else covariance.inverse().diagonal().reciprocal()
    gaussian = posterior.program.current_guide.get_posterior()
    assert ((gaussian.variance.sqrt().double() / optimum.sqrt() - 1).abs() < 0.03).all()
    torch.testing.assert_close(gaussian.mean.detach().double(), mean, rtol=1e-4, atol=1e-4)
    if structure == "full":
        assert abs(posterior.config["log_marginal_likelihood"] - evidence) < 1e-2


# -- scales ------------------------------------------------------------------------------------------------------------


def best_scales(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Scale of the prior and noise with the highest evidence of linear regression."""
    h = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([h], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        scale, noise = h.exp()
        marginal = scale**2 * x.double() @ x.double().T + noise**2 * torch.eye(len(x))
        value = -dist.MultivariateNormal(torch.zeros(len(x)).double(), marginal).log_prob(y.double())
        value.backward()
        return value

    search.step(loss)
    return tuple(h.exp().tolist())  # type: ignore[return-value]


@pytest.mark.parametrize("structure", ["full", "kronecker"])
def test_known_scales_are_tuned_to_the_highest_evidence(structure: str) -> None:
    x, y = regression_data()
    scale, noise = best_scales(with_intercept(x), y)
    program = linear(prior_scale=0.3, noise=1.0)
    posterior = laplace(program, (x, y), structure=structure, tune=True, steps=300, **OFF)
    found = posterior.config["scales"]
    assert found["prior_scale"] == pytest.approx(scale, rel=0.01) and found["noise"] == pytest.approx(noise, rel=0.01)
    evidence = exact(with_intercept(x), y, scale, noise)[2]
    assert posterior.config["log_marginal_likelihood"] == pytest.approx(evidence, abs=0.02)
    assert (program.prior_scale, program.noise) == (0.3, 1.0)
    assert posterior.program.prior_scale == found["prior_scale"]


def test_scales_stay_without_tune() -> None:
    x, y = regression_data()
    posterior = laplace(linear(prior_scale=0.3), (x, y), steps=100, **OFF)
    assert posterior.config["scales"] == {} and posterior.program.prior_scale == 0.3


def test_each_output_has_its_own_noise() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 10, generator=generator)
    noise = torch.tensor([0.1, 0.8])
    y = x @ torch.randn(10, 2, generator=generator) + noise * torch.randn(60, 2, generator=generator)
    program = BayesianNeuralNetwork(nn.Linear(10, 2), standardize=False)
    posterior = laplace(program, (x, y), structure="full", steps=600, **OFF)
    found = torch.tensor(posterior.config["scales"]["noise"])
    wide = with_intercept(x)
    residuals = y - wide @ torch.linalg.lstsq(wide, y).solution
    unbiased = (residuals.square().sum(0) / (60 - 11)).sqrt()
    assert ((found / unbiased - 1).abs() < 0.1).all(), (found, unbiased)


# -- curvature ---------------------------------------------------------------------------------------------------------


def at_mode(net: nn.Module, data: tuple[Tensor, ...], **options: Any) -> AtMode:
    """A network at a point of its own, not fitted."""
    settings: dict[str, Any] = {"prior": "normal", "standardize": False}
    state = init(BayesianNeuralNetwork(net, **settings | options), data, steps=1, batch_size=None, weights="keep")
    return AtMode(state.instance, state.data)


def brute_force(mode: AtMode, x: Tensor, information: Tensor) -> Tensor:
    """The Gauss-Newton matrix from whole Jacobians, with the information of every row in the outputs, ``(B, O, O)``."""
    net: nn.Module = mode.program.net
    weights = {n: v.detach() for n, v in mode.values(mode.guide.loc).items() if n in mode.real}
    jacobian = jacrev(lambda w: functional_call(net, w, x))(weights)
    flat = torch.cat([jacobian[n].flatten(2) for n in weights], -1).double()  # (B, O, D)
    return torch.einsum("bod,bop,bpe->de", flat, information.double(), flat)


def images(rows: int = 12) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, 2, 5, 5), torch.arange(rows) % 3


class Tied(nn.Module):
    """One layer that is called twice, dropout and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.second, self.out = nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(torch.tanh(self.first(self.first(x)))))
        return self.out(torch.tanh(self.second(h)))


class Experts(nn.Module):
    """Two layers, each for some of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, chosen = x.new_zeros(len(x), 3), x[:, 0] > 0
        out[chosen], out[~chosen] = self.first(x[chosen]), self.second(x[~chosen])
        return out


class Branch(nn.Module):
    """Two layers, one of which never runs on these data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if x.isfinite().all() else self.second(x)


class Sorted(nn.Module):
    """Layers that see the rows in another order, of which the first row is the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = -torch.arange(len(x)) % len(x)
        return self.out(torch.tanh(self.first(x[order])))[order]


class Products(nn.Module):
    """A network of matrix products, without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = (nn.Parameter(0.5 * torch.randn(4, size)) for size in (4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.first) @ self.out


NETWORKS = {
    "experts": Experts,
    "branch": Branch,
    "sorted": Sorted,
    "products": Products,
    "dense": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 4, (1, 3)), nn.Flatten(), nn.Linear(12, 3)
    ),
    "groups": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)),
    "tied": Tied,
}


def classes(name: str) -> tuple[AtMode, Tensor]:
    torch.manual_seed(2)
    x, y = images() if name in ("convolutions", "groups") else (torch.randn(12, 4), torch.arange(12) % 3)
    if name == "experts":
        x[:8, 0] = x[:8, 0].abs()  # the trial's rows, all of one expert; of others there are three
        x[8:11, 0] = -1.0
    net = NETWORKS[name]()
    if name == "tied":
        net.norm.running_mean.normal_()
    mode = at_mode(net, (x, y), likelihood="categorical", num_classes=3)
    with torch.no_grad():
        weights = {n: v for n, v in mode.values(mode.guide.loc).items() if n in mode.real}
        probs = functional_call(mode.program.net, weights, x).softmax(-1)
    return mode, brute_force(mode, x, torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2))


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_the_whole_curvature_is_that_of_whole_jacobians(name: str) -> None:
    mode, whole = classes(name)
    curvature = Curvature(mode, [n for n in mode.guide.sites if n in mode.real])
    (part,) = curvature.dense()
    torch.testing.assert_close(part.matrix, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
    (part,) = curvature.diagonal()
    torch.testing.assert_close(part.diagonal, whole.diagonal(), rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
    (part,) = curvature.low_rank(24)  # 12 rows of 3 classes, one of which follows from the others
    low = part.vectors @ part.values.diag() @ part.vectors.T + part.rest.diag()
    torch.testing.assert_close(low, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
    assert curvature.kinds == {"exact"}


def test_kronecker_factors_are_those_of_inputs_and_output_gradients() -> None:
    mode, _ = classes("dense")
    parts = Curvature(mode, [n for n in mode.guide.sites if n in mode.real]).kronecker()
    assert [type(part) for part in parts] == [KroneckerPart] * 2
    last = parts[-1]
    x = mode.batch[0]
    weights = {n: v.detach() for n, v in mode.values(mode.guide.loc).items()}
    hidden = with_intercept(torch.relu(x @ weights["0.weight"].T + weights["0.bias"])).double()
    logits = hidden @ torch.cat([weights["2.weight"], weights["2.bias"][:, None]], 1).double().T
    probs = logits.softmax(-1)
    information = torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2)
    torch.testing.assert_close(last.outputs, information.sum(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last.inputs, hidden.T @ hidden / len(x), rtol=1e-4, atol=1e-5)


def test_kronecker_covers_all_layers_and_leaves_the_rest_independent() -> None:
    mode, _ = classes("tied")
    assert mode.covered == {"first.weight", "first.bias", "second.bias", "out.weight", "out.bias"}
    names = [n for n in mode.guide.sites if n in mode.real]
    parts = Curvature(mode, names).kronecker()
    sizes = [part.index.numel() for part in parts]
    assert sum(sizes) == mode.guide.latent_dim
    kinds = {type(part).__name__: part.index.numel() for part in parts}
    assert kinds["IndependentPart"] >= 8  # of the batch norm
    assert {type(p) for p in STRUCTURES["kronecker"](Curvature(mode, ["out.weight", "out.bias"]), 0)} == {KroneckerPart}


def test_a_weight_with_another_use_is_in_no_kronecker_product() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.embed(x).mean(1)))

    x = torch.arange(24).reshape(8, 3) % 5
    mode = at_mode(Shared(), (x, torch.arange(8) % 5), likelihood="categorical", num_classes=5)
    assert not mode.covered


@pytest.mark.parametrize("likelihood", ["normal", "bernoulli", "poisson"])
def test_gauss_newton_is_the_hessian_of_a_generalised_linear_model(likelihood: str) -> None:
    """With the canonical link or known noise; for the softplus link of counts, the expected Hessian."""
    torch.manual_seed(3)
    x = torch.randn(10, 4)
    y = torch.randint(0, 2, (10, 1)).float()
    options = {"noise": 0.7} if likelihood == "normal" else {}
    mode = at_mode(nn.Linear(4, 1), (x, y), likelihood=likelihood, **options)
    weights = {n: v.detach() for n, v in mode.values(mode.guide.loc).items()}
    out = x @ weights["weight"].T + weights["bias"]
    if likelihood == "normal":
        information = torch.full_like(out, 0.7**-2)
    elif likelihood == "bernoulli":
        information = out.sigmoid() * (1 - out.sigmoid())
    else:
        fn = mode.program.observation.distribution(out, scale=mode.program.y_scale)
        information = (mode.program.y_scale * out.sigmoid()).square() / fn.base_dist.rate
    whole = brute_force(mode, x, information.unsqueeze(-1))
    (part,) = Curvature(mode, ["weight", "bias"]).dense()
    torch.testing.assert_close(part.matrix, whole, rtol=1e-3, atol=1e-4)


def test_a_family_without_a_closed_form_is_sampled() -> None:
    torch.manual_seed(4)
    x = torch.randn(400, 2)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(1, 2), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            out = torch.nn.functional.linear(x, w)[:, 0]
            pyro.sample("y", dist.Gumbel(out, 2.0), obs=y)

    state = init(Program.of(model, data_plate="data"), (x, torch.randn(400)), steps=1)
    mode = AtMode(state.instance, state.data)
    curvature = Curvature(mode, ["w"])
    (part,) = curvature.dense()
    assert curvature.kinds == {"sampled"}
    exact = x.T.double() @ x.double() / 4.0  # the information of a location is 1 / scale^2
    assert ((part.matrix - exact).abs() < 0.15 * exact.diagonal().max()).all()


def test_many_outputs_are_summed_with_signs() -> None:
    torch.manual_seed(5)
    x, y = torch.randn(300, 3), torch.randn(300, 200)
    mode = at_mode(nn.Linear(3, 200, bias=False), (x, y), noise=1.0)
    curvature = Curvature(mode, ["weight"])
    (part,) = curvature.kronecker()
    assert curvature.kinds == {"signs"}
    assert isinstance(part, KroneckerPart)
    assert float(part.outputs.diagonal().mean()) == pytest.approx(300.0, rel=1e-3)


def test_the_last_layer_alone_is_conditional_on_the_others() -> None:
    torch.manual_seed(6)
    x = torch.randn(40, 4)
    y = torch.sin(x[:, :1]) + 0.1 * torch.randn(40, 1)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    program = BayesianNeuralNetwork(net, prior="normal", noise=0.1, standardize=False)
    posterior = laplace(program, (x, y), subset="last", structure="full", steps=500, **OFF)
    draws = posterior.sample(draws=50)
    assert draws["0.weight"].std(0).max() == 0.0 and draws["2.weight"].std(0).min() > 0.0
    hidden = with_intercept(torch.tanh(x @ draws["0.weight"][0].T + draws["0.bias"][0]))
    _, covariance, _ = exact(hidden, y[:, 0], 1.0, 0.1)
    block = posterior.program.current_guide.blocks[0]
    torch.testing.assert_close((block.root @ block.root.T).double(), covariance, rtol=2e-2, atol=1e-5)
    assert posterior.config["sites"] == ["2.weight", "2.bias"]
    assert math.isfinite(posterior.config["log_marginal_likelihood"])
