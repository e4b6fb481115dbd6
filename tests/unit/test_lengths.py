"""Sequences of unequal length: where they are cut, how they are batched, and that a cut changes no loss."""

from __future__ import annotations

import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from uncompiled import as_it_is

from deepprob.callbacks import Callback
from deepprob.data import Shuffle
from deepprob.inference import svi
from deepprob.lengths import Views, best_lengths
from deepprob.posterior import Posterior
from deepprob.program import Program

N, B, T = 60, 8, 40
G = torch.Generator().manual_seed(0)
LENGTHS = torch.cat([torch.randint(3, 12, (N // 2,), generator=G), torch.randint(20, T + 1, (N // 2,), generator=G)])
LENGTHS[-1] = T
X = torch.where((torch.arange(T) < LENGTHS.unsqueeze(-1)).unsqueeze(-1), torch.randn(N, T, 2, generator=G), 0.0)


class Levels(Program):
    """Sequences around one level, from which a small network moves them: no noise, so fits can be compared."""

    variable_length = True

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNN(2, 2, batch_first=True)
        self.level = nn.Parameter(torch.zeros(2))

    def lengths(self, *batch: Any) -> Tensor:
        lengths: Tensor = batch[1]
        return lengths

    def model(self, x: Tensor, lengths: Tensor) -> None:
        inside = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(-1)  # (B, T)
        with self.data_plate(x):
            moved, _ = self.cell(torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1))
            steps = dist.Normal(moved + self.level, 1.0).mask(inside.unsqueeze(-1)).to_event(2)
            pyro.sample("x", steps, obs=x)

    def guide(self, x: Tensor, lengths: Tensor) -> None:
        """Nothing is latent."""


def cost(lengths: list[int], ends: tuple[int, ...]) -> int:
    """Time steps when every sequence is as long as the least end that it does not pass."""
    return sum(min(end for end in ends if end >= n) for n in lengths)


@pytest.mark.parametrize("seed", range(20))
def test_the_lengths_are_the_best_three(seed: int) -> None:
    lengths = torch.randint(1, 60, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
    others = sorted({n for n in lengths if n < max(lengths)})
    best = min(cost(lengths, (*pair, max(lengths))) for pair in itertools.combinations(others, 2))
    assert cost(lengths, tuple(best_lengths(torch.tensor(lengths)))) == best


def test_of_many_lengths_nearly_the_best_are_found() -> None:
    lengths = torch.randint(1, 5000, (20_000,), generator=torch.Generator().manual_seed(0))
    ends = best_lengths(lengths)
    assert ends[-1] == int(lengths.max())
    least = 20_000 * 5000 * (1 + 2 + 3) / 9  # thirds
    assert cost(lengths.tolist(), tuple(ends)) == pytest.approx(least, rel=0.01)


def test_a_length_that_saves_too_little_is_not_worth_it() -> None:
    lengths = torch.tensor([20] * 50 + [100] * 50)
    assert best_lengths(lengths) == [20, 100]
    assert best_lengths(lengths, worth=3999) == [20, 100]
    assert best_lengths(lengths, worth=4001) == [100]
    assert best_lengths(torch.tensor([96] * 50 + [100] * 50)) == [100]
    assert best_lengths(torch.tensor([1] * 50 + [16] * 50)) == [16]  # short ones are computed to the end


def test_a_view_cuts_sequences_and_nothing_else() -> None:
    flat = torch.randn(N, T)  # as wide as the sequences are long, but no sequence
    views = Views((X, LENGTHS, flat), LENGTHS)
    for view, (x, lengths, features) in enumerate(views.batches):
        fitting, end = views.fitting(view), x.shape[1]
        assert torch.equal(x, X[:, :end])
        assert bool((LENGTHS[fitting] <= end).all())
        assert len(fitting) == sum(n <= end for n in LENGTHS.tolist())
        assert features.shape == flat.shape
        assert torch.equal(lengths, LENGTHS)
    assert [x.shape[1] for x, *_ in views.batches] == best_lengths(LENGTHS)


def test_padding_that_no_row_needs_is_cut() -> None:
    (x, _), = Views((X, torch.full((N,), 7)), torch.full((N,), 7)).batches  # fmt: skip
    assert x.shape == (N, 7, 2)


def test_runs_serve_every_batch_by_the_view_of_its_longest_row() -> None:
    views = Views((X, LENGTHS), LENGTHS)
    rows = torch.stack([torch.randperm(N, generator=G)[:2] for _ in range(40)])
    served = [(view, i) for view, first, end in views.runs(rows) for i in range(first, end)]
    ends = [x.shape[1] for x, _ in views.batches]
    assert [i for _, i in served] == list(range(40))
    for view, i in served:
        assert ends[view] == min(end for end in ends if end >= int(LENGTHS[rows[i]].max()))
    assert list(Views((X, LENGTHS)).runs(rows)) == [(0, 0, 40)]


def test_batches_hold_one_group_but_for_the_borders() -> None:
    groups = torch.tensor([0] * 17 + [1] * 21 + [2] * 15)
    shuffle = Shuffle(53, 5, torch.Generator().manual_seed(0), groups)
    first, second = shuffle.epoch(), shuffle.epoch()
    for epoch in (first, second):
        assert set(epoch.flatten().tolist()) == set(range(53))
        assert sum(len(set(groups[batch].tolist())) > 1 for batch in epoch) <= 2
    assert not torch.equal(first, second)
    order = groups[first].amax(1).tolist()
    assert order != sorted(order)  # batches come in random order


def test_every_row_is_as_likely_to_come_twice() -> None:
    # 2 of 10 rows twice in each of 4000 epochs: 800 each, sd 25; five of them in ten rows is one failure in 200 000.
    groups = torch.tensor([0] * 3 + [1] * 7)
    shuffle = Shuffle(10, 4, torch.Generator().manual_seed(0), groups)
    counts = sum(torch.bincount(shuffle.epoch().flatten(), minlength=10) - 1 for _ in range(4000))
    assert bool(((counts - 800).abs() < 5 * 25.3).all())


def fitted(compile: bool, **options: Any) -> Posterior:
    settings: dict[str, Any] = {"epochs": 3, "batch_size": B, "init": "keep", "progress": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        program = Levels()
    return svi(program, (X, LENGTHS), compile=compile, **settings | options)


def test_a_cut_changes_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = fitted(False)
    whole = Views.of.__func__  # type: ignore[attr-defined]

    def uncut(cls: Any, program: Program, data: Any, worth: float = 0.0) -> Views:
        views: Views = whole(cls, program, data, worth)
        views.batches = [views.data] * len(views.batches)
        return views

    monkeypatch.setattr(Views, "of", classmethod(uncut))
    padded = fitted(False)
    assert cut.history.steps["elbo"] == pytest.approx(padded.history.steps["elbo"], rel=1e-5)
    assert cut.history.steps["gradient_norm"] == pytest.approx(padded.history.steps["gradient_norm"], rel=1e-4)


def test_compiled_steps_have_one_specialisation_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepprob.compiled.compile_module", as_it_is)
    eager, compiled = fitted(False), fitted(True)
    assert (eager.history.specialisations, compiled.history.specialisations) == (0, len(best_lengths(LENGTHS)))
    for name, column in eager.history.steps.items():
        assert compiled.history.steps[name] == pytest.approx(column, rel=1e-4, abs=1e-5), name


def test_one_callback_or_none_takes_the_same_steps() -> None:
    class EveryStep(Callback):
        def interval(self, steps_per_epoch: int) -> int:
            return 1

    assert fitted(False).history.steps == fitted(False, callbacks=[EveryStep()]).history.steps


def test_a_full_batch_has_one_length() -> None:
    assert fitted(False, batch_size=None).history.steps_per_epoch == 1
