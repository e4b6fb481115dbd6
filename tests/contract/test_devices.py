"""Every program of the zoo runs where it is put, though its code names no device; on a GPU its steps are recorded."""

from __future__ import annotations

import pytest
import torch
from test_zoo import loss_and_gradients, own
from zoo import ZOO, Example

from deepprob.inference import svi

CPU = torch.device("cpu")
META = torch.device("meta")
"""Tensors without numbers: torch refuses to mix them with others, as it does with those of a GPU."""


@pytest.fixture(params=[example for example in ZOO if not example.stays], ids=lambda example: example.name)
def example(request: pytest.FixtureRequest) -> Example:
    found: Example = request.param
    return found


def test_what_a_program_makes_is_made_where_it_runs(example: Example) -> None:
    instance, batch, rows = own(example, CPU)
    instance.device = META
    instance.program.to(META)
    own_tensors = instance.store["params"]
    own_tensors |= {n: x.detach().to(META).requires_grad_(x.requires_grad) for n, x in own_tensors.items()}
    try:
        loss, gradients = loss_and_gradients(
            instance, example.objective, tuple(x.to(META) for x in batch), rows.to(META)
        )  # fmt: skip
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, NotImplementedError) or "cannot be called on meta tensors" in str(error):
            pytest.skip("asks for numbers, or for what torch knows no shape of")
        raise
    assert loss.device == META
    assert {g.device for g in gradients.values()} == {META}


@pytest.mark.gpu
def test_a_fit_is_compiled_and_recorded(example: Example, device: torch.device) -> None:
    if example.eager:
        pytest.skip(example.eager)
    program, data = example.make()
    posterior = svi(
        program, data or None, epochs=40, batch_size=example.batch_size, objective=example.objective,
        compile=True, device=device, progress=False,
    )  # fmt: skip
    assert posterior.config["compiled"]
    assert not any(posterior.history.steps["skipped"])
