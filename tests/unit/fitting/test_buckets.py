"""Length buckets: their lengths, their batches, and that cutting sequences keeps the loss."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from uncompiled import replace_compiler, run_uncompiled

from deepprob.data import Shuffle
from deepprob.engine.dynamic_length import DifferentGraphs
from deepprob.fitting.buckets import LengthBuckets, best_lengths, longest_of_batches
from deepprob.fitting.callbacks import Callback, Checkpoint
from deepprob.fitting.optimizers import Optimizer
from deepprob.inference import svi
from deepprob.models import DeepMarkovModel
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.program import Program

N, B, T = 60, 8, 40
G = torch.Generator().manual_seed(0)
LENGTHS = torch.cat([torch.randint(3, 12, (N // 2,), generator=G), torch.randint(20, T + 1, (N // 2,), generator=G)])
LENGTHS[-1] = T
X = torch.where((torch.arange(T) < LENGTHS.unsqueeze(-1)).unsqueeze(-1), torch.randn(N, T, 2, generator=G), 0.0)


class Levels(Program):
    """Sequences around one level, which a small network shifts. Without noise, fits can be compared.

    Torch unrolls its recurrent network over time, so that graphs of two lengths differ; with a linear map they are
    alike.
    """

    variable_length = True

    def __init__(self, noisy: bool = False, alike: bool = False) -> None:
        super().__init__()
        self.cell = nn.Linear(2, 2) if alike else nn.RNN(2, 2, batch_first=True)
        self.level = nn.Parameter(torch.zeros(2))
        self.noisy = noisy

    def lengths(self, *batch: Any) -> Tensor:
        lengths: Tensor = batch[1]
        return lengths

    def model(self, x: Tensor, lengths: Tensor) -> None:
        inside = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(-1)  # (B, T)
        with self.data_plate(x):
            prior = dist.Normal(torch.zeros(x.shape[1]), 1.0).mask(inside).to_event(1)
            drift = pyro.sample("drift", prior) if self.noisy else 0.0
            moved = self.cell(torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1))
            moved = torch.tanh(moved) if isinstance(moved, Tensor) else moved[0]
            moved = moved + (drift.unsqueeze(-1) if self.noisy else 0.0)
            steps = dist.Normal(moved + self.level, 1.0).mask(inside.unsqueeze(-1)).to_event(2)
            pyro.sample("x", steps, obs=x)

    def guide(self, x: Tensor, lengths: Tensor) -> None:
        """Draw one latent number per time step if the program is noisy; otherwise nothing is latent."""
        if self.noisy:
            inside = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(-1)
            narrow = dist.Normal(torch.zeros(x.shape[1]), 0.1 + 0.1 * self.level[0].sigmoid())
            with self.data_plate(x):
                pyro.sample("drift", narrow.mask(inside).to_event(1))


def cost(lengths: list[int], ends: tuple[int, ...]) -> int:
    """Time steps if every sequence is padded to the smallest end that it does not exceed."""
    return sum(min(end for end in ends if end >= n) for n in lengths)


@pytest.mark.parametrize("seed", range(20))
def test_chooses_the_best_four_lengths(seed: int) -> None:
    lengths = torch.randint(1, 60, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
    others = sorted({n for n in lengths if n < max(lengths)})
    best = min(cost(lengths, (*some, max(lengths))) for some in itertools.combinations(others, 3))
    assert cost(lengths, tuple(best_lengths(torch.tensor(lengths)))) == best


def test_nearly_the_best_buckets_for_many_lengths() -> None:
    lengths = torch.randint(1, 5000, (20_000,), generator=torch.Generator().manual_seed(0))
    ends = best_lengths(lengths)
    assert ends[-1] == int(lengths.max())
    least = 20_000 * 5000 * (1 + 2 + 3 + 4) / 16  # quarters
    assert cost(lengths.tolist(), tuple(ends)) == pytest.approx(least, rel=0.01)


def test_no_bucket_that_saves_too_little() -> None:
    lengths = torch.tensor([20] * 50 + [100] * 50)
    assert best_lengths(lengths) == [20, 100]
    assert best_lengths(lengths, least_saving=39) == [20, 100]
    assert best_lengths(lengths, least_saving=41) == [100]
    assert best_lengths(torch.tensor([96] * 50 + [100] * 50)) == [100]
    assert best_lengths(torch.tensor([1] * 50 + [16] * 50)) == [16]  # short sequences are not cut


def test_buckets_cut_sequences_and_nothing_else() -> None:
    flat = torch.randn(N, T)  # as wide as the sequences are long, but no sequence
    other = torch.randn(N, T + 1, 2)
    buckets = LengthBuckets((X, LENGTHS, flat, other), LENGTHS)
    for bucket, (x, lengths, features, images) in enumerate(buckets.data_by_bucket):
        within, end = buckets.rows_within(bucket), x.shape[1]
        assert torch.equal(x, X[:, :end])
        assert bool((LENGTHS[within] <= end).all())
        assert len(within) == sum(n <= end for n in LENGTHS.tolist())
        assert features.shape == flat.shape
        assert images.shape == other.shape
        assert torch.equal(lengths, LENGTHS)
    assert [x.shape[1] for x, *_ in buckets.data_by_bucket] == best_lengths(LENGTHS.clamp(min=9))


def test_no_bucket_is_short_enough_to_unroll_a_recurrence() -> None:
    lengths = torch.tensor([5] * 20 + [30] * 20 + [60] * 20)
    assert LengthBuckets((torch.zeros(60, 60, 1), lengths), lengths, 10).lengths == [9, 30, 60]
    assert LengthBuckets((torch.zeros(60, 60, 1), lengths), lengths.clamp(max=5), 10).lengths == [5]


def test_padding_by_one_step_changes_no_value() -> None:
    padded, plain = (LengthBuckets((X, LENGTHS), LENGTHS, pad_one_step=pad).data_by_bucket for pad in (True, False))
    for (a, _), (b, _) in zip(padded, plain, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == ((T + 1) * 2, 2, 1)


def test_cuts_padding_that_no_row_needs() -> None:
    (x, _), = LengthBuckets((X, torch.full((N,), 7)), torch.full((N,), 7)).data_by_bucket  # fmt: skip
    assert x.shape == (N, 7, 2)


def test_every_batch_uses_the_bucket_of_its_longest_row() -> None:
    buckets = LengthBuckets((X, LENGTHS), LENGTHS)
    rows = torch.stack([torch.randperm(N, generator=G)[:2] for _ in range(40)])
    used = [(bucket, i) for bucket, first, end in buckets.consecutive(rows) for i in range(first, end)]
    ends = [x.shape[1] for x, _ in buckets.data_by_bucket]
    assert [i for _, i in used] == list(range(40))
    for bucket, i in used:
        assert ends[bucket] == min(end for end in ends if end >= int(LENGTHS[rows[i]].max()))
    assert list(LengthBuckets((X, LENGTHS)).consecutive(rows)) == [(0, 0, 40)]


def test_batches_mix_groups_only_at_their_borders() -> None:
    groups = torch.tensor([0] * 17 + [1] * 21 + [2] * 15)
    shuffle = Shuffle(53, 5, torch.Generator().manual_seed(0), groups)
    first, second = shuffle.epoch(), shuffle.epoch()
    for epoch in (first, second):
        assert set(epoch.flatten().tolist()) == set(range(53))
        assert sum(len(set(groups[batch].tolist())) > 1 for batch in epoch) <= 2
    assert not torch.equal(first, second)
    order = groups[first].amax(1).tolist()
    assert order != sorted(order)  # batches come in random order


def test_every_row_is_equally_likely_to_be_repeated() -> None:
    # Two of ten rows are repeated in each of 4000 epochs: 800 times each, sd 25. Five sd fail once in 200 000 runs.
    groups = torch.tensor([0] * 3 + [1] * 7)
    shuffle = Shuffle(10, 4, torch.Generator().manual_seed(0), groups)
    counts = sum(torch.bincount(shuffle.epoch().flatten(), minlength=10) - 1 for _ in range(4000))
    assert bool(((counts - 800).abs() < 5 * 25.3).all())


ENDS = best_lengths(longest_of_batches(LENGTHS, B))


SETTINGS: dict[str, Any] = {"epochs": 3, "batch_size": B, "weights": "keep", "progress": False}
BASIS = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])


def wide(program: type[Levels]) -> Levels:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return program()


def fitted(compile: bool, *, noisy: bool = False, alike: bool = False, **options: Any) -> Posterior:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        program = Levels(noisy, alike)
    return svi(program, (X, LENGTHS), compile=compile, **SETTINGS | options)


def assert_same_steps(a: Posterior, b: Posterior, rel: float) -> None:
    for name, column in a.history.steps.items():
        assert b.history.steps[name] == pytest.approx(column, rel=rel, abs=1e-5), name


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run graphs uncompiled."""
    replace_compiler(monkeypatch)


