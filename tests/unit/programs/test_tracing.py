"""Traced loss and gradients: equal to the eager ones on fresh inputs, or refused with a reason."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from deepprob.engine.noise import LiftedNoise
from deepprob.engine.random import RandomStream
from deepprob.engine.subject import Untraceable
from deepprob.fitting.gradients import GradientGraph, GradientProgram, trace_gradients
from deepprob.fitting.objectives import ELBO, Objective
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch
from deepprob.programs.program import Program

N, B = 24, 8
SAMPLED = ELBO(analytic_kl=False)
G = torch.Generator().manual_seed(0)
X = torch.randn(N, 3, generator=G)


class Small(Program):
    """Rows around a mean, which is a function of the program, its rows and a latent number."""

    buffer: Tensor
    plain: Tensor
    alias: Tensor
    norm: nn.Module
    net: nn.Module

    def __init__(self, mean: Callable[[Any, Tensor, Tensor], Any], **attributes: Any) -> None:
        super().__init__()
        self.mean = mean
        self.shift = nn.Parameter(torch.tensor(0.3))
        self.register_buffer("buffer", torch.zeros(3))
        for name, value in attributes.items():
            setattr(self, name, value)

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with self.data_plate(x):
            mean = torch.as_tensor(self.mean(self, x, w)) + self.shift
            pyro.sample("x", dist.Normal(mean + 0.0 * x, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))


def gradient_program(
    program: Program, data: Batch = (X,), batch_size: int = B, objective: Objective = SAMPLED
) -> tuple[GradientProgram, Batch, Tensor]:
    """A program to trace, and a batch of its first rows."""
    with RandomStream(0).drawing():
        instance = ProgramInstance(program, data, len(data[0]), full_batch=batch_size == len(data[0]))
    instance.program.train()
    return GradientProgram(instance, objective), tuple(x[:batch_size] for x in data), torch.arange(batch_size)


def traced(program: GradientProgram, batch: Batch, rows: Tensor) -> GradientGraph:
    with program.instance.running(), RandomStream(1).drawing():
        return trace_gradients(program, batch, rows)


def assert_equal(program: GradientProgram, graph: GradientGraph, data: Batch, seed: int = 7, size: int = B) -> float:
    """Compare the graph with an eager run at other parameters, rows, noise and weight, and return the loss."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in program.params:
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    rows = torch.randperm(len(data[0]), generator=generator)[:size]
    batch = tuple(x[rows] for x in data)
    normal, uniform = (x[0] for x in graph.noise.draw(1, [generator, generator], torch.device("cpu")))
    weight = torch.tensor(0.7, dtype=graph.noise.dtype)
    before = [x.clone() for x in graph.buffers]
    with RandomStream(seed).drawing(), torch.no_grad():
        loss, terms, gradients, buffers = graph.function(
            [p.detach() for p in program.params], graph.buffers, graph.fixed, batch, rows, normal, uniform, weight
        )
    assert all(torch.equal(a, b) for a, b in zip(graph.buffers, before, strict=True))
    with program.instance.running(), RandomStream(seed).drawing(), LiftedNoise(normal, uniform):
        eager_loss, eager_terms, eager_gradients = program(batch, rows, weight)
    close(loss, eager_loss)
    assert graph.names == tuple(eager_terms)
    for a, b in zip(terms, eager_terms.values(), strict=True):
        close(a, b)
    for a, b in zip(gradients, eager_gradients, strict=True):
        close(a, b)
    for a, b in zip(buffers, graph.buffers, strict=True):
        close(a, b)
    return float(loss)


def close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert bool(torch.isfinite(b).all())
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


# -- traced programs ------------------------------------------------------------------------------------------------


def detached(self: Small, x: Tensor, w: Tensor) -> Tensor:
    return w * self.shift.data


def frozen(self: Small, x: Tensor, w: Tensor) -> Tensor:
    found: Tensor = w * self.net(x)
    return found


