"""Programs as textbooks have them, deepprob's own models, and the columns of frames that they are fitted to."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

import deepprob as dp
from deepprob.inference import svi
from deepprob.models import VAE, BayesianNeuralNetwork
from deepprob.posteriors.posterior import Posterior

N = 80
RNG = np.random.default_rng(0)
AREA = RNG.normal(100.0, 20.0, N)
ROOMS = RNG.integers(1, 6, N)
GARDEN = RNG.random(N) < 0.4
TOWN = pd.Categorical(np.array(["Aa", "Bo", "Cy", "Do"])[np.arange(N) % 4])
FRAME = pd.DataFrame({"area": AREA, "rooms": ROOMS, "garden": GARDEN, "town": TOWN}, index=range(1000, 1000 + N))


def fit(program: Any, data: Any, steps: int = 150, **options: Any) -> Posterior:
    program = program if isinstance(program, dp.Program) else dp.Program.of(program, "normal", data_plate="data")
    optimizer = dp.Optimizer(learning_rate=0.1, average=0.9)
    chosen = {"steps": steps, "batch_size": None, "optimizer": optimizer, "seed": 0} | options
    return svi(program, data, progress=False, compile=False, **chosen)


def close(found: Any, expected: Any, tolerance: float) -> None:
    found, expected = (torch.as_tensor(x if isinstance(x, Tensor) else np.array(x)).double() for x in (found, expected))
    torch.testing.assert_close(found, expected.expand(found.shape), atol=tolerance, rtol=0.0)


# -- programs of textbooks --------------------------------------------------------------------------------------------


class BayesianRegression(PyroModule):
    """The linear regression of Pyro's tutorial."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](in_features, out_features)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([out_features, in_features]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([out_features]).to_event(1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


def test_the_regression_of_pyros_tutorial_takes_a_frame_and_a_series() -> None:
    x = pd.DataFrame({"a": (AREA - 100) / 20, "garden": GARDEN.astype(float)}, index=FRAME.index)
    y = pd.Series(2 * x["a"] - x["garden"] + 0.2 * RNG.normal(size=N), name="price")
    torch.manual_seed(0)
    model = BayesianRegression(2, 1)
    posterior = fit(dp.Program.of(model, AutoDiagonalNormal(model), data_plate="data"), (x, y), 400)
    exact = np.linalg.lstsq(np.c_[x, np.ones(N)], y, rcond=None)[0]
    close(posterior.sample(draws=300)["linear.weight"].mean(0).flatten(), exact[:2], 0.1)
    shown = posterior.predict(x[["garden", "a"]][:3], draws=200).to_frame()
    assert [*shown.index] == [1000, 1001, 1002]
    close(shown["mean"], (np.c_[x, np.ones(N)] @ exact)[:3], 0.2)


def by_town(town: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("towns", 4):
        level = pyro.sample("level", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(town)):
        pyro.sample("y", dist.Normal(level[town], 0.5), obs=y)


def test_codes_of_a_category_index_a_table_of_levels() -> None:
    y = np.array([-1.0, 0.0, 1.0, 2.0])[TOWN.codes] + 0.5 * RNG.normal(size=N)
    posterior = fit(by_town, {"town": FRAME["town"].cat.codes, "y": y})
    exact = [y[TOWN.codes == k].sum() / (20 + 0.25 / 9) for k in range(4)]
    close(posterior.sample(draws=300)["level"].mean(0), exact, 0.1)
    close(posterior.predict(np.array([3, 0], dtype=np.int8), draws=300).mean, [exact[3], exact[0]], 0.15)


def test_a_column_of_categories_is_refused_with_its_remedy() -> None:
    with pytest.raises(TypeError, match=r"not numbers: town"):
        fit(by_town, {"town": FRAME["town"], "y": AREA})


def schools(sigma: Tensor, effect: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("data", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, sigma), obs=effect)


def test_the_columns_of_a_frame_may_be_arguments() -> None:
    frame = pd.DataFrame(
        {"effect": [28, 8, -3, 7, -1, 1, 18, 12], "sigma": [15, 10, 16, 11, 9, 11, 10, 18]}, index=[*"ABCDEFGH"]
    ).astype("Float64")
    posterior = fit(schools, {"sigma": frame["sigma"], "effect": frame["effect"]})
    close(posterior.sample(draws=500)["mu"].mean(), 4.4, 2.5)
    shown = posterior.predict(frame["sigma"], draws=50).to_frame()
    assert [*shown.index] == [*"ABCDEFGH"]


def chance(x: Tensor, y: Tensor | None = None) -> None:
    a, b = pyro.sample("a", dist.Normal(0.0, 2.0)), pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=a + b * x), obs=y)


