"""Every program of the zoo runs on the device of the fit, though its code names none; on a GPU it compiles."""

from __future__ import annotations

import pytest
import torch
from test_zoo import instance_and_batch, loss_and_gradients
from zoo import ZOO, Example

from deepprob.inference import svi

CPU = torch.device("cpu")
META = torch.device("meta")
"""Tensors without values. Torch refuses to mix them with CPU tensors, as it does with GPU tensors."""


@pytest.fixture(params=[example for example in ZOO if not example.stays], ids=lambda example: example.name)
def example(request: pytest.FixtureRequest) -> Example:
    found: Example = request.param
    return found


def test_program_makes_tensors_on_its_device(example: Example) -> None:
    instance, batch, rows = instance_and_batch(example, CPU)
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
            pytest.skip("it needs values, or an operation without meta shapes")
        raise
    assert loss.device == META
    assert {g.device for g in gradients.values()} == {META}


@pytest.mark.gpu
def test_fit_compiles_on_a_gpu(example: Example, device: torch.device) -> None:
    if example.eager:
        pytest.skip(example.eager)
    program, data = example.make()
    posterior = svi(
        program, data or None, epochs=40, batch_size=example.batch_size, objective=example.objective,
        compile=True, device=device, progress=False,
    )  # fmt: skip
    assert posterior.config["compiled"]
    assert not any(posterior.history.steps["skipped"])
