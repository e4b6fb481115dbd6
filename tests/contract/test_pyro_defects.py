"""Defects of Pyro, each beside a test that deepprob does not have it."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam
from torch import Tensor, nn

from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

_G = torch.Generator().manual_seed(0)
X = torch.randn(30, 3, generator=_G)
Y = X @ torch.tensor([1.0, -2.0, 0.5]) + 0.7


@pytest.fixture
def global_store() -> Any:
    """Pyro's global store, empty before and after the test."""
    pyro.clear_param_store()
    with torch.random.fork_rng():
        yield
    pyro.clear_param_store()


def two_latents(y: Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 30):
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


def forgetful(y: Tensor | None = None) -> None:
    pyro.sample("a", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


class Lifted(PyroModule):
    """A linear regression with an ``nn.Linear`` layer whose weights are latent."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = PyroModule[nn.Linear](3, 1)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.layer(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.1), obs=y)
        return mean


# -- a guide without a latent site --------------------------------------------------------------------------------


def test_pyro_only_warns_of_a_guide_without_a_latent_site(global_store: Any) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        SVI(two_latents, forgetful, Adam({"lr": 0.01}), Trace_ELBO()).step(Y)
    assert any("Found vars in model but not guide: {'b'}" in str(w.message) for w in seen)


def test_guide_without_a_latent_site_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"the guide has no site 'b' but the model samples it\. Add pyro\.sample\(\"b\""
    ):
        svi(Program.of(two_latents, forgetful), Y)


def test_message_names_the_program_class() -> None:
    class Mixture(Program):
        def model(self, y: Tensor | None = None) -> None:
            two_latents(y)

        def guide(self, y: Tensor | None = None) -> None:
            forgetful(y)

    with pytest.raises(ValueError, match=r"Mixture guide has no site 'b' but the model samples it"):
        svi(Mixture(), Y)


# -- a lazy guide's state -----------------------------------------------------------------------------------------


def test_pyro_cannot_load_the_state_of_a_lazy_guide(global_store: Any) -> None:
    guide = AutoNormal(two_latents)
    guide(Y)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        AutoNormal(two_latents).load_state_dict(guide.state_dict())


_FRESH = """
import json, sys, torch
sys.path.insert(0, {folder!r})
from test_pyro_defects import Y, two_latents
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program
posterior = Posterior.load({path!r}, program=Program.of(two_latents, "normal", data_plate="data"))
print(json.dumps(posterior.log_likelihood(Y, draws=4).double().tolist()))
"""


def test_lazy_guide_loads_in_a_fresh_process(tmp_path: Path) -> None:
    posterior = svi(Program.of(two_latents, "normal", data_plate="data"), Y, epochs=5)
    posterior.save(tmp_path / "p")
    code = _FRESH.format(folder=str(Path(__file__).parent), path=str(tmp_path / "p"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = posterior.log_likelihood(Y, draws=4).double()
    assert torch.allclose(torch.tensor(json.loads(done.stdout), dtype=torch.float64), here, rtol=0, atol=1e-6)
    assert isinstance(posterior, Posterior)


# -- predictions of a lifted layer --------------------------------------------------------------------------------


def test_pyro_cannot_predict_a_lifted_layer_in_parallel(global_store: Any) -> None:
    model = Lifted()
    guide = AutoNormal(model)
    guide(X, Y)
    with pytest.raises((RuntimeError, ValueError)):
        Predictive(model, guide=guide, num_samples=5, parallel=True)(X)


@pytest.mark.parametrize("guide", ["normal", "multivariate_normal", "low_rank"])
def test_lifted_layer_predicts_all_draws_at_once(guide: str) -> None:
    posterior = svi(
        Program.of(Lifted(), guide, data_plate="data"), (X, Y), epochs=300, optimizer=Optimizer(learning_rate=0.05)
    )
    prediction = posterior.predict(X[:7], draws=50)
    assert prediction.draws.shape == (50, 7)
    draws = posterior.sample(draws=50)
    assert {n: tuple(v.shape) for n, v in draws.items()} == {"layer.weight": (50, 1, 3), "layer.bias": (50, 1)}
    by_hand = X[:7] @ draws["layer.weight"].mean(0)[0] + draws["layer.bias"].mean()
    assert torch.allclose(prediction.mean, by_hand, atol=1e-4)
    assert torch.allclose(prediction.mean, Y[:7], atol=0.3)


# -- ArviZ --------------------------------------------------------------------------------------------------------


def test_arviz_refuses_pyros_svi() -> None:
    fitted = SVI(two_latents, AutoNormal(two_latents), Adam({"lr": 0.01}), Trace_ELBO())
    convert = getattr(arviz, "from_pyro", None)
    if convert is not None:
        with pytest.raises((AttributeError, TypeError, ValueError)):
            convert(fitted)


def test_arviz_takes_our_svi_posterior() -> None:
    posterior = svi(Program.of(two_latents, "normal", data_plate="data"), Y, epochs=5)
    idata = posterior.to_arviz(Y, draws=40)
    assert idata.log_likelihood["y"].shape == (1, 40, 30)
    assert idata.posterior["a"].shape == (1, 40)
    assert idata.posterior_predictive["y"].shape == (1, 40, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LOO warns of a model this poor
        assert float(arviz.loo(idata).elpd_loo if hasattr(arviz.loo(idata), "elpd_loo") else 0.0) < 0


# -- shapes of scalars --------------------------------------------------------------------------------------------


def test_pyro_returns_scalars_with_an_extra_dimension(global_store: Any) -> None:
    guide = AutoNormal(two_latents)
    guide(Y)
    drawn = Predictive(two_latents, guide=guide, num_samples=6, parallel=True, return_sites=["a"])(Y)
    assert drawn["a"].shape == (6, 1)


def test_scalar_sites_have_one_number_per_draw() -> None:
    posterior = svi(Program.of(two_latents, "normal", data_plate="data"), Y, epochs=1)
    assert {n: tuple(v.shape) for n, v in posterior.sample(draws=6).items()} == {"a": (6,), "b": (6,)}
