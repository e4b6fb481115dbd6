"""The distributions of one site in many runs of a program, behind the interface of a single distribution."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pyro.distributions import Delta, TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints, kl_divergence, register_kl

from deepprob.engine.batching import over_draws

_SLOT = object()  # the place of a tensor in a template
_CACHED_PAIRS = ("_cached_x_y", "_cached_y_log_det")  # of transforms: tensors of one run


class PerDraw(TorchDistribution):
    """The distributions that K runs of a program gave to a site, with the draws as leading batch dimension.

    Every method calls the distribution of each draw with the values of that draw, so no distribution has to accept a
    leading dimension. The calls are batched by ``torch.vmap`` where torch supports it.

    Args:
        template: The distribution without its tensors; see `take_apart`.
        tensors: Its tensors in all runs, each ``(K, *shape)``.
        draws: The number of draws, K.
        plates: Number of batch dimensions after the draws; missing ones have size 1.

    Attributes:
        first: The distribution of the first draw.

    Examples:
        A table that is read by index accepts no leading dimension:

        >>> import pyro.distributions as dist
        >>> levels, group = torch.tensor([[0.0, 1.0], [5.0, 7.0]]), torch.tensor([1, 1, 0])
        >>> template, _ = take_apart(dist.Normal(levels[0][group], 1.0))
        >>> runs = [take_apart(dist.Normal(level[group], 1.0))[1] for level in levels]
        >>> fn = PerDraw(template, [torch.stack(x) for x in zip(*runs)], draws=2, plates=1)
        >>> fn.batch_shape, fn.mean.tolist()
        (torch.Size([2, 3]), [[1.0, 1.0, 0.0], [7.0, 7.0, 5.0]])
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, template: Any, tensors: Sequence[Tensor], *, draws: int, plates: int) -> None:
        self._template, self._tensors, self._draws = template, list(tensors), draws
        self.first: Any = put_together(template, [x[0] for x in self._tensors])
        own = self.first.batch_shape
        shape = (draws, *(1,) * (plates - len(own)), *own)
        super().__init__(torch.Size(shape), self.first.event_shape, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> PerDraw:
        """The same distributions, each expanded to ``batch_shape[1:]``."""
        new: PerDraw = self._get_checked_instance(PerDraw, _instance)  # type: ignore[no-untyped-call]
        new._template, new._tensors, new._draws, new.first = self._template, self._tensors, self._draws, self.first
        TorchDistribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        return self.map(lambda fn, x: fn.log_prob(x), self._expanded(value))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        if not sample_shape:
            return self.map(lambda fn: fn.sample())
        return self.map(lambda fn: fn.sample(torch.Size(sample_shape))).movedim(0, len(sample_shape))

    @property
    def mean(self) -> Tensor:
        return self.map(lambda fn: fn.mean)

    @property
    def variance(self) -> Tensor:
        return self.map(lambda fn: fn.variance)

    @property
    def probs(self) -> Tensor:
        """The probabilities of a categorical or binary family."""
        return self.map(lambda fn: unwrapped(fn).probs)

    @property
    def support(self) -> Any:
        found = self.first.support
        has_tensors = any(isinstance(x, Tensor) for x in vars(found).values())
        return _SupportPerDraw(self) if has_tensors else found

    def map(self, op: Callable[..., Tensor], *values: Tensor) -> Tensor:
        """Apply an operation to the distribution and the values of every draw, and stack the results.

        Args:
            op: A function of a distribution, of batch shape ``batch_shape[1:]``, and values.
            values: Tensors with the draws first.

        Raises:
            NotImplementedError: If the distribution does not implement the operation.
        """

        def one(tensors: list[Tensor], values: list[Tensor]) -> Tensor:
            return op(self._of(tensors), *values)

        return _each_draw(one, self._draws, self._tensors, list(values))

    def replaced(self, op: Callable[[Any], Any]) -> PerDraw:
        """The same runs with other distributions, such as a marginal of each, without their event dimensions.

        Args:
            op: A function from the distribution of one draw to another one, of the same form for all draws.
        """
        made = [take_apart(op(self._of([x[k] for x in self._tensors]))) for k in range(self._draws)]
        tensors = [torch.stack(parts) for parts in zip(*(found for _, found in made), strict=True)]
        return PerDraw(made[0][0], tensors, draws=self._draws, plates=len(self.batch_shape) - 1)

    def _of(self, tensors: Sequence[Tensor]) -> Any:
        """The distribution of one draw, with the batch shape of all."""
        fn, batch = put_together(self._template, tensors), self.batch_shape[1:]
        return fn if fn.batch_shape == batch else fn.expand(batch)

    def _expanded(self, value: Tensor) -> Tensor:
        return value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape))