class EveryStep(Callback):
    """Watches every step, so that each is a separate call."""

    def interval(self, steps_per_epoch: int) -> int:
        return 1


def test_cutting_sequences_keeps_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = fitted(False)
    assert cut.config["lengths"] == ENDS
    make = LengthBuckets.__init__

    def uncut(buckets: LengthBuckets, *arguments: Any, **options: Any) -> None:
        make(buckets, *arguments, **options)
        buckets.data_by_bucket = [buckets.data] * len(buckets.data_by_bucket)

    monkeypatch.setattr(LengthBuckets, "__init__", uncut)
    assert_same_steps(cut, fitted(False), 1e-4)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("optimizer", [None, Optimizer(torch.optim.RMSprop, learning_rate=0.01)], ids=["adam", "torch"])
@pytest.mark.parametrize("alike", [False, True])
def test_one_graph_for_all_buckets_or_one_for_each(alike: bool, optimizer: Optimizer | None) -> None:
    eager, compiled = (fitted(compile, optimizer=optimizer, alike=alike) for compile in (False, True))
    one = alike and not torch.cuda.is_available()
    assert (eager.history.compiled_graphs, compiled.history.compiled_graphs) == (0, 1 if one else len(ENDS))
    assert_same_steps(eager, compiled, 1e-4)


