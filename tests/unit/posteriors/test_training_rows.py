"""The record of the rows of a fit: digests, summaries, and how it is saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.inference import svi
from deepprob.inference.svi import init, step
from deepprob.models import DeepMarkovModel
from deepprob.posteriors import training_rows
from deepprob.posteriors.posterior import Posterior
from deepprob.posteriors.training_rows import TrainingRows, columns_of, digests_of
from deepprob.programs.program import Program

X = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def model(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=None if y is None else y.float())


def record_of(posterior: Posterior) -> TrainingRows:
    assert posterior.training_rows is not None
    return posterior.training_rows


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64, torch.bfloat16])
def test_digests_do_not_depend_on_the_type_nor_on_padding(dtype: torch.dtype) -> None:
    x = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1]])
    padded = torch.cat([x, torch.zeros(2, 5, dtype=x.dtype)], 1).to(dtype)
    assert digests_of((padded,)).tolist() == digests_of((x,)).tolist()
    assert digests_of((-0.0 * torch.ones(2, 1),)).tolist() == [0, 0]


def test_digests_of_rows_that_differ_in_one_number_differ() -> None:
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 12)
    assert TrainingRows.of((every,)).repeats.max() == 1  # type: ignore[union-attr]
    a, b = digests_of((X, Y)), digests_of((X, 1 - Y))
    assert not (a == b).any()
    swapped = digests_of((every, every.flip(1))), digests_of((every.flip(1), every))
    assert (swapped[0] == swapped[1]).sum() == 64  # only palindromes


def test_rows_are_recognized_in_any_order() -> None:
    kept = TrainingRows.of((X, Y))
    assert kept is not None and kept.count == 30 and kept.repeats.tolist() == [1] * 30
    order = torch.randperm(30)
    assert kept.equals(digests_of((X[order], Y[order])))
    assert not kept.equals(digests_of((X[order], Y)))
    assert kept.has(digests_of((torch.cat([X[:5], X[:5] + 1]), Y[:5].repeat(2)))).tolist() == [True] * 5 + [False] * 5
    twice = TrainingRows.of((X.repeat(2, 1),))
    assert twice is not None and twice.repeats.tolist() == [2] * 30


def test_many_rows_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_rows, "MOST_DIGESTS", 10)
    kept = TrainingRows.of((X,))
    assert kept is not None and len(kept.digests) == 10 and kept.count == 30
    assert kept.equals(digests_of((X.flip(0),))) and not kept.equals(digests_of((X + 1,)))


def test_summaries_of_columns() -> None:
    kept = TrainingRows.of((X, Y, torch.rand(30, 10, 10)))
    assert kept is not None
    x, y, image = kept.summaries
    assert x is not None and y is not None and image is not None
    assert x.mean.tolist() == pytest.approx(X.double().mean(0).tolist())
    assert x.sd.tolist() == pytest.approx(X.double().std(0).tolist())
    assert (x.points[:, 5] == np.median(X.numpy(), axis=0)).all() or (np.diff(x.points, axis=1) >= 0).all()
    assert y.classes.tolist() == [0, 1] and y.class_counts.tolist() == [(Y == 0).sum(), (Y == 1).sum()]
    assert set(y.shares[0]) == {float((Y == 0).double().mean()), 1.0}
    assert image.mean.shape == (2,) and columns_of(torch.zeros(3, 2, 2)).shape == (3, 4)


def test_rows_without_numbers_have_a_record() -> None:
    kept = TrainingRows.of((torch.zeros(3, 0), torch.arange(3)))
    assert kept is not None and kept.equals(digests_of((torch.zeros(3, 0), torch.arange(3))))
    assert TrainingRows.restore(kept.to_tensors()) is not None


def test_values_that_are_missing_are_left_out() -> None:
    x = X.clone()
    x[3, 0], x[:, 1] = torch.nan, torch.nan
    kept = TrainingRows.of((x,))
    assert kept is not None and kept.summaries[0] is not None
    assert np.isfinite(kept.summaries[0].mean).tolist() == [True, False] and kept.equals(digests_of((x,)))


def test_every_fit_keeps_the_record_and_saves_it(tmp_path: Path) -> None:
    program = Program.of(model, "normal")
    posterior = svi(program, (X, Y), steps=3, progress=False, compile=False)
    posterior.save(tmp_path / "fit")
    for kept in (record_of(posterior), record_of(Posterior.load(tmp_path / "fit", program))):
        assert kept.equals(digests_of((X, Y)))
        assert [s is not None and s.count for s in kept.summaries] == [30, 30]
    state = init(program, (X, Y))
    step(state)
    assert record_of(state.posterior()).equals(digests_of((X, Y)))


def test_programs_that_hold_their_data_keep_none(tmp_path: Path) -> None:
    program = Program.of(lambda: model(X, Y), "normal")
    posterior = svi(program, steps=3, progress=False, compile=False)
    posterior.save(tmp_path / "fit")
    assert posterior.training_rows is None and Posterior.load(tmp_path / "fit", program).training_rows is None


def test_rows_in_another_dimension_have_one_digest() -> None:
    def transposed(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", x.shape[1]):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x.T)

    kept = record_of(svi(Program.of(transposed, "normal"), X.T.contiguous(), steps=3, progress=False, compile=False))
    assert kept.count == 1 and kept.equals(kept.digests_like((X.T,))) and not kept.equals(kept.digests_like((X.T + 1,)))


def test_sequences_are_recognized_whatever_their_padding() -> None:
    x, lengths = (torch.rand(12, 6, 5) < 0.4).float(), torch.arange(1, 13).clamp(max=6)
    posterior = svi(DeepMarkovModel(5, latent_dim=2), (x, lengths), steps=3, progress=False)
    accepted = posterior.program.accept((torch.cat([x, torch.zeros(12, 3, 5)], 1), lengths))
    kept = record_of(posterior)
    assert kept.equals(digests_of(accepted)) and kept.summaries[0] is None and kept.summaries[1] is not None
