"""Runs of a program: their structure, and where they stop being finite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.programs.finiteness import first_bad_site, run_on_all
from deepprob.programs.minibatch import run_bound
from deepprob.programs.program import Program
from deepprob.programs.run import Run, run_prior, run_program
from deepprob.programs.structure import structure

Y = torch.zeros(6)


def hierarchical(y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 2, dim=-2):
        pyro.sample("g", dist.Normal(w, 1.0))
    with pyro.plate("data", 6):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.deterministic("twice", 2 * z, event_dim=1)
        pyro.factor("extra", torch.zeros(6))
        pyro.sample("y", dist.Normal(z.sum(-1) + w, 1.0), obs=y)


def prior_of(model: Callable[..., None]) -> Callable[..., None]:
    def guide(y: Tensor | None = None) -> None:
        with pyro.poutine.block(hide=["y", "extra", "twice"]):
            pyro.poutine.uncondition(model)(y)

    return guide


def test_structure_tells_local_from_global() -> None:
    program = Program.of(hierarchical, prior_of(hierarchical), data_plate="data")
    found = structure(program, *run_program(Run(program, (Y,), torch.arange(6), 6)))
    assert found.global_ == ("w", "g")
    assert found.local == ("z",)
    assert found.observed == ("y",)
    assert found.latent == ("w", "g", "z")
    assert found.plates == 2
    assert found.plate_names == ("groups", "data")
    assert (found.row_plate, found.rows) == ("data", 6)
    assert list(found.sites) == ["w", "g", "z", "twice", "extra", "y"]
    assert {n: s.plate_dims for n, s in found.sites.items() if s.role == "latent"} == {"w": (), "g": (-2,), "z": (-1,)}
    assert [found.sites[n].role for n in ("twice", "extra")] == ["fixed", "fixed"]
    assert found.sites["z"].event_dim == 1
    assert found.all_local(("z", "y")) and not found.all_local(("z", "w"))
    assert found.by_row


def test_draws_form_a_leading_plate() -> None:
    program = Program.of(hierarchical, prior_of(hierarchical), data_plate="data")
    run = Run(program, (Y,), torch.arange(6), 6, draws=4, plates=2)
    guide_trace, model_trace = run_program(run)
    assert guide_trace.nodes["g"]["value"].shape == (4, 2, 1)
    assert model_trace.nodes["z"]["value"].shape == (4, 1, 6, 3)
    assert run_prior(replace(run, batch=())).nodes["y"]["value"].shape == (4, 1, 6)


def test_model_of_a_guide_has_all_rows_outside_of_a_run() -> None:
    program = Program.of(hierarchical, data_plate="data")
    assert run_bound(program.bound_rows, lambda: 3) == 3
    trace = pyro.poutine.trace(program.bound_model()).get_trace(Y)
    assert trace.nodes["data"]["value"].tolist() == list(range(6))


def vectors(y: Tensor) -> None:
    means = torch.where(torch.arange(6) == 4, torch.nan, torch.zeros(6))
    with pyro.plate("data", 6):
        pyro.sample("y", dist.MultivariateNormal(means.unsqueeze(-1).expand(6, 3), torch.eye(3)), obs=torch.zeros(6, 3))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda y: pyro.sample("y", dist.Normal(0.0, torch.tensor(0.0)), obs=y), "site 'y': scale reached 0"),
        (lambda y: pyro.sample("y", dist.Normal(torch.tensor(torch.inf), 1.0), obs=y), "site 'y': loc is not finite"),
        (lambda y: pyro.sample("y", dist.Normal(0.0, 1.0), obs=y / 0), "site 'y': its value is not finite"),
        (lambda y: pyro.sample("y", dist.LogNormal(0.0, 1.0), obs=y), "site 'y': its log-probability is not finite"),
        (lambda y: pyro.sample("y", dist.Normal(0.0, 1.0), obs=y), "a gradient is not finite"),
        (lambda y: pyro.sample("y", dist.Bernoulli(y - 1), obs=y), "site 'y': probs is not in Interval"),
        (vectors, "site 'y', row 4: loc is nan"),
        (lambda y: y @ torch.zeros(3), "the program itself fails: inconsistent tensor size"),
    ],
)
def test_first_bad_site_is_named(model: Callable[..., object], message: str) -> None:
    program = Program.of(model, lambda y: None)
    with pyro.validation_enabled(False):
        assert first_bad_site(run_on_all(program, (Y,), 6)).startswith(message)