def dropped(self: Small, x: Tensor, w: Tensor) -> Tensor:
    return w + F.dropout(x, 0.5)


def of_constants(self: Small, x: Tensor, w: Tensor) -> Tensor:
    return w * torch.tensor([1.0, 2.0, 3.0]) * torch.tensor(2.0).item()


def looped(self: Small, x: Tensor, w: Tensor) -> Tensor:
    found = torch.zeros(len(x))
    for i in range(x.shape[1]):
        found = found + i * x[:, i]
    return w * found.unsqueeze(-1) / len(x)


def cloned_in_place(self: Small, x: Tensor, w: Tensor) -> Tensor:
    y = x.clone()
    y[0] = 0.0
    return w + y.mul_(2.0).cumsum(0)


def flagged(self: Small, x: Tensor, w: Tensor) -> Tensor:
    y = w.clone()
    y[w.sum() > 0] = 1.0
    y.data[w.sum() <= 0] = 2.0
    return y


def gradient_inside(self: Small, x: Tensor, w: Tensor) -> Tensor:
    found: Tensor = torch.func.grad(lambda v: (v**3 * self.shift).sum())(w)
    return found


def mapped(self: Small, x: Tensor, w: Tensor) -> Tensor:
    found: Tensor = torch.vmap(lambda row: row * w + self.shift)(x)
    return found


def checkpointed(self: Small, x: Tensor, w: Tensor) -> Tensor:
    found: Tensor = torch.utils.checkpoint.checkpoint(lambda v: (v * self.shift).exp(), w, use_reentrant=False)
    return found


def inside_noise(self: Small, x: Tensor, w: Tensor) -> Tensor:
    return w + torch._standard_gamma(torch.ones(3)) + torch.multinomial(torch.ones(4), 1)


def gathered(self: Small, x: Tensor, w: Tensor) -> Tensor:
    return torch.where(w > 0, w, 0.5 * w) + x[x[:, 0].argsort()]


def as_it_is(self: Small, x: Tensor, w: Tensor) -> Tensor:
    return w.unsqueeze(-1) * x


TRACED = [
    detached, dropped, of_constants, looped, cloned_in_place, gradient_inside, mapped, checkpointed, inside_noise,
    gathered, flagged,
]  # fmt: skip


@pytest.mark.parametrize("mean", TRACED, ids=lambda f: f.__name__)
def test_graph_equals_the_eager_run_on_fresh_inputs(mean: Callable[..., Any]) -> None:
    program, batch, rows = gradient_program(Small(mean))
    graph = traced(program, batch, rows)
    losses = {assert_equal(program, graph, (X,), seed) for seed in (7, 8, 9)}
    assert len(losses) == 3


@pytest.mark.parametrize("objective", [ELBO(), SAMPLED, ELBO(particles=3)], ids=repr)
def test_objectives(objective: Objective) -> None:
    program, batch, rows = gradient_program(Small(as_it_is), objective=objective)
    graph = traced(program, batch, rows)
    assert_equal(program, graph, (X,))
    assert graph.noise.normal in (1, 3)


def test_frozen_parameters_are_inputs_and_get_no_gradient() -> None:
    net = nn.Linear(3, 3).requires_grad_(False)
    program, batch, rows = gradient_program(Small(frozen, net=net))
    graph = traced(program, batch, rows)
    assert len(program.params) == 2
    assert len(graph.fixed) == 3  # the layer, and the buffer that is not read
    assert_equal(program, graph, (X,))
    with torch.no_grad():
        for x in graph.fixed:
            x.add_(1.0)
    assert_equal(program, graph, (X,))


def test_traces_programs_in_float64() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        program, batch, rows = gradient_program(Small(dropped), data := (X.double(),))
        graph = traced(program, batch, rows)
        assert graph.noise.dtype == torch.float64
        assert all(p.dtype == torch.float64 for p in program.params)
        assert_equal(program, graph, data)
    finally:
        torch.set_default_dtype(before)


