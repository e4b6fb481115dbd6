"""Other modes, label switching, restarts, repeated rows and guides fitted to each row alone."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import deepprob as dp
from deepprob.diagnostics.checks.amortization import bound_of_own_guides, check_amortization
from deepprob.diagnostics.checks.modes import check_label_switching, check_other_modes, check_restarts
from deepprob.diagnostics.checks.repeats import check_repeats
from deepprob.diagnostics.overlap import Overlap, overlap_of
from deepprob.inference import svi
from deepprob.models import DeepMarkovModel
from deepprob.posteriors.guide_draws import guide_draws
from deepprob.posteriors.label_switching import Switching
from deepprob.posteriors.other_modes import OtherMode, density_to_search, other_mode
from deepprob.posteriors.posterior import Posterior
from deepprob.posteriors.training_rows import TrainingRows
from deepprob.programs.tracing import LogDensity


def two_heaps(y: Tensor) -> None:
    """A location of which the data leave two values, near -4 with three readings and near 4 with six."""
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.StudentT(1.0, loc, 0.3), obs=y)


def at(start: float) -> object:
    def guide(y: Tensor) -> None:
        loc = pyro.param("m", torch.tensor(start))
        pyro.sample("loc", dist.Normal(loc, pyro.param("s", torch.tensor(0.2), constraint=dist.constraints.positive)))

    return guide


HEAPS = torch.tensor([-4.1, -4.0, -3.9, 3.8, 3.9, 4.0, 4.0, 4.1, 4.2])


def found_from(posterior: Posterior, batch: tuple[Tensor, ...]) -> OtherMode | None:
    draws = guide_draws(posterior._fitted, batch, 200, 0)
    evidence = float(draws.log_weights.logsumexp(0) - np.log(200))
    density = density_to_search(posterior._fitted, batch, draws.values)
    return other_mode(posterior._fitted, batch, density, draws.values, evidence, 0)


def test_a_guide_at_the_smaller_mode_is_told_of_the_larger_one() -> None:
    posterior = svi(dp.Program.of(two_heaps, at(-4.0)), HEAPS, steps=400, progress=False, compile=False)
    found = found_from(posterior, (HEAPS,))
    assert found is not None and found.site == "loc" and found.log_mass > 0 and found.distance > 10
    assert check_other_modes(found).verdict == "fail"


def test_a_guide_at_the_only_mode_has_no_other() -> None:
    y = HEAPS[3:]
    posterior = svi(dp.Program.of(two_heaps, at(4.0)), y, steps=400, progress=False, compile=False)
    assert found_from(posterior, (y,)) is None


def test_a_search_is_for_few_numbers_that_all_rows_share() -> None:
    def many(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(40), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(w.sum(-1, keepdim=True), 1.0), obs=y)

    posterior = svi(dp.Program.of(many, "normal"), HEAPS, steps=2, progress=False, compile=False)
    with pytest.raises(ValueError, match="at most 30 numbers that all rows share"):
        found_from(posterior, (HEAPS,))


def test_labels_are_counted_as_orders() -> None:
    check = check_label_switching(Switching(("weights", "locs"), 3))
    assert (check.value, check.verdict) == (6.0, "caution")
    assert "3 entries of weights and locs can change places" in check.reading
    assert check_label_switching(None).verdict == "pass"


def test_restarts_that_end_elsewhere_with_as_high_a_bound_are_a_caution() -> None:
    assert check_restarts([0.0, 0.1, 0.2], [0.0, 0.1, 0.1], [0.0, 0.3, 0.2], 0.1).verdict == "pass"
    apart = check_restarts([0.0, 0.5, 0.2], [0.0, 0.1, 0.1], [0.0, 12.0, 0.2], 0.1)
    assert (apart.value, apart.verdict) == (1.0, "caution") and "12 posterior sds away" in apart.reading
    worse = check_restarts([0.0, 50.0, 0.1], [0.0, 0.1, 0.1], [0.0, 12.0, 0.2], 0.1)
    assert worse.verdict == "pass"
    alone = check_restarts([0.0, 50.0, 70.0], [0.0, 0.1, 0.1], [0.0, 12.0, 9.0], 0.1)
    assert alone.verdict == "caution" and "a better one may exist" in alone.reading


def test_copies_among_the_training_rows_are_told_from_a_population_of_few_rows() -> None:
    rng = np.random.default_rng(0)
    real, new = (torch.as_tensor(rng.normal(size=(60, 2))) for _ in range(2))
    copied = overlap_of(TrainingRows.of((real.repeat(4, 1),)), (new,), 60)
    assert check_repeats(copied).verdict == "fail"
    binary, fresh = (torch.as_tensor(rng.integers(0, 2, size=(n, 3))) for n in (240, 60))
    assert check_repeats(overlap_of(TrainingRows.of((binary,)), (fresh,), 60)).verdict == "pass"
    assert check_repeats(overlap_of(TrainingRows.of((real,)), (new,), 60)).verdict == "pass"


def test_level_of_repeated_rows_in_tables_of_few_rows() -> None:
    """At a level of 0.001, no report of 200 may name copies that are none."""
    rng, alarms = np.random.default_rng(1), 0
    for trial in range(200):
        kinds = [20, 200, 1000][trial % 3]
        table, new = (torch.as_tensor(rng.zipf(1.3, size=(n, 1)) % kinds) for n in (300, 80))
        alarms += check_repeats(overlap_of(TrainingRows.of((table,)), (new,), 80)).verdict != "pass"
    assert alarms == 0


def test_amortization_gap_has_limits_by_number_of_latents() -> None:
    assert check_amortization(0.2, 0.01, numbers=8, rows=64, looseness=0.3).verdict == "pass"
    assert check_amortization(0.6, 0.01, numbers=8, rows=64, looseness=0.9).verdict == "caution"
    assert check_amortization(3.0, 0.01, numbers=8, rows=64, looseness=3.5).verdict == "fail"
    assert "below the guide's" in check_amortization(-0.1, 0.02, numbers=2, rows=64, looseness=0.0).reading


def test_guides_fitted_to_each_row_find_independent_normals() -> None:
    """The density of normals: the bound reaches their log-evidence, from a start two sds off."""
    mean, sd = torch.tensor([3.0, -2.0, 0.5]), torch.tensor([0.1, 2.0, 1.0])
    target = dist.Normal(mean, sd)

    def function(q: Tensor, _: list[Tensor], __: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return target.log_prob(q).sum(1) + 7.0, -(q - mean) / sd**2

    density = LogDensity(function, [], (), {"z": torch.Size([3])}, 3, dict)  # type: ignore[arg-type]
    bound = bound_of_own_guides(density, mean + 2 * sd, 1.5 * sd, 0)
    assert bound.mean().item() == pytest.approx(7.0, abs=0.05)


def test_latents_beyond_the_end_of_a_sequence_have_no_gap() -> None:
    example = DeepMarkovModel.example()
    posterior = svi(example.program, example.data, steps=60, progress=False, compile=False)
    found = dp.check(posterior, example.data)["amortization gap"]
    steps = int(example.data[1].sum())
    assert math.isfinite(found.value) and found.details["numbers"] == math.ceil(2 * steps / 24)


def test_overlap_of_unknown_rows_asks_nothing() -> None:
    unknown = overlap_of(None, (HEAPS,), 9)
    assert unknown.relation == "unknown" and isinstance(unknown, Overlap)


@pytest.mark.parametrize("times", [1, 3])
def test_copies_are_seen_in_the_training_data_themselves(times: int) -> None:
    def readings(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.randn(40, generator=torch.Generator().manual_seed(0)).repeat(times)
    posterior = svi(dp.Program.of(readings, "normal"), y, steps=400, progress=False, compile=False)
    report = dp.check(posterior, y)
    if times == 1:
        assert "repeated rows" not in {check.name for check in report.checks}
    else:
        assert report["repeated rows"].verdict == "fail" and "not for conclusions about mu" in report.decision


def test_values_of_few_levels_are_no_copies() -> None:
    grades = torch.arange(60.0) % 5

    def counts(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    posterior = svi(dp.Program.of(counts, "normal"), grades, steps=100, progress=False, compile=False)
    assert "repeated rows" not in {check.name for check in dp.check(posterior, grades).checks}
