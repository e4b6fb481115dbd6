"""ArviZ behind one module: its numbers, its containers, its errors."""

from __future__ import annotations

import numpy as np
import pytest

from deepprob.posteriors import arviz_compat
from deepprob.posteriors.loo import left_out_weights


@pytest.fixture
def chains() -> np.ndarray:
    rng = np.random.default_rng(0)
    return 0.1 * rng.normal(size=(4, 200)).cumsum(1) + rng.normal(size=(4, 200))


def test_values_match_arviz(chains: np.ndarray) -> None:
    az = arviz_compat.arviz()
    assert arviz_compat.rhat(chains) == pytest.approx(float(az.rhat(chains)), rel=1e-9)
    assert arviz_compat.ess(chains) == pytest.approx(float(az.ess(chains)), rel=1e-9)
    tail = float(az.ess(chains, method="tail", prob=(0.05, 0.95)))
    assert arviz_compat.ess(chains, method="tail") == pytest.approx(tail, rel=1e-9)
    for method in ("mean", "sd"):
        # with numba, ArviZ 0.23 returns an array of one element
        other = float(np.ravel(az.mcse(chains, method=method))[0])
        assert arviz_compat.mcse(chains, method=method) == pytest.approx(other, rel=1e-2)


def test_rhat_detects_a_chain_of_another_scale() -> None:
    noise = np.random.default_rng(1).normal(size=(4, 500))
    noise[0] *= 0.3
    assert arviz_compat.rhat(noise) > 1.05


def test_khat_grows_with_the_tail_and_smoothing_keeps_the_mass() -> None:
    rng = np.random.default_rng(0)
    shapes = np.array([0.1, 0.5, 0.9])
    weights = shapes[:, None] * rng.exponential(size=(3, 4000))  # log of Pareto weights of these shapes
    smoothed, khat = arviz_compat.psis(weights)
    assert np.abs(khat - shapes).max() < 0.15
    assert np.allclose(np.exp(smoothed).sum(-1), 1)
    shifted, again = arviz_compat.psis(weights + 1000)
    assert np.allclose(khat, again) and np.allclose(shifted, smoothed, atol=1e-8)


@pytest.mark.parametrize("batch", [(), (1,), (3, 2)])
def test_psis_shapes(batch: tuple[int, ...]) -> None:
    smoothed, khat = arviz_compat.psis(np.random.default_rng(0).normal(size=(*batch, 50)))
    assert smoothed.shape == (*batch, 50) and khat.shape == batch


def test_container_has_groups_dims_coords_and_attributes() -> None:
    container = arviz_compat.from_dict(
        {"posterior": {"z": np.zeros((2, 5, 3))}, "observed_data": {"x": np.arange(4.0)}},
        dims={"z": ["code"]},
        coords={"code": ["a", "b", "c"]},
        attrs={"seed": 1},
    )
    assert container["posterior"]["z"].dims == ("chain", "draw", "code")
    assert list(container["posterior"]["code"].values) == ["a", "b", "c"]
    assert container["observed_data"]["x"].shape == (4,)
    assert container["posterior"].attrs["seed"] == 1


def test_more_chains_than_draws_do_not_warn() -> None:
    assert arviz_compat.from_dict({"posterior": {"z": np.zeros((5, 2))}})["posterior"]["z"].shape == (5, 2)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"must have shape \(chains, draws\); got \(3,\)"):
        arviz_compat.rhat(np.zeros(3))
    with pytest.raises(ValueError, match=r"method must be 'mean' or 'sd'; got 'median'\. For other"):
        arviz_compat.mcse(np.zeros((2, 9)) + np.arange(9), method="median")
    with pytest.raises(ValueError, match="at least 25 weights; got 10"):
        arviz_compat.psis(np.zeros(10))


def test_leave_one_out_of_an_ensemble_names_the_draws_that_it_lacks() -> None:
    with pytest.raises(ValueError, match="leave-one-out predictions of rows of the fit need at least 25 draws; got 5"):
        left_out_weights(np.zeros((5, 3)))
