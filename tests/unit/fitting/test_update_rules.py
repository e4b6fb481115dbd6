"""Updates of packed parameters against torch.optim: clipped, accumulated, averaged and skipped."""

from __future__ import annotations

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from deepprob.engine.packing import Packing, global_norm
from deepprob.engine.random import RandomStream
from deepprob.fitting.objectives import ELBO
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.update_rules import Carry, advance, first_carry, rule_named
from deepprob.inference import svi
from deepprob.inference.svi import init, step
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.program import Program
from deepprob.programs.run import Run

SHAPES: list[tuple[int, ...]] = [(), (3,), (0,), (17, 2), (1, 1, 5), (16,), (2**14,)]
# In float32, for the worst of 16 000 parameters: Adam divides by gradients close to zero.
ROUNDING = 2e-6
RULES: list[tuple[str, dict[str, Any]]] = [
    ("adam", {}),
    ("adam", {"betas": (0.5, 0.9), "eps": 1e-3}),
    ("adam", {"weight_decay": 0.1}),
    ("adamw", {}),
    ("adamw", {"weight_decay": 0.3, "betas": (0.8, 0.99)}),
    ("sgd", {}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
]


def tensors(shapes: list[tuple[int, ...]], seed: int, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, **options) for shape in shapes]


# -- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [SHAPES, [()], [(0,)], [(2**14,)], [(2**14 - 1,), (1,)]], ids=str)
def test_unpack_inverts_pack(shapes: list[tuple[int, ...]]) -> None:
    params = tensors(shapes, 0)
    packing = Packing(params)
    groups = packing.pack(params)
    assert len(groups) == packing.groups
    assert all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(packing.unpack(groups), params, strict=True))


def test_only_small_parameters_share_a_tensor() -> None:
    large, small = torch.zeros(2**14), torch.zeros(5)
    assert Packing([small] * 100).groups == 1
    assert Packing([large, small, large, small]).groups == 3
    assert Packing([large]).pack([large])[0] is large


def test_dtypes_are_packed_separately() -> None:
    params = [torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(4), torch.ones(1, dtype=torch.float16)]
    packing = Packing(params)
    groups = packing.pack(params)
    assert [g.dtype for g in groups] == [torch.get_default_dtype(), torch.float64, torch.float16] or (
        torch.get_default_dtype() == torch.float64
    )
    assert [x.dtype for x in packing.unpack(groups)] == [p.dtype for p in params]


def test_unpacked_views_write_through() -> None:
    packing = Packing(params := tensors(SHAPES, 0))
    groups = packing.pack([p.clone() for p in params])
    for view in packing.unpack(groups):
        view.fill_(7.0)
    again = packing.unpack(groups)
    assert all(bool((x == 7.0).all()) for x in again)
    assert float(groups[0].sum()) == 7.0 * sum(p.numel() for p in params[:-1])  # the gaps do not change


def test_gaps_are_zero_and_no_parameter_shares_a_register() -> None:
    packing = Packing(params := [torch.ones(3), torch.ones(17), torch.ones(1)])
    (group,) = packing.pack(params)
    assert len(group) == 16 + 32 + 16
    assert float(group.sum()) == 21.0
    assert [x.storage_offset() for x in packing.unpack([group])] == [0, 16, 48]


def test_packs_transposed_parameters_by_value() -> None:
    params = [torch.arange(6.0).reshape(2, 3).T, torch.arange(2.0**14).reshape(2**7, 2**7).T]
    packing = Packing(params)
    assert all(torch.equal(a, b) for a, b in zip(packing.unpack(packing.pack(params)), params, strict=True))


# -- rules ----------------------------------------------------------------------------------------------------------


