"""Routines of points and members: what they refuse, keep and say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from uncompiled import replace_compiler

from deepprob.fitting.callbacks import Checkpoint
from deepprob.inference import dropout, ensemble, map_estimate, sghmc, swag
from deepprob.models import VAE, BayesianNeuralNetwork
from deepprob.networks import MLP
from deepprob.posteriors.from_draws import draws_posterior
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

X = torch.linspace(-1.0, 1.0, 20)[:, None]
SHORT: dict[str, Any] = {"progress": False, "compile": False}
OF_MEMBERS: dict[str, Any] = {"ensemble": ensemble, "swag": swag, "sghmc": sghmc}


def network(prior: str = "normal") -> BayesianNeuralNetwork:
    return BayesianNeuralNetwork(MLP(1, 1, (4,), "tanh"), prior=prior)


def without_sites(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0), obs=x)


def with_a_parameter(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(z + pyro.param("shift", torch.zeros(())), 1.0), obs=x)


def with_local_sites(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)


@pytest.mark.parametrize("routine", [map_estimate, ensemble, swag, sghmc])
def test_refuses_programs_without_sites(routine: Callable[..., Posterior]) -> None:
    with pytest.raises(ValueError, match=r"needs latent sites, and the program has none.*BayesianNeuralNetwork"):
        routine(Program.of(without_sites), X[:, 0], **SHORT)


@pytest.mark.parametrize("routine", OF_MEMBERS)
def test_refuses_parameters_beside_sites(routine: str) -> None:
    with pytest.raises(ValueError, match=f"{routine} needs a program whose trained numbers .* 'shift' is a parameter"):
        OF_MEMBERS[routine](Program.of(with_a_parameter), X[:, 0], **SHORT)


@pytest.mark.parametrize("routine", OF_MEMBERS)
def test_refuses_sites_of_rows(routine: str) -> None:
    with pytest.raises(ValueError, match=f"{routine} keeps draws .* but site 'z' belongs to rows"):
        OF_MEMBERS[routine](Program.of(with_local_sites), X[:, 0], **SHORT)
    with pytest.raises(ValueError, match="belongs to rows"):
        OF_MEMBERS[routine](VAE((1,), likelihood="normal"), X, **SHORT)


def test_refuses_statistics_of_every_member() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    net.requires_grad_(False)

    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x)[:, 0], scale), obs=x[:, 0])

    with pytest.raises(ValueError, match=r"every step changes buffer '.*running_mean'.*net\.eval\(\)"):
        ensemble(Program.of(model), X, steps=2, **SHORT)


@pytest.mark.parametrize(
    ("routine", "options", "message"),
    [
        (ensemble, {"members": 0}, "members must be a whole number of at least 1; got 0"),
        (ensemble, {"members": True}, "members must be a whole number of at least 1; got True"),
        (swag, {"max_rank": 50, "iterates": 10}, "max_rank=50 needs as many iterates, and iterates=10"),
        (swag, {"max_rank": 1}, "max_rank must be a whole number of at least 2; got 1"),
        (swag, {"iterates": 2}, "iterates must be a whole number of at least 3; got 2"),
        (swag, {"learning_rate": -1.0}, "learning_rate must be a positive number; got -1.0"),
        (sghmc, {"friction": -0.1}, "friction must be a positive number; got -0.1"),
        (sghmc, {"friction": 2.0}, "friction must be at most 1, at which no momentum is left; got 2.0"),
        (sghmc, {"chains": 0}, "chains must be a whole number of at least 1; got 0"),
        (sghmc, {"step_size": 0}, "step_size must be a positive number; got 0"),
        (sghmc, {"cyclical": 3, "draws": 10}, r"draws must be a multiple of the number of cycles, 3; got 10.*draws=9"),
        (sghmc, {"warmup": 0}, "warmup must be a whole number of at least 2; got 0"),
    ],
)
def test_refuses_numbers_out_of_range(routine: Callable[..., Posterior], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        routine(network(), (X, X), **SHORT, **options)


def test_bootstrap_needs_the_plate_over_rows() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"does not name the plate over rows.*data_plate"):
        ensemble(Program.of(model), X[:, 0], bootstrap=True, **SHORT)


def test_kept_weights_have_nothing_to_vary() -> None:
    with pytest.warns(UserWarning, match="members=2 has nothing to vary: weights='keep'"):
        known = BayesianNeuralNetwork(MLP(1, 1, (4,), "tanh"), prior="normal", noise=0.1)
        ensemble(known, (X, X), members=2, weights="keep", steps=2, **SHORT)


def broken(y: Tensor) -> None:
    """The density is not a number where the latent is negative."""
    loc = pyro.sample("loc", dist.Normal(1.0, 0.5))
    with pyro.plate("data", len(y)):
        mean = torch.where(loc > 0.0, loc, torch.nan)
        pyro.sample("y", dist.Normal(mean, 1.0, validate_args=False), obs=y)


@pytest.mark.filterwarnings("ignore:.*is out")
def test_members_that_skip_steps_are_named() -> None:
    with pytest.warns(UserWarning, match=r"were skipped: member \d 20 steps.*leaves out member"):
        posterior = ensemble(Program.of(broken), 2.0 + X[:, 0], members=8, steps=30, seed=2, **SHORT)
    out = posterior.config["left_out"]
    assert out
    assert [k for k, n in enumerate(posterior.config["skipped"]) if n] == out
    assert posterior.chains is not None
    assert len(posterior.chains["loc"]) == 8 - len(out)
    assert (posterior.chains["loc"] > 0.0).all()


def test_all_members_step_at_once_as_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_compiler(monkeypatch)
    options: dict[str, Any] = {"members": 3, "steps": 20, "batch_size": 8, "progress": False}
    together, in_turn = (ensemble(network(), (X, X), compile=c, **options) for c in (True, False))
    assert together.chains is not None
    assert in_turn.chains is not None
    assert together.config["compiled"]
    for name, value in in_turn.chains.items():
        assert torch.allclose(together.chains[name], value, atol=1e-4), name


def test_checkpoints_keep_iterates(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 10, "batch_size": 10, "iterates": 6, "max_rank": 4, "every": 4} | SHORT
    whole = swag(network(), (X, X), **options)
    stopped = [Checkpoint(tmp_path / "c", every=1), lambda fit: fit.step >= 22]
    swag(network(), (X, X), callbacks=stopped, **options)
    resumed = swag(network(), (X, X), callbacks=[Checkpoint(tmp_path / "c", every=1, resume=True)], **options)
    for name, value in whole.sample(draws=5).items():
        assert torch.allclose(resumed.sample(draws=5)[name], value, atol=1e-6)


def test_a_short_swag_returns_the_mode() -> None:
    options: dict[str, Any] = {"steps": 30, "iterates": 6, "max_rank": 4, "every": 4} | SHORT
    posterior = swag(network(), (X, X), callbacks=[lambda fit: fit.step >= 10], **options)
    assert posterior.kind == "draws"
    assert posterior.chains is not None
    assert posterior.chains["noise"].shape == (1, 1, 1)


class Function(nn.Module):
    """A network that drops units by a call, and not by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(nn.functional.dropout(x, 0.1, self.training))


