"""Noise as an input: random operations take their numbers from vectors drawn ahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_NEW: dict[str, Callable[..., Tensor]] = {"normal": torch.randn, "uniform": torch.rand}
_BLOCK = 16  # torch draws normals in blocks of 16: a row of whole blocks does not depend on the rows beside it


@dataclass(frozen=True)
class NoiseSize:
    """How much noise one run of a program or a step takes.

    Attributes:
        normal: Number of standard normal numbers.
        uniform: Number of uniform numbers in [0, 1).
        dtype: The dtype of both.
        unserved: Names of random operations that noise cannot serve (gamma, Dirichlet, permutations): they draw from
            torch's generator during the run.
        operations: Number of tensor operations of the run, gradients included.
        requests: Kind and amount of every request for noise, in order.
    """

    normal: int
    uniform: int
    dtype: torch.dtype
    unserved: tuple[str, ...] = ()
    operations: int = 0
    requests: tuple[tuple[str, int], ...] = ()

    def draw_once(self, generators: Sequence[torch.Generator], device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw the noise of one run, ``(normal,)`` and ``(uniform,)``; see `draw`."""
        normal, uniform = self.draw(1, generators, device)
        return normal[0].clone(), uniform[0].clone()

    def draw(self, count: int, generators: Sequence[torch.Generator], device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw the noise of ``count`` runs.

        On the CPU the noise of a run does not depend on the number of runs that are drawn together.

        Args:
            count: The number of runs.
            generators: One generator for normal numbers, one for uniform numbers.
            device: The device of the noise and of the generators.

        Returns:
            Normal numbers, ``(count, normal)`` with ``normal`` rounded up to whole blocks of 16, and uniform numbers,
            ``(count, uniform)``.
        """
        width = -(-self.normal // _BLOCK) * _BLOCK
        options: dict[str, Any] = {"dtype": self.dtype, "device": device}
        return (
            torch.randn(count, width, generator=generators[0], **options),
            torch.rand(count, self.uniform, generator=generators[1], **options),
        )

    def draw_stacked(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw the noise of ``count`` runs from torch's generators, request by request.

        One run whose random operations have a leading dimension of size ``count`` draws the same numbers, as long as
        the program itself asks for normal and uniform numbers only.

        Returns:
            Normal and uniform numbers, with the shapes of `draw`.
        """
        options: dict[str, Any] = {"dtype": self.dtype, "device": device}
        drawn = [(kind, _NEW[kind](count, amount, **options)) for kind, amount in self.requests]
        padding = torch.zeros(count, -self.normal % _BLOCK, **options)
        normal = torch.cat([*(x for kind, x in drawn if kind == "normal"), padding], 1)
        return normal, torch.cat([torch.zeros(count, 0, **options), *(x for k, x in drawn if k == "uniform")], 1)


class LiftedNoise(TorchDispatchMode):
    """Within this context random operations take their numbers from two vectors, in order.

    Args:
        normal: Standard normal numbers; None lets operations draw as usual, and counts the numbers.
        uniform: Uniform numbers in [0, 1), or None.
        exact: Whether to refuse a run that needs more numbers; otherwise the rest of them comes from torch's generator.

    Examples:
        >>> with LiftedNoise(torch.arange(16.0), torch.zeros(0)):
        ...     torch.normal(torch.full((2,), 10.0), torch.full((2,), 2.0)).tolist()
        [10.0, 12.0]
        >>> with LiftedNoise() as count:
        ...     _ = torch.randn(3), torch.bernoulli(torch.full((2,), 0.5)), torch.randperm(4)
        >>> count.size.normal, count.size.uniform, count.size.unserved
        (3, 2, ('randperm',))
    """

    def __init__(self, normal: Tensor | None = None, uniform: Tensor | None = None, *, exact: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._exact = exact
        self._sources = {"normal": normal, "uniform": uniform}
        self._used = {"normal": 0, "uniform": 0}
        self._dtype = torch.get_default_dtype()
        self._unserved: list[str] = []
        self._operations = 0
        self._requests: list[tuple[str, int]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True makes torch import its compiler, which takes seconds

    @property
    def size(self) -> NoiseSize:
        """The noise used so far."""
        unserved = tuple(dict.fromkeys(self._unserved))
        used = self._used
        return NoiseSize(
            used["normal"], used["uniform"], self._dtype, unserved, self._operations, tuple(self._requests)
        )

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._operations += 1
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        serve = _SERVED.get(func)
        if serve is None or kwargs.get("generator") is not None or _cannot_serve(func, args, kwargs):
            self._unserved.append(func.overloadpacket.__name__)
            return func(*args, **kwargs)
        kwargs.pop("generator", None)
        return serve(self, *args, **kwargs)

    def take(self, kind: str, shape: Sequence[int], dtype: torch.dtype, device: Any) -> Tensor:
        """Take the next numbers of a kind, ``"normal"`` or ``"uniform"``.

        Raises:
            RuntimeError: If too few are left, and the amount must be exact.
        """
        count, start = math.prod(shape), self._used[kind]
        self._used[kind] += count
        self._requests.append((kind, count))
        if dtype == torch.float64:
            self._dtype = dtype
        source = self._sources[kind]
        if source is None or not (self._exact or start + count <= len(source)):
            return _NEW[kind](tuple(shape), dtype=dtype, device=device)
        if start + count > len(source):
            raise RuntimeError(
                f"a run draws more {kind} numbers than the {len(source)} drawn ahead for it. Draw as many as in "
                "the first run."
            )
        taken = source[start : start + count].view(tuple(shape)).to(dtype)
        # Rounded to a shorter dtype, a number just below 1 would become 1, and log(1 - u) infinite.
        return taken.clamp(max=1 - torch.finfo(dtype).eps / 2) if kind == "uniform" and dtype != source.dtype else taken


class RandomDraw(Exception):
    """An operation draws random numbers where none may be drawn."""


class NoDraws(TorchDispatchMode):
    """Within this context random operations raise `RandomDraw`.

    Examples:
        >>> with NoDraws():
        ...     torch.randn(2)
        Traceback (most recent call last):
            ...
        deepprob.engine.noise.RandomDraw: randn draws random numbers
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see LiftedNoise

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RandomDraw(f"{func.overloadpacket.__name__} draws random numbers")
        return func(*args, **(kwargs or {}))


_Serve = Callable[..., Tensor]


def _cannot_serve(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call of a served operation draws complex numbers, or several categories without replacement."""
    if func is _aten.multinomial.default:
        return args[1] > 1 and not any(args[2:3])
    dtype = kwargs.get("dtype") or next((x.dtype for x in args if isinstance(x, Tensor)), None)
    return dtype is not None and dtype.is_complex


def _or_defaults(dtype: Any, device: Any) -> tuple[torch.dtype, Any]:
    return dtype or torch.get_default_dtype(), device or "cpu"


def _new(kind: str) -> _Serve:
    def serve(
        noise: LiftedNoise, size: Sequence[int], dtype: Any = None, layout: Any = None, device: Any = None, **_: Any
    ) -> Tensor:
        return noise.take(kind, size, *_or_defaults(dtype, device))

    return serve


def _like(kind: str) -> _Serve:
    def serve(noise: LiftedNoise, x: Tensor, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
        return noise.take(kind, x.shape, dtype or x.dtype, device or x.device)

    return serve


def _normal_(noise: LiftedNoise, x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    z = noise.take("normal", x.shape, x.dtype, x.device)
    return x.copy_(z if (mean, std) == (0.0, 1.0) else mean + std * z)


def _normal(noise: LiftedNoise, mean: Tensor | float, std: Tensor | float = 1.0, *size: Any, **options: Any) -> Tensor:
    like = mean if isinstance(mean, Tensor) else std
    if not isinstance(like, Tensor):
        dtype, device = _or_defaults(options.get("dtype"), options.get("device"))
        return mean + std * noise.take("normal", size[0], dtype, device)
    shape = torch.broadcast_shapes(*(x.shape for x in (mean, std) if isinstance(x, Tensor)))
    return (mean + std * noise.take("normal", shape, like.dtype, like.device)).to(like.dtype)


def _uniform_(noise: LiftedNoise, x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    return x.copy_(low + (high - low) * noise.take("uniform", x.shape, x.dtype, x.device))


def _bernoulli(noise: LiftedNoise, x: Tensor, p: float | None = None) -> Tensor:
    dtype = x.dtype if x.dtype.is_floating_point else torch.get_default_dtype()
    return (noise.take("uniform", x.shape, dtype, x.device) < (x if p is None else p)).to(x.dtype)


def _bernoulli_(noise: LiftedNoise, x: Tensor, p: Tensor | float = 0.5) -> Tensor:
    dtype = x.dtype if x.dtype.is_floating_point else torch.get_default_dtype()
    return x.copy_(noise.take("uniform", x.shape, dtype, x.device) < p)


def _exponential_(noise: LiftedNoise, x: Tensor, rate: float = 1.0) -> Tensor:
    return x.copy_(-torch.log1p(-noise.take("uniform", x.shape, x.dtype, x.device)) / rate)


def _cauchy_(noise: LiftedNoise, x: Tensor, median: float = 0.0, sigma: float = 1.0) -> Tensor:
    u = noise.take("uniform", x.shape, x.dtype, x.device)
    return x.copy_(median + sigma * torch.tan(math.pi * (u - 0.5)))


def _multinomial(noise: LiftedNoise, x: Tensor, count: int, *_: Any) -> Tensor:
    """Categories by the inverse of their cumulative probabilities; a category of probability zero is never drawn."""
    cumulative = x.cumsum(-1)
    u = noise.take("uniform", (*x.shape[:-1], count), x.dtype, x.device)
    found = torch.searchsorted((cumulative / cumulative[..., -1:]).contiguous(), u.contiguous(), right=True)
    return found.clamp(max=x.shape[-1] - 1)  # where probabilities are nan


def _dropout(noise: LiftedNoise, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if train is False:  # None means training, as in torch
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = noise.take("uniform", x.shape, x.dtype, x.device) >= p
    return x * kept / (1.0 - p if p < 1 else 1.0), kept


_SERVED: dict[Any, Callable[..., Any]] = {
    _aten.randn.default: _new("normal"),
    _aten.randn_like.default: _like("normal"),
    _aten.normal_.default: _normal_,
    _aten.normal.Tensor_Tensor: _normal,
    _aten.normal.Tensor_float: _normal,
    _aten.normal.float_Tensor: _normal,
    _aten.normal.float_float: _normal,
    _aten.rand.default: _new("uniform"),
    _aten.rand_like.default: _like("uniform"),
    _aten.uniform_.default: _uniform_,
    _aten.bernoulli.default: _bernoulli,
    _aten.bernoulli.p: _bernoulli,
    _aten.bernoulli_.float: _bernoulli_,
    _aten.bernoulli_.Tensor: _bernoulli_,
    _aten.exponential_.default: _exponential_,
    _aten.cauchy_.default: _cauchy_,
    _aten.multinomial.default: _multinomial,
    _aten.native_dropout.default: _dropout,
}
