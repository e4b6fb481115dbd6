"""Leave-one-out cross-validation against refits in closed form, for guides that are right and wrong."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.inference import svi
from deepprob.posteriors import arviz_compat
from deepprob.posteriors.from_draws import draws_posterior
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program

NOISE = torch.Generator().manual_seed(0)
X = torch.randn(30, 3, generator=NOISE)
Y = X @ torch.tensor([1.0, -2.0, 0.5]) + torch.randn(30, generator=NOISE)
PRIOR = 3.0


def regression(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, PRIOR).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w.unsqueeze(-2)).sum(-1), 1.0), obs=y)


def exact_posterior(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the weights."""
    covariance = torch.linalg.inv(x.T @ x + torch.eye(3) / PRIOR**2)
    return covariance @ x.T @ y, covariance


def exact_loo() -> np.ndarray:
    """The density of every row after a fit without it."""
    found = []
    for i in range(len(Y)):
        rest = torch.arange(len(Y)) != i
        mean, covariance = exact_posterior(X[rest].double(), Y[rest].double())
        x = X[i].double()
        found.append(dist.Normal(mean @ x, (1 + x @ covariance @ x).sqrt()).log_prob(Y[i].double()).item())
    return np.array(found)


def with_guide(width: float) -> Posterior:
    """The posterior whose guide has the exact mean, and a number of times the exact width."""
    mean, covariance = exact_posterior(X, Y)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("w", dist.MultivariateNormal(mean, width**2 * covariance))

    program = Program.of(regression, guide, data_plate="data")
    return Posterior(ProgramInstance(program, program.accept((X, Y)), len(X)))


