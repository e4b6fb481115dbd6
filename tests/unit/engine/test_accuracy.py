"""How far a sample is from a target: means and widths by gradients and by weights."""

from __future__ import annotations

import numpy as np
import pytest

from deepprob.engine.accuracy import (
    Array,
    accuracy_by_gradients,
    accuracy_by_number,
    accuracy_by_weights,
    accuracy_of_rows,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def normal(rng: np.random.Generator, mean: Array, covariance: Array, size: int = 1000) -> Array:
    return rng.multivariate_normal(mean, covariance, size)


CORRELATED = np.array([[1.0, 0.98], [0.98, 1.0]])


@pytest.mark.parametrize("width", [0.01, 0.1, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("shift", [0.0, 2.0, 30.0])
def test_a_normal_target_is_found_from_any_distance(rng: np.random.Generator, width: float, shift: float) -> None:
    """The sample's own noise is what remains: 1000 draws, six standard errors."""
    sd = np.sqrt(CORRELATED.diagonal())
    values = normal(rng, shift * sd, width**2 * CORRELATED)
    found = accuracy_by_gradients(values, -values @ np.linalg.inv(CORRELATED))
    assert found.shift == pytest.approx(shift, abs=0.2 * width + 0.002 * shift + 1e-3)
    assert found.log_width == pytest.approx(np.log(width), abs=0.15)
    assert (np.abs(found.shift - shift) < 6 * found.shift_se + 1e-6).all()


def test_mean_field_on_a_correlated_target_is_too_narrow(rng: np.random.Generator) -> None:
    precision = np.linalg.inv(CORRELATED)
    values = rng.normal(size=(1000, 2)) / np.sqrt(precision.diagonal())
    together = accuracy_by_gradients(values, -values @ precision)
    assert np.exp(together.log_width) == pytest.approx(np.sqrt(1 - 0.98**2), rel=0.15)
    alone = accuracy_by_number(values, -values @ precision)  # of its family it is the best
    assert np.exp(alone.log_width) == pytest.approx(1.0, abs=0.3)


def test_an_exact_sample_of_a_skewed_target_has_the_right_means_and_widths(rng: np.random.Generator) -> None:
    """log of a gamma variable with shape 3: gradient 3 - exp(u)."""
    values = np.log(rng.gamma(3.0, size=(4000, 1)))
    found = accuracy_by_gradients(values, 3.0 - np.exp(values))
    assert abs(found.shift[0]) < 4 * found.shift_se[0] + 0.01
    assert abs(found.log_width[0]) < 4 * found.log_width_se[0] + 0.01


def test_a_direction_in_which_the_density_does_not_fall_is_very_wide(rng: np.random.Generator) -> None:
    values = rng.normal(size=(1000, 2))
    gradients = np.stack([-values[:, 0], 0.0 * values[:, 1]], 1)
    found = accuracy_by_gradients(values, gradients)
    assert np.exp(found.log_width[1]) <= 0.02
    assert np.exp(found.log_width[0]) == pytest.approx(1.0, abs=0.1)


def test_a_column_that_is_constant_does_not_break_the_others(rng: np.random.Generator) -> None:
    values = np.stack([rng.normal(size=1000), np.ones(1000)], 1)
    found = accuracy_by_gradients(values, -values)
    assert np.isfinite(np.stack(found)).all()
    assert found.log_width[0] == pytest.approx(0.0, abs=0.15)


def test_weights_give_mean_and_width(rng: np.random.Generator) -> None:
    values = 2.0 * rng.normal(size=(20_000, 1))
    logs = (np.square(values / 2) - np.square(values - 0.5))[:, 0] / 2
    shares = np.exp(logs - logs.max())
    found = accuracy_by_weights(values, shares / shares.sum())
    assert found.shift[0] == pytest.approx(-0.5, abs=0.06)
    assert np.exp(found.log_width[0]) == pytest.approx(2.0, abs=0.1)


def test_rows_are_judged_one_by_one(rng: np.random.Generator) -> None:
    values = rng.normal(size=(3, 500, 2))
    scale = np.array([1.0, 4.0, 0.25])[:, None, None]  # precision of the targets
    shift, width = accuracy_of_rows(values, -scale * (values - 0.5))
    assert shift.shape == width.shape == (3, 2)
    assert np.exp(width[:, 0]) == pytest.approx([1.0, 2.0, 0.5], rel=0.15)
    assert shift[:, 0] == pytest.approx([-0.5, -1.0, -0.25], abs=0.25)
