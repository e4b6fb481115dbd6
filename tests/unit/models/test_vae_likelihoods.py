"""A VAE under every likelihood: fits, queries, saves, and the outputs that its decoder needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deepprob as dp
from deepprob.inference import svi
from deepprob.models import VAE, DeepMarkovModel
from deepprob.networks.likelihood import LIKELIHOODS


def rows(family: str) -> Tensor:
    g = torch.Generator().manual_seed(0)
    grey = torch.randint(0, 5, (30, 3, 2), generator=g) / 4
    if family == "categorical":
        return (4 * grey).long()
    if "poisson" in family or "negative" in family:
        return torch.poisson(8 * grey, generator=g)
    return torch.randn(30, 3, 2, generator=g) if family in ("normal", "student_t") else grey


@pytest.mark.parametrize("network", ["dense", "conv"])
@pytest.mark.parametrize("family", LIKELIHOODS)
def test_every_likelihood_fits_saves_and_answers(family: str, network: str, tmp_path: Path) -> None:
    x, classes = rows(family), 5 if family in ("categorical", "discretized_logistic") else None
    program = VAE((3, 2), 2, (4,), likelihood=family, num_classes=classes, network=network)
    posterior = svi(program, x, steps=3, progress=False)
    assert posterior.log_evidence(x, particles=3).isfinite().all()
    assert posterior.predict(x, draws=3).draws.shape[:2] == (3, 30)
    assert posterior.reconstruct(x, draws=3).mean.shape[:3] == (30, 3, 2)
    posterior.save(tmp_path / "fit")
    again = dp.Posterior.load(tmp_path / "fit")
    torch.testing.assert_close(again.log_likelihood(x, draws=2), posterior.log_likelihood(x, draws=2))


def test_levels_are_those_of_the_data() -> None:
    assert VAE((3,), likelihood="discretized_logistic").num_classes == 256
    program = VAE((3, 2), 2, (4,), likelihood="discretized_logistic", num_classes=5)
    assert program.decode(torch.zeros(1, 2)).base_dist.levels == 5


def test_a_gate_learns_the_share_of_structural_zeros() -> None:
    """70 % of the rows' counts are zeros of a gate: the bound of the model with a gate is higher."""
    g = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.full((300, 6), 9.0), generator=g) * (torch.rand(300, 6, generator=g) < 0.3)
    found: dict[str, Any] = {}
    for family in ("poisson", "zero_inflated_poisson"):
        program = VAE((6,), 1, (), likelihood=family)
        found[family] = svi(program, x, steps=500, optimizer=dp.Optimizer(learning_rate=2e-2), progress=False)
    bounds = {family: float(fit.elbo(x).mean()) for family, fit in found.items()}
    assert bounds["zero_inflated_poisson"] > bounds["poisson"] + 5.0, bounds
    gate = found["zero_inflated_poisson"].decode(torch.zeros(1, 1)).draws.eq(0).float().mean()
    assert abs(float(gate) - 0.7) < 0.12


def test_outliers_are_cheaper_under_student_t() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=g)
    x[::20] *= 30
    found = {}
    for family in ("normal", "student_t"):
        program = VAE((4,), 1, (), likelihood=family)
        fit = svi(program, x, steps=800, optimizer=dp.Optimizer(learning_rate=2e-2), progress=False)
        found[family] = float(fit.log_evidence(x, particles=50).mean())
    assert found["student_t"] > found["normal"] + 1.0, found


def test_a_deep_markov_model_refuses_families_of_fixed_rows_in_words() -> None:
    message = (
        "likelihood='student_t' is for rows of a fixed size. For sequences, choose from: bernoulli, categorical, n"
    )
    with pytest.raises(ValueError, match=message):
        DeepMarkovModel(3, likelihood="student_t")