def curvature(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    return [0.1 + x.abs() for x in tensors(shapes, 5)]


def gradients_at(params: list[Tensor], number: int) -> list[Tensor]:
    """Gradients of a quadratic, with noise that depends on the step."""
    noise = tensors([tuple(p.shape) for p in params], 1000 + number, dtype=params[0].dtype)
    curves = curvature([tuple(p.shape) for p in params])
    return [c.to(p.dtype) * p + n for p, c, n in zip(params, curves, noise, strict=True)]


def ours(
    name: str,
    options: dict[str, Any],
    start: list[Tensor],
    steps: int,
    *,
    average: float | None = None,
    rate: float = 0.01,
    **more: Any,
) -> tuple[Packing, Carry]:
    """Take steps by our rule; the learning rate falls as 1 / (1 + step / 10)."""
    found = rule_named(name, options)
    assert found is not None
    rule, moments = found
    packing = Packing(start)
    carry = first_carry(
        packing.pack([p.clone() for p in start]),
        moments=moments,
        averaged=average is not None,
        accumulating=more.get("accumulate", 1) > 1,
    )
    for number in range(steps):
        gradients = packing.pack(gradients_at(packing.unpack(carry["packed"]), number))
        now = torch.tensor(rate / (1 + number / 10), dtype=torch.float64)
        carry = advance(carry, gradients, torch.tensor(True), now, torch.tensor(number), rule, average=average, **more)
    return packing, carry


def torchs(
    name: str, options: dict[str, Any], start: list[Tensor], steps: int, clip_norm: float | None = None
) -> list[Tensor]:
    params = [p.clone().requires_grad_() for p in start]
    built = Optimizer(name, options=options).build(params, 0.01)
    for number in range(steps):
        for p, g in zip(params, gradients_at([p.detach() for p in params], number), strict=True):
            p.grad = g
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, clip_norm)
        built.param_groups[0]["lr"] = 0.01 / (1 + number / 10)
        built.step()
    return [p.detach() for p in params]


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-6) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "options"), RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rules_equal_torch(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    start = tensors(SHAPES, 0, dtype=dtype)
    packing, carry = ours(name, options, start, 50)
    assert_close(
        packing.unpack(carry["packed"]), torchs(name, options, start, 50), ROUNDING if dtype.itemsize == 4 else 1e-12
    )
    assert int(carry["count"][0]) == 50


def test_rules_with_mixed_dtypes() -> None:
    start = [*tensors([(3,), (4, 2)], 0, dtype=torch.float32), *tensors([(5,)], 1, dtype=torch.float64)]

    def mixed(p: list[Tensor]) -> list[Tensor]:
        return [0.5 * x for x in p]

    packing = Packing(start)
    rule, moments = rule_named("adam", {}) or (None, 0)
    assert rule is not None
    carry = first_carry(packing.pack(start), moments=moments, averaged=True, accumulating=True)
    for number in range(10):
        gradients = packing.pack(mixed(packing.unpack(carry["packed"])))
        assert bool(torch.isfinite(global_norm(gradients)))
        carry = advance(
            carry, gradients, torch.tensor(True), torch.tensor(0.1), torch.tensor(number), rule,
            clip_norm=0.1, average=0.9, accumulate=2,
        )  # fmt: skip
    for name in ("packed", "average", "first", "second", "accumulated"):
        assert [x.dtype for x in carry[name]] == [torch.float32, torch.float64]
    assert all(bool((a.abs() < b.abs()).all()) for a, b in zip(packing.unpack(carry["packed"]), start, strict=True))


@pytest.mark.parametrize("name", ["rmsprop", "adagrad", "nadam"])
def test_optimizers_of_torch_alone_have_no_rule(name: str) -> None:
    assert rule_named(name, {}) is None
    assert Optimizer(name).rule is None


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"maximize": True}, {"foreach": False}])
def test_unknown_options_leave_the_update_to_torch(options: dict[str, Any]) -> None:
    assert rule_named("adam", options) is None
    assert Optimizer(torch.optim.Adam, options=options).rule is None
    assert Optimizer(torch.optim.Adam).rule is not None


def test_advance_refuses_optimizers_without_a_rule() -> None:
    carry = first_carry([torch.zeros(3)], moments=0, averaged=False, accumulating=False)
    ones = torch.ones(())
    with pytest.raises(
        ValueError, match=r"rmsprop has no update rule in deepprob\. Use Optimizer\.build, and call its step\."
    ):
        Optimizer("rmsprop").advance(carry, [torch.zeros(3)], ones > 0, ones, ones)


# -- clipping, accumulation, averages -------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [1e-3, 1.0, 1e9])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_clipping_equals_torch(name: str, clip_norm: float) -> None:
    start = tensors(SHAPES, 0)
    packing, carry = ours(name, {}, start, 50, clip_norm=clip_norm)
    assert_close(packing.unpack(carry["packed"]), torchs(name, {}, start, 50, clip_norm), ROUNDING)


