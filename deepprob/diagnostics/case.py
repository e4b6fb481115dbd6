"""`Case`, the posterior and data that checks examine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepprob.diagnostics.case_data import given as given
from deepprob.diagnostics.case_sites import CaseSites
from deepprob.diagnostics.check import Array, array
from deepprob.diagnostics.finite import finite_rows
from deepprob.diagnostics.left_out import LeftOut, left_out
from deepprob.engine.subject import Untraceable
from deepprob.posteriors.guide_accuracy import DRAWS as GLOBAL_DRAWS
from deepprob.posteriors.guide_accuracy import GuideAccuracy, judged
from deepprob.posteriors.guide_draws import GuideDraws, guide_draws
from deepprob.posteriors.variables import variable_of
from deepprob.programs.minibatch import num_rows
from deepprob.programs.program import Program

if TYPE_CHECKING:
    from deepprob.posteriors.prediction import Prediction

# Errors that say that a question has no answer for a program whose data were checked.
REFUSALS = (ValueError, RuntimeError, TypeError, IndexError, AttributeError, Untraceable)
# Replicates per false alarm: with 2 / level of them the smallest p-value is half the level.
_REPLICATES = 2
_PARTICLES = 20  # of the bound of a row


class Case(CaseSites):
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

    # -- predictions -------------------------------------------------------------------------------------------------

    @cached_property
    def scores(self) -> tuple[Array, float] | None:
        """The log-likelihood of each given row, or its bound where latents belong to rows; None if it has no rows.

        Beside it stands how much higher the mean may rightly be for rows of the fit; see `check_overfitting`.
        """
        data, seed = given(self.batch), self.seed
        try:
            if self.has_latents("local"):
                found, rightly = array(self.posterior.elbo(*data, particles=_PARTICLES, seed=seed)), 0.0
            else:
                terms = self.posterior.log_likelihood(*data, draws=self.draws, seed=seed)
                found = array(terms.logsumexp(0) - math.log(len(terms)))
                rightly = float(terms.var(0).log1p().mean() / 2)
        except REFUSALS:
            return None
        return (found, rightly) if self.batch and len(found) == num_rows(self.batch) else None

    @property
    def kind(self) -> str:
        """The kind of the predicted site, as of `Prediction`."""
        return self.in_sample.kind

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes of a target, by number; their numbers where they have none."""
        count = 2 if self.kind == "binary" else int(self.in_sample.probs.shape[-1])
        return self.in_sample.class_names or tuple(map(str, range(count)))

    @property
    def prediction(self) -> Prediction:
        """The posterior predictive distribution of every row; of a row of the fit, without this row's own effect."""
        found = self.left_out
        return self.in_sample if found is None else self.in_sample.reweighted(found.log_weights, seed=self.seed)

    @property
    def complete(self) -> Array:
        """The target with predicted values in the place of those that do not count, which may be anything."""
        return self.target if self.mask is None else np.where(self.mask, self.target, self.replicates[0])

    @property
    def left_out(self) -> LeftOut | None:
        """The weights that leave each training row out of the posterior; None if no row has an effect on it."""
        if self.variable is not None:
            return self._of(self.sites).left_out  # a row has an effect by all of its columns
        name = f"left out of {self.sites[0]}"
        found: LeftOut | None = self._shared_by(
            name, lambda: left_out(self.in_sample, self.complete, self._in_fit, self.site, self.mask)
        )
        return found

    @property
    def how(self) -> str:
        """How rows of the fit were predicted, as a sentence; empty if all rows are new to the posterior."""
        return "" if self.left_out is None else self.left_out.words

    @property
    def in_sample(self) -> Prediction:
        """The prediction by the posterior as it is, which rows of the fit have an effect on."""
        found = self.posterior._fitted.prediction(self._predicted, self.sites[0], self.draws)
        return found if self.variable is None else variable_of(found, self.variable)

    @property
    def _in_fit(self) -> NDArray[np.bool_]:
        """Whether each row of the batch was in the fit and has an effect on its own prediction."""
        own = self.has_latents("local") or bool(self.posterior.structure.summed)
        alone = not self.supervised or own or not self.has_latents("global")
        shared = self.overlap.shared[self.row_numbers]
        return np.zeros_like(shared) if alone else shared

    @property
    def replicates(self) -> Array:
        """Data sets drawn from the posterior predictive, one per draw of the latents: ``(draws, rows, ...)``."""
        return self._drawn(self._predicted, self.draws)

    def replicates_for(self, level: float) -> Iterator[Array]:
        """`replicates` in chunks, as many as a test at this level needs."""
        yield self.replicates
        for chunk in range(1, -(-draws_for(level) // self.draws)):
            options = {"draws": self.draws, "seed": self.seed + chunk}
            yield self._drawn(self.posterior.trace(*given(self._inputs), predict=True, **options)[1], self.draws)

    def new_targets(self, level: float) -> Array:
        """Targets of the rows if they were drawn anew, as many as a test at this level needs: ``(draws, rows, ...)``.

        Those of rows of the fit leave out the row's own effect, and are independent of each other.
        """
        if (found := self.left_out) is None:
            drawn = np.concatenate([*self.replicates_for(level)])
        else:
            draws = max(self.draws, draws_for(level))
            drawn = array(self.in_sample.reweighted(found.log_weights, draws, self.seed + 1).draws)
        return self.finite(drawn, "prediction", axis=1)

    def finite(self, values: ArrayLike, what: str, axis: int = 0) -> Array:
        """Values by row of the batch, all of them finite.

        Raises:
            NotFinite: If some are not finite; it names the rows and the site.
        """
        return finite_rows(values, f"{what} of {self.site}", self.row_numbers, axis)

    def prior_replicates_for(self, level: float) -> Array:
        """Rows of `sample_batch` drawn anew, ``(draws, rows, ...)``, as many as a test at this level needs.

        Local latents come from the prior.
        """
        chunks = range(-(-max(self.particles, draws_for(level)) // self.particles))
        drawn = [self._drawn(self._draw_rows(self.seed + chunk), self.particles) for chunk in chunks]
        return self.sample_case.finite(np.concatenate(drawn), "prediction", axis=1)

    @property
    def sample_case(self) -> Case:
        """The same question about `sample_batch`."""
        twin = self._of(self.sites)
        twin.batch, twin._shared = self.sample_batch, self._shared_by("sample", lambda: {"overlap": self.overlap})
        twin.row_numbers = (
            self.row_numbers if self._sample_rows is None else self.row_numbers[self._sample_rows.numpy()]
        )
        return twin

    def _draw_rows(self, seed: int) -> Any:
        batch, fitted = self.sample_batch, self.posterior._fitted
        if not self.per_row:
            return self.posterior.trace(*given(batch), predict=True, draws=self.particles, seed=seed)[1]
        # Sequences are drawn with the lengths that are given; other rows need no arguments.
        free = num_optional(self.program) >= len(batch) and not self.ragged
        rows = num_rows(batch) if batch else self.rows
        with fitted.querying(seed):
            return fitted.run_prior(() if free else fitted.accept(given(batch)), rows, self.particles)

    def _drawn(self, trace: Any, draws: int) -> Array:
        layout = self._layout(draws)
        values = [self._part(array(layout.draws_first(trace.nodes[name]))) for name in self.sites]
        return values[0].reshape(draws, -1, *values[0].shape[2:]) if len(values) == 1 else np.stack(values, 1)

    @property
    def members(self) -> int:
        """How many fits the draws come from that are no Markov chains, such as those of an ensemble; else 0."""
        return int(self.posterior.config.get("members", 0)) if self.posterior.kind == "draws" else 0

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
                "The posterior holds no draws weighed on its training data: the fit was interrupted, made by hand, "
                "shorter than 100 steps, or they take too long. Pass train=."
            )
        if posterior.accuracy is None:
            draws = guide_draws(posterior._fitted, self.train, GLOBAL_DRAWS, self.seed)
            return judged(posterior._fitted, self.train, draws, self.seed)
        return posterior.accuracy

    @cached_property
    def draws_accuracy(self) -> GuideAccuracy | None:
        """How far stored draws are from the posterior of the training data; None where every row has its own latents.

        Raises:
            ValueError: If they were not judged when they were stored, and the training data were not given.
        """
        posterior = self.posterior
        if posterior.kind != "draws" or posterior._fitted.amortized or posterior.accuracy is not None:
            return posterior.accuracy if posterior.kind == "draws" else None
        if self.members and all(x.shape[1] == 1 for x in (posterior.chains or {}).values()):
            raise ValueError(
                f"The {self.members} members are modes, not draws from the posterior: nothing tells how far their "
                "spread is from its widths."
            )
        if not self.knows_train:
            raise ValueError(
                "The draws were not compared with the density of their data: it failed, took too long, or an earlier "
                "version saved them. Pass train=."
            )
        draws = guide_draws(posterior._fitted, self.train, min(posterior._fitted.num_stored, GLOBAL_DRAWS), self.seed)
        return judged(posterior._fitted, self.train, draws, self.seed)

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


def draws_for(level: float) -> int:
    """Number of replicates that a test at this level needs.

    Examples:
        >>> draws_for(0.05), draws_for(0.005)
        (40, 400)
    """
    return math.ceil(_REPLICATES / level)


def num_optional(program: Program) -> int:
    """Number of arguments of a program's model that default to None, as observed values do.

    Examples:
        >>> def line(x, y=None): ...
        >>> num_optional(Program.of(line))
        1
    """
    return sum(p.default is None for p in program._signature().parameters.values())
