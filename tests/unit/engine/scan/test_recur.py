from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from deepprob.distributions import GaussianPath
from deepprob.engine.native.build import compile_module
from deepprob.engine.scan.operator import run_loop
from deepprob.engine.scan.recur import Cell, recur
from deepprob.models.deep_markov_model import Combiner, GatedTransition
from deepprob.networks.recurrent import Recurrent

Tensors = tuple[Tensor, ...]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def traced(function: Callable[..., Any], *arguments: Any) -> GraphModule:
    """Trace a function as the steps of a fit are: first as it runs, then without in-place operations."""
    graph = make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)(*arguments)
    with torch.no_grad():
        pure: GraphModule = make_fx(torch.func.functionalize(graph), tracing_mode="fake", _allow_non_fake_inputs=True)(
            *arguments
        )
    pure.graph.eliminate_dead_code()
    return pure


def loops(graph: GraphModule) -> int:
    return sum(node.target is run_loop for node in graph.graph.nodes)


def gradients_of(cell: Cell) -> Callable[..., list[Tensor]]:
    """The loss of all results of a recurrence, and its gradient with respect to all arguments."""

    def run(state: list[Tensor], inputs: list[Tensor], params: list[Tensor]) -> list[Tensor]:
        last, outputs = recur(cell, state, inputs, params)
        loss = sum((((y + 0.3) ** 2).sum() for y in (*last, *outputs)), torch.zeros(()))
        leaves = [x for x in (*state, *inputs, *params) if x.requires_grad]
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return [loss.detach(), *(y.detach() for y in (*last, *outputs)), *gradients]

    return run


def lstm(state: Tensors, slices: Tensors, params: Tensors) -> tuple[Tensors, Tensors]:
    (h, c), (x, e), (weight, bias, out) = state, slices, params
    a, b, d, o = (nn.functional.linear(h, weight, bias) + x).chunk(4, -1)
    c = torch.sigmoid(b) * c + torch.sigmoid(a) * torch.tanh(d)
    h = torch.sigmoid(o) * torch.tanh(c) + e
    return (h, c), (h, h @ (0.5 * out.T))


def elementwise(state: Tensors, slices: Tensors, params: Tensors) -> tuple[Tensors, Tensors]:
    """Parameter gradients that are neither matrix products nor sums over a batch, and an unused parameter."""
    (h,), (x,), (scale, shift, _) = state, slices, params
    h = h.clone().mul_(scale.exp() * torch.ones_like(h)).add_(shift * x)  # in place on a copy
    return (h,), (h.sin(), x)


def weight_used_twice(state: Tensors, slices: Tensors, params: Tensors) -> tuple[Tensors, Tensors]:
    """One weight used twice, a constant, and a state that is returned unchanged."""
    (h, still), (x,), (weight,) = state, slices, params
    h = torch.tanh(h @ weight + still) @ weight.T * torch.tensor(0.5, dtype=h.dtype) + x
    return (h, still), (h,)


