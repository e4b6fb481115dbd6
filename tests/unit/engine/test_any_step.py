"""Loops over any pure step: its carry, record, data and noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from uncompiled import replace_compiler

from deepprob.engine import Loop, Noise, NoiseSize, PerStep, RandomStream, StepData
from deepprob.engine.subject import Untraceable


def knobs(*rows: list[float]) -> PerStep:
    return PerStep(torch.zeros(1, 1, dtype=torch.long), torch.tensor(rows))


@pytest.mark.parametrize("compiled", [False, True])
def test_step_receives_data_knobs_number_and_carry(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_compiler(monkeypatch)

    def step(carry: Any, data: StepData, _: Noise, knobs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        rows = data.fixed["x"].index_select(0, data.rows)
        total = carry["a"][0] + knobs[0] * rows.sum(0)
        record = {"rows": rows, "number": data.number, "total": total.sum(), "shift": data.fixed["shift"]}
        return {"a": [total + data.fixed["shift"]], "b": (carry["b"][0] + 1,)}, record

    x = torch.arange(12.0).reshape(4, 3)
    fixed = {"x": x, "shift": torch.tensor(0.5)}
    carry = {"a": [torch.zeros(3)], "b": (torch.tensor(0),)}
    per_step = PerStep(torch.tensor([[0, 1], [2, 2], [3, 0]]), torch.tensor([[1.0], [2.0], [0.5]]))
    loop = Loop(step, carry, per_step, fixed, capacity=5)
    if compiled:
        loop.compile()
    new, record = loop(carry, per_step, fixed, first=7)
    a = torch.zeros(3)
    for rows, (weight,) in zip(per_step.rows, per_step.knobs.tolist(), strict=True):
        a = a + weight * x[rows].sum(0) + 0.5
    assert torch.allclose(new["a"][0], a)
    assert int(new["b"][0]) == 3
    assert torch.equal(record["rows"], x[per_step.rows])
    assert record["number"].tolist() == [7.0, 8.0, 9.0]
    assert record["shift"].tolist() == [0.5] * 3
    assert (loop.is_compiled, loop.scalars) == (compiled, ("number", "total", "shift"))
    assert torch.equal(carry["a"][0], torch.zeros(3)), "the given carry must not change"


def test_loop_accepts_other_data_of_the_same_shape() -> None:
    def step(carry: Any, data: StepData, _: Noise, knobs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        return [carry[0] + data.fixed[0].sum()], {}

    loop = Loop(step, [torch.tensor(0.0)], knobs([1.0]), [torch.ones(3)], capacity=2)
    (total,), record = loop([torch.tensor(10.0)], knobs([1.0], [1.0]), [torch.full((3,), 2.0)])
    assert (float(total), record) == (22.0, {})


def test_step_may_swap_the_tensors_of_its_carry() -> None:
    def step(carry: Any, data: StepData, _: Noise, knobs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        return [carry[1], carry[0]], {"first": carry[0]}

    carry = [torch.tensor(1.0), torch.tensor(2.0)]
    loop = Loop(step, carry, knobs([1.0]), [], capacity=3)
    _, record = loop(carry, knobs([1.0], [1.0], [1.0]), [])
    assert record["first"].tolist() == [1.0, 2.0, 1.0]


def test_draws_of_a_step_are_lifted_to_inputs() -> None:
    def step(carry: Any, data: StepData, _: Noise, knobs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        z, u = torch.randn(3), torch.rand(2)
        return [carry[0] + z.sum()], {"z": z, "u": u}

    loop = Loop(step, [torch.tensor(0.0)], knobs([1.0]), [], capacity=4)
    assert (loop.noise.normal, loop.noise.uniform) == (3, 2)
    noise = Noise(*loop.noise.draw(4, RandomStream(0).generators, torch.device("cpu")))
    before = torch.get_rng_state()
    (total,), record = loop([torch.tensor(0.0)], knobs(*[[1.0]] * 4), [], noise)
    assert torch.equal(record["z"], noise.normal[:, :3])
    assert torch.equal(record["u"], noise.uniform)
    assert torch.allclose(total, record["z"].sum())
    assert torch.equal(torch.get_rng_state(), before)


def test_refuses_a_step_that_reads_a_value() -> None:
    def step(carry: Any, data: StepData, _: Noise, knobs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        return [carry[0] * (2 if float(torch.rand(())) > 0.5 else 3)], {}

    with pytest.raises(Exception, match=r"the computation depends on a value of a tensor"):
        Loop(step, [torch.tensor(1.0)], knobs([1.0]), [])


def test_example_rows_may_be_invalid_for_the_step() -> None:
    """The rows of an example are zeros, and row 0 may belong to another length bucket."""

    def step(carry: Any, data: StepData, _: Noise, knobs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        x, ends = data.fixed
        last = x.index_select(0, data.rows).gather(1, ends.index_select(0, data.rows).unsqueeze(1))
        return [carry[0] + last.sum()], {"last": last}

    fixed = [torch.arange(12.0).reshape(3, 4), torch.tensor([9, 1, 3])]
    example = PerStep(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
    loop = Loop(step, [torch.tensor(0.0)], example, fixed, NoiseSize(0, 0, torch.float32), capacity=2)
    (total,), _ = loop([torch.tensor(0.0)], PerStep(torch.tensor([[1], [2]]), torch.ones(2, 1)), fixed)
    assert float(total) == 5.0 + 11.0


def test_shapes_may_depend_on_settled_data_and_on_constants() -> None:
    def step(carry: Any, data: StepData, _: Noise, knobs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        (x,) = data.fixed
        chosen = x[x > 1.0], x[torch.arange(len(x), device=x.device) < 2]
        return [carry[0] + sum(part.sum() for part in chosen)], {}

    example, size = ([torch.tensor(0.0)], knobs([1.0], [1.0]), [torch.arange(4.0)]), NoiseSize(0, 0, torch.float32)
    (total,), _ = Loop(step, *example, size, capacity=2, settled=True)(*example)
    assert float(total) == 2 * (5.0 + 1.0)
    with pytest.raises(Untraceable, match=r"the shape of a result depends on values \(x\[mask\], nonzero\)"):
        Loop(step, *example, size, capacity=2)