@pytest.mark.usefixtures("uncompiled")
def test_graph_that_is_wrong_at_one_length_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Levels.model

    def other(self: Levels, x: Tensor, lengths: Tensor) -> None:
        model(self, 2 * x if x.shape[1] == ENDS[1] else 1 * x, lengths)

    monkeypatch.setattr(Levels, "model", other)
    compiled = fitted(True, alike=True)
    assert compiled.history.compiled_graphs == len(ENDS)  # the shared loop failed the comparison
    assert_same_steps(fitted(False, alike=True), compiled, 1e-4)


def test_each_bucket_has_its_graph_if_torch_refuses_dynamic_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(module: Any, inputs: Any, lengths: Any) -> Any:
        if lengths:
            raise DifferentGraphs("torch says that a shape is fixed")
        return run_uncompiled(module, inputs)

    replace_compiler(monkeypatch, compiled)
    posterior = fitted(True, alike=True)
    assert posterior.history.compiled_graphs == len(ENDS)
    assert_same_steps(fitted(False, alike=True), posterior, 1e-4)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("alike", [False, True])
def test_noise_with_several_buckets_does_not_depend_on_callbacks(alike: bool) -> None:
    free = fitted(True, noisy=True, alike=alike)
    watched = fitted(True, noisy=True, alike=alike, callbacks=[EveryStep()])
    assert free.history.steps == watched.history.steps
    assert len(set(free.history.steps["elbo"])) == len(free.history.steps["elbo"])
    eager = fitted(False, noisy=True, alike=alike)  # other noise, the same batches: means over the fit are close
    means = [sum(p.history.steps["elbo"]) / len(p.history.steps["elbo"]) for p in (free, eager)]
    assert means[0] == pytest.approx(means[1], rel=0.05)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fit_with_several_buckets_resumes_bit_for_bit(compile: bool, tmp_path: Path) -> None:
    whole = fitted(compile, noisy=True, epochs=4)

    class Stop(Callback):
        def interval(self, steps_per_epoch: int) -> int:
            return 2 * steps_per_epoch + 3  # within an epoch

        def step_end(self, fit: Any) -> None:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted"):
        fitted(compile, noisy=True, epochs=4, callbacks=[Checkpoint(tmp_path / "saved"), Stop()])
    resumed = fitted(compile, noisy=True, epochs=4, callbacks=[Checkpoint(tmp_path / "saved")])
    assert resumed.history.steps == whole.history.steps
    assert all(torch.equal(v, whole.instance.tensors()[n]) for n, v in resumed.instance.tensors().items())


@pytest.mark.slow
@pytest.mark.parametrize("alike", [False, True])
def test_native_code_equals_eager_steps_in_every_bucket(
    alike: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    eager, compiled = fitted(False, alike=alike), fitted(True, alike=alike)
    one = alike and not torch.cuda.is_available()
    assert compiled.history.compiled_graphs == (1 if one else len(ENDS))
    assert_same_steps(eager, compiled, 1e-4)


def test_full_batch_has_one_bucket_without_extra_padding() -> None:
    posterior = fitted(False, batch_size=None)
    assert posterior.config["lengths"] == [T]
    buckets = LengthBuckets((torch.cat([X, X.new_zeros(N, 5, 2)], 1), LENGTHS), LENGTHS, N)
    assert [x.shape[1] for x, _ in buckets.data_by_bucket] == [T]


def test_lengths_that_no_batch_can_use_get_no_bucket() -> None:
    lengths = torch.cat([torch.full((20,), 20), torch.full((180,), 100)])
    assert LengthBuckets((torch.zeros(200, 100, 1), lengths), lengths, 128).lengths == [100]
    assert LengthBuckets((torch.zeros(200, 100, 1), lengths), lengths, 10).lengths == [20, 100]


def test_guide_with_parameters_per_row_uses_no_buckets() -> None:
    lengths = torch.tensor([20] * 8 + [60] * 8)
    x = (torch.arange(60) < lengths.unsqueeze(-1)).float().unsqueeze(-1).expand(16, 60, 3)
    dmm = DeepMarkovModel(3, latent_dim=2, hidden_dim=4, recurrent_dim=4)
    posterior = svi(dmm, (x, lengths), guide="normal", batch_size=4, epochs=2, progress=False)
    assert posterior.config["lengths"] == []


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (LENGTHS + 0.5, r"Levels\.lengths must return a whole number for each of the 60 rows; got shape \(60,\)"),
        (LENGTHS.unsqueeze(1), r"got shape \(60, 1\)\. Return each row\'s number of time steps"),
    ],
)
def test_refuses_invalid_lengths(found: Tensor, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Levels, "lengths", lambda self, *batch: found)
    with pytest.raises(ValueError, match=message):
        fitted(False)


def test_accepts_whole_lengths_as_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Levels, "lengths", lambda self, *batch: batch[1].float())
    assert fitted(False).config["lengths"] == ENDS