def test_traces_programs_of_mixed_dtypes() -> None:
    scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    program, batch, rows = gradient_program(Small(lambda self, x, w: (w * self.scale).to(x.dtype), scale=scale))
    graph = traced(program, batch, rows)
    assert {p.dtype for p in program.params} == {torch.get_default_dtype(), torch.float64}
    assert_equal(program, graph, (X,))


class Twice(Program):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))

    def model(self, x: Tensor, y: Tensor) -> None:
        with self.data_plate(x):
            pyro.sample("y", dist.Normal(self.slope * x + x * x, 1.0).to_event(1), obs=y)

    def guide(self, x: Tensor, y: Tensor) -> None:
        pass


def test_tensor_given_twice_becomes_two_inputs() -> None:
    program, batch, rows = gradient_program(Twice(), (X, X))
    graph = traced(program, (batch[0], batch[0]), rows)
    other = torch.randn(N, 3, generator=torch.Generator().manual_seed(3))
    assert_equal(program, graph, (X, other))
    program, batch, rows = gradient_program(Twice(), (X[:, :2], X[:, 1:]))  # two overlapping views
    assert_equal(program, traced(program, batch, rows), (other[:, :2], X[:, :2]))


def test_traces_a_full_batch() -> None:
    program, batch, rows = gradient_program(Small(looped), batch_size=N)
    assert_equal(program, traced(program, batch, rows), (X,), size=N)


# -- buffers --------------------------------------------------------------------------------------------------------


def normed(self: Small, x: Tensor, w: Tensor) -> Tensor:
    found: Tensor = w * self.norm(x)
    return found


def averaged(self: Small, x: Tensor, w: Tensor) -> Tensor:
    self.buffer.mul_(0.9).add_(0.1 * x.mean(0))
    return w + self.buffer


def counted(self: Small, x: Tensor, w: Tensor) -> Tensor:
    self.buffer[1] += 1
    return w * self.buffer


def detached_sum(self: Small, x: Tensor, w: Tensor) -> Tensor:
    self.buffer.copy_(self.buffer + w.detach() * self.shift.detach())
    return w * self.buffer


@pytest.mark.parametrize(
    ("mean", "attributes"),
    [(normed, {"norm": nn.BatchNorm1d(3)}), (averaged, {}), (counted, {}), (detached_sum, {})],
    ids=["batch norm", "average", "a part of a buffer", "of a draw"],
)
def test_graph_updates_buffers_but_tracing_does_not(mean: Callable[..., Any], attributes: dict[str, Any]) -> None:
    program, batch, rows = gradient_program(Small(mean, **attributes))
    names = dict(program.instance.program.named_buffers())
    before = {n: b.clone() for n, b in names.items()}
    graph = traced(program, batch, rows)
    assert all(torch.equal(b, before[n]) for n, b in names.items())
    changing = {id(b) for n, b in names.items() if not attributes or n.startswith("norm")}
    assert {id(x) for x in graph.buffers} == changing
    for seed in (1, 2, 3):  # each continues from the buffers of the previous eager run
        assert_equal(program, graph, (X,), seed)
    assert not any(torch.equal(b, before[n]) for n, b in names.items() if id(b) in changing)


def test_refuses_a_buffer_that_the_first_run_left_unchanged() -> None:
    def largest(self: Small, x: Tensor, w: Tensor) -> Tensor:
        self.buffer.copy_(torch.maximum(self.buffer, x.mean(0)))
        return w + self.buffer

    data = torch.cat([X[:B] - 9.0, X[B:]])
    program, batch, rows = gradient_program(Small(largest), (data,))
    with pytest.raises(Untraceable, match="buffer"):
        traced(program, batch, rows)


def test_evaluation_mode_has_a_graph_of_its_own() -> None:
    program, batch, rows = gradient_program(Small(normed, norm=nn.BatchNorm1d(3)))
    program.instance.program.eval()
    graph = traced(program, batch, rows)
    assert graph.buffers == []
    assert_equal(program, graph, (X,))


# -- refused programs -----------------------------------------------------------------------------------------------


