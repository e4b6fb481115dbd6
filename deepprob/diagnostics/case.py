"""`Case`, the posterior and data that checks examine, and `Diagnostic`, one question about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deepprob.data import Split, as_split
from deepprob.diagnostics.check import Array, Check, array
from deepprob.programs.program import Program

if TYPE_CHECKING:
    from deepprob.posteriors.posterior import Posterior
    from deepprob.posteriors.prediction import Prediction


# Largest number of elements of one (particles, rows, ...) tensor; keeps memory at a few times 80 MB.
MAX_ELEMENTS = 20_000_000


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
    ) -> None:
        self.posterior, self.program = posterior, posterior.program
        self.draws, self.particles, self.seed = draws, particles, seed
        self.max_sample = max_sample
        # Without a named data plate rows cannot be selected: every step of the fit saw all of the data.
        self.needs_all_rows = not self.program.data_name
        split = None if data is None else _split(self.program, data)
        self.rows = posterior.instance.num_data if split is None else len(split)
        self.data = self._random_rows(split, max_rows)
        self.batch = self.program.accept(self.data)
        self.knows_train = train is not None or self.needs_all_rows or data is None
        self.train = split if train is None and self.needs_all_rows else train
        self.ood = ood

    @property
    def ragged(self) -> bool:
        """Whether rows are padded sequences of unequal length."""
        return self.program.variable_length or (self.data is not None and "lengths" in self.data.names)

    @property
    def supervised(self) -> bool:
        """Whether the last argument is the only target, predicted from the others: ``model(x, y=None)``."""
        optional = len(self.batch) >= 2 and not self.ragged and num_optional(self.program) > 0
        found = self.posterior.structure
        return optional and len(found.observed) == 1 and not found.undrawable

    @property
    def per_row(self) -> bool:
        """Whether all latents are local and rows are independent, so that each row can be checked on its own."""
        return self.has_latents("local") and not self.has_latents("global") and not self.needs_all_rows

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The arguments from which the target is predicted."""
        return self.batch[:-1] if self.supervised else self.batch

    @property
    def target(self) -> Array:
        """The predicted quantity, shape ``(rows, ...)``: the target, or the data if there is no target."""
        return array(self.batch[-1] if self.supervised else self.batch[0])

    @cached_property
    def prediction(self) -> Prediction:
        """The posterior predictive distribution of every row."""
        return self.posterior.predict(*self.inputs, draws=self.draws, seed=self.seed)

    @cached_property
    def replicates(self) -> Array:
        """Data sets drawn from the posterior predictive, one per draw of the latents: ``(draws, rows, ...)``."""
        return array(self.prediction.draws)

    def has_latents(self, kind: str) -> bool:
        """Whether some latent site is of a kind: ``"local"`` (one per row) or ``"global"``."""
        return kind in self.posterior.latent_sites.values()

    @cached_property
    def sample(self) -> Split | None:
        """Random rows, few enough for checks that are expensive per row; None for a program that holds its data."""
        if self.data is None:
            return None
        affordable = int(MAX_ELEMENTS / (self.particles * max(1, self.batch[0][0].numel())))
        return self._random_rows(self.data, min(self.max_sample, max(affordable, 16)))

    @cached_property
    def sample_batch(self) -> tuple[Any, ...]:
        """`sample` as arguments of the program."""
        return self.program.accept(self.sample)

    @cached_property
    def log_weights(self) -> Array:
        """``log p(x, z_k) - log q(z_k | x)`` of `sample`: ``(particles, rows)``, or ``(particles,)`` jointly."""
        return array(self.posterior.log_weights(*self.sample_batch, particles=self.particles, seed=self.seed))

    @cached_property
    def traces(self) -> tuple[Any, Any]:
        """Traces of guide and model on `sample`; the leading dimension is draws."""
        return self.posterior.trace(*self.sample_batch, draws=self.particles, seed=self.seed)

    def _random_rows(self, data: Split | None, most: int) -> Split | None:
        if data is None or self.needs_all_rows or len(data) <= most:
            return data
        order = np.random.default_rng(self.seed).permutation(len(data))[:most]
        return data.rows(torch.from_numpy(np.sort(order)))


def _split(program: Program, data: Any) -> Split:
    """The rows of data; a tuple's fields have the names of the model's arguments, so that they keep their order."""
    split, names = as_split(data), program.argument_names
    if type(data) is not tuple or len(names) < len(data):
        return split
    return Split(dict(zip(names, split, strict=False)))


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
        tests: Whether the answer is a statistical test and uses up part of the level; the false alarms of
            fixed thresholds are negligible.
    """

    name: str
    question: str
    applies: Callable[[Case], bool]
    run: Callable[[Case, float], Check]
    tests: bool = False
