"""The settings of a fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepprob.fitting.callbacks import Callback
from deepprob.fitting.course import Course


@dataclass(frozen=True)
class FitSettings:
    """The settings of a fit.

    Attributes:
        batch_size: Rows per step.
        course: The number of steps, and the learning rate of each.
        seed: The fit's seed.
        callbacks: The callbacks of the fit.
        config: The routine and its settings, as JSON.
    """

    batch_size: int
    course: Course
    seed: int
    callbacks: Sequence[Callback]
    config: Mapping[str, Any]