VALUE = r"the computation depends on a value of a tensor \(if, while or \.item\(\)\)"


def item_of_a_draw(self: Small, x: Tensor, w: Tensor) -> Tensor:
    return w * w.item()


def branch(self: Small, x: Tensor, w: Tensor) -> Tensor:
    if w > 0:
        return w
    return 2 * w


def branch_on_rows(self: Small, x: Tensor, w: Tensor) -> Tensor:
    return w if (x > 0).all() else 2 * w


def float_of_a_parameter(self: Small, x: Tensor, w: Tensor) -> Tensor:
    return w * float(self.shift.detach())


def float_of_a_buffer(self: Small, x: Tensor, w: Tensor) -> Tensor:
    return w * float(self.buffer.sum())


def int_of_rows(self: Small, x: Tensor, w: Tensor) -> Tensor:
    return w * int(x.sum())


def while_loop(self: Small, x: Tensor, w: Tensor) -> Tensor:
    while w.abs() > 1:
        w = w / 2
    return w


def finite_only(self: Small, x: Tensor, w: Tensor) -> Tensor:
    assert bool(torch.isfinite(w))
    return w


def changed_in_place(self: Small, x: Tensor, w: Tensor) -> Tensor:
    self.plain += 1
    return w * self.plain


def changed_in_part(self: Small, x: Tensor, w: Tensor) -> Tensor:
    self.plain[0] += 1
    return w * self.plain


def python_random(self: Small, x: Tensor, w: Tensor) -> Tensor:
    return w * random.random()


def numpy_random(self: Small, x: Tensor, w: Tensor) -> Tensor:
    return w * float(np.random.rand())


def read_alias(self: Small, x: Tensor, w: Tensor) -> Tensor:
    found: Tensor = w * self.alias
    return found


