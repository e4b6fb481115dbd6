"""Rows of a table whose columns are of different kinds: numbers, counts, zeros and ones, one-hot categories."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, transform_to

from deepprob.distributions.per_draw import UNCHECKED
from deepprob.errors import shown, unknown

_KINDS = {"Bernoulli": "binary", "OneHotCategorical": "classes"}


@dataclass(frozen=True)
class Variable:
    """A variable of a row: its name, its kind as of `Prediction`, and the places of its columns."""

    name: str
    kind: str
    places: tuple[int, ...]


class Columns(TorchDistribution):
    r"""Distribution of a row of a table, in blocks of columns that are independent of each other.

    .. math:: \log p(x) = \sum_b \log p_b(x_{C_b}), \qquad \bigcup_b C_b = \{1, \dots, D\}

    A distribution over numbers, of batch shape ``(*batch, columns)``, has one independent entry for each column of its
    block. A distribution over vectors, of event shape ``(columns,)``, such as a `OneHotCategorical`, has all columns of
    its block together. A draw has shape ``sample_shape + batch + (D,)``.

    A NaN in a row is a missing value: its column contributes nothing to the log-probability, and of a distribution over
    vectors the whole block contributes nothing. The gradient is finite there.

    Args:
        blocks: Pairs of a distribution and the places of its columns in a row. Every place from 0 to D - 1 occurs once.
        names: The user's names of all columns, for messages and reports; by default their places.

    Raises:
        TypeError: If a block is not a pair of a distribution and the places of its columns.
        ValueError: If the places are not 0 to D - 1, each of them once; if a distribution has another number of
            columns than places, or a draw of it has more than one axis; or if there are not D names.

    Examples:
        A missing value is left out, so that the other columns give the log-probability:

        >>> age, smoker = dist.Normal(torch.tensor([40.0]), 10.0), dist.Bernoulli(torch.tensor([0.25]))
        >>> row = Columns([(age, [0]), (smoker, [1])], names=["age", "smoker"])
        >>> row.log_prob(torch.tensor([torch.nan, 1.0])).exp()
        tensor(0.2500)
        >>> row.marginal("smoker").mean
        tensor(0.2500)
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(
        self, blocks: Sequence[tuple[TorchDistribution, Sequence[int]]], names: Sequence[str] | None = None
    ) -> None:
        pairs = [_block(block) for block in blocks]
        self.parts: list[Any] = [part for part, _ in pairs]
        self.places = tuple(places for _, places in pairs)
        taken = sorted(place for places in self.places for place in places)
        if not taken or taken != list(range(len(taken))):
            raise ValueError(
                f"the blocks must have the columns 0 to D - 1, each of them once; got {taken}. "
                "Give every column to one block."
            )
        self.names = tuple(str(i) for i in taken) if names is None else tuple(names)
        if len(self.names) != len(taken):
            raise ValueError(f"names must name all {len(taken)} columns; got {len(self.names)}. Give one a column.")
        batches = [part.batch_shape[: len(part.batch_shape) - 1 + part.event_dim] for part in self.parts]
        self._expand(torch.broadcast_shapes(*batches))
        # Values are checked where a program observes them; UNCHECKED keeps torch from checking them again.
        super().__init__(torch.broadcast_shapes(*batches), torch.Size([len(taken)]), validate_args=UNCHECKED)

    @classmethod
    def example(cls) -> Columns:
        """A row of every kind of column, for the tests that every distribution passes."""
        logits = torch.tensor([[0.5, -0.5, 0.0], [0.0, 1.0, -1.0]])
        return cls(
            [
                (dist.OneHotCategorical(logits=logits), [1, 4, 2]),
                (dist.Normal(torch.tensor([[0.0, 2.0], [1.0, -1.0]]), torch.tensor([1.0, 0.5])), [0, 3]),
                (dist.Bernoulli(logits=torch.tensor([[0.3], [-0.8]])), [5]),
                (dist.Poisson(torch.tensor([[1.5], [0.5]])), [6]),
            ]
        )

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Columns:
        new: Columns = self._get_checked_instance(Columns, _instance)  # type: ignore[no-untyped-call]
        new.parts, new.places, new.names = list(self.parts), self.places, self.names
        new._expand(torch.Size(batch_shape))
        TorchDistribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=UNCHECKED)
        return new

    def _expand(self, batch: torch.Size) -> None:
        own = [batch if part.event_dim else (*batch, len(at)) for part, at in zip(self.parts, self.places, strict=True)]
        self.parts = [part.expand(torch.Size(shape)) for part, shape in zip(self.parts, own, strict=True)]

    # -- rows --------------------------------------------------------------------------------------------------------

    def log_prob(self, value: Tensor) -> Tensor:
        terms: list[Tensor] = []
        for part, places in zip(self.parts, self.places, strict=True):
            x = taken(value, places)
            missing = x.isnan()
            if part.event_dim:
                missing = missing.any(-1, keepdim=True)
            known = torch.where(missing, _possible(part, x), x)
            found = torch.where(missing[..., 0] if part.event_dim else missing, 0.0, part.log_prob(known))
            terms.append(found if part.event_dim else found.sum(-1))
        return torch.stack(torch.broadcast_tensors(*terms)).sum(0)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self._row([part.sample(torch.Size(sample_shape)) for part in self.parts])

    @property
    def mean(self) -> Tensor:
        """Means of all columns; of a category and of zeros and ones, their probabilities."""
        return self._row([part.mean for part in self.parts])

    @property
    def variance(self) -> Tensor:
        return self._row([part.variance for part in self.parts])

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> Any:
        return _Rows(self)

    # -- columns -----------------------------------------------------------------------------------------------------

    @property
    def variables(self) -> tuple[Variable, ...]:
        """The variables of a row in the order of their first columns: a number each, or a block of categories."""
        found = []
        for part, places in zip(self.parts, self.places, strict=True):
            if part.event_dim:
                found.append(Variable(_common([self.names[i] for i in places]), kind_of(part), places))
            else:
                found += [Variable(self.names[i], kind_of(part), (i,)) for i in places]
        return tuple(sorted(found, key=lambda variable: min(variable.places)))

    def marginal(self, name: str) -> Any:
        """The distribution of one of the variables, of this batch shape.

        Args:
            name: The name of the variable.

        Raises:
            ValueError: If there is no such variable, or its distribution cannot be taken apart by column.
        """
        variables = {variable.name: variable for variable in self.variables}
        if name not in variables:
            raise unknown("column", name, variables)
        at = variables[name].places[0]
        part, places = next(x for x in zip(self.parts, self.places, strict=True) if at in x[1])
        return part if part.event_dim else _entry(part, places.index(at), name)

    def with_whole_blocks(self, missing: Tensor) -> Tensor:
        """Which values of rows are missing if a block of several columns is missing as soon as one of them is."""
        marks = [taken(missing, places) for places in self.places]
        pairs = zip(marks, self.parts, strict=True)
        return self._row([x.any(-1, keepdim=True).expand_as(x) if part.event_dim else x for x, part in pairs])

    def outside(self, value: Tensor) -> tuple[str, Any, Tensor] | None:
        """The first column whose values lie outside of their support: its name, distribution and values; or None."""
        for part, places in zip(self.parts, self.places, strict=True):
            wrong = ~_is_possible(part, taken(value, places))
            if bool(wrong.any()):
                at = 0 if part.event_dim else int(wrong.reshape(-1, len(places)).any(0).int().argmax())
                which = places if part.event_dim else places[at : at + 1]
                return ", ".join(self.names[i] for i in which), part, taken(value, which)
        return None

    def _row(self, values: Sequence[Tensor]) -> Tensor:
        """Rows of the values of the blocks."""
        pieces: dict[int, Tensor] = {}
        for places, x in zip(self.places, values, strict=True):
            pieces |= {start: x[..., offset : offset + size] for start, offset, size in _runs(places)}
        return torch.cat([pieces[start] for start in sorted(pieces)], -1)


