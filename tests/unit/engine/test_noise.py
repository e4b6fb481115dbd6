"""Noise as an input: every served operation keeps its distribution, shape and dtype.

The moments are z-tests at 5 standard deviations with 40 000 draws, two for each of about thirty cases: a right
distribution fails one of them with probability below 5e-5. Seeds are fixed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepprob.engine.noise import _SERVED, LiftedNoise, NoiseSize
from deepprob.engine.served_calls import _FUNCTIONS, replaced_calls, served

N = 40_000
SHARES = torch.tensor([0.2, 0.3, 0.5])
LIMIT = 5.0  # standard deviations

aten = torch.ops.aten


def lifted(f: Callable[[], Any], seed: int = 0, normal: int = 2 * N, uniform: int = 2 * N) -> tuple[Any, NoiseSize]:
    """Call a function with lifted noise from a seed; return its result and the noise used."""
    generator = torch.Generator().manual_seed(seed)
    size = NoiseSize(normal, uniform, torch.float64)
    eps, u = size.draw(1, (generator, generator), torch.device("cpu"))
    with LiftedNoise(eps[0], u[0]) as noise:
        return f(), noise.size


def empty(*shape: int) -> Tensor:
    return torch.full(shape or (N,), math.nan)


# Name, function, its mean and standard deviation (of a log if it has no moments), and the kind of noise it takes.
Case = tuple[str, Callable[[], Tensor], float, float, str]
CASES: list[Case] = [
    ("randn", lambda: torch.randn(N), 0.0, 1.0, "normal"),
    ("randn_like", lambda: torch.randn_like(empty()), 0.0, 1.0, "normal"),
    ("normal_", lambda: empty().normal_(), 0.0, 1.0, "normal"),
    ("normal_ with moments", lambda: empty().normal_(3.0, 2.0), 3.0, 2.0, "normal"),
    ("normal_ by name", lambda: empty().normal_(std=2.0), 0.0, 2.0, "normal"),
    ("normal, two tensors", lambda: torch.normal(torch.full((N,), 3.0), torch.full((N,), 2.0)), 3.0, 2.0, "normal"),
    ("normal, tensor and number", lambda: torch.normal(torch.full((N,), 3.0), 2.0), 3.0, 2.0, "normal"),
    ("normal, number and tensor", lambda: torch.normal(3.0, torch.full((N,), 2.0)), 3.0, 2.0, "normal"),
    ("normal, two numbers", lambda: torch.normal(3.0, 2.0, (N,)), 3.0, 2.0, "normal"),
    ("rand", lambda: torch.rand(N), 0.5, 12**-0.5, "uniform"),
    ("rand_like", lambda: torch.rand_like(empty()), 0.5, 12**-0.5, "uniform"),
    ("uniform_", lambda: empty().uniform_(), 0.5, 12**-0.5, "uniform"),
    ("uniform_ with limits", lambda: empty().uniform_(2.0, 5.0), 3.5, 3 * 12**-0.5, "uniform"),
    ("uniform_ by name", lambda: empty().uniform_(to=3.0), 1.5, 3 * 12**-0.5, "uniform"),
    ("bernoulli", lambda: torch.bernoulli(torch.full((N,), 0.3)), 0.3, 0.21**0.5, "uniform"),
    ("bernoulli of a number", lambda: torch.bernoulli(empty(), 0.3), 0.3, 0.21**0.5, "uniform"),
    (
        "bernoulli of integers",
        lambda: torch.bernoulli(torch.zeros(N, dtype=torch.long), 0.3),
        0.3,
        0.21**0.5,
        "uniform",
    ),
    ("bernoulli_", lambda: empty().bernoulli_(0.3), 0.3, 0.21**0.5, "uniform"),
    ("bernoulli_ of a tensor", lambda: empty().bernoulli_(torch.full((N,), 0.3)), 0.3, 0.21**0.5, "uniform"),
    ("bernoulli_ of truths", lambda: torch.zeros(N, dtype=torch.bool).bernoulli_(0.3), 0.3, 0.21**0.5, "uniform"),
    ("exponential_", lambda: empty().exponential_(), 1.0, 1.0, "uniform"),
    ("exponential_ of a rate", lambda: empty().exponential_(4.0), 0.25, 0.25, "uniform"),
    # |x| of a Cauchy: its log has mean 0 and variance pi^2 / 4.
    ("cauchy_", lambda: empty().cauchy_().abs().log(), 0.0, math.pi / 2, "uniform"),
    ("cauchy_ moved", lambda: (empty().cauchy_(3.0, 2.0) - 3.0).abs().log(), math.log(2.0), math.pi / 2, "uniform"),
    ("native_dropout", lambda: torch.native_dropout(torch.ones(N), 0.3, True)[0], 1.0, (0.3 / 0.7) ** 0.5, "uniform"),
    (
        "native_dropout, None",
        lambda: torch.native_dropout(torch.ones(N), 0.3, None)[0],
        1.0,
        (0.3 / 0.7) ** 0.5,
        "uniform",
    ),
    ("dropout", lambda: F.dropout(torch.ones(N), 0.3), 1.0, (0.3 / 0.7) ** 0.5, "uniform"),
    ("alpha_dropout", lambda: F.alpha_dropout(torch.randn(N), 0.3, training=True), 0.0, 1.0, "both"),
    ("dist.Normal", lambda: dist.Normal(3.0, 2.0).rsample((N,)), 3.0, 2.0, "normal"),
    ("dist.Laplace", lambda: dist.Laplace(3.0, 2.0).rsample((N,)), 3.0, 8**0.5, "uniform"),
    ("dist.Exponential", lambda: dist.Exponential(4.0).rsample((N,)), 0.25, 0.25, "uniform"),
    ("dist.Gumbel", lambda: dist.Gumbel(0.0, 1.0).rsample((N,)), 0.5772156649, math.pi / 6**0.5, "uniform"),
    ("dist.Bernoulli", lambda: dist.Bernoulli(0.3).sample((N,)), 0.3, 0.21**0.5, "uniform"),
    ("multinomial", lambda: torch.multinomial(SHARES, N, replacement=True), 1.3, 0.61**0.5, "uniform"),
    ("multinomial of one", lambda: torch.multinomial(SHARES.expand(N, 3), 1).squeeze(1), 1.3, 0.61**0.5, "uniform"),
    ("dist.Categorical", lambda: dist.Categorical(SHARES).sample((N,)), 1.3, 0.61**0.5, "uniform"),
    ("dist.OneHotCategorical", lambda: dist.OneHotCategorical(SHARES).sample((N,))[:, 1], 0.3, 0.21**0.5, "uniform"),
    ("dist.Logistic", lambda: dist.Logistic(0.0, 1.0).rsample((N,)), 0.0, math.pi / 3**0.5, "uniform"),
    ("dist.Weibull", lambda: dist.Weibull(2.0, 1.0).rsample((N,)), 2.0, 2.0, "uniform"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_served_operations_have_their_distribution(case: Case) -> None:
    _, f, mean, sd, kind = case
    x, size = lifted(f)
    assert (size.normal, size.uniform) == (N * (kind != "uniform"), N * (kind != "normal"))
    assert size.unserved == ()
    x = x.double()
    assert x.shape == (N,)
    assert bool(torch.isfinite(x).all())
    assert abs(float(x.mean()) - mean) < LIMIT * sd / N**0.5
    squares = (x - mean).square()
    assert abs(float(squares.mean()) - sd**2) < LIMIT * float(squares.std()) / N**0.5
    if "ernoulli" in case[0] or case[0] in ("native_dropout", "dropout"):
        assert len(x.unique()) == 2


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_shape_and_dtype_are_those_of_torch(case: Case) -> None:
    x, _ = lifted(case[1])
    like = case[1]()
    assert (x.shape, x.dtype, x.device) == (like.shape, like.dtype, like.device)


def test_every_served_operation_is_tested() -> None:
    called: set[Any] = set()

    class Watch(LiftedNoise):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(func)
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Watch():
        for _, f, *_ in CASES:
            f()
    assert called >= _SERVED.keys()


@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (0,), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.full(shape, 0.5, dtype=dtype)
    fs: tuple[Callable[[], Tensor], ...] = (
        lambda: torch.randn(shape, dtype=dtype),
        lambda: torch.rand(shape, dtype=dtype),
        lambda: torch.randn_like(x),
        lambda: torch.rand_like(x),
        lambda: torch.normal(x, x),
        lambda: torch.normal(0.0, 1.0, shape, dtype=dtype),
        lambda: torch.bernoulli(x),
        lambda: x.clone().exponential_(),
        lambda: x.clone().cauchy_(),
        lambda: torch.native_dropout(x, 0.5, True)[0],
    )
    for f in fs:
        found, _ = lifted(f, normal=64, uniform=64)
        assert (found.shape, found.dtype) == (shape, dtype)


def test_rand_like_with_another_dtype() -> None:
    ones = torch.ones(3, dtype=torch.long)
    for f in (torch.rand_like, torch.randn_like):
        found, _ = lifted(partial(f, ones, dtype=torch.float32))
        assert found.dtype == torch.float32


def test_moments_are_broadcast() -> None:
    found, size = lifted(lambda: torch.normal(torch.zeros(3), torch.ones(2, 1)))
    assert found.shape == (2, 3)
    assert size.normal == 6


def test_in_place_operations_change_their_tensor() -> None:
    for name in ("normal_", "uniform_", "exponential_", "cauchy_", "bernoulli_"):
        x = empty(5)
        found, _ = lifted(getattr(x, name))
        assert found is x
        assert bool(torch.isfinite(x).all())


def test_other_operations_leave_their_tensor_unchanged() -> None:
    p = torch.full((5,), 0.5)
    for f in (lambda: torch.bernoulli(p), lambda: torch.native_dropout(p, 0.5, True), lambda: torch.normal(p, p)):
        lifted(f)
        assert torch.equal(p, torch.full((5,), 0.5))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_scales_and_returns_its_mask(p: float, train: bool) -> None:
    x = torch.linspace(1.0, 2.0, 1000)
    (out, kept), size = lifted(lambda: torch.native_dropout(x, p, train))
    scale = 1 / (1 - p) if p < 1 and train else 1.0
    assert torch.allclose(out, x * kept * scale)
    assert kept.dtype == torch.bool
    assert out.data_ptr() != x.data_ptr()
    assert size.uniform == 1000 * train
    if not train or p == 0:
        assert bool(kept.all())
    if train and p == 1:
        assert not bool(kept.any())


def test_gradients_reach_the_moments() -> None:
    loc, scale = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    z, _ = lifted(lambda: dist.Normal(loc, scale).rsample())
    grads = torch.autograd.grad(z.sum(), [loc, scale])
    assert torch.equal(grads[0], torch.ones(4))
    assert torch.allclose(grads[1], (z - loc).detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_uniform_numbers_stay_below_one_in_shorter_dtypes(dtype: torch.dtype) -> None:
    near = torch.full((8,), 1 - 2.0**-53, dtype=torch.float64)
    with LiftedNoise(torch.zeros(0), near):
        u = torch.rand(4, dtype=dtype)
        e = torch.empty(4, dtype=dtype).exponential_()
    assert bool((u < 1).all())
    assert bool(torch.isfinite(e).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, 1 - 2.0**-24])
def test_categories_of_probability_zero_are_never_drawn(u: float, dtype: torch.dtype) -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0], [3.0, 0.0, 0.0, 1.0, 0.0]], dtype=dtype)
    with LiftedNoise(torch.zeros(0), torch.full((8,), u, dtype=torch.float64)):
        found = torch.multinomial(weights, 4, replacement=True)
    assert found.shape == (2, 4)
    assert bool((weights.gather(1, found) > 0).all())


def test_categories_of_unknown_probability_stay_within_the_table() -> None:
    found, _ = lifted(lambda: torch.multinomial(torch.full((2, 3), math.nan), 5, replacement=True))
    assert bool(((found >= 0) & (found < 3)).all())


def test_a_run_that_need_not_be_exact_draws_the_rest_from_torchs_generator() -> None:
    before = torch.get_rng_state()
    torch.manual_seed(0)
    with LiftedNoise(torch.zeros(4), torch.zeros(4), exact=False):
        a, b, c = torch.randn(3), torch.randn(2), torch.rand(4)
    torch.manual_seed(0)
    expected = torch.randn(2)
    torch.set_rng_state(before)
    assert a.tolist() == [0.0] * 3
    assert torch.equal(b, expected)
    assert c.tolist() == [0.0] * 4


# -- order, amounts, and unserved operations ------------------------------------------------------------------------


def test_numbers_are_taken_in_order() -> None:
    with LiftedNoise(torch.arange(10.0), torch.arange(10.0) / 10) as noise:
        a, b, c, d = torch.randn(2), torch.rand(3), torch.randn(2, 2), torch.empty(2).uniform_()
    assert a.tolist() == [0.0, 1.0]
    assert c.tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert torch.allclose(torch.cat([b, d]), torch.arange(5.0) / 10)
    assert (noise.size.normal, noise.size.uniform) == (6, 5)


def test_counting_draws_as_torch_does() -> None:
    def draw() -> list[Tensor]:
        torch.manual_seed(3)
        return [torch.randn(3), torch.rand(5), torch.randn(2, 4)]

    before = torch.get_rng_state()
    with LiftedNoise() as noise:
        counted = draw()
    plain = draw()
    torch.set_rng_state(before)
    assert all(torch.equal(a, b) for a, b in zip(counted, plain, strict=True))
    assert (noise.size.normal, noise.size.uniform, noise.size.unserved) == (11, 5, ())


def test_the_dtype_of_the_noise_is_the_longest_used() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        with LiftedNoise() as noise:
            torch.randn(2), torch.rand(2, dtype=dtype), torch.randn(2)
        assert noise.size.dtype == max(dtype, torch.get_default_dtype(), key=lambda d: d.itemsize)


@pytest.mark.parametrize(("kind", "f"), [("normal", torch.randn), ("uniform", torch.rand)])
def test_refuses_to_draw_more_than_was_given(kind: str, f: Callable[[int], Tensor]) -> None:
    with LiftedNoise(torch.zeros(4), torch.zeros(4)):
        f(3)
        with pytest.raises(RuntimeError, match=rf"a run draws more {kind} numbers than the 4 drawn ahead for it\."):
            f(2)


UNSERVED: dict[str, Callable[[], Any]] = {
    "_standard_gamma": lambda: dist.Gamma(2.0, 1.0).rsample(),
    "multinomial": lambda: torch.multinomial(torch.ones(3), 2),  # without replacement
    "poisson": lambda: torch.poisson(torch.ones(3)),
    "binomial": lambda: torch.binomial(torch.ones(3), torch.full((3,), 0.5)),
    "randperm": lambda: torch.randperm(5),
    "randint": lambda: torch.randint(3, (4,)),
    "geometric_": lambda: torch.empty(3).geometric_(0.5),
    "log_normal_": lambda: torch.empty(3).log_normal_(),
    "_sample_dirichlet": lambda: dist.Dirichlet(torch.ones(3)).sample(),
    "randn": lambda: torch.randn(3, generator=torch.Generator().manual_seed(0)),
    "uniform_": lambda: torch.empty(3).uniform_(generator=torch.Generator().manual_seed(0)),
    "normal_": lambda: torch.empty(3, dtype=torch.complex64).normal_(),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_unserved_operations_draw_from_torchs_generator(name: str) -> None:
    before = torch.get_rng_state()
    torch.manual_seed(0)
    found, size = lifted(UNSERVED[name])
    torch.manual_seed(0)
    expected = UNSERVED[name]()
    torch.set_rng_state(before)
    assert size.unserved == (name,)
    assert (size.normal, size.uniform) == (0, 0)
    assert torch.equal(found, expected)


def test_operations_are_counted() -> None:
    with LiftedNoise() as noise:
        x = torch.ones(3) + 1.0
        x.exp()
    assert noise.size.operations == 3


# -- drawing ahead --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [0, 1, 7, 15, 16, 17, 33, 1000])
def test_the_noise_of_a_run_does_not_depend_on_the_number_of_runs(width: int, dtype: torch.dtype) -> None:
    size, device = NoiseSize(width, width, dtype), torch.device("cpu")

    def draw(*counts: int) -> list[Tensor]:
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        parts = [size.draw(count, generators, device) for count in counts]
        return [torch.cat([part[kind] for part in parts]) for kind in (0, 1)]

    whole = draw(5)
    assert whole[0].shape[1] >= width
    assert whole[1].shape == (5, width)
    assert all(x.dtype == dtype for x in whole)
    for counts in ((2, 3), (1, 1, 1, 1, 1), (4, 1), (0, 5)):
        assert all(torch.equal(a, b) for a, b in zip(whole, draw(*counts), strict=True))


def test_uniform_numbers_do_not_depend_on_normal_numbers() -> None:
    size = NoiseSize(16, 16, torch.float64)
    first, second = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    both = size.draw(1, (first, second), torch.device("cpu"))
    alone = NoiseSize(0, 16, torch.float64).draw(1, (first, torch.Generator().manual_seed(2)), torch.device("cpu"))
    assert torch.equal(both[1], alone[1])


# -- Python's calls ---------------------------------------------------------------------------------------------------


def noise(seed: int = 0, count: int = 200_000) -> LiftedNoise:
    generators = [torch.Generator().manual_seed(seed + kind) for kind in range(2)]
    return LiftedNoise(*NoiseSize(count, count, torch.float32).draw_once(generators, torch.device("cpu")))


@pytest.mark.parametrize(
    "case",
    # Calls of the operation itself are not calls of Python's functions.
    [case for case in CASES if not case[0].startswith("native")],
    ids=lambda case: case[0],
)
def test_calls_take_the_numbers_of_operations(case: Case) -> None:
    with noise():
        expected = case[1]()
    with replaced_calls(), served(noise()):
        assert torch.equal(case[1](), expected)


@pytest.mark.parametrize("layer", [nn.Dropout(0.3), nn.AlphaDropout(0.3), nn.Dropout1d(0.3), nn.Dropout(0.3, True)])
def test_layers_take_the_numbers_of_operations(layer: nn.Module) -> None:
    x = torch.ones(4, 5, 6)
    with noise():
        expected = layer(x.clone())
    with replaced_calls(), served(noise()):
        assert torch.equal(layer(x.clone()), expected)


def test_attention_takes_the_numbers_of_operations() -> None:
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3), torch.randn(3, 4, 8)
    with noise():
        expected = layer(x)
    with replaced_calls(), served(noise()):
        assert torch.equal(layer(x), expected)


def test_gradients_are_those_of_torch() -> None:
    loc, scale, x = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True), torch.ones(4)
    with replaced_calls(), served(noise()):
        z = dist.Normal(loc, scale).rsample()
        out = nn.functional.dropout(x.requires_grad_(), 0.5)
    assert torch.equal(torch.autograd.grad(z.sum(), loc)[0], torch.ones(4))
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], out.detach())


def test_nothing_is_left_behind() -> None:
    before = [(owner, name, vars(owner).get(name), getattr(owner, name)) for owner, name in _FUNCTIONS]
    with replaced_calls(), replaced_calls():
        assert all(getattr(owner, name) is not function for owner, name, _, function in before)
    assert all(
        (vars(owner).get(name), getattr(owner, name)) == (own, function) for owner, name, own, function in before
    )


def test_without_noise_calls_draw_as_usual() -> None:
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    with replaced_calls():
        assert torch.equal(torch.randn(3), expected)


def test_other_threads_draw_as_usual() -> None:
    found: list[Tensor] = []
    with replaced_calls(), served(LiftedNoise(torch.zeros(8), torch.zeros(8))):
        thread = threading.Thread(target=lambda: found.append(torch.randn(4)))
        thread.start()
        thread.join()
        assert torch.equal(torch.randn(4), torch.zeros(4))
    assert bool((found[0] != 0).all())