def stored(draws: int = 1000) -> Posterior:
    mean, covariance = exact_posterior(X, Y)
    values = dist.MultivariateNormal(mean, covariance).sample((4, draws // 4))
    return draws_posterior(Program.of(regression, data_plate="data"), (X, Y), {"w": values})


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


def test_equals_refits_without_each_row() -> None:
    found, exact = with_guide(1.0).loo(X, Y, draws=4000), exact_loo()
    assert np.abs(found.pointwise - exact).max() < 0.1
    assert found.elpd == pytest.approx(exact.sum(), abs=0.2)
    assert found.se == pytest.approx(math.sqrt(30) * exact.std(ddof=1), rel=0.05)
    assert 1.5 < found.p_loo < 5  # three weights
    assert found.influential.tolist() == [] and found.khat.shape == (30,)
    assert found.method == "guide corrected" and found.guide_khat == 0.0


@pytest.mark.parametrize("width", [5.0, 2.0, 0.7])
def test_the_correction_mends_a_guide_of_the_wrong_width(width: float) -> None:
    exact, posterior = exact_loo().sum(), with_guide(width)
    right, plain = posterior.loo(X, Y, draws=8000), posterior.loo(X, Y, draws=8000, corrected=False)
    assert abs(right.elpd - exact) < 0.35 * abs(plain.elpd - exact)
    assert abs(plain.elpd - exact) > 2
    assert plain.guide_khat is None and plain.method == "guide as it is"


def test_a_much_too_narrow_guide_is_seen_by_the_corrected_khat_only() -> None:
    right, plain = (with_guide(0.3).loo(X, Y, corrected=corrected) for corrected in (True, False))
    assert plain.influential.tolist() == []  # although its elpd is off by 3.5 nats
    assert len(right.influential) > 25 and right.guide_khat is not None and right.guide_khat > right.khat_limit
    assert "The weights that correct the guide are unreliable themselves: k-hat" in str(right)


def test_stored_draws_need_no_correction() -> None:
    found = stored().loo(X, Y)
    assert found.draws == 1000 and found.method == "stored draws" and found.guide_khat is None
    assert np.abs(found.pointwise - exact_loo()).max() < 0.15


@pytest.mark.skipif(not hasattr(arviz_compat.arviz(), "psislw"), reason="ArviZ 1.x names the results of loo otherwise")
def test_plain_values_match_arviz() -> None:
    posterior = stored()
    found = posterior.loo(X, Y)
    other = arviz_compat.arviz().loo(posterior.to_arviz(X, Y), pointwise=True, reff=1.0)
    np.testing.assert_allclose(found.pointwise, other.loo_i.values, atol=1e-4)
    np.testing.assert_allclose(found.khat, other.pareto_k.values, atol=1e-3)
    assert found.p_loo == pytest.approx(float(other.p_loo), abs=1e-3)


def test_parts_of_the_draws_give_the_same_kind_of_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepprob.posteriors.draw_chunks.MOST_NUMBERS", 150 * 300)
    monkeypatch.setattr("deepprob.posteriors.loo._ROWS", 7)
    found = with_guide(0.8).loo(X, Y, draws=4000)
    assert found.elpd == pytest.approx(exact_loo().sum(), abs=0.3)


def test_an_influential_row_is_named() -> None:
    y = Y.clone()
    y[15] += 25.0
    found = with_guide(1.0).loo(X, y, draws=1000, corrected=False)
    assert found.influential.tolist() == [15]
    assert str(found).endswith("1 row has a k-hat above 0.67 and is not reliable: 15.")


def codes(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def encoder(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.8))


def test_local_latents_have_the_evidence_of_each_row() -> None:
    x = torch.randn(50, generator=NOISE)
    program = Program.of(codes, encoder, data_plate="data")
    posterior = Posterior(ProgramInstance(program, program.accept(x), len(x)))
    found = posterior.loo(x, draws=4000)
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(x)
    assert np.abs(found.pointwise - exact.double().numpy()).max() < 0.05
    assert found.p_loo == 0.0 and found.method == "evidence of every row"


def hierarchy(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_row_takes_its_own_latents_along() -> None:
    """The marginal model is a normal mean with variance 2."""
    x = torch.randn(20, generator=NOISE) + 2
    precision = len(x) / 2 + 0.01

    def guide(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(x.sum() / 2 / precision, precision**-0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + loc) / 2, math.sqrt(0.5)))

    program = Program.of(hierarchy, guide, data_plate="data")
    posterior = Posterior(ProgramInstance(program, program.accept(x), len(x)))
    found = posterior.loo(x, draws=4000)
    rest = (len(x) - 1) / 2 + 0.01
    exact = dist.Normal((x.sum() - x) / 2 / rest, (2 + 1 / rest) ** 0.5).log_prob(x)
    assert np.abs(found.pointwise - exact.double().numpy()).max() < 0.05
    assert found.p_loo == pytest.approx(1.0, abs=0.5)


def test_a_joint_guide_over_local_latents_is_answered() -> None:
    x = torch.randn(6, generator=NOISE)
    posterior = svi(Program.of(hierarchy, "multivariate_normal"), x, steps=50, progress=False, compile=False)
    assert posterior.loo(x, draws=100).pointwise.shape == (6,)


def test_rows_without_a_finite_density_are_unknown_not_silently_good() -> None:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            scale = torch.where(y > 1e6, torch.nan, 1.0) + 0 * loc
            pyro.sample("y", dist.Normal(loc, scale, validate_args=False), obs=y)

    y = torch.tensor([0.0, 1.0, 2e6, 0.5])
    values = {"loc": torch.randn(1, 100)}
    found = draws_posterior(Program.of(model, data_plate="data"), y, values).loo(y)
    assert np.isnan(found.pointwise).tolist() == [False, False, True, False]
    assert math.isnan(found.elpd) and math.isinf(found.khat[2]) and 2 in found.influential


def test_errors() -> None:
    posterior = with_guide(1.0)
    with pytest.raises(ValueError, match=r"loo needs the data of the fit, 30 rows, .* got 10\. Score held-out rows"):
        posterior.loo(X[:10], Y[:10])
    with pytest.raises(ValueError, match="draws must be a whole number of at least 25; got 10"):
        posterior.loo(X, Y, draws=10)
    point = svi(Program.of(regression, "map"), (X, Y), steps=5, progress=False, compile=False)
    with pytest.raises(ValueError, match="the posterior is one point: every draw gives the rows the same density"):
        point.loo(X, Y)
