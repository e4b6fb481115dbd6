"""Minibatches: arguments that are as long as the data without a row for each datum are passed whole."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.inference import svi
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.arguments import Arguments
from deepprob.programs.by_row import cut_by_row
from deepprob.programs.program import Program

N = 14
TABLE = torch.arange(14.0) - 7
GROUP = torch.randint(0, 4, (N,), generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(N, generator=torch.Generator().manual_seed(1))
Y = 1.5 * TABLE[GROUP] + 0.1 * NOISE


def by_table(table: Tensor, group: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(group)):
        pyro.sample("y", dist.Normal(slope * table[group], 0.5), obs=y)


def by_sum(table: Tensor, x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        code = pyro.sample("code", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope * x + table.abs().sum() + code, 0.5), obs=y)


def by_row(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    with pyro.plate("data", N):
        code = pyro.sample("code", dist.Normal(slope, 1.0))
        pyro.sample("y", dist.Normal(code * x, 0.5), obs=y)


def of_the_batch(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * (x - x.mean()), 0.5), obs=y)


def noisy(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * (x + torch.randn(len(x))), 0.5), obs=y)


def by_index(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    with pyro.plate("data", N, subsample_size=3) as i:
        pyro.sample("y", dist.Normal(slope * x[i], 0.5), obs=y[i])


def input_by_index(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    with pyro.plate("data", N) as i:
        pyro.sample("y", dist.Normal(slope * x[i], 0.5), obs=y)


def by_place(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x * torch.arange(len(x)), 0.5), obs=y)


def fitted(model: Any, data: Any, **options: Any) -> Posterior:
    program = Program.of(model, "normal", data_plate="data")
    return svi(program, data, batch_size=5, progress=False, compile=False, **options)


def names(model: Any, data: Any) -> tuple[str, ...]:
    program = Program.of(model, data_plate="data")
    batch = cut_by_row(program, program.accept(data), 5, torch.device("cpu"))
    assert isinstance(batch, Arguments)
    return batch.call.names


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        (by_table, (TABLE, GROUP, Y), ("group", "y")),
        (by_table, {"y": Y, "group": GROUP, "table": TABLE}, ("group", "y")),
        (by_sum, (TABLE, NOISE, Y), ("x", "y")),
        (by_row, (TABLE, Y), ("x", "y")),
        (of_the_batch, (TABLE, Y), ("x", "y")),  # rows that depend on their batch, as the user wrote them
        (noisy, (TABLE, Y), ("x", "y")),  # noise tells nothing
        (input_by_index, (TABLE, Y), ("y",)),
    ],
)
def test_names_of_the_arguments_with_rows(model: Any, data: Any, expected: tuple[str, ...]) -> None:
    assert names(model, data) == expected


def test_table_as_long_as_the_data_is_passed_whole() -> None:
    posterior = fitted(by_table, (TABLE, GROUP, Y), steps=1500, held_out=(TABLE, GROUP[:3], Y[:3]))
    assert abs(float(posterior.sample(draws=500)["slope"].mean()) - 1.5) < 0.05
    assert posterior.predict(TABLE, GROUP[:3], draws=2).mean.shape == (3,)
    assert posterior.log_likelihood(TABLE, GROUP, Y, draws=2).shape == (2, N)


def test_rows_that_the_program_selects_itself_are_refused() -> None:
    with pytest.raises(ValueError, match=r"indexes x, y by plate 'data', .* Leave out the index, x in the place"):
        fitted(by_index, (TABLE, Y))


def test_rows_by_their_place_in_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"depends on its place in the minibatch: x, y are cut .*functools.partial"):
        fitted(by_place, (TABLE, Y))
    assert fitted(by_place, (TABLE[:5], Y[:5]), steps=2).history is not None  # a full batch has one order


def test_the_choice_changes_neither_program_nor_randomness() -> None:
    program = Program.of(by_table, data_plate="data")
    before = torch.get_rng_state()
    cut_by_row(program, program.accept((TABLE, GROUP, Y)), 5, torch.device("cpu"))
    assert program.call is None and torch.equal(torch.get_rng_state(), before)
    assert not pyro.get_param_store().keys()