class _Rows(constraints.Constraint):
    """The support of rows, in which a missing value (NaN) may stand for any other."""

    event_dim, is_discrete = 1, False

    def __init__(self, owner: Columns) -> None:
        self._owner = owner
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        pairs = zip(self._owner.parts, self._owner.places, strict=True)
        found = [_is_possible(part, taken(value, places)) for part, places in pairs]
        checked = zip(self._owner.parts, found, strict=True)
        return torch.stack([x if part.event_dim else x.all(-1) for part, x in checked]).all(0)

    def __str__(self) -> str:
        return "of rows of columns"


def _block(block: Any) -> tuple[Any, tuple[int, ...]]:
    """A distribution over numbers or over vectors, and the places of its columns."""
    if not (isinstance(block, tuple) and len(block) == 2 and isinstance(block[0], torch.distributions.Distribution)):
        raise TypeError(
            f"a block must be a pair of a distribution and its columns; got {shown(block)}. "
            "Write (dist.Normal(loc, scale), [0, 1])."
        )
    part: Any = block[0]
    places = tuple(int(place) for place in block[1])
    while type(part).__name__ == "Independent" and part.reinterpreted_batch_ndims == 1:
        part = part.base_dist
    if type(part).__name__ == "Categorical":
        raise ValueError(
            "a Categorical has class numbers, which have no mean. Write a OneHotCategorical over one column per class."
        )
    if part.event_dim > 1:
        raise ValueError(
            f"a draw of a block must have one axis, its columns; {type(part).__name__} has event shape "
            f"{tuple(part.event_shape)}. Flatten it to columns."
        )
    shape = part.event_shape or part.batch_shape[-1:] or (1,)
    if not part.event_dim and shape[0] == 1:
        part = part.expand(torch.Size([*part.batch_shape[:-1], len(places)]))
    elif shape[0] != len(places):
        raise ValueError(
            f"a {type(part).__name__} over {shape[0]} columns cannot have the {len(places)} places {list(places)}. "
            "Give one place for every column."
        )
    return part, places


