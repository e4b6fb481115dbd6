"""A VAE of a table of mixed columns: shapes, errors, missing values, tiers, save and load."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.distributions import Columns
from deepprob.inference import svi
from deepprob.models import VAE
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

KINDS = [("real", "age"), ("categories", "island", 3), ("binary", "smoker"), ("overdispersed", "visits")]


def rows(count: int = 24, gaps: bool = False) -> Tensor:
    g = torch.Generator().manual_seed(0)
    island = torch.nn.functional.one_hot(torch.randint(3, (count,), generator=g), 3)
    x = torch.cat(
        [
            40 + 10 * torch.randn(count, 1, generator=g),
            island,
            (torch.rand(count, 1, generator=g) < 0.4),
            torch.poisson(torch.full((count, 1), 4.0), generator=g),
        ],
        1,
    ).to(torch.get_default_dtype())
    if gaps:
        x[0, 0] = x[1, 1:4] = x[2, 4] = x[3, 5] = x[4] = math.nan
    return x


def vae() -> VAE:
    return VAE((6,), latent_dim=2, hidden_dims=(8,), likelihood=KINDS)


@pytest.fixture(scope="module", params=[False, True], ids=["complete", "gaps"])
def posterior(request: pytest.FixtureRequest) -> Posterior:
    return svi(vae(), rows(gaps=request.param), epochs=3, batch_size=8, seed=0, progress=False)


def test_config_rebuilds_the_program() -> None:
    program = vae()
    twin = VAE(**json.loads(json.dumps(program.config)))
    assert twin.config == program.config and twin.table is not None and twin.table.names[1] == "island=0"


def test_a_shape_that_does_not_fit_the_columns_is_refused() -> None:
    with pytest.raises(ValueError, match=r"likelihood has 6 columns \(age, island=0, .*\); got shape=\(5,\). Write"):
        VAE((5,), likelihood=KINDS)
    with pytest.raises(ValueError, match="num_classes is not for columns of different kinds"):
        VAE((6,), likelihood=KINDS, num_classes=3)


def test_a_wrong_value_is_refused_before_the_first_step() -> None:
    x = rows()
    x[3, 4] = 0.5
    with pytest.raises(ValueError, match=r"column 'smoker' of x must be 0 or 1; got 0\.5 in row 3"):
        svi(vae(), x, steps=1, progress=False)


@pytest.mark.parametrize("gaps", [False, True])
def test_compiled_and_eager_fits_agree(gaps: bool) -> None:
    """Draws of a step come from the same noise, and no site of the program is drawn by rejection in a fit."""
    x = rows(gaps=gaps)
    compiled, eager = (
        svi(vae(), x, epochs=4, batch_size=8, seed=0, compile=tier, progress=False) for tier in (True, False)
    )
    for name, value in compiled.instance.tensors().items():
        torch.testing.assert_close(value, eager.instance.tensors()[name], rtol=1e-3, atol=1e-4, msg=name)


def test_save_and_load(posterior: Posterior, tmp_path: Path) -> None:
    x = rows(gaps=not bool(posterior.program.table.complete))  # type: ignore[union-attr]
    posterior.save(tmp_path / "saved")
    loaded = Posterior.load(tmp_path / "saved")
    assert torch.equal(loaded.elbo(x), posterior.elbo(x))
    assert torch.equal(loaded.predict_prior(5).draws, posterior.predict_prior(5).draws)
    assert torch.equal(loaded.impute(x, draws=3).draws, posterior.impute(x, draws=3).draws)


def test_missing_values_after_a_complete_fit() -> None:
    posterior, x = svi(vae(), rows(), epochs=2, seed=0, progress=False), rows()
    x[2, 0], x[5, 2] = math.nan, math.nan
    for query in (posterior.elbo, posterior.encode, posterior.predict):
        with pytest.raises(ValueError, match=r"x has 4 missing values \(NaN\), the first in column 'age'; all rows"):
            query(x)
    filled = posterior.impute(x, draws=4, sweeps=2).draws
    x[5, 1:4] = math.nan
    known = ~x.isnan()
    assert torch.equal(filled[:, known], x[known].expand(4, -1))
    assert filled[:, 5, 1:4].sum(-1).eq(1).all() and filled.isfinite().all()


def test_an_infinite_value_is_refused(posterior: Posterior) -> None:
    x = rows()
    x[0, 0] = math.inf
    with pytest.raises(ValueError, match="inf"):
        posterior.elbo(x)


def test_a_mask_marks_a_whole_block_of_categories(posterior: Posterior) -> None:
    x = rows()
    missing = torch.zeros(24, 6, dtype=torch.bool)
    missing[:, 2] = True
    filled = posterior.impute(x, missing=missing, draws=30, sweeps=1).draws
    assert filled[..., 1:4].sum(-1).eq(1).all()
    assert torch.equal(filled[..., [0, 4, 5]], x[:, [0, 4, 5]].expand(30, -1, -1))


def test_a_program_of_ones_own_observes_columns() -> None:
    """Global latents, a guide by name, and missing values that the distribution leaves out."""
    x = rows(40, gaps=True)[:, [0, 4]]

    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 100.0))
        share = pyro.sample("share", dist.Beta(1.0, 1.0))
        with pyro.plate("data", len(x)):
            blocks = [(dist.Normal(loc.expand(1), 10.0), [0]), (dist.Bernoulli(share.expand(1)), [1])]
            pyro.sample("x", Columns(blocks, ["age", "smoker"]), obs=x)

    program = Program.of(model, "normal", data_plate="data", missing="allow")
    posterior = svi(program, x, steps=600, seed=0, progress=False)
    draws = posterior.sample(draws=2000)
    assert abs(float(draws["loc"].mean()) - float(x[:, 0].nanmean())) < 1.0
    assert abs(float(draws["share"].mean()) - float(x[:, 1].nanmean())) < 0.1
    x[1, 1] = 2.0
    with pytest.raises(ValueError, match="column 'smoker' of x must be 0 or 1 for a Bernoulli likelihood"):
        posterior.log_likelihood(x)
