"""`CaseSites`, the observed sites of a case: which to judge, the arguments that they read, and their predictions."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from copy import copy
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from deepprob.diagnostics.case_data import CaseData, given
from deepprob.diagnostics.check import Array, array
from deepprob.diagnostics.observed import places_of, reads, unmasked
from deepprob.distributions.columns import Columns, Variable
from deepprob.distributions.per_draw import unwrapped
from deepprob.posteriors.variables import value_of
from deepprob.programs.arguments import Arguments, rows_of
from deepprob.programs.layout import Layout
from deepprob.programs.minibatch import Batch, num_rows
from deepprob.programs.sites import Site, observed_sites
from deepprob.programs.support import check_data

if TYPE_CHECKING:
    from deepprob.posteriors.training_rows import Summary


class CaseSites(CaseData):
    """The observed sites of a case; see `deepprob.diagnostics.case.Case`.

    Attributes:
        variable: The variable in question of a site whose columns are of different kinds; None for whole sites.
    """

    variable: Variable | None = None

    def check_data(self) -> None:
        """Refuse data that a query would refuse.

        Raises:
            ValueError: If nothing is observed, or the data do not fit the distributions that observe them.
        """
        found = self.posterior.structure
        if found.observed or found.rows:
            check_data(self._seen, found)

    def by_site(self) -> list[Self]:
        """The case of every observed site; sites of one number each, as of a loop over data, belong together.

        A site that is predicted, and whose columns are of different kinds, has a case for every variable.
        """
        names = [n for n in self.sites if n in self._observed]
        single = tuple(n for n in names if self._observed[n]["value"].numel() == 1)
        groups = [(n,) for n in names if n not in single or len(single) == 1]
        cases = [self._of(group) for group in (groups if len(single) < 2 else [*groups, single])] or [self._of(())]
        return [part for each in cases for part in each._by_variable()]

    def _by_variable(self) -> list[Self]:
        columns = self.columns
        if columns is None or not self.supervised:
            return [self]
        return [self._of(self.sites, variable) for variable in columns.variables]

    def _of(self, sites: tuple[str, ...], variable: Variable | None = None) -> Self:
        twin = copy(self)
        twin.sites, twin.variable = sites, variable
        return twin

    def _part(self, values: Array) -> Array:
        """Values of the site, or of the variable in question alone."""
        return values if self.variable is None else array(value_of(torch.as_tensor(values), self.variable))

    @property
    def site(self) -> str:
        """The site in question by name, with its variable, or the first and the last of several."""
        first, *others = self.words
        if self.variable is not None:
            return f"{first}[{self.variable.name}]"
        return f"{first} to {others[-1]}" if others else first

    @property
    def words(self) -> list[str]:
        """The sites in question in the user's words: the names of the target's columns for one that observes them."""
        return [self.posterior._fitted.word(site) for site in self.sites]

    @property
    def columns(self) -> Columns | None:
        """The distribution of rows whose columns are of different kinds; None for other sites."""
        if len(self.sites) != 1:
            return None
        fn = unwrapped(self._observed[self.sites[0]]["fn"])
        base = unwrapped(getattr(fn, "first", fn))
        return base if isinstance(base, Columns) else None

    @property
    def inputs(self) -> Batch:
        """The arguments from which the target is predicted."""
        return self._inputs if self.supervised else self.batch

    @property
    def supervised(self) -> bool:
        """Whether the site is predicted from other tensors with rows, and no prediction has seen its values."""
        if len(self.sites) != 1 or self.ragged or self.sites[0] in self.posterior.structure.undrawable:
            return False
        place, packed = self._places.get(self.sites[0]), False
        if isinstance(self.batch, Arguments):
            packed = any(isinstance(x, PackedSequence) for x in self.batch.call.constants)
        counts = self.mask is None or bool(self.mask.any())
        return place is not None and counts and (packed or bool(self.predictors)) and self._is_predicted(place)

    @property
    def predictors(self) -> Batch:
        """The tensors that a prediction may depend on: those that no site reads, without masks."""
        read = {*self._places.values()}
        return tuple(x for i, x in enumerate(self.batch) if i not in read and not self._is_mask(x))

    def _is_mask(self, x: Tensor) -> bool:
        """Whether a tensor tells which values count."""
        return x.dtype == torch.bool or (self.mask is not None and np.array_equal(self.mask, array(x) != 0))

    @property
    def splits(self) -> bool:
        """Whether every row of the site has a distribution of its own, unlike those of a Gaussian process."""
        event_dim = 0 if self.variable is not None else int(self._observed[self.sites[0]]["fn"].event_dim)
        return self.target.ndim > event_dim

    def _is_predicted(self, place: int) -> bool:
        """Whether the site's tensor is left out to predict it, or the prediction does not depend on it."""
        if place in self._left_out:
            return True
        if place not in self._optional and self.has_latents("local"):
            return False
        whole = self._names[place : place + 1]
        return {*whole}.isdisjoint(self.program._signature().parameters) or self._is_blind(place)

    def _is_blind(self, place: int) -> bool:
        """Whether the site is predicted alike where the rows of a tensor have changed places; no, if none can."""

        def run() -> bool:
            turned = self.batch[place].roll(1, 0)
            if turned.equal(self.batch[place]):
                return False
            parts = [turned if i == place else x for i, x in enumerate(self.batch)]
            batch = Arguments(parts, self.batch.call) if isinstance(self.batch, Arguments) else tuple(parts)
            other = self._predict(batch)
            # The same seed gives the same draws if the distributions are the same.
            drawn, again = (array(trace.nodes[self.sites[0]]["value"]) for trace in (self._predicted, other))
            return np.array_equal(drawn, again, equal_nan=True)

        found: bool = self._shared_by(f"{self.sites[0]} is blind to its values", run)
        return found

    @property
    def inputs_of_fit(self) -> Iterator[tuple[str, Tensor, Summary]]:
        """Name, values and summary of the training rows of every input; of the data if there are no inputs."""
        record, targets = self.posterior.training_rows, {*self._places.values()}
        summaries = () if record is None else record.summaries
        inputs = {*range(len(self.batch))} - targets or targets
        for i, (name, x, summary) in enumerate(zip(self._names, self.batch, summaries, strict=False)):
            if i in inputs and summary is not None:
                yield name, x, summary

    @property
    def scale(self) -> Array:
        """How often the values of the site count in the likelihood, in a run on all of the given rows: ``(n,)``.

        Where the program draws rows of its own, it is how often every row counts on average, of as many as in the fit.
        """

        def run(batch: Batch, seed: int) -> tuple[list[Array], Array]:
            found = observed_sites(self.posterior.trace(*given(batch), draws=1, seed=seed)[1])
            values = [np.atleast_1d(array(self._layout(1).draws_first(found[n])[0])) for n in self.sites]
            return values, np.concatenate([np.ravel(array(found[n]["scale"])) for n in self.sites])

        (values, scale), (again, _) = (run(self.batch, self.seed + i) for i in (0, 1))
        same = all(np.array_equal(x, y, equal_nan=True) for x, y in zip(values, again, strict=True))
        if not self.batch or same or any(num_rows(self.batch) in x.shape for x in values):
            return scale
        rows = self.posterior.instance.num_data
        values, scale = run(rows_of(self.batch, torch.arange(rows) % num_rows(self.batch)), self.seed)
        return scale * sum(map(len, values)) / rows

    @property
    def target(self) -> Array:
        """The observed values, as the program prepared them: ``(rows, ...)``."""
        values = [self._part(array(self._layout(1).draws_first(self._observed[name])[0])) for name in self.sites]
        return np.atleast_1d(values[0]) if len(values) == 1 else np.concatenate([x.reshape(1) for x in values])

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """Which values of the target are known and not masked; None for all."""

        def run() -> NDArray[np.bool_] | None:
            known = np.isfinite(self.target)
            if len(self.sites) == 1:
                counts = unmasked(self._observed[self.sites[0]], self._layout(1))
                if self.variable is not None and not isinstance(counts, bool):
                    counts = counts[..., self.variable.places[0]]
                known = known & counts
            return None if known.all() else known

        found: NDArray[np.bool_] | None = self._shared_by(f"mask of {self.sites}, {self.variable}", run)
        return found

    def judged(self, values: ArrayLike, axis: int = 0) -> Array:
        """Values of the target's shape, behind some other axes: in one axis only those that count, if some do not."""
        found = array(values)
        return found if self.mask is None else found[(slice(None),) * axis + (self.mask,)]

    @property
    def training_summary(self) -> Summary | None:
        """The summary of the site's training values; None if it is not known."""
        record, place = self.posterior.training_rows, self._places.get(self.sites[0])
        if record is None or place is None or place >= len(record.summaries) or self.variable is not None:
            return None
        same = reads(self._observed[self.sites[0]], self.batch[place], self._layout(1))
        return record.summaries[place] if same else None

    def _layout(self, draws: int) -> Layout:
        found = self.posterior.structure
        return Layout(found.row_plate, found.plates, draws)

    @property
    def _seen(self) -> Any:
        """The model's trace on the data."""
        return self._shared_by("seen", lambda: self.posterior.trace(*given(self.batch), draws=1, seed=self.seed)[1])

    @property
    def _observed(self) -> dict[str, Site]:
        found: dict[str, Site] = self._shared_by("observed", lambda: observed_sites(self._seen))
        return found

    @property
    def _predicted(self) -> Any:
        return self._shared_by("predicted", lambda: self._predict(self.batch))

    def _predict(self, batch: Batch) -> Any:
        """The model's trace with observed sites that are drawn."""
        return self.posterior.trace(*given(self._without(batch)), predict=True, draws=self.draws, seed=self.seed)[1]

    @property
    def _places(self) -> dict[str, int]:
        """The place in the batch of the tensor that every observed site reads."""
        make = functools.partial(places_of, self._observed, self.batch, self._optional, self._layout(1))
        found: dict[str, int] = self._shared_by("places", make)
        return found

    @property
    def _optional(self) -> list[int]:
        """Places of arguments that may be left out to predict them."""
        parameters = self.program._signature().parameters
        names = self._names[: len(self.batch)]
        return [i for i, n in enumerate(names) if n in parameters and parameters[n].default is None]

    @property
    def _left_out(self) -> set[int]:
        """Places of observed arguments that are left out; a program may compute its mask from those it masks."""
        sites = self._places.items()
        return {i for name, i in sites if i in self._optional and self._of((name,)).mask is None}

    @property
    def _inputs(self) -> Batch:
        return self._without(self.batch)

    def _without(self, batch: Batch) -> Batch:
        """A batch without the arguments that are left out."""
        read = self._left_out
        if isinstance(batch, Arguments):
            return batch.without(read)
        count = len(batch)
        while count - 1 in read:
            count -= 1
        return batch[:count]
