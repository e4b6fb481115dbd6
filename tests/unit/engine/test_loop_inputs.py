"""A loop refuses inputs unlike its example, and steps whose results it could not carry."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from uncompiled import replace_compiler

from deepprob.engine import Loop, Noise, NoiseSize, PerStep, Step, StepData
from deepprob.engine.loop_inputs import Example
from deepprob.engine.subject import Untraceable

NOT_DRAWN = NoiseSize(0, 0, torch.float32)
Result = tuple[Any, dict[str, Tensor]]


def steps(count: int, width: int = 1, sets: int = 1, batch: int = 1) -> PerStep:
    return PerStep(torch.zeros(sets, batch, dtype=torch.long), torch.zeros(count, width))


def adding(carry: Any, data: StepData, _: Noise, knobs: Tensor) -> Result:
    """Add the sum over the columns of the data."""
    return {"x": carry["x"] + data.fixed[0].sum(0)}, {"sum": carry["x"].sum()}


def drawing(carry: Any, data: StepData, _: Noise, knobs: Tensor) -> Result:
    return {"x": carry["x"] + torch.randn(2) + torch.rand(2)}, {}


def made(step: Step = adding, **options: Any) -> Loop:
    return Loop(step, {"x": torch.zeros(2)}, steps(1, 1, 2), [torch.zeros(3, 2)], capacity=4, **options)


X, DATA = torch.tensor([1.0, 2.0]), torch.arange(6.0).reshape(3, 2)


@pytest.mark.parametrize(
    ("carry", "data"),
    [
        (torch.arange(4.0)[::2], DATA),
        (torch.tensor([1.0]).expand(2), DATA),
        (X, torch.arange(12.0).reshape(3, 4)[:, ::2]),
        (X, torch.arange(6.0).reshape(2, 3).T),
        (X, torch.tensor([1.0, 2.0]).expand(3, 2)),
    ],
    ids=["strided carry", "expanded carry", "strided data", "transposed data", "expanded data"],
)
def test_native_code_reads_tensors_however_they_lie_in_memory(carry: Tensor, data: Tensor) -> None:
    loop = made()
    loop.compile()
    (new, record), before = loop({"x": carry}, steps(2), [data]), carry.clone()
    assert torch.allclose(new["x"], carry + 2 * data.sum(0))
    assert torch.allclose(record["sum"], torch.stack([carry.sum(), (carry + data.sum(0)).sum()]))
    assert torch.equal(carry, before)


def test_examples_may_overlap_or_be_one_tensor() -> None:
    def step(carry: Any, data: StepData, _: Noise, knobs: Tensor) -> Result:
        return [carry[0] + 1, carry[1] + data.fixed[0][1:].sum() - data.fixed[1].sum()], {}

    one = torch.zeros(())
    rows = torch.zeros(1).expand(3)
    loop = Loop(step, [one, one], steps(1), [rows, rows], capacity=4)
    first, second = loop([torch.tensor(1.0), torch.tensor(2.0)], steps(2), [torch.arange(3.0), torch.ones(3)])[0]
    assert (float(first), float(second)) == (3.0, 2.0)


def test_example_windows_are_copied_apart() -> None:
    windows = torch.arange(5.0).unfold(0, 3, 1)
    example = Example("fixed", [windows])
    (found,) = example.match([10 * windows])
    assert torch.equal(found, 10 * windows)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "carry dtype": ({"carry": {"x": X.double()}}, r"carry\['x'\] must be \(2,\) float32 on cpu.*got \(2,\) float64"),
    "carry shape": ({"carry": {"x": torch.zeros(3)}}, r"carry\['x'\] must be \(2,\) float32.*got \(3,\)"),
    "carry device": ({"carry": {"x": torch.zeros(2, device="meta")}}, r"carry\['x'\] must be .* on cpu.*on meta"),
    "carry number": ({"carry": {"x": 1.0}}, r"carry\['x'\] must be .*got float"),
    "carry names": ({"carry": {"y": X}}, r"carry must have the structure that the loop was made with, .*'x'.*'y'"),
    "short data": ({"fixed": [torch.zeros(2, 2)]}, r"fixed\[0\] must be \(3, 2\) float32.*got \(2, 2\)"),
    "whole numbers": ({"fixed": [DATA.long()]}, r"fixed\[0\] must be .*got \(3, 2\) int64.*Convert it"),
    "more data": ({"fixed": [DATA, DATA]}, r"fixed must have the structure.*Give the same lists"),
    "many steps": ({"per_step": steps(5)}, r"at most 4 steps, the loop's capacity; got 5\. Take them in several"),
    "knobs": ({"per_step": steps(3, 2)}, r"per_step\.knobs must be \(3, 1\) float32, .*got \(3, 2\) float32"),
    "rows": ({"per_step": steps(3, 1, 3, 2)}, r"per_step\.rows must be \(1 or 3, 1\) int64, .*got \(3, 2\)"),
    "sets of rows": ({"per_step": steps(3, 1, 2)}, r"per_step\.rows must be \(1 or 3, 1\) .*got \(2, 1\)"),
    "row dtype": (
        {"per_step": PerStep(torch.zeros(1, 1), torch.zeros(2, 1))},
        r"per_step\.rows must be .* int64, .*float32",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_refuses_inputs_unlike_the_example(wrong: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"carry": {"x": X}, "per_step": steps(2), "fixed": [DATA]} | wrong
    with pytest.raises(ValueError, match=f"(?s){message}"):
        made()(**given)


def test_refuses_different_rows_if_the_example_has_one_set() -> None:
    loop = Loop(adding, {"x": X}, steps(2), [DATA], capacity=4)
    expanded = PerStep(torch.zeros(1, dtype=torch.long).expand(3, 1), torch.zeros(3, 1))
    assert torch.equal(loop({"x": X}, expanded, [DATA])[0]["x"], X + 3 * DATA.sum(0))
    with pytest.raises(ValueError, match=r"per_step\.rows must be \(1, 1\) int64.*got \(3, 1\)"):
        loop({"x": X}, steps(3, 1, 3), [DATA])


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (None, r"takes 2 normal and 2 uniform numbers; the call gives no noise\. Give noise="),
        (Noise(torch.zeros(2, 1), torch.zeros(2, 2)), r"noise\.normal must be \(2, 2 to 16\) .*got \(2, 1\)"),
        (Noise(torch.zeros(2, 2), torch.zeros(3, 2)), r"noise\.uniform must be \(2, 2\) .*got \(3, 2\)"),
        (Noise(torch.zeros(2, 2), torch.zeros(2, 2).double()), r"noise\.uniform must be .*float64"),
    ],
)
def test_refuses_missing_or_wrong_noise(noise: Noise | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(drawing)({"x": X}, steps(2), [DATA], noise)


def test_takes_exactly_the_noise_that_it_needs() -> None:
    noise = Noise(torch.ones(2, 2), torch.ones(2, 2))
    assert torch.equal(made(drawing)({"x": X}, steps(2), [DATA], noise)[0]["x"], X + 4)


@pytest.mark.parametrize("example", [steps(0), steps(1, 1, 0)])
def test_refuses_an_example_of_no_step(example: PerStep) -> None:
    with pytest.raises(ValueError, match=r"per_step must be an example of one step or more.*Give the rows"):
        Loop(adding, {"x": X}, example, [DATA])


def test_refuses_examples_that_are_no_tensors() -> None:
    with pytest.raises(TypeError, match=r"carry\['x'\] must be a tensor; got float\. Give torch\.tensor\(1\.0\)"):
        Loop(adding, {"x": 1.0}, steps(1), [DATA])


@pytest.mark.parametrize("noise", [None, NOT_DRAWN], ids=["lifted", "given"])
@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda x: ({"x": torch.cat([x, x])}, {}), ValueError, r"carry\['x'\] .*given, \(2,\) .*got \(4,\)"),
        (lambda x: ({"x": x.double()}, {}), ValueError, r"carry\['x'\] .*given, \(2,\) float32.*got \(2,\) float64"),
        (lambda x: ({"x": 1.0}, {}), ValueError, r"carry\['x'\] .*got float\. Convert it in the step"),
        (lambda x: ({"y": x}, {}), ValueError, r"must return a carry of the structure it was given, .*same order"),
        (lambda x: {"x": x}, TypeError, r"must return \(carry, record\), .*got dict"),
        (lambda x: ({"x": x}, (x,)), TypeError, r"must return \(carry, record\), .*got \(dict, tuple\)"),
        (lambda x: ({"x": x}, {"loss": 1.0}), TypeError, r"record\['loss'\] must be a tensor; got float"),
    ],
)  # fmt: skip
def test_refuses_a_step_whose_result_cannot_be_carried(
    result: Callable[[Tensor], Any], error: type[Exception], message: str, noise: NoiseSize | None
) -> None:
    with pytest.raises(error, match=message):
        made(lambda carry, data, noise, knobs: result(carry["x"]), noise=noise)


COUNTS: list[int] = []


def counting_globally(carry: Any, data: StepData, _: Noise, knobs: Tensor) -> Result:
    COUNTS.append(1)
    return {"x": carry["x"] + len(COUNTS)}, {}


def counting_in_closure() -> Step:
    calls = 0

    def step(carry: Any, data: StepData, _: Noise, knobs: Tensor) -> Result:
        nonlocal calls
        calls += 1
        return {"x": carry["x"] + calls}, {}

    return step


class CountingOnItself:
    number = 0

    def __call__(self, carry: Any, data: StepData, _: Noise, knobs: Tensor) -> Result:
        self.number += 1
        return {"x": carry["x"] + self.number}, {}


def drawing_from_python(carry: Any, data: StepData, _: Noise, knobs: Tensor) -> Result:
    import random

    return {"x": carry["x"] + random.random()}, {}


@pytest.mark.parametrize("noise", [None, NOT_DRAWN], ids=["lifted", "given"])
@pytest.mark.parametrize(
    ("step", "message"),
    [
        (counting_globally, "the step changes 'COUNTS' in Python from run to run, .*: keep it in the carry"),
        (counting_in_closure(), "the step changes 'calls' in Python from run to run"),
        (CountingOnItself(), "the step changes 'number' in Python from run to run"),
        (drawing_from_python, "the step draws random numbers from Python or numpy"),
    ],
)
def test_refuses_a_step_with_state_in_python(step: Step, message: str, noise: NoiseSize | None) -> None:
    with pytest.raises(Untraceable, match=message):
        made(step, noise=noise)


@pytest.mark.parametrize("noise", [None, NOT_DRAWN], ids=["lifted", "given"])
def test_a_refused_step_has_not_changed_the_example(noise: NoiseSize | None) -> None:
    def step(carry: Any, data: StepData, _: Noise, knobs: Tensor) -> Result:
        carry["x"].mul_(2)
        data.fixed[0].add_(1)
        return carry, {}

    carry, fixed = {"x": torch.ones(2)}, [torch.zeros(3, 2)]
    with pytest.raises(Untraceable, match=r"the step changes its carry or its data: return a new tensor"):
        Loop(step, carry, steps(1), fixed, noise)
    assert torch.equal(carry["x"], torch.ones(2))
    assert torch.equal(fixed[0], torch.zeros(3, 2))


def test_refuses_a_step_that_changes_a_tensor_of_its_own() -> None:
    kept = torch.zeros(2)

    def step(carry: Any, data: StepData, _: Noise, knobs: Tensor) -> Result:
        kept.add_(1)
        return {"x": carry["x"] + kept}, {}

    with pytest.raises(Untraceable, match=r"the step changes a tensor that is not made by the step"):
        made(step)


@pytest.mark.parametrize("compiled", [False, True])
def test_records_keep_their_dtype(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_compiler(monkeypatch)

    def step(carry: Any, data: StepData, _: Noise, knobs: Tensor) -> Result:
        count = carry["count"] + 1
        record = {"count": count, "x": carry["x"], "half": count / 2, "even": count % 2 == 0, "tiny": carry["x"][0]}
        return {"x": carry["x"], "count": count}, record

    start = {"x": torch.zeros(2).double(), "count": torch.tensor(2**24)}
    loop = Loop(step, start, steps(1), [], capacity=4)
    if compiled:
        loop.compile()
    _, record = loop(start, steps(3), [])
    assert list(record) == ["count", "x", "half", "even", "tiny"]
    assert record["count"].tolist() == [2**24 + 1, 2**24 + 2, 2**24 + 3]
    assert record["even"].tolist() == [False, True, False]
    assert (record["tiny"].dtype, record["half"].dtype) == (torch.float64, torch.float32)
    assert loop.scalars == ("count", "half", "even", "tiny")


def test_sequences_of_other_lengths_are_checked_together() -> None:
    example = Example("fixed", [torch.zeros(2, 9, 3), torch.zeros(2, 9), torch.zeros(2)])
    example.serve_lengths({0: (5, 9), 1: (5, 9)})
    longer = torch.zeros(2, 9, 3)
    found = example.match([longer[:, :6], torch.zeros(2, 6), torch.zeros(2)])
    assert [x.stride() for x in found] == [(27, 3, 1), (9, 1), (1,)]
    with pytest.raises(ValueError, match=re.escape("fixed[1] must be (2, 6) float32")):
        example.match([longer[:, :6], torch.zeros(2, 7), torch.zeros(2)])
    for wrong in (longer[:, :4], torch.zeros(2, 10, 3), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"fixed\[0\] must hold sequences of 5 to 9 steps; got shape"):
            example.match([wrong, torch.zeros(2, 6), torch.zeros(2)])