LABELS = np.random.default_rng(1).random(N) < 1 / (1 + np.exp(-(AREA - 100) / 20))


def test_later_frames_need_no_column_that_is_predicted() -> None:
    def by_column(size: Tensor, price: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(size)):
            pyro.sample("y", dist.Normal(slope * size, 1.0), obs=price)

    frame = pd.DataFrame({"size": np.arange(20.0), "price": 2 * np.arange(20.0)})
    posterior = fit(by_column, frame)
    expected = posterior.predict(frame, draws=4).mean
    assert torch.equal(posterior.predict(frame[["size"]].assign(note="-"), draws=4).mean, expected)
    one = posterior.predict(frame.iloc[3], draws=4)
    assert one.mean.shape == (1,) and torch.equal(one.mean, posterior.predict(frame.iloc[[3]], draws=4).mean)


@pytest.mark.parametrize("dtype", ["float32", "float16", "Float64"])
def test_labels_of_a_logistic_regression_are_floats(dtype: str) -> None:
    y = pd.Series(LABELS).astype("float32").astype(dtype)
    posterior = fit(chance, ((AREA - 100) / 20, y))
    close(posterior.sample(draws=300)["b"].mean(), 1.0, 0.5)
    assert posterior.log_likelihood((AREA - 100) / 20, y, draws=5).isfinite().all()


@pytest.mark.parametrize(
    ("y", "kind"),
    [
        (LABELS, "bools"),
        (pd.Series(LABELS).astype("boolean"), "bools"),
        (LABELS.tolist(), "bools"),
        (LABELS.astype(int), "whole numbers"),
    ],
    ids=["array", "NA", "list", "0/1"],
)
def test_labels_that_a_bernoulli_cannot_score_are_refused_with_their_remedy(y: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"site 'y' observes {kind}.*y\.float\(\)"):
        fit(chance, ((AREA - 100) / 20, y), 3)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "UInt32", "float64"])
def test_counts_of_a_poisson_regression_may_be_of_any_type(dtype: str) -> None:
    def rate(x: Tensor, y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Poisson((a + 0 * x).exp()), obs=y)

    posterior = fit(rate, (AREA, pd.Series(ROOMS).astype(dtype)))
    close(posterior.sample(draws=300)["a"].mean().exp(), ROOMS.mean(), 0.3)


def test_a_mask_of_observed_values_fills_in_the_others() -> None:
    def filled(x: Tensor, y: Tensor, known: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(b * x, 0.3), obs=y, obs_mask=known)

    x = (AREA - 100) / 20
    y, known = 2 * x + 0.3 * RNG.normal(size=N), np.arange(N) % 2 == 0
    posterior = fit(filled, {"x": x, "y": np.where(known, y, 0.0), "known": known}, 200)
    close(posterior.sample(draws=300)["b"].mean(), (x * y)[known].sum() / ((x * x)[known].sum() + 0.01), 0.1)


# -- numbers too fine for float32 -------------------------------------------------------------------------------------

SECONDS = 1.7e9 + 30.0 * np.arange(N)
PRICES = 1e8 + RNG.normal(0, 1.0, N)


def trend(t: Tensor, y: Tensor | None = None) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(t)):
        pyro.sample("y", dist.Normal(b * (t - 1.7e9) / 1000, 0.3), obs=y)