class _SupportPerDraw(constraints.Constraint):
    """The support of every draw's distribution, whose bounds may differ."""

    lower_bound = upper_bound = None

    def __init__(self, owner: PerDraw) -> None:
        self._owner = owner
        self.is_discrete, self.event_dim = owner.first.support.is_discrete, owner.first.support.event_dim
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return self._owner.map(lambda fn, x: fn.support.check(x), self._owner._expanded(value))


@register_kl(PerDraw, PerDraw)  # type: ignore[untyped-decorator]
def _kl_per_draw(q: PerDraw, p: PerDraw) -> Tensor:
    def one(of_q: list[Tensor], of_p: list[Tensor]) -> Tensor:
        return kl_divergence(q._of(of_q), p._of(of_p))

    return _each_draw(one, q._draws, q._tensors, p._tensors)


def _each_draw(one: Callable[..., Tensor], draws: int, *arguments: list[Tensor]) -> Tensor:
    """Results of a function of tensors, stacked over draws: in one call if torch can batch it."""
    if not any(arguments):
        result = one(*arguments)
        return result.expand(draws, *result.shape)
    try:
        found: Tensor = over_draws(one, *arguments)
    except RuntimeError as error:
        if type(error) is NotImplementedError:
            raise
        found = torch.stack([one(*([x[k] for x in part] for part in arguments)) for k in range(draws)])
    return found


# Switches torch's checks off like False, but is not the user's False: `deepprob.programs.support` checks the data.
UNCHECKED: Any = 0


def unwrapped(fn: Any) -> Any:
    """A distribution without the wrappers that add event dimensions, masks or batch dimensions."""
    while type(fn).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        fn = fn.base_dist
    return fn


def is_delta(fn: Any) -> bool:
    """Whether all mass of a distribution, or of those of all draws, is at one value."""
    fn = unwrapped(fn)
    return isinstance(unwrapped(getattr(fn, "first", fn)), Delta)


def take_apart(fn: Distribution) -> tuple[Any, list[Tensor]]:
    """Split a distribution into a template and its tensors, in a fixed order.

    Examples:
        >>> template, tensors = take_apart(torch.distributions.Normal(torch.zeros(2), torch.ones(2)))
        >>> put_together(template, [x + 1 for x in tensors]).mean
        tensor([1., 1.])
    """
    tensors: list[Tensor] = []

    def keep(x: Tensor) -> object:
        tensors.append(x)
        return _SLOT

    return _walk(fn, lambda x: keep(x) if isinstance(x, Tensor) else x, {}), tensors


def put_together(template: Any, tensors: Sequence[Tensor]) -> Any:
    """The distribution of a template and tensors; the inverse of `take_apart`."""
    rest: Iterator[Tensor] = iter(tensors)
    return _walk(template, lambda x: next(rest) if x is _SLOT else x, {})


def _walk(value: Any, leaf: Callable[[Any], Any], twins: dict[int, Any]) -> Any:
    """Copy a distribution and everything that it is made of, with every leaf replaced.

    Args:
        value: A part of the distribution.
        leaf: Replaces everything that has no parts.
        twins: Copies by identity of the original: a transform and its inverse refer to each other.
    """
    if id(value) in twins:
        return twins[id(value)]
    if isinstance(value, Distribution | Transform | nn.Module):
        twin = twins[id(value)] = copy.copy(value)
        twin.__dict__ = {}  # replaced, not changed: the copy shares it with the original
        for name, part in vars(value).items():
            twin.__dict__[name] = (None, None) if name in _CACHED_PAIRS else _walk(part, leaf, twins)
        if isinstance(value, Distribution):
            twin.__dict__["_validate_args"] = False
        return twin
    if type(value) in (list, tuple):
        return type(value)(_walk(x, leaf, twins) for x in value)
    if type(value) is dict:
        return {k: _walk(x, leaf, twins) for k, x in value.items()}
    if isinstance(value, weakref.ref):
        return None  # a transform's inverse, which it can make again
    return leaf(value)