@pytest.mark.parametrize(
    ("mean", "line"),
    [
        (item_of_a_draw, "return w * w.item()"),
        (branch, "if w > 0:"),
        (branch_on_rows, r"return w if (x > 0).all() else 2 * w"),
        (float_of_a_parameter, "return w * float(self.shift.detach())"),
        (float_of_a_buffer, r"return w * float(self.buffer.sum())"),
        (int_of_rows, r"return w * int(x.sum())"),
        (while_loop, "while w.abs() > 1:"),
        (finite_only, r"assert bool(torch.isfinite(w))"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_error_shows_the_line_that_reads_a_value(mean: Callable[..., Any], line: str) -> None:
    program, batch, rows = gradient_program(Small(mean))
    number = mean.__code__.co_firstlineno
    with pytest.raises(Untraceable, match=rf"^{VALUE}, at test_tracing\.py:{number + 1} `") as caught:
        traced(program, batch, rows)
    assert str(caught.value).endswith(f"`{line}`")


@pytest.mark.parametrize(
    ("mean", "message"),
    [
        (changed_in_place, r"the program changes a tensor that is not one of its buffers: use register_buffer"),
        pytest.param(
            changed_in_part,
            r"the program changes a tensor that is not one of its buffers: use register_buffer",
            marks=(),
        ),
        (python_random, r"the program draws random numbers from Python or numpy, which would be frozen"),
        pytest.param(
            numpy_random,
            r"the program draws random numbers from Python or numpy, which would be frozen",
            marks=(),
        ),
        (read_alias, r"the program reads a parameter's \.data, which would be frozen"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refuses_values_that_a_graph_would_freeze(mean: Callable[..., Any], message: str) -> None:
    np.random.rand()  # leave the generator in the middle of a block, its usual state
    program, batch, rows = gradient_program(Small(mean, plain=torch.zeros(3), alias=torch.zeros(())))
    program.instance.program.alias = program.params[0].data
    with pytest.raises(Untraceable, match=message):
        traced(program, batch, rows)


def test_refuses_a_number_of_rows_that_depends_on_values() -> None:
    program, batch, rows = gradient_program(Small(lambda self, x, w: w * len(x[x[:, 0] + self.shift > 0])))
    with pytest.raises(Untraceable):
        traced(program, batch, rows)


def test_failed_trace_leaves_the_program_unchanged() -> None:
    def counts_and_branches(self: Small, x: Tensor, w: Tensor) -> Tensor:
        self.buffer += 1
        return w if w > 0 else 2 * w

    program, batch, rows = gradient_program(Small(counts_and_branches))
    params = [p.detach().clone() for p in program.params]
    buffer = program.instance.program.get_buffer("buffer").clone()
    with pytest.raises(Untraceable):
        traced(program, batch, rows)
    assert torch.equal(program.instance.program.get_buffer("buffer"), buffer)
    assert all(torch.equal(a, b) for a, b in zip(program.params, params, strict=True))
    assert all(p.grad is None for p in program.params)
    loss, *_ = run_eagerly(program, batch, rows)
    assert bool(torch.isfinite(loss))


def run_eagerly(program: GradientProgram, batch: Batch, rows: Tensor) -> tuple[Tensor, Any, list[Tensor]]:
    with program.instance.running(), RandomStream(2).drawing():
        return program(batch, rows, 1.0)


def test_tracing_keeps_the_callers_random_states() -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1:3]  # type: ignore[index]
    program, batch, rows = gradient_program(Small(dropped))
    traced(program, batch, rows)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert states[2][1] == np.random.get_state()[2]  # type: ignore[index]


def test_measure_counts_noise_and_restores_buffers() -> None:
    program, batch, rows = gradient_program(Small(averaged))
    buffer = program.instance.program.get_buffer("buffer")
    before = buffer.clone()
    with program.instance.running(), RandomStream(1).drawing():
        size, changed = program.measure(batch, rows)
        again, _ = program.measure(batch, rows)
    assert size == again
    assert (size.normal, size.uniform, size.unserved) == (1, 0, ())
    assert [id(x) for x in changed] == [id(buffer)]
    assert torch.equal(buffer, before)


def test_traces_a_module_registered_by_pyro_module() -> None:
    net = nn.Linear(3, 3)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(x), 1.0).to_event(1), obs=x)

    program, batch, rows = gradient_program(Program.of(model, lambda x: None, data_plate="data"))
    assert_equal(program, traced(program, batch, rows), (X,))


@pytest.mark.parametrize("batch_first", [True, False])
def test_lengths_of_packed_sequences_are_traced(batch_first: bool) -> None:
    lengths = torch.tensor([2, 4, 1])
    packed = pack_padded_sequence(X[:12].reshape(3, 4, 3), lengths, batch_first=True, enforce_sorted=False)

    def mean(program: Any, x: Tensor, w: Tensor) -> Tensor:
        padded, found = pad_packed_sequence(packed, batch_first=batch_first)
        return (w * padded).sum() + found.sum() + found[1]

    program, batch, rows = gradient_program(Small(mean))
    assert_equal(program, traced(program, batch, rows), (X,))


def test_invalid_class_index_makes_a_traced_run_nan_and_an_eager_one_raise() -> None:
    def mean(program: Any, x: Tensor, w: Tensor) -> Tensor:
        return F.one_hot((x[:, 0] > 0).long() + 2 * (x[:, 0] > 10).long(), 3).float() * w

    program, batch, rows = gradient_program(Small(mean))
    graph = traced(program, batch, rows)
    assert_equal(program, graph, (X,))
    normal, uniform = graph.noise.draw_once([G, G], torch.device("cpu"))
    params = [p.detach() for p in program.params]
    strange = batch[0].clone()
    strange[0, 0] = 11.0
    for x, finite in ((batch[0], True), (strange, False)):
        loss = graph.function(params, graph.buffers, graph.fixed, (x,), rows, normal, uniform, torch.ones(()))[0]
        assert bool(loss.isfinite()) is finite
    with pytest.raises(RuntimeError, match=r"one_hot|Class values"), program.instance.running():
        program((strange,), rows, 1.0)
