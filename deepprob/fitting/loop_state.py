"""The state of a fit whose steps the user takes one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.fitting.buckets import LengthBuckets
from deepprob.fitting.chunks import Chunks
from deepprob.fitting.course import Length
from deepprob.fitting.objectives import Objective
from deepprob.fitting.optimizers import Optimizer
from deepprob.fitting.row_order import RowOrder
from deepprob.fitting.state import State
from deepprob.posteriors.posterior import Posterior
from deepprob.programs.laplace import finish_guide
from deepprob.programs.minibatch import Batch


@dataclass(kw_only=True)
class LoopState(State):
    """A `State`, and what its steps share.

    Attributes:
        data: All rows, on the device; of rows that are read while steps run, a sample.
        chunks: Those rows, or None.
        batch_size: Rows of a step.
        length: The length of the fit that the user asked for.
        objective: The objective to maximize.
        factory: The optimizer.
        learning_rate: The step size, unless a step is given another.
        noise: The source of random numbers.
        order: The order of the rows, epoch by epoch.
        seed: The seed of noise and order.
        config: The settings, as JSON.
    """

    data: Batch
    chunks: Chunks | None = None
    batch_size: int
    length: Length
    objective: Objective
    factory: Optimizer
    learning_rate: float
    noise: RandomStream
    order: RowOrder | Chunks
    seed: int
    config: Mapping[str, Any]

    def next_rows(self) -> Tensor:
        """The rows of the next step."""
        return self.order.rows(self.step, self.step + 1)[0]

    def rows_at(self, places: Tensor, *, chosen: bool) -> Batch:
        """What a step reads at some places: of rows in memory, those of the batch.

        Args:
            places: Their places, as `next_rows` gave them, or the rows that the user chose.
            chosen: Whether the user chose them.

        Raises:
            ValueError: If a loader would have to find the rows.
        """
        if self.chunks is None:
            return tuple(x.index_select(0, places) for x in self.data)
        if chosen:
            return self.chunks.chosen(places)
        return tuple(x.index_select(0, places) for x in self.chunks.data_of(0))

    def posterior(self) -> Posterior:
        """The posterior at the present parameters, or at their average if the optimizer averages. It ends the loop.

        The posterior takes over the state's copy of the program: a further step would change it.

        Raises:
            ValueError: If ``guide="laplace"`` has not reached a mode.
        """
        if self.average is not None:
            with torch.no_grad():
                for name, value in self.average.items():
                    self.params[name].copy_(value)
        finish_guide(self.instance, self.data)
        config, rows = {**self.config, "steps": self.step}, LengthBuckets(self.data).training_rows(self.instance)
        if self.chunks is not None:
            rows = self.chunks.training_rows(self.instance)
            self.chunks.close()
        return Posterior(self.instance, config=config, seed=self.seed, training_rows=rows)
