"""The hierarchical VAE: layers, errors, guides, tiers, save and load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import deepprob as dp
from deepprob.fitting.objectives import ELBO
from deepprob.inference import svi
from deepprob.models import VAE, HierarchicalVAE
from deepprob.models.hierarchical_vae import _product
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.kl import closed_form_kls
from deepprob.programs.run import Run, run_program

IMAGES = torch.rand(24, 3, 2, generator=torch.Generator().manual_seed(0))
INFERENCE = ("bottom_up", "top_down")


def vae(inference: str = "bottom_up", **options: Any) -> HierarchicalVAE:
    return HierarchicalVAE((3, 2), **{"latent_dims": (4, 3, 2), "hidden_dims": (8,), "inference": inference} | options)


@pytest.fixture(scope="module", params=INFERENCE)
def posterior(request: pytest.FixtureRequest) -> Posterior:
    return svi(vae(request.param), IMAGES, epochs=3, batch_size=8, progress=False)


def test_every_layer_is_a_site(posterior: Posterior) -> None:
    codes = posterior.encode(IMAGES)
    assert {name: tuple(mean.shape) for name, mean in codes.mean.items()} == {  # type: ignore[union-attr]
        "z1": (24, 4),
        "z2": (24, 3),
        "z3": (24, 2),
    }
    first = "z1" if posterior.program.inference == "bottom_up" else "z3"
    assert first not in codes.estimated or len(codes.estimated) == 3
    assert posterior.decode({"z3": torch.zeros(5, 2)}, draws=20).mean.shape == (5, 3, 2)
    assert posterior.decode({"z1": torch.zeros(5, 4)}, draws=2).sd.shape == (5, 3, 2)
    assert posterior.predict_prior(7).mean.shape == (7, 3, 2)
    assert posterior.log_evidence(IMAGES, particles=9).shape == (24,)


def test_layers_of_burda_et_al() -> None:
    program = HierarchicalVAE((28, 28), (100, 50), ((200, 200), (100, 100)), activation="tanh")
    shapes = {name: tuple(value.shape) for name, value in program.named_parameters() if name.endswith("weight")}
    assert list(shapes.values()) == [
        *((200, 784), (200, 200), (200, 200)),  # q(z1 | x)
        *((200, 100), (200, 200), (784, 200)),  # p(x | z1)
        *((100, 100), (100, 100), (100, 100)),  # q(z2 | z1)
        *((100, 50), (100, 100), (200, 100)),  # p(z1 | z2)
    ]


@pytest.mark.parametrize("inference", INFERENCE)
def test_the_layers_with_a_closed_form_kl(inference: str) -> None:
    """The KL given earlier draws is exact for the top layer, and in a ladder for every layer."""
    program = vae(inference)
    bits = (IMAGES > 0.5).float()
    with torch.no_grad():
        traces = run_program(Run(program, (bits,), torch.arange(24), 24))
    assert set(closed_form_kls(*traces)) == ({"z3"} if inference == "bottom_up" else {"z1", "z2", "z3"})


def test_closed_forms_change_the_noise_of_the_bound_only(posterior: Posterior) -> None:
    program = posterior.program
    found = {}
    for closed in (True, False):
        with torch.no_grad(), posterior.instance.running():
            torch.manual_seed(0)
            run = Run(program, ((IMAGES > 0.5).float(),), torch.arange(24), 24)
            bounds = torch.stack([ELBO(analytic_kl=closed)(run)[1]["elbo"] for _ in range(100)])
            found[closed] = bounds.mean(), bounds.std() / 100**0.5
    difference = found[True][0] - found[False][0]
    assert abs(float(difference)) < 4.5 * float((found[True][1] ** 2 + found[False][1] ** 2).sqrt())


def test_product_of_normals() -> None:
    one, other, z = dist.Normal(1.0, 0.5), dist.Normal(-2.0, 2.0), torch.linspace(-3, 3, 7)
    one, other = (dist.Normal(*(torch.as_tensor(x) for x in (d.loc, d.scale))) for d in (one, other))
    ratio = _product(one, other).log_prob(z) - one.log_prob(z) - other.log_prob(z)
    torch.testing.assert_close(ratio, ratio[:1].expand(7))


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"latent_dims must have at least two layers; got \[4\]\. For one, choose VAE"):
        HierarchicalVAE((3, 2), (4,))
    with pytest.raises(ValueError, match=r"hidden_dims has sizes for 3 layers, but latent_dims has 2\. Give one"):
        HierarchicalVAE((3, 2), (4, 2), ((8,), (8,), (8,)))
    with pytest.raises(TypeError, match="hidden_dims must be a sequence for every layer; got 8"):
        HierarchicalVAE((3, 2), (4, 2), 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown inference 'topdown'\. Did you mean 'top_down'"):
        vae("topdown")
    with pytest.raises(ValueError, match=r"encoder returns 4 outputs per row, but .* needs 8"):
        vae(encoder=nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"as in HierarchicalVAE\(\(3, 2\)\)"):
        svi(vae(), IMAGES[:, :2], steps=1)


def test_custom_networks_of_the_lowest_layer() -> None:
    encoder, decoder = nn.Sequential(nn.Flatten(), nn.Linear(6, 8)), nn.Linear(4, 6)
    program = vae(encoder=encoder, decoder=decoder)
    assert program.config is None and program.built == [program.upward, program.downward]
    assert svi(program, IMAGES, steps=2, progress=False).predict(IMAGES, draws=3).mean.shape == (24, 3, 2)


@pytest.mark.parametrize("likelihood", ["normal", "poisson", "negative_binomial", "categorical"])
def test_likelihoods(likelihood: str) -> None:
    options = {"num_classes": 4} if likelihood == "categorical" else {}
    posterior = svi(vae(likelihood=likelihood, **options), (3 * IMAGES).floor(), steps=2, progress=False)
    assert posterior.log_evidence((3 * IMAGES).floor()).isfinite().all()


def test_from_data_and_missing_values() -> None:
    assert HierarchicalVAE.from_data(dp.load_data("digits")).shape == (8, 8)
    kinds = [("real", "a"), ("binary", "b")]
    x = torch.stack([IMAGES[:, 0, 0], (IMAGES[:, 0, 1] > 0.5).float()], 1)
    x[0, 0] = torch.nan
    posterior = svi(HierarchicalVAE((2,), (2, 1), (4,), kinds), x, steps=3, progress=False)
    assert posterior.impute(x, draws=3).draws.isfinite().all()


@pytest.mark.parametrize(("inference", "objective"), [("bottom_up", "iwae"), ("top_down", "elbo")])
def test_compiled_and_eager_fits_agree(inference: str, objective: str) -> None:
    options: dict[str, Any] = {"steps": 12, "batch_size": 8, "objective": objective, "progress": False}
    one, other = (svi(vae(inference, latent_dims=(3, 2)), IMAGES, compile=tier, **options) for tier in (True, False))
    for name, value in one.instance.tensors().items():
        torch.testing.assert_close(value, other.instance.tensors()[name], rtol=1e-3, atol=1e-4, msg=name)


def test_save_and_load(posterior: Posterior, tmp_path: Path) -> None:
    twin = HierarchicalVAE(**json.loads(json.dumps(posterior.program.config)))
    assert twin.config == posterior.program.config
    posterior.save(tmp_path / "saved")
    loaded = Posterior.load(tmp_path / "saved")
    assert torch.equal(loaded.elbo(IMAGES), posterior.elbo(IMAGES))
    assert torch.equal(loaded.predict_prior(5).draws, posterior.predict_prior(5).draws)


def test_a_vae_has_the_lowest_layer() -> None:
    """The networks next to the rows are those of a VAE with these sizes."""
    own, one = vae(), VAE((3, 2), 4, (8,))
    for name in ("encoder", "decoder"):
        shapes = [[p.shape for p in getattr(program, name).parameters()] for program in (own, one)]
        assert shapes[0] == shapes[1]