def level(x: Tensor, y: Tensor | None = None) -> None:
    m = pyro.sample("m", dist.Normal(1e8, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


FINE = {
    "seconds since 1970": (trend, lambda: (SECONDS, np.ones(N)), "'t'.*[sS]ubtract"),
    "a series of seconds": (trend, lambda: (pd.Series(SECONDS), np.ones(N)), "'t'.*[sS]ubtract"),
    "prices of 1e8 with an sd of 1": (level, lambda: (AREA, PRICES), "'y'.*[sS]ubtract"),
}


@pytest.mark.parametrize("form", FINE)
def test_float64_finer_than_float32_warns_what_to_subtract(form: str) -> None:
    model, data, words = FINE[form]
    with pytest.warns(UserWarning, match=words):
        fit(model, data(), 3)


def test_a_program_in_float64_keeps_all_digits() -> None:
    def exact(x: Tensor, y: Tensor | None = None) -> None:
        assert y is None or y.dtype == torch.float64
        m = pyro.sample("m", dist.Normal(torch.tensor(1e8, dtype=torch.float64), 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        shift = pyro.param("shift", torch.zeros((), dtype=torch.float64))
        pyro.sample("m", dist.Normal(PRICES.mean() + shift, 0.1))

    posterior = fit(dp.Program.of(exact, guide, data_plate="data"), (AREA, PRICES), 3)
    close(posterior.sample(draws=100)["m"].mean(), PRICES.mean(), 0.2)


def test_whole_seconds_and_centred_numbers_need_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(trend, (SECONDS - 1.7e9, np.ones(N)), 3)
        fit(level, (AREA.astype(np.float64), np.round(AREA) + 1e6), 3)


# -- deepprob's models ------------------------------------------------------------------------------------------------

NUMBERS = FRAME[["area", "rooms", "garden"]]
WORTH = (0.01 * AREA + ROOMS + 0.5 * GARDEN).astype(np.float64)


def network() -> BayesianNeuralNetwork:
    return BayesianNeuralNetwork(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))


@pytest.mark.parametrize(
    "y",
    [WORTH[:, None], pd.DataFrame({"worth": WORTH}), WORTH[:, None].tolist(), torch.tensor(WORTH)[:, None]],
    ids=["array", "frame", "lists", "tensor"],
)
def test_a_network_takes_numbers_whole_numbers_and_booleans_of_a_frame(y: Any) -> None:
    posterior = fit(network(), (NUMBERS, y), 4)
    found = posterior.predict(NUMBERS[["garden", "rooms", "area"]], draws=4).mean
    assert found.shape == (N, 1)
    assert torch.equal(found, posterior.predict(NUMBERS.to_numpy(np.float64), draws=4).mean)


def test_a_network_takes_one_number_a_row_or_says_how_to_shape_it() -> None:
    try:
        posterior = fit(network(), (NUMBERS, pd.Series(WORTH)), 4)
    except ValueError as error:
        assert "(1,)" in str(error) and "y" in str(error)
    else:
        assert posterior.predict(NUMBERS, draws=4).mean.shape[0] == N


def test_text_for_a_network_is_refused_with_its_remedy() -> None:
    with pytest.raises(TypeError, match=r"not numbers: town. Encode .*dp\.table"):
        fit(network(), (FRAME, WORTH[:, None]), 4)
    with pytest.raises(TypeError, match=r"not numbers: town|must be numbers"):
        fit(network(), (NUMBERS, FRAME["town"]), 4)


def test_a_network_standardizes_what_float32_cannot_hold() -> None:
    frame = pd.DataFrame({"t": SECONDS, "price": PRICES, "worth": 3.0 * (SECONDS - SECONDS.mean()) / SECONDS.std()})
    program = BayesianNeuralNetwork.from_data(frame, target="worth", hidden_dims=(8,))
    posterior = fit(program, frame, 200)
    assert (posterior.predict(frame, draws=50).to_frame()["mean"] - frame["worth"]).std() < 0.5


@pytest.mark.parametrize("dtype", ["float32", "float64", "Float64", "float16"])
def test_a_vae_takes_a_frame_of_reals(dtype: str) -> None:
    frame = pd.DataFrame((AREA - 100)[:, None] / [20.0, 30.0, 40.0], columns=[*"abc"]).astype(dtype)
    posterior = fit(VAE((3,), 2, hidden_dims=(8,), likelihood="normal"), frame, 4)
    assert torch.equal(posterior.predict(frame[["c", "a", "b"]], draws=3).mean, posterior.predict(frame, draws=3).mean)
    with pytest.raises(ValueError, match="lacks the column 'c'"):
        posterior.predict(frame[["a", "b"]], draws=3)


@pytest.mark.parametrize(
    "values", [GARDEN[:, None] == [True, False, True], "uint8", "boolean"], ids=["bool", "uint8", "boolean"]
)
def test_a_vae_takes_binary_columns_of_any_type(values: Any) -> None:
    binary = GARDEN[:, None] == [True, False, True]
    data = pd.DataFrame(binary).astype(values) if isinstance(values, str) else values
    found, expected = (fit(VAE((3,), 2, hidden_dims=(8,)), x, 4) for x in (data, binary.astype(np.float32)))
    assert torch.equal(found.predict(data, draws=3).mean, expected.predict(binary.astype(np.float32), draws=3).mean)


def test_grey_values_of_bytes_are_refused_with_their_remedy() -> None:
    with pytest.raises(ValueError, match=r"0 to 255.*255"):
        fit(VAE((4, 4), 2, hidden_dims=(8,)), np.arange(N * 16, dtype=np.uint8).reshape(N, 4, 4), 4)
