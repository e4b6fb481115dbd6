"""Small programs that users brought, one of each kind of fault, with the right value or message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from torch import Tensor, nn
from torch.distributions import constraints

import deepprob as dp
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import VAE, BayesianNeuralNetwork
from deepprob.posteriors.posterior import Posterior


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def fit(program: dp.Program, data: Any, epochs: int, **options: Any) -> Posterior:
    optimizer = Optimizer(learning_rate=0.05)
    return svi(program, data, epochs=epochs, optimizer=optimizer, seed=0, progress=False, compile=False, **options)


def close(found: Any, expected: Any, tolerance: float) -> None:
    found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    torch.testing.assert_close(found, expected.expand(found.shape), atol=tolerance, rtol=0.0)


def ask_everything(posterior: Posterior, data: tuple[Tensor, ...], rows: int) -> None:
    assert posterior.sample(*data, draws=7)
    likelihood = posterior.log_likelihood(*data, draws=7)
    assert likelihood.shape == (7, rows)
    assert bool(torch.isfinite(likelihood).all())
    assert posterior.to_arviz(*data) is not None
    assert dp.check(posterior, data if len(data) > 1 else data[0]).verdict in ("pass", "caution", "fail")


# -- stacked draws --------------------------------------------------------------------------------------------------


def test_matrix_product() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(80, 3, generator=g)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3 + 0.2 * torch.randn(80, generator=g)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ w + b, 0.2), obs=y)

    p = fit(dp.Program.of(model, "normal"), (x, y), 400)
    close(p.predict(x[:5], draws=400).mean.reshape(-1), x[:5] @ torch.tensor([1.0, -2.0, 0.5]) + 0.3, 0.15)
    ask_everything(p, (x, y), 80)


def test_table_by_group() -> None:
    g = torch.arange(60) % 4
    level = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    y = level[g] + 0.1 * torch.randn(60, generator=torch.Generator().manual_seed(1))

    def model(g: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("groups", 4):
            a = pyro.sample("a", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(g)):
            pyro.sample("y", dist.Normal(a[g], 0.1), obs=y)

    p = fit(dp.Program.of(model, "normal"), (g, y), 400)
    close(p.predict(torch.tensor([3, 0]), draws=200).mean.reshape(-1), torch.tensor([2.0, -1.0]), 0.15)
    ask_everything(p, (g, y), 60)


def test_mixture_as_tutorials_write_it() -> None:
    t = torch.Generator().manual_seed(2)
    y = torch.cat([torch.randn(50, generator=t) - 4, torch.randn(50, generator=t) + 4])

    @config_enumerate
    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("parts", 2):
            loc = pyro.sample("loc", dist.Normal(torch.tensor([-3.0, 3.0]), 2.0))
        with pyro.plate("rows", len(y)):
            k = pyro.sample("k", dist.Categorical(p))
            pyro.sample("y", dist.Normal(loc[k], 1.0), obs=y)

    p = fit(dp.Program.of(model, "normal"), y, 400)
    close(p.sample(y, draws=50)["k"].double().mean(0), torch.cat([torch.zeros(50), torch.ones(50)]), 0.1)
    ask_everything(p, (y,), 100)


# -- networks under draws -------------------------------------------------------------------------------------------


def test_lstm_in_a_bnn() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(2, 6, batch_first=True), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0][:, -1])

    x = torch.randn(40, 5, 2)
    y = x.sum((1, 2)).unsqueeze(1)
    p = fit(BayesianNeuralNetwork(Net()), (x, y), 60)
    assert tuple(p.predict(x, draws=5).mean.shape) == (40, 1)
    ask_everything(p, (x, y), 40)


def test_mask_inside_a_network() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).clone()
            h[h < 0] = 0.0
            return self.b(h)

    x = torch.randn(40, 3)
    y = x[:, :1]
    p = fit(BayesianNeuralNetwork(Net()), (x, y), 60)
    assert tuple(p.predict(x, draws=5).mean.shape) == (40, 1)


def test_convolutional_decoder() -> None:
    x = (torch.rand(64, 1, 8, 8) < 0.5).float()
    decoder = nn.Sequential(nn.Linear(2, 64), nn.Unflatten(1, (4, 4, 4)), nn.ConvTranspose2d(4, 1, 2, 2))
    p = fit(VAE((1, 8, 8), 2, decoder=decoder), x, 3)
    assert tuple(p.predict(x[:9], draws=4).mean.shape) == (9, 1, 8, 8)
    assert torch.isfinite(p.log_evidence(x[:9], particles=5)).all()
    assert p.sample_prior(6)["x"].shape[-3:] == (1, 8, 8)


def test_whole_numbers_into_an_embedding() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.out = nn.Embedding(12, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.e(ids).mean(1))

    x = torch.randint(0, 12, (80, 5))
    y = (x[:, 0] > 5).long()
    p = fit(BayesianNeuralNetwork(Net(), likelihood="categorical", num_classes=2), (x, y), 60)
    assert tuple(p.predict(x, draws=5).probs.shape) == (80, 2)


def test_a_bnn_with_a_named_guide() -> None:
    x = torch.randn(50, 2)
    network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    for guide in ("normal", "map"):
        assert fit(BayesianNeuralNetwork(network), (x, x[:, :1]), 30, guide=guide).predict(x, draws=3).mean.shape == (
            50,
            1,
        )


# -- plates ---------------------------------------------------------------------------------------------------------


def test_data_in_a_closure() -> None:
    y = 3 + torch.randn(20, generator=torch.Generator().manual_seed(0))

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 20) as i:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[i])

    p = fit(dp.Program.of(model, "normal"), None, 400)
    s = p.sample(draws=2000)["loc"]
    close(s.mean(), float(y.sum() / (20 + 0.01)), 0.08)
    close(s.std(), (20 + 0.01) ** -0.5, 0.04)
    assert dp.check(p, None).verdict == "pass"


def test_plate_over_the_second_dimension() -> None:
    y = 3 + torch.randn(5, 20, generator=torch.Generator().manual_seed(0))

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("columns", 20) as i:
            pyro.sample("y", dist.Normal(loc, 1.0).expand([5]).to_event(1), obs=y[:, i].T)

    p = fit(dp.Program.of(model, "normal"), y, 400)
    s = p.sample(draws=2000)["loc"]
    close(s.mean(), float(y.sum() / (100 + 0.01)), 0.05)
    close(s.std(), 0.1, 0.02)


def test_plate_without_a_size() -> None:
    y = torch.randn(40, generator=torch.Generator().manual_seed(0))

    def model(y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        with pyro.plate("data"):
            pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    p = fit(dp.Program.of(model, "normal"), y, 400)
    close(p.sample(draws=2000)["b"].mean(), float(y.sum() / (40 + 1 / 9)), 0.06)


# -- arguments ------------------------------------------------------------------------------------------------------


def test_keyword_only_observations() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    y = 2 * x

    def model(x: Tensor, *, y: Tensor | None = None) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(b * x, 0.1), obs=y)

    p = fit(dp.Program.of(model, "normal"), {"x": x, "y": y}, 400)
    close(p.predict(x[:3], draws=50).mean.reshape(-1), 2 * x[:3], 0.1)


def test_check_keeps_the_order_of_a_tuple() -> None:
    x = torch.randn(60, generator=torch.Generator().manual_seed(0))
    y = 2 * x + 0.3 * torch.randn(60, generator=torch.Generator().manual_seed(1))

    def model(y: Tensor, x: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("obs", dist.Normal(b * x, 0.3), obs=y)

    p = fit(dp.Program.of(model, "normal"), (y, x), 400)
    assert dp.check(p, (y, x)).verdict == "pass"


def test_arguments_of_unequal_length() -> None:
    x = torch.randn(30, generator=torch.Generator().manual_seed(0))
    prior = torch.tensor([1.0, 2.0, 3.0])

    def model(x: Tensor, scales: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, scales).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(w.sum(-1, keepdim=True), 1.0), obs=x)

    p = fit(dp.Program.of(model, "normal"), (x, prior), 300)
    assert p.sample(x, prior, draws=3)["w"].shape == (3, 3)


def test_a_mask_stays_a_mask() -> None:
    t = torch.Generator().manual_seed(0)
    y = 2 + torch.randn(60, generator=t)
    seen = torch.rand(60, generator=t) < 0.5

    def model(seen: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    p = fit(dp.Program.of(model, "normal"), (seen, y), 400)
    close(p.sample(draws=500)["a"].mean(), float(y[seen].sum() / (seen.sum() + 1 / 9)), 0.1)


# -- weights --------------------------------------------------------------------------------------------------------


def test_pretrained_features_stay() -> None:
    feature = nn.Linear(3, 2)
    before = feature.weight.detach().clone()
    x = torch.randn(50, 3)
    y = feature(x).detach().sum(1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
        f = feature(x)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal((f * w).sum(-1), 0.1), obs=y)

    with pytest.warns(UserWarning, match="the weights of feature are used but not registered with Pyro"):
        p = fit(dp.Program.of(model, "normal"), (x, y), 400)
    close(p.sample(draws=200)["w"].mean(0), torch.ones(2), 0.1)
    close(feature.weight.detach(), before, 1e-7)


def test_values_of_parameters_are_constrained() -> None:
    y = torch.randn(30)

    def model(y: Tensor) -> None:
        s = pyro.param("s", torch.tensor(2.0), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(0.0, s), obs=y)

    def guide(y: Tensor) -> None:
        pass

    p = fit(dp.Program.of(model, guide), y, 400)
    close(p.parameters()["s"], float((y**2).mean().sqrt()), 0.05)


# -- supports -------------------------------------------------------------------------------------------------------


def test_grey_pixels_where_validation_is_off() -> None:
    y = torch.rand(50, generator=torch.Generator().manual_seed(0))

    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(p, validate_args=False), obs=y)

    p = fit(dp.Program.of(model, "normal"), y, 400)
    close(p.sample(draws=500)["p"].mean(), float((1 + y.sum()) / 52), 0.05)


# -- sites ----------------------------------------------------------------------------------------------------------


def test_two_observed_sites_and_a_deterministic_one() -> None:
    y = 1 + torch.randn(60, generator=torch.Generator().manual_seed(0))
    z = torch.poisson(torch.full((60,), 2.7), generator=torch.Generator().manual_seed(1))

    def model(y: Tensor, z: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        pyro.deterministic("rate", mu.exp())
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
            pyro.sample("z", dist.Poisson(mu.exp()), obs=z)

    p = fit(dp.Program.of(model, "normal"), (y, z), 400)
    assert dp.check(p, (y, z)).verdict == "pass"
    assert "rate" in p.sample(y, z, draws=3)


def test_likelihood_as_a_factor() -> None:
    y = 1 + torch.randn(60, generator=torch.Generator().manual_seed(0))

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)):
            pyro.factor("f", dist.Normal(mu, 1.0).log_prob(y))

    p = fit(dp.Program.of(model, "normal"), y, 400)
    assert tuple(p.log_likelihood(y, draws=4).shape) == (4, 60)
    assert dp.check(p, y).verdict in ("pass", "caution")


def test_shapes_that_broadcast_unseen() -> None:
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    y = (x @ torch.tensor([1.0, -2.0])).unsqueeze(1)

    def model(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal((x * b).sum(-1), 0.1).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"'y' must have shape \(40,\).*got \(40, 1\)"):
        fit(dp.Program.of(model, "normal"), (x, y), 5)


# -- files ----------------------------------------------------------------------------------------------------------


def test_columns_of_different_meaning_are_loaded(tmp_path: Path) -> None:
    s = torch.tensor([[28.0, 15.0], [8.0, 10.0], [-3.0, 16.0], [7.0, 11.0]])

    def model(data: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(data)):
            pyro.sample("y", dist.Normal(mu, data[:, 1]), obs=data[:, 0])

    p = fit(dp.Program.of(model, "normal"), s, 200)
    p.save(tmp_path / "p")
    q = dp.Posterior.load(tmp_path / "p", dp.Program.of(model, "normal"))
    close(q.sample(draws=5)["mu"], p.sample(draws=5)["mu"], 1e-6)


def test_float64_as_the_default_type() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    y = torch.randn(30)

    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    try:
        assert str(fit(dp.Program.of(model, "normal"), y, 50).summary())
    finally:
        torch.set_default_dtype(before)
