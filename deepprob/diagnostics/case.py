"""What a check is asked about, and the question itself."""

from __future__ import annotations

import inspect
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


# Elements of one (particles, rows, ...) tensor of a check: bounds memory at a few times 80 MB.
ELEMENTS = 20_000_000


class Case:
    """A posterior and some data, with what several checks share worked out once.

    Args:
        posterior: What is judged.
        data: Held-out data, of the kinds that the program takes.
        train: The data it was fitted to, if global latents are to be judged: their posterior is one
            given these.
        ood: Data of another kind, on which the posterior should be less sure.
        draws: Number of posterior draws for predictions.
        particles: Number of importance samples.
        max_rows: Number of rows, chosen at random, for predictions.
        max_sample: Number of rows for checks that cost much per row.
        seed: Where the random numbers start.
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
        # Without a plate that was named there are no rows to choose from: the fit saw all of its data.
        self.whole = not self.program.data_name or self.program.adopted
        everything = as_split(data)
        self.rows = len(everything)
        self.data = self._some(everything, max_rows)
        self.batch = self.program.accept(self.data)
        self.train = everything if train is None and self.whole else train
        self.ood = ood

    @property
    def ragged(self) -> bool:
        """Whether rows are sequences of unequal length, padded."""
        return self.program.variable_length or "lengths" in self.data.names

    @property
    def supervised(self) -> bool:
        """Whether the last argument is a target that the others predict: ``model(x, y=None)``."""
        return len(self.batch) >= 2 and not self.ragged and num_optional(self.program) > 0

    @property
    def per_row(self) -> bool:
        """Whether all latents are local and rows stand on their own, so that each can be judged by itself."""
        return self.has_latents("local") and not self.has_latents("global") and not self.whole

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What predictions are made from."""
        return self.batch[:-1] if self.supervised else self.batch

    @property
    def target(self) -> Array:
        """What is predicted, shape ``(rows, ...)``: the target, or the data themselves if there is none."""
        return array(self.batch[-1] if self.supervised else self.batch[0])

    @cached_property
    def prediction(self) -> Prediction:
        """The posterior predictive of every row."""
        return self.posterior.predict(*self.inputs, draws=self.draws, seed=self.seed)

    @cached_property
    def replicates(self) -> Array:
        """Data sets drawn from the posterior predictive, one per draw of the latents: ``(draws, rows, ...)``."""
        return array(self.prediction.draws)

    def has_latents(self, kind: str) -> bool:
        """Whether some latent site is ``"local"`` (one per row) or ``"global"``."""
        return kind in self.posterior.latent_sites.values()

    @cached_property
    def sample(self) -> Split:
        """Some rows, at random, few enough for checks that cost much per row."""
        room = int(ELEMENTS / (self.particles * max(1, self.batch[0][0].numel())))
        return self._some(self.data, min(self.max_sample, max(room, 16)))

    @cached_property
    def sample_batch(self) -> tuple[Any, ...]:
        """`sample`, as the program takes it."""
        return self.program.accept(self.sample)

    @cached_property
    def log_weights(self) -> Array:
        """``log p(x, z_k) - log q(z_k | x)`` of `sample`: ``(particles, rows)``, or ``(particles,)`` for all rows."""
        return array(self.posterior.log_weights(*self.sample_batch, particles=self.particles, seed=self.seed))

    @cached_property
    def traces(self) -> tuple[Any, Any]:
        """Guide and model run on `sample`, draws leading."""
        return self.posterior.trace(*self.sample_batch, draws=self.particles, seed=self.seed)

    def _some(self, data: Split, most: int) -> Split:
        if self.whole or len(data) <= most:
            return data
        order = np.random.default_rng(self.seed).permutation(len(data))[:most]
        return data.rows(torch.from_numpy(np.sort(order)))


def num_optional(program: Program) -> int:
    """How many arguments of a program's model may be left out, as observed ones may: their default is None.

    Examples:
        >>> def line(x, y=None): ...
        >>> num_optional(Program.of(line))
        1
    """
    model = program.__dict__.get("_model", program.model)  # a program made of functions passes on any arguments
    return sum(p.default is None for p in inspect.signature(model).parameters.values())


@dataclass(frozen=True)
class Diagnostic:
    """One question that can be asked of a `Case`.

    Args:
        name: Its name in a report.
        question: What it asks, in one sentence.
        applies: Whether it can be asked.
        run: Asks it, at a given false-alarm level, which it holds for posteriors that are exact.
        tests: Whether it spends that level; questions with a fixed threshold do not raise false
            alarms to speak of.
    """

    name: str
    question: str
    applies: Callable[[Case], bool]
    run: Callable[[Case, float], Check]
    tests: bool = False
