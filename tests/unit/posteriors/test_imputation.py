"""Imputation against the exact conditional distributions of Gaussian programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from torch import Tensor

from deepprob.inference import svi
from deepprob.models import VAE, BayesianNeuralNetwork, DeepMarkovModel
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import num_rows
from deepprob.programs.missing import MissingValues
from deepprob.programs.program import Program

LOADINGS, NOISE = torch.tensor([1.0, 2.0]), 0.5
NAN = float("nan")


def exact(model: Callable[..., Any], guide: Callable[..., Any], *data: Tensor, **options: Any) -> Posterior:
    """The posterior of a program that has nothing to learn."""
    program = Program.of(model, guide, **options)
    batch = program.accept(data)
    return Posterior(ProgramInstance(program, batch, num_rows(batch)))


def two_readings(x: Tensor) -> None:
    """A bivariate normal with one factor: x_d ~ N(w_d z, 0.25)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None] * LOADINGS, NOISE).to_event(1), obs=x)


def exact_factor(x: Tensor) -> None:
    precision = 1 + float(LOADINGS.square().sum()) / NOISE**2
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x @ LOADINGS) / NOISE**2 / precision, precision**-0.5))


def conditional(known: float) -> tuple[float, float]:
    """Mean and sd of x_2 given x_1, of the bivariate normal."""
    covariance = LOADINGS[:, None] * LOADINGS + NOISE**2 * torch.eye(2)
    mean = covariance[0, 1] / covariance[0, 0] * known
    return float(mean), float((covariance[1, 1] - covariance[0, 1] ** 2 / covariance[0, 0]).sqrt())


def test_bivariate_normal_by_chains_with_an_exact_guide() -> None:
    posterior = exact(two_readings, exact_factor, torch.randn(4, 2))
    x = torch.tensor([[1.5, NAN], [0.3, 0.4], [NAN, NAN]])
    filled = posterior.impute(x, draws=4000, sweeps=60)
    mean, sd = conditional(1.5)
    assert filled.site == "x" and filled.draws.shape == (4000, 3, 2)
    assert float(filled.mean[0, 1]) == pytest.approx(mean, abs=5 * sd / 4000**0.5)
    assert float(filled.sd[0, 1]) == pytest.approx(sd, rel=0.06)
    marginal = (LOADINGS.square() + NOISE**2).sqrt()
    assert torch.allclose(filled.sd[2], marginal, rtol=0.06) and float(filled.mean[2].abs().max()) < 0.2
    assert filled.mean[1].tolist() == pytest.approx([0.3, 0.4]) and float(filled.mean[0, 0]) == pytest.approx(1.5)
    assert filled.sd[1].tolist() == [0.0, 0.0]
    low, high = filled.interval(0.9)
    assert float(low[0, 1]) < mean < float(high[0, 1]) and float(low[1, 0]) == float(high[1, 0])


def test_missing_values_by_a_mask_equal_those_by_nan() -> None:
    posterior = exact(two_readings, exact_factor, torch.randn(4, 2))
    x = np.array([[1.5, NAN], [0.3, 0.4]])
    by_nan = posterior.impute(x, draws=5)
    by_mask = posterior.impute(np.nan_to_num(x, nan=77.0), missing=np.isnan(x), draws=5)
    by_name = posterior.impute(np.nan_to_num(x, nan=77.0), missing={"x": np.isnan(x)}, draws=5)
    assert torch.equal(by_nan.draws, by_mask.draws) and torch.equal(by_nan.draws, by_name.draws)
    assert not torch.equal(by_nan.draws, posterior.impute(x, draws=5, seed=1).draws)


def test_complete_rows_stay() -> None:
    posterior = exact(two_readings, exact_factor, torch.randn(4, 2))
    x = torch.randn(3, 2)
    assert torch.equal(posterior.impute(x, draws=2, sweeps=1).draws, x.expand(2, 3, 2))


def test_shared_latents_have_one_value_in_each_chain() -> None:
    """shift ~ N(3, 1) at the posterior; x_d = shift + z + noise: all rows of a draw share its shift."""

    def model(x: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 0.1))
            pyro.sample("x", dist.Normal((shift + z)[..., None], 0.1).expand([len(x), 2]).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(3.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - shift).sum(-1) / 3, (0.01 / 3) ** 0.5))

    filled = exact(model, guide, torch.randn(4, 2)).impute(torch.full((2, 2), NAN), draws=100, sweeps=4)
    assert filled.mean.flatten().tolist() == pytest.approx([3.0] * 4, abs=0.4)
    assert filled.sd.flatten().tolist() == pytest.approx([1.0] * 4, abs=0.2)
    assert float(torch.corrcoef(filled.draws[:, :, 0].T)[0, 1]) > 0.9


