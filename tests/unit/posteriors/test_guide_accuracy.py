"""What a posterior keeps of how far its guide is from the posterior given the training data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from torch import Tensor, nn

import deepprob as dp
from deepprob.inference import svi
from deepprob.models import BayesianNeuralNetwork
from deepprob.posteriors.guide_accuracy import GuideAccuracy, guide_accuracy
from deepprob.posteriors.guide_draws import guide_draws, replayed_density
from deepprob.posteriors.label_switching import Switching
from deepprob.posteriors.posterior import Posterior

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 3, generator=GENERATOR)
Y = X.sum(1) + torch.randn(60, generator=GENERATOR)
COVARIANCE = torch.linalg.inv(X.T @ X + torch.eye(3))
MEAN, SD = COVARIANCE @ X.T @ Y, COVARIANCE.diagonal().sqrt()


def line(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)


def unstacked_line(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def off(width: float = 1.0, shift: float = 0.0) -> Callable[..., None]:
    def guide(x: Tensor, y: Tensor | None = None) -> None:
        zero = pyro.param("zero", torch.tensor(0.0))
        root = width * torch.linalg.cholesky(COVARIANCE)
        pyro.sample("w", dist.MultivariateNormal(MEAN + shift * SD + 0 * zero, scale_tril=root))

    return guide


def fitted(model: Any, guide: Any, data: Any = (X, Y), steps: int = 100, **options: Any) -> Posterior:
    return svi(dp.Program.of(model, guide), data, steps=steps, progress=False, compile=False, **options)


def kept(posterior: Posterior) -> GuideAccuracy:
    assert posterior.accuracy is not None
    return posterior.accuracy


@pytest.mark.parametrize("model", [line, unstacked_line])
@pytest.mark.parametrize(("width", "shift"), [(1.0, 0.0), (0.1, 0.0), (3.0, 0.0), (1.0, 2.0)])
def test_a_guide_around_a_closed_form(model: Any, width: float, shift: float) -> None:
    found = kept(fitted(model, off(width, shift))).by_gradients["w"]
    assert found[0].tolist() == pytest.approx([shift] * 3, abs=0.3 * max(width, 1.0))
    assert found[2].exp().tolist() == pytest.approx([width] * 3, rel=0.15)


def test_an_exact_guide_has_equal_weights() -> None:
    found = kept(fitted(line, off()))
    assert found.log_weights.std() < 1e-3
    assert found.by_weights["w"][0].abs().max() < 0.01
    assert found.together == ("w",)


@pytest.mark.parametrize("guide", ["normal", "multivariate_normal", "low_rank", "laplace"])
def test_every_named_guide_is_judged_by_site(guide: str) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1), scale), obs=y)

    found = kept(fitted(model, guide, steps=1500))
    assert {name: x.shape[1] for name, x in found.by_gradients.items()} == {"scale": 1, "w": 3}
    shifts, widths = (torch.cat([x[row] for x in found.by_gradients.values()]) for row in (0, 2))
    assert shifts.abs().max() < 0.4
    assert widths.abs().max() < 0.3


def test_a_point_estimate_has_no_coordinates() -> None:
    found = kept(fitted(line, "map"))
    assert (found.points, dict(found.by_gradients)) == (("w",), {})


def test_weights_of_a_network_with_hidden_units_are_judged_one_by_one() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    found = kept(svi(BayesianNeuralNetwork(network), (X, Y[:, None]), steps=100, progress=False, compile=False))
    assert found.together == ("noise",)
    assert {"0.weight", "2.weight", "noise"} <= found.by_gradients.keys()
    assert found.by_weights.keys() == {"noise"}


def test_latents_of_rows_need_no_training_data() -> None:
    def codes(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def encoder(y: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(slope * y, 0.5**0.5))

    posterior = svi(
        dp.Program.of(codes, encoder, data_plate="data"),
        Y,
        steps=1,
        optimizer=dp.Optimizer(learning_rate=1e-9),
        progress=False,
    )
    assert posterior.accuracy is None
    draws = guide_draws(posterior._fitted, (Y,), 50, 0)
    assert draws.log_weights.shape == (50, 60)
    assert draws.values["z"].shape == draws.scores["z"].shape == (50, 60, 1)
    exact = -2 * (draws.values["z"][..., 0] - Y / 2)
    torch.testing.assert_close(draws.scores["z"][..., 0], exact, atol=1e-4, rtol=1e-4)


def test_a_program_without_gradients_gives_the_reason() -> None:
    class Stubborn(dist.Normal):
        def log_prob(self, value: Tensor) -> Tensor:
            return super().log_prob(value.detach())

        def expand(self, batch_shape: Any, _instance: Any = None) -> Stubborn:
            return Stubborn(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def model(y: Tensor) -> None:
        pyro.sample("w", Stubborn(torch.tensor(0.0), torch.tensor(1.0)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("w", Stubborn(pyro.param("m", torch.tensor(0.0)), torch.tensor(1.0)))

    found = kept(fitted(model, guide, Y))
    assert not found.by_gradients and found.why


def test_a_short_fit_is_judged_by_the_check_that_asks() -> None:
    posterior = fitted(line, "normal", steps=99)
    assert posterior.accuracy is None
    assert dp.check(posterior, (X, Y), draws=20)["posterior means, global latents"].verdict != "unchecked"
    with_other_rows = dp.check(posterior, (X[:9] + 1, Y[:9]), draws=20)["posterior means, global latents"]
    assert "shorter than 100 steps" in with_other_rows.reading


def test_an_interrupted_fit_is_not_judged() -> None:
    def stop(fit: Any) -> None:
        if fit.epoch == 2:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted"):
        posterior = fitted(line, "normal", steps=50, callbacks=[stop])
    assert posterior.accuracy is None


def test_what_is_kept_is_saved(tmp_path: Path) -> None:
    posterior = fitted(line, off(2.0))
    posterior.save(tmp_path / "p")
    again = kept(Posterior.load(tmp_path / "p", dp.Program.of(line, off(2.0)), guide=off(2.0)))
    first = kept(posterior)
    assert torch.equal(first.log_weights, again.log_weights)
    assert torch.equal(first.by_gradients["w"], again.by_gradients["w"])
    assert (again.together, again.points, again.switching) == (("w",), (), None)


def test_a_divergence_of_many_numbers_is_saved(tmp_path: Path) -> None:
    def many(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(400), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(w.sum(-1), 100.0), obs=y)

    program = dp.Program.of(many, "normal")
    posterior = svi(program, torch.zeros(5), steps=400, progress=False, compile=False)
    found = kept(posterior).divergence
    assert found is not None and kept(posterior).together == () and found[0] < 0.05 and 0 < found[1] < 0.02
    posterior.save(tmp_path / "p")
    assert kept(Posterior.load(tmp_path / "p", program)).divergence == found


MIXTURE_Y = torch.cat([torch.linspace(-5.0, -3.0, 20), torch.linspace(3.0, 5.0, 20)])


def mixture(means: Tensor) -> Callable[..., None]:
    @config_enumerate
    def model(y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("parts", 2):
            loc = pyro.sample("loc", dist.Normal(means, 5.0))
        with pyro.plate("rows", len(y)):
            part = pyro.sample("part", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(loc[part], 1.0), obs=y)

    return model


def test_labels_that_can_change_places_are_found_and_saved(tmp_path: Path) -> None:
    program = dp.Program.of(mixture(torch.zeros(2)), "normal")
    posterior = svi(program, MIXTURE_Y, steps=1500, progress=False, restarts=3)
    found = kept(posterior)
    assert found.switching == Switching(("weights", "loc"), 2)
    posterior.save(tmp_path / "p")
    assert kept(Posterior.load(tmp_path / "p", program)).switching == found.switching
    told_apart = svi(dp.Program.of(mixture(torch.tensor([-3.0, 3.0])), "normal"), MIXTURE_Y, steps=300, progress=False)
    assert kept(told_apart).switching is None


def test_density_of_given_values_with_sites_in_plates_that_are_summed_out() -> None:
    posterior = fitted(mixture(torch.zeros(2)), "normal", MIXTURE_Y, steps=2)
    values = {"weights": torch.tensor([[0.5, 0.5]] * 3), "loc": torch.tensor([[-4.0, 4.0], [4.0, -4.0], [0.0, 0.0]])}
    density = replayed_density(posterior._fitted, (MIXTURE_Y,), values)
    mixed = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.5, 0.5])), dist.Normal(torch.tensor([-4.0, 4.0]), 1.0)
    )
    exact = mixed.log_prob(MIXTURE_Y).sum() + dist.Normal(0.0, 5.0).log_prob(torch.tensor([-4.0, 4.0])).sum()
    assert density[0].item() == pytest.approx(exact.item(), rel=1e-4)
    assert density[1].item() == pytest.approx(exact.item(), rel=1e-4)


def test_groups_with_data_of_their_own_cannot_change_places() -> None:
    def groups(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("groups", 5):
            level = pyro.sample("level", dist.Normal(mu, 3.0))
            pyro.sample("y", dist.Normal(level, 0.3), obs=y)

    posterior = fitted(groups, "normal", torch.tensor([-6.0, -3.0, 0.0, 3.0, 6.0]), steps=800)
    assert kept(posterior).switching is None


def location(prior: dist.Distribution) -> Callable[..., None]:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", prior)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 300.0), obs=y)

    return model


@pytest.mark.parametrize(("prior", "narrow"), [(dist.StudentT(2.2, 0.0, 1.0), True), (dist.Normal(0.0, 1.0), False)])
def test_tails_that_the_guide_does_not_reach_make_it_too_narrow(prior: dist.Distribution, narrow: bool) -> None:
    """The data say almost nothing: the posterior is the prior."""
    posterior = fitted(location(prior), "normal", torch.zeros(2), steps=1500)
    wide = kept(posterior).by_wide_weights["mu"][2:, 0]
    assert (wide[0] + 3 * wide[1] < -0.1) == narrow and abs(kept(posterior).by_gradients["mu"][2, 0]) < 0.1
    assert dp.check(posterior, torch.zeros(2))["posterior widths, global latents"].verdict == (
        "caution" if narrow else "pass"
    )


def test_more_numbers_than_wide_draws_tell_have_none() -> None:
    def many(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(12), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(w.sum(-1), 5.0), obs=y)

    found = kept(fitted(many, "normal", torch.zeros(5), steps=1000))
    assert found.searched and not found.by_wide_weights


def test_a_wide_part_around_a_narrow_one_is_seen() -> None:
    """Half of the prior is ten times as wide as the other half, where the guide stays; the data say almost nothing."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 100.0).mask(False))
        parts = dist.Normal(torch.zeros(2), torch.tensor([0.1, 1.0]))
        prior = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts)
        pyro.factor("prior", prior.log_prob(mu))
        pyro.sample("y", dist.Normal(mu, 300.0), obs=y)

    posterior = fitted(model, "normal", torch.tensor(0.0), steps=500)
    assert dp.check(posterior, torch.tensor(0.0))["posterior widths, global latents"].verdict == "fail"


def test_draws_that_would_take_too_long_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, asked = fitted(line, "normal"), []

    def recording(*arguments: Any) -> Any:
        asked.append(arguments[2])
        return guide_draws(*arguments)

    monkeypatch.setattr("deepprob.posteriors.guide_accuracy.guide_draws", recording)
    batch = posterior.instance.program.accept((X, Y))
    assert guide_accuracy(posterior._fitted, batch, seconds=0.0) is None
    assert asked == [2, 2]
    assert guide_accuracy(posterior._fitted, batch, seconds=1e3) is not None
    assert asked[-1] == 1000
