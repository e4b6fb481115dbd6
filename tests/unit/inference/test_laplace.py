"""The routine laplace on networks of all kinds, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

import deepprob as dp
from deepprob.inference import extend, laplace, svi
from deepprob.models import BayesianNeuralNetwork
from deepprob.networks.dense import MLP
from deepprob.networks.linearised import linearised
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

ROWS = 24
SHORT: dict[str, Any] = {"steps": 60, "progress": False}


def rows(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(0))


TARGETS = rows(1).sin()
CLASSES = torch.arange(ROWS) % 3
COUNTS = torch.arange(ROWS).reshape(-1, 1).float() % 4


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0][:, -1])


class PackedGRU(nn.Module):
    """A recurrent layer on packed series, the first number of which tells their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        lengths = 1 + (x[:, 0, 0] > 0).long() + (x[:, 0, 1] > 0).long()
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.out(self.layer(packed)[1][-1])


class Attention(nn.Module):
    """An encoder layer of torch, which attends by fused kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x).mean(1))


class Products(nn.Module):
    """A network of matrix products that decodes with the transpose of its encoder, without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.code) @ self.code.T


class Tied(nn.Module):
    """A batch norm, dropout and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.second, self.out = nn.Linear(4, 4), nn.Linear(4, 1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(self.drop(self.norm(torch.tanh(self.first(x)))))))


def _images(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, outputs))


Make = Callable[[], BayesianNeuralNetwork]
CASES: dict[str, tuple[Make, tuple[Tensor, Tensor]]] = {
    "mlp": (lambda: BayesianNeuralNetwork(MLP(4, 1, (3,), "tanh")), (rows(4), TARGETS)),
    "known scales": (
        lambda: BayesianNeuralNetwork(MLP(4, 1, (3,), "tanh"), prior="normal", noise=0.3),
        (rows(4), TARGETS),
    ),
    "cnn": (lambda: BayesianNeuralNetwork(_images(3), "categorical", 3), (rows(1, 5, 5), CLASSES)),
    "lstm": (lambda: BayesianNeuralNetwork(LSTM()), (rows(5, 3), TARGETS)),
    "packed gru": (lambda: BayesianNeuralNetwork(PackedGRU(), standardize=False), (rows(5, 3), TARGETS)),
    "attention": (lambda: BayesianNeuralNetwork(Attention()), (rows(5, 4), TARGETS)),
    "products": (lambda: BayesianNeuralNetwork(Products()), (rows(4), rows(4))),
    "tied": (lambda: BayesianNeuralNetwork(Tied()), (rows(4), TARGETS)),
    "bernoulli": (lambda: BayesianNeuralNetwork(nn.Linear(4, 1), "bernoulli"), (rows(4), (TARGETS > 0).float())),
    "poisson": (lambda: BayesianNeuralNetwork(nn.Linear(4, 1), "poisson"), (rows(4), COUNTS)),
    "negative binomial": (lambda: BayesianNeuralNetwork(nn.Linear(4, 1), "negative_binomial"), (rows(4), COUNTS)),
}


@pytest.mark.parametrize("structure", ["kronecker", "diagonal"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_networks_are_fitted_asked_saved_and_exported(name: str, structure: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, data = CASES[name]
    posterior = laplace(make(), data, structure=structure, **SHORT)
    assert posterior.config["structure"] == structure and posterior.config["prediction"] == "linearised"
    found = posterior.predict(data[0], draws=5, seed=1)
    assert found.mean.isfinite().all()
    assert posterior.log_evidence(*data, particles=5).isfinite()
    posterior.save(tmp_path / "fit")
    again = Posterior.load(tmp_path / "fit", program=make())
    torch.testing.assert_close(again.predict(data[0], draws=5, seed=1).mean, found.mean)
    torch.testing.assert_close(again.log_likelihood(*data, draws=5), posterior.log_likelihood(*data, draws=5))
    assert again.config == posterior.config
    groups = set(posterior.to_arviz(*data, draws=4).groups())
    assert {"posterior", "posterior_predictive", "log_likelihood", "observed_data"} <= groups


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "packed gru", "attention", "products", "tied"])
def test_a_linearised_network_is_linear_in_its_weights(name: str) -> None:
    torch.manual_seed(0)
    make, (x, y) = CASES[name]
    posterior = laplace(make(), (x, y), structure="diagonal", **SHORT)
    program: Any = posterior.program
    latent = program.current_guide.loc.detach()
    at = {n: v for n, v in program.current_guide.values(latent).items() if n in program.shapes}
    plain: Any = laplace(make(), (x, y), structure="diagonal", prediction="sampled", **SHORT).program
    step = {n: 1e-3 * torch.randn(v.shape) for n, v in at.items()}
    here = program.outputs(at, x)
    torch.testing.assert_close(here, plain.outputs(at, x))
    moved = [program.outputs({n: v + k * step[n] for n, v in at.items()}, x) - here for k in (1.0, 1000.0)]
    torch.testing.assert_close(1000.0 * moved[0], moved[1], rtol=1e-2, atol=1e-2 * float(moved[1].abs().max()))
    true = plain.outputs({n: v + step[n] for n, v in at.items()}, x) - here
    torch.testing.assert_close(true, moved[0], rtol=0.0, atol=5e-2 * float(true.abs().max()))


def test_two_backward_derivatives_stand_in_for_a_forward_one() -> None:
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.square()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return 2.0 * ctx.saved_tensors[0] * gradients[0]

    found = linearised(lambda w: Backward.apply(w["a"]), {"a": torch.tensor([3.0, 1.0])})  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found({"a": torch.tensor([4.0, 1.0])}), torch.tensor([15.0, 1.0]))


def test_a_network_without_layers_has_a_whole_curvature_by_default() -> None:
    make, data = CASES["products"]
    assert laplace(make(), data, **SHORT).config["structure"] == "full"
    with pytest.raises(ValueError, match="no latent site of the program is the weight of a layer"):
        laplace(make(), data, subset="last", **SHORT)


def test_sampled_and_linearised_predictions_differ() -> None:
    make, data = CASES["known scales"]
    first, second = (laplace(make(), data, prediction=kind, **SHORT) for kind in ("linearised", "sampled"))
    weights = [next(iter(posterior.sample(draws=3).values())) for posterior in (first, second)]
    assert torch.equal(*weights)
    assert not torch.allclose(first.predict(data[0], seed=1).mean, second.predict(data[0], seed=1).mean)


def test_the_callers_program_keeps_its_network_and_scales() -> None:
    make, data = CASES["known scales"]
    program = make()
    laplace(program, data, tune=True, **SHORT)
    assert (program.prior_scale, program.noise, program.config["noise"]) == (1.0, 0.3, 0.3)
    assert not [name for name, _ in program.named_buffers() if "linear_at" in name]


def test_tuned_scales_are_saved(tmp_path: Path) -> None:
    data = CASES["known scales"][1]

    def make() -> BayesianNeuralNetwork:
        return BayesianNeuralNetwork(nn.Linear(4, 1), prior="normal", noise=0.3)

    posterior = laplace(make(), data, tune=True, **SHORT)
    assert posterior.program.noise == posterior.config["scales"]["noise"] != 0.3
    posterior.save(tmp_path / "fit")
    assert Posterior.load(tmp_path / "fit", program=make()).program.noise == posterior.program.noise


def test_named_sites_are_approximated_and_the_others_are_points(tmp_path: Path) -> None:
    make, data = CASES["tied"]
    posterior = laplace(make(), data, subset=["norm.weight", "out.weight"], **SHORT)
    spread = {name: float((value - value[0]).abs().max()) for name, value in posterior.sample(draws=20).items()}
    assert {name for name, value in spread.items() if value > 0} == {"norm.weight", "out.weight"}
    posterior.save(tmp_path / "fit")
    again = Posterior.load(tmp_path / "fit", program=make())
    torch.testing.assert_close(again.sample(draws=3)["out.weight"], posterior.sample(draws=3)["out.weight"])


def test_scales_of_a_hierarchy_are_points_of_the_highest_evidence() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 3, generator=generator)
    y = x @ torch.tensor([[2.0], [0.0], [-1.0]]) + 0.5 * torch.randn(300, 1, generator=generator)
    posterior = laplace(BayesianNeuralNetwork(nn.Linear(3, 1)), (x, y), steps=300, progress=False)
    noise = posterior.sample(draws=5)["noise"]
    assert (noise == noise[0]).all()
    wide = torch.cat([x, torch.ones(300, 1)], 1)
    unbiased = ((y - wide @ torch.linalg.lstsq(wide, y).solution).square().sum() / 296).sqrt()
    assert float(noise[0] * posterior.program.y_scale) == pytest.approx(float(unbiased), rel=0.01)
    assert 0.3 < posterior.config["scales"]["weight.scale"] < 3.0


def test_calls_and_shapes_are_refused_in_words() -> None:
    make, (x, y) = CASES["mlp"]
    cases = [
        ({"structure": "kron"}, r"unknown structure 'kron'\. Did you mean 'kronecker'"),
        ({"prediction": "glm"}, r"unknown prediction 'glm'.* Choose from: auto, linearised, sampled"),
        ({"subset": "first"}, r"subset must be 'all', 'last' or a list of names of sites; got 'first'"),
        ({"subset": ["net.weight"]}, r"unknown site in subset 'net.weight'"),
        ({"subset": []}, r"subset=\[\] leaves nothing to approximate"),
        ({"rank": 0}, r"rank must be a whole number of at least 1; got 0"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            laplace(make(), (x, y), **options, **SHORT)


def test_settings_of_networks_are_refused_for_other_programs() -> None:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    def run(**options: Any) -> None:
        laplace(Program.of(model), torch.zeros(4), **options, **SHORT)

    with pytest.raises(ValueError, match=r"structure='kronecker' is for networks, and no global latent site"):
        run(structure="kronecker")
    with pytest.raises(ValueError, match=r"prediction='linearised' expands one network .* Use prediction='sampled'"):
        run(prediction="linearised")
    with pytest.raises(ValueError, match=r"subset='last' is the last layer of a network"):
        run(subset="last")
    with pytest.raises(ValueError, match=r"tune=True has no known scale to tune"):
        run(tune=True)


def test_what_laplace_cannot_do_is_refused() -> None:
    def clusters(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(loc[..., 0] * (k == 0) + loc[..., 1] * (k == 1), 1.0), obs=y)

    with pytest.raises(ValueError, match=r"laplace cannot sum out 'k'"):
        laplace(Program.of(clusters), torch.zeros(4), **SHORT)
    make, (x, y) = CASES["mlp"]
    with pytest.raises(ValueError, match=r"laplace needs all rows at once for the curvature"):
        laplace(make(), DataLoader(TensorDataset(x, y), batch_size=8), **SHORT)
    wide = BayesianNeuralNetwork(nn.Linear(4, 3000), prior="normal", noise=1.0)
    with pytest.raises(ValueError, match=r"structure='full' needs a matrix of 15000 x 15000 numbers"):
        laplace(wide, (x, torch.zeros(ROWS, 3000)), structure="full", steps=1, progress=False)

    def saddle(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("bent", z.square() * y.sum())

    with pytest.raises(ValueError, match=r"the Laplace approximation needs a mode"):
        laplace(Program.of(saddle), torch.ones(2), steps=1, progress=False)


def test_dependent_priors_are_refused() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        covariance = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(1, 2), covariance).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(torch.nn.functional.linear(x, w)[..., 0], 1.0), obs=y)

    with pytest.raises(ValueError, match=r"laplace needs a prior under which the weights are independent"):
        laplace(Program.of(model), (rows(2), TARGETS[:, 0]), **SHORT)


def test_a_fit_by_laplace_is_not_extended() -> None:
    posterior = laplace(CASES["mlp"][0](), CASES["mlp"][1], subset="last", **SHORT)
    with pytest.raises(ValueError, match=r"only fits by svi can be, and this one is by laplace"):
        extend(posterior, CASES["mlp"][1], steps=1)


def test_the_curvature_is_that_of_guide_laplace() -> None:
    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, scale), obs=y)

    y = torch.tensor([1.0, 2.0, 4.0, 0.5])
    ours = laplace(Program.of(model), y, steps=1500, progress=False).program.current_guide.get_posterior()
    theirs = svi(Program.of(model, "laplace"), y, steps=1500, progress=False).program.current_guide.get_posterior()
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ours.variance, theirs.variance, rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("guide", [None, "laplace"])
def test_the_curvature_counts_the_weights_of_rows(guide: str | None) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x[..., 0], 1.0), obs=None if y is None else y.reshape(-1))

    frame = pandas.DataFrame({"x": [1.0, 2.0, -1.0, 0.5], "y": [1.0, 1.5, 0.0, 0.3], "n": [1.0, 3.0, 2.0, 1.0]})
    data = dp.table(frame, target="y", weights="n")
    program = Program.of(model, guide, data_plate="data")
    options: dict[str, Any] = {"steps": 200, "batch_size": None, "progress": False}
    posterior = svi(program, data, **options) if guide else laplace(program, data, **options)
    weights, x = posterior.program.bound_rows.weights, program.accept(data)[0][:, 0]
    assert weights is not None and weights.std() > 0
    variance = posterior.program.current_guide.get_posterior().variance
    torch.testing.assert_close(variance, 1.0 / (1.0 + (weights * x.square()).sum(0, keepdim=True)))