def _runs(places: Sequence[int]) -> list[tuple[int, int, int]]:
    """Neighboring places as a place in a row, a place in the block and a length.

    Slices need no tensor of indices, which a recorded graph would have to copy to its device.

    Examples:
        >>> _runs([1, 2, 5])
        [(1, 0, 2), (5, 2, 1)]
    """
    starts = [i for i, place in enumerate(places) if i == 0 or place != places[i - 1] + 1]
    return [(places[i], i, j - i) for i, j in itertools.pairwise([*starts, len(places)])]


def taken(value: Tensor, places: Sequence[int]) -> Tensor:
    """Some columns of rows."""
    pieces = [value[..., start : start + size] for start, _, size in _runs(places)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def _is_possible(part: Any, x: Tensor) -> Tensor:
    """Whether values of a block lie in its support or are missing."""
    missing = x.isnan().any(-1) if part.event_dim else x.isnan()
    found: Tensor = part.support.check(torch.where(x.isnan(), _possible(part, x), x)) | missing
    return found


def _possible(part: Any, like: Tensor) -> Tensor:
    """A value inside of the support of a block, where the log-probability has a finite gradient."""
    support: Any = part.support
    if kind_of(part) == "classes":
        return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)[0]
    if support.is_discrete:
        return torch.as_tensor(getattr(support, "lower_bound", 0)).to(like)
    transform: Callable[[Tensor], Tensor] = transform_to(support)
    return transform(torch.zeros_like(like))


def kind_of(part: Any) -> str:
    """The kind of a variable: ``"real"``, ``"count"``, ``"binary"`` or ``"classes"``.

    Examples:
        >>> kind_of(dist.Poisson(1.0))
        'count'
    """
    known = [_KINDS[parent.__name__] for parent in type(part).__mro__ if parent.__name__ in _KINDS]
    return known[0] if known else "count" if part.support.is_discrete else "real"


def _common(names: Sequence[str]) -> str:
    """A name for a block of columns: the text before "=" of names such as "color=red" and "color=blue"."""
    before = {name.rpartition("=")[0] for name in names}
    return before.pop() if len(before) == 1 and "" not in before else ", ".join(names)


def _entry(part: Any, at: int, name: str) -> Any:
    """One column of a distribution over the numbers of several columns."""
    names = [n for n in part.arg_constraints if not (n == "probs" and "logits" in part.arg_constraints)]
    try:
        parameters = {n: getattr(part, n).expand(part.batch_shape)[..., at] for n in names}
        found = type(part)(**parameters, validate_args=UNCHECKED)
    except (TypeError, AttributeError, RuntimeError):
        found = None
    if found is None or not names:
        raise ValueError(
            f"the {type(part).__name__} of column {name!r} cannot be taken apart by column. "
            "Give the column a block of its own, or use the draws of the whole row."
        )
    return found
