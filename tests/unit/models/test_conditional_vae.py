"""The conditional VAE: conditions of every kind, missing values, errors, tiers, save and load."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from torch import Tensor, nn

import deepprob as dp
from deepprob.inference import svi
from deepprob.models import ConditionalVAE
from deepprob.networks.conditional import Conditional
from deepprob.posteriors.posterior import Posterior

RANDOM = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.rand(24, 3, 2, generator=RANDOM), torch.arange(24) % 3
SMALL: dict[str, Any] = {"latent_dim": 2, "hidden_dims": (8,)}

CONDITIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "classes": (LABELS, {"condition_classes": 3}),
    "classes in a column": (LABELS[:, None], {"condition_classes": 3}),
    "several classes": (torch.stack([LABELS, LABELS.flip(0)], 1), {"condition_shape": (2,), "condition_classes": 3}),
    "one number": (torch.randn(24, generator=RANDOM), {}),
    "a vector": (torch.randn(24, 4, generator=RANDOM), {"condition_shape": (4,)}),
    "bools": (LABELS[:, None] == torch.arange(3), {"condition_shape": (3,)}),
    "an image": (torch.rand(24, 4, 4, generator=RANDOM), {"condition_shape": (4, 4)}),
}


@pytest.mark.parametrize("missing", ["refuse", "allow"])
@pytest.mark.parametrize("kind", CONDITIONS)
def test_conditions_of_every_kind(kind: str, missing: str) -> None:
    c, options = CONDITIONS[kind]
    posterior = svi(ConditionalVAE((3, 2), **options, **SMALL, missing=missing), (c, IMAGES), steps=3, progress=False)
    assert posterior.predict(c[:5], draws=4).draws.shape == (4, 5, 3, 2)
    assert posterior.log_evidence(c, IMAGES, particles=7).shape == (24,)
    assert posterior.encode(c, IMAGES).mean.shape == (24, 2)  # type: ignore[union-attr]


def test_without_rows_the_codes_come_from_the_prior() -> None:
    c, options = CONDITIONS["a vector"]
    posterior = svi(ConditionalVAE((3, 2), **options, **SMALL), (c, IMAGES), steps=3, progress=False)
    found, prior = posterior.encode(c), posterior.program.code_prior(c)
    torch.testing.assert_close(found.mean, prior.mean)
    torch.testing.assert_close(found.sd, prior.variance.sqrt())
    assert not torch.allclose(posterior.encode(c, IMAGES).mean, prior.mean)  # type: ignore[arg-type]


def test_the_condition_changes_every_network() -> None:
    program = ConditionalVAE((3, 2), (4,), **SMALL)
    c = torch.randn(24, 4, generator=RANDOM)
    z, bits = torch.zeros(24, 2), (IMAGES > 0.5).float()
    for made in (lambda c: program.code_prior(c), lambda c: program.encode(bits, c), lambda c: program.decode(z, c)):
        assert not torch.allclose(made(c).mean, made(c.flip(0)).mean)


def test_units_of_a_condition_have_no_influence() -> None:
    c, options = CONDITIONS["a vector"]
    scores = [
        svi(ConditionalVAE((3, 2), **options, **SMALL), (x, IMAGES), steps=3, progress=False).elbo(x, IMAGES)
        for x in (c, 1000 + 50 * c)
    ]
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-3)


def test_custom_networks_see_rows_and_conditions() -> None:
    class Net(nn.Module):
        def __init__(self, first: int, second: int, outputs: int) -> None:
            super().__init__()
            self.net = nn.Bilinear(first, second, outputs)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return self.net(x.flatten(1), c.flatten(1))

    size = Conditional.size("normal", (2,))
    program = ConditionalVAE(
        (3, 2), (4,), 2, encoder=Net(6, 4, size), decoder=Net(2, 4, 6), prior_network=nn.Linear(4, 4)
    )
    c, _ = CONDITIONS["a vector"]
    posterior = svi(program, (c, IMAGES), steps=2, progress=False)
    assert program.config is None and not program.built
    assert posterior.log_evidence(c, IMAGES, particles=5).isfinite().all()
    with pytest.raises(
        ValueError, match=r"prior_network returns 3 outputs per row, but 'normal' over codes of shape \(2,\) needs 4"
    ):
        svi(ConditionalVAE((3, 2), (4,), 2, prior_network=nn.Linear(4, 3)), (c, IMAGES), steps=1)


# Missing values ----------------------------------------------------------------------------------------------------

KNOWN = torch.rand(24, 3, 2, generator=RANDOM) < 0.5
CONDITION, REST = torch.where(KNOWN, IMAGES, torch.nan), torch.where(KNOWN, torch.nan, IMAGES)


@pytest.fixture(scope="module")
def completing() -> Posterior:
    program = ConditionalVAE((3, 2), (3, 2), **SMALL, missing="allow")
    return svi(program, (CONDITION, REST), epochs=3, batch_size=8, progress=False)


def test_a_missing_value_has_no_influence(completing: Posterior) -> None:
    """The likelihood of a row is the sum over its known pixels, and units count them."""
    program, z = completing.program, torch.randn(24, 2, generator=RANDOM)
    bits = torch.where(KNOWN, torch.nan, (IMAGES > 0.5).float())
    with program.bound(torch.arange(24), 24):
        trace = pyro.poutine.trace(pyro.poutine.condition(program.model, {"z": z})).get_trace(CONDITION, bits)
    trace.compute_log_prob()
    each = program.decode(z, CONDITION).base_dist.log_prob(bits.nan_to_num())
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], torch.where(KNOWN, 0.0, each).sum((1, 2)))
    assert torch.equal(program.units(CONDITION, bits), (~KNOWN).sum((1, 2)).clamp(min=1).float())


def test_unknown_pixels_are_predicted_and_imputed(completing: Posterior) -> None:
    assert completing.predict(CONDITION, draws=5).mean.isfinite().all()
    bits = (IMAGES > 0.5).float()
    filled = completing.impute(CONDITION, torch.where(KNOWN, torch.nan, bits), draws=5).draws
    assert torch.equal(filled[:, ~KNOWN], bits[~KNOWN].expand(5, -1)) and filled.isfinite().all()


def test_a_row_without_known_values_has_evidence_one(completing: Posterior) -> None:
    nothing = torch.full_like(IMAGES, torch.nan)
    weights = completing.log_weights(CONDITION, nothing, particles=4000)
    # The mean weight is exactly 1 in expectation; the encoder is nearly the prior after three epochs.
    error = weights.exp().std(0) / 4000**0.5
    assert ((weights.exp().mean(0) - 1).abs() < 4.5 * error + 1e-6).all()


def test_missing_classes() -> None:
    c = torch.where(torch.arange(24) < 4, torch.nan, LABELS.float())
    program = ConditionalVAE((3, 2), condition_classes=3, **SMALL, missing="allow")
    posterior = svi(program, (c, IMAGES), steps=3, progress=False)
    assert posterior.predict(c, draws=3).mean.isfinite().all()
    rows = torch.where(KNOWN, (IMAGES * 3).floor(), torch.nan)
    classes = ConditionalVAE((3, 2), (4,), **SMALL, likelihood="categorical", num_classes=3, missing="allow")
    given = CONDITIONS["a vector"][0]
    posterior = svi(classes, (given, rows), steps=3, progress=False)
    assert posterior.log_evidence(given, rows).isfinite().all()
    assert set(posterior.impute(given, rows, draws=3).draws.unique().tolist()) <= {0.0, 1.0, 2.0}


def test_missing_values_are_refused_by_default() -> None:
    c, options = CONDITIONS["a vector"]
    with pytest.raises(
        ValueError, match=r"has 71 NaN values, .* ConditionalVAE\(\.\.\., missing='allow'\) takes them\."
    ):
        svi(ConditionalVAE((3, 2), **options, **SMALL), (c, REST), steps=1)
    kinds = [("real", "a"), ("binary", "b")]
    table = ConditionalVAE((2,), (4,), **SMALL, likelihood=kinds)
    x = torch.stack([IMAGES[:, 0, 0], (IMAGES[:, 0, 1] > 0.5).float()], 1)
    gap = torch.where(torch.arange(4) == 2, torch.nan, c)
    with pytest.raises(
        ValueError, match=r"c has missing values \(NaN\)\. Write ConditionalVAE\(\.\.\., missing='allow'"
    ):
        svi(table, (gap, x), steps=1)
    with pytest.raises(ValueError, match=r"unknown missing 'alow'\. Did you mean 'allow'"):
        ConditionalVAE((3, 2), missing="alow")


def test_rows_of_a_table_of_mixed_columns() -> None:
    c, _ = CONDITIONS["a vector"]
    x = torch.stack([IMAGES[:, 0, 0], (IMAGES[:, 0, 1] > 0.5).float()], 1)
    program = ConditionalVAE((2,), (4,), **SMALL, likelihood=[("real", "a"), ("binary", "b")])
    posterior = svi(program, (c, x), steps=3, progress=False)
    assert posterior.predict(c, draws=3).mean.shape == (24, 2)
    x[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"x has 1 missing value .*, the first in column 'a'; all rows of the fit"):
        posterior.elbo(c, x)
    gaps = svi(program, (c, x), steps=3, progress=False)
    assert gaps.log_evidence(c, x).isfinite().all()


# Data --------------------------------------------------------------------------------------------------------------


def test_from_data_of_a_data_set_conditions_on_its_classes() -> None:
    digits = dp.load_data("digits")
    program = ConditionalVAE.from_data(digits, latent_dim=2, hidden_dims=(8,))
    assert (program.shape, program.condition.num_classes, program.likelihood) == ((8, 8), 10, "bernoulli")
    posterior = svi(program, digits.train, steps=2, held_out=digits.valid, progress=False)
    assert posterior.predict([3, 5], draws=3).mean.shape == (2, 8, 8)
    images, labels = digits.test.tensors
    assert torch.equal(posterior.elbo(digits.test), posterior.elbo(labels, images))


def test_from_data_of_arrays() -> None:
    c = np.random.default_rng(0).normal(size=(24, 4))
    for data in ((c, IMAGES), {"x": IMAGES, "c": c}, dp.Split({"c": torch.from_numpy(c), "x": IMAGES})):
        program = ConditionalVAE.from_data(data, **SMALL)
        assert (program.shape, program.condition_shape, program.missing) == ((3, 2), (4,), "refuse")
        assert svi(program, data, steps=1, progress=False).predict(c, draws=2).mean.shape == (24, 3, 2)
    assert ConditionalVAE.from_data((CONDITION, REST)).missing == "allow"
    assert ConditionalVAE.from_data((c, REST)).likelihood == "bernoulli"
    assert ConditionalVAE.from_data((LABELS, IMAGES)).condition.num_classes == 3


def test_from_data_needs_conditions() -> None:
    with pytest.raises(ValueError, match=r"there are rows but no conditions\. Give a tuple of conditions and rows"):
        ConditionalVAE.from_data(IMAGES)
    with pytest.raises(TypeError, match="takes arrays, not tables"):
        ConditionalVAE.from_data(dp.table(pd.DataFrame({"a": [1.0, 2.0], "b": [0.5, 3.0]})))


def test_wrong_conditions_and_rows() -> None:
    program = ConditionalVAE((3, 2), (4,), **SMALL)
    with pytest.raises(ValueError, match=r"c must be conditions of shape \(4,\); got \(3,\)\. Reshape it, or write"):
        svi(program, (torch.zeros(24, 3), IMAGES), steps=1)
    with pytest.raises(ValueError, match=r"rows must have shape \(3, 2\), as in ConditionalVAE\(\(3, 2\)\)"):
        svi(program, (torch.zeros(24, 4), IMAGES[:, :2]), steps=1)
    with pytest.raises(ValueError, match=r"c must be in 0\.\.2 for num_classes=3; got 3 in row 1"):
        svi(ConditionalVAE((3, 2), condition_classes=3, **SMALL), (torch.tensor([0, 3]), IMAGES[:2]), steps=1)


# Fits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gaps", [False, True])
def test_compiled_and_eager_fits_agree(gaps: bool) -> None:
    data = (CONDITION, REST) if gaps else (IMAGES.flip(0), IMAGES)
    program = ConditionalVAE((3, 2), (3, 2), **SMALL, missing="allow" if gaps else "refuse")
    one, other = (svi(program, data, epochs=4, batch_size=8, compile=tier, progress=False) for tier in (True, False))
    for name, value in one.instance.tensors().items():
        torch.testing.assert_close(value, other.instance.tensors()[name], rtol=1e-3, atol=1e-4, msg=name)


def test_importance_weighted_fit() -> None:
    c, options = CONDITIONS["a vector"]
    program = ConditionalVAE((3, 2), **options, **SMALL)
    posterior = svi(program, (c, IMAGES), epochs=3, batch_size=8, objective="iwae", progress=False)
    assert posterior.config["objective"]["name"] == "iwae" and posterior.log_evidence(c, IMAGES).isfinite().all()


def test_save_and_load(completing: Posterior, tmp_path: Path) -> None:
    program = completing.program
    twin = ConditionalVAE(**json.loads(json.dumps(program.config)))
    assert twin.config == program.config
    completing.save(tmp_path / "saved")
    loaded = Posterior.load(tmp_path / "saved")
    assert torch.equal(loaded.predict(CONDITION, draws=3).draws, completing.predict(CONDITION, draws=3).draws)
    assert torch.equal(loaded.elbo(CONDITION, REST), completing.elbo(CONDITION, REST))
