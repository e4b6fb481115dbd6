"""Temperature scaling and conformal prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.errors import StorageError
from deepprob.inference import svi
from deepprob.posteriors import Conformal, Posterior, TemperatureScaled
from deepprob.programs.program import Program

SCALE = torch.tensor([1.0, -2.0, 0.5])


def linear(x: Tensor, y: Tensor | None = None) -> None:
    """A regression whose noise is a quarter of that of the data below."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w.squeeze(-2).mT if w.dim() > 1 else x @ w, 0.25), obs=y)


def overconfident(x: Tensor, y: Tensor | None = None) -> None:
    """Classes whose logits are four times too large."""
    pyro.sample("b", dist.Normal(0.0, 0.01))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=4 * x * SCALE), obs=y)


def binary(x: Tensor, y: Tensor | None = None) -> None:
    pyro.sample("b", dist.Normal(0.0, 0.01))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=4 * x[:, 0]), obs=y)


def fitted(model: Any, *data: Tensor) -> Posterior:
    return svi(Program.of(model, "normal", data_plate="data"), data, steps=30, progress=False, compile=False)


def regression(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, generator=generator)
    return x, x.sum(1) + torch.randn(rows, generator=generator)


def classes(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 1, generator=generator)
    return x, torch.multinomial((x * SCALE).softmax(-1), 1, generator=generator)[:, 0]


def test_the_temperature_of_logits_that_are_four_times_too_large_is_four() -> None:
    posterior = fitted(overconfident, *classes(50, 0))
    x, y = classes(4000, 1)
    scaled = TemperatureScaled.fit(posterior, x, y)
    assert scaled.temperature == pytest.approx(4.0, rel=0.15)
    before, after = (found.predict(x).log_prob(y).mean() for found in (posterior, scaled))
    assert after > before + 0.3
    torch.testing.assert_close(scaled.predict(x).probs, (x * SCALE).softmax(-1), atol=0.05, rtol=0)


def test_a_binary_target_has_a_temperature_too() -> None:
    x = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    y = torch.bernoulli(x[:, 0].sigmoid(), generator=torch.Generator().manual_seed(1))
    posterior = fitted(binary, x[:50], y[:50])
    assert TemperatureScaled.fit(posterior, x, y).temperature == pytest.approx(4.0, rel=0.15)


def test_a_temperature_of_numbers_is_refused() -> None:
    x, y = regression(40, 0)
    with pytest.raises(ValueError, match="a temperature scales probabilities of classes, but 'y' is real"):
        TemperatureScaled.fit(fitted(linear, x, y), x, y)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), "warm"])
def test_a_wrong_temperature_is_refused(temperature: Any) -> None:
    x, y = classes(20, 0)
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        TemperatureScaled(fitted(overconfident, x, y), temperature)


@pytest.mark.parametrize("mass", [0.5, 0.9])
def test_conformal_intervals_cover_although_the_model_is_wrong(mass: float) -> None:
    posterior, x, y = fitted(linear, *regression(100, 0)), *regression(4000, 2)
    low, high = posterior.predict(x).interval(mass)
    assert ((low <= y) & (y <= high)).float().mean() < mass - 0.2
    low, high = Conformal.fit(posterior, *regression(2000, 1), mass=mass).interval(x)
    # Coverage has an sd of 0.011 over held-out rows and 0.008 over new ones.
    assert ((low <= y) & (y <= high)).float().mean() == pytest.approx(mass, abs=0.05)
    assert (low <= high).all()


def test_conformal_sets_cover_classes() -> None:
    posterior, x, y = fitted(overconfident, *classes(50, 0)), *classes(4000, 2)
    sets = Conformal.fit(posterior, *classes(2000, 1), mass=0.9).sets(x)
    assert sets.shape == (4000, 3)
    assert sets.gather(1, y.unsqueeze(1)).float().mean() == pytest.approx(0.9, abs=0.05)