CELLS: dict[str, tuple[Cell, list[tuple[int, ...]], list[tuple[int, ...]], list[tuple[int, ...]]]] = {
    "lstm": (lstm, [(3, 4), (3, 4)], [(3, 16), (3, 4)], [(16, 4), (16,), (5, 4)]),
    "more axes": (lstm, [(2, 3, 4), (2, 3, 4)], [(2, 3, 16), (3, 4)], [(16, 4), (16,), (5, 4)]),
    "elementwise": (elementwise, [(3, 4)], [(3, 4)], [(4,), (3, 4), (2,)]),
    "weight used twice": (weight_used_twice, [(3, 4), (3, 5)], [(3, 4)], [(4, 5)]),
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("fixed_inputs", [False, True])
def test_a_loop_equals_the_unrolled_steps(name: str, fixed_inputs: bool) -> None:
    cell, *shapes = CELLS[name]

    def arguments(seed: int) -> list[list[Tensor]]:
        state, inputs, params = ([random(*shape, seed=seed) for shape in group] for group in shapes)
        inputs = [torch.stack([x + 0.1 * t for t in range(11)]) for x in inputs]
        return [
            [x.requires_grad_() for x in state],
            [x if fixed_inputs else x.requires_grad_() for x in inputs],
            [0.3 * x.detach() for x in params],
        ]

    def prepared(seed: int) -> list[list[Tensor]]:
        state, inputs, params = arguments(seed)
        return [state, inputs, [x.requires_grad_() for x in params]]

    run = gradients_of(cell)
    graph = traced(run, *prepared(0))
    assert loops(graph) == 2
    other = prepared(1)
    for mine, expected in zip(graph(*other), run(*other), strict=True):
        torch.testing.assert_close(mine, expected)


def test_the_size_of_the_graph_does_not_depend_on_the_number_of_steps() -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        _, (h,) = recur(lambda s, x, p: ((y := torch.tanh(s[0] @ p[0] + x[0]),), (y,)), [x[0] * 0], [x], [w])
        return torch.autograd.grad(h.sum(), w)[0]

    sizes = [len(traced(run, random(t, 2, 3), random(3, 3).requires_grad_()).graph.nodes) for t in (10, 40)]
    assert sizes[0] == sizes[1] < 60


def test_the_gradient_of_a_weight_is_one_matrix_product_after_the_loop() -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        _, (h,) = recur(lambda s, x, p: ((y := torch.tanh(s[0] @ p[0] + x[0]),), (y,)), [x[0] * 0], [x], [w])
        return torch.autograd.grad(h.sum(), w)[0]

    graph = traced(run, random(10, 2, 3), random(3, 3).requires_grad_())
    assert sum(node.target is torch.ops.aten.mm.default for node in graph.graph.nodes) == 1
    backward = [n for n in graph.graph.nodes if n.target is run_loop][1].args[0]
    inside = getattr(graph, backward.target).graph.nodes
    assert sum(node.target is torch.ops.aten.mm.default for node in inside) == 1  # the state's gradient


def test_without_gradients_there_is_one_loop() -> None:
    graph = traced(lambda x: recur(lambda s, x, p: ((s[0] + x[0],), (s[0],)), [x[0]], [x])[1], random(10, 2))
    assert loops(graph) == 1
    x = random(10, 2, seed=5)
    torch.testing.assert_close(graph(x)[0], torch.cat([x[:1], x[:1] + x[:-1].cumsum(0)]))


# Cells that are no pure functions of their arguments are unrolled -----------------------------------------------------


def test_a_random_cell_is_unrolled_without_extra_draws() -> None:
    def cell(state: Tensors, slices: Tensors, params: Tensors) -> tuple[Tensors, Tensors]:
        return (state[0] + torch.randn(2),), (state[0],)

    torch.manual_seed(0)
    expected = recur(cell, [torch.zeros(2)], [torch.zeros(10, 2)])
    torch.manual_seed(0)
    results: list[Tensors] = []

    def run(x: Tensor) -> Tensor:
        last, _ = recur(cell, [x[0]], [x])
        results.append(last)
        return last[0]

    assert loops(make_fx(run)(torch.zeros(10, 2))) == 0
    assert torch.equal(results[0][0], expected[0][0])


def test_trained_tensor_that_is_not_an_argument_keeps_its_gradient() -> None:
    weight = random(3).requires_grad_()

    def run(x: Tensor, weight: Tensor) -> Tensor:
        _, (h,) = recur(lambda s, x, p: ((y := s[0] * weight + x[0],), (y,)), [x[0]], [x])
        return torch.autograd.grad(h.sum(), weight)[0]

    x = random(10, 3)
    graph = traced(run, x, weight)
    assert loops(graph) == 0
    torch.testing.assert_close(graph(x, weight), run(x, weight))


def test_a_tensor_from_an_enclosing_scope_is_an_input_of_the_loop() -> None:
    def run(x: Tensor, w: Tensor) -> list[Tensor]:
        scale = x.mean().exp().detach()
        _, (h,) = recur(lambda s, x, p: ((y := torch.tanh(s[0] * scale + x[0] * p[0]),), (y,)), [x[0]], [x], [w])
        return list(torch.autograd.grad(h.sum(), [w]))

    w = random(3).requires_grad_()
    graph = traced(run, random(10, 3), w)
    assert loops(graph) == 2
    x = random(10, 3, seed=5)
    torch.testing.assert_close(graph(x, w), run(x, w))


def test_few_steps_are_unrolled() -> None:
    graph = traced(lambda x: recur(lambda s, x, p: ((s[0] + x[0],), (s[0],)), [x[0]], [x])[1][0], random(3, 2))
    assert loops(graph) == 0


@pytest.mark.parametrize("inputs", [[], [torch.zeros(0, 2)]])
def test_refuses_inputs_without_steps(inputs: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"recur got no inputs, or inputs without steps\. Give .* shape \(T, \.\.\.\)"):
        recur(lambda s, x, p: (s, s), [torch.zeros(2)], inputs)


# Users of recurrences -------------------------------------------------------------------------------------------------


def test_two_loops_in_one_graph_are_independent() -> None:
    def scaled(k: float) -> Cell:
        return lambda s, x, p: ((s[0] * k + x[0],), (s[0],))

    def run(x: Tensor) -> list[Tensor]:
        return [recur(scaled(k), [x[0]], [x])[0][0] for k in (2.0, 0.5)]

    x = random(10, 2)
    for mine, expected in zip(traced(run, x)(x), run(x), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("kind", ["gru", "lstm", "rnn"])
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"bidirectional": True}])
def test_the_graph_of_a_recurrent_network_equals_eager_torch(kind: str, options: dict[str, bool]) -> None:
    net = Recurrent(3, 4, kind=kind, **options).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * random(*p.shape))
    params, lengths = list(net.parameters()), torch.tensor([12, 5, 0, 9])
    x = random(4, 12, 3).requires_grad_()

    def run(x: Tensor, lengths: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
        y = net(x, lengths)
        return [y.detach(), *torch.autograd.grad((y + 0.2).square().sum(), [x, *params])]

    graph = traced(run, x, lengths, params)
    assert loops(graph) == 2 * len(net.cells)
    other, longer = random(4, 12, 3, seed=7).requires_grad_(), torch.tensor([1, 12, 7, 3])
    for mine, expected in zip(graph(other, longer, params), run(other, longer, params), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("sample_shape", [(), (2,)])
@pytest.mark.parametrize("kind", [GatedTransition, Combiner])
def test_paths_with_modules_as_kernels(kind: type[GatedTransition | Combiner], sample_shape: tuple[int, ...]) -> None:
    kernel = kind(4, 6).double()
    params = list(kernel.parameters())
    lengths, context = torch.tensor([12, 5, 9]), random(3, 12, 6).requires_grad_()
    path_of = [context] if kind is Combiner else []

    def run(context: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
        path = GaussianPath(kernel, kernel.start.value, lengths, 12, [context] if path_of else [])
        z = path.rsample(sample_shape)
        loss = path.log_prob(z).sum() + z.square().sum()
        wanted = [*path_of, *params]
        return [loss.detach(), *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)]

    torch.manual_seed(3)
    expected = run(context, params)
    torch.manual_seed(3)
    graph = make_fx(run, tracing_mode="real", _allow_non_fake_inputs=True)(context, params)
    assert loops(graph) == 2
    torch.manual_seed(3)
    for mine, theirs in zip(graph(context, params), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_path_with_a_function_as_kernel_is_unrolled() -> None:
    def run(slope: Tensor) -> Tensor:
        path = GaussianPath(lambda z: (slope * z, torch.ones_like(z)), torch.ones(2), torch.tensor([9]), 9)
        return torch.autograd.grad(path.rsample().sum(), slope)[0]

    slope = torch.tensor(0.5, requires_grad=True)
    torch.manual_seed(3)
    expected = run(slope)
    graph = make_fx(run, tracing_mode="real", _allow_non_fake_inputs=True)(slope)
    torch.manual_seed(3)
    assert loops(graph) == 0
    torch.testing.assert_close(graph(slope), expected)


@pytest.mark.slow
def test_a_compiled_loop_equals_eager_steps() -> None:
    cell, *shapes = CELLS["lstm"]
    state, inputs, params = ([random(*shape).float() for shape in group] for group in shapes)
    inputs = [torch.stack([x + 0.1 * t for t in range(11)]) for x in inputs]
    arguments = [*state, *inputs, *(0.3 * x for x in params)]

    def run(*flat: Tensor) -> Tensors:
        leaves = [x.detach().requires_grad_() for x in flat]
        return tuple(gradients_of(cell)(leaves[:2], leaves[2:4], leaves[4:]))

    native = compile_module(traced(run, *arguments), arguments)
    for mine, expected in zip(native([x + 0.1 for x in arguments]), run(*(x + 0.1 for x in arguments)), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
