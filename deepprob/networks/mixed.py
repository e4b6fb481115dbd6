"""MixedLikelihood: the distribution of a row of a table whose columns are of different kinds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deepprob.data.precision import read_dtype
from deepprob.data.table_rows import unlike
from deepprob.distributions.columns import Columns, taken
from deepprob.errors import counted, shown, unknown
from deepprob.networks.column_kinds import COLUMN_KINDS, FLOOR
from deepprob.networks.conditional import positive_link


class MixedLikelihood(nn.Module):
    r"""Distribution over a row of a table given a network's output, with a family for every column.

    With the network's output :math:`o_d` for column :math:`d`, and a location :math:`l_d` and a scale :math:`s_d` of
    the data:

    ================== =============================================================================================
    kind               distribution
    ================== =============================================================================================
    ``"real"``         Normal with mean :math:`l_d + s_d o_d` and a learned noise
    ``"positive"``     LogNormal: the logarithm is ``"real"``
    ``"binary"``       Bernoulli with logits :math:`l_d + o_d`
    ``"categories"``   OneHotCategorical over a block of columns with logits :math:`l_d + o_d`
    ``"count"``        Poisson with mean :math:`s_d (\epsilon + \mathrm{softplus}(o_d))`
    ``"overdispersed"`` negative binomial with this mean and a learned total count
    ``"missing"``      ``"binary"``: 1 where the column of this name is missing; see below
    ================== =============================================================================================

    Noise and total counts are parameters, one per column, because the noise of a single row could shrink without bound.
    `adapt` sets locations and scales to those of the data, where an output of zero gives the mean of the data.

    A NaN is a missing value. It has no influence on the log-probability. A block of categories is missing if it has a
    NaN, or zeros alone: a category that the block does not know. If a table has an indicator of missing values,
    of kind ``"missing"`` and with the name of another column, that column is taken as missing where the indicator is 1,
    whatever number stands there. Further columns that are missing with it follow in a list: ``("missing", "date",
    ["sine of date"])``.

    Args:
        kinds: A tuple for each column, or block of columns, of the row in order: ``("real", "age")``,
            ``("binary", "smoker")``, ``("categories", "island", 3)`` or, with the names of the categories,
            ``("categories", "island", ["Biscoe", "Dream", "Torgersen"])``.

    Attributes:
        kinds: The kinds as JSON values, from which the likelihood can be made again.
        names: The names of all columns; those of categories are ``"island=Dream"``, that of an indicator is
            ``"island=missing"``, or ``"island=missing_"`` if a category has this name.
        size: Number of outputs that a network needs, one for every column.
        in_size: Number of `features` of a row, two for every column.
        complete: Whether the rows that `adapt` saw have no missing value.

    Raises:
        TypeError: If ``kinds`` is not a sequence of tuples with a name.
        ValueError: If a kind is unknown, a name occurs twice, there are fewer than two categories, or an indicator of
            missing values names no other column.

    Examples:
        A network output of zero gives the means of the data:

        >>> rows = MixedLikelihood([("real", "age"), ("categories", "island", 2)])
        >>> rows.adapt(torch.tensor([[30.0, 1.0, 0.0], [50.0, 1.0, 0.0], [40.0, 0.0, 1.0], [40.0, 1.0, 0.0]]))
        >>> rows(torch.zeros(3)).mean
        tensor([40.0000,  0.7000,  0.3000])

        An error names the column:

        >>> rows.validate("x", torch.tensor([[30.0, 0.5, 0.5]]))
        Traceback (most recent call last):
            ...
        ValueError: column 'island' of x must be one-hot: one 1 and otherwise 0; got [0.5, 0.5] in row 0. Write
        torch.nn.functional.one_hot(classes, 2).
    """

    loc: Tensor
    scale: Tensor
    centre: Tensor
    spread: Tensor
    complete: Tensor

    def __init__(self, kinds: Sequence[Sequence[Any]]) -> None:
        super().__init__()
        self._variables = _variables(kinds)
        self.kinds = [v.to_json() for v in self._variables]
        self.names = tuple(name for v in self._variables for name in v.columns)
        self.size, self.in_size = len(self.names), 2 * len(self.names)
        self.event_shape = (self.size,)
        for name, value in (("loc", 0.0), ("scale", 1.0), ("centre", 0.0), ("spread", 1.0)):
            self.register_buffer(name, torch.full((self.size,), value))
        self.register_buffer("complete", torch.tensor(False))
        starts = [COLUMN_KINDS[v.kind].raw_start for v in self._variables]
        learned = [start for start in starts if start is not None]
        self.raw_dispersion = nn.Parameter(torch.tensor(learned)) if learned else None

    # -- data --------------------------------------------------------------------------------------------------------

    def validate(self, name: str, x: Tensor) -> Tensor:
        """Check rows, and mark values as missing (NaN) where an indicator says so.

        Args:
            name: The user's name for the rows, for error messages.
            x: Rows, shape ``(N, D)``.

        Returns:
            The rows in torch's default dtype.

        Raises:
            ValueError: If rows have another number of columns, or a value does not fit its column.
        """
        if x.shape[1:] != self.event_shape:
            listed = ", ".join(self.names) if self.size < 20 else f"{self.names[0]} to {self.names[-1]}"
            raise ValueError(
                f"{name} must have {counted(self.size, 'column')} ({listed}); got rows of shape "
                f"{tuple(x.shape[1:])}. Give one column for every number, and one for every category."
            )
        x = x.to(read_dtype())
        for v, at in self._placed():
            family, found, missing = COLUMN_KINDS[v.kind], x[:, at], x[:, at].isnan().any(1)
            wrong = ~(family.allows(found) | missing)
            if bool(wrong.any()):
                row = int(wrong.int().argmax())
                came = [round(number, 6) for number in found[row].tolist()]
                raise ValueError(
                    f"column {v.name!r} of {name} must be {family.expected}; got "
                    f"{came if len(came) > 1 else f'{came[0]:g}'} in row {row}. {family.remedy.format(count=len(came))}"
                )
        return self._with_gaps(x)

    def _with_gaps(self, x: Tensor) -> Tensor:
        """Rows with NaN in the columns that an indicator marks as missing, and in whole blocks of categories."""
        gone = [x[:, at].isnan().any(1, keepdim=True) for _, at in self._placed()]
        for i, (v, at) in enumerate(self._placed()):
            if v.kind == "categories":
                gone[i] = gone[i] | (x[:, at] == 0).all(1, keepdim=True)
        x = torch.cat([x[:, at].masked_fill(gone[i], torch.nan) for i, (_, at) in enumerate(self._placed())], 1)
        places = {v.name: at for v, at in self._placed() if v.kind != "missing"}
        for v, at in self._placed():
            if v.kind == "missing":
                marked = torch.zeros(self.size, dtype=torch.bool, device=x.device)
                for name in (v.name, *v.labels):
                    marked[places[name]] = True
                x = torch.where((x[:, at] == 1) & marked, torch.nan, x)
        return x

    def check_complete(self, x: Tensor) -> None:
        """Refuse rows with missing values.

        Raises:
            ValueError: If there are some; it names the first column that has them.
        """
        missing = x.isnan()
        if bool(missing.any()):
            name = self.names[int(missing.any(0).int().argmax())]
            raise ValueError(
                f"x has {counted(int(missing.sum()), 'missing value')} (NaN), the first in column {name!r}; all rows "
                "of the fit were complete, so that the encoder has not learned to read others. Draw the values with "
                "posterior.impute(x), or fit a new program to rows of which some are missing."
            )

    def adapt(self, x: Tensor) -> None:
        """Set locations and scales to those of rows, shape ``(N, D)``; missing values do not count.

        Raises:
            ValueError: If all values of a column are missing.
        """
        empty = x.isnan().all(0)
        if bool(empty.any()):
            raise ValueError(
                f"column {self.names[int(empty.int().argmax())]!r} has no value, all are missing. Leave it out."
            )
        self.complete.copy_(~x.isnan().any())
        features, mean, count = self._transformed(x), x.nanmean(0), (~x.isnan()).sum(0)
        self.centre.copy_(features.nanmean(0))
        sd = (features - self.centre).square().nanmean(0).sqrt()
        # A column that does not vary keeps its unit.
        self.spread.copy_(torch.where(sd > 1e-6 * self.centre.abs(), sd, 1.0))
        for v, at in self._placed():
            loc, scale = COLUMN_KINDS[v.kind].units(mean[at], count[at], self.centre[at], self.spread[at])
            self.loc[at], self.scale[at] = loc, scale

    def features(self, x: Tensor) -> Tensor:
        """Rows as a network's input: standardized values, zero where missing, then 1 for every missing value.

        Counts and positive values are standardized on a logarithmic scale.

        Returns:
            Shape ``(*batch, in_size)``.
        """
        missing = x.isnan()
        values = (self._transformed(x) - self.centre) / self.spread
        return torch.cat([torch.where(missing, 0.0, values), missing.to(values.dtype)], -1)

    def _transformed(self, x: Tensor) -> Tensor:
        columns = [COLUMN_KINDS[v.kind].transform(x[..., at]) for v, at in self._placed()]
        return torch.cat(columns, -1)

    def units(self, x: Tensor) -> Tensor:
        """Number of known variables in each row, at least 1, shape ``(B,)``."""
        known = [~x[:, at].isnan().any(1) for _, at in self._placed()]
        return torch.stack(known).sum(0).clamp(min=1).to(torch.get_default_dtype())

    # -- distributions -----------------------------------------------------------------------------------------------

    def forward(self, out: Tensor) -> Columns:
        """The distribution of rows given a network's output, shape ``(*batch, size)``.

        Raises:
            ValueError: If the output has the wrong size.
        """
        if out.shape[-1:] != (self.size,):
            raise ValueError(
                f"a MixedLikelihood of {counted(self.size, 'column')} needs a network with {self.size} outputs on its "
                f"last axis; got {tuple(out.shape[-1:])}. Give its last layer {self.size} outputs."
            )
        blocks = []
        dispersion = {} if self.raw_dispersion is None else self._by_column(positive_link(self.raw_dispersion, FLOOR))
        for kind, places in self._blocks():
            learned = torch.stack([dispersion[i] for i in places]) if places[0] in dispersion else None
            made = COLUMN_KINDS[kind].make(*(taken(x, places) for x in (out, self.loc, self.scale)), learned)
            blocks.append((made, places))
        return Columns(blocks, self.names)

    def _by_column(self, learned: Tensor) -> dict[int, Tensor]:
        columns = [at.start for v, at in self._placed() if COLUMN_KINDS[v.kind].raw_start is not None]
        return dict(zip(columns, learned.unbind(), strict=True))

    def _blocks(self) -> Iterator[tuple[str, list[int]]]:
        """The blocks of columns that share a distribution: all numbers of a kind, and each block of categories."""
        numbers: dict[str, list[int]] = {}
        for v, at in self._placed():
            if v.kind == "categories":
                yield v.kind, [*range(at.start, at.stop)]
            else:
                numbers.setdefault("binary" if v.kind == "missing" else v.kind, []).append(at.start)
        yield from numbers.items()

    def _placed(self) -> Iterator[tuple[_Variable, slice]]:
        """The variables and their places in a row."""
        start = 0
        for v in self._variables:
            yield v, slice(start, start + len(v.columns))
            start += len(v.columns)

    def extra_repr(self) -> str:
        """The kinds, for ``print``."""
        return ", ".join(f"{v.name}: {v.kind}" for v in self._variables)


# What the user names ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Variable:
    """A column or a block of columns, as the user named it.

    Attributes:
        kind: One of `COLUMN_KINDS`.
        name: Its name; of an indicator of missing values, that of the column that it marks.
        labels: The categories of a block; of an indicator, the further columns that it marks.
        mark: The name of the column that holds an indicator.
    """

    kind: str
    name: str
    labels: tuple[str, ...] = ()
    mark: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        if self.kind == "missing":
            return (self.mark,)
        return tuple(f"{self.name}={label}" for label in self.labels) or (self.name,)

    def to_json(self) -> list[Any]:
        return [self.kind, self.name, *([list(self.labels)] if self.labels else [])]


def _variables(kinds: Any) -> list[_Variable]:
    if isinstance(kinds, str) or not isinstance(kinds, Sequence) or not kinds:
        raise TypeError(f"kinds must be a list of columns; got {shown(kinds)}. Write [('real', 'age'), ...].")
    found = [_variable(entry) for entry in kinds]
    names = [v.name for v in found if v.kind != "missing"]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"every column must have a name of its own; got {twice[0]!r} twice. Rename one.")
    for v in found:
        for name in (v.name, *v.labels) if v.kind == "missing" else ():
            if name not in names:
                raise unknown("column of kind 'missing'", name, names)
    own = [column for v in found if v.kind != "missing" for column in v.columns]
    return [replace(v, mark=unlike(f"{v.name}=missing", own)) if v.kind == "missing" else v for v in found]


def _variable(entry: Any) -> _Variable:
    if isinstance(entry, str) or not isinstance(entry, Sequence) or len(entry) < 2 or not isinstance(entry[1], str):
        raise TypeError(
            f"a column must be a tuple of its kind and its name; got {shown(entry)}. Write ('real', 'age')."
        )
    kind, name, *rest = entry
    given: Any = rest[0] if len(rest) == 1 else None
    if kind not in COLUMN_KINDS:
        raise unknown("kind of column", kind, COLUMN_KINDS)
    if kind == "missing" and isinstance(given, list | tuple):
        return _Variable(kind, name, tuple(map(str, given)))
    if kind != "categories":
        if rest:
            raise ValueError(f"column {name!r} of kind {kind!r} takes no more than a name; got {shown(entry)}.")
        return _Variable(kind, name)
    whole = isinstance(given, int) and not isinstance(given, bool)
    labels = tuple(map(str, range(given) if whole else given)) if whole or isinstance(given, list | tuple) else ()
    if len(labels) < 2 or len({*labels}) < len(labels):
        raise ValueError(
            f"categories {name!r} need their number or different names, at least 2; got {shown(given)}. "
            f"Write ('categories', {name!r}, 3)."
        )
    return _Variable(kind, name, labels)