def test_norm_of_all_gradients() -> None:
    gradients = tensors([(), (3, 2), (5,)], 0)
    assert float(global_norm(gradients)) == pytest.approx(float(torch.nn.utils.get_total_norm(gradients)), rel=1e-6)
    assert float(global_norm(gradients[1:2])) == pytest.approx(float(gradients[1].norm()), rel=1e-6)


@pytest.mark.parametrize("every", [2, 3, 5])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_accumulation_equals_one_step_along_the_mean_gradient(every: int, clip_norm: float | None) -> None:
    start, (rule, moments) = tensors(SHAPES, 0), rule_named("adam", {}) or pytest.fail()
    packing = Packing(start)
    many = first_carry(packing.pack(start), moments=moments, averaged=True, accumulating=True)
    one = first_carry(packing.pack(start), moments=moments, averaged=True, accumulating=False)
    yes, rate = torch.tensor(True), torch.tensor(0.01)
    for update in range(4):
        gradients = [packing.pack(tensors(SHAPES, 100 * update + k)) for k in range(every)]
        before = many["packed"]
        for k, g in enumerate(gradients):
            assert all(torch.equal(a, b) for a, b in zip(many["packed"], before, strict=True))
            number = torch.tensor(update * every + k)
            many = advance(many, g, yes, rate, number, rule, clip_norm=clip_norm, average=0.5, accumulate=every)
        mean = [torch.stack(parts).mean(0) for parts in zip(*gradients, strict=True)]
        one = advance(one, mean, yes, rate, torch.tensor(update), rule, clip_norm=clip_norm, average=0.5)
        for name in one:
            assert_close(many[name], one[name], 1e-5)
        assert not any(bool(x.any()) for x in many["accumulated"])


def test_early_averages_forget_the_start_faster() -> None:
    start, decay = [torch.zeros(3)], 0.9
    (rule, moments), packing = rule_named("sgd", {}) or pytest.fail(), Packing(start)
    carry = first_carry(packing.pack(start), moments=moments, averaged=True, accumulating=False)
    expected = p = torch.zeros(3)
    for number in range(1, 120):
        g = packing.pack([torch.full((3,), -1.0)])
        carry = advance(carry, g, torch.tensor(True), torch.tensor(0.1), torch.tensor(number - 1), rule, average=decay)
        p = p + 0.1
        kept = min(decay, (1 + number) / (10 + number))
        expected = kept * expected + (1 - kept) * p
        (found,) = packing.unpack(carry["average"])
        assert torch.allclose(found, expected, rtol=1e-5)
    assert 0 < float(p[0] - found[0]) == pytest.approx(0.1 * decay / (1 - decay), rel=1e-2)


def test_advance_does_not_change_its_carry() -> None:
    start = tensors(SHAPES, 0)
    packing, carry = ours("adam", {}, start, 3, accumulate=2, average=0.9, clip_norm=1.0)
    before = copy.deepcopy(carry)
    rule = (rule_named("adam", {}) or pytest.fail())[0]
    advance(
        carry, packing.pack(start), torch.tensor(True), torch.tensor(0.1), torch.tensor(3), rule,
        clip_norm=1.0, average=0.9, accumulate=2,
    )  # fmt: skip
    assert all(torch.equal(a, b) for n in carry for a, b in zip(carry[n], before[n], strict=True))


# -- steps that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "options"), RULES, ids=str)
def test_step_that_is_not_finite_is_skipped(name: str, options: dict[str, Any], bad: float) -> None:
    packing, carry = ours(name, options, tensors(SHAPES, 0), 3, average=0.9, clip_norm=1.0)
    gradients = packing.pack([torch.full(shape, bad) for shape in SHAPES])
    rule = (rule_named(name, options) or pytest.fail())[0]
    new = advance(
        carry, gradients, torch.tensor(False), torch.tensor(0.1), torch.tensor(3), rule, clip_norm=1.0, average=0.9
    )
    assert new.keys() == carry.keys()
    assert all(torch.equal(a, b) for n in carry for a, b in zip(new[n], carry[n], strict=True))


