"""The signal-to-noise ratio of the gradient at the end of a fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import deepprob as dp
from deepprob.engine.statistics import signal_to_noise
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior


def location(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def at(shift: float) -> object:
    """A guide of the right width, and `shift` posterior sds from the mean of 25 rows; only its place is trained."""

    def guide(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(pyro.param("place", torch.tensor(shift * 0.2)), 0.2))

    return guide


def fitted(model: object, guide: object, rate: float, **options: object) -> Posterior:
    y = torch.zeros(25)
    optimizer = dp.Optimizer("sgd", learning_rate=rate)
    return svi(dp.Program.of(model, guide), y, steps=320, optimizer=optimizer, progress=False, compile=False, **options)


@pytest.mark.parametrize("shift", [0.0, 1.0, 4.0])
def test_the_ratio_is_the_distance_from_the_optimum_in_posterior_sds(shift: float) -> None:
    """The gradient of one draw has the mean ``shift / sd`` and the standard deviation ``1 / sd``."""
    posterior = fitted(location, at(shift), 1e-12)
    ratio, se = posterior.history.gradients["place"]
    assert abs(ratio - shift) < 4 * se + 0.3 * (shift == 0)


def test_it_is_saved_and_read_out(tmp_path: Path) -> None:
    program = dp.Program.of(location, at(4.0))
    posterior = fitted(location, at(4.0), 1e-12)
    posterior.save(tmp_path / "p")
    again = Posterior.load(tmp_path / "p", program)
    assert again.history.gradients == posterior.history.gradients
    found = dp.check(posterior, torch.zeros(25))["ELBO convergence"]
    assert "signal-to-noise ratio of one gradient" in found.reading and "(place)" in found.reading
    assert found.details["signal_to_noise"].keys() == {"place"}


def test_a_gradient_without_noise_has_no_ratio() -> None:
    def guide(y: Tensor) -> None:
        pyro.sample("mu", dist.Delta(pyro.param("place", torch.tensor(1.0))))

    assert fitted(location, guide, 1e-3).history.gradients == {}


def test_the_state_of_the_fit_is_left_as_it_is() -> None:
    """A batch norm in a network counts the batches that it has seen."""
    norm = nn.BatchNorm1d(1)

    def model(y: Tensor) -> None:
        pyro.module("norm", norm)
        mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu + norm(y[:, None])[:, 0], 1.0), obs=y)

    def guide(y: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        pyro.sample("mu", dist.Normal(pyro.param("place", torch.tensor(1.0)), scale))

    posterior = fitted(model, guide, 1e-3)
    assert posterior.history.gradients.keys() >= {"place", "scale"}
    counts = [x for name, x in posterior.instance.tensors().items() if name.endswith("num_batches_tracked")]
    assert [int(x) for x in counts] == [320]


def test_the_error_covers_the_truth() -> None:
    """In 200 samples of 32 gradients, at most 10 % of estimates lie more than three errors off."""
    generator = np.random.default_rng(0)
    off = 0
    for _ in range(200):
        ratio, se = signal_to_noise(generator.normal(size=(32, 5)) + 0.5)
        off += abs(ratio - 0.5) > 3 * se
    assert off <= 20