@config_enumerate
def two_groups(x: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
        centre = torch.tensor([-3.0, 3.0])[k][..., None].expand(*k.shape, 2)
        pyro.sample("x", dist.Normal(centre, scale).to_event(1), obs=x)


@pytest.mark.parametrize("spread", [0.01, 0.0])
def test_groups_that_are_summed_out_are_drawn_given_the_rows(spread: float) -> None:
    def guide(x: Tensor) -> None:
        pyro.sample("scale", dist.LogNormal(0.0, spread) if spread else dist.Delta(torch.tensor(1.0)))

    posterior = exact(two_groups, guide, torch.randn(4, 2))
    filled = posterior.impute(torch.tensor([[2.8, NAN], [-3.3, NAN]]), draws=20)
    assert filled.mean[:, 1].tolist() == pytest.approx([3.0, -3.0], abs=1.2)


def test_a_program_that_allows_missing_values_needs_no_chain() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            likelihood = dist.Normal(z[..., None] * LOADINGS, NOISE).mask(~x.isnan()).to_event(1)
            pyro.sample("x", likelihood, obs=x)

    def guide(x: Tensor) -> None:
        seen = ~x.isnan()
        precision = 1 + (LOADINGS.square() * seen).sum(-1) / NOISE**2
        with pyro.plate("data", len(x)):
            mean = (x.nan_to_num() @ LOADINGS) / NOISE**2 / precision
            pyro.sample("z", dist.Normal(mean, precision.rsqrt()))

    posterior = exact(model, guide, torch.randn(4, 2), missing="allow")
    mean, sd = conditional(1.5)
    filled = posterior.impute(torch.tensor([[1.5, NAN]]), draws=4000)
    assert float(filled.mean[0, 1]) == pytest.approx(mean, abs=5 * sd / 4000**0.5)
    assert float(filled.sd[0, 1]) == pytest.approx(sd, rel=0.06)
    by_mask = posterior.impute(torch.tensor([[1.5, 0.0]]), missing=[[False, True]], draws=4000)
    assert torch.equal(by_mask.draws, filled.draws)


def test_masks_inside_of_an_event() -> None:
    """Each value of an event has its own mask; a missing one has no influence on value or gradient."""
    x = torch.tensor([[1.0, NAN], [NAN, 3.0]])
    scale = torch.ones(2, requires_grad=True)
    site = dist.LogNormal(torch.zeros(2, 2), scale).mask(~x.isnan()).to_event(1)
    with MissingValues():
        trace = pyro.poutine.trace(lambda: pyro.sample("x", site, obs=x)).get_trace()
    assert torch.equal(trace.nodes["x"]["value"], torch.tensor([[1.0, 1.0], [1.0, 3.0]]))
    assert trace.log_prob_sum().item() == pytest.approx(float(dist.LogNormal(0.0, 1.0).log_prob(x[~x.isnan()]).sum()))
    trace.log_prob_sum().backward()
    assert bool(scale.grad.isfinite().all())
    with MissingValues(), pytest.raises(ValueError, match=r"'x' observes 2 missing values \(NaN\) that it does not"):
        pyro.sample("x", dist.LogNormal(torch.zeros(2, 2), 1.0).mask(x.isnan()).to_event(1), obs=x)


def test_classes_and_counts_need_a_mask() -> None:
    posterior = svi(VAE((3,), 2, (4,), "categorical", num_classes=4), torch.randint(0, 4, (30, 3)), steps=2,
                    progress=False)  # fmt: skip
    x = torch.randint(0, 4, (5, 3))
    missing = torch.zeros(5, 3, dtype=torch.bool)
    missing[0, 1] = True
    filled = posterior.impute(x, missing=missing, draws=50, sweeps=2)
    assert filled.kind == "classes" and filled.probs.shape == (5, 3, 4)
    assert torch.equal(filled.probs.argmax(-1)[1:], x[1:])
    assert 0 < float(filled.probs[0, 1].max()) < 1


def test_models_of_rows_are_imputed() -> None:
    vae = svi(VAE((3, 2), 2, (4,)), torch.rand(20, 3, 2), steps=2, progress=False)
    images = torch.rand(5, 3, 2)
    images[:, 0] = NAN
    filled = vae.impute(images, draws=4, sweeps=2)
    assert set(filled.draws[:, :, 0].unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(filled.draws[:, :, 1:], images[:, 1:].expand(4, 5, 2, 2))  # grey pixels stay grey
    example = DeepMarkovModel.example()
    x, lengths = example.data[0].clone(), example.data[1]
    x[:, 0, 0] = NAN
    dmm = svi(example.program, example.data, steps=2, progress=False)
    found = dmm.impute(x, lengths, draws=3, sweeps=2)
    complete, _ = dmm.program.accept(example.data)  # zero beyond each sequence's end
    assert found.draws.shape == (3, 24, 6, 5) and torch.equal(found.draws[0, :, 1:], complete[:, 1:])


def test_missing_targets_are_predicted() -> None:
    example = BayesianNeuralNetwork.example()
    posterior = svi(example.program, example.data, steps=20, progress=False)
    x, y = example.data[0], example.data[1].clone()
    y[0] = NAN
    filled, expected = posterior.impute(x, y, draws=2000), posterior.predict(x, draws=2000)
    assert float(filled.mean[0]) == pytest.approx(float(expected.mean[0]), abs=0.1 * float(expected.sd[0]))
    assert float(filled.sd[0]) == pytest.approx(float(expected.sd[0]), rel=0.1)
    assert torch.equal(filled.mean[1:], y[1:])
    with pytest.raises(ValueError, match=r"x has missing values, but no single observed site.*Give x complete\."):
        posterior.impute(y.new_full(x.shape, NAN), example.data[1])


def test_missing_inputs_are_for_programs_that_read_them() -> None:
    def regression(fill: bool) -> Program:
        def model(x: Tensor, y: Tensor | None = None) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                mean = z + (x.nan_to_num() if fill else x)
                with pyro.poutine.mask(mask=True if y is None else ~y.isnan()):
                    pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

        def guide(x: Tensor, y: Tensor | None = None) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

        return Program.of(model, guide, data_plate="data", missing="allow")

    x, y = torch.randn(8), torch.randn(8)
    gaps = torch.where(torch.arange(8) < 2, NAN, x), torch.where(torch.arange(8) < 2, NAN, y)
    reads, fails = (svi(regression(fill), (x, y), steps=1, progress=False) for fill in (True, False))
    filled = reads.impute(*gaps, draws=5).draws
    assert filled.isfinite().all() and torch.equal(filled[:, 2:], y[2:].expand(5, -1))
    with pytest.raises(ValueError, match=r"x has missing values, but no single observed site.*Give x complete\."):
        fails.impute(*gaps, draws=5)


def test_frames_have_missing_values() -> None:
    pd = pytest.importorskip("pandas")
    posterior = svi(VAE((2,), 1, (4,), "normal"), torch.randn(20, 2), steps=2, progress=False)
    filled = posterior.impute(pd.DataFrame({"a": [1.0, None], "b": [2.0, 3.0]}), draws=4, sweeps=2)
    assert not bool(filled.draws.isnan().any()) and float(filled.sd[1, 0]) > 0


def test_several_sites_ask_for_a_choice() -> None:
    def model(a: Tensor, b: Tensor) -> None:
        with pyro.plate("data", len(a)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("a", dist.Normal(z, 1.0), obs=a)
            pyro.sample("b", dist.Normal(z, 1.0), obs=b)

    def guide(a: Tensor, b: Tensor) -> None:
        with pyro.plate("data", len(a)):
            pyro.sample("z", dist.Normal((a + b) / 3, 3**-0.5))

    posterior = exact(model, guide, torch.randn(4), torch.randn(4))
    a, b = torch.tensor([1.0, NAN]), torch.tensor([NAN, 3.0])
    with pytest.raises(ValueError, match=r"several sites \(a, b\) may be filled.*Choose one with site='\.\.\.'\."):
        posterior.impute(a, b)
    with pytest.raises(ValueError, match=r"unknown observed site 'z'"):
        posterior.impute(a, b, site="z")
    assert float(posterior.impute(a, b, site="b", draws=3000).mean[0]) == pytest.approx(0.5, abs=0.12)
    with pytest.raises(
        ValueError, match=r"missing must be an array of bools in the shape of one of.*a \(2,\), b \(2,\)"
    ):
        posterior.impute(a, b, missing=[True, False])
    with pytest.raises(ValueError, match=r"unknown argument of missing 'c'"):
        posterior.impute(a, b, missing={"c": [True, False]})


def test_values_that_depend_on_each_other_are_refused() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(mean, torch.eye(2)), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    posterior = exact(model, guide, torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"site 'x' has one MultivariateNormal over values of which some are missing"):
        posterior.impute(torch.tensor([[1.0, NAN]]))
    assert float(posterior.impute(torch.full((1, 2), NAN), draws=4000).sd[0, 0]) == pytest.approx(2**0.5, abs=0.1)


def test_rows_of_a_guide_that_was_fitted_to_complete_ones_are_refused() -> None:
    x = torch.randn(4, 2)
    posterior = svi(Program.of(two_readings, "normal"), x, steps=2, progress=False)
    with pytest.raises(ValueError, match=r"was fitted to complete rows.*missing='allow'.*use an amortized guide\."):
        posterior.impute(torch.tensor([[1.0, NAN]]).expand(4, 2))


def test_a_program_that_holds_its_data_has_nothing_to_fill() -> None:
    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.zeros(3))

    posterior = svi(Program.of(model, "normal"), steps=2, progress=False)
    with pytest.raises(ValueError, match=r"no argument is observed by a site.*Ask for posterior\.predict"):
        posterior.impute()