@pytest.mark.parametrize("bad_at", [0, 1, 2])
def test_accumulation_leaves_out_skipped_steps(bad_at: int) -> None:
    start, (rule, moments) = tensors(SHAPES, 0), rule_named("sgd", {}) or pytest.fail()
    packing = Packing(start)
    carry = first_carry(packing.pack(start), moments=moments, averaged=False, accumulating=True)
    for k in range(3):
        g = packing.pack([torch.full(shape, math.nan if k == bad_at else 1.0) for shape in SHAPES])
        carry = advance(carry, g, torch.tensor(k != bad_at), torch.tensor(0.3), torch.tensor(k), rule, accumulate=3)
    assert_close(packing.unpack(carry["packed"]), [p - 0.3 * 2 / 3 for p in start])
    assert int(carry["count"][0]) == 1


@pytest.mark.parametrize(("name", "options"), RULES, ids=str)
def test_no_update_if_every_accumulated_step_was_skipped(name: str, options: dict[str, Any]) -> None:
    packing, carry = ours(name, options, tensors(SHAPES, 0), 4, accumulate=2, average=0.9)
    rule, new = (rule_named(name, options) or pytest.fail())[0], carry
    gradients = packing.pack([torch.full(shape, math.nan) for shape in SHAPES])
    for number in (4, 5):
        new = advance(
            new, gradients, torch.tensor(False), torch.tensor(0.1), torch.tensor(number), rule,
            average=0.9, accumulate=2,
        )  # fmt: skip
    assert all(torch.equal(a, b) for n in carry for a, b in zip(new[n], carry[n], strict=True))


# -- inside svi -----------------------------------------------------------------------------------------------------


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 0.5), obs=y)


def rows() -> tuple[Tensor, Tensor]:
    x = tensors([(40, 3)], 0)[0]
    return x, x @ torch.tensor([1.0, 2.0, -1.0])


OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    ("adam", {}),
    ("adamw", {"weight_decay": 0.01}),
    ("sgd", {"momentum": 0.9}),
    ("rmsprop", {}),
    (torch.optim.RAdam, {}),
    (torch.optim.Adam, {"amsgrad": True}),
]
EXTRAS: list[dict[str, Any]] = [
    {},
    {"clip_norm": 0.5},
    {"average": 0.9},
    {"accumulate": 3},
    {"clip_norm": 0.5, "average": 0.9, "accumulate": 3},
]


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=str)
def test_steps_equal_torch(name: Any, options: dict[str, Any], extra: dict[str, Any]) -> None:
    """Every optimizer against torch's step, with clipping and the mean of gradients by hand."""
    (x, y), objective = rows(), ELBO()
    optimizer = Optimizer(name, learning_rate=0.05, options=options, **extra)
    program = Program.of(regression, "normal", data_plate="data")
    state = init(program, (x, y), optimizer=optimizer, batch_size=None, steps=12)
    twin = ProgramInstance(program, (x, y), 40, full_batch=True)
    twin.load(state.instance.tensors())
    every, number = optimizer.accumulate, 0
    params = list(twin.parameters().values())
    built, average = optimizer.build(params, 0.05), [p.detach().clone() for p in params]
    state.noise, noise = RandomStream(0), RandomStream(0)
    for k in range(12):
        state, _ = step(state, learning_rate=0.05)
        with twin.running(), noise.drawing():
            loss, _ = objective(Run(twin.program, (x, y), torch.arange(40), 40))
            (loss / every).backward()
        if (k + 1) % every:
            continue
        if optimizer.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, optimizer.clip_norm)
        built.step()
        built.zero_grad()
        number += 1
        kept = min(optimizer.average or 0.0, (1 + number) / (10 + number))
        average = [kept * a + (1 - kept) * p.detach() for a, p in zip(average, params, strict=True)]
    found = [p.detach() for p in state.params.values()]
    assert_close(found, [p.detach() for p in params], 1e-5)
    assert (state.average is None) == (optimizer.average is None)
    if state.average is not None:
        assert_close(list(state.average.values()), average, 1e-5)


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=str)
def test_svi_takes_every_optimizer(name: Any, options: dict[str, Any], extra: dict[str, Any]) -> None:
    optimizer = Optimizer(name, learning_rate=0.05, options=options, **extra)
    program = Program.of(regression, "normal", data_plate="data")
    posterior = svi(program, rows(), epochs=15, batch_size=10, optimizer=optimizer)
    elbo = posterior.history.epochs["elbo"]
    assert len(posterior.history.steps["skipped"]) == 60
    assert not any(posterior.history.steps["skipped"])
    assert elbo[-1] > elbo[0]