@pytest.mark.parametrize("mass", [0.6, 0.8])
def test_conformal_sets_cover_where_rows_have_equal_probabilities(mass: float) -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.15, 0.6, 0.25]])

    def by_group(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("b", dist.Normal(0.0, 0.01))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(probs[x]), obs=y)

    def rows(count: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(0, 2, (count,), generator=generator)
        return x, torch.multinomial(probs[x], 1, generator=generator)[:, 0]

    posterior, (x, y) = fitted(by_group, *rows(50, 0)), rows(2000, 1)
    shares = []
    for seed in range(20):
        sets = Conformal.fit(posterior, *rows(80, 2 + seed), mass=mass).sets(x)
        shares.append(float(sets.gather(1, y.unsqueeze(1)).float().mean()))
    assert sum(shares) / len(shares) > mass - 0.02  # sd below 0.01


def test_conformal_intervals_of_counts_reach_the_counts_that_they_should() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("b", dist.Normal(0.0, 0.01))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x + 0.1, 1e-6), obs=y)

    x = torch.arange(40.0)
    y = x + torch.tensor([0.0, 0.0, 0.0, 3.0]).repeat(10)
    low, high = Conformal.fit(fitted(model, x, y), x, y, mass=0.9).interval(100 * x)
    assert ((low <= 100 * x - 2) & (100 * x + 3 <= high)).all() and (high - low).max() < 6.1


def test_several_binary_columns_have_a_set_each() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("b", dist.Normal(0.0, 0.01))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=torch.stack([x, -3 * x], -1)).to_event(1), obs=y)

    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    y = torch.bernoulli(torch.stack([x, -3 * x], -1).sigmoid(), generator=torch.Generator().manual_seed(1))
    conformal = Conformal.fit(fitted(model, x[:50], y[:50]), x[:2000], y[:2000], mass=0.8)
    sets = conformal.sets(x[2000:])
    assert sets.shape == (2000, 2, 2) and conformal.margin.shape == (2,)
    shares = sets.gather(-1, y[2000:].long().unsqueeze(-1)).float().mean((0, 2))
    torch.testing.assert_close(shares, torch.full((2,), 0.8), atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", [Conformal, TemperatureScaled])
def test_held_out_rows_without_targets_are_refused(kind: Any) -> None:
    x, y = classes(40, 0)
    with pytest.raises(ValueError, match="recalibration needs the values of 'y'; got none"):
        kind.fit(fitted(overconfident, x, y), x)


def test_too_few_rows_for_the_mass_are_refused() -> None:
    x, y = regression(8, 0)
    with pytest.raises(ValueError, match=r"mass=0.9 needs at least 9 held-out rows; got 8"):
        Conformal.fit(fitted(linear, *regression(40, 0)), x, y, mass=0.9)
    with pytest.raises(ValueError, match="mass must lie between 0 and 1; got 90"):
        Conformal.fit(fitted(linear, *regression(40, 0)), x, y, mass=90)  # type: ignore[arg-type]


def test_both_are_saved_and_loaded(tmp_path: Path) -> None:
    x, y = classes(50, 0)
    scaled = TemperatureScaled.fit(fitted(overconfident, x, y), *classes(200, 1))
    scaled.save(tmp_path / "scaled")
    program = Program.of(overconfident, "normal", data_plate="data")
    again = TemperatureScaled.load(tmp_path / "scaled", program=program)
    assert torch.equal(again.predict(x).probs, scaled.predict(x).probs)
    conformal = Conformal.fit(fitted(linear, *regression(40, 0)), *regression(40, 1))
    conformal.save(tmp_path / "conformal")
    same = Conformal.load(tmp_path / "conformal", program=Program.of(linear, "normal", data_plate="data"))
    rows = regression(5, 3)[0]
    assert all(torch.equal(a, b) for a, b in zip(same.interval(rows), conformal.interval(rows), strict=True))
    with pytest.raises(StorageError, match="holds a recalibration of kind 'conformal', not 'temperature'"):
        TemperatureScaled.load(tmp_path / "conformal")
    with pytest.raises(StorageError, match="holds no recalibrated posterior"):
        Conformal.load(tmp_path)
