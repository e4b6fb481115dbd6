"""Predictions given values of sites, and under interventions, against closed forms."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoRegressiveMessenger
from pyro.infer.reparam import LocScaleReparam
from pyro.poutine import do as pyro_do
from torch import Tensor, nn

from deepprob.inference import svi
from deepprob.posteriors import Posterior, draws_posterior
from deepprob.programs import Program

K = 20_000


def readings(a: Tensor | None = None, b: Tensor | None = None) -> None:
    t = pyro.sample("t", dist.Normal(0.0, 1.0))
    pyro.sample("a", dist.Normal(t, 1.0), obs=a)
    pyro.sample("b", dist.Normal(2.0 * t, 0.5), obs=b)


def guide(a: Tensor | None = None, b: Tensor | None = None) -> None:
    """Its start is what the tests take for the posterior: t ~ N(0.5, 0.6^2)."""
    pyro.sample("t", dist.Normal(pyro.param("loc", torch.tensor(0.5)), pyro.param("scale", torch.tensor(0.6))))


def start(model: Any, own: Any, data: Any = None, **options: Any) -> Posterior:
    """A posterior whose guide stays where it starts."""
    return svi(
        Program.of(model, own), data, steps=1, optimizer=torch.optim.SGD, progress=False, compile=False, **options
    )


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    fitted = start(readings, guide, (torch.tensor(0.0), torch.tensor(0.0)))
    for name, value in fitted.instance.store["params"].items():
        value.data.fill_({"loc": 0.5, "scale": 0.6}[name])
    return fitted


def test_a_reading_informs_the_other_one(posterior: Posterior) -> None:
    found = posterior.predict(site="b", given={"a": 1.5}, draws=K)
    variance = 1.0 / (1.0 / 0.36 + 1.0)
    mean = variance * (0.5 / 0.36 + 1.5)
    assert abs(float(found.mean) - 2 * mean) < 0.03
    assert abs(float(found.sd) - (4 * variance + 0.25) ** 0.5) < 0.03
    assert abs(float(found.draws.mean()) - 2 * mean) < 0.04


def test_an_intervention_on_a_reading_teaches_nothing(posterior: Posterior) -> None:
    plain = posterior.predict(site="b", draws=50, seed=3)
    found = posterior.predict(site="b", do={"a": 1.5}, draws=50, seed=3)
    assert torch.equal(found.mean, plain.mean)


def test_a_latent_value_is_used_as_it_is(posterior: Posterior) -> None:
    for how in ({"given": {"t": 3.0}}, {"do": {"t": 3.0}}):
        found = posterior.predict(site="b", draws=50, **how)  # type: ignore[arg-type]
        assert abs(float(found.mean) - 6.0) < 1e-6
        assert abs(float(found.sd) - 0.5) < 1e-6


def test_both_at_once(posterior: Posterior) -> None:
    found = posterior.predict(site="b", given={"a": 1.5}, do={"t": 3.0}, draws=50)
    assert abs(float(found.mean) - 6.0) < 1e-6


def test_unlikely_values_are_announced(posterior: Posterior) -> None:
    with pytest.warns(UserWarning, match=r"the given values of 'a' leave about 1\.\d effective draws of 100, because"):
        posterior.predict(site="b", given={"a": 20.0}, draws=100)
    with pytest.raises(ValueError, match="the values of 'a' have no finite density under any draw"):
        posterior.predict(site="b", given={"a": float("inf")}, draws=100)


# Latent sites --------------------------------------------------------------------------------------------------------


def pair(y: Tensor | None = None) -> None:
    u = pyro.sample("u", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    pyro.sample("y", dist.Normal(u + s.log(), 0.1), obs=y)


def test_a_dependent_guide_is_conditioned_by_its_density() -> None:
    def chain(y: Tensor | None = None) -> None:
        u = pyro.sample("u", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
        pyro.sample("s", dist.LogNormal(u, 0.5))

    fitted = start(pair, chain, torch.tensor(0.0))
    fitted.instance.store["params"]["m"].data.zero_()
    found = fitted.predict(given={"s": torch.tensor(1.0).exp()}, draws=K)
    mean = 1.0 / 0.25 / (1.0 + 1.0 / 0.25)  # of u, given log s = 1
    assert abs(float(found.mean) - (mean + 1.0)) < 0.03
    # Given the parent, the child follows the guide; an intervention on the parent leaves the child's draws.
    given, done = (fitted.predict(draws=K, **how) for how in ({"given": {"u": 2.0}}, {"do": {"u": 2.0}}))  # type: ignore[arg-type]
    assert abs(float(given.mean) - 4.0) < 0.03
    assert abs(float(done.mean) - 2.0) < 0.05


@pytest.mark.parametrize("kind", ["multivariate_normal", "low_rank"])
def test_a_joint_gaussian_guide_is_conditioned_in_closed_form(kind: str) -> None:
    fitted = svi(Program.of(pair, kind), torch.tensor(1.0), steps=1500, progress=False, compile=False)
    gaussian = fitted.program.current_guide.get_posterior()
    (mu, ms), cov = gaussian.mean.detach(), gaussian.covariance_matrix.detach()
    found = fitted.predict(given={"s": torch.tensor(-1.0).exp()}, draws=K)
    mean = mu + cov[0, 1] / cov[1, 1] * (-1.0 - ms)
    sd = (cov[0, 0] - cov[0, 1] ** 2 / cov[1, 1] + 0.01).sqrt()
    assert abs(float(found.mean) - (float(mean) - 1.0)) < 0.02
    assert abs(float(found.sd) - float(sd)) < 0.02


def test_a_joint_guide_is_given_a_latent_and_an_observed_value() -> None:
    def model(y: Tensor | None = None, z: Tensor | None = None) -> None:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(u + v, 1.0), obs=y)
        pyro.sample("z", dist.Normal(u - v, 1.0), obs=z)

    fitted = svi(Program.of(model, "multivariate_normal"), (torch.tensor(0.5), torch.tensor(1.0)), steps=5)
    gaussian = fitted.program.current_guide.get_posterior()
    precision = torch.linalg.inv(gaussian.covariance_matrix.detach())
    mean, gain = gaussian.mean.detach(), 1.0 / (precision[0, 0] + 1.0)  # q(u, v), v = 1, and a new y = 2
    u = mean[0] + gain * (-precision[0, 1] * (1.0 - mean[1]) + (2.0 - 1.0 - mean[0]))
    found = fitted.predict(site="z", given={"v": 1.0, "y": 2.0}, draws=K)
    assert abs(float(found.mean - (u - 1.0))) < 0.03


def test_a_messenger_is_conditioned_by_its_density() -> None:
    fitted = svi(
        Program.of(pair, AutoRegressiveMessenger(pair)), torch.tensor(1.0), steps=800, progress=False, compile=False
    )
    draws = fitted.sample(torch.tensor(1.0), draws=K)
    u, s = draws["u"], draws["s"].log()
    slope = float(((u - u.mean()) * (s - s.mean())).mean() / s.var())
    found = fitted.predict(torch.tensor(1.0), given={"s": 1.0}, draws=K)  # log s = 0
    assert abs(float(found.mean) - (float(u.mean()) - slope * float(s.mean()))) < 0.06


@pytest.mark.parametrize("kind", ["normal", "map"])
def test_a_mean_field_guide_has_independent_sites(kind: str) -> None:
    fitted = svi(Program.of(pair, kind), torch.tensor(1.0), steps=200, progress=False, compile=False)
    value = torch.tensor(-1.0).exp()
    given, done = (fitted.predict(draws=50, **{how: {"s": value}}) for how in ("given", "do"))  # type: ignore[arg-type]
    assert torch.allclose(given.mean, done.mean, atol=1e-5)


def test_guides_without_a_conditional_density_say_so() -> None:
    fitted = svi(Program.of(pair, "flow"), torch.tensor(1.0), steps=2, progress=False, compile=False)
    with pytest.raises(ValueError, match=r"'s' cannot be given: guide AutoIAFNormal has no conditional density of the"):
        fitted.predict(given={"s": 1.0})
    assert abs(float(fitted.predict(given={"s": 1.0, "u": 2.0}, draws=10).mean) - 2.0) < 1e-5
    stored = draws_posterior(Program.of(pair), torch.tensor(1.0), {"u": torch.randn(1, 8), "s": torch.rand(1, 8)})
    with pytest.raises(ValueError, match="'s' cannot be given: the posterior holds draws, whose density is unknown"):
        stored.predict(given={"s": 1.0})


def test_stored_draws_are_reweighted() -> None:
    draws = (torch.randn(1, K, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.5).reshape(1, K)
    stored = draws_posterior(Program.of(readings), (torch.tensor(0.0), torch.tensor(0.0)), {"t": draws})
    found = stored.predict(site="b", given={"a": 1.5}, draws=K)
    mean = (0.5 / 0.36 + 1.5) / (1.0 / 0.36 + 1.0)
    assert abs(float(found.mean) - 2 * mean) < 0.04
    assert abs(float(stored.predict(site="b", do={"t": 3.0}, draws=10).mean) - 6.0) < 1e-5


# Rows ----------------------------------------------------------------------------------------------------------------


def rows(x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x, 1.0))
        pyro.sample("a", dist.Normal(z, 1.0), obs=a)
        pyro.sample("b", dist.Normal(z.unsqueeze(-1).expand(*z.shape, 2), 0.5).to_event(1), obs=b)


def prior_of_rows(x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x + 0.0 * pyro.param("m", torch.tensor(0.0)), 1.0))


def test_every_row_has_its_own_weights() -> None:
    x = torch.tensor([0.0, 1.0, -1.0, 2.0])
    fitted = start(rows, prior_of_rows, (x, x, torch.zeros(4, 2)), batch_size=None)
    value = torch.tensor([1.0, 1.0, -2.0, 2.5])
    found = fitted.predict(x, site="b", given={"a": value}, draws=K)
    mean = (x + value) / 2
    assert (found.mean - mean.unsqueeze(-1)).abs().max() < 0.05
    assert (found.sd - (0.5 + 0.25) ** 0.5).abs().max() < 0.03
    latent = fitted.predict(x, site="b", given={"z": value}, draws=10)
    assert torch.allclose(latent.mean, value.unsqueeze(-1).expand(4, 2))
    assert torch.allclose(fitted.predict(x, site="b", do={"z": 3.0}, draws=10).mean, torch.tensor(3.0))


def test_shared_sites_are_informed_by_all_rows() -> None:
    def regression(x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> None:
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(t * x, 1.0), obs=a)
            pyro.sample("b", dist.Normal(t, 0.1), obs=b)

    def own(x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> None:
        pyro.sample("t", dist.Normal(0.0 * pyro.param("m", torch.tensor(0.0)), 1.0))

    x, value = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.5, 1.0, 1.0])
    fitted = start(regression, own, (x, x, x))
    found = fitted.predict(x, site="b", given={"a": value}, draws=K)
    assert (found.mean - (x * value).sum() / (1.0 + x.square().sum())).abs().max() < 0.03


def test_an_intervention_agrees_with_pyro() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            m = pyro.sample("m", dist.Normal(w * x, 0.1))
            pyro.sample("y", dist.Normal(w + 2.0 * m, 0.1), obs=y)

    x, value = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, 0.0, 1.0])
    fitted = svi(Program.of(model, "normal"), (x, 3 * x), steps=200, progress=False, compile=False)
    found = fitted.predict(x, do={"m": value}, draws=2000)
    samples = fitted.sample(x, draws=2000)
    pyros = Predictive(pyro_do(model, {"m": value}), samples)(x)["y"]
    assert (found.draws.mean(0) - pyros.mean(0)).abs().max() < 0.02
    assert (found.mean - (samples["w"].mean() + 2 * value)).abs().max() < 1e-3


def test_programs_that_do_not_stack_answer_too() -> None:
    def products(x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(torch.mv(x, w), 1.0), obs=a)
            pyro.sample("b", dist.Normal(torch.mv(x, w), 0.1), obs=b)

    def own(x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> None:
        pyro.sample("w", dist.Normal(pyro.param("m", torch.zeros(2)) * 0.0, 1.0).to_event(1))

    x, value = torch.eye(2), torch.tensor([1.0, -0.5])
    fitted = start(products, own, (x, value, value))
    first, second = (fitted.predict(x, site="b", given={"a": v}, draws=4000) for v in (value, -value))
    assert (first.mean - value / 2).abs().max() < 0.08
    assert (second.mean + value / 2).abs().max() < 0.08  # a graph holds no old value
    done = fitted.predict(x, site="b", do={"w": torch.tensor([3.0, 4.0])}, draws=10)
    assert torch.allclose(done.mean, torch.tensor([3.0, 4.0]))


def test_summed_sites_are_given_and_set() -> None:
    def mixture(a: Tensor | None = None, b: Tensor | None = None) -> None:
        t = pyro.sample("t", dist.Normal(0.0, 0.1))
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("a", dist.Normal(t + 2.0 * k, 1.0), obs=a)
        pyro.sample("b", dist.Normal(t + 2.0 * k, 1.0), obs=b)

    fitted = svi(Program.of(mixture, "normal"), (torch.tensor(1.0), torch.tensor(1.0)), steps=200, progress=False)
    t = fitted.sample(draws=K)["t"].mean()
    found = fitted.predict(site="b", given={"a": 2.0}, draws=K)
    assert abs(float(found.mean - t) - 2.0 * torch.sigmoid(torch.tensor(2.0))) < 0.06
    for how in ("given", "do"):
        one = fitted.predict(site="b", draws=K, **{how: {"k": 1.0}})  # type: ignore[arg-type]
        assert abs(float(one.mean - t) - 2.0) < 0.03


# Refusals ------------------------------------------------------------------------------------------------------------


def test_wrong_sites_and_values_are_refused(posterior: Posterior) -> None:
    with pytest.raises(ValueError, match=r"unknown site of given 'c'\. Choose from: a, b, t"):
        posterior.predict(site="b", given={"c": 1.0})
    with pytest.raises(ValueError, match=r"unknown site of do 'c'"):
        posterior.predict(site="b", do={"c": 1.0})
    with pytest.raises(ValueError, match=r"site 'a' is in given and in do\. Leave it in one of them"):
        posterior.predict(site="b", given={"a": 1.0}, do={"a": 1.0})
    with pytest.raises(ValueError, match=r"given\['a'\] must have shape \(\), as its site has; got \(3,\)"):
        posterior.predict(site="b", given={"a": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"site 'b' is known, by given or do\. Predict another one"):
        posterior.predict(site="b", given={"b": 1.0})

    def computed(y: Tensor | None = None) -> None:
        k = pyro.sample("k", dist.Poisson(2.0))
        d = pyro.deterministic("d", 2 * k)
        pyro.sample("y", dist.Normal(d, 1.0), obs=y)

    def own(y: Tensor | None = None) -> None:
        pyro.sample("k", dist.Poisson(pyro.param("rate", torch.tensor(2.0))))

    fitted = start(computed, own, torch.tensor(3.0))
    with pytest.raises(
        ValueError, match=r"site 'd' of given is computed from other sites, so its value has no density"
    ):
        fitted.predict(given={"d": 1.0})
    with pytest.raises(ValueError, match=r"do\['k'\] must be whole numbers|must have shape"):
        fitted.predict(do={"k": torch.tensor([1.0, 2.0])})


def test_values_outside_of_a_support_are_refused() -> None:
    def model(y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.HalfNormal(1.0))
        pyro.sample("u", dist.Uniform(0.0, s))
        pyro.sample("k", dist.Categorical(torch.ones(2)), obs=None if y is None else torch.tensor(1))
        pyro.sample("y", dist.Normal(w, s), obs=y)

    fitted = start(model, "normal", torch.tensor(0.0))
    for what in ("given", "do"):
        for name, value, words in (
            ("s", -1.0, "numbers of at least 0, as its HalfNormal site draws them; got -1"),
            ("w", float("nan"), "real numbers, as its Normal site draws them; got nan"),
            ("k", 2, "whole numbers from 0 to 1, as its Categorical site draws them; got 2"),
        ):
            with pytest.raises(ValueError, match=rf"{what}\['{name}'\] must be {words}"):
                fitted.predict(site="y", **{what: {name: value}})
        with pytest.raises(TypeError, match=rf"{what}\['w'\] must be numbers; got 'one'"):
            fitted.predict(site="y", **{what: {"w": "one"}})
        with pytest.raises(TypeError, match=rf"{what} must be a dict of values by site.*; got \['w'\]"):
            fitted.predict(site="y", **{what: ["w"]})
    assert fitted.predict(site="y", do={"u": 50.0}, draws=3).draws.shape == (3,)  # its bound is drawn


@pytest.mark.parametrize("way", ["stacked", "traced"])
@pytest.mark.parametrize("rows", [3, 2])
def test_an_intervention_on_a_computed_site_agrees_with_pyro(way: str, rows: int) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        g = pyro.deterministic("g", 2 * w)
        e = pyro.deterministic("e", g.sum(-1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            m = pyro.deterministic("m", e + z * x)
            slope = torch.ones(len(x), 2) @ g if way == "traced" else g.sum(-1)
            pyro.sample("y", dist.Normal(m + 3.0 * slope, 0.01), obs=y)

    x = torch.arange(1.0, rows + 1)
    fitted = start(model, "normal", (x, x))
    samples = fitted.sample(x, draws=500)
    for do in ({"g": torch.tensor([5.0, 7.0])}, {"e": torch.tensor(9.0)}, {"m": 10 * x}, {"g": torch.ones(2), "m": -x}):
        found = fitted.predict(x, do=do, draws=500)
        pyros = Predictive(pyro_do(model, do), {name: samples[name] for name in ("w", "z")})(x)["y"]
        assert (found.draws.mean(0) - pyros.mean(0)).abs().max() < 0.005
        assert (found.draws.std(0) - pyros.std(0)).abs().max() < 0.005
    assert way in fitted.instance.ways.values()


def test_an_intervention_on_a_reparameterised_site() -> None:
    def model(y: Tensor | None = None) -> None:
        t = pyro.sample("t", dist.HalfNormal(1.0))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, t))
            pyro.sample("y", dist.Normal(z, 0.1), obs=y)

    value = torch.tensor([1.0, 2.0, 3.0])
    fitted = start(poutine.reparam(model, config={"z": LocScaleReparam(0.0)}), "normal", value)
    assert fitted.predict(do={"z": value}, draws=5).mean.tolist() == [1.0, 2.0, 3.0]


def test_whole_numbers_stay_whole() -> None:
    net = nn.Embedding(3, 1)

    def model(y: Tensor | None = None) -> None:
        pyro.module("net", net)
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        pyro.sample("y", dist.Normal(net(k).squeeze(-1), 1.0), obs=y)

    def own(y: Tensor | None = None) -> None:
        pyro.sample("k", dist.Categorical(torch.ones(3)))

    fitted = start(model, own, torch.tensor(0.0))
    weight = fitted.parameters()["net.weight"]
    for value in (1, 1.0):
        assert torch.allclose(fitted.predict(do={"k": value}, draws=5).mean, weight[1, 0])
    with pytest.raises(ValueError, match=r"do\['k'\] must be whole numbers, as its site has; got fractions"):
        fitted.predict(do={"k": 0.5})
