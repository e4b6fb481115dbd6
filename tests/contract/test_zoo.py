"""Loss and gradients of every program in the zoo against Pyro's own, with the same noise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pyro.poutine.guide import GuideMessenger
from torch import Tensor
from zoo import COMPILED, ZOO, Example

from deepprob.capture import forget_values
from deepprob.inference import svi
from deepprob.objectives import Objective
from deepprob.owned import OwnedProgram
from deepprob.program import Batch, num_rows
from deepprob.runtime import RandomStream

RELATIVE = 1e-5  # of a parameter's largest gradient

LossAndGradients = tuple[Tensor, dict[str, Tensor]]


@pytest.fixture(params=ZOO, ids=lambda example: example.name)
def example(request: pytest.FixtureRequest) -> Example:
    found: Example = request.param
    return found


@pytest.fixture
def _doubles() -> Iterator[None]:
    """Numbers of twice the length: in float32 a gradient whose terms cancel has fewer than five digits."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def own(example: Example, device: torch.device) -> tuple[OwnedProgram, Batch, Tensor]:
    """A routine's own copy of a program of the zoo, and a batch: its arguments and which rows they are."""
    program, data = example.make()
    data = program.accept(data) if data else ()
    num_data = num_rows(data)
    size = example.batch_size or num_data
    with RandomStream(0, device).drawing():
        owned = OwnedProgram(program, data, num_data, device=device, full_batch=size == num_data)
        rows = torch.randperm(num_data)[:size] if size < num_data else torch.arange(num_data)
    batch = data if size == num_data else tuple(x[rows] for x in data)
    return owned, tuple(x.to(device) for x in batch), rows.to(device)


def loss_and_gradients(owned: OwnedProgram, objective: Objective, batch: Batch, rows: Tensor) -> LossAndGradients:
    """Our loss, per datum, and its gradient by parameter, zero where none reaches it."""
    with owned.running():
        batch = owned.program.prepare(*batch)
        loss, _ = objective(owned.program, batch, rows, owned.num_data, plates=max(1, owned.structure.plates))
        return loss.detach(), _gradients(loss, owned)


def pyros_loss_and_gradients(owned: OwnedProgram, elbo: Any, batch: Batch, rows: Tensor) -> LossAndGradients:
    """The same of one of Pyro's objectives, for all data."""
    program = owned.program
    # Pyro would find it out by a run, which draws noise; it counts the plate of particles.
    elbo.max_plate_nesting = max(1, owned.structure.plates) + (elbo.vectorize_particles and elbo.num_particles > 1)
    # Pyro knows an AutoMessenger by its class: of its one run it makes both traces.
    guide = program.current_guide if isinstance(program.current_guide, GuideMessenger) else program.guide
    forget_values(program)
    with owned.running(), program.bound(rows, owned.num_data):
        batch = program.prepare(*batch)
        if hasattr(elbo, "differentiable_loss"):
            loss = elbo.differentiable_loss(program.model, guide, *batch)
        else:  # TraceGraph_ELBO keeps to itself what it differentiates
            bound, loss = elbo._loss_and_surrogate_loss(program.model, guide, batch, {})
            loss = loss - (bound + loss).detach()
        return loss.detach(), _gradients(loss, owned)


def _gradients(loss: Tensor, owned: OwnedProgram) -> dict[str, Tensor]:
    parameters = owned.parameters()
    found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def assert_equal(ours: LossAndGradients, theirs: LossAndGradients) -> None:
    (loss, gradients), (their_loss, their_gradients) = ours, theirs
    assert bool(torch.isfinite(loss))
    assert float(loss) == pytest.approx(float(their_loss), rel=RELATIVE)
    assert gradients.keys() == their_gradients.keys()
    errors = {n: float((g - their_gradients[n]).abs().max() / _size(their_gradients[n])) for n, g in gradients.items()}
    assert max(errors.values()) <= RELATIVE, errors


def _size(gradient: Tensor) -> Tensor:
    return gradient.abs().max() + torch.finfo(gradient.dtype).tiny


@pytest.mark.usefixtures("_doubles")
def test_loss_and_gradients_are_pyros(example: Example, device: torch.device) -> None:
    owned, batch, rows = own(example, device)
    with RandomStream(1, device).drawing():
        loss, gradients = loss_and_gradients(owned, example.objective, batch, rows)
    with RandomStream(1, device).drawing():
        theirs = pyros_loss_and_gradients(owned, example.pyro(), batch, rows)
    whole = loss * owned.num_data, {n: g * owned.num_data for n, g in gradients.items()}
    assert_equal(whole, theirs)
    assert any(bool((g != 0).any()) for g in gradients.values())


def test_svi_takes_it(example: Example) -> None:
    program, data = example.make()
    posterior = svi(program, data or None, epochs=2, batch_size=example.batch_size, objective=example.objective)
    assert all(bool(torch.isfinite(p).all()) for p in posterior.parameters().values())


def test_the_zoo_is_as_large_and_as_traceable_as_it_must_be() -> None:
    names = [example.name for example in ZOO]
    assert len(names) == len(set(names)) >= 50
    assert sum(bool(example.eager) for example in ZOO) <= 3
    assert len(COMPILED) == 8
    assert set(names) >= set(COMPILED)
