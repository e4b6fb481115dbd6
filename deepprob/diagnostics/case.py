"""`Case`, the posterior and data that checks examine, and `Diagnostic`, one question about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from deepprob.data import Split, as_split
from deepprob.diagnostics.check import About, Array, Check, array
from deepprob.posteriors.guide_accuracy import DRAWS as GLOBAL_DRAWS
from deepprob.posteriors.guide_accuracy import GuideAccuracy, judged
from deepprob.posteriors.guide_draws import GuideDraws, guide_draws
from deepprob.programs.arguments import Arguments, rows_of
from deepprob.programs.layout import Layout
from deepprob.programs.minibatch import Batch, num_rows
from deepprob.programs.program import Program
from deepprob.programs.sites import Site, observed_sites
from deepprob.programs.support import check_data

if TYPE_CHECKING:
    from deepprob.posteriors.posterior import Posterior
    from deepprob.posteriors.prediction import Prediction


# Largest number of elements of one (particles, rows, ...) tensor; keeps memory at a few times 80 MB.
MAX_ELEMENTS = 20_000_000
# Errors that say that a question has no answer for a program whose data were checked.
REFUSALS = (ValueError, RuntimeError, TypeError, IndexError, AttributeError)


class Case:
    """A posterior and data; quantities that several checks need are computed once.

    Args:
        posterior: The posterior to check.
        data: Held-out data, in any form that the program accepts; None for a program that holds its data.
        train: The training data; needed to check global latents, whose posterior is conditioned on them.
        ood: Out-of-distribution data, on which the posterior should be less certain.
        draws: Number of posterior draws for predictions.
        particles: Number of importance samples.
        max_rows: Largest number of rows to predict; they are chosen at random.
        max_sample: Largest number of rows for checks that are expensive per row.
        seed: Seed of all random numbers.
        site: The observed site whose predictions to check; None for all of them.

    Attributes:
        sites: The observed sites in question.
    """

    def __init__(
        self,
        posterior: Posterior,
        data: Any,
        *,
        train: Any = None,
        ood: Any = None,
        draws: int = 200,
        particles: int = 200,
        max_rows: int = 2000,
        max_sample: int = 256,
        seed: int = 0,
        site: str | None = None,
    ) -> None:
        self.posterior, self.program = posterior, posterior.program
        self.draws, self.particles, self.seed = draws, particles, seed
        self.max_sample = max_sample
        self.sites = _chosen(posterior, site)
        # Without a named data plate rows cannot be selected: every step of the fit saw all of the data.
        self.needs_all_rows = not self.program.data_name
        accepted = () if data is None else self.program.accept(data)
        self.rows = num_rows(accepted) if accepted else posterior.instance.num_data
        chosen = self._random_rows(accepted, max_rows)
        self.batch = accepted if chosen is None else rows_of(accepted, chosen)
        labels = _labels(data, accepted)
        self.labels = labels if labels is None or chosen is None else (labels[0], labels[1][chosen])
        self.knows_train = train is not None or self.needs_all_rows or data is None
        self.train = self.program.accept(train) if train is not None else accepted
        self.ood = ood
        self._shared: dict[str, Any] = {}

    # -- the data ------------------------------------------------------------------------------------------------

    @property
    def ragged(self) -> bool:
        """Whether rows are padded sequences of unequal length."""
        return self.program.variable_length or "lengths" in self._names

    @property
    def per_row(self) -> bool:
        """Whether all latents are local and rows are independent, so that each row can be checked on its own."""
        return self.has_latents("local") and not self.has_latents("global") and not self.needs_all_rows

    def has_latents(self, kind: str) -> bool:
        """Whether some latent site is of a kind: ``"local"`` (one per row) or ``"global"``."""
        return kind in self.posterior.latent_sites.values()

    def check_data(self) -> None:
        """Refuse data that a query would refuse.

        Raises:
            ValueError: If nothing is observed, or the data do not fit the distributions that observe them.
        """
        found = self.posterior.structure
        if found.observed or found.rows:
            check_data(self._seen, found)

    @cached_property
    def sample_batch(self) -> Batch:
        """Random rows, few enough for checks that are expensive per row."""
        chosen = self._sample_rows
        return self.batch if chosen is None else rows_of(self.batch, chosen)

    @property
    def sample_labels(self) -> tuple[str, Array] | None:
        """Name and values of a field that the program does not take, for the rows of `sample_batch`."""
        if self.labels is None:
            return None
        name, values = self.labels
        return name, array(values if self._sample_rows is None else values[self._sample_rows])

    @cached_property
    def _sample_rows(self) -> Tensor | None:
        if not self.batch:
            return None
        affordable = int(MAX_ELEMENTS / (self.particles * max(1, self.batch[0][0].numel())))
        return self._random_rows(self.batch, min(self.max_sample, max(affordable, 16)))

    def _random_rows(self, batch: Batch, most: int) -> Tensor | None:
        """Indices of random rows; None for all of them."""
        if not batch or self.needs_all_rows or num_rows(batch) <= most:
            return None
        order = np.random.default_rng(self.seed).permutation(num_rows(batch))[:most]
        return torch.from_numpy(np.sort(order))

    @property
    def _names(self) -> Sequence[str]:
        """Names of the tensors of the batch."""
        return self.batch.call.names if isinstance(self.batch, Arguments) else self.program.argument_names

    # -- observed sites ------------------------------------------------------------------------------------------

    def by_site(self) -> list[Case]:
        """The case of every observed site; sites of one number each, as of a loop over data, belong together."""
        names = [n for n in self.sites if n in self._observed]
        single = tuple(n for n in names if self._observed[n]["value"].numel() == 1)
        groups = [(n,) for n in names if n not in single or len(single) == 1]
        return [self._of(group) for group in (groups if len(single) < 2 else [*groups, single])] or [self._of(())]

    def _of(self, sites: tuple[str, ...]) -> Case:
        twin = copy(self)
        twin.sites = sites
        return twin

    @property
    def site(self) -> str:
        """The site in question by name, or the first and the last of several."""
        return self.sites[0] if len(self.sites) == 1 else f"{self.sites[0]} to {self.sites[-1]}"

    @property
    def inputs(self) -> Batch:
        """The arguments from which the target is predicted."""
        return self._inputs if self.supervised else self.batch

    @property
    def supervised(self) -> bool:
        """Whether the site is predicted from other tensors with rows, and no prediction has seen its values."""
        if len(self.sites) != 1 or self.ragged or self.sites[0] in self.posterior.structure.undrawable:
            return False
        place = self._places.get(self.sites[0])
        read = {*self._places.values()}
        inputs = any(i not in read and x.dtype != torch.bool for i, x in enumerate(self.batch))
        if isinstance(self.batch, Arguments):
            inputs = inputs or any(isinstance(x, PackedSequence) for x in self.batch.call.constants)
        return place is not None and inputs and self._is_predicted(place) and self.mask is None

    def _is_predicted(self, place: int) -> bool:
        """Whether a tensor can be left out, or is part of an argument that no local latent depends on."""
        whole = set(self._names[place : place + 1]) & self.program._signature().parameters.keys()
        return place in self._optional or not (whole or self.has_latents("local"))

    @property
    def target(self) -> Array:
        """The observed values, as the program prepared them: ``(rows, ...)``."""
        values = [array(self._layout(1).draws_first(self._observed[name])[0]) for name in self.sites]
        return np.atleast_1d(values[0]) if len(values) == 1 else np.concatenate([x.reshape(1) for x in values])

    @property
    def mask(self) -> Array | None:
        """Which values of the target are known and not masked; None for all."""
        known = np.isfinite(self.target)
        for site in (self._observed[name] for name in self.sites if len(self.sites) == 1):
            for mask in (site["mask"], getattr(site["fn"], "_mask", None)):
                if mask is not None:
                    fn, whole = site["fn"], torch.as_tensor(mask, device=site["value"].device)
                    batch = torch.broadcast_shapes(whole.shape, fn.batch_shape)
                    whole = whole.expand(batch)[(..., *[None] * fn.event_dim)].expand(*batch, *fn.event_shape)
                    known = known & (array(self._layout(1).draws_first({**site, "value": whole})[0]) > 0)
        return None if known.all() else known

    @property
    def prediction(self) -> Prediction:
        """The posterior predictive distribution of every row."""
        return self.posterior._fitted.prediction(self._predicted, self.sites[0], self.draws)

    @property
    def replicates(self) -> Array:
        """Data sets drawn from the posterior predictive, one per draw of the latents: ``(draws, rows, ...)``."""
        return self._drawn(self._predicted, self.draws)

    @property
    def prior_replicates(self) -> Array:
        """Rows of `sample_batch` drawn anew, ``(particles, rows, ...)``: local latents come from the prior."""
        return self._drawn(self._shared_by("rows drawn anew", self._draw_rows), self.particles)

    @property
    def sample_case(self) -> Case:
        """The same question about `sample_batch`."""
        twin = self._of(self.sites)
        twin.batch, twin._shared = self.sample_batch, self._shared_by("sample", dict)
        return twin

    def _draw_rows(self) -> Any:
        batch, fitted = self.sample_batch, self.posterior._fitted
        if not self.per_row:
            return self.posterior.trace(*given(batch), predict=True, draws=self.particles, seed=self.seed)[1]
        free = num_optional(self.program) >= len(batch)
        rows = num_rows(batch) if batch else self.rows
        with fitted.querying(self.seed):
            return fitted.run_prior(() if free else fitted.accept(given(batch)), rows, self.particles)

    def _drawn(self, trace: Any, draws: int) -> Array:
        layout = self._layout(draws)
        values = [array(layout.draws_first(trace.nodes[name])) for name in self.sites]
        return values[0].reshape(draws, -1, *values[0].shape[2:]) if len(values) == 1 else np.stack(values, 1)

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
        def run() -> Any:
            options = {"draws": self.draws, "seed": self.seed}
            return self.posterior.trace(*given(self._inputs), predict=True, **options)[1]

        return self._shared_by("predicted", run)

    @property
    def _places(self) -> dict[str, int]:
        """The place in the batch of the tensor that every observed site reads."""
        found: dict[str, int] = self._shared_by("places", self._find_places)
        return found

    def _find_places(self) -> dict[str, int]:
        order = sorted(range(len(self.batch)), key=lambda i: (i not in self._optional, -i))
        found = {}
        for name, site in self._observed.items():
            value = site["value"].detach().flatten()
            same = [i for i in order if _equal(self.batch[i].flatten(), value)]
            if not same and len(self._observed) == 1:  # data that the program changes, such as standardized ones
                same = [i for i in order if i in self._optional and len(self.batch) > 1]
            if same:
                found[name] = same[0]
        return found

    @property
    def _optional(self) -> list[int]:
        """Places of arguments that may be left out to predict them."""
        parameters = self.program._signature().parameters
        names = self._names[: len(self.batch)]
        return [i for i, n in enumerate(names) if n in parameters and parameters[n].default is None]

    @property
    def _inputs(self) -> Batch:
        """The batch without the optional arguments that are observed."""
        read = {i for i in self._places.values() if i in self._optional}
        if isinstance(self.batch, Arguments):
            return self.batch.without(read)
        count = len(self.batch)
        while count - 1 in read:
            count -= 1
        return self.batch[:count]

    def _shared_by(self, name: str, make: Callable[[], Any]) -> Any:
        """A quantity that the cases of all sites share."""
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]

    # -- importance weights --------------------------------------------------------------------------------------

    @cached_property
    def accuracy(self) -> GuideAccuracy | None:
        """How far the guide is from the posterior given the training data; None where every row has its own latents.

        Raises:
            ValueError: If the fit has not kept it, and the training data were not given.
        """
        posterior = self.posterior
        if posterior.kind != "guide" or posterior._fitted.amortized or not posterior.structure.latent:
            return None
        if posterior.accuracy is None and not self.knows_train:
            raise ValueError(
                "The posterior holds no draws weighed on its training data: the fit was interrupted, made by hand, or "
                "they take too long. Pass train=."
            )
        if posterior.accuracy is None:
            draws = guide_draws(posterior._fitted, self.train, GLOBAL_DRAWS, self.seed)
            return judged(posterior._fitted, self.train, draws, self.seed)
        return posterior.accuracy

    @cached_property
    def row_draws(self) -> GuideDraws:
        """Draws of the latents of each row of `sample_batch`, with the gradients of their log-density."""
        return guide_draws(self.posterior._fitted, self.sample_batch, self.particles, self.seed)

    @cached_property
    def log_weights(self) -> Array:
        """``log p(x, z_k) - log q(z_k | x)`` of `sample_batch`: ``(particles, rows)``, or ``(particles,)`` jointly."""
        return array(self.posterior.log_weights(*given(self.sample_batch), particles=self.particles, seed=self.seed))

    @cached_property
    def traces(self) -> tuple[Any, Any]:
        """Traces of guide and model on `sample_batch`; the leading dimension is draws."""
        return self.posterior.trace(*given(self.sample_batch), draws=self.particles, seed=self.seed)


def given(batch: Batch) -> tuple[Any, ...]:
    """A batch as the arguments of a query."""
    return (batch,) if isinstance(batch, Arguments) else batch


def _chosen(posterior: Posterior, site: str | None) -> tuple[str, ...]:
    observed = posterior.structure.observed
    if site is not None and site not in observed:
        raise ValueError(f"the program observes no site {site!r}. Choose from: {', '.join(observed) or 'none'}.")
    return observed if site is None else (site,)


def _labels(data: Any, batch: Batch) -> tuple[str, Tensor] | None:
    """Name and values of a field of one number a row that the program does not take."""
    if data is None or (isinstance(batch, Arguments) and not isinstance(data, Split)):
        return None
    split = as_split(data)
    for name in split.names[len(batch) :]:
        if split[name].dim() == 1:
            return name, split[name]
    return None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.isclose(a.to(b), b, rtol=0, atol=0, equal_nan=True).all())


def num_optional(program: Program) -> int:
    """Number of arguments of a program's model that default to None, as observed values do.

    Examples:
        >>> def line(x, y=None): ...
        >>> num_optional(Program.of(line))
        1
    """
    return sum(p.default is None for p in program._signature().parameters.values())


@dataclass(frozen=True)
class Diagnostic:
    """One question about a `Case`.

    Args:
        name: The name of its check in a report.
        question: The question, in one sentence.
        applies: Whether the question makes sense for a case.
        run: Answers the question at a given false-alarm level; the level holds if the posterior is exact.
        about: The claim that the check supports: that the ``"fit"`` succeeded, that the ``"posterior"`` is right, that
            the ``"predictions"`` are, or that the ``"data"`` are a fair test of them.
        tests: Whether the answer is a statistical test and uses up part of the level; the false alarms of
            fixed thresholds are negligible.
        by_site: Whether the question is asked about every observed site.
    """

    name: str
    question: str
    applies: Callable[[Case], bool]
    run: Callable[[Case, float], Check]
    about: About = field(kw_only=True)
    tests: bool = False
    by_site: bool = False