def test_dropout_refuses_networks_without_it() -> None:
    for net in (nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.0)), Function()):
        with pytest.raises(
            ValueError, match=r"with dropout layers.*functional\.dropout is no layer.*nn\.Dropout\(0\.1\)"
        ):
            dropout(BayesianNeuralNetwork(net), (X, X), **SHORT)


class Own(nn.Dropout):
    """A subclass of a user."""


def test_dropout_is_active_and_all_else_rests(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Tanh(), Own(0.5), nn.AlphaDropout(0.1), nn.Linear(8, 1))
    before = net[1].running_mean.clone()
    program = BayesianNeuralNetwork(net, prior="normal")
    posterior = dropout(program, (X, X), steps=5, **SHORT)
    assert posterior.config["dropout"] == {"net.3": 0.5, "net.4": 0.1}
    posterior.save(tmp_path / "p")
    for fitted in (posterior, Posterior.load(tmp_path / "p", BayesianNeuralNetwork(net, prior="normal"))):
        parts = dict(fitted.program.named_modules())
        assert [parts[f"net.{i}"].training for i in range(6)] == [False, False, False, True, True, False]
        assert torch.equal(parts["net.1"].running_mean, before)
        assert float(fitted.predict(X, draws=20).epistemic.min()) > 0.0
        masked = fitted.log_likelihood(X, X, draws=20)
        assert len(masked.unique(dim=0)) == 20
    assert not program.active_dropout
    assert not any(part.training for part in program.net.modules())


def test_chains_of_one_draw_are_judged() -> None:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    exact = torch.randn(300, 1, generator=torch.Generator().manual_seed(0)) / 21.0**0.5
    posterior = draws_posterior(Program.of(model), X[:, 0], {"loc": exact})
    assert posterior.accuracy is not None
    shift, error = posterior.accuracy.by_gradients["loc"][:2, 0].tolist()
    assert abs(shift) < 4.0 * error < 0.5
